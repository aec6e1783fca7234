"""Opening images: which formats and files, how much of them, and in which colours."""

import io
import os
import struct
import sys
import warnings
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from utils.config.options import UserError
from utils.data import colours, images
from utils.data.captions import CaptionOptions
from utils.data.file_signatures import jxl_size
from utils.data.images import (
    image_bytes,
    image_suffixes,
    read_formats,
    read_header,
    read_mask,
    read_rgb,
    reason_of,
    unread_reason,
)
from utils.data.oddities import CONVERTED
from utils.data.options import BucketOptions, ImageOptions, PixelOptions
from utils.data.pixels import read_deep
from utils.data.source_options import DataOptions, SourceOptions
from utils.data.sources import read_records
from utils.data.tables import data_folders, image_of

JXL_BOXES = "0000000c4a584c200d0a870a00000014667479706a786c20000000006a786c20000000696a786c63"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
ADOBE_TO_XYZ = np.array(
    [[0.576731, 0.185554, 0.188185], [0.297377, 0.627349, 0.075274], [0.027034, 0.070687, 0.991109]]
)
P3_TO_XYZ = np.array([[0.486571, 0.265668, 0.198217], [0.228975, 0.691739, 0.079287], [0.0, 0.045113, 1.043944]])
SRGB_TO_XYZ = np.array([[0.412456, 0.357576, 0.180438], [0.212673, 0.715152, 0.072175], [0.019334, 0.119192, 0.950304]])
"""Of linear colours, at D65: as published."""
KINDS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "DIB",
    "TIFF",
    "AVIF",
    "JPEG2000",
    "PPM",
    "TGA",
    "QOI",
    "DDS",
    "SGI",
    "PCX",
)
D50 = struct.pack(">3i", 63190, 65536, 54061)
WHITE = b"XYZ " + bytes(4) + D50
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


def in_adobe_rgb(values: np.ndarray) -> np.ndarray:
    """sRGB from 0 to 255 as Adobe RGB, by published matrices."""
    linear = light(values) @ (np.linalg.inv(ADOBE_TO_XYZ) @ SRGB_TO_XYZ).T
    return 255 * linear.clip(0, 1) ** (256 / 563)


def in_display_p3(values: np.ndarray) -> np.ndarray:
    """sRGB from 0 to 255 as Display P3, by published matrices."""
    return from_light((light(values) @ (np.linalg.inv(P3_TO_XYZ) @ SRGB_TO_XYZ).T).clip(0, 1))


def as_image(values: np.ndarray) -> Image.Image:
    """An image of 8 bits."""
    return Image.fromarray(np.rint(values).astype(np.uint8))


def profile_of(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """An ICC profile, version 2."""
    begin, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, begin + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">III", begin + len(body), 0, 0x02400000) + kind + space + pcs + bytes(12) + b"acsp" + bytes(28)
    return (head + D50).ljust(128, b"\0") + table + body


def grey_profile(gamma: float) -> bytes:
    """A grey profile of a power curve."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    return profile_of(b"GRAY", {b"wtpt": WHITE, b"kTRC": curve})


def cmyk_profile(lab_of_corner) -> bytes:
    """A CMYK profile whose 16 corners, all or nothing of each ink, have the L, a and b of a function."""
    ramp = bytes(range(256))
    corners = b""
    for number in range(16):
        lightness, a, b = lab_of_corner([number >> bit & 1 for bit in (3, 2, 1, 0)])
        corners += bytes([round(lightness * 2.55), a + 128, b + 128])
    matrix = struct.pack(">9i", *np.eye(3, dtype=int).ravel() * 65536)
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + 4 * ramp + corners + 3 * ramp
    return profile_of(b"CMYK", {b"wtpt": WHITE, b"A2B0": table, b"A2B1": table}, b"Lab ", b"prtr")


def png_of_16_bits(values: np.ndarray, profile: bytes) -> bytes:
    """A PNG of 16-bit colours [H, W, 3 or 4], which PIL can't write."""
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2 if values.shape[2] == 3 else 6, 0, 0, 0)
    parts = {b"IHDR": head, b"iCCP": b"x\0\0" + zlib.compress(profile), b"IDAT": zlib.compress(lines), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts.items()
    )


