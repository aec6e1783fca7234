"""From an image file to the pixels that a model sees, all of it by PIL."""

import importlib
import io
import logging
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin

from utils.config.options import first_line
from utils.config.user_files import FileError, open_regular
from utils.data.bit_depths import (
    TIFF_MAGICS,
    clear_colour,
    clear_grey,
    deep_grey,
    note_samples,
    take_other_half,
    unread_tiff,
)
from utils.data.colours import conversion_of, grey_to_srgb, has_unusable_profile, strips, to_srgb
from utils.data.file_signatures import HEAD_SIZE, is_raw, jxl_size, kind_of, profile_in
from utils.data.oddities import CONVERTED, SMALL_PALETTE, TURNED_ANEW, UNCOMMON, how_read
from utils.data.orientation import Turn, turn_of

BROKEN_FILE_ERRORS = (  # beside OSError and ValueError
    SyntaxError,
    EOFError,
    LookupError,
    RuntimeError,
    AttributeError,
    TypeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
)
READ_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "DDS", "SGI", "PCX"),
    "TGA",  # the last: it has no signature
)
"""The formats that are opened, whatever a file is called, by PIL's names: those of photographs, art and textures that
are decoded in this process from the file alone. Others start programs (EPS), read only part of what the file shows
(PSD, ICO), are no pictures (FITS, HDF5, GRIB), or are of no use as training data.
"""
OPTIONAL_FORMATS = {
    "HEIF": ("pillow_heif", "pillow-heif", (".heic", ".heif", ".hif")),
    "JXL": ("pillow_jxl", "pillow-jxl-plugin", (".jxl",)),
}
"""Formats that a package adds to PIL: the module that registers them, the package, and the endings."""
UNREAD_SUFFIXES = {
    "SVG": (".svg", ".svgz"),
    "EPS": (".eps", ".epsf", ".epsi", ".ps", ".ai"),
    "PDF": (".pdf",),
    "WMF": (".wmf", ".emf"),
    "Photoshop": (".psd", ".psb"),
    "layered": (".xcf", ".kra", ".ora", ".clip", ".afphoto", ".afdesign", ".procreate", ".sai", ".sai2", ".mdp"),
    "camera raw": (
        *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".raf", ".orf", ".rw2", ".pef"),
        *(".srw", ".raw", ".rwl", ".iiq", ".3fr", ".fff", ".mef", ".mos", ".mrw", ".x3f", ".erf", ".kdc", ".dcr"),
    ),
    "high dynamic range": (".exr", ".hdr", ".pic"),
    "icon": (".ico", ".icns", ".cur"),
    "scientific": (".fit", ".fits", ".h5", ".hdf", ".grib", ".bufr", ".dcm", ".nii"),
    "JPEG XR": (".jxr", ".wdp", ".hdp", ".bpg", ".flif"),
    "DjVu": (".djvu", ".djv"),
    "uncommon": (
        *(".im", ".msp", ".blp", ".dcx", ".fli", ".flc", ".ftc", ".ftu", ".gbr", ".iim", ".pcd", ".pxr", ".ras"),
        *(".xbm", ".xpm", ".ktx", ".ktx2", ".vtf", ".basis"),
    ),
    "video": (
        *(".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp", ".mts"),
        *(".m2ts", ".gifv"),
    ),
}
"""Endings of pictures and videos that are never read, by their kind."""
_KIND_OF_SUFFIX = {suffix: kind for kind, suffixes in UNREAD_SUFFIXES.items() for suffix in suffixes}
QOI_COLORSPACE = 13  # where it says whether it is linear
MOST_BYTES = 1 << 30  # of a file
BLOCK = 16  # pixels of an edge that codecs for photographs store together
FULL_PIXELS = 89_478_485  # PIL's own limit; what has more is read in half its size
MOST_PIXELS = 1 << 28
MOST_PIXELS_PER_BYTE = 100  # of what has over FULL_PIXELS; photographs have 1 to 40, one colour as PNG 130 to 8000
MANY_PIXELS, MOST_OF_MANY_PER_BYTE = 1 << 24, 20_000  # one colour as PNG or GIF has up to 8000 pixels a byte
Image.MAX_IMAGE_PIXELS = None  # PIL only warns at its limit; `check_pixels` judges
warnings.filterwarnings("ignore", "Corrupt EXIF data|Truncated File Read", module="PIL.TiffImagePlugin")
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20  # workflows and profiles of many MB
ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
logger = logging.getLogger(__name__)


