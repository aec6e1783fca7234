"""Pipelines whose weights are read tensor by tensor, from folders and single files, under the names of folders.

Names of text encoders are those of transformers 4, which all releases read. Nothing is loaded before it is asked for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from utils.config import user_files
from utils.config.file_names import SCHEDULER_CONFIG
from utils.config.options import UserError, first_line
from utils.config.user_files import FileError
from utils.formats.original_layout import OriginalPart, OriginalTensor
from utils.formats.original_names import TENSORS_OF
from utils.formats.streaming import StreamedTensor
from utils.formats.tensor_files import READ_DTYPES, TensorFile, widened, widened_dtype
from utils.models.adapter_components import adapted_names
from utils.models.loading import loading, variant_of
from utils.models.pipeline_files import PROCESSORS, is_part, older_name
from utils.models.registry import FAMILIES
from utils.models.single_file import SingleFile
from utils.models.text_to_image import TextFamily
from utils.models.weight_files import check_stored, stored_in, weight_files
from utils.runtime.hub_files import INDEX, class_name_of

Weights = dict[str, StreamedTensor]
"""Tensors of a component by name."""
OPEN_CLIP_PREFIX = "cond_stage_model.model."
COMPONENT_CONFIG = "config.json"


@dataclass(frozen=True)
class StreamedPipeline:
    """A pipeline to read.

    Attributes:
        what: the flag and the path, for messages.
        family: its family.
        parts: its components' tensors, by component.
        configs: configs of its components by name, that of the scheduler included; of a single file what its names say.
        folder: its folder; None for a single file.
        file: the single file; None for a folder.
        held: all tensors of the single file, by their names in it.
        changed: components whose tensors are not those of the folder or file.
    """

    what: str
    family: type[TextFamily]
    parts: Mapping[str, Weights]
    configs: Mapping[str, Mapping[str, Any]]
    folder: Path | None = None
    file: SingleFile | None = None
    held: Mapping[str, StreamedTensor] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()

    @property
    def adapted_names(self) -> tuple[str, ...]:
        """The components that adapters can change, the denoiser first."""
        return adapted_names(self.family)

    @property
    def original_parts(self) -> Mapping[str, OriginalPart]:
        """Where the original layout keeps its components."""
        return self.family.original_model(self.configs).parts

    @property
    def has_new_schedule(self) -> bool:
        """Whether its noise schedule is another one than that of its single file."""
        return self.file is not None and self.configs["scheduler"] != self.file.scheduler_marks

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of a component's tensors by name."""
        return {name: each.shape for name, each in self.parts[part].items()}

    def original_tensors(self, part: str) -> list[OriginalTensor]:
        """Returns a component's tensors in the original layout, without the prefix.

        Raises:
            UserError: if the original layout has no place for one of them.
        """
        place = self.original_parts[part]
        try:
            if self.file is not None:
                return tensors_in_file(self.file, place)
            return place.layout(self.shapes(part), self.configs.get(part, {}))
        except ValueError as error:
            raise UserError(f"{self.what} does not fit the original layout: {error}") from error

    def with_parts(self, parts: Mapping[str, Weights]) -> "StreamedPipeline":
        """Returns the pipeline with other tensors of some components."""
        return replace(self, parts={**self.parts, **parts}, changed=self.changed | parts.keys())


def stored_tensors_of(file: Path, rename: Callable[[str], str] = str) -> Weights:
    """Returns the tensors of a safetensors file by name, to be read one at a time.

    Args:
        rename: the name of a tensor, given that in the file.

    Raises:
        FileError, OSError, SafetensorError: if its header can't be read.
    """
    opened, found = TensorFile(file), {}
    for name, each in stored_in(file).items():
        if each.dtype not in READ_DTYPES:
            raise FileError(file, f"has {name} as {each.dtype}, which is not supported; give fp32, fp16 or bf16")
        own, dtype = rename(name), widened_dtype(READ_DTYPES[each.dtype])
        found[own] = StreamedTensor(own, dtype, each.shape, partial(_read_widened, opened, name))
    return found


def _read_widened(opened: TensorFile, name: str) -> Tensor:
    return widened(opened.read(name))


def read_streamed(path: str, flag: str, variant: str | None = None) -> StreamedPipeline:
    """Opens a pipeline, of which only headers and configs are read.

    Args:
        path: folder or single file.
        flag: the flag that names it, for messages.
        variant: variant of the folder's files, such as fp16.

    Raises:
        UserError: if it is no pipeline of a known family, or its weights are not used as stored.
    """
    try:
        if Path(path).is_dir():
            return _read_folder(Path(path), f"{flag} {path}", variant)
        return _read_file(Path(path), flag)
    except FileError as error:
        raise UserError(f"{flag} {error}" if str(error).startswith(path) else f"{flag} {path}: {error}") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{flag} {path} can't be read: {first_line(error)}") from error