def with_chunk(png: bytes, name: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return png[:33] + chunk + png[33:]


class TestFormats:
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (EPS, "EPS images are not read; convert it to PNG"),
            (b"\xc5\xd0\xd3\xc6" + bytes(60), "EPS images are not read"),
            (b"\n%!PS\n", "EPS images are not read"),
            (b"8BPS\x00\x01" + bytes(60), "Photoshop images are not read"),
            (b"SIMPLE  =                    T" + bytes(3000), "scientific images are not read"),
            (b"\x89HDF\r\n\x1a\n" + bytes(60), "scientific images are not read"),
            (b"\xd7\xcd\xc6\x9a" + bytes(60), "WMF images are not read"),
            (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- x -->\n<svg xmlns="x"/>', "SVG images are not read"),
            (b"\x00\x00\x00\x20ftypisom" + bytes(60), "videos are not read; save frames"),
            (b"\x1aE\xdf\xa3" + bytes(60), "videos are not read"),
            (b"\x76\x2f\x31\x01" + bytes(60), "high dynamic range images are not read"),
            (b"II*\x00\x10\x00\x00\x00CR\x02\x00" + bytes(60), "camera raw images are not read"),
            (b"<html><body>404</body></html>", "not an image"),
            (b"Image type: Greyscale image\r\n" + bytes(600), "not an image"),
            (bytes(600), "not an image"),
            (b"", "the file is empty"),
        ],
    )
    @pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.eps", None])
    def test_bytes_decide_and_other_formats_say_what_they_are(self, tmp_path, name, content, words):
        source = content
        if name is not None:
            (tmp_path / name).write_bytes(content)
            source = str(tmp_path / name)
        with pytest.raises(OSError) as raised:
            read_header(source)
        assert words in reason_of(raised.value)

    def test_no_program_is_started(self, tmp_path, monkeypatch):
        for name in ("gs", "gswin32c", "gswin64c"):
            (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        with pytest.raises(OSError, match="EPS"):
            read_rgb(EPS)
        (tmp_path / "x.png").write_bytes(EPS)
        with pytest.raises(OSError, match="EPS"):
            read_rgb(str(tmp_path / "x.png"))
        assert not (tmp_path / "started").exists()

    @pytest.mark.parametrize("kind", KINDS)
    def test_allowed_formats_have_the_pixels_that_pil_reads_whatever_their_name(self, tmp_path, kind):
        content = encoded(picture(), kind)
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        (tmp_path / "x.png").write_bytes(content)
        for source in (content, str(tmp_path / "x.png")):
            assert np.array_equal(np.asarray(read_rgb(source)), expected)
            odd = set(read_header(source).oddities) - {"palette"}
            assert odd == {"under 64 pixels"} | (
                {"marked as linear light (QOI), read as sRGB"} if kind == "QOI" else set()
            )
            precise = np.array(read_deep(source, 3, "white")[0])
            assert np.array_equal(precise, expected)
        for length in (*range(40), len(content) // 2):  # whatever comes, only these two errors do
            try:
                read_rgb(content[:length])
            except (OSError, ValueError):
                continue

    def test_a_raw_file_is_not_taken_for_its_thumbnail(self):
        thumbnail = encoded(picture(), "TIFF", tiffinfo={254: 1, 330: 8})
        dng = encoded(picture(), "TIFF", tiffinfo={50706: b"\x01\x04\x00\x00"})
        for content in (thumbnail, dng):
            with pytest.raises(OSError, match="camera raw"):
                read_header(content)

    def test_endings_say_why_they_are_not_read(self):
        assert {".png", ".jpg", ".jpeg", ".webp", ".tif", ".avif", ".mpo", ".bmp", ".gif"} <= image_suffixes()
        assert not {".eps", ".ps", ".psd", ".ico", ".wmf", ".fits", ".h5", ".mpg"} & image_suffixes()
        assert unread_reason(".png") is None
        assert unread_reason(".txt") is None
        assert unread_reason(".SVG") == "SVG images are not read; convert it to PNG or JPEG"
        assert "save frames" in unread_reason(".mp4")
        known = {suffix for suffixes in images.UNREAD_SUFFIXES.values() for suffix in suffixes}
        assert not known & image_suffixes()
        for suffix in Image.registered_extensions():  # what PIL knows is either read or explained
            assert suffix in image_suffixes() or unread_reason(suffix) or suffix == ".palm"

    def test_an_installed_package_adds_its_format(self, tmp_path, monkeypatch):
        """A stand-in for pillow-heif, whose images are 4 x 4 and red."""
        (tmp_path / "pillow_heif.py").write_text(
            "from PIL import Image, ImageFile\n"
            "class HeifFile(ImageFile.ImageFile):\n"
            "    format = 'HEIF'\n"
            "    def _open(self):\n"
            "        self._size, self._mode, self.tile = (4, 4), 'RGB', []\n"
            "    def load(self):\n"
            "        self.im = Image.new('RGB', (4, 4), 'red').im\n"
            "        return super().load()\n"
            "def register_heif_opener(**options):\n"
            "    Image.register_open('HEIF', HeifFile, lambda head: head[4:12] == b'ftypheic')\n"
        )
        heic = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(40)
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        self.forget()
        try:
            assert unread_reason(".heic") == "HEIF images need the package pillow-heif: pip install pillow-heif"
            with pytest.raises(OSError, match="pip install pillow-heif"):
                read_rgb(heic)
            monkeypatch.delitem(sys.modules, "pillow_heif")
            monkeypatch.syspath_prepend(tmp_path)
            self.forget()
            assert ".heic" in image_suffixes()
            assert unread_reason(".heic") is None
            assert np.asarray(read_rgb(heic))[0, 0].tolist() == [255, 0, 0]
        finally:
            Image.OPEN.pop("HEIF", None)
            Image.ID[:] = [name for name in Image.ID if name != "HEIF"]
            sys.modules.pop("pillow_heif", None)
            self.forget()

    def forget(self) -> None:
        read_formats.cache_clear()
        image_suffixes.cache_clear()

    @pytest.mark.parametrize(
        ("content", "size"),
        [
            ("ff0a414052dc080013080100b400", (8, 8)),
            ("ff0a50092083a4b8110013080100", (401, 299)),
            ("ff0aba210549712300130801006c", (1920, 1080)),
            ("ff0a98806e17488a1b0100130801", (3000, 20)),
            (f"{JXL_BOXES}ff0a50092083a4b8110013080100", (401, 299)),
        ],
    )
    def test_the_size_of_a_jpeg_xl_is_read_without_its_package(self, content, size):
        """So a bomb is refused before it is decoded. The bytes are of libjxl's encoder."""
        content = bytes.fromhex(content)
        assert jxl_size(io.BytesIO(content)) == size
        with pytest.raises(OSError):
            jxl_size(io.BytesIO(content[:-14]))
        with pytest.raises(OSError, match="pillow-jxl-plugin"):
            read_header(content)


class TestFiles:
    @pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "folder", "device", "link to itself", "socket"])
    def test_only_regular_files_are_opened_and_nothing_waits(self, tmp_path, kind):
        path = tmp_path / "x.png"
        if kind in ("pipe", "link to a pipe"):
            os.mkfifo(tmp_path / "pipe")
            path.symlink_to("pipe") if kind != "pipe" else (tmp_path / "pipe").rename(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "socket":
            import socket

            os.chdir(tmp_path)  # the path of a socket must be short
            socket.socket(socket.AF_UNIX).bind("x.png")
        else:
            path.symlink_to(path)
        for read in (read_header, read_rgb, read_mask, image_bytes):
            with pytest.raises((OSError, ValueError)):
                read(str(path))

    def test_a_file_that_becomes_a_pipe_in_between_does_not_block(self, tmp_path, monkeypatch):
        """What is opened is what is looked at."""
        path = tmp_path / "x.png"
        path.write_bytes(encoded(picture()))
        ordinary = os.open

        def swapped(name, *arguments, **options):
            path.unlink()
            os.mkfifo(path)
            return ordinary(name, *arguments, **options)

        monkeypatch.setattr(os, "open", swapped)
        with pytest.raises(OSError, match="pipe"):
            read_header(str(path))

    def test_huge_files_are_not_read(self, tmp_path):
        path = tmp_path / "x.webp"
        path.write_bytes(encoded(picture(), "WEBP"))
        os.truncate(path, images.MOST_BYTES + 1)  # sparse
        for read in (read_header, image_bytes):
            with pytest.raises(OSError, match="over 1024 MiB"):
                read(str(path))

    def test_files_are_closed(self, tmp_path):
        (tmp_path / "x.png").write_bytes(encoded(picture()))
        (tmp_path / "broken.png").write_bytes(b"no image")
        before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
        for _ in range(5):
            read_header(str(tmp_path / "x.png"))
            read_rgb(str(tmp_path / "x.png"))
            with pytest.raises(OSError):
                read_header(str(tmp_path / "broken.png"))
        assert not before or len(os.listdir("/proc/self/fd")) == before


class TestSizes:
    def test_a_photograph_of_108_megapixels_is_read_in_half_the_size(self):
        content = encoded(Image.new("L", (12000, 9000), 100), "JPEG")
        header = read_header(content)
        assert (header.width, header.height) == (6000, 4500)
        assert "over 89 megapixels, read in half the size" in header.oddities
        image = read_rgb(content)
        assert image.size == (6000, 4500)
        assert image.getpixel((5999, 4499)) == (100, 100, 100)

    @pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "LA", "RGBA", "CMYK", "I;16", "P with transparency"])
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
    @pytest.mark.parametrize("orientation", [1, 6])
    def test_large_ones_of_all_kinds_look_as_the_whole_ones_do(self, monkeypatch, mode, kind, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"exif": exif}
        image = picture(204, 156)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        elif mode == "P with transparency":
            image, options["transparency"] = image.convert("P"), bytes([120] * 256)
        else:
            image = image.convert(mode)
        try:
            content = encoded(image, kind, **options)
        except (OSError, ValueError, TypeError, NotImplementedError):
            pytest.skip("the format has no such mode")
        whole = read_rgb(content)
        monkeypatch.setattr(images, "FULL_PIXELS", 20_000)
        monkeypatch.setattr(images, "MOST_PIXELS_PER_BYTE", 1e9)
        header, halved = read_header(content), read_rgb(content)
        assert halved.size == (header.width, header.height) == (-(-whole.width // 2), -(-whole.height // 2))
        difference = np.abs(np.asarray(halved).astype(int) - np.asarray(whole.reduce(2)))
        assert difference.mean() < (20 if kind == "JPEG" else 4)

    def test_bombs_cost_nothing(self):
        """120 megapixels of one colour in 15 kB, and sizes that are only claimed."""
        bomb = encoded(Image.new("1", (12000, 10000)))
        assert len(bomb) < 20_000
        with pytest.raises(ValueError, match="decompression bomb"):
            read_header(bomb)
        for size in ((20_000, 20_000), (2**31 - 1, 1), (1, 2**31 - 1), (65_500, 65_500)):
            head = encoded(Image.new("L", (1, 1)))
            claimed = head[:16] + struct.pack(">II", *size) + head[24:29]
            claimed += struct.pack(">I", zlib.crc32(claimed[12:29])) + head[33:]
            with pytest.raises((OSError, ValueError)):
                read_rgb(claimed)

    def test_long_and_thin_ones_and_single_pixels_are_read(self):
        for size in ((30_000, 20), (1, 1), (1, 5000)):
            content = encoded(Image.new("RGB", size, "red"))
            assert read_rgb(content).size == size == (read_header(content).width, read_header(content).height)

    def test_no_warning_is_printed(self):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read_header(encoded(Image.new("L", (10_000, 9_100), 100), "JPEG"))
        assert not caught

    def test_text_and_profiles_of_megabytes_are_read(self):
        texts = PngImagePlugin.PngInfo()
        noise = np.random.default_rng(0).integers(97, 123, 5_000_000, dtype=np.uint8).tobytes().decode()
        texts.add_text("workflow", noise, zip=True)
        texts.add_text("prompt", noise)
        profile = P3 + bytes(3_000_000)  # as unused tags make it
        profile = struct.pack(">I", len(profile)) + profile[4:]
        content = encoded(as_image(in_display_p3(np.asarray(picture()))), pnginfo=texts, icc_profile=profile)
        assert np.abs(np.asarray(read_rgb(content)).astype(int) - np.asarray(picture())).max() <= 2
        assert read_header(content).width == 64

    def test_text_that_expands_without_bound_is_refused(self):
        endless = zlib.compress(bytes(100 << 20))
        for name, content in ((b"zTXt", b"a\x00\x00" + endless), (b"iTXt", b"a\x00\x01\x00\x00\x00" + endless)):
            with pytest.raises((OSError, ValueError)):
                read_rgb(with_chunk(encoded(picture()), name, content))


class TestColours:
    """Known sRGB values, brought into a profile's colours by published formulas, come back."""

    VALUES = np.asarray(picture()).astype(float)

    def close(self, content: bytes, is_exact: bool = True, values: np.ndarray = VALUES) -> None:
        """Within 1.5 of 255, by lossy formats on the average."""
        assert CONVERTED in read_header(content).oddities
        found = read_rgb(content)
        assert found.mode == "RGB"
        assert "icc_profile" not in found.info  # else saving it would say the colours twice
        difference = np.abs(np.asarray(found).astype(float) - values)
        assert (difference.max() if is_exact else difference.mean()) <= 1.5

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
    @pytest.mark.parametrize("space", ["adobe", "p3"])
    def test_rgb(self, space, kind):
        other = as_image((in_adobe_rgb if space == "adobe" else in_display_p3)(self.VALUES))
        profile = colours.ADOBE_RGB if space == "adobe" else P3
        options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
        content = encoded(other, kind, icc_profile=profile, **options.get(kind, {}))
        self.close(content, kind not in ("JPEG", "AVIF"))

    @pytest.mark.parametrize("mode", ["RGBA", "P", "P with transparency", "colour key"])
    def test_rgb_of_other_modes(self, mode):
        values = np.asarray(picture(8, 6)).astype(float)  # so few colours that a palette holds them
        other = as_image(in_adobe_rgb(values))
        options = {"icc_profile": colours.ADOBE_RGB}
        if mode == "RGBA":
            other.putalpha(255)
        elif mode == "colour key":
            options["transparency"] = (1, 2, 3)
        else:
            other = other.quantize(256, dither=Image.Dither.NONE)
            if mode == "P with transparency":
                options["transparency"] = bytes([255] * 256)
        self.close(encoded(other, **options), values=values)

    def test_the_ground_under_transparency_is_not_converted(self):
        clear = Image.new("RGBA", (64, 48), (10, 200, 30, 0))
        assert read_rgb(encoded(clear, icc_profile=P3), "#102030").getpixel((5, 5)) == (16, 32, 48)
        half = Image.new("RGBA", (64, 48), (255, 0, 0, 128))
        rgb, alpha = ImageOptions().layers(encoded(half, icc_profile=colours.ADOBE_RGB))
        assert alpha.getextrema() == (128, 128)
        assert rgb.getpixel((0, 0)) == (255, 127, 127)

    @pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
    @pytest.mark.parametrize("gamma", [1.0, 1.8, 2.19921875])
    def test_grey(self, mode, gamma):
        grey = np.arange(256.0)[None].repeat(4, 0)
        there = 255 * light(grey) ** (1 / gamma)
        if mode == "I;16":
            image = Image.fromarray(np.rint(there * 257).astype(np.uint16))
        else:
            image = as_image(there).convert(mode)
        content = encoded(image, icc_profile=grey_profile(gamma))
        assert CONVERTED in read_header(content).oddities
        found = np.asarray(read_rgb(content)).astype(float)[..., 0]
        is_coarse = mode != "I;16" and gamma == 1.0  # 8 bits of light have few dark values
        begin = 60 if is_coarse else 0
        assert np.abs(found - grey)[:, begin:].max() <= (2 if mode != "I;16" else 1)

    def test_grey_with_a_profile_of_colours(self):
        grey = as_image(in_adobe_rgb(np.full((20, 20, 3), 90.0))).convert("L")
        content = encoded(grey, icc_profile=colours.ADOBE_RGB)
        assert np.abs(np.asarray(read_rgb(content)).astype(int) - 90).max() <= 1

    @pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
    def test_cmyk_by_its_profile(self, kind):
        """A profile of made-up inks: cyan is L 60, a -20, b -30. A JPEG has them inverted, as Adobe's."""
        corner = {(1, 0, 0, 0): (60, -20, -30), (0, 1, 0, 0): (50, 40, 0), (0, 0, 0, 0): (100, 0, 0)}
        profile = cmyk_profile(lambda inks: corner.get(tuple(inks), (0, 0, 0)))
        for inks, lab in corner.items():
            image = Image.new("CMYK", (16, 16), tuple(255 * ink for ink in inks))
            content = encoded(image, kind, icc_profile=profile)
            assert {CONVERTED, "CMYK"} <= set(read_header(content).oddities)
            assert np.abs(np.asarray(read_rgb(content))[8, 8] - self.of_lab(*lab)).max() <= 2
            plain = encoded(image, kind)  # without a profile as before
            assert np.array_equal(np.asarray(read_rgb(plain)), np.asarray(Image.open(io.BytesIO(plain)).convert("RGB")))

    @staticmethod
    def of_lab(lightness: float, a: float, b: float) -> np.ndarray:
        """sRGB of Lab (D50), by the CIE's formulas and Bradford's published matrix."""
        y = (lightness + 16) / 116
        roots = np.array([y + a / 500, y, y - b / 200])
        cubes = np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29))
        to_d65 = [[0.955577, -0.023039, 0.063164], [-0.028290, 1.009942, 0.021008], [0.012298, -0.020483, 1.329910]]
        linear = np.linalg.inv(SRGB_TO_XYZ) @ np.array(to_d65) @ (cubes * (0.9642, 1.0, 0.8249))
        return from_light(linear.clip(0, 1))

    def test_profiles_of_srgb_leave_the_bytes(self):
        """Little CMS's own, one of parametric curves, one of a coarse table, and none."""
        table = np.rint(65535 * light(np.linspace(0, 255, 1024))).astype(">u2").tobytes()
        curve = b"curv" + bytes(4) + struct.pack(">I", 1024) + table
        columns = (
            (0.43607, 0.22249, 0.01392),
            (0.38515, 0.71687, 0.09708),
            (0.14307, 0.06061, 0.71410),
        )
        tags = {
            name: b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in column))
            for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)
        }
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve) | {b"wtpt": WHITE}
        own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
        for profile in (own, colours.matrix_profile(colours.BT709, None), profile_of(b"RGB ", tags)):
            content = encoded(image, icc_profile=profile)
            assert read_header(content).oddities == ("under 64 pixels",)
            assert np.array_equal(np.asarray(read_rgb(content)), np.asarray(image))

    @pytest.mark.parametrize("profile", [b"none", bytes(200), P3[:150], P3[:128] + bytes(300), grey_profile(1.8)])
    def test_a_profile_that_cannot_be_used_is_ignored_and_counted(self, profile):
        content = encoded(picture(), icc_profile=profile)
        assert "unusable colour profile, ignored" in read_header(content).oddities
        assert np.array_equal(np.asarray(read_rgb(content)), np.asarray(picture()))

    def test_damaged_profiles_never_end_in_another_error(self):
        random = np.random.default_rng(0)
        whole = {P3: "RGB", grey_profile(1.8): "L", cmyk_profile(lambda inks: (50, 0, 0)): "CMYK"}
        for profile, mode in whole.items():
            image = picture(16, 16).convert(mode)
            for _ in range(20):
                damaged = bytearray(profile)
                for place in random.integers(0, len(profile), 4):
                    damaged[place] = random.integers(256)
                content = encoded(image, "TIFF", icc_profile=bytes(damaged))
                assert read_rgb(content).size == (16, 16)
                PixelOptions(resolution=64, preserve_input_precision=True).layers(content)

    def test_masks_keep_their_values(self):
        grey = as_image(np.arange(256.0)[None].repeat(4, 0))
        content = encoded(grey, icc_profile=grey_profile(1.0))
        assert np.array_equal(np.asarray(read_mask(content)), np.asarray(grey))
        assert not np.array_equal(np.asarray(read_rgb(content).convert("L")), np.asarray(grey))
        assert read_mask(encoded(Image.new("LA", (4, 4), (255, 0)))).getextrema() == (0, 0)

    def test_more_than_8_bits(self):
        """16-bit Adobe RGB comes back exacter than 8 bits could hold, of three channels, four and one."""
        values = in_adobe_rgb(self.VALUES)
        opaque = np.full((48, 64, 1), 255.0)
        for deep in (values, np.concatenate([values, opaque], axis=2)):
            content = png_of_16_bits(np.rint(deep * 257).astype(np.uint16), colours.ADOBE_RGB)
            found = np.array(read_deep(content, 3, "white")[0])
            assert np.abs(found - self.VALUES).max() < 0.1
            assert np.abs(np.array(read_deep(content, 4, "white")[0])[..., :3] - self.VALUES).max() < 0.1
        assert np.abs(np.asarray(read_rgb(content)) - self.VALUES).max() < 2.5  # PIL takes the higher bytes
        grey = np.linspace(0, 255, 1000)[None].repeat(4, 0)
        image = Image.fromarray(np.rint(65535 * light(grey)).astype(np.uint16))
        found = np.array(read_deep(encoded(image, icc_profile=grey_profile(1.0)), 1, "white")[0])[..., 0]
        assert np.abs(found - grey)[:, 20:].max() < 0.1

    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize("precise", [False, True])
    def test_models_in_pixels_see_the_same_colours(self, channels, precise):
        other = as_image(in_display_p3(self.VALUES))
        options = PixelOptions(resolution=64, image_channels=channels, preserve_input_precision=precise)
        found = np.asarray(options.layers(encoded(other, icc_profile=P3))[0]).reshape(48, 64, -1)[..., :3]
        plain = np.asarray(options.layers(encoded(picture()))[0]).reshape(48, 64, -1)[..., :3]
        assert np.abs(found.astype(float) - plain).max() <= 2
        assert np.array_equal(plain, np.asarray(options.layers(encoded(picture()))[0]).reshape(48, 64, -1)[..., :3])

    def test_png_by_gamma_and_primaries(self):
        """gAMA and cHRM of Adobe RGB, of which 2.2 stands for sRGB's curve; a gamma alone; those of sRGB."""
        white, adobe = (31270, 32900), (64000, 33000, 21000, 71000, 15000, 6000)
        content = with_chunk(encoded(as_image(in_adobe_rgb(self.VALUES))), b"cHRM", struct.pack(">8I", *white, *adobe))
        self.close(with_chunk(content, b"gAMA", struct.pack(">I", round(1e5 * 256 / 563))), is_exact=False)
        there = as_image(255 * light(self.VALUES) ** (1 / 1.8))
        self.close(with_chunk(encoded(there), b"gAMA", struct.pack(">I", round(1e5 / 1.8))))
        usual = with_chunk(encoded(picture()), b"gAMA", struct.pack(">I", 45455))
        usual = with_chunk(usual, b"cHRM", struct.pack(">8I", *white, 64000, 33000, 30000, 60000, 15000, 6000))
        for content in (usual, with_chunk(encoded(there), b"gAMA", bytes(4)), with_chunk(usual, b"sRGB", b"\x00")):
            assert CONVERTED not in read_header(content).oddities
            assert read_rgb(content).size == (64, 48)
        assert np.array_equal(np.asarray(read_rgb(usual)), np.asarray(picture()))
        for damaged in ((0,) * 8, (1,) * 8, (31270, 32900, *[30000] * 6)):
            content = with_chunk(encoded(picture()), b"cHRM", struct.pack(">8I", *damaged))
            assert np.array_equal(np.asarray(read_rgb(content)), np.asarray(picture()))

    def test_png_by_code_points(self):
        self.close(with_chunk(encoded(as_image(in_display_p3(self.VALUES))), b"cICP", bytes([12, 13, 0, 1])))
        usual = with_chunk(encoded(picture()), b"cICP", bytes([1, 13, 0, 1]))
        assert read_header(usual).oddities == ("under 64 pixels",)
        high_range = with_chunk(encoded(picture()), b"cICP", bytes([9, 16, 0, 1]))
        assert "unusable colour profile, ignored" in read_header(high_range).oddities

    def test_avif_by_code_points(self):
        content = encoded(as_image(in_display_p3(self.VALUES)), "AVIF", quality=100)
        begin = content.index(b"colrnclx") + 8
        self.close(content[:begin] + struct.pack(">HH", 12, 13) + content[begin + 4 :], is_exact=False)

    def test_jpeg_2000_by_the_profile_that_pil_does_not_read(self):
        content = encoded(as_image(in_display_p3(self.VALUES)), "JPEG2000")
        begin, outer = content.index(b"colr") - 4, content.index(b"jp2h") - 4
        length, size = (int.from_bytes(content[at : at + 4], "big") for at in (begin, outer))
        box = struct.pack(">I4sBBB", 11 + len(P3), b"colr", 2, 0, 0) + P3
        head = content[:outer] + struct.pack(">I", size + len(box) - length) + content[outer + 4 : begin]
        self.close(head + box + content[begin + length :], is_exact=False)

    def test_jpeg_by_the_mark_that_cameras_leave(self):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
        content = encoded(as_image(in_adobe_rgb(self.VALUES)), "JPEG", quality=100, subsampling=0, exif=exif)
        self.close(content, is_exact=False)
        plain = encoded(picture(), "JPEG", exif=Image.Exif())
        assert CONVERTED not in read_header(plain).oddities

    def test_lab(self):
        content = encoded(Image.new("LAB", (8, 8), (153, 108, 98)), "TIFF")
        assert np.abs(np.asarray(read_rgb(content))[4, 4] - self.of_lab(60, -20, -30)).max() <= 2

    def test_profiles_are_compiled_once(self):
        colours.conversion.cache_clear()
        for _ in range(5):
            read_rgb(encoded(picture(), icc_profile=P3))
        assert colours.conversion.cache_info().misses == 1


