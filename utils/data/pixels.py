"""Reads images for pixel-space models: with 1, 3 or 4 channels, and unrounded beyond 8 bits on request."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor

from utils.data.bit_depths import clear_grey, deep_grey, has_two_halves, take_other_half
from utils.data.colours import deep_to_srgb, grey_to_srgb, to_srgb
from utils.data.images import decode, is_halved, open_image, read_layers
from utils.data.options import CHANNELS


class DeepImage:
    """An image in float32 from 0 to 255, stored by channel so that PIL crops and resizes it in float32."""

    def __init__(self, channels: Sequence[Image.Image]):
        """`channels` have PIL's mode F."""
        self.channels = list(channels)
        self.size = self.channels[0].size

    def rotate(self, degrees: float, resampling: Image.Resampling) -> "DeepImage":
        """Rotates as PIL does."""
        return DeepImage([each.rotate(degrees, resampling) for each in self.channels])

    def resize(
        self, size: tuple[int, int], resampling: Image.Resampling, box: tuple[float, float, float, float]
    ) -> "DeepImage":
        """Resizes as PIL does."""
        return DeepImage([each.resize(size, resampling, box=box) for each in self.channels])

    def transpose(self, method: Image.Transpose) -> "DeepImage":
        """Flips or turns as PIL does."""
        return DeepImage([each.transpose(method) for each in self.channels])

    def __array__(self, dtype: type | None = None, copy: bool | None = None) -> np.ndarray:
        """Returns [H, W, C] float32, clipped to 0 to 255, as resampling filters overshoot."""
        return np.stack([np.asarray(each) for each in self.channels], axis=-1).clip(0, 255)


def read_deep(source: str | bytes, channels: int, transparency_color: str) -> tuple[DeepImage, Image.Image | None]:
    """Reads an image without rounding it to 8 bits.

    Args:
        source: path or bytes of the image.
        channels: 1, 3 or 4.
        transparency_color: colour behind transparent parts, if there are fewer than 4 channels.

    Returns:
        (the image, its alpha channel or None).

    Raises:
        OSError, ValueError: if it can't be read.
    """
    # images of more than 8 bits
    image = decode(source)
    grey = deep_grey(image)
    if grey is not None:
        alpha = clear_grey(image)
        values = np.repeat(grey_to_srgb(grey, image)[..., None], 3, axis=2)
        values = values if alpha is None else np.dstack([values, alpha.astype(np.float32)])
    else:
        values = _sixteen_bits(source, image)
        values = None if values is None else deep_to_srgb(values, image)
    if values is not None:
        return _of_channels(values, channels, transparency_color)

    # images of 8 bits
    if channels == 4:
        image, alpha = to_srgb(image).convert("RGBA"), None
    else:
        image, alpha = read_layers(source, transparency_color)
        image = image.convert(CHANNELS[channels])
    return DeepImage([each.convert("F") for each in image.split()]), alpha


def _sixteen_bits(source: str | bytes, high: Image.Image) -> np.ndarray | None:
    """Returns 16-bit colours as [H, W, 3 or 4] float32 from 0 to 255; None for other images.

    Args:
        source: path or bytes of the image.
        high: the image as PIL decodes it, with the high bytes.
    """
    with open_image(source) as opened:
        is_deep, image_is_halved = has_two_halves(opened), is_halved(opened)
    if not is_deep:
        return None
    if image_is_halved:
        raise ValueError("16-bit images of over 89 megapixels can't be read with --preserve_input_precision")
    low = np.asarray(decode(source, take_other_half))
    values, num_deep = np.asarray(high).astype(np.float32), low.shape[2]
    values[..., :num_deep] = (values[..., :num_deep] * 256 + low) / 257  # further channels are an 8-bit alpha
    return values


def _of_channels(values: np.ndarray, channels: int, transparency_color: str) -> tuple[DeepImage, Image.Image | None]:
    """Returns the result of `read_deep` for colours [H, W, 3 or 4] from 0 to 255."""
    colours, alpha = values[..., :3], values[..., 3:]
    has_alpha = alpha.size > 0
    if channels < 4 and has_alpha:
        ground = np.array(ImageColor.getrgb(transparency_color)[:3], np.float32)
        colours = ground + (colours - ground) * (alpha / 255)
    if channels == 1:
        colours = colours @ np.array([[0.299], [0.587], [0.114]], np.float32)  # PIL's weights for greyscale
    elif channels == 4:
        colours = np.concatenate([colours, alpha if has_alpha else np.full_like(colours[..., :1], 255)], axis=2)
    planes = [Image.fromarray(np.ascontiguousarray(each)) for each in np.moveaxis(colours.astype(np.float32), 2, 0)]
    seen = Image.fromarray(alpha[..., 0].round().astype(np.uint8)) if has_alpha else None
    return DeepImage(planes), seen
