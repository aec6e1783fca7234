"""Images as a model in pixels sees them: with 1, 3 or 4 channels, and in more than 8 bits where that is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from utils.data.images import BROKEN_FILE_ERRORS, ImageOptions, open_image, read_layers, read_rgb
from utils.options import UserError, option

CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
"""PIL's modes by the number of channels."""


@dataclass(frozen=True)
class PixelOptions(ImageOptions):
    resolution: int | None = option(None, "edge of the square crops in pixels; by default 64, or what the model draws")
    image_channels: int = option(3, "channels of the images: grey, colour, colour with transparency", choices=CHANNELS)
    preserve_input_precision: bool = option(
        False, "read 16-bit, 32-bit and floating-point grey as it is, where it would be rounded to 8 bits"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preserve_input_precision and self.color_jitter:
            raise UserError("--color_jitter works in 8 bits, which --preserve_input_precision goes beyond; give one")

    @property
    def channels(self) -> int:
        """Channels of what the model sees."""
        return self.image_channels

    @property
    def reading(self) -> tuple[object, ...]:
        """As of all images, and whether they are read in more than 8 bits."""
        return (*super().reading, *(["more than 8 bits"] if self.preserve_input_precision else []))

    @property
    def pixel_type(self) -> type:
        """Eight bits, or float32."""
        return np.float32 if self.preserve_input_precision else np.uint8

    def layers(self, source: str | bytes) -> tuple[Image.Image, Image.Image | None]:
        """(the image with as many channels as asked for, its alpha channel or None)."""
        if self.preserve_input_precision:
            return read_deep(source, self.image_channels, self.transparency_color)
        if self.image_channels == 4:
            image = _decoded(source)
            if image.mode.startswith("I") or image.mode == "F":
                image = read_rgb(source)
            image = image.convert("RGBA")
            return image, image.getchannel("A")
        image, alpha = read_layers(source, self.transparency_color)
        return image.convert(CHANNELS[self.image_channels]), alpha


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
    """(an image of so many channels, its alpha channel or None), grey of more than 8 bits unrounded.

    Integers of more than 8 bits are taken to end at 65535, floating-point numbers at 1, 255 or 65535 by their largest.

    Raises:
        OSError, ValueError: as `read_rgb`.
    """
    image = _decoded(source)
    alpha = None
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float32).clip(0, 65535) / 257
    elif image.mode == "F":
        grey = np.nan_to_num(np.asarray(image))
        grey = grey * (255 if grey.max() <= 1 else 1 if grey.max() <= 255 else 1 / 257)
    else:
        if channels == 4:
            image = image.convert("RGBA")
        else:
            image, alpha = read_layers(source, transparency_color)
            image = image.convert(CHANNELS[channels])
        return DeepImage([each.convert("F") for each in image.split()]), alpha
    colour = Image.fromarray(grey.astype(np.float32))
    opaque = [Image.new("F", colour.size, 255.0)] if channels == 4 else []
    return DeepImage([colour] * min(channels, 3) + opaque), None


def _decoded(source: str | bytes) -> Image.Image:
    """An image as its file has it, upright."""
    try:
        with open_image(source) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
            return image
    except BROKEN_FILE_ERRORS as error:
        raise OSError(f"broken image: {error}") from error