def _read_folder(folder: Path, what: str, variant: str | None) -> StreamedPipeline:
    if not (folder / INDEX).is_file():
        raise UserError(f"{what} is not a pipeline folder: it has no {INDEX}")
    index = user_files.read_json(folder / INDEX)
    name = class_name_of(index) if isinstance(index, dict) else None
    if name is None:
        raise UserError(f"{what}: its {INDEX} has no _class_name; give the folder of a pipeline")
    if name not in FAMILIES:
        raise UserError(f"{what} is a {name}; supported are {', '.join(FAMILIES)}")
    parts, configs = {}, {}
    for part, entry in index.items():
        if not is_part(entry) or PROCESSORS.fullmatch(part) or not (folder / part).is_dir():
            continue
        configs[part] = _config(folder / part)
        if part != "scheduler":
            parts[part] = read_component(folder / part, str(entry[1]), f"{what}: {part}", variant)
    missing = [part for part in FAMILIES[name].needed_names() if part not in parts and part not in configs]
    missing = [part for part in missing if not PROCESSORS.fullmatch(part)]
    if missing:
        raise UserError(f"{what} has no {missing[0]}, which a {name} needs")
    return StreamedPipeline(what, FAMILIES[name], parts, configs, folder=folder)


def _config(folder: Path) -> dict[str, Any]:
    names = (COMPONENT_CONFIG, SCHEDULER_CONFIG)
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    value = {} if file is None else user_files.read_json(file)
    return value if isinstance(value, dict) else {}


def read_component(folder: Path, class_name: str, what: str, variant: str | None = None) -> Weights:
    """Returns the tensors of a component's folder, which may be sharded, under the names that all releases read.

    Raises:
        UserError: if it has no safetensors files, or its weights are not used as stored.
    """
    found_variant = variant_of(folder, variant, what)
    with loading(what):
        files = weight_files(folder, found_variant, with_pickles=False)
    if not files:
        raise UserError(f"{what} has no .safetensors weights; convert the pipeline with save_pretrained()")
    found: Weights = {}
    for file in files:
        check_stored(what, stored_in(file))
        found |= stored_tensors_of(file, partial(older_name, class_name))
    return found


def _read_file(path: Path, flag: str) -> StreamedPipeline:
    file = SingleFile.read(path, flag)
    family = FAMILIES[file.class_name]
    check_stored(file.what, file.stored)
    held = stored_tensors_of(path)
    text = {"hidden_act": "gelu" if any(name.startswith(OPEN_CLIP_PREFIX) for name in held) else "quick_gelu"}
    configs = {"scheduler": file.scheduler_marks, "unet": {}, "vae": {}}
    configs |= dict.fromkeys(family.text_encoder_names, text)
    pipeline = StreamedPipeline(file.what, family, {}, configs, file=file, held=held)
    parts = {}
    for part, place in pipeline.original_parts.items():
        parts[part] = dict(_taken_apart(pipeline.original_tensors(part), place.prefix, held))
        if not parts[part]:
            raise UserError(f"{file.what} has no {part}, whose tensors start with {place.prefix}; give a whole model")
    return replace(pipeline, parts=parts)


def tensors_in_file(file: SingleFile, place: OriginalPart) -> list[OriginalTensor]:
    """Returns what the tensors of a part of a single file are made of, by their names."""
    names = [name.removeprefix(place.prefix) for name in file.stored if name.startswith(place.prefix)]
    return TENSORS_OF[place.layout](names)


def _taken_apart(
    tensors: Sequence[OriginalTensor], prefix: str, held: Mapping[str, StreamedTensor]
) -> Iterator[tuple[str, StreamedTensor]]:
    """Yields the tensors that those of a single file are made of."""
    for each in tensors:
        whole = held[prefix + each.name]
        meta = each.taken_apart(torch.empty(whole.shape, device="meta"))
        for name, part in meta.items():
            read = partial(_read_part, each, whole, name)
            yield name, StreamedTensor(name, whole.dtype, tuple(part.shape), read)


def _read_part(tensor: OriginalTensor, whole: StreamedTensor, name: str) -> Tensor:
    return tensor.taken_apart(whole.read())[name]
