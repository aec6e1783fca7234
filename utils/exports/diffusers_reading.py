"""Finds the layers of a LoRA file for UIs that diffusers would draw with in another way than UIs do.

diffusers (read at 0.42) renames attention layers of files in kohya's names before it looks up their alphas,
which then match no layer: those layers get the most frequent alpha. Of text encoders it reads attention layers only
together with `out_proj`.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from utils.config.library_errors import CONVERSION_ERRORS, LOADING_ERRORS
from utils.config.options import first_line
from utils.config.tensor_files import read_safetensors
from utils.formats.adapter_files import AdapterLayer
from utils.models.adapter_components import family_of_parts, layers_by_name
from utils.models.lora_files import as_diffusers_names
from utils.runtime.sharding import plain_class

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)
PROBE = "probe"  # name of the adapter that is loaded
CLOSE = 1e-5  # relative difference of scales up to rounding


def misread_layers(file: Path, layers: Sequence[AdapterLayer], pipeline: "DiffusionPipeline") -> list[str]:
    """Returns the layers that diffusers leaves out of a LoRA file, or scales in another way.

    The file is loaded by diffusers into models without memory, so nothing is drawn and no weight is read.

    Args:
        file: the file in the names of UIs.
        layers: the layers that it holds.
        pipeline: a pipeline of the model that it is for; it is not changed.
    """
    family = family_of_parts(type(pipeline).__name__, pipeline.components)
    names = sorted({layer.component for layer in layers})
    empty = {name: _without_memory(getattr(pipeline, name)) for name in names}
    try:
        with _in_silence():
            tensors, alphas = as_diffusers_names(pipeline, dict(read_safetensors(file)))
            for name, module in empty.items():
                given = {"network_alphas": alphas, "adapter_name": PROBE}
                if name == family.denoiser_name:
                    pipeline.load_lora_into_unet(tensors, unet=module, **given)
                else:
                    pipeline.load_lora_into_text_encoder(tensors, text_encoder=module, prefix=name, **given)
    except (*LOADING_ERRORS, *CONVERSION_ERRORS) as error:  # RuntimeError covers what meta tensors can't do
        logger.debug("diffusers can't load %s: %s", file, first_line(error))
        return [f"{layer.component}.{layer.name}" for layer in layers]
    found = {name: layers_by_name(family, name, module) for name, module in empty.items()}
    return [
        f"{layer.component}.{layer.name}"
        for layer in layers
        if not _is_scaled_as(layer, found[layer.component][layer.name])
    ]


def _is_scaled_as(layer: AdapterLayer, module: nn.Module) -> bool:
    scale = getattr(module, "scaling", {}).get(PROBE)
    return scale is not None and abs(scale - layer.scale) <= CLOSE * abs(layer.scale)


def _without_memory(module: nn.Module) -> nn.Module:
    """Returns a model of a module's class and config on the meta device."""
    kind = plain_class(module)
    make = getattr(kind, "from_config", kind)  # diffusers and transformers construct models differently
    with torch.device("meta"):
        return make(module.config)


@contextmanager
def _in_silence() -> Iterator[None]:
    """Context manager: what libraries say of layers that they leave out is not logged."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