class Refused(str):
    """Why an image may not be read, in place of its path."""


@dataclass(frozen=True)
class Header:
    """What an image file says before its pixels.

    Attributes:
        width, height: in pixels, upright as EXIF or XMP says.
        oddities: names of what is out of the ordinary in it.
    """

    width: int
    height: int
    oddities: tuple[str, ...]

    @property
    def how_read(self) -> bytes:
        """What sets its pixels apart from those that earlier releases read; b"" of most images."""
        return how_read(self.oddities)


@cache
def read_formats() -> tuple[str, ...]:
    """The formats that are opened here: `READ_FORMATS` and those that installed packages add, registered once."""
    Image.init()
    known = [name for name in READ_FORMATS if name in Image.OPEN]  # AVIF is new in Pillow 11.3
    return (*(name for name in OPTIONAL_FORMATS if _register(name)), *known)


def _register(name: str) -> bool:
    """Registers an optional format with PIL; returns whether its package is there."""
    module, package, _ = OPTIONAL_FORMATS[name]
    try:
        found = importlib.import_module(module)  # pillow_jxl registers itself
        if name == "HEIF":
            found.register_heif_opener(thumbnails=False)
    except ModuleNotFoundError:
        return False
    except (ImportError, OSError) as error:
        logger.warning("%s is installed but does not load: %s", package, first_line(error))
        return False
    return True


@cache
def image_suffixes() -> frozenset[str]:
    """The endings, in small letters, of files that are opened as images."""
    formats = {*read_formats(), "MPO"}  # which PIL opens as JPEG
    optional = [suffix for name in formats & OPTIONAL_FORMATS.keys() for suffix in OPTIONAL_FORMATS[name][2]]
    return frozenset(optional).union(end for end, name in Image.registered_extensions().items() if name in formats)


def unread_reason(suffix: str) -> str | None:
    """Why a picture or video with this ending is not read; None of endings that are read or are of no picture."""
    suffix = suffix.lower()
    if suffix in image_suffixes():
        return None
    optional = next((name for name, (_, _, suffixes) in OPTIONAL_FORMATS.items() if suffix in suffixes), None)
    kind = optional or _KIND_OF_SUFFIX.get(suffix)
    return kind and _not_read(kind)


def _not_read(kind: str) -> str:
    """That pictures of a kind are not read, with the cure."""
    if kind in OPTIONAL_FORMATS:
        package = OPTIONAL_FORMATS[kind][1]
        return f"{kind} images need the package {package}: pip install {package}"
    if kind == "video":
        return "videos are not read; save frames as PNG or JPEG"
    return f"{kind} images are not read; convert it to PNG or JPEG"


@contextmanager
def open_image(source: str | bytes) -> Iterator[Image.Image]:
    """Opens an image, of which only the header is read, and closes it at the end.

    Its ICC profile, or one made of what else the file says of its colours, is `info["icc_profile"]`. Photographs of
    over 89 megapixels are read in half their size: a JPEG's is halved here, others' in `decode`.

    Args:
        source: the path of a regular file, or an image's bytes.

    Raises:
        OSError: if it is missing, empty, refused or not an image of `read_formats()`.
        ValueError: if it has too many pixels, or far more than its bytes can tell of.
    """
    with _opened(source) as file:
        yield _identify(file)


