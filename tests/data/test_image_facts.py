"""Sizes by the header that are those of the pixels."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tests.pictures import P3, as_image, encoded, in_display_p3, picture, with_chunk
from utils.data import images
from utils.data.images import read_header, read_rgb


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
        except (OSError, ValueError, TypeError, NotImplementedError):  # PIL's encoders differ in what they raise
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
