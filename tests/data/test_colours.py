"""Colours of images: profiles, greys, inks and transparency."""

import io
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.pictures import P3, SRGB_TO_XYZ, as_image, encoded, from_light, in_display_p3, light, picture, with_chunk
from utils.data import colours
from utils.data.captions import CaptionOptions
from utils.data.images import read_header, read_mask, read_rgb
from utils.data.oddities import CONVERTED
from utils.data.options import ImageOptions, PixelOptions
from utils.data.pixels import read_deep
from utils.data.source_options import DataOptions, SourceOptions
from utils.data.sources import read_records

ADOBE_TO_XYZ = np.array(
    [[0.576731, 0.185554, 0.188185], [0.297377, 0.627349, 0.075274], [0.027034, 0.070687, 0.991109]]
)
D50 = struct.pack(">3i", 63190, 65536, 54061)
WHITE = b"XYZ " + bytes(4) + D50


def in_adobe_rgb(values: np.ndarray) -> np.ndarray:
    """sRGB from 0 to 255 as Adobe RGB, by published matrices."""
    linear = light(values) @ (np.linalg.inv(ADOBE_TO_XYZ) @ SRGB_TO_XYZ).T
    return 255 * linear.clip(0, 1) ** (256 / 563)


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
