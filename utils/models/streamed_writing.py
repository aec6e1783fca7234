"""Writes pipelines tensor by tensor, as a folder or as one file in the original layout."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.config import user_files
from utils.config.file_names import SCHEDULER_CONFIG
from utils.config.options import UserError
from utils.formats.modelspec import V_MARK, ZERO_SNR_MARK, schedule_marks
from utils.formats.original_layout import OriginalTensor
from utils.formats.streaming import StreamedTensor, write_streamed
from utils.models.loading import WeightReport, class_of, loading, names_of
from utils.models.pipeline_files import PROCESSORS, complete_tokenizer, copy_part, is_part, known_class, older_name
from utils.models.streamed_pipeline import COMPONENT_CONFIG, StreamedPipeline, Weights
from utils.models.weight_files import COUNTED
from utils.runtime.atomic_files import write_text
from utils.runtime.hub_files import INDEX

logger = logging.getLogger(__name__)
WEIGHT_NAMES = {"diffusers": "diffusion_pytorch_model.safetensors"}
"""Names of weight files by library; others call them `OTHER_WEIGHTS`."""
OTHER_WEIGHTS = "model.safetensors"
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What older folders call the layers of the VAE's attention."""
AVERAGES = "model_ema."  # copies that no tool draws with, and that would not have what was merged
DTYPE_KEYS = ("dtype", "torch_dtype")
ENCODER_LAYERS = "text_model.encoder.layers."


@dataclass
class Rounding:
    """Converts tensors to a dtype as they are read, and counts the values that it can't hold.

    Attributes:
        dtype: the dtype of floating-point tensors; None to keep theirs.
        overflowed: numbers of finite values that became infinite, by tensor.
        not_finite: names of tensors that had NaN or infinite values before.
    """

    dtype: torch.dtype | None = None
    overflowed: dict[str, int] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)

    def of(self, tensor: StreamedTensor, name: str) -> StreamedTensor:
        """Returns a tensor to write, under a name."""
        dtype = tensor.dtype if self.dtype is None or not tensor.dtype.is_floating_point else self.dtype
        return StreamedTensor(name, dtype, tensor.shape, partial(self._read, tensor, dtype, name))

    def _read(self, tensor: StreamedTensor, dtype: torch.dtype, name: str) -> Tensor:
        values = tensor.read()
        rounded = values.to(dtype)
        if not dtype.is_floating_point or bool(rounded.isfinite().all()):
            return rounded
        was_finite = values.isfinite()
        if count := int((~rounded.isfinite() & was_finite).sum()):
            self.overflowed[name] = count
        if not bool(was_finite.all()):
            self.not_finite.append(name)
        return rounded

    def check(self, cure: str) -> None:
        """Warns of values that are not finite; `cure` says what to give if others overflowed.

        Raises:
            UserError: if values overflowed.
        """
        if self.not_finite:
            said = "%d tensors have NaN or infinite values, as in the input: %s"
            logger.warning(said, len(self.not_finite), names_of(self.not_finite))
        if self.overflowed:
            count = sum(self.overflowed.values())
            flag = "--dtype fp16: " if self.dtype == torch.float16 else ""
            raise UserError(
                f"{flag}{count:,} values of {len(self.overflowed)} tensors are beyond 65504, the largest of fp16: "
                f"{names_of(list(self.overflowed))}; {cure}"
            )


def write_file(pipeline: StreamedPipeline, file: Path, rounding: Rounding, metadata: Mapping[str, str]) -> str:
    """Writes a pipeline as one file in the original layout; returns its hash as `write_streamed`.

    Raises:
        UserError: if the original layout has no place for a tensor.
    """
    tensors = [rounding.of(each, each.name) for each in tensors_of_file(pipeline)]
    return write_streamed(tensors, file, metadata)


def tensors_of_file(pipeline: StreamedPipeline) -> list[StreamedTensor]:
    """Returns the tensors of a pipeline as one file in the original layout.

    Raises:
        UserError: if the original layout has no place for one.
    """
    tensors = [
        composed(each, pipeline.parts[part], place.prefix + each.name)
        for part, place in pipeline.original_parts.items()
        for each in pipeline.original_tensors(part)
    ]
    return tensors + _others(pipeline, {each.name for each in tensors})


