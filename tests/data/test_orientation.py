"""Turned images: EXIF, XMP and what other programs write of them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.pictures import encoded, picture, with_chunk
from utils.data import images
from utils.data.images import MANY_PIXELS, decode, read_header, read_rgb
from utils.data.oddities import TURNED_ANEW
from utils.data.orientation import TURNS


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_turned_tiff_is_read_from_its_path_as_from_its_bytes(mode, orientation, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x112] = orientation
    path = tmp_path / "turned.tiff"
    Image.fromarray(pixels).convert(mode).save(path, exif=exif)
    by_path, by_bytes = read_rgb(str(path)), read_rgb(path.read_bytes())
    assert by_path.size == ((9, 14) if orientation > 4 else (14, 9))
    assert np.array_equal(np.asarray(by_path), np.asarray(by_bytes))


def exif_of(orientation: int, order: str = ">") -> bytes:
    """The EXIF of an orientation alone."""
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return magic + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'
XMP_ELEMENT = "<x:xmpmeta><rdf:Description><tiff:Orientation>{}</tiff:Orientation></rdf:Description></x:xmpmeta>"
XMP_SHORT = "<x:xmpmeta><rdf:Description tiff:Make='x' tiff:Orientation = '{}'/></x:xmpmeta>"  # as exiftool writes it


def raw_profile(kind: str, content: bytes) -> bytes:
    """A PNG's text in which ImageMagick keeps metadata."""
    digits = "\n".join(content.hex()[place : place + 72] for place in range(0, 2 * len(content), 72))
    text = f"\n{kind}\n{len(content):8}\n{digits}\n"
    return f"Raw profile type {kind}".encode() + b"\0\0" + zlib.compress(text.encode())


def metadata(kind: str, orientation: int) -> tuple[bytes, bytes]:
    """A PNG's chunk that says an orientation."""
    exif, xmp = b"Exif\0\0" + exif_of(orientation), XMP_ELEMENT.format(orientation).encode()
    key = b"XML:com.adobe.xmp\0"
    return {
        "eXIf": (b"eXIf", exif_of(orientation)),
        "raw EXIF": (b"zTXt", raw_profile("exif", exif)),
        "raw APP1": (b"zTXt", raw_profile("APP1", exif)),
        "raw XMP": (b"zTXt", raw_profile("xmp", xmp)),
        "raw XMP in APP1": (b"zTXt", raw_profile("APP1", b"http://ns.adobe.com/xap/1.0/\0" + xmp)),
        "XMP": (b"iTXt", key + b"\0\0\0\0" + XMP.format(orientation).encode()),
        "XMP, short": (b"iTXt", key + b"\0\0\0\0" + XMP_SHORT.format(orientation).encode()),
        "XMP, compressed": (b"iTXt", key + b"\1\0\0\0" + zlib.compress(xmp)),
    }[kind]


def turned(kind: str, orientation: int) -> bytes | None:
    """A picture of 24 x 16 that its file says to turn."""
    image, exif = picture(24, 16), Image.Exif()
    exif[0x0112] = orientation
    if kind == "PNG, early":
        return with_chunk(encoded(image), b"eXIf", exif_of(orientation))
    if kind in ("PNG, late", "PNG, late, in small parts", "PNG, late, before much"):
        file = io.BytesIO()
        image.save(file, "PNG")
        content, end = file.getvalue()[:-12], file.getvalue()[-12:]
        begin = content.index(b"IDAT") - 4
        size = int.from_bytes(content[begin : begin + 4], "big")
        pixels, parts = content[begin + 8 : begin + 8 + size], content[:begin]
        step = 7 if "small" in kind else len(pixels)
        chunks = [(b"IDAT", pixels[place : place + step]) for place in range(0, len(pixels), step)]
        chunks += [(b"tEXt", b"Comment\0IDAT eXIf"), (b"eXIf", exif_of(orientation, "<"))]
        chunks += [(b"tEXt", b"Comment\0" + b"IDAT" * 9000)] if "much" in kind else []
        for name, part in chunks:
            parts += struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        return parts + end
    if kind == "PNG, XMP":
        return with_chunk(encoded(image), b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.format(orientation).encode())
    if kind == "JPEG, XMP":
        return encoded(image, "JPEG", xmp=XMP.format(orientation).encode())
    if kind == "TIFF, XMP":
        return encoded(image, "TIFF", tiffinfo={700: XMP.format(orientation).encode()})
    if kind == "TIFF, compressed":
        return encoded(image, "TIFF", exif=exif, compression="tiff_lzw")
    options = {"exif": exif.tobytes() if kind == "AVIF" else exif}
    if kind == "WEBP":
        options["lossless"] = True
    return encoded(image, kind, **options)


TURNED = (
    *("PNG, early", "PNG, late", "PNG, late, in small parts", "PNG, late, before much", "PNG, XMP", "PNG"),
    *("JPEG", "JPEG, XMP", "MPO", "TIFF", "TIFF, compressed", "TIFF, XMP", "WEBP", "AVIF"),
)