def image_bytes(source: str | bytes) -> bytes:
    """All bytes of an image.

    Raises:
        OSError: as `open_image`, and if they are more than are read of an image.
    """
    with _opened(source) as file:
        return file.read()


def _opened(source: str | bytes) -> BinaryIO:
    """The regular file at a path, or bytes as a file.

    Raises:
        OSError: as `image_bytes`.
    """
    if isinstance(source, Refused):
        raise OSError(str(source))
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open_regular(source)
    except FileError as error:
        raise OSError(f"it {error.reason}") from error
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    if 0 < num_bytes <= MOST_BYTES:
        return file
    file.close()
    raise OSError(f"it has over {MOST_BYTES >> 20} MiB, the most that is read" if num_bytes else "the file is empty")


def _identify(file: BinaryIO) -> Image.Image:
    """The image of an open file, as `open_image` returns it.

    What is known of it is settled here, once for `read_header` and `decode`: `info["turn"]` is how it has to be turned,
    `info["upright"]` its width and height when it is turned and halved.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(HEAD_SIZE)
    kind = kind_of(head)
    if kind is not None and kind not in read_formats():
        raise OSError(_not_read(kind))
    if kind == "JXL":
        check_pixels(jxl_size(file), num_bytes)  # before it is opened, when the package decodes it
    try:
        image = Image.open(file, formats=read_formats())
        place = file.tell()
        profile = profile_in(image, file)
        turn = turn_of(image, file)
        file.seek(place)
        is_thumbnail = image.format == "TIFF" and is_raw(image)
        note_samples(image, head)
    except Image.UnidentifiedImageError as error:
        unread = unread_tiff(file) if head[:4] in TIFF_MAGICS else "not an image, or of no format that is read here"
        raise OSError(unread) from error
    except BROKEN_FILE_ERRORS as error:  # such as the AVIF decoder's
        raise OSError(f"broken image: {error}") from error
    check_pixels(image.size, num_bytes)
    if is_thumbnail:
        raise OSError(_not_read("camera raw"))
    if image.format == "DDS" and getattr(image, "pixel_format", "").startswith("BC6H"):
        raise OSError(_not_read("high dynamic range"))
    if is_halved(image):
        image.info["halved"] = True
        if "clear" in image.info:
            raise ValueError("16-bit PNGs of over 89 megapixels with a transparent colour are not read")
        if image.format in ("JPEG", "MPO"):
            image.draft(image.mode, (image.width // 2, image.height // 2))
    image.info |= {"turn": turn, "upright": _upright_size(image, turn)}
    if image.format == "QOI" and head[QOI_COLORSPACE : QOI_COLORSPACE + 1] == b"\1":
        image.info["linear"] = True
    if profile is not None:
        image.info["icc_profile"] = profile
    return image


def _upright_size(image: Image.Image, turn: Turn) -> tuple[int, int]:
    """Width and height of an opened image when it is turned and halved."""
    width, height = image.size[::-1] if turn.swaps else image.size
    return (-(-width // 2), -(-height // 2)) if is_halved(image) else (width, height)


def check_pixels(size: tuple[int, int], num_bytes: int) -> None:
    """Refuses an image that would take memory out of proportion to its file.

    Raises:
        ValueError: naming what it has.
    """
    pixels = size[0] * size[1]
    if pixels > MOST_PIXELS:
        raise ValueError(f"{size[0]}x{size[1]} pixels are over the limit of {MOST_PIXELS}")
    limit, most = (FULL_PIXELS, MOST_PIXELS_PER_BYTE) if pixels > FULL_PIXELS else (MANY_PIXELS, MOST_OF_MANY_PER_BYTE)
    if pixels > limit and num_bytes * most < pixels:
        raise ValueError(
            f"{size[0]}x{size[1]} pixels in {num_bytes} bytes are no photograph but a decompression bomb; "
            f"over {limit} pixels need a byte for each {most}"
        )


def is_halved(image: Image.Image) -> bool:
    """Whether an opened image is so large that it is read in half its size."""
    return image.width * image.height > FULL_PIXELS


def reason_of(error: Exception) -> str:
    """Why an image can't be read, in words."""
    if isinstance(error, FileNotFoundError):
        return "the file is not there"
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def check_whole(content: str | bytes) -> None:
    """Raises `OSError` if an image's bytes are cut off, as far as their end says it: without decoding them."""
    if not isinstance(content, bytes):
        return
    ends = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND", b"GIF8": b";"}
    end = next((end for begin, end in ends.items() if content.startswith(begin)), b"")
    is_cut = end not in content[-4096:]
    if content[:4] == b"RIFF":
        is_cut = int.from_bytes(content[4:8], "little") + 8 > len(content)
    if is_cut:
        raise OSError("the image is cut off")


