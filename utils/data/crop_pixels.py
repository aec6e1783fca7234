"""What a model sees of an image: the pixels that are cut from it, and where in them its loss counts."""

from typing import NamedTuple

import numpy as np

from utils.config.batch import Crop, MaskFile, RecordPass
from utils.data.crop_plan import make_cut, plan_cut
from utils.data.images import read_mask
from utils.data.masks import cut_mask
from utils.data.options import ImageOptions


class CutOut(NamedTuple):
    """Pixels [C, H, W] (uint8, or float32 from 0 to 255), their crop, and [h, w] uint8 the mask, if asked for."""

    pixels: np.ndarray
    crop: Crop
    mask: np.ndarray | None


def cut_out(
    image: str | bytes,
    mask: MaskFile | None,
    target: tuple[int, int],
    options: ImageOptions,
    seed: int,
    passing: RecordPass,
    mask_shape: tuple[int, int] | None = None,
) -> CutOut:
    """Reads an image and cuts it, and its mask alike, as it is cut in one of its passes.

    Args:
        target: width and height of the pixels.
        mask_shape: height and width of the mask; None leaves it unread. Without a mask the loss counts everywhere.

    Raises:
        OSError, ValueError: if the image or its mask can't be read.
    """
    rgb, alpha = options.layers(image)
    cut = plan_cut(rgb.size, target, options, seed, passing)
    pixels = make_cut(rgb, cut, options)
    if mask_shape is None:
        return CutOut(pixels, cut.crop, None)
    if mask is None or (mask.is_alpha and alpha is None):
        return CutOut(pixels, cut.crop, np.full(mask_shape, 255, np.uint8))
    found = alpha if mask.is_alpha else read_mask(mask.source)
    return CutOut(pixels, cut.crop, cut_mask(found, cut, rgb.size, mask_shape))
