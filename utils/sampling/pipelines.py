"""Pipelines of any class of diffusers, or of ours, as they are loaded to draw from, and what they take."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from utils.config.options import UserError
from utils.config.tensor_files import read_safetensors
from utils.diffusion.samplers import changed_scheduler
from utils.models.loading import Download, load_module, load_parts, load_pipeline_folder, loading, named_parts
from utils.models.lora_files import LORA_FILE, PEFT_FILE, load_lora
from utils.models.single_file import SingleFile
from utils.runtime.hub_files import INDEX, index_file, read_config

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OWN_PIPELINES = {"ConditionalDDPMPipeline": "utils.models.conditional_ddpm"}


@dataclass(frozen=True)
class PipelineSpec:
    """A pipeline to load: a path, a LoRA on top, and a folder whose parts stand in for the pipeline's.

    Attributes:
        config: describes a single file.
        parts: a checkpoint, whose `unet_ema/` or `unet/` (and text encoders), or LoRA file, is taken.
    """

    path: str
    lora: str | None = None
    lora_scale: float = 1.0
    revision: str | None = None
    variant: str | None = None
    parts: Path | None = None
    config: str | None = None

    @cached_property
    def file(self) -> SingleFile | None:
        """The single file of weights that it is, if it is one."""
        return SingleFile.read(Path(self.path), "--pipeline") if self.path.endswith(".safetensors") else None

    @cached_property
    def index(self) -> dict[str, Any]:
        """The pipeline's `model_index.json`.

        Raises:
            UserError: if there is no such pipeline.
        """
        if self.file is not None:
            return self.file.index
        where = f"--pipeline {self.path}: {INDEX}"
        index = read_config(index_file(self.path, self.revision, "--pipeline"), f"--pipeline {self.path}")
        if not index.get("_class_name"):
            raise UserError(f"{where} names no class of pipelines")
        return index


def pipeline_class(spec: PipelineSpec) -> type:
    """The class of a pipeline: one of ours, or one of diffusers; code that lies in the folder is never run."""
    import diffusers

    name = spec.index["_class_name"]
    name = str(name[-1] if isinstance(name, list) else name)  # a list names a file of code beside it
    if name in OWN_PIPELINES:
        try:
            return getattr(importlib.import_module(OWN_PIPELINES[name]), name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"--pipeline {spec.path} is a {name}, which is not built in here") from error
    found = getattr(diffusers, name, None)
    if not (inspect.isclass(found) and issubclass(found, diffusers.DiffusionPipeline)):
        raise UserError(f"--pipeline {spec.path} is a {name}, which this version of diffusers does not know")
    return found


def load_pipeline(spec: PipelineSpec, dtype: torch.dtype) -> "DiffusionPipeline":
    """The pipeline on the CPU, in one dtype, with its LoRA or a checkpoint's parts.

    Raises:
        UserError: if it can't be loaded, or only by unpickling.
    """
    chosen = pipeline_class(spec)
    flag = f"--pipeline {spec.path}"
    if "vae" not in spec.index and "vqvae" not in spec.index:
        dtype = torch.float32  # pipelines on pixels hand their result to numpy, which has no bfloat16
    content = CheckpointContent({}, {}, None) if spec.parts is None else checkpoint_content(spec)
    parts = _loaded_parts(content.models, spec.index, dtype)
    if chosen.__name__ in OWN_PIPELINES:
        pipeline = _assemble(chosen, spec, dtype, parts)
    elif spec.file is not None:
        pipeline = spec.file.load(chosen, spec.config, parts).to(dtype)
        pipeline.scheduler = changed_scheduler(pipeline.scheduler, spec.file.scheduler_marks)
    else:
        pipeline = load_pipeline_folder(
            chosen,
            spec.path,
            flag,
            {"default": dtype},
            Download(spec.revision, spec.variant, use_safetensors=True),
            parts,
        )
    for name, folder in content.adapters.items():
        _merge_adapters(getattr(pipeline, name, None), folder)
    lora = spec.lora if content.lora is None else str(content.lora)
    if lora is not None:
        _add_lora(pipeline, lora, spec.lora_scale, must_be_finite=content.lora is None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _assemble(chosen: type, spec: PipelineSpec, dtype: torch.dtype, parts: dict[str, Any]) -> "DiffusionPipeline":
    """A pipeline of ours from its parts: diffusers would want to run the code that lies beside them."""
    import diffusers

    folder = Path(spec.path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors"]
        folder = Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=patterns))
    flag, known = f"--pipeline {spec.path}", inspect.signature(chosen.__init__).parameters
    given = {name: entry for name, entry in spec.index.items() if name in known and not isinstance(entry, list)}
    entries = {name: entry for name, entry in named_parts(spec.index).items() if name in known and name not in parts}
    given |= parts | load_parts(folder, spec.index, entries, flag, {"default": dtype}, spec.variant, True)
    with loading(flag):
        for name, (library, class_name) in entries.items():
            if name not in given and library == "diffusers":
                given[name] = getattr(diffusers, class_name).from_pretrained(folder / name)
        return chosen(**given)


class CheckpointContent(NamedTuple):
    """What a checkpoint holds of a pipeline, its moving averages where it has both.

    Attributes:
        models: folders of whole parts, by their names in the pipeline.
        adapters: folders of PEFT adapters, by the parts that they are of.
        lora: the LoRA file.
    """

    models: dict[str, Path]
    adapters: dict[str, Path]
    lora: Path | None


def checkpoint_content(spec: PipelineSpec) -> CheckpointContent:
    """What the checkpoint `spec.parts` holds of the pipeline.

    Raises:
        UserError: if it holds nothing of it: the base would stand for it.
    """
    names = [
        name
        for name, entry in spec.index.items()
        if isinstance(entry, list) and entry[0] in ("diffusers", "transformers")
    ]
    found = CheckpointContent(
        _folders_with(spec.parts, names, "config.json"),
        _folders_with(spec.parts, names, PEFT_FILE),
        next((file for each in ("unet_ema", ".") if (file := spec.parts / each / LORA_FILE).is_file()), None),
    )
    if not any(found):
        raise UserError(
            f"--checkpoints: {spec.parts} holds no weights that go with {spec.path}: no LoRA file, and none of the "
            f"folders {', '.join(names)} with a model or adapters; remove it, or give its own --pipeline"
        )
    return found


def _folders_with(root: Path, names: Sequence[str], file: str) -> dict[str, Path]:
    """The folders of parts that hold a file: `unet_ema/` comes before `unet/`."""
    found = {}
    for name in names:
        folder = next((each for each in (root / f"{name}_ema", root / name) if (each / file).is_file()), None)
        if folder is not None:
            found[name] = folder
    return found


def _loaded_parts(folders: Mapping[str, Path], index: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Whole parts from their folders, by the classes in the pipeline's index."""
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    parts = {}
    for name, folder in folders.items():
        library, kind = index[name][:2]
        what = f"--checkpoints: {folder}"
        found = getattr(libraries[library], kind)
        # one of several checkpoints may be of a run that diverged, which its images show
        parts[name] = load_module(found, str(folder), what, name, dtype, must_be_finite=False, use_safetensors=True)
    return parts


