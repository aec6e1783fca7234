"""Opens and decodes images with PIL: upright, in sRGB, with limits against broken and malicious files."""

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

BROKEN_FILE_ERRORS = (  # in addition to OSError and ValueError
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
    "TGA",  # last, because it has no signature
)
"""PIL names of the formats that are opened, whatever the extension: photographs, art and textures that are decoded in
this process from the file alone. The others start programs (EPS), decode only part of the image (PSD, ICO), are not
images (FITS, HDF5, GRIB), or are not useful as training data.
"""
OPTIONAL_FORMATS = {
    "HEIF": ("pillow_heif", "pillow-heif", (".heic", ".heif", ".hif")),
    "JXL": ("pillow_jxl", "pillow-jxl-plugin", (".jxl",)),
}
"""Formats that a package adds to PIL: (module that registers the format, package, extensions)."""
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
"""Extensions of images and videos that are never read, by kind."""
_KIND_OF_SUFFIX = {suffix: kind for kind, suffixes in UNREAD_SUFFIXES.items() for suffix in suffixes}
QOI_COLORSPACE = 13  # offset of the byte that is 1 for linear light
MOST_BYTES = 1 << 30  # of an image file
BLOCK = 16  # edge in pixels of the blocks of photo codecs
FULL_PIXELS = 89_478_485  # PIL's own limit; larger images are read at half size
MOST_PIXELS = 1 << 28
MOST_PIXELS_PER_BYTE = 100  # above FULL_PIXELS; photos have 1 to 40, single-colour PNGs 130 to 8000
MANY_PIXELS, MOST_OF_MANY_PER_BYTE = 1 << 24, 20_000  # a single-colour PNG or GIF has up to 8000 pixels per byte
Image.MAX_IMAGE_PIXELS = None  # PIL only warns at its limit; `check_pixels` enforces ours
warnings.filterwarnings("ignore", "Corrupt EXIF data|Truncated File Read", module="PIL.TiffImagePlugin")
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20  # workflows and profiles of many MB
ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
logger = logging.getLogger(__name__)


class Refused(str):
    """The reason why an image must not be read, used in place of its path."""


@dataclass(frozen=True)
class Header:
    """What is known about an image without decoding it.

    Attributes:
        width, height: in pixels, after applying the orientation in EXIF or XMP.
        oddities: names of its unusual properties.
    """

    width: int
    height: int
    oddities: tuple[str, ...]

    @property
    def how_read(self) -> bytes:
        """Part of the cache key that differs if earlier releases decoded other pixels; b"" for most images."""
        return how_read(self.oddities)


@cache
def read_formats() -> tuple[str, ...]:
    """Returns the formats that are opened: `READ_FORMATS` and those of installed packages, which it registers once."""
    Image.init()
    known = [name for name in READ_FORMATS if name in Image.OPEN]  # AVIF is new in Pillow 11.3
    return (*(name for name in OPTIONAL_FORMATS if _register(name)), *known)


def _register(name: str) -> bool:
    """Registers an optional format with PIL; returns whether its package is installed and loads."""
    module, package, _ = OPTIONAL_FORMATS[name]
    try:
        found = importlib.import_module(module)  # pillow_jxl registers itself
        if name == "HEIF":
            found.register_heif_opener(thumbnails=False)
    except ModuleNotFoundError:
        return False
    except (ImportError, OSError) as error:
        logger.warning("%s is installed but cannot be loaded: %s", package, first_line(error))
        return False
    return True


@cache
def image_suffixes() -> frozenset[str]:
    """Returns the extensions, in lower case, of files that are opened as images."""
    formats = {*read_formats(), "MPO"}  # which PIL opens as JPEG
    optional = [suffix for name in formats & OPTIONAL_FORMATS.keys() for suffix in OPTIONAL_FORMATS[name][2]]
    return frozenset(optional).union(end for end, name in Image.registered_extensions().items() if name in formats)


def unread_reason(suffix: str) -> str | None:
    """Returns why images or videos with this extension are not read; None for extensions that are read or unknown."""
    suffix = suffix.lower()
    if suffix in image_suffixes():
        return None
    optional = next((name for name, (_, _, suffixes) in OPTIONAL_FORMATS.items() if suffix in suffixes), None)
    kind = optional or _KIND_OF_SUFFIX.get(suffix)
    return kind and _not_read(kind)


def _not_read(kind: str) -> str:
    """Returns a message that a kind of image is not read, with the cure."""
    if kind in OPTIONAL_FORMATS:
        package = OPTIONAL_FORMATS[kind][1]
        return f"{kind} images need the package {package}: pip install {package}"
    if kind == "video":
        return "videos are not read; save frames as PNG or JPEG"
    return f"{kind} images are not read; convert them to PNG or JPEG"