def _others(pipeline: StreamedPipeline, known: set[str]) -> list[StreamedTensor]:
    """Returns tensors of a file that are not the parts': marks, and what the original single file has besides."""
    marks = schedule_marks(pipeline.configs.get("scheduler", {}))
    found = [StreamedTensor(name, torch.float32, (0,), partial(torch.zeros, 0)) for name in marks]
    if pipeline.file is None:
        return found
    known = known | ({V_MARK, ZERO_SNR_MARK} if pipeline.has_new_schedule else set())
    others = [each for name, each in pipeline.held.items() if name not in known]
    dropped = [each for each in others if each.name.startswith(AVERAGES)]
    if dropped:
        logger.info("%s: left out %d tensors of its moving average (%s)", pipeline.what, len(dropped), AVERAGES)
    return [each for each in others if each not in dropped] + found * pipeline.has_new_schedule


def composed(tensor: OriginalTensor, weights: Weights, name: str) -> StreamedTensor:
    """Returns a tensor of the original layout under a name, to be made of a component's tensors."""
    if tensor.constant is not None:
        values = tensor.constant
        dtype = next(iter(weights.values())).dtype if values.is_floating_point() else values.dtype
        return StreamedTensor(name, dtype, tuple(values.shape), lambda: values)
    sources = [weights[name] for name in tensor.sources]
    shape = tensor.shape([each.shape for each in sources])
    return StreamedTensor(name, sources[0].dtype, shape, lambda: tensor.made_of([each.read() for each in sources]))


def write_folder(pipeline: StreamedPipeline, folder: Path, rounding: Rounding, configs: Path) -> None:
    """Writes a pipeline as a folder of diffusers.

    Args:
        pipeline: the pipeline.
        folder: folder to write to.
        rounding: dtype of its weights.
        configs: folder of a pipeline with its configs and tokenizers: its own one unless it is a single file.
    """
    # Components: weights and configs.
    index = user_files.read_json(configs / INDEX)
    entries = {name: value for name, value in index.items() if not name.startswith("_")}
    for name, entry in index.items():
        if not is_part(entry):
            continue
        entries[name] = [entry[0], known_class(str(entry[1]))]
        if name in pipeline.parts:
            weights = fitted(pipeline, name, entry, configs / name)
            own = pipeline.configs[name] if pipeline.folder is not None else _config_in(configs / name)
            write_component(weights, folder / name, str(entry[0]), own, rounding)
        elif name == "scheduler":
            config = user_files.read_json(configs / name / SCHEDULER_CONFIG)
            write_json(config | pipeline.configs[name], folder / name / SCHEDULER_CONFIG)
        elif not (PROCESSORS.fullmatch(name) and copy_part(name, entries[name][1], configs / name, folder / name)):
            entries[name] = [None, None]

    # What goes with components that are left out, and the index.
    for name in entries:
        if name.startswith("tokenizer") and (folder / name).is_dir():
            complete_tokenizer(folder / name)
    if "requires_safety_checker" in entries and not is_part(entries.get("safety_checker")):
        entries["requires_safety_checker"] = False
    own = {name: index[name] for name in ("_class_name", "_diffusers_version") if name in index}
    write_json(own | entries, folder / INDEX)


def _config_in(folder: Path) -> dict[str, Any]:
    return user_files.read_json(folder / COMPONENT_CONFIG)


def write_component(
    weights: Weights, folder: Path, library: str, config: Mapping[str, Any], rounding: Rounding
) -> None:
    """Writes a component's weights and its config, which names their dtype if it named one before."""
    name = WEIGHT_NAMES.get(library, OTHER_WEIGHTS)
    tensors = [rounding.of(each, own) for own, each in weights.items()]
    write_streamed(tensors, folder / name, {"format": "pt"})
    dtype = {key: str(rounding.dtype).removeprefix("torch.") for key in DTYPE_KEYS if key in config}
    write_json({**config, **(dtype if rounding.dtype is not None else {})}, folder / COMPONENT_CONFIG)


