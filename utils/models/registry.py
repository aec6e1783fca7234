"""Finds the family of a pipeline."""

from pathlib import Path

from utils.config.options import UserError
from utils.models.options import PICKLES
from utils.models.pipeline_source import PipelineSource, check_weight_files
from utils.models.sd import StableDiffusion
from utils.models.sdxl import StableDiffusionXL
from utils.models.text_to_image import TextFamily
from utils.runtime.hub_files import class_name_of, require_model

FAMILIES_OF_TEXT = (
    StableDiffusion,
    StableDiffusionXL,
)
FAMILIES: dict[str, type[TextFamily]] = {family.pipeline_class_name: family for family in FAMILIES_OF_TEXT}
VAE_KEY = "first_stage_model.decoder.conv_in.weight"


def pick_family(source: PipelineSource) -> type[TextFamily]:
    """Returns a pipeline's family, from its `model_index.json` or, for a single file, its weights' names.

    Reads no weights, and refuses pickles without --allow_pickle.

    Raises:
        UserError: if there is no such pipeline, or its class is not supported.
    """
    # Files: no pickles, and nothing but models.
    path, options = Path(source.path), source.options
    given = {
        "pretrained_model": source.path,
        "pretrained_vae_model_name_or_path": options.pretrained_vae_model_name_or_path,
    }
    for flag, name in given.items():
        if name is not None and Path(name).suffix in PICKLES and not options.allow_pickle:
            raise UserError(f"--{flag} {name} needs unpickling, which can run code; convert it, or give --allow_pickle")
    files = (".safetensors", *PICKLES)
    for flag, name in given.items():
        require_model(flag, name, "give a folder, Hub name or .safetensors file", files)
    require_model("pretrained_model_config", options.pretrained_model_config, "give a pipeline folder or a Hub name")
    if source.is_single_file:
        return _family_of_file(source)

    # Class of the pipeline.
    index = source.index()
    name = class_name_of(index)
    if name not in FAMILIES:
        raise UserError(f"--pretrained_model {path} is a {name}; supported are {', '.join(FAMILIES)}")

    # Components.
    replaced = {"unet": options.unet_config, "vae": options.pretrained_vae_model_name_or_path}
    elsewhere = [part for part, given in replaced.items() if given]
    for part in FAMILIES[name].needed_names():
        entry = index.get(part)
        is_named = isinstance(entry, list) and len(entry) >= 2 and all(isinstance(each, str) for each in entry)
        if not is_named and part not in elsewhere:
            raise UserError(f"--pretrained_model {path}: its model_index.json has no {part}, which a {name} needs")
    if path.is_dir():
        check_weight_files(path, index, f"--pretrained_model {source.path}", options, elsewhere)
    return FAMILIES[name]


def _family_of_file(source: PipelineSource) -> type[TextFamily]:
    name = source.file.class_name
    if VAE_KEY not in source.file.weights and source.options.pretrained_vae_model_name_or_path is None:
        raise UserError(
            f"--pretrained_model {source.path} is not a complete Stable Diffusion model: it has no {VAE_KEY}; "
            "give a VAE with --pretrained_vae_model_name_or_path"
        )
    source.scheduler_marks()
    if source.config_root is None:
        source.file.check_configs(None)
    return FAMILIES[name]