@contextmanager
def open_image(source: str | bytes) -> Iterator[Image.Image]:
    """Context manager: an opened image, of which only the header has been read.

    `info["icc_profile"]` is its ICC profile, or one built from other colour metadata. Photos of over 89 megapixels are
    read at half size: JPEGs are halved here, other formats in `decode`.

    Args:
        source: path of a regular file, or the bytes of an image.

    Raises:
        OSError: if it is missing, empty, refused or not an image of `read_formats()`.
        ValueError: if it has too many pixels, in total or for its number of bytes.
    """
    with _opened(source) as file:
        yield _identify(file)


def image_bytes(source: str | bytes) -> bytes:
    """Returns all bytes of an image.

    Raises:
        OSError: as `open_image`, and if the file exceeds `MOST_BYTES`.
    """
    with _opened(source) as file:
        return file.read()


def _opened(source: str | bytes) -> BinaryIO:
    """Opens the regular file at a path, or bytes as a file.

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
    raise OSError(f"it has over {MOST_BYTES >> 20} MiB, the maximum" if num_bytes else "the file is empty")


def _identify(file: BinaryIO) -> Image.Image:
    """Returns the image of an open file, for `open_image`.

    Sets `info["turn"]`, the rotation to apply, and `info["upright"]`, the (width, height) after rotating and halving,
    for `read_header` and `decode`.
    """
    # refuse unsupported formats by their signature
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(HEAD_SIZE)
    kind = kind_of(head)
    if kind is not None and kind not in read_formats():
        raise OSError(_not_read(kind))
    if kind == "JXL":
        check_pixels(jxl_size(file), num_bytes)  # before opening, because the package decodes it then

    # read the header, the colour profile and the orientation
    try:
        image = Image.open(file, formats=read_formats())
        place = file.tell()
        profile = profile_in(image, file)
        turn = turn_of(image, file)
        file.seek(place)
        is_thumbnail = image.format == "TIFF" and is_raw(image)
        note_samples(image, head)
    except Image.UnidentifiedImageError as error:
        unread = unread_tiff(file) if head[:4] in TIFF_MAGICS else "not an image, or its format is not supported"
        raise OSError(unread) from error
    except BROKEN_FILE_ERRORS as error:  # such as the AVIF decoder's
        raise OSError(f"broken image: {error}") from error

    # refuse what PIL would decode wrongly or only in part
    check_pixels(image.size, num_bytes)
    if is_thumbnail:
        raise OSError(_not_read("camera raw"))
    if image.format == "DDS" and getattr(image, "pixel_format", "").startswith("BC6H"):
        raise OSError(_not_read("high dynamic range"))

    # very large images are read at half size
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
    """Returns (width, height) of an opened image after rotating and halving."""
    width, height = image.size[::-1] if turn.swaps else image.size
    return (-(-width // 2), -(-height // 2)) if is_halved(image) else (width, height)


def check_pixels(size: tuple[int, int], num_bytes: int) -> None:
    """Refuses an image whose decoded size is out of proportion to its file.

    Args:
        size: (width, height) in pixels.
        num_bytes: size of the file.

    Raises:
        ValueError: naming its size and the limit.
    """
    pixels = size[0] * size[1]
    if pixels > MOST_PIXELS:
        raise ValueError(f"{size[0]}x{size[1]} pixels are over the limit of {MOST_PIXELS} pixels")
    limit, most = (FULL_PIXELS, MOST_PIXELS_PER_BYTE) if pixels > FULL_PIXELS else (MANY_PIXELS, MOST_OF_MANY_PER_BYTE)
    if pixels > limit and num_bytes * most < pixels:
        raise ValueError(
            f"{size[0]}x{size[1]} pixels in {num_bytes} bytes look like a decompression bomb; images of over {limit} "
            f"pixels need at least one byte per {most} pixels"
        )


def is_halved(image: Image.Image) -> bool:
    """Returns whether an opened image is so large that it is read at half size."""
    return image.width * image.height > FULL_PIXELS


def reason_of(error: Exception) -> str:
    """Returns why an image can't be read."""
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def check_whole(content: str | bytes) -> None:
    """Raises `OSError` if the bytes of an image are cut off, judging by their end; does not decode them."""
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
    """Returns the upright size and the oddities of an image without decoding it.

    Raises:
        OSError, ValueError: as `open_image`.
    """
    try:
        with open_image(source) as image:
            return Header(*image.info["upright"], _oddities(image))
    except BROKEN_FILE_ERRORS as error:
        raise OSError(f"broken image: {error}") from error


def check_values(source: str | bytes, header: Header) -> Header:
    """Returns the header with oddities found in the pixel values; decodes only images of an uncommon bit depth.

    Raises:
        OSError, ValueError: as `read_layers`, also if no value can be identified as white.
    """
    if UNCOMMON not in header.oddities:
        return header
    image = decode(source)
    eight_bits(image)
    return replace(header, oddities=(*header.oddities, *image.info.get("guessed", ())))


