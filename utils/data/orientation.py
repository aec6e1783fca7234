"""How an image has to be turned, by what its file says: by EXIF, or else by XMP, wherever in the file these stand."""

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
"""What reading damaged metadata ends in; it then says nothing of the image."""


class Turn(NamedTuple):
    """How an image has to be turned.

    Attributes:
        orientation: as of EXIF, from 1, which is upright, to 8.
        is_by_pil: whether PIL turns it when it decodes, and says its size as if it had.
        is_new: whether earlier releases, which knew fewer places of it, turned it otherwise.
    """

    orientation: int = 1
    is_by_pil: bool = False
    is_new: bool = False

    @property
    def left(self) -> Image.Transpose | None:
        """What is to be done to the pixels that PIL decodes."""
        return None if self.is_by_pil else TURNS.get(self.orientation)

    @property
    def swaps(self) -> bool:
        """Whether width and height that PIL says change places."""
        return self.orientation in TURNED_ON_ITS_SIDE and not self.is_by_pil


def turn_of(image: Image.Image, file: BinaryIO) -> Turn:
    """How an opened image has to be turned, of which PIL does no more than to obey a TIFF's own tag.

    EXIF (in a PNG also as ImageMagick's raw profile) comes before XMP, and what stands before a PNG's pixels before
    what stands behind them.
    """
    xmp = [_as_bytes(image.info.pop(key, None)) for key in XMP_KEYS]  # without which PIL turns no TIFF by it
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

    # the rule, and that of earlier releases, which looked at fewer places
    places = [exif, *(_orientation_in_exif(each) for each in raw if not _is_xmp(each))]
    places += [_orientation_in_xmp(each, IN_XMP) for each in (*xmp, *later_xmp)]
    places_before = [exif, *(_orientation_in_xmp(each, IN_XMP_BEFORE) for each in xmp if image.format != "TIFF")]
    found, before = _first_of(places), _first_of(places_before)
    return Turn(found, image.format == "TIFF" and exif is not None, found != before)


def _first_of(orientations: Iterable[int | None]) -> int:
    """The first that is there, if it is one to turn by; else 1."""
    found = next((each for each in orientations if each is not None), 1)
    return found if found in TURNS else 1


def _orientation_by_pil(image: Image.Image) -> int | None:
    """The orientation in an opened image's EXIF, or in a TIFF's tags."""
    with contextlib.suppress(*DAMAGED):
        return Image.Image.getexif(image).get(TAG)  # a PNG's own would decode it
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
    """The bytes of ImageMagick's raw profile: lines of its kind and its length, then hexadecimal digits."""
    with contextlib.suppress(ValueError):
        return bytes.fromhex("".join(text.split("\n")[3:])) if isinstance(text, str) else b""
    return b""


def _late_metadata(file: BinaryIO) -> dict[str, str | bytes]:
    """What stands of EXIF and XMP behind a PNG's pixels, by PIL's names, read as PIL reads what stands before them."""
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