class TestRows:
    """Rows of datasets may name files of the data folder alone."""

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        folder = tmp_path / "data"
        (folder / "below").mkdir(parents=True)
        for path in (folder / "a.png", folder / "below" / "b.png", tmp_path / "outside.png"):
            path.write_bytes(encoded(picture()))
        (folder / "link.png").symlink_to(tmp_path / "outside.png")
        (folder / "way").symlink_to(tmp_path)
        (folder / "inner.png").symlink_to("a.png")
        return folder

    def paths(self, folder: Path) -> dict[str, bool]:
        return {
            "a.png": True,
            "below/b.png": True,
            "below/../a.png": True,
            "inner.png": True,
            str(folder / "a.png"): True,
            str(folder.parent / "outside.png"): False,
            "../outside.png": False,
            "below/../../outside.png": False,
            "link.png": False,
            "way/outside.png": False,
            "/proc/self/environ": False,
            "~/x.png": True,  # a name within the folder, which is not there
            "https://example.com/x.png": False,
            "file:///etc/passwd": True,
            "a\x00.png": False,
            "x" * 5000: True,
        }

    def test_only_paths_within_the_folder_are_images(self, folder):
        folders = data_folders([str(folder), "name/of-the-hub", None], "parquet")
        assert folders == (folder.resolve(),)
        for path, is_within in self.paths(folder).items():
            found = image_of({"bytes": None, "path": path}, folders)
            assert isinstance(found, images.Refused) != is_within, path
            is_there = is_within and (folder / path[:200]).exists()
            if not is_there:
                with pytest.raises(OSError):
                    read_rgb(found)
            else:
                assert read_rgb(found).size == (64, 48)
        assert image_of({"bytes": b"x", "path": "/etc/passwd"}, folders) == b"x"
        assert image_of({"bytes": None, "path": None}, folders) == image_of(None, folders) == b""
        for other in (5, "text", [1], {"bytes": None, "path": str(folder / "a.png")}):
            with pytest.raises(OSError):
                read_rgb(image_of(other, ()))

    def written(self, folder: Path, paths: list[str], masks: bool = False) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        rows = [{"bytes": None, "path": path} for path in paths]
        content = [{"bytes": encoded(picture()), "path": None}] * len(rows)
        table = {"image": content if masks else rows, "text": ["x"] * len(rows)} | ({"mask": rows} if masks else {})
        pyarrow.parquet.write_table(pa.table(table), folder / "rows.parquet")

    @pytest.mark.parametrize("form", ["parquet", "saved", "masks", "streamed", "streamed masks"])
    def test_of_every_kind_of_table(self, folder, tmp_path, form):
        import datasets

        paths = ["a.png", str(folder.parent / "outside.png"), "link.png", "../outside.png"]
        self.written(folder, paths, "masks" in form)
        column = "mask" if "masks" in form else None
        source = SourceOptions(train_data_dir=str(folder), data_format="parquet", mask_column=column)
        if form == "saved":
            saved = datasets.Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
            saved.save_to_disk(str(tmp_path / "saved"))
            (tmp_path / "saved" / "a.png").write_bytes(encoded(picture()))
            (tmp_path / "saved" / "link.png").symlink_to(tmp_path / "outside.png")
            source = SourceOptions(dataset_name=str(tmp_path / "saved"))
        if form.startswith("streamed"):
            found = self.streamed(folder, column)
        else:
            records = read_records(DataOptions(), source, CaptionOptions(), 0)
            given = [records.mask(row).source if column else records.image(row) for row in range(4)]
            found = [self.reason(each) for each in given]
        assert [bool(reason) for reason in found] == [False, True, True, True]
        assert all("leads out of the data folder" in reason for reason in found[1:])

    def reason(self, source: str | bytes) -> str:
        try:
            read_rgb(source)
        except OSError as error:
            return reason_of(error)
        return ""

    def streamed(self, folder: Path, column: str | None) -> list[str]:
        from utils.data.stream import Lane, open_stream

        source = SourceOptions(train_data_dir=str(folder / "rows.parquet"), mask_column=column)
        stream = open_stream(DataOptions(streaming=True), source, CaptionOptions(), 64, BucketOptions())
        lane = Lane(stream, 0, 1, 1, 0)
        samples = [lane._sample(row, number, 0) for number, row in enumerate(stream.dataset)]
        if column is not None:
            return [self.reason(sample.record.mask.source) for sample in samples]
        reasons = iter([reason for _, reason in lane.bad])
        return ["" if sample else next(reasons) for sample in samples]

    @pytest.mark.parametrize("column", [[1, 2], [0.5, 1.0], [True, False], [{"a": 1}, {"a": 2}]])
    @pytest.mark.parametrize("is_streamed", [False, True])
    def test_a_column_of_something_else_is_one_line(self, tmp_path, column, is_streamed):
        import pyarrow as pa
        import pyarrow.parquet

        from utils.data.stream import open_stream

        pyarrow.parquet.write_table(pa.table({"image": column, "text": ["a", "b"]}), tmp_path / "rows.parquet")
        source = SourceOptions(train_data_dir=str(tmp_path))
        stream = partial(open_stream, resolution=64, buckets=BucketOptions())
        read = stream if is_streamed else partial(read_records, seed=0)
        with pytest.raises(UserError, match=r"--image_column image must hold images, .* got ") as raised:
            read(DataOptions(streaming=is_streamed), source, CaptionOptions())
        assert "\n" not in str(raised.value)

    def test_a_tar_that_claims_more_than_there_is_costs_nothing(self, tmp_path):
        import tarfile

        from utils.data.tar_shards import read_tars

        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            for name in ("a.png", "b.png"):
                info = tarfile.TarInfo(name)
                info.size = len(encoded(picture()))
                archive.addfile(info, io.BytesIO(encoded(picture())))
        table = read_tars([tmp_path / "x.tar"])
        table._places[1, 2] = 10 * 1000**4
        assert read_rgb(table.image(0)).size == (64, 48)
        with pytest.raises(OSError, match="over 1024 MiB"):
            table.image(1)


