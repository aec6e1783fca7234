"""Loads pipelines to draw with, of any diffusers class or one defined here, and reads which arguments they take."""

import importlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from utils.config.file_names import LORA_FILE
from utils.config.options import UserError
from utils.config.tensor_files import read_safetensors
from utils.diffusion.samplers import changed_scheduler
from utils.formats.adapter_files import PEFT_FILE
from utils.models.loading import Download, load_module, load_parts, load_pipeline_folder, loading, named_parts
from utils.models.scaled_adapters import ScaledAdapter, local_source
from utils.models.single_file import SingleFile
from utils.runtime.hub_files import INDEX, index_file, read_config
from utils.sampling.adapters import AdapterToLoad, add_adapters

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)
OWN_PIPELINES = {"ConditionalDDPMPipeline": "utils.models.conditional_ddpm"}


@dataclass(frozen=True)
class PipelineSpec:
    """A pipeline to load: its path, adapters, and a checkpoint whose weights replace those of the pipeline.

    Attributes:
        adapters: the adapters to load, with their own scales.
        scale: the factor of all adapters, those of the checkpoint too.
        config: the pipeline folder or Hub name with the configs of a single file.
        parts: a checkpoint folder; its `unet_ema/` or `unet/` (and text encoders), or LoRA file, is loaded.
        flag: the flag that names the pipeline, for messages; that of its adapters follows from it.
    """

    path: str
    adapters: tuple[ScaledAdapter, ...] = ()
    scale: float = 1.0
    revision: str | None = None
    variant: str | None = None
    parts: Path | None = None
    config: str | None = None
    flag: str = "--pipeline"

    @property
    def what(self) -> str:
        """The flag and the path, for messages."""
        return f"{self.flag} {self.path}"

    @property
    def adapter_flag(self) -> str:
        """The flag that names the adapters."""
        return "--lora" if self.flag == "--pipeline" else f"{self.flag}_lora"

    @property
    def scaled_adapters(self) -> tuple[ScaledAdapter, ...]:
        """The adapters with the scales at which they act: their own, times the factor of all."""
        return tuple(each._replace(scale=each.scale * self.scale + 0.0) for each in self.adapters)

    @cached_property
    def file(self) -> SingleFile | None:
        """The single file of weights; None if the path is a folder or Hub name."""
        is_file = self.path.endswith(".safetensors") and not Path(self.path).is_dir()
        return SingleFile.read(Path(self.path), self.flag) if is_file else None

    @cached_property
    def config_root(self) -> str | None:
        """The folder or Hub name with the configs of a single file; None for those that diffusers finds on the Hub."""
        return self.config if self.config is not None or self.file is None else self.file.configs_beside

    def check_config(self) -> None:
        """Checks that the configs of a single file are available, before its weights are read.

        Raises:
            UserError: with the flag that names a folder of them.
        """
        if self.file is not None:
            self.file.check_configs(self.config_root)

    @cached_property
    def index(self) -> dict[str, Any]:
        """The pipeline's `model_index.json`.

        Raises:
            UserError: if there is no such pipeline.
        """
        if self.file is not None:
            return self.file.index
        index = read_config(index_file(self.path, self.revision, self.flag), self.what)
        if not index.get("_class_name"):
            raise UserError(f"{self.what}: {INDEX} has no _class_name; give the folder of a diffusers pipeline")
        return index


def pipeline_class(spec: PipelineSpec) -> type:
    """Returns the class of a pipeline, from diffusers or this package; code in the pipeline's folder is never run.

    Raises:
        UserError: if neither has the class.
    """
    import diffusers

    name = spec.index["_class_name"]
    name = str(name[-1] if isinstance(name, list) else name)  # a list is [file of code, class]
    if name in OWN_PIPELINES:
        try:
            return getattr(importlib.import_module(OWN_PIPELINES[name]), name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"{spec.what} is a {name}, which this package does not have") from error
    found = getattr(diffusers, name, None)
    if not (inspect.isclass(found) and issubclass(found, diffusers.DiffusionPipeline)):
        raise UserError(f"{spec.what} is a {name}, which this version of diffusers does not know")
    return found


