"""Reads from image files what PIL does not report: unsupported formats, colour profiles, the size of a JPEG XL."""

import os
import re
import struct
from typing import BinaryIO

from PIL import Image

from utils.data.colours import ADOBE_RGB, LAB, profile_of_code_points, profile_of_gamma

HEAD_SIZE = 4096
TAIL_SIZE = 1 << 14
BOXES_SIZE = 1 << 20  # bytes of an AVIF, HEIF or JPEG 2000 that are searched for a colour box
INTEROPERABILITY = 0xA005  # EXIF tag
SIGNATURES = {  # regular expressions for the start of a file, by kind
    "EPS": rb"\s*%!|\xc5\xd0\xd3\xc6",
    "PDF": rb"\s*%PDF",
    "WMF": rb"\xd7\xcd\xc6\x9a|\x01\x00\x00\x00.{36} EMF",
    "Photoshop": rb"8BPS",
    "scientific": rb"SIMPLE  =|\x89HDF\r\n|GRIB|BUFR|.{128}DICM",
    "camera raw": (
        rb"FUJIFILMCCD-RAW|IIRO|IIRS|MMOR|IIU\x00|FOVb|\x00MRM|II\x1a\x00\x00\x00HEAP|II\*\x00.{4}CR|.{4}ftypcrx"
    ),
    "high dynamic range": rb"\x76\x2f\x31\x01|#\?(RADIANCE|RGBE)",
    "layered": rb"gimp xcf",
    "icon": rb"\x00\x00[\x01\x02]\x00[^\x00]\x00|icns",
    "DjVu": rb"AT&TFORM",
    "JPEG XR": rb"II\xbc[\x00\x01]|BPG\xfb|FLIF",
    "JXL": rb"\xff\x0a|\x00\x00\x00\x0cJXL \r\n\x87\n",
    "video": (
        rb"\x1aE\xdf\xa3|RIFF.{4}AVI |\x00\x00\x01[\xba\xb3]|OggS|FLV\x01|\x30\x26\xb2\x75\x8e\x66\xcf\x11|"
        rb".{4}(moov|mdat|wide)"
    ),
}
_PATTERNS = {kind: re.compile(pattern, re.DOTALL) for kind, pattern in SIGNATURES.items()}
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
AVIF_BRANDS = {b"avif", b"avis"}
JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def kind_of(head: bytes) -> str | None:
    """Returns the kind of an image or video that PIL does not read, or not safely, from its first bytes; else None."""
    if head[4:8] == b"ftyp":
        brands = {head[begin : begin + 4] for begin in range(8, min(int.from_bytes(head[:4], "big"), len(head)), 4)}
        if brands & AVIF_BRANDS:
            return None
        if brands & HEIF_BRANDS:
            return "HEIF"
    found = next((kind for kind, pattern in _PATTERNS.items() if pattern.match(head)), None)
    if found is None and head[4:8] == b"ftyp":
        return "video"
    if found is None and head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<") and b"<svg" in head.lower():
        return "SVG"
    return found


def is_raw(tiff: Image.Image) -> bool:
    """Returns whether an opened TIFF is a camera raw file, of which PIL would read only the thumbnail."""
    is_dng, is_reduced, has_others = 50706 in tiff.tag_v2, tiff.tag_v2.get(254) == 1, 330 in tiff.tag_v2
    return is_dng or (is_reduced and has_others)


def profile_in(image: Image.Image, file: BinaryIO) -> bytes | None:
    """Returns the ICC profile of an opened image, or one built from other colour metadata; None for sRGB.

    Other metadata are cICP, sRGB, gAMA and cHRM in PNG, code points in AVIF and HEIF, the colour box of JPEG 2000, and
    the Adobe RGB flag in EXIF.
    """
    if image.mode == "LAB":  # a TIFF
        return LAB
    profile = image.info.get("icc_profile")
    if profile:
        return profile
    if image.format == "PNG":
        named = _png_chunk(file, b"cICP")
        if len(named) == 4:
            return profile_of_code_points(named[0], named[1])
        if "srgb" in image.info:
            return None
        return profile_of_gamma(image.info.get("chromaticity"), image.info.get("gamma"))
    if image.format in ("AVIF", "HEIF", "JPEG2000"):
        return _profile_in_boxes(file)
    if image.format in ("JPEG", "MPO") and "exif" in image.info:
        return ADOBE_RGB if _is_marked_adobe_rgb(image) else None
    return None


