"""Opening images: which formats and files, and how much of them."""

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pictures import encoded, picture
from utils.data import images
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
from utils.data.pixels import read_deep

JXL_BOXES = "0000000c4a584c200d0a870a00000014667479706a786c20000000006a786c20000000696a786c63"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
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


class TestFormats:
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (EPS, "EPS images are not read; convert them to PNG"),
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
        assert unread_reason(".SVG") == "SVG images are not read; convert them to PNG or JPEG"
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
    def test_only_regular_files_are_opened_and_nothing_waits(self, tmp_path, monkeypatch, kind):
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

            monkeypatch.chdir(tmp_path)  # the path of a socket must be short
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


def test_images_that_are_enlarged_much_are_named(train, tmp_path, caplog):
    data = tmp_path / "small"
    data.mkdir()
    for number, edge in enumerate((8, 15, 16, 40)):
        Image.new("RGB", (edge, 40)).save(data / f"{number}.png")
    train("sd", "--max_train_steps", 1, data=data)
    assert "2 images are enlarged by more than 2, up to 4 times; --max_upscale 2 leaves them out" in caplog.text
