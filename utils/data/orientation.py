"""Reads an image's orientation from EXIF, or else from XMP, wherever in the file they are."""

import contextlib
import re
import struct
import zlib
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

from PIL import Image, PngImagePlugin

from utils.data.file_signatures import late_png_chunks

TAG = 0x0112
TURNS = {  # by orientations
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED_ON_ITS_SIDE = (5, 6, 7, 8)
XMP_KEYS = ("XML:com.adobe.xmp", "xmp")  # PIL's
RAW_EXIF, RAW_BOTH, RAW_XMP = (f"Raw profile type {kind}" for kind in ("exif", "APP1", "xmp"))  # ImageMagick's, in PNG
LATE_KEYS = (XMP_KEYS[0], RAW_EXIF, RAW_BOTH, RAW_XMP)
LONGEST_KEY = 80  # of a PNG's text
XMP_MARK = b"http://ns.adobe.com/xap/1.0/\0"
IN_XMP = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([0-9]+)""")
IN_XMP_BEFORE = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')  # PIL's own pattern
DAMAGED = (SyntaxError, ValueError, LookupError, TypeError, EOFError, OSError, struct.error, zlib.error)
"""Errors raised for damaged metadata, which is then ignored."""


class Turn(NamedTuple):
    """How to turn an image upright.

    Attributes:
        orientation: the EXIF orientation, from 1 (upright) to 8.
        is_by_pil: whether PIL turns the image when it decodes it, and reports the size after turning.
        is_new: whether earlier releases, which looked in fewer places for the orientation, turned it differently.
    """

    orientation: int = 1
    is_by_pil: bool = False
    is_new: bool = False

    @property
    def left(self) -> Image.Transpose | None:
        """The turn to apply to the pixels that PIL decodes; None if there is none."""
        return None if self.is_by_pil else TURNS.get(self.orientation)

    @property
    def swaps(self) -> bool:
        """Whether the width and height that PIL reports must be swapped."""
        return self.orientation in TURNED_ON_ITS_SIDE and not self.is_by_pil


def turn_of(image: Image.Image, file: BinaryIO) -> Turn:
    """Returns how to turn an opened image upright; PIL itself only obeys a TIFF's own tag.

    EXIF (in a PNG also as ImageMagick's raw profile) takes precedence over XMP, and metadata before a PNG's pixels over
    metadata after them.

    Args:
        image: opened and not decoded yet; its XMP is removed from `image.info`.
        file: the file it was opened from.
    """
    # collect the metadata from all places
    xmp = [_as_bytes(image.info.pop(key, None)) for key in XMP_KEYS]  # removed, so that PIL turns no TIFF by it
    late: dict[str, str | bytes] = {}
    if image.format == "PNG":
        late = _late_metadata(file)
        if "exif" not in image.info and "exif" in late:
            image.info["exif"] = late["exif"]
    exif = _orientation_by_pil(image)
    raw = [_raw_profile(places.get(key)) for places in (image.info, late) for key in (RAW_EXIF, RAW_BOTH, RAW_XMP)]
    later_xmp = [
        *(_as_bytes(late.get(key)) for key in XMP_KEYS),
        *(each.removeprefix(XMP_MARK) for each in raw if _is_xmp(each)),
    ]

    # apply today's rule, and that of earlier releases, which looked in fewer places
    places = [exif, *(_orientation_in_exif(each) for each in raw if not _is_xmp(each))]
    places += [_orientation_in_xmp(each, IN_XMP) for each in (*xmp, *later_xmp)]
    places_before = [exif, *(_orientation_in_xmp(each, IN_XMP_BEFORE) for each in xmp if image.format != "TIFF")]
    found, before = _first_of(places), _first_of(places_before)
    return Turn(found, image.format == "TIFF" and exif is not None, found != before)


def _first_of(orientations: Iterable[int | None]) -> int:
    """Returns the first orientation that is not None if it means a turn, else 1."""
    found = next((each for each in orientations if each is not None), 1)
    return found if found in TURNS else 1


def _orientation_by_pil(image: Image.Image) -> int | None:
    """Returns the orientation in an opened image's EXIF, or in a TIFF's tags."""
    with contextlib.suppress(*DAMAGED):
        return Image.Image.getexif(image).get(TAG)  # the method of PNG images would decode the image
    return None


def _orientation_in_exif(content: bytes) -> int | None:
    exif = Image.Exif()
    with contextlib.suppress(*DAMAGED):
        exif.load(content)
        return exif.get(TAG)
    return None


def _orientation_in_xmp(content: bytes, pattern: re.Pattern[bytes]) -> int | None:
    found = pattern.search(content)
    return None if found is None else int(found[1][:2])


def _as_bytes(text: object) -> bytes:
    return text.encode() if isinstance(text, str) else text if isinstance(text, bytes) else b""


def _is_xmp(profile: bytes) -> bool:
    return profile.startswith((XMP_MARK, b"<"))


def _raw_profile(text: object) -> bytes:
    """Returns the bytes of ImageMagick's raw profile: lines with its kind and length, then hexadecimal digits."""
    with contextlib.suppress(ValueError):
        return bytes.fromhex("".join(text.split("\n")[3:])) if isinstance(text, str) else b""
    return b""


def _late_metadata(file: BinaryIO) -> dict[str, str | bytes]:
    """Reads the EXIF and XMP after a PNG's pixels, under PIL's names, as PIL reads what comes before them."""
    stream = PngImagePlugin.PngStream(file)
    with contextlib.suppress(*DAMAGED):
        for name, begin, size in late_png_chunks(file):
            file.seek(begin)
            is_text = name in (b"tEXt", b"zTXt", b"iTXt")
            key = file.read(min(size, LONGEST_KEY)).partition(b"\0")[0].decode("latin-1") if is_text else ""
            if name == b"eXIf" or key in LATE_KEYS:
                file.seek(begin)
                stream.call(name, begin, size)
    return stream.im_info
