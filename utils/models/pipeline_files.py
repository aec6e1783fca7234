"""Writes pipelines such that both older and newer releases of diffusers and transformers can read them."""

import json
import logging
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from utils.config import user_files
from utils.config.tensor_files import open_safetensors, read_safetensors
from utils.models.folder_form import FLOAT32, FolderForm, in_dtype
from utils.models.loading import load_module, loading
from utils.runtime.atomic_files import write_tensors, write_text
from utils.runtime.hub_files import INDEX
from utils.runtime.sharding import plain_class

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
TEXT_FILES = (".json", ".txt", ".model", ".jinja", ".bpe", ".vocab")  # of tokenizers and image processors
PROCESSORS = re.compile(r"tokenizer(_\d+)?|feature_extractor|image_processor")
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")  # not needed for training
SAYS_FLOAT32 = (None, "float32", "torch.float32")
KNOWN_CLASSES = {
    "CLIPFeatureExtractor": "CLIPImageProcessor",
    "CLIPImageProcessorFast": "CLIPImageProcessor",
    "TokenizersBackend": "PreTrainedTokenizerFast",
}
"""Class names that both transformers 4 and 5 know, for names that only one of them knows."""
OLDER_PREFIXES = {
    "CLIPTextModel": ("", "text_model."),
    "CLIPVisionModel": ("", "vision_model."),
    "StableDiffusionSafetyChecker": ("vision_model.", "vision_model.vision_model."),
}
"""Prefixes of weight names in transformers 5 and in transformers 4; both read the latter."""


def known_class(name: str) -> str:
    """Returns the name of a class that both transformers 4 and 5 know."""
    name = re.sub(r"ImageProcessorPil$", "ImageProcessor", name)
    return KNOWN_CLASSES.get(name, name)


def older_name(class_name: str, tensor_name: str) -> str:
    """Returns a tensor's name in transformers 4, which transformers 5 reads too."""
    newer, older = OLDER_PREFIXES.get(class_name, ("", ""))
    if tensor_name.startswith(older) or not tensor_name.startswith(newer):
        return tensor_name
    return older + tensor_name.removeprefix(newer)


