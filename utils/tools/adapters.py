"""Adapters as tools read and write them: of any format, with or without their base."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from utils.config.config_file import recorded_options
from utils.config.file_names import result_name
from utils.config.options import UserError
from utils.exports.adapter_file_check import Expected, check_adapter
from utils.formats.adapter_files import KINDS, LORA_FILE, UI_FOLDER, AdapterLayer
from utils.formats.adapter_metadata import DORA_NOTE, AdapterFacts, adapter_metadata
from utils.formats.adapter_writer import write_diffusers, write_kohya
from utils.formats.modelspec import PREDICTIONS, ModelFacts, written_at
from utils.formats.streaming import HASH_KEY, NO_HASH
from utils.models.adapter_layers import check_layers
from utils.models.folder_form import num_overflowed
from utils.models.loading import loading, names_of
from utils.models.lora_files import read_checked
from utils.models.streamed_components import AdapterBase, base_of_adapter, base_of_streamed
from utils.models.streamed_pipeline import read_streamed
from utils.tools.output_options import FILE, OutputOptions
from utils.tools.places import staged
from utils.tools.results import DATE, MERGED_FROM, OVERFLOW_CURE, PREDICTION, TITLE, dtype_of, report

logger = logging.getLogger(__name__)
CARRIED = ("ss_", "modelspec.")  # metadata that is kept; the rest describes the file it was read from
ARCHITECTURE, OUTPUT_NAME = "modelspec.architecture", "ss_output_name"
FAMILY_KEYS = ("ss_v2", "ss_base_model_version")  # unknown without a base
SCHEDULE_KEYS = ("ss_v_parameterization", "ss_zero_terminal_snr")  # unknown without a prediction type
SAID_PREDICTIONS = {said: name for name, said in PREDICTIONS.items()}
NETWORK = "ss_network_"  # what the layers themselves decide


@dataclass(frozen=True)
class Adapter:
    """An adapter, and what is known of its base.

    Attributes:
        what: its flag and value, for messages.
        layers: its layers.
        base: the base.
        metadata: what its file says about it.
        sources: names of the files and models that it was made of, if it is not one of them.
        dtype: dtype to write it in, unless another is asked for: that of what was read.
    """

    what: str
    layers: list[AdapterLayer]
    base: AdapterBase
    metadata: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32


def widest_dtype(found: Collection[torch.dtype]) -> torch.dtype:
    """Returns a dtype that holds the values of all these."""
    return next(iter(found)) if len(found) == 1 and next(iter(found)).itemsize == 2 else torch.float32


def read_adapter_alone(source: str, base: str | None, flag: str, ending: str = "") -> Adapter:
    """Reads an adapter with the base that is given, or that its run recorded, or by what its file says.

    Args:
        source: file or folder.
        base: value of --pipeline: folder or single file of its pipeline; None if it is not given.
        flag: the flag that names it.
        ending: see `adapter_sources`.

    Raises:
        UserError: if it can't be read completely.
    """
    what, path = f"--{flag} {source}", Path(source)
    known = base or _recorded_base(path)
    with loading(what):
        if known is None:
            found = base_of_adapter(path, what, ending)
        else:
            found = base_of_streamed(read_streamed(known, "--pipeline" if base else f"{what}: its base"))
    return read_for(path, found, what, ending)


def _recorded_base(source: Path) -> str | None:
    """Returns the pipeline that the run of an adapter started from, if it is on this machine."""
    for folder in (source, *source.resolve().parents[:3]):
        found = recorded_options(folder).get("pretrained_model_name_or_path") if folder.is_dir() else None
        if isinstance(found, str) and Path(found).exists():
            return found
    return None


def read_for(path: Path, base: AdapterBase, what: str, ending: str = "") -> Adapter:
    """Reads an adapter for a base.

    Raises:
        UserError: if it can't be read, or does not fit.
    """
    with loading(what):
        file = read_checked(path, base.components, what, ending)
    check_layers(file.layers, what)
    metadata = {key: value for key, value in file.metadata.items() if key.startswith(CARRIED)}
    dtypes = {tensor.dtype for layer in file.layers for tensor in layer.tensors.values()}
    return Adapter(what, file.layers, base, metadata, dtype=widest_dtype(dtypes))


def write_adapter(adapter: Adapter, out: Path, form: str, options: OutputOptions) -> None:
    """Writes an adapter, and checks it.

    Args:
        adapter: the adapter.
        out: a file, or a folder in which the files get their usual names.
        form: diffusers, kohya, or both.
        options: dtype and check.

    Raises:
        UserError: if the format has no such layers, or values do not fit the dtype.
        Diverged: if the check finds a fault; the result stays.
    """
    dtype = dtype_of(options) or adapter.dtype
    _check_form(adapter, form)
    _check_overflow(adapter.layers, dtype)
    if form != "diffusers" and any("magnitude" in layer.tensors for layer in adapter.layers):
        logger.warning("%s has LyCORIS' form of DoRA: %s; merged weights are right in all tools", out, DORA_NOTE)
    places = _places(out, form)
    with staged(out) as aside:
        for kind, place in places.items():
            target = aside if place is None else aside / place
            target.parent.mkdir(parents=True, exist_ok=True)
            metadata = _metadata(adapter, out.stem, is_for_uis=kind == "kohya")
            if kind == "kohya":
                write_kohya(adapter.layers, adapter.base.components, target, dtype, metadata)
            else:
                write_diffusers(adapter.layers, target, dtype, metadata)
    for kind, place in places.items():
        file = out if place is None else out / place
        expected = Expected(adapter.layers, adapter.base.components, dtype, adapter.base.blocks)
        report(file, options, partial(check_adapter, expected, file, kind))


def _places(out: Path, form: str) -> dict[str, str | None]:
    """Returns the files to write by their format, as paths in `out`; None for `out` itself."""
    kinds = ("diffusers", "kohya") if form == "both" else (form,)
    if out.suffix == FILE:
        return {kinds[0]: None}
    own = f"{result_name(out)}{FILE}"
    names = {"diffusers": LORA_FILE, "kohya": f"{UI_FOLDER}/{own}" if form == "both" else own}
    return {kind: names[kind] for kind in kinds}


def form_of(given: str | None, out: Path) -> str:
    """Returns the names to write where none are asked for: the UIs' in a file, both in a folder."""
    return given or ("kohya" if out.suffix == FILE else "both")


