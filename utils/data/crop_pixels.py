"""Reads an image and its mask, and crops both as planned."""

from typing import NamedTuple

import numpy as np

from utils.config.batch import Crop, MaskFile, RecordPass
from utils.data.crop_plan import make_cut, plan_cut
from utils.data.images import read_mask
from utils.data.masks import cut_mask
from utils.data.options import ImageOptions


class CutOut(NamedTuple):
    """A cropped image.

    Attributes:
        pixels: [C, H, W] uint8, or float32 from 0 to 255.
        crop: position and size of the crop, for the model.
        mask: [h, w] uint8 the loss mask, or None if it was not requested.
    """

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
    """Reads an image and its mask and crops both for one pass over the record.

    Args:
        image: path or bytes.
        mask: the mask of the image; None means that the loss counts everywhere.
        target: (width, height) of the pixels.
        mask_shape: (height, width) of the returned mask; None to read no mask.

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
