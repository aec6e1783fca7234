"""Which family a pipeline belongs to."""

import json
import struct
from pathlib import Path

from utils.families.base import Family, PipelineSource
from utils.families.sd import StableDiffusion
from utils.families.sdxl import StableDiffusionXL
from utils.options import UserError

FAMILIES: dict[str, type[Family]] = {
    family.pipeline_class_name: family for family in (StableDiffusion, StableDiffusionXL)
}
SDXL_KEY = "conditioner.embedders.1.model.ln_final.weight"


def pick_family(source: PipelineSource) -> type[Family]:
    """The family of a pipeline, by its `model_index.json` or, of a single file, by the names of its weights.

    Reads no weights, and checks that none would need unpickling.

    Raises:
        UserError: if there is no such pipeline, or none of a supported class.
    """
    path = Path(source.path)
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(
            f"--pretrained_model {path} would need unpickling, which can run code; convert it to .safetensors"
        )
    if source.is_single_file:
        return StableDiffusionXL if SDXL_KEY in _names_of_weights(path) else StableDiffusion
    index = _read_index(source)
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise UserError(f"--pretrained_model {path} is a {name}; supported are {', '.join(FAMILIES)}")
    if path.is_dir():
        _refuse_pickles(source, index)
    return FAMILIES[name]


def _names_of_weights(path: Path) -> set[str]:
    """The names in a safetensors file's header."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return set(json.loads(file.read(length)))
    except (OSError, ValueError, struct.error, MemoryError, OverflowError) as error:
        raise UserError(f"--pretrained_model {path} can't be read as safetensors: {error}") from error


def _read_index(source: PipelineSource) -> dict:
    path = Path(source.path)
    if path.is_dir():
        file = path / "model_index.json"
        if not file.is_file():
            raise UserError(f"--pretrained_model {path} is no pipeline folder: it has no model_index.json")
    elif path.is_absolute() or source.path.startswith(".") or source.path.count("/") > 1 or path.exists():
        raise UserError(
            f"--pretrained_model {path} does not exist; give a pipeline folder, Hub name or .safetensors file"
        )
    else:
        file = _download_index(source)
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--pretrained_model {path}: its model_index.json can't be read: {error}") from error


def _download_index(source: PipelineSource) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        return hf_hub_download(source.path, "model_index.json", revision=source.options.revision)
    except (HTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--pretrained_model {source.path} is no folder here, and was not found on the Hub: {reason}"
        ) from error


def _refuse_pickles(source: PipelineSource, index: dict) -> None:
    """Refuses a local pipeline of which a part has weights, but none as safetensors."""
    replaced = {"unet": source.options.unet_config, "vae": source.options.pretrained_vae_model_name_or_path}
    for name, entry in index.items():
        folder = Path(source.path) / name
        if not isinstance(entry, list) or entry[0] is None or replaced.get(name) or not folder.is_dir():
            continue
        pickles = [file.name for suffix in ("bin", "ckpt", "pt", "pth") for file in folder.glob(f"*.{suffix}")]
        if pickles and not list(folder.glob("*.safetensors")):
            raise UserError(
                f"--pretrained_model {source.path}: {name}/{pickles[0]} would need unpickling, which can run code; "
                "convert the pipeline with save_pretrained(..., safe_serialization=True)"
            )
