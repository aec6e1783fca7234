"""Images as a model in pixels sees them: with 1, 3 or 4 channels, and in more than 8 bits where that is asked for."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor

from utils.data.bit_depths import clear_grey, deep_grey, has_two_halves, take_other_half
from utils.data.colours import deep_to_srgb, grey_to_srgb, to_srgb
from utils.data.images import decode, is_halved, open_image, read_layers
from utils.data.options import CHANNELS


class DeepImage:
    """Channels of an image in float32 from 0 to 255, each of which PIL cuts and resizes in float32 too."""

    def __init__(self, channels: Sequence[Image.Image]):
        """`channels` are of PIL's mode F."""
        self.channels = list(channels)
        self.size = self.channels[0].size

    def rotate(self, degrees: float, resampling: Image.Resampling) -> "DeepImage":
        """As PIL's."""
        return DeepImage([each.rotate(degrees, resampling) for each in self.channels])

    def resize(
        self, size: tuple[int, int], resampling: Image.Resampling, box: tuple[float, float, float, float]
    ) -> "DeepImage":
        """As PIL's."""
        return DeepImage([each.resize(size, resampling, box=box) for each in self.channels])

    def transpose(self, method: Image.Transpose) -> "DeepImage":
        """As PIL's."""
        return DeepImage([each.transpose(method) for each in self.channels])

    def __array__(self, dtype: type | None = None, copy: bool | None = None) -> np.ndarray:
        """[H, W, C] float32, cut to the range that filters can leave."""
        return np.stack([np.asarray(each) for each in self.channels], axis=-1).clip(0, 255)


def read_deep(source: str | bytes, channels: int, transparency_color: str) -> tuple[DeepImage, Image.Image | None]:
    """(an image of so many channels, its alpha channel or None), of more than 8 bits unrounded.

    Raises:
        OSError, ValueError: as `read_rgb`.
    """
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
    if channels == 4:
        image, alpha = to_srgb(image).convert("RGBA"), None
    else:
        image, alpha = read_layers(source, transparency_color)
        image = image.convert(CHANNELS[channels])
    return DeepImage([each.convert("F") for each in image.split()]), alpha


def _sixteen_bits(source: str | bytes, high: Image.Image) -> np.ndarray | None:
    """[H, W, 3 or 4] float32 from 0 to 255 of colours in 16 bits; None of other images.

    Args:
        high: the image as PIL decodes it.
    """
    with open_image(source) as opened:
        is_deep, image_is_halved = has_two_halves(opened), is_halved(opened)
    if not is_deep:
        return None
    if image_is_halved:
        raise ValueError("16-bit colours of over 89 megapixels are not read with --preserve_input_precision")
    low = np.asarray(decode(source, take_other_half))
    values, num_deep = np.asarray(high).astype(np.float32), low.shape[2]
    values[..., :num_deep] = (values[..., :num_deep] * 256 + low) / 257  # what is more is alpha of a transparent colour
    return values


def _of_channels(values: np.ndarray, channels: int, transparency_color: str) -> tuple[DeepImage, Image.Image | None]:
    """The same as `read_deep` of its colours [H, W, 3 or 4] from 0 to 255."""
    colours, alpha = values[..., :3], values[..., 3:]
    has_alpha = alpha.size > 0
    if channels < 4 and has_alpha:
        ground = np.array(ImageColor.getrgb(transparency_color)[:3], np.float32)
        colours = ground + (colours - ground) * (alpha / 255)
    if channels == 1:
        colours = colours @ np.array([[0.299], [0.587], [0.114]], np.float32)  # as PIL makes grey of colours
    elif channels == 4:
        colours = np.concatenate([colours, alpha if has_alpha else np.full_like(colours[..., :1], 255)], axis=2)
    planes = [Image.fromarray(np.ascontiguousarray(each)) for each in np.moveaxis(colours.astype(np.float32), 2, 0)]
    seen = Image.fromarray(alpha[..., 0].round().astype(np.uint8)) if has_alpha else None
    return DeepImage(planes), seen