class TestTurns:
    @pytest.mark.parametrize("orientation", [0, *range(1, 10)])
    @pytest.mark.parametrize("kind", TURNED)
    @pytest.mark.parametrize("is_large", [False, True])
    def test_the_header_has_the_size_of_the_pixels(self, monkeypatch, kind, orientation, is_large):
        if kind == "TIFF, compressed" and orientation in (0, 9):
            pytest.skip("libtiff writes none of these")
        content = turned(kind, orientation)
        if is_large:
            monkeypatch.setattr("utils.data.images.FULL_PIXELS", 300)
            monkeypatch.setattr("utils.data.images.MOST_PIXELS_PER_BYTE", MANY_PIXELS)
        header, found = read_header(content), decode(content)
        assert (header.width, header.height) == found.size
        turn = TURNS.get(orientation)
        assert ("turned by EXIF" in header.oddities) == (turn is not None)
        if is_large:
            return
        expected = picture(24, 16) if turn is None else picture(24, 16).transpose(turn)
        difference = np.abs(np.asarray(found.convert("RGB")).astype(int) - np.asarray(expected))
        assert difference.mean() < (14 if kind[:4] in ("JPEG", "MPO", "AVIF") else 0.01)

    @pytest.mark.parametrize("is_late", [False, True])
    @pytest.mark.parametrize(
        "kind",
        ["eXIf", "raw EXIF", "raw APP1", "raw XMP", "raw XMP in APP1", "XMP", "XMP, short", "XMP, compressed"],
    )
    def test_a_png_is_turned_wherever_that_is_said(self, kind, is_late):
        """Before its pixels and behind them, where exiftool puts it."""
        content = encoded(picture(24, 16))
        place = content.index(b"IEND" if is_late else b"IDAT") - 4
        said = with_chunk(content, *metadata(kind, 6))
        chunk = said[33 : len(said) - len(content) + 33]  # which stands behind the head
        whole = content[:place] + chunk + content[place:]
        header = read_header(whole)
        assert (header.width, header.height) == decode(whole).size == (16, 24)
        known_before = kind == "eXIf" or (kind in ("raw EXIF", "XMP", "XMP, compressed") and not is_late)
        assert (TURNED_ANEW in header.oddities) != known_before

    @pytest.mark.parametrize(
        ("early", "late", "size"),
        [
            *[(("XMP", 6), ("eXIf", 1), (24, 16)), (("XMP", 1), ("raw APP1", 8), (16, 24))],
            *[(("XMP", 6), ("XMP", 1), (16, 24)), (("eXIf", 1), ("eXIf", 6), (24, 16))],
        ],
    )
    def test_exif_comes_before_xmp_and_early_before_late(self, early, late, size):
        content = with_chunk(encoded(picture(24, 16)), *metadata(*early))
        said = with_chunk(encoded(picture(24, 16)), *metadata(*late))
        chunk = said[33 : len(said) - len(encoded(picture(24, 16))) + 33]
        content = content[:-12] + chunk + content[-12:]
        header = read_header(content)
        assert (header.width, header.height) == decode(content).size == size

    @pytest.mark.parametrize("damaged", [(b"eXIf", b"none"), (b"tEXt", b"Raw profile type exif\0\nexif\n9\nxyz")])
    def test_damaged_metadata_says_nothing(self, damaged):
        content = with_chunk(encoded(picture(24, 16)), *damaged)
        assert decode(content).size == (24, 16)
        assert "turned by EXIF" not in read_header(content).oddities

    def test_a_tiff_is_turned_once(self):
        """By its own tag, whatever its XMP says."""
        content = encoded(picture(24, 16), "TIFF", tiffinfo={0x0112: 6, 700: XMP.format(8).encode()})
        assert np.array_equal(decode(content), picture(24, 16).transpose(TURNS[6]))

    def test_damaged_ends_of_a_png_say_nothing(self):
        content = turned("PNG, late", 6)
        for end in range(len(content) - 60, len(content)):
            try:
                header = read_header(content[:end])
            except (OSError, ValueError):
                continue
            assert (header.width, header.height) in ((24, 16), (16, 24))

    @pytest.mark.parametrize(
        ("said", "size", "is_read"),
        [
            *[((640, 480), (640, 479), True), ((641, 481), (640, 480), True), ((24, 16), (24, 15), True)],
            *[((640, 480), (480, 640), False), ((102, 100), (100, 102), False), ((100, 99), (99, 100), False)],
            *[((640, 480), (320, 240), False), ((24, 16), (8, 24), False), ((640, 480), (640, 400), False)],
        ],
    )
    def test_an_edge_that_the_decoder_has_cut_off_is_no_other_size(self, monkeypatch, said, size, is_read):
        """As plug-ins correct it when they decode; a turn is never taken for that."""
        content = encoded(picture(*size))
        original = images._upright_size
        monkeypatch.setattr(images, "_upright_size", lambda image, turn: original(image, turn) and said)
        if is_read:
            assert decode(content).size == size
        else:
            with pytest.raises(OSError, match="its header says"):
                decode(content)

    def test_pixels_of_another_size_than_the_header_says_are_refused(self, monkeypatch):
        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_end", lambda image: setattr(image, "_size", (8, 24)))
        with pytest.raises(OSError, match=r"its size is .*, but its header says"):
            decode(encoded(picture(24, 16)))