def save_module(module: nn.Module, folder: Path, form: FolderForm = FLOAT32) -> None:
    """Writes a model of diffusers or transformers in its dtype, with its tensors' older names."""
    module.save_pretrained(folder, **form.arguments)
    if form.dtype != torch.float32:
        _say_float32(folder / "config.json")
    class_name = plain_class(module).__name__
    if class_name not in OLDER_PREFIXES:
        return
    for file in folder.glob("*.safetensors"):
        tensors = read_safetensors(file)
        renamed = {older_name(class_name, name): tensor for name, tensor in tensors.items()}
        if renamed.keys() != tensors.keys():
            aside = file.with_name(f".tmp-{file.name}")
            write_tensors(renamed, aside, {"format": "pt"})
            aside.replace(file)
    for index in folder.glob("*.safetensors.index*.json"):
        content = _read(index)
        content["weight_map"] = {older_name(class_name, name): file for name, file in content["weight_map"].items()}
        write_text(index, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _say_float32(file: Path) -> None:
    """Makes a config ask for float32, whatever its weights are.

    transformers 5 loads what the config says, and diffusers float32: without arguments a pipeline would mix both.
    """
    config = _read(file)
    said = {name: "float32" for name in ("dtype", "torch_dtype") if name in config}
    if said:
        write_text(file, json.dumps(config | said, indent=2, sort_keys=True) + "\n")


@dataclass(frozen=True)
class BaseFiles:
    """The files of the pipeline that training started from.

    Attributes:
        folder: its folder; None if it was a single file.
        others: folders of components that are not the base's, by name; None for those to be loaded.
        variant: variant of its weights.
        load: loads components of the base in float32, by name; those that it leaves out are missing in the result.
    """

    folder: Path | None
    others: Mapping[str, Path | None]
    variant: str | None
    load: Callable[[Collection[str]], Mapping[str, Any]]


def write_pipeline(
    folder: Path,
    pipeline: "DiffusionPipeline",
    trained: Mapping[str, nn.Module],
    base: BaseFiles,
    form: FolderForm = FLOAT32,
) -> None:
    """Writes a pipeline that both older and newer libraries load, by default without extra arguments.

    Trained components and the scheduler are saved. Frozen components, tokenizers and image processors are copied from
    the base if its files can be used unchanged; otherwise they are loaded and saved.

    Args:
        folder: folder to write to.
        pipeline: the trained pipeline; it may lack optional components of the base.
        trained: the components to save, by name.
        base: files of the pipeline that training started from.
        form: dtype and names of the weights.
    """
    # Entries of the index, and the folders to copy from.
    source, others = base.folder, base.others
    index = _read(source / INDEX) if source is not None else {}
    index = {name: value for name, value in index.items() if name in pipeline.config}
    entries: dict[str, Any] = dict(pipeline.config) | index
    entries = {name: value for name, value in entries.items() if not name.startswith("_")}
    sources = {name: None if source is None else source / name for name in pipeline.components} | dict(others)

    # Save or copy each component, if its files can be used.
    missing: list[str] = []
    for name in pipeline.components:
        if name == "scheduler" or name in trained or name in others:
            entries[name] = _entry(pipeline.components[name])
        elif is_part(entries.get(name)) and sources[name] is not None and not sources[name].is_dir():
            logger.warning("the base has no folder %s, so the result has no %s either", name, name)
            entries[name] = [None, None]
        if not is_part(entries.get(name)):
            continue
        entries[name] = [entries[name][0], known_class(str(entries[name][1]))]
        if name == "scheduler":
            pipeline.scheduler.save_pretrained(folder / name)
        elif name in trained:
            save_module(in_dtype(trained[name], form.dtype, name), folder / name, form)
        elif not (form.is_plain or PROCESSORS.fullmatch(name)) or not copy_part(
            name, entries[name][1], sources[name], folder / name, base=source, variant=base.variant
        ):
            missing.append(name)

    # The rest is loaded and saved.
    loaded = base.load(missing) if missing else {}
    for name in missing:
        if loaded.get(name) is None:
            entries[name] = [None, None]
        else:
            _save_part(loaded[name], folder / name, form)

    # Complete tokenizers, safety checker and index.
    for name in pipeline.components:
        if name.startswith("tokenizer") and (folder / name).is_dir():
            complete_tokenizer(folder / name)
    _drop_lonely_checker(entries, folder)
    written = {"_class_name": type(pipeline).__name__, "_diffusers_version": _diffusers_version()} | entries
    write_text(folder / INDEX, json.dumps(written, indent=2, sort_keys=True) + "\n")


def _drop_lonely_checker(entries: dict[str, Any], folder: Path) -> None:
    """Removes a safety checker without a feature extractor, and the requirement of one that is missing."""
    if "safety_checker" in entries and not is_part(entries.get("feature_extractor")):
        entries["safety_checker"] = [None, None]
        shutil.rmtree(folder / "safety_checker", ignore_errors=True)
    if "requires_safety_checker" in entries and not is_part(entries.get("safety_checker")):
        entries["requires_safety_checker"] = False


def load_optional(name: str, folder: Path, variant: str | None, use_safetensors: bool | None) -> Any:
    """Loads one of `OPTIONAL` in float32, in the given variant if it has that."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    if name == "feature_extractor":
        with loading(str(folder)):
            return CLIPImageProcessor.from_pretrained(folder)
    kind = {"safety_checker": StableDiffusionSafetyChecker, "image_encoder": CLIPVisionModelWithProjection}[name]
    variant = variant if _has_variant(folder, variant) else None
    return load_module(
        kind, str(folder), str(folder), name, torch.float32, variant=variant, use_safetensors=use_safetensors
    )


def _has_variant(folder: Path, variant: str | None) -> bool:
    return variant is not None and any(folder.glob(f"*.{variant}*"))


def is_part(entry: object) -> bool:
    """Whether an entry of a `model_index.json` names the class of a component."""
    return isinstance(entry, list | tuple) and len(entry) == 2 and entry[0] is not None


def copy_part(
    name: str,
    class_name: str,
    source: Path | None,
    target: Path,
    *,
    base: Path | None = None,
    variant: str | None = None,
) -> bool:
    """Copies a component's files unchanged, if the result can use them.

    Args:
        name: name of the component.
        class_name: its class.
        source: its folder; None if it has none.
        target: folder to write to.
        base: folder of the pipeline; files that are links to outside of it are not copied.
        variant: variant of the weights; a component that has it is not copied.

    Returns:
        Whether the files were copied.
    """
    if source is None or not source.is_dir():
        return False
    if PROCESSORS.fullmatch(name):
        files = _processor_files(source)
    else:
        files = [] if _has_variant(source, variant) else _model_files(source, class_name)
    if not files or not _are_own(files, source, base or source):
        return False
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, target / file.name)  # follows links
    return True


def _are_own(files: Sequence[Path], source: Path, base: Path) -> bool:
    """Whether all files are regular, and not links to outside of the base.

    Such a link could name any file of this machine, which the result would then publish.
    """
    homes = [base.resolve()] if source.is_symlink() else [base.resolve(), source.resolve()]
    if base.parent.name == "snapshots":  # the Hub cache, whose files are links to the repository's blobs
        homes.append(base.parent.parent.resolve() / "blobs")
    return all(path.is_file() and any(path.resolve().is_relative_to(home) for home in homes) for path in files)


def _processor_files(source: Path) -> list[Path]:
    """Returns the text files of a tokenizer or image processor; empty if it has none that is known."""
    files = [path for path in sorted(source.iterdir()) if path.suffix in TEXT_FILES]
    known = {"tokenizer_config.json", "preprocessor_config.json", "tokenizer.json", "vocab.json"}
    return files if known & {path.name for path in files} else []


def _model_files(source: Path, class_name: str) -> list[Path]:
    """Returns config and weights of a model, if they are float32 safetensors with names that all libraries read."""
    # Config.
    config = _read(source / "config.json")
    if not config or "quantization_config" in config or not _says_float32(config):
        return []

    # Weights: one file, or one index of shards.
    heads = [source / file for name in WEIGHTS for file in (name, f"{name}.index.json") if (source / file).is_file()]
    if len(heads) != 1:
        return []
    weights = heads
    if heads[0].suffix == ".json":
        shards = set(_read(heads[0]).get("weight_map", {}).values())
        if not shards or not all(isinstance(name, str) and Path(name).name == name for name in shards):
            return []
        weights = [source / name for name in sorted(shards)]
    if not all(_is_float32(file, class_name) for file in weights):
        return []
    return [source / "config.json", *dict.fromkeys(heads + weights)]


def _says_float32(config: Any) -> bool:
    """Whether neither a config nor any nested one asks for a dtype other than float32."""
    if isinstance(config, dict):
        return all(
            value in SAYS_FLOAT32 if name in ("dtype", "torch_dtype") else _says_float32(value)
            for name, value in config.items()
        )
    return True


def _is_float32(file: Path, class_name: str) -> bool:
    """Whether all floating-point tensors of a safetensors file are float32, and all names are the older ones."""
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    try:
        with open_safetensors(file) as opened:
            dtypes = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return False
    integers = re.compile(r"[IU]\d+|BOOL")
    return all(
        (dtype == "F32" or integers.fullmatch(dtype)) and older_name(class_name, name) == name
        for name, dtype in dtypes.items()
    )


def _save_part(part: Any, target: Path, form: FolderForm) -> None:
    if isinstance(part, nn.Module):
        save_module(in_dtype(part, form.dtype, target.name), target, form)
        return
    part.save_pretrained(target)
    file = target / "preprocessor_config.json"
    config = _read(file)
    if "image_processor_type" in config:
        config["image_processor_type"] = known_class(str(config["image_processor_type"]))
        write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def complete_tokenizer(folder: Path) -> None:
    """Adds the tokenizer files that transformers 4 reads to those that transformers 5 wrote."""
    held, config = _read(folder / "tokenizer.json"), _read(folder / "tokenizer_config.json")
    model = held.get("model")
    if isinstance(model, dict) and isinstance(model.get("vocab"), dict) and isinstance(model.get("merges"), list):
        if not (folder / "vocab.json").exists():
            write_text(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False) + "\n")
        if not (folder / "merges.txt").exists():
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
        added = {each["content"]: each["id"] for each in held.get("added_tokens", ())}
        added = {token: number for token, number in added.items() if token not in model["vocab"]}
        if added and "added_tokens_decoder" not in config and not (folder / "added_tokens.json").exists():
            write_text(folder / "added_tokens.json", json.dumps(added, ensure_ascii=False, indent=2) + "\n")
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 uses another key
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def _entry(part: Any) -> list[str | None]:
    """Returns a component's entry for `model_index.json`."""
    if part is None:
        return [None, None]
    kind = plain_class(part) if isinstance(part, nn.Module) else type(part)
    return [kind.__module__.partition(".")[0], kind.__name__]


def _read(file: Path) -> dict[str, Any]:
    """Reads a JSON file; returns an empty dict if it is not valid."""
    try:
        value = user_files.read_json(file, encoding="utf-8")
    except (OSError, user_files.FileError):
        return {}
    return value if isinstance(value, dict) else {}


def _diffusers_version() -> str:
    import diffusers

    return diffusers.__version__
