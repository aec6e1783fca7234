"""Writes a pipeline's folder as one file in the original layout, tensor by tensor."""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from utils.config.file_names import SCHEDULER_CONFIG
from utils.config.options import UserError, first_line
from utils.config.user_files import FileError
from utils.formats.modelspec import ModelFacts, modelspec, schedule_marks
from utils.formats.original_layout import TEXT_MODEL, OriginalModel, OriginalTensor
from utils.formats.streaming import StreamedTensor, write_streamed
from utils.formats.tensor_files import READ_DTYPES, TensorFile, widened_dtype
from utils.models.base_card import BaseModel
from utils.models.folder_form import num_overflowed, overflow_text, rounded
from utils.models.registry import FAMILIES
from utils.models.weight_files import check_stored, stored_in, weight_files
from utils.runtime.hub_files import INDEX, class_name_of, read_config

if TYPE_CHECKING:
    from utils.models.base import Family

logger = logging.getLogger(__name__)
USUAL_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


@dataclass(frozen=True)
class FileFacts:
    """What a file says about itself beside what its folder says; None for what is unknown.

    Attributes:
        title: name of the model; by default that of the file.
        resolution: width and height in pixels; by default the UNet's.
        merged_from: the model that training started from.
        licence: its licence; by default that of the folder's own card.
        encoder_layer: text encoder layer that is read, from the last one, which is 1.
    """

    title: str | None = None
    resolution: tuple[int, int] | None = None
    merged_from: str | None = None
    licence: str | None = None
    encoder_layer: int | None = None


@dataclass(frozen=True)
class StoredPart:
    """A component's weights in a folder.

    Attributes:
        shapes: shapes of its tensors by name.
        dtypes: their dtypes, as safetensors names them.
        files: the file of each tensor.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    files: dict[str, Path]


@dataclass
class PipelineFolder:
    """A folder of a pipeline that has an original layout.

    Attributes:
        path: the folder.
        configs: configs of its components by name.
        model: its original layout.
        parts: its components with weights in that layout, by name.
    """

    path: Path
    configs: Mapping[str, Mapping]
    model: OriginalModel
    parts: dict[str, StoredPart] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, flag: str, variant: str | None = None) -> "PipelineFolder":
        """Reads the configs, and names and shapes of the weights.

        Args:
            path: the folder.
            flag: the option that named it, for messages.
            variant: variant of the weights; by default the plain one, or the only one.

        Raises:
            UserError: if it is not such a pipeline, or weights are missing or can't be used.
        """
        what = f"{flag} {path}"
        family = family_of_folder(path, flag)
        names = [*family.needed_names()]
        configs = {name: _config(path, name, flag) for name in names if name not in family.tokenizer_names}
        found = cls(path, configs, family.original_model(configs))
        for name in found.model.parts:
            found.parts[name] = _stored_part(path / name, f"{what}: {name}", variant)
        return found

    def original(self, name: str) -> list[OriginalTensor]:
        """Returns a component's tensors in the original layout, with its prefix.

        Raises:
            UserError: if the layout has no place for one.
        """
        part = self.model.parts[name]
        return laid_out(part.layout, self.parts[name].shapes, self.configs[name], part.prefix, f"{self.path}")


def laid_out(
    layout: Callable[[Mapping, Mapping], list[OriginalTensor]],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, object],
    prefix: str,
    what: str,
) -> list[OriginalTensor]:
    """Returns a component's tensors in the original layout, with its prefix.

    Raises:
        UserError: if the layout has no place for one.
    """
    try:
        found = layout(shapes, config)
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{what} can't be written as a single file of the original layout: {first_line(error)}, which that has no "
            "name for; use the folder instead"
        ) from error
    return [OriginalTensor(prefix + each.name, each.sources, each.change, each.constant) for each in found]


def check_has_original(family: "Family") -> None:
    """Refuses a loaded pipeline that can't be written as a single file.

    Raises:
        UserError: saying what the original layout lacks.
    """
    components = family.pipeline.components
    configs = {name: _as_dict(part.config) for name, part in components.items() if hasattr(part, "config")}
    model = family.original_model(configs)
    if model is None:
        raise UserError(
            f"--export_single_file: a {family.pipeline_class_name} has no single-file layout; leave the flag out"
        )
    for name, part in model.parts.items():
        shapes = _plain_shapes(components[name])
        laid_out(part.layout, shapes, configs[name], part.prefix, f"--export_single_file: the {name}")


def _as_dict(config: object) -> Mapping[str, object]:
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _plain_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a module's weights, without those of adapters that it may carry."""
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in module.state_dict().items()}
    adapters = ("lora_", "hada_", "lokr_")
    return {
        name: tuple(tensor.shape)
        for name, tensor in state.items()
        if not any(word in name for word in adapters) and not name.rpartition(".")[2].startswith(("absmax", "quant_"))
    }