def _oddities(image: Image.Image) -> tuple[str, ...]:
    """Returns the names of the unusual properties of an opened image."""
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
    """Decodes the first frame of an image and rotates it as EXIF or XMP says; colours are not converted.

    Args:
        source: path or bytes.
        prepare: modifies the opened image before it is decoded.

    Raises:
        OSError, ValueError: as `open_image`, and if it is truncated or broken.
    """
    with open_image(source) as image:
        if prepare is not None:
            prepare(image)
        known = dict(image.info)
        try:
            image.load()
            image.info = known  # discard metadata after the pixels of a PNG, which the header lacks
            upright = _halved(image) if is_halved(image) else image
            if known["turn"].left is not None:
                upright = upright.transpose(known["turn"].left)
        except BROKEN_FILE_ERRORS as error:
            raise OSError(f"broken image: {error}") from error
    if not _is_size(upright.size, known["upright"]):
        raise OSError(
            "broken image: its size is {}x{}, but its header says {}x{}".format(*upright.size, *known["upright"])
        )
    if "clear" in known and upright.mode == "RGB" and prepare is None:
        upright.putalpha(clear_colour(upright, decode(source, take_other_half), known["clear"]))
    return upright


def _is_size(size: tuple[int, int], said: tuple[int, int]) -> bool:
    """Returns whether an image has the size in its header, up to one block of the codec per edge.

    Plug-ins, such as that for HEIF, know the exact size only after decoding. Swapped width and height never match.

    Args:
        size: (width, height) after decoding.
        said: (width, height) in the header.
    """
    is_turned = size == said[::-1] != said
    return not is_turned and all(
        abs(one - other) <= min(BLOCK, other // 8) for one, other in zip(size, said, strict=True)
    )


def _halved(image: Image.Image) -> Image.Image:
    """Returns a decoded image at half size, each pixel the mean of four."""
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode == "1" or image.mode.startswith("I;"):
        image = image.convert("L" if image.mode == "1" else "I")
    return image.reduce(2)


def read_rgb(source: str | bytes, transparency_color: str = "white") -> Image.Image:
    """Decodes the first frame of an image into RGB, upright and in sRGB.

    Transparent images are laid on a background colour. 16-bit grey is scaled to 8 bits, whereas PIL would clip it.

    Raises:
        OSError, ValueError: as `decode`.
    """
    return read_layers(source, transparency_color)[0]


def read_mask(source: str | bytes) -> Image.Image:
    """Decodes a mask into mode L, without colour conversion; transparent pixels are black.

    Raises:
        OSError, ValueError: as `decode`.
    """
    return read_mask_layers(source)[0].convert("L")


def read_mask_layers(source: str | bytes) -> tuple[Image.Image, Image.Image | None, tuple[float, float] | None]:
    """Decodes a mask without colour conversion.

    Returns:
        (values in mode RGB; alpha channel or None; for masks of more than 8 bits the minimum and maximum from 0 to 255
        before rounding, else None).

    Raises:
        OSError, ValueError: as `decode`.
    """
    image = decode(source)
    image.info.pop("icc_profile", None)
    grey = deep_grey(image)
    extremes = None if grey is None else (float(grey.min()), float(grey.max()))
    return *_layers(image, "black"), extremes


def read_layers(source: str | bytes, transparency_color: str) -> tuple[Image.Image, Image.Image | None]:
    """Decodes an image; returns (the result of `read_rgb`, the alpha channel in mode L or None if it is opaque).

    Raises:
        OSError, ValueError: as `decode`.
    """
    return _layers(decode(source), transparency_color)


def _layers(image: Image.Image, transparency_color: str) -> tuple[Image.Image, Image.Image | None]:
    """Does the same as `read_layers` for a decoded image."""
    image = eight_bits(image)
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        return _flattened(image, transparency_color)
    return image if image.mode == "RGB" else image.convert("RGB"), None


def eight_bits(image: Image.Image) -> Image.Image:
    """Converts a decoded image to 8-bit sRGB, as `to_srgb`; grey of more than 8 bits becomes RGB or RGBA.

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
    """Returns (a transparent image laid on a colour, its alpha channel).

    Works strip by strip, because copies of the whole image could take gigabytes.
    """
    rgb, alpha = Image.new("RGB", image.size), Image.new("L", image.size)
    for rows in strips(image.size[::-1]):
        strip = image.crop((0, rows.start, image.width, min(rows.stop, image.height))).convert("RGBA")
        ground = Image.new("RGBA", strip.size, color)
        rgb.paste(Image.alpha_composite(ground, strip), (0, rows.start))
        alpha.paste(strip.getchannel("A"), (0, rows.start))
    return rgb, alpha
