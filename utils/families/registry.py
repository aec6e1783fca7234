"""Which family a pipeline belongs to."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from utils.configs import is_path
from utils.families.sd import StableDiffusion
from utils.families.sdxl import StableDiffusionXL
from utils.families.source import PICKLES, PipelineSource, refuse_pickles
from utils.families.text import TextFamily
from utils.options import UserError, first_line

FAMILIES: dict[str, type[TextFamily]] = {
    family.pipeline_class_name: family for family in (StableDiffusion, StableDiffusionXL)
}
VAE_KEY = "first_stage_model.decoder.conv_in.weight"
SDXL_KEY = "conditioner.embedders.1.model.ln_final.weight"


def pick_family(source: PipelineSource) -> type[TextFamily]:
    """The family of a pipeline, by its `model_index.json` or, of a single file, by the names of its weights.

    Reads no weights, and checks that none would need unpickling.

    Raises:
        UserError: if there is no such pipeline, or none of a supported class.
    """
    path = Path(source.path)
    if path.suffix in PICKLES and not source.options.allow_pickle:
        raise UserError(
            f"--pretrained_model {path} would need unpickling, which can run code; convert it, or give --allow_pickle"
        )
    if source.is_single_file:
        return _family_of_file(path)
    if not path.is_dir() and is_path(source.path):
        raise UserError(f"--pretrained_model {path} does not exist; give a folder, Hub name or .safetensors file")
    index = source.index()
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise UserError(f"--pretrained_model {path} is a {name}; supported are {', '.join(FAMILIES)}")
    if path.is_dir() and not source.options.allow_pickle:
        replaced = {"unet": source.options.unet_config, "vae": source.options.pretrained_vae_model_name_or_path}
        elsewhere = [part for part, given in replaced.items() if given]
        refuse_pickles(path, index, f"--pretrained_model {source.path}", elsewhere)
    return FAMILIES[name]


def _family_of_file(path: Path) -> type[TextFamily]:
    names = _names_of_weights(path)
    missing = [name for name in ("model.diffusion_model.input_blocks.0.0.weight", VAE_KEY) if name not in names]
    if missing:
        raise UserError(
            f"--pretrained_model {path} is no whole Stable Diffusion model: it has no {missing[0]}; a LoRA file goes "
            "to --lora_weights, a VAE to --pretrained_vae_model_name_or_path"
        )
    return StableDiffusionXL if SDXL_KEY in names else StableDiffusion


def _names_of_weights(path: Path) -> set[str]:
    """The names in a safetensors file's header, or in a pickle, of which nothing but tensors is read."""
    if path.suffix in PICKLES:
        return _names_in_pickle(path)
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"--pretrained_model {path} can't be read as safetensors: {first_line(error)}") from error


def _names_in_pickle(path: Path) -> set[str]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"--pretrained_model {path} can't be read as tensors alone: {first_line(error)}") from error
    return set(held.get("state_dict", held))