def fitted(pipeline: StreamedPipeline, part: str, entry: Sequence[str], configs: Path) -> Weights:
    """Returns a component's weights as its config wants them; those of a folder are its own.

    A file of Stable Diffusion 2 has a layer of its text encoder, and a projection, that the pipeline does not read.

    Raises:
        UserError: if weights are missing, or the config is of another model.
    """
    weights = pipeline.parts[part]
    if pipeline.file is None:
        return weights
    wanted = wanted_shapes(entry, configs)
    count = _config_in(configs).get("num_hidden_layers")
    unread = (f"{ENCODER_LAYERS}{count}.", "text_projection.weight")
    left_out = [name for name in weights if name not in wanted and name.startswith(unread)]
    own = {name: each for name, each in weights.items() if name not in left_out}
    shapes = {name: each.shape for name, each in own.items()}
    _check_fit(pipeline.what, part, shapes, wanted, "give a whole model, or its configs with --pipeline_config")
    return {name: own[name] for name in wanted if name in own}


def check_complete(pipeline: StreamedPipeline) -> None:
    """Refuses a folder whose weights are not those of the models that its configs describe.

    Names are taken as diffusers and transformers load them. Weights of a single file can only be compared with configs,
    when a folder is made of it.

    Raises:
        UserError: naming what is missing, too much or of another shape.
    """
    if pipeline.folder is None:
        return
    index = user_files.read_json(pipeline.folder / INDEX)
    for part in pipeline.parts:
        entry, config, what = index[part], pipeline.configs[part], f"{pipeline.what}: {part}"
        if not config:
            raise UserError(f"{what} has no {COMPONENT_CONFIG}; give a whole pipeline")
        if class_of(*entry[:2]) is None:
            logger.warning(
                "%s: its class %s is unknown, so whether its weights are complete is not checked", what, entry[1]
            )
            continue
        wanted = _shapes_of(entry, module_of_config(entry, config, what))
        own = {newer_name(name): shape for name, shape in pipeline.shapes(part).items()}
        _check_fit(pipeline.what, part, own, wanted, "give a whole pipeline")


def _check_fit(
    what: str, part: str, own: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], cure: str
) -> None:
    """Compares names and shapes of weights with those of the model that a config describes."""
    report = WeightReport(
        wanted.keys(),
        [],
        [name for name in own if name not in wanted],
        [(name, own[name], shape) for name, shape in wanted.items() if name in own and own[name] != shape],
    )
    report.check(f"{what}: {part}", part)
    if missing := sorted(name for name in wanted if name not in own and not name.endswith(COUNTED)):
        raise UserError(f"{what} lacks {len(missing)} weights of the {part}: {names_of(missing)}; {cure}")


def newer_name(name: str) -> str:
    """Returns a weight's name in today's diffusers, for one of a VAE saved before diffusers 0.12."""
    words = name.split(".")
    if "attentions" in words and len(words) > 1 and words[-2] in OLD_ATTENTION:
        words[-2] = OLD_ATTENTION[words[-2]]
    return ".".join(words)


def wanted_shapes(entry: Sequence[str], configs: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a component's weights by their older names, from its class and its config."""
    return _shapes_of(entry, meta_module(entry, configs))


def _shapes_of(entry: Sequence[str], module: nn.Module) -> dict[str, tuple[int, ...]]:
    state = module.state_dict()
    return {older_name(str(entry[1]), name): tuple(each.shape) for name, each in state.items()}


def meta_module(entry: Sequence[str], folder: Path) -> nn.Module:
    """Returns a component without weights, on the meta device.

    Args:
        entry: its library and class, as an index names them.
        folder: the folder with its config.

    Raises:
        UserError: if the class is unknown.
    """
    if class_of(*entry[:2]) is None:
        raise UserError(f"{folder.parent / INDEX} names the class {entry[1]}, which is unknown")
    with loading(str(folder)):
        config = user_files.read_json(folder / COMPONENT_CONFIG)
    return module_of_config(entry, config, str(folder))


def module_of_config(entry: Sequence[str], config: Mapping[str, Any], what: str) -> nn.Module:
    """Returns a component of a known class without weights, on the meta device; `what` names it in messages."""
    kind = class_of(*entry[:2])
    with loading(what), torch.device("meta"):
        return kind.from_config(dict(config)) if hasattr(kind, "from_config") else kind(kind.config_class(**config))


def write_json(value: Mapping[str, Any], file: Path) -> None:
    """Writes a config."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(value, indent=2, sort_keys=True) + "\n")