def family_of_folder(path: Path, flag: str) -> "type[Family]":
    """Returns the family of a pipeline's folder.

    Raises:
        UserError: if it is not the folder of a supported pipeline.
    """
    if not (path / INDEX).is_file():
        raise UserError(f"{flag} {path} is not a pipeline's folder: it has no {INDEX}")
    kind = class_name_of(read_config(path / INDEX, flag))
    if kind not in FAMILIES:
        raise UserError(f"{flag} {path} is a {kind}; single files are those of a {' or '.join(FAMILIES)}")
    return FAMILIES[kind]


def _config(path: Path, name: str, flag: str) -> Mapping:
    file = path / name / (SCHEDULER_CONFIG if name == "scheduler" else "config.json")
    return read_config(file, flag)


def _stored_part(folder: Path, what: str, variant: str | None) -> StoredPart:
    """Returns names, shapes and dtypes of a component's weights, from the headers of its files."""
    try:
        files = weight_files(folder, variant, with_pickles=False) or weight_files(folder, _only_variant(folder), False)
    except FileError as error:
        raise UserError(f"{what}: {error}") from error
    if not files:
        raise UserError(f"{what} has no .safetensors weights; convert it with save_pretrained()")
    found = StoredPart({}, {}, {})
    for file in files:
        try:
            stored = stored_in(file)
        except (FileError, OSError, SafetensorError) as error:
            raise UserError(f"{what}/{file.name} can't be read: {first_line(error)}") from error
        check_stored(what, stored)
        found.shapes.update({name: each.shape for name, each in stored.items()})
        found.dtypes.update({name: each.dtype for name, each in stored.items()})
        found.files.update(dict.fromkeys(stored, file))
    return found


def _only_variant(folder: Path) -> str | None:
    """Returns the variant of a folder's weights, if all have one."""
    names = {path.name.split(".")[1].partition("-")[0] for path in folder.glob("*.*.safetensors")}
    return names.pop() if len(names) == 1 else None


def write_single_file(
    folder: Path,
    file: Path,
    given: FileFacts | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    flag: str = "--export_single_file",
) -> str:
    """Writes the pipeline of a folder as one file in the original layout, one tensor at a time.

    Args:
        folder: folder of the pipeline.
        file: the file to write or replace.
        given: what the file says about itself beside what the folder says.
        dtype: dtype of its weights; None for that of the folder's.
        variant: variant of the folder's weights.
        flag: the option that named the folder, for messages.

    Returns:
        The SHA-256 of its tensors.

    Raises:
        UserError: if the folder can't be read, or the original layout has no place for a weight.
        OSError: if the file can't be written.
    """
    source = PipelineFolder.read(folder, flag, variant)
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        paths = {path for part in source.parts.values() for path in part.files.values()}
        opened = {path: stack.enter_context(TensorFile(path)) for path in sorted(paths)}
        tensors = [
            _streamed(each, source.parts[name], opened, dtype, counts)
            for name in source.parts
            for each in source.original(name)
        ]
        scheduler = source.configs["scheduler"]
        tensors += [_mark(name, dtype or torch.float32) for name in schedule_marks(scheduler)]
        found = write_streamed(tensors, file, {"format": "pt", **modelspec(facts_of(source, given, file))})
    if counts:
        logger.warning("%s: %s", file, overflow_text(counts))
    for line in unsaid(source, file):
        logger.warning("%s", line)
    return found