def read_header(source: str | bytes) -> Header:
    """An image's upright size and oddities; its pixels are not read.

    Raises:
        OSError, ValueError: as `open_image`.
    """
    try:
        with open_image(source) as image:
            return Header(*image.info["upright"], _oddities(image))
    except BROKEN_FILE_ERRORS as error:
        raise OSError(f"broken image: {error}") from error


def check_values(source: str | bytes, header: Header) -> Header:
    """The header with what its image's numbers show; one of an uncommon bit depth is decoded for it.

    Raises:
        OSError, ValueError: if it can't be read, as `read_layers`, or which of its numbers is white can't be told.
    """
    if UNCOMMON not in header.oddities:
        return header
    image = decode(source)
    eight_bits(image)
    return replace(header, oddities=(*header.oddities, *image.info.get("guessed", ())))


def _oddities(image: Image.Image) -> tuple[str, ...]:
    mode = image.mode
    found = {
        "CMYK": mode == "CMYK",
        "palette": mode in ("P", "PA"),
        "grey": mode in ("1", "L", "LA", "La"),
        "16-bit or more": mode.startswith("I") or mode == "F",
        "transparent": mode in ALPHA_MODES or not image.info.keys().isdisjoint(("transparency", "clear")),
        "turned by EXIF": image.info["turn"].orientation != 1,
        "animated, first frame taken": getattr(image, "is_animated", False),
        "other mode": mode in ("YCbCr", "LAB", "HSV") and image.format != "JPEG",
        "under 64 pixels": min(image.size) < 64,
        CONVERTED: conversion_of(image) is not None,
        "unusable colour profile, ignored": has_unusable_profile(image),
        "over 89 megapixels, read in half the size": "halved" in image.info,
        UNCOMMON: "uncommon" in image.info,
        "marked as linear light (QOI), read as sRGB": "linear" in image.info,
        TURNED_ANEW: image.info["turn"].is_new,
        SMALL_PALETTE: "small palette" in image.info,
    }
    return tuple(name for name, holds in found.items() if holds)


def decode(source: str | bytes, prepare: Callable[[Image.Image], None] | None = None) -> Image.Image:
    """The first frame of an image, as its file has it, turned as its EXIF or XMP says.

    Args:
        prepare: changes the opened image before it is decoded.

    Raises:
        OSError, ValueError: as `open_image`, and if it is truncated or broken.
    """
    with open_image(source) as image:
        if prepare is not None:
            prepare(image)
        known = dict(image.info)
        try:
            image.load()
            image.info = known  # what stands behind the pixels of a PNG is in no header
            upright = _halved(image) if is_halved(image) else image
            if known["turn"].left is not None:
                upright = upright.transpose(known["turn"].left)
        except BROKEN_FILE_ERRORS as error:
            raise OSError(f"broken image: {error}") from error
    if not _is_size(upright.size, known["upright"]):
        raise OSError(
            "broken image: its pixels are {}x{}, by its header {}x{}".format(*upright.size, *known["upright"])
        )
    if "clear" in known and upright.mode == "RGB" and prepare is None:
        upright.putalpha(clear_colour(upright, decode(source, take_other_half), known["clear"]))
    return upright


