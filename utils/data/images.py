"""From an image file to the square that a model sees, all of it by PIL."""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from utils.options import option, require, require_positive
from utils.records import Crop
from utils.seeding import Stream, generator

INTERPOLATIONS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,
}
BROKEN_FILE_ERRORS = (SyntaxError, EOFError, IndexError, RuntimeError, struct.error, zlib.error)  # beside OSError


@dataclass(frozen=True)
class ImageOptions:
    resolution: int | None = option(None, "edge of the square crops in pixels; by default 512, for SDXL 1024")
    center_crop: bool = option(False, "crop the middle instead of a random part")
    random_flip: bool = option(False, "mirror half of the images")
    image_interpolation_mode: str = option("lanczos", "how images are resized", choices=INTERPOLATIONS)

    def __post_init__(self) -> None:
        if self.resolution is None:
            return
        require_positive(self, "resolution")
        below = self.resolution - self.resolution % 8
        cure = f"try {below} or {below + 8}" if below else "try 8"
        require(self.resolution % 8 == 0, "resolution", self.resolution, "be divisible by 8", cure)


def open_image(source: str | bytes) -> Image.Image:
    """Opens an image, of which only the header is read.

    Raises:
        OSError: if it is missing, empty or not an image.
        ValueError: if it has more pixels than PIL's limit for a decompression bomb.
    """
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    except RuntimeError as error:  # of the AVIF decoder
        raise OSError(str(error)) from error
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        image.close()
        raise ValueError(f"{image.width}x{image.height} pixels are over the limit of {limit}")
    return image


def check_header(source: str | bytes) -> None:
    """Raises `OSError` or `ValueError` unless the header is one of a readable image."""
    open_image(source).close()


def read_rgb(source: str | bytes) -> Image.Image:
    """Decodes an image (of several frames the first) into RGB, upright by its EXIF orientation.

    Transparency is laid on white; 16-bit grey is scaled, where PIL alone would clip it.

    Raises:
        OSError, ValueError: as `open_image`, and if the file is truncated or broken.
    """
    try:
        with open_image(source) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except BROKEN_FILE_ERRORS as error:
        raise OSError(f"broken image: {error}") from error
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def cut(image: Image.Image, resolution: int, options: ImageOptions, draws: "CutDraws") -> tuple[np.ndarray, Crop]:
    """Resizes the shorter edge to the resolution and cuts a square, of the mirrored image where that was drawn.

    Returns:
        pixels [3, resolution, resolution] uint8, and the crop that made them.
    """
    width, height = (resolution * edge // min(image.size) for edge in image.size)
    resized = image.resize((width, height), INTERPOLATIONS[options.image_interpolation_mode])
    if options.random_flip and draws.flip:
        resized = ImageOps.mirror(resized)
    if options.center_crop:
        top, left = round((height - resolution) / 2), round((width - resolution) / 2)
    else:
        top = int(draws.vertical * (height - resolution + 1))
        left = int(draws.horizontal * (width - resolution + 1))
    pixels = np.asarray(resized.crop((left, top, left + resolution, top + resolution)))
    crop = Crop(image.height, image.width, top, left, resolution, resolution)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), crop


@dataclass(frozen=True)
class CutDraws:
    """What is drawn before an image is encoded: the crop's place, each in [0, 1), and whether it is mirrored."""

    vertical: float
    horizontal: float
    flip: bool


def draw_cut(seed: int, record: int, passing: int) -> CutDraws:
    """The draws of a record's pass: the same in a cached and in a live run."""
    vertical, horizontal = generator(seed, record, passing, Stream.CROP).random(2)
    return CutDraws(
        float(vertical), float(horizontal), bool(generator(seed, record, passing, Stream.FLIP).random() < 0.5)
    )
