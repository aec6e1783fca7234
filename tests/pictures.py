"""Images with known pixels, their files, and colours by published matrices."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from utils.data import colours


def painted(width: int, height: int) -> Image.Image:
    """An image whose red and green say the column, and whose blue says the row, both as a share of the whole."""
    columns, rows = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    pixels = np.stack([columns * 255, columns * 255, rows * 255], axis=-1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def make_picture(file: Path, size: tuple[int, int] = (48, 40), colour: object = "red") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)
    return file


P3_TO_XYZ = np.array([[0.486571, 0.265668, 0.198217], [0.228975, 0.691739, 0.079287], [0.0, 0.045113, 1.043944]])
SRGB_TO_XYZ = np.array([[0.412456, 0.357576, 0.180438], [0.212673, 0.715152, 0.072175], [0.019334, 0.119192, 0.950304]])
"""Of linear colours, at D65: as published."""
P3 = colours.matrix_profile(colours.PRIMARIES[12], None)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """An image's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(width: int = 64, height: int = 48) -> Image.Image:
    """Smooth colours of all kinds, none of them brighter or purer than half."""
    drawn = np.random.default_rng(0).integers(60, 190, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(drawn).resize((width, height), Image.Resampling.BILINEAR)


def light(values: np.ndarray) -> np.ndarray:
    """Linear light of sRGB from 0 to 255."""
    values = np.asarray(values) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def from_light(linear: np.ndarray) -> np.ndarray:
    """The inverse."""
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055)


def in_display_p3(values: np.ndarray) -> np.ndarray:
    """sRGB from 0 to 255 as Display P3, by published matrices."""
    return from_light((light(values) @ (np.linalg.inv(P3_TO_XYZ) @ SRGB_TO_XYZ).T).clip(0, 1))


def as_image(values: np.ndarray) -> Image.Image:
    """An image of 8 bits."""
    return Image.fromarray(np.rint(values).astype(np.uint8))


def with_chunk(png: bytes, name: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return png[:33] + chunk + png[33:]


def touch_images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder
