"""Draws a small image from exported files by diffusers' own loaders, and compares it with one by the run's weights."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from torch import nn

from utils.config.library_errors import LOADING_ERRORS
from utils.config.options import UserError, first_line
from utils.config.user_files import size_text
from utils.models.base import Family
from utils.models.folder_form import FolderForm
from utils.models.loading import loading
from utils.runtime.memory import align, is_out_of_memory

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)
ONE_LEVEL = 1 / 255  # of 8-bit images
COARSE = 8 / 255  # mean difference where precision or kernels differ
ROOM = 1.2  # memory that loading takes, as a multiple of the weights in float32
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Reference:
    """An image by the run's own weights.

    Attributes:
        image: [H, W, channels] floats in [0, 1].
        is_exact: whether the same weights must give the same bits again: in float32, by the same kernels.
    """

    image: np.ndarray
    is_exact: bool


class Closeness(Enum):
    """How far an image may be from the reference's."""

    BITS = "the same bits"
    LEVEL = "within 1/255"  # weights that were merged, or adapters that another code adds
    COARSE = "within a mean of 8/255"  # weights, or computation, of another precision


@dataclass(frozen=True)
class Exported:
    """Something that was exported, to draw from.

    Attributes:
        what: name for messages.
        load: loads a pipeline from it, by diffusers' own loaders.
        closeness: how far its image may be from the reference's where that is exact.
    """

    what: str
    load: "Callable[[], DiffusionPipeline]"
    closeness: "Closeness"


def exported_pipeline(family: Family, folder: Path, form: FolderForm, is_merged: bool) -> Exported:
    """Returns the pipeline in a folder, to draw from."""
    arguments = _without_extras(family)
    if form.variant is not None:
        arguments["variant"] = form.variant
    kind = type(family.as_exported())
    return Exported(
        f"{folder.name}/", lambda: kind.from_pretrained(str(folder), **arguments), _closeness(form, is_merged)
    )


def exported_file(family: Family, file: Path, form: FolderForm, is_merged: bool) -> Exported:
    """Returns the pipeline in a single file, whose configs are in its folder, to draw from."""
    arguments = {"config": str(file.parent), **_without_extras(family)}
    kind = family.pipeline_class()
    return Exported(file.name, lambda: kind.from_single_file(str(file), **arguments), _closeness(form, is_merged))


def exported_lora(family: Family, path: Path, dtype: torch.dtype = torch.float32) -> Exported:
    """Returns the base with the LoRA file of a folder or path loaded into it, to draw from."""

    def load() -> "DiffusionPipeline":
        extras = {name: None for name in _without_extras(family) if name in family.pipeline.components}
        pipeline = family.float32_pipeline(**extras)
        pipeline.load_lora_weights(str(path))
        return pipeline

    closeness = Closeness.LEVEL if dtype == torch.float32 else Closeness.COARSE
    return Exported(f"load_lora_weights({path.name}{'/' if path.is_dir() else ''})", load, closeness)


def _closeness(form: FolderForm, is_merged: bool) -> Closeness:
    if form.dtype != torch.float32:
        return Closeness.COARSE
    return Closeness.LEVEL if is_merged else Closeness.BITS


def _without_extras(family: Family) -> dict[str, Any]:
    """Returns arguments that leave out what is not needed to draw, such as a safety checker, which may blacken."""
    kind = family.pipeline_class()
    optional = ("safety_checker", "feature_extractor", "image_encoder")
    found: dict[str, Any] = {name: None for name in optional if name in kind._optional_components}
    if "requires_safety_checker" in kind.__init__.__annotations__:
        found["requires_safety_checker"] = False
    return found


def reference_image(family: Family, is_exact: bool) -> Reference | None:
    """Draws a small image by the weights in memory; None, with a warning, if it can't be drawn."""
    try:
        with family.awake(), _eagerly():
            image = _draw(family, family.as_exported())
    except (*LOADING_ERRORS, IndexError, UserError) as error:
        logger.warning("the exported files are not drawn from: no image to compare with: %s", first_line(error))
        return None
    if not np.isfinite(image).all():
        logger.warning("the exported files are not drawn from: an image by the trained weights is not finite")
        return None
    return Reference(image, is_exact)


@contextmanager
def _eagerly() -> Iterator[None]:
    """Context manager: compiled modules run uncompiled, as a small image has shapes of its own."""
    with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for pipelines that draw from the global generator
        yield


def _draw(family: Family, pipeline: "DiffusionPipeline") -> np.ndarray:
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(disable=True)
    try:
        with torch.no_grad():
            return np.asarray(family.probe(pipeline), dtype=np.float32)
    finally:
        pipeline.set_progress_bar_config(**before)


def bytes_to_draw(family: Family) -> int:
    """Returns the bytes of memory that another copy of the pipeline takes in float32."""
    modules = [part for part in family.pipeline.components.values() if isinstance(part, nn.Module)]
    return int(ROOM * FLOAT32_BYTES * sum(each.numel() for module in modules for each in module.parameters()))


def lacking_memory(needed: int, device: torch.device) -> str:
    """Returns which memory is too small for so many bytes, for a message; "" if none is."""
    places = {"host memory": psutil.virtual_memory().available}
    if device.type == "cuda":
        places["device memory"] = torch.cuda.mem_get_info(device)[0]
    for place, free in places.items():
        if free < needed:
            return f"{size_text(needed)} of {place}, of which {size_text(free)} are free"
    return ""


def compare(exported: Exported, family: Family, reference: Reference, device: torch.device) -> tuple[str, str]:
    """Draws from something exported, and compares the image with the reference.

    Returns:
        What was compared, and what is wrong; the latter is empty if all is right.
    """
    try:
        with loading(exported.what):
            pipeline = exported.load()
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                align(part.to(device, torch.float32).eval())
        with _eagerly():
            image = _draw(family, pipeline)
    except (*LOADING_ERRORS, IndexError, UserError) as error:
        if is_out_of_memory(error):
            logger.warning("%s is not drawn from: %s", exported.what, first_line(error))
            return "", ""
        return "", f"{exported.what} can't be drawn from by diffusers: {first_line(error)}"
    return _judged(exported, reference, image)


def _judged(exported: Exported, reference: Reference, image: np.ndarray) -> tuple[str, str]:
    if image.shape != reference.image.shape or not np.isfinite(image).all():
        return "", f"{exported.what} draws an image of shape {image.shape} or with NaN, unlike the trained weights"
    apart = np.abs(image - reference.image)
    wanted = exported.closeness if reference.is_exact else Closeness.COARSE
    is_right = {
        Closeness.BITS: np.array_equal(image, reference.image),
        Closeness.LEVEL: apart.max() <= ONE_LEVEL,
        Closeness.COARSE: apart.mean() <= COARSE,
    }
    if is_right[wanted]:
        return f"{exported.what} draws {'' if wanted is Closeness.BITS else 'the same image '}{wanted.value}", ""
    far = f"{apart.mean() * 255:.2f}/255 on average, {apart.max() * 255:.1f} at most"
    return "", f"{exported.what} draws another image than the trained weights: {far}; it must be {wanted.value}"


def same_widths(configs: Mapping[str, Any]) -> bool:
    """Whether two text encoders have one width, for which diffusers loads the first one's weights of a single file."""
    widths = [config.hidden_size for config in configs.values()]
    return len(set(widths)) < len(widths)