def load_pipeline(spec: PipelineSpec, dtype: torch.dtype) -> "DiffusionPipeline":
    """Returns the pipeline on the CPU, in one dtype, with its adapters and the weights of a checkpoint.

    Raises:
        UserError: if it can't be loaded, or only by unpickling.
    """
    # Weights of a checkpoint, which replace those of the pipeline.
    chosen = pipeline_class(spec)
    if "vae" not in spec.index and "vqvae" not in spec.index:
        dtype = torch.float32  # pixel pipelines convert their result to numpy, which has no bfloat16
    content = CheckpointContent({}, {}, None) if spec.parts is None else checkpoint_content(spec)
    parts = _loaded_parts(content.models, spec.index, dtype)

    # The pipeline, by its format: one of this package, a single file, or a folder or Hub name.
    if chosen.__name__ in OWN_PIPELINES:
        pipeline = _assemble(chosen, spec, dtype, parts)
    elif spec.file is not None:
        pipeline = spec.file.load(chosen, spec.config_root, parts).to(dtype)
        pipeline.scheduler = changed_scheduler(pipeline.scheduler, spec.file.scheduler_marks)
        _warn_of_prediction_type(spec.file, pipeline.scheduler.config.get("prediction_type"))
    else:
        pipeline = load_pipeline_folder(
            chosen,
            spec.path,
            spec.what,
            {"default": dtype},
            Download(spec.revision, spec.variant, use_safetensors=True),
            parts,
        )

    # Adapters.
    for name, folder in content.adapters.items():
        _merge_adapters(getattr(pipeline, name, None), folder, spec.scale)
    add_adapters(pipeline, list(_adapters_to_load(spec, content.lora)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _assemble(chosen: type, spec: PipelineSpec, dtype: torch.dtype, parts: dict[str, Any]) -> "DiffusionPipeline":
    """Loads a pipeline class of this package from its parts: diffusers would run the code in the pipeline's folder."""
    import diffusers

    folder = Path(spec.path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors"]
        folder = Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=patterns))
    flag, known = spec.what, inspect.signature(chosen.__init__).parameters
    given = {name: entry for name, entry in spec.index.items() if name in known and not isinstance(entry, list)}
    entries = {name: entry for name, entry in named_parts(spec.index).items() if name in known and name not in parts}
    given |= parts | load_parts(folder, spec.index, entries, flag, {"default": dtype}, spec.variant, True)
    with loading(flag):
        for name, (library, class_name) in entries.items():
            if name not in given and library == "diffusers":
                given[name] = getattr(diffusers, class_name).from_pretrained(folder / name)
        return chosen(**given)


class CheckpointContent(NamedTuple):
    """The parts of a pipeline that a checkpoint has; the EMA weights where it has both.

    Attributes:
        models: folders of complete models, by component name of the pipeline.
        adapters: folders of PEFT adapters, by component name.
        lora: the LoRA file; None if there is none.
    """

    models: dict[str, Path]
    adapters: dict[str, Path]
    lora: Path | None


def checkpoint_content(spec: PipelineSpec) -> CheckpointContent:
    """Returns what the checkpoint `spec.parts` has of the pipeline.

    Raises:
        UserError: if it has nothing of it: the images would be those of the base.
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
            f"--checkpoints: {spec.parts} has no weights for {spec.path}: no LoRA file, and no model or adapters in "
            f"folders {', '.join(names)}; remove it, or give the --pipeline that it was trained from"
        )
    return found


def _folders_with(root: Path, names: Sequence[str], file: str) -> dict[str, Path]:
    """The folders, by component name, that contain `file`; `unet_ema/` is preferred to `unet/`."""
    found = {}
    for name in names:
        folder = next((each for each in (root / f"{name}_ema", root / name) if (each / file).is_file()), None)
        if folder is not None:
            found[name] = folder
    return found


def _loaded_parts(folders: Mapping[str, Path], index: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Loads complete models from their folders, with the classes that the pipeline's index names."""
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    parts = {}
    for name, folder in folders.items():
        library, kind = index[name][:2]
        what = f"--checkpoints: {folder}"
        found = getattr(libraries[library], kind)
        # a checkpoint of a diverged run is allowed: its images show it
        parts[name] = load_module(found, str(folder), what, name, dtype, must_be_finite=False, use_safetensors=True)
    return parts


def _warn_of_prediction_type(file: SingleFile, taken: str | None) -> None:
    """Warns if a file that does not say its prediction type looks like one of another than its config says."""
    likely = None if "prediction_type" in file.scheduler_marks else file.looks_like_v2()
    if likely not in (None, taken):
        logger.warning(
            "%s does not say its prediction type and looks like one of %s, but its config says %s: the images may be "
            "noise; give --pipeline_config a pipeline of that type",
            *(file.what, likely, taken),
        )


def _merge_adapters(module: torch.nn.Module | None, folder: Path, scale: float) -> None:
    """Merges PEFT adapters (LoHa, LoKr) into the weights of a model, multiplied by a scale."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import get_peft_model_state_dict

    with loading(f"--checkpoints: the adapters {folder}"):
        if module is None:
            raise ValueError("the pipeline has no such component")
        adapted = PeftModel.from_pretrained(module, folder)
        read = set(get_peft_model_state_dict(adapted))  # PEFT ignores tensors that do not fit
        if read != set(read_safetensors(folder / PEFT_FILE)):
            raise ValueError(f"the tensors in {PEFT_FILE} do not match its config")
        if scale == 0:
            adapted.unload()
            return
        for layer in adapted.modules():
            if scale != 1.0 and isinstance(layer, BaseTunerLayer):
                layer.set_scale("default", scale)
        adapted.merge_and_unload()


def _adapters_to_load(spec: PipelineSpec, lora_of_checkpoint: Path | None) -> Iterator[AdapterToLoad]:
    """Yields the adapters with their scales: first the checkpoint's own, if it has one."""
    if lora_of_checkpoint is not None:
        # a checkpoint of a diverged run is allowed: its images show it
        source = str(lora_of_checkpoint)
        yield AdapterToLoad(source, spec.scale, f"--checkpoints: {source}", must_be_finite=False)
    for each in spec.scaled_adapters:
        what = f"{spec.adapter_flag} {each.source}"
        yield AdapterToLoad(local_source(each.source, what), each.scale, what)


def call_parameters(pipeline_type: type) -> frozenset[str]:
    """Returns the parameter names of a pipeline's `__call__`."""
    return frozenset(inspect.signature(pipeline_type.__call__).parameters)


def indexed_names(index: Mapping[str, Any]) -> dict[str, int]:
    """Returns the class numbers by name from a pipeline's `model_index.json`; DiT lists synonyms for each class."""
    found, has_synonyms = index.get("id2label"), index["_class_name"] == "DiTPipeline"
    listed = [(int(number), str(names)) for number, names in found.items()] if isinstance(found, dict) else []
    if not has_synonyms:
        return {name: number for number, name in listed}
    return {name.strip(): number for number, names in listed for name in names.split(",")}


def class_names(pipeline: "DiffusionPipeline") -> dict[int, str | None]:
    """Returns the classes of a class-conditional pipeline: their names by number, None for a class without a name."""
    names = getattr(pipeline, "labels", None)  # numbers by name, as DiT has them
    if isinstance(names, dict) and names:
        first = {int(label): str(text) for text, label in reversed(names.items())}  # the first synonym of each
        return dict(sorted(first.items()))
    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    for key in ("num_embeds_ada_norm", "num_class_embeds"):
        count = denoiser.config.get(key)
        if count:  # the last embedding of this package's pipelines is the null class of guidance
            return dict.fromkeys(range(count - (type(pipeline).__name__ in OWN_PIPELINES)))
    return {}