def _streamed(
    tensor: OriginalTensor,
    part: StoredPart,
    opened: Mapping[Path, TensorFile],
    dtype: torch.dtype | None,
    counts: dict[str, int],
) -> StreamedTensor:
    """Returns a tensor to write; `counts` gets the number of its values that its dtype can't hold."""
    if tensor.constant is not None:
        is_weight = tensor.constant.is_floating_point()
        found = (dtype or _main_dtype(part)) if is_weight else tensor.constant.dtype
        return StreamedTensor(tensor.name, found, tuple(tensor.constant.shape), lambda: tensor.constant)
    stored = _written_dtype(part.dtypes[tensor.sources[0]])
    target = dtype if dtype is not None and stored.is_floating_point else stored
    shape = tensor.shape([part.shapes[name] for name in tensor.sources])
    return StreamedTensor(tensor.name, target, shape, partial(_read, tensor, part, opened, target, counts))


def _written_dtype(name: str) -> torch.dtype:
    """Returns the dtype in which a tensor is written, given the stored one as safetensors names it."""
    return widened_dtype(READ_DTYPES.get(name, torch.float32))


def _main_dtype(part: StoredPart) -> torch.dtype:
    return next(dtype for each in part.dtypes.values() if (dtype := _written_dtype(each)).is_floating_point)


def _read(
    tensor: OriginalTensor,
    part: StoredPart,
    opened: Mapping[Path, TensorFile],
    dtype: torch.dtype,
    counts: dict[str, int],
) -> Tensor:
    before = tensor.made_of([opened[part.files[name]].read(name) for name in tensor.sources])
    after = rounded(before, dtype)
    if count := num_overflowed(before, after):
        counts[tensor.name] = count
    return after


def _mark(name: str, dtype: torch.dtype) -> StreamedTensor:
    return StreamedTensor(name, dtype, (0,), lambda: torch.empty(0))


def facts_of(source: PipelineFolder, given: FileFacts | None, file: Path) -> ModelFacts:
    """Returns what a file says about its model."""
    given = given or FileFacts()
    edge, channels = source.configs["unet"].get("sample_size"), source.configs["vae"].get("block_out_channels") or [64]
    factor = 2 ** (len(channels) - 1)
    size = (edge * factor, edge * factor) if isinstance(edge, int) else None
    return ModelFacts(
        architecture=source.model.architecture,
        title=given.title or file.stem,
        resolution=given.resolution or size,
        prediction_type=source.configs["scheduler"].get("prediction_type", "epsilon"),
        merged_from=given.merged_from,
        licence=given.licence or licence_of(str(source.path)),
        encoder_layer=given.encoder_layer,
    )


def licence_of(path: str) -> str | None:
    """Returns the licence that a base names, by its card or file; None if it names none."""
    licence = BaseModel.read(path).licence
    return None if licence is None else licence.text


def unsaid(source: PipelineFolder, file: Path) -> list[str]:
    """Returns what tools will assume of a file although its folder says otherwise, as lines to log."""
    found = []
    vae, scheduler = source.configs["vae"], source.configs["scheduler"]
    if vae.get("scaling_factor", 0.18215) != source.model.scaling_factor:
        found.append(f"a scaling factor of {source.model.scaling_factor}, but it is {vae['scaling_factor']}")
    for name, usual in USUAL_BETAS.items():
        if scheduler.get(name, usual) != usual:
            found.append(f"{name} {usual}, but it is {scheduler[name]}")
    for name, usual in source.model.activations.items():
        if source.configs[name].get("hidden_act", "quick_gelu") != usual:
            found.append(f"{usual} in {name}, but it has {source.configs[name].get('hidden_act', 'quick_gelu')}")
    if scheduler.get("prediction_type", "epsilon") == "sample":
        found.append("a prediction of noise or velocity, but it predicts the sample")
    lines = [f"{file.name} can't say all that the folder's configs say: tools assume {each}" for each in found]
    return lines + unread_marks(scheduler, source.model, file)


def unread_marks(scheduler: Mapping[str, object], model: OriginalModel, file: Path) -> list[str]:
    """Returns what tools do not see of a file's noise schedule, as lines to log."""
    unread = [mark for mark in schedule_marks(scheduler) if mark not in model.marks]
    if not unread:
        return []
    return [
        f"{file.name}: tools look for the marks {', '.join(unread)} in SDXL alone, not in {model.architecture}: choose "
        "v-prediction (and zero SNR, for ztsnr) there by hand, in ComfyUI with ModelSamplingDiscrete"
    ]


def plain_name(name: str) -> str:
    """Returns a tensor's name without the prefix that transformers 4 gave text encoders."""
    return name.removeprefix(TEXT_MODEL)