def test_what_was_cached_in_other_colours_is_not_used_again(tmp_path):
    """Images without a profile keep the key that they had; converted ones have another."""
    from utils.data.encodings import LatentPlan
    from utils.data.survey import add_digests, survey

    picture().save(tmp_path / "plain.png")
    picture().save(tmp_path / "wide.png", icc_profile=P3)
    records = read_records(DataOptions(), SourceOptions(train_data_dir=str(tmp_path)), CaptionOptions(), 0)
    known = survey(records, tmp_path / "memory")
    add_digests(known, records, np.ones(2, bool), tmp_path / "memory")
    assert known.oddity_counts()[CONVERTED] == 1
    plan = LatentPlan(SimpleNamespace(survey=known), ImageOptions(), 0, 1, "vae")
    assert plan._content(0) == known.digests[0]
    assert plan._content(1) != known.digests[1]


def test_images_that_are_enlarged_much_are_named(train, tmp_path, caplog):
    data = tmp_path / "small"
    data.mkdir()
    for number, edge in enumerate((8, 15, 16, 40)):
        Image.new("RGB", (edge, 40)).save(data / f"{number}.png")
    train("sd", "--max_train_steps", 1, data=data)
    assert "2 images are enlarged by more than 2, up to 4 times; --max_upscale 2 leaves them out" in caplog.text