def _is_size(size: tuple[int, int], said: tuple[int, int]) -> bool:
    """Whether pixels are of the size that their header says, but for an edge that a decoder has cut to its blocks.

    Plug-ins for HEIF and others know the exact size only then. A turn that the header does not tell is none of that.
    """
    is_turned = size == said[::-1] != said
    return not is_turned and all(
        abs(one - other) <= min(BLOCK, other // 8) for one, other in zip(size, said, strict=True)
    )


def _halved(image: Image.Image) -> Image.Image:
    """A decoded image in half its size, each pixel the mean of four."""
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode == "1" or image.mode.startswith("I;"):
        image = image.convert("L" if image.mode == "1" else "I")
    return image.reduce(2)


def read_rgb(source: str | bytes, transparency_color: str = "white") -> Image.Image:
    """Decodes an image (of several frames the first) into RGB, upright by EXIF or XMP, in sRGB.

    Transparency is laid on the colour; 16-bit grey is scaled, where PIL alone would clip it.

    Raises:
        OSError, ValueError: as `decode`.
    """
    return read_layers(source, transparency_color)[0]


def read_mask(source: str | bytes) -> Image.Image:
    """A mask, "L": its values as they are, whatever colours a profile would make of them; clear is black.

    Raises:
        OSError, ValueError: as `decode`.
    """
    return read_mask_layers(source)[0].convert("L")


def read_mask_layers(source: str | bytes) -> tuple[Image.Image, Image.Image | None, tuple[float, float] | None]:
    """(a mask's values, "RGB", its alpha channel or None, the range of one in more than 8 bits or None).

    The range is that before rounding, from 0 to 255.

    Raises:
        OSError, ValueError: as `decode`.
    """
    image = decode(source)
    image.info.pop("icc_profile", None)
    grey = deep_grey(image)
    extremes = None if grey is None else (float(grey.min()), float(grey.max()))
    return *_layers(image, "black"), extremes


def read_layers(source: str | bytes, transparency_color: str) -> tuple[Image.Image, Image.Image | None]:
    """(what `read_rgb` returns, the alpha channel, "L", or None of an opaque image)."""
    return _layers(decode(source), transparency_color)


def _layers(image: Image.Image, transparency_color: str) -> tuple[Image.Image, Image.Image | None]:
    """The same as `read_layers`, of a decoded image."""
    image = eight_bits(image)
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        return _flattened(image, transparency_color)
    return image if image.mode == "RGB" else image.convert("RGB"), None


def eight_bits(image: Image.Image) -> Image.Image:
    """A decoded image in sRGB of 8 bits: as `to_srgb`, deep grey as RGB or RGBA.

    Raises:
        ValueError: as `deep_grey`.
    """
    grey = deep_grey(image)
    if grey is None:
        return to_srgb(image)
    alpha = clear_grey(image)
    found = Image.fromarray(np.rint(grey_to_srgb(grey, image), out=grey).astype(np.uint8)).convert("RGB")
    if alpha is not None:
        found.putalpha(Image.fromarray(alpha))
    return found


def _flattened(image: Image.Image, color: str) -> tuple[Image.Image, Image.Image]:
    """(a transparent image laid on a colour, its alpha channel), strip by strip: whole copies would take gigabytes."""
    rgb, alpha = Image.new("RGB", image.size), Image.new("L", image.size)
    for rows in strips(image.size[::-1]):
        strip = image.crop((0, rows.start, image.width, min(rows.stop, image.height))).convert("RGBA")
        ground = Image.new("RGBA", strip.size, color)
        rgb.paste(Image.alpha_composite(ground, strip), (0, rows.start))
        alpha.paste(strip.getchannel("A"), (0, rows.start))
    return rgb, alpha