def _merge_adapters(module: torch.nn.Module | None, folder: Path) -> None:
    """Adds the update of PEFT adapters (LoHa, LoKr) to the weights of the part that they are of."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    with loading(f"--checkpoints: the adapters {folder}"):
        if module is None:
            raise ValueError("the pipeline has no such part")
        adapted = PeftModel.from_pretrained(module, folder)
        read = set(get_peft_model_state_dict(adapted))  # PEFT leaves the rest out
        if read != set(read_safetensors(folder / PEFT_FILE)):
            raise ValueError(f"the tensors in {PEFT_FILE} are not those of its config")
        adapted.merge_and_unload()


def _add_lora(pipeline: "DiffusionPipeline", lora: str, scale: float, must_be_finite: bool) -> None:
    load_lora(pipeline, lora, "evaluated", f"--lora {lora}", must_be_finite)
    if scale != 1.0:
        pipeline.set_adapters("evaluated", scale)


def call_parameters(pipeline_type: type) -> frozenset[str]:
    """The names of what a pipeline's call takes."""
    return frozenset(inspect.signature(pipeline_type.__call__).parameters)


def indexed_names(index: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of classes by their names, as a pipeline's `model_index.json` has them; DiT's have synonyms."""
    found, has_synonyms = index.get("id2label"), index["_class_name"] == "DiTPipeline"
    listed = [(int(number), str(names)) for number, names in found.items()] if isinstance(found, dict) else []
    if not has_synonyms:
        return {name: number for number, name in listed}
    return {name.strip(): number for number, names in listed for name in names.split(",")}


def class_names(pipeline: "DiffusionPipeline") -> dict[int, str | None]:
    """The classes of a class-conditional pipeline by number, with their names where it has them."""
    names = getattr(pipeline, "labels", None)  # DiT's, by name
    if isinstance(names, dict) and names:
        first = {int(label): str(text) for text, label in reversed(names.items())}  # of synonyms the first
        return dict(sorted(first.items()))
    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    for key in ("num_embeds_ada_norm", "num_class_embeds"):
        count = denoiser.config.get(key)
        if count:  # the last embedding of a pipeline of ours stands for no class
            return dict.fromkeys(range(count - (type(pipeline).__name__ in OWN_PIPELINES)))
    return {}