def _is_marked_adobe_rgb(image: Image.Image) -> bool:
    """Returns whether EXIF marks an image as Adobe RGB, as cameras do instead of embedding a profile."""
    try:
        index = image.getexif().get_ifd(INTEROPERABILITY).get(1)
    except (SyntaxError, ValueError, LookupError, TypeError, OSError, struct.error):  # ignore damaged EXIF
        return False
    return "R03" in str(index)


def _png_chunk(file: BinaryIO, name: bytes) -> bytes:
    """Returns the content of a chunk before the pixels of a PNG; b"" if there is none."""
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
        size = int.from_bytes(head[:4], "big")
        if head[4:] == name:
            return file.read(min(size, HEAD_SIZE))
        file.seek(size + 4, os.SEEK_CUR)
    return b""


def late_png_chunks(file: BinaryIO) -> list[tuple[bytes, int, int]]:
    """Returns (name, offset of its content, length) of each chunk after a PNG's pixels, where exiftool adds them."""
    begin = max(8, file.seek(0, os.SEEK_END) - TAIL_SIZE)
    file.seek(begin)
    last = file.read(TAIL_SIZE).rfind(b"IDAT")  # libpng writes pixels in parts of 8 KiB
    if last >= 4:
        found, is_whole = _chunks_from(file, begin + last - 4)
        if is_whole:
            return found
    return _chunks_from(file, 8)[0]


def _chunks_from(file: BinaryIO, begin: int) -> tuple[list[tuple[bytes, int, int]], bool]:
    """Returns (chunks after the pixels of a PNG, as `late_png_chunks`; whether the end of the PNG was reached).

    Args:
        begin: offset of the first chunk to read.
    """
    end = file.seek(0, os.SEEK_END)
    found, is_behind = [], False
    file.seek(begin)
    while len(head := file.read(8)) == 8 and head[4:].isalpha():
        name, size, place = head[4:], int.from_bytes(head[:4], "big"), file.tell()
        if name == b"IEND":
            return found, True
        if name == b"IDAT":
            is_behind = True
        elif is_behind and place + size <= end:
            found.append((name, place, size))
        file.seek(size + 4, os.SEEK_CUR)
    return found, False


def _profile_in_boxes(file: BinaryIO) -> bytes | None:
    """Returns the profile from the colour box of an AVIF, HEIF or JPEG 2000; None for sRGB."""
    file.seek(0)
    content = file.read(BOXES_SIZE)
    for found in re.finditer(rb"colr(?=nclx|\x02)", content):
        size = int.from_bytes(content[max(0, found.start() - 4) : found.start()], "big")
        box = content[found.end() : found.start() - 4 + size]
        if box[:1] == b"\x02":
            return box[3:]
        if len(box) >= 8:
            return profile_of_code_points(int.from_bytes(box[4:6], "big"), int.from_bytes(box[6:8], "big"))
    return None


def jxl_size(file: BinaryIO) -> tuple[int, int]:
    """Returns (width, height) of a JPEG XL in pixels.

    Raises:
        OSError: if the file is damaged.
    """
    begin = _jxl_codestream(file)
    file.seek(begin)
    content = file.read(16)
    if not content.startswith(b"\xff\x0a"):
        raise OSError("broken image: no codestream")
    bits = _Bits(int.from_bytes(content[2:], "little"))
    is_small = bits.take(1)
    height = _jxl_length(bits, is_small)
    ratio = bits.take(3)
    if ratio:
        over, under = JXL_RATIOS[ratio - 1]
        return height * over // under, height
    return _jxl_length(bits, is_small), height


class _Bits:
    """Reads bits of an integer, the lowest first."""

    def __init__(self, value: int):
        self._value = value

    def take(self, count: int) -> int:
        """Returns the next `count` bits as an integer."""
        found = self._value & ((1 << count) - 1)
        self._value >>= count
        return found


def _jxl_length(bits: _Bits, is_small: int) -> int:
    """Reads the width or height in pixels."""
    if is_small:
        return 8 * (bits.take(5) + 1)
    return bits.take((9, 13, 18, 30)[bits.take(2)]) + 1


def _jxl_codestream(file: BinaryIO) -> int:
    """Returns the offset of the codestream: the start of the file, or of the content of a box."""
    file.seek(0)
    if file.read(2) == b"\xff\x0a":
        return 0
    begin = 0
    while True:
        file.seek(begin)
        head = file.read(16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        length = 16 if size == 1 else 8
        if kind in (b"jxlc", b"jxlp"):
            return begin + length + (4 if kind == b"jxlp" else 0)
        size = int.from_bytes(head[8:16], "big") if size == 1 else size
        if len(head) < 16 or size < length:
            raise OSError("broken image: no codestream")
        begin += size