def _check_form(adapter: Adapter, form: str) -> None:
    kinds = {layer.kind for layer in adapter.layers} - {"lora"}
    if kinds and form != "kohya":
        shown = " and ".join(KINDS[kind] for kind in sorted(kinds))
        raise UserError(
            f"{adapter.what} has {shown} layers, for which diffusers has no format; give --to kohya, merge it into its "
            "base with python -m utils.tools.merge, or make a LoRA of it with python -m utils.tools.resize --to_lora"
        )
    if form != "diffusers" and not adapter.base.is_sure:
        raise UserError(
            f"{adapter.what} does not say which model it is for, and UIs name the layers of each differently; give the "
            "pipeline that it is for with --pipeline"
        )
    by_input = [layer.name for layer in adapter.layers if len(layer.tensors.get("magnitude", torch.empty(0)).shape) > 1]
    if by_input and form != "kohya":
        raise UserError(
            f"{adapter.what} is a DoRA with magnitudes of inputs, for which diffusers has no format: "
            f"{names_of(by_input)}; write it with kohya's names, or merge it into its base with python -m "
            "utils.tools.merge"
        )
    names = {component.name: component for component in adapter.base.components}
    for layer in adapter.layers if form != "diffusers" else ():
        try:
            names[layer.component].ui_name(layer.name)
        except ValueError as error:
            raise UserError(f"{adapter.what}: {error}; give --to diffusers") from error


def _check_overflow(layers: Sequence[AdapterLayer], dtype: torch.dtype) -> None:
    bad = [
        f"{layer.name}.{role}"
        for layer in layers
        for role, tensor in layer.tensors.items()
        if num_overflowed(tensor, tensor.to(dtype))
    ]
    if bad:
        raise UserError(
            f"--dtype fp16 can't hold values of {len(bad)} tensors, which are beyond 65504: {names_of(bad)}; "
            f"{OVERFLOW_CURE}"
        )


def _metadata(adapter: Adapter, title: str, is_for_uis: bool) -> dict[str, str]:
    """Returns the metadata of a result: what the input says, and what is new."""
    base, said = adapter.base, SAID_PREDICTIONS.get(adapter.metadata.get(PREDICTION, ""))
    prediction = said or base.prediction_type
    facts = AdapterFacts(ModelFacts(base.architecture or "", title, prediction_type=prediction), zero_snr=base.zero_snr)
    own = adapter_metadata(adapter.layers, facts)
    decided = {key: value for key, value in own.items() if key.startswith(NETWORK)}
    unknown = (ARCHITECTURE, *FAMILY_KEYS) if base.architecture is None else ()
    unknown += SCHEDULE_KEYS if prediction is None else ()
    own = {key: value for key, value in own.items() if key not in unknown}
    found = {**own, **adapter.metadata, **decided, DATE: written_at(), HASH_KEY: NO_HASH}
    if adapter.sources:
        found |= {TITLE: title, OUTPUT_NAME: title, MERGED_FROM: ", ".join(adapter.sources)}
    said = ("modelspec.", *FAMILY_KEYS)  # what the family is read from again
    return {key: value for key, value in found.items() if is_for_uis or key.startswith(said)}
