"""Pixels of other than 8 bits, and transparent colours."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from tests.pictures import encoded, picture
from tests.records import records_of
from utils.config.batch import MaskFile
from utils.data import survey as headers
from utils.data.images import MANY_PIXELS, check_values, read_header, read_layers, read_mask, read_rgb
from utils.data.mask_values import mask_values
from utils.data.oddities import CLIPPED, CONVERTED, DARK, SMALL_PALETTE, TURNED_ANEW, UNCOMMON, how_read
from utils.data.options import PixelOptions
from utils.data.pixels import read_deep
from utils.training.preparation import warn_of_guesses

UNSIGNED, SIGNED, FLOAT = 1, 2, 3


def tiff(
    values: np.ndarray | bytes,
    bits: int,
    kind: int = UNSIGNED,
    photometric: int = 1,
    channels: int = 1,
    is_planar: bool = False,
    is_compressed: bool = False,
    order: str = "<",
    colours: Sequence[int] = (),
) -> bytes:
    """A TIFF of 8 x 8 pixels, little-endian unless `order` is ">"."""
    content = values if isinstance(values, bytes) else values.tobytes()
    content = zlib.compress(content) if is_compressed else content
    content += bytes(len(content) % 2)
    begin = 8 + len(content)
    count = channels if is_planar else 1
    parts = [len(content) // count] * count
    tags: dict[int, tuple[str, list[int]]] = {
        **{256: ("I", [8]), 257: ("I", [8]), 258: ("H", [bits] * channels), 259: ("H", [8 if is_compressed else 1])},
        **{262: ("H", [photometric]), 273: ("I", [8 + sum(parts[:part]) for part in range(count)])},
        **{277: ("H", [channels]), 278: ("I", [8]), 279: ("I", parts)},
        **{284: ("H", [1 + is_planar]), 339: ("H", [kind] * channels)},
    }
    tags = dict(sorted((tags | ({320: ("H", list(colours))} if colours else {})).items()))
    entries, more = b"", b""
    for tag, (code, numbers) in tags.items():
        value = struct.pack(f"{order}{len(numbers)}{code}", *numbers)
        if len(value) > 4:
            more += value
            value = struct.pack(f"{order}I", begin + 2 + 12 * len(tags) + 4 + len(more) - len(value))
        entries += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[code], len(numbers)) + value.ljust(4, b"\0")
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", begin)
    return magic + content + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + more


def flat(value: float, kind: str) -> np.ndarray:
    return np.full(64, value, kind)


def ramp(low: float, high: float, kind: str) -> np.ndarray:
    return np.linspace(low, high, 64).astype(kind)


def png(depth: int, colour: int, pixels: bytes, *chunks: tuple[bytes, bytes], late: tuple[bytes, bytes] = ()) -> bytes:
    """A PNG of 8 lines of the same pixels, with chunks before its pixels, and behind them."""
    width = 8 * len(pixels) // (depth * (3 if colour == 2 else 1))
    head = (b"IHDR", struct.pack(">IIBBBBB", width, 8, depth, colour, 0, 0, 0))
    body = (b"IDAT", zlib.compress((b"\0" + pixels) * 8))
    all_chunks = [head, *chunks, body, *([late] if late else []), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in all_chunks
    )


class TestNumbers:
    @pytest.mark.parametrize("is_compressed", [False, True])
    @pytest.mark.parametrize(
        ("content", "arguments", "expected"),
        [
            (b"\xff" * 96, {"bits": 12}, [255, 255]),
            (b"\x80\x08\x00" * 32, {"bits": 12}, [128, 128]),
            (ramp(0, 65535, "<u2"), {"bits": 16}, [0, 255]),
            (ramp(0, 65535, "<u2"), {"bits": 16, "photometric": 0}, [255, 0]),
            (ramp(0, 255, "<u1"), {"bits": 8, "photometric": 0}, [255, 0]),
            (ramp(0, 1, "<f4"), {"bits": 32, "kind": FLOAT, "photometric": 0}, [255, 0]),
            (ramp(0, 2**32 - 1, "<u4"), {"bits": 32}, [0, 255]),
            (ramp(2**31, 2**32 - 1, "<u4"), {"bits": 32}, [128, 255]),
            (ramp(0, 2**31 - 1, "<i4"), {"bits": 32, "kind": SIGNED}, [0, 255]),
            (ramp(0, 255, "<u4"), {"bits": 32}, [0, 255]),
            (ramp(0, 65535, "<i4"), {"bits": 32, "kind": SIGNED}, [0, 255]),
            (ramp(0, 32767, "<i2"), {"bits": 16, "kind": SIGNED}, [0, 255]),
            (ramp(0, 255, "<i2"), {"bits": 16, "kind": SIGNED}, [0, 255]),
            (ramp(0, 1, "<f4"), {"bits": 32, "kind": FLOAT}, [0, 255]),
            (ramp(-0.05, 1.08, "<f4"), {"bits": 32, "kind": FLOAT}, [0, 255]),
            (np.r_[flat(0, "<f4")[1:], np.float32("inf")], {"bits": 32, "kind": FLOAT}, [0, 255]),
            (np.r_[np.float32("nan"), flat(0.5, "<f4")[1:]], {"bits": 32, "kind": FLOAT}, [0, 128]),
            (ramp(0, 255, "<f4"), {"bits": 32, "kind": FLOAT}, [0, 255]),
            (ramp(0, 65535, "<f4"), {"bits": 32, "kind": FLOAT}, [0, 255]),
            (flat(0, "<i4"), {"bits": 32, "kind": SIGNED}, [0, 0]),
            (flat(0, "<f4"), {"bits": 32, "kind": FLOAT}, [0, 0]),
        ],
    )
    def test_tiffs_of_grey_come_as_bright_as_they_are(self, content, arguments, expected, is_compressed):
        file = tiff(content, **arguments, is_compressed=is_compressed)
        found = np.asarray(read_rgb(file))[..., 0].reshape(-1)
        assert found[[0, -1]].tolist() == expected
        assert np.abs(np.asarray(read_deep(file, 1, "white")[0]).reshape(-1) - found).max() <= 0.51
        assert np.array_equal(np.asarray(read_mask(file)).reshape(-1), found)
        is_usual = (
            arguments["bits"] <= 16 and not {"kind", "photometric"} & arguments.keys() and arguments["bits"] != 12
        )
        assert (UNCOMMON in read_header(file).oddities) == (not is_usual and arguments["bits"] != 8)

    @pytest.mark.parametrize(
        ("content", "arguments", "words"),
        [
            (flat(-100, "<i2"), {"bits": 16, "kind": SIGNED}, "signed, 16 bits, from -100 to -100"),
            (flat(-5, "<i4"), {"bits": 32, "kind": SIGNED}, "can't tell"),
            (ramp(-1, 1, "<f4"), {"bits": 32, "kind": FLOAT}, "float, 32 bits, from -1 to 1"),
            (flat(-0.05, "<f4"), {"bits": 32, "kind": FLOAT}, "can't tell"),
            (flat(float("nan"), "<f4"), {"bits": 32, "kind": FLOAT}, "no finite number"),
            (ramp(0, 10, "<f4"), {"bits": 32, "kind": FLOAT}, "from 0 to 10"),
            (ramp(0, 1e9, "<f4"), {"bits": 32, "kind": FLOAT}, "can't tell"),
            (ramp(0, 1, "<i4"), {"bits": 32, "kind": SIGNED}, "from 0 to 1"),
            (ramp(0, 1000, "<u4"), {"bits": 32}, "unsigned, 32 bits, from 0 to 1000"),
            (ramp(0, 100000, "<u4"), {"bits": 32}, "can't tell"),
            (ramp(-100, 100, "<i1"), {"bits": 8, "kind": SIGNED}, "signed 8-bit numbers are not read"),
            (
                bytes(8 * 64),
                {"bits": 64, "kind": FLOAT},
                r"a TIFF with 1 channel of 64 bits \(float\) is not read; save it as",
            ),
            (bytes(3 * 2 * 64), {"bits": 16, "photometric": 2, "channels": 3, "is_planar": True}, "planar"),
        ],
    )
    def test_tiffs_whose_white_cannot_be_told_are_refused(self, content, arguments, words):
        with pytest.raises((OSError, ValueError), match=words):
            read_rgb(tiff(content, **arguments))

    @pytest.mark.parametrize("kind", ["images", "masks"])
    def test_they_are_named_before_the_training(self, tmp_path, kind):
        """As are those of floats without a range, while those that can be read are kept."""
        contents = [
            *[tiff(ramp(0, 1, "<f4"), 32, FLOAT), tiff(ramp(0, 4095, "<u2"), 16), tiff(ramp(-9, 9, "<f4"), 32, FLOAT)],
            *[tiff(ramp(-700, 900, "<i4"), 32, SIGNED), tiff(flat(np.nan, "<f4"), 32, FLOAT)],
        ]
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir()
            for number, content in enumerate(contents):
                (tmp_path / folder / f"{number}.tiff").write_bytes(content if folder == kind else contents[0])
        records = records_of(tmp_path / "images", mask_dir=str(tmp_path / "masks"))
        for _ in range(2):
            known = headers.survey(records, tmp_path / "memory")
            headers.survey_masks(known, records, tmp_path / "memory", with_digests=False)
            assert sorted(known.reasons) == [2, 3, 4]
            assert "can't tell which value is white" in known.reasons[2]
            assert "no finite number" in known.reasons[4]

    @pytest.mark.parametrize(
        ("values", "expected", "oddity"),
        [
            (np.r_[ramp(0, 1, "<f4")[4:], np.full(4, 20, "<f4")], [16, 255], CLIPPED),  # highlights
            (np.r_[ramp(0.3, 0.6, "<f4")[1:], np.float32(1e6)], [78, 255], CLIPPED),
            (np.r_[ramp(0.3, 0.6, "<f4")[8:], np.full(8, 8, "<f4")], [86, 255], CLIPPED),
            (np.r_[ramp(0, 1, "<f4")[1:], np.float32("inf")], [4, 255], None),
            (np.r_[ramp(0.5, 250, "<f4")[1:], np.float32(260)], [4, 255], None),  # filters go beyond 255, too
            (255 * np.exp(-(ramp(6, 0, "<f4") ** 2)), [0, 255], None),  # a soft spot
            (np.r_[np.zeros(60, "<f4"), flat(255, "<f4")[:4]], [0, 255], None),  # a mask in 255s
            (np.r_[ramp(2.5, 3.5, "<f4")[1:], np.float32(200)], [3, 200], DARK),
        ],
    )
    def test_highlights_of_floats_do_not_darken_the_others(self, values, expected, oddity):
        file = tiff(values.astype("<f4"), 32, FLOAT)
        assert np.asarray(read_rgb(file))[..., 0].reshape(-1)[[0, -1]].tolist() == expected
        found = set(check_values(file, read_header(file)).oddities) & {CLIPPED, DARK}
        assert found == ({oddity} if oddity else set())

    def test_floats_of_numbers_of_classes_are_not_taken_for_highlights(self):
        with pytest.raises(ValueError, match="can't tell"):
            read_rgb(tiff(np.r_[flat(1, "<f4")[8:], flat(3, "<f4")[:8]], 32, FLOAT))

    def test_images_whose_white_was_guessed_are_named(self, tmp_path, caplog):
        for number in range(5):
            values = np.r_[ramp(0, 1, "<f4")[4:], np.full(4, 20 if number else 1, "<f4")]
            (tmp_path / f"{number}.tiff").write_bytes(tiff(values, 32, FLOAT))
        records = records_of(tmp_path)
        for _ in range(2):
            warn_of_guesses(records, headers.survey(records, tmp_path / "memory"))
        assert len(caplog.messages) == 2
        assert f"4 images or masks have {CLIPPED}, such as 1.tiff, 2.tiff, 3.tiff" in caplog.messages[1]

    @pytest.mark.parametrize("is_compressed", [False, True])
    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize(("full", "is_small"), [(255, True), (200, True), (65535, False), (256, False), (0, False)])
    def test_a_palette_of_8_bits_is_not_black(self, full, is_small, order, is_compressed):
        """As old writers leave it in the map of 16 bits, which libtiff tells by its largest number."""
        colours = [full] * 256 + [0] * 256 + [full // 2] * 256
        file = tiff(flat(7, "u1"), 8, photometric=3, order=order, is_compressed=is_compressed, colours=colours)
        scale = 1 if is_small else 256
        assert read_rgb(file).getpixel((3, 3)) == (full // scale, 0, full // 2 // scale)
        assert (SMALL_PALETTE in read_header(file).oddities) == is_small

    def test_grey_with_alpha_in_16_bits_is_refused_by_what_it_is(self):
        with pytest.raises(OSError, match=r"2 channels of 16 bits \(unsigned\) is not read; save it as PNG"):
            read_rgb(tiff(bytes(4 * 64), 16, channels=2))
        with pytest.raises(OSError, match="a TIFF of this kind is not read"):
            read_rgb(b"II*\0" + bytes(60))

    def test_big_endian(self):
        assert np.asarray(read_rgb(tiff(ramp(0, 65535, ">u2"), 16, order=">"))).reshape(-1)[[0, -1]].tolist() == [
            0,
            255,
        ]
        found = read_rgb(tiff(ramp(0, 255, ">i4"), 32, SIGNED, order=">"))
        assert np.asarray(found).reshape(-1)[[0, -1]].tolist() == [0, 255]

    def test_planar_colours_of_8_bits_are_read(self):
        colours = np.concatenate([flat(value, "u1") for value in (10, 20, 30)])
        assert read_rgb(tiff(colours, 8, photometric=2, channels=3, is_planar=True)).getpixel((3, 3)) == (10, 20, 30)

    def test_other_formats_of_deep_grey(self):
        """PIL brings a PGM's and a JPEG 2000's to 16 bits; a PFM is of floats."""
        assert read_rgb(b"P5 8 8 1000\n" + flat(1000, ">u2").tobytes()).getpixel((0, 0)) == (255,) * 3
        assert read_rgb(b"Pf\n8 8\n-1.0\n" + flat(0.5, "<f4").tobytes()).getpixel((0, 0)) == (128,) * 3
        with pytest.raises(ValueError, match="from 0 to 7"):
            read_rgb(b"Pf\n8 8\n-1.0\n" + ramp(0, 7, "<f4").tobytes())
        deep = Image.fromarray(np.full((8, 8), 65535, np.uint16))
        for kind in ("PNG", "JPEG2000"):
            assert read_rgb(encoded(deep, kind)).getpixel((0, 0)) == (255,) * 3
            assert UNCOMMON not in read_header(encoded(deep, kind)).oddities

    def test_a_mask_of_floats_and_one_of_labels(self):
        white = mask_values(b"", MaskFile(tiff(flat(1, "<f4"), 32, FLOAT), is_alpha=False))
        assert white.brightest == 1
        with pytest.raises(ValueError, match="can't tell"):
            mask_values(b"", MaskFile(tiff(flat(1, "<i4"), 32, SIGNED), is_alpha=False))

    @pytest.mark.parametrize("kind", ["BC6H_UF16", "BC6H_SF16"])
    def test_textures_of_a_high_dynamic_range_are_not_read(self, kind):
        code = {"BC6H_UF16": 95, "BC6H_SF16": 96}[kind]
        head = struct.pack("<7I44x", 124, 0x1007, 8, 8, 0, 0, 0) + struct.pack("<II4s5I", 32, 4, b"DX10", 0, 0, 0, 0, 0)
        head += struct.pack("<5I", 0x1000, 0, 0, 0, 0) + struct.pack("<5I", code, 3, 0, 1, 0)
        with pytest.raises(OSError, match="high dynamic range images are not read"):
            read_header(b"DDS " + head + bytes(64))

    def test_a_qoi_that_is_marked_as_linear_is_named(self):
        """Pillow marks all that it writes so: the mark does not say what their colours are."""
        image, odd = picture(16, 16), "marked as linear light (QOI), read as sRGB"
        marked, usual = encoded(image, "QOI"), encoded(image, "QOI", colorspace="sRGB")
        assert [odd in read_header(content).oddities for content in (marked, usual)] == [True, False]
        assert np.array_equal(np.asarray(read_rgb(marked)), np.asarray(image))


KEYED = [  # depth, PNG's kind of colours, the pixels of a line, the transparent one, and the alpha of the first pixels
    (1, 0, b"\xf0", (1,), [0, 0, 0, 0, 255, 255, 255, 255]),
    (1, 0, b"\xf0", (0,), [255, 255, 255, 255, 0, 0, 0, 0]),
    (2, 0, b"\x1b\x1b", (0,), [0, 255, 255, 255]),
    (2, 0, b"\x1b\x1b", (2,), [255, 255, 0, 255]),
    (2, 0, b"\x1b\x1b", (3,), [255, 255, 255, 0]),
    (4, 0, b"\x0f\x17", (15,), [255, 0, 255, 255]),
    (4, 0, b"\x0f\x17", (1,), [255, 255, 0, 255]),
    (8, 0, b"\x12\x13", (0x12,), [0, 255]),
    (8, 0, b"\x12\x13", (0x5512,), [0, 255]),  # of which the lower byte counts
    (16, 0, b"\x12\x34\x12\x35", (0x1234,), [0, 255]),
    (8, 2, b"\1\2\3\1\2\4", (1, 2, 3), [0, 255]),
    (16, 2, b"\x12\x34" * 3 + b"\x12\x34\x12\x34\x12\x35", (0x1234,) * 3, [0, 255]),
    (16, 2, b"\x12\x34" * 3 + b"\x12\x35" * 3, (0x1234,) * 3, [0, 255]),
    (16, 2, b"\0\1\0\2\0\3" + b"\1\1\2\2\3\3", (1, 2, 3), [0, 255]),  # PIL compares these with the higher bytes
]


class TestTransparentColours:
    @pytest.mark.parametrize(("depth", "colour", "pixels", "clear", "alpha"), KEYED)
    def test_one_transparent_colour_of_a_png(self, depth, colour, pixels, clear, alpha):
        plain = png(depth, colour, pixels)
        keyed = png(depth, colour, pixels, (b"tRNS", struct.pack(f">{len(clear)}H", *clear)))
        assert "transparent" in read_header(keyed).oddities
        rgb, found = read_layers(keyed, "#010203")
        assert np.asarray(found)[0, : len(alpha)].tolist() == alpha
        expected = np.where(np.array(alpha)[:, None] == 0, (1, 2, 3), np.asarray(read_rgb(plain))[0, : len(alpha)])
        assert np.asarray(rgb)[0, : len(alpha)].tolist() == expected.tolist()
        assert read_layers(plain, "white")[1] is None
        for channels in (1, 3, 4):
            for is_deep in (False, True):
                options = PixelOptions(resolution=8, image_channels=channels, preserve_input_precision=is_deep)
                seen = np.asarray(options.layers(keyed)[0])
                if channels == 4:
                    assert seen[0, : len(alpha), 3].tolist() == alpha
                deep = np.asarray(read_deep(keyed, 3, "#010203")[0])[0, : len(alpha)]
                assert np.abs(deep - expected).max() < 1
        assert (UNCOMMON in read_header(keyed).oddities) == (
            clear == (0x5512,) or (depth not in (1, 8) and clear != (0,))
        )

    def test_the_lower_bytes_are_kept_beside_a_transparent_colour(self):
        keyed = png(16, 2, b"\x12\x80" * 3 + b"\x12\x34" * 3, (b"tRNS", b"\x12\x34" * 3))
        found = np.asarray(read_deep(keyed, 4, "white")[0])
        assert found[0, 0].tolist() == pytest.approx([0x1280 / 257] * 3 + [255])
        assert found[0, 1, 3] == 0

    def test_large_ones_are_halved_with_their_transparent_colour(self, monkeypatch):
        monkeypatch.setattr("utils.data.images.FULL_PIXELS", 32)
        monkeypatch.setattr("utils.data.images.MOST_PIXELS_PER_BYTE", MANY_PIXELS)
        alpha = read_layers(png(2, 0, b"\xf0\xf0", (b"tRNS", b"\0\3")), "white")[1]
        assert np.asarray(alpha)[0].tolist() == [0, 255, 0, 255]
        deep = png(16, 0, b"\x12\x34\x12\x35" * 8, (b"tRNS", b"\x12\x34"))
        for read in (read_header, read_rgb):
            with pytest.raises(ValueError, match="with a transparent colour are not read"):
                read(deep)

    def test_a_transparent_colour_behind_the_pixels_is_none(self):
        late = png(8, 0, b"\x12\x13", late=(b"tRNS", b"\0\x12"))
        assert "transparent" not in read_header(late).oddities
        assert read_layers(late, "white")[1] is None


def test_what_is_cached_of_images_stays_but_where_their_pixels_changed():
    assert how_read(("palette", "turned by EXIF", DARK)) == b""
    assert how_read((UNCOMMON, CONVERTED)) == b"in sRGBby bit depth"  # as earlier releases wrote it
    kinds = [(TURNED_ANEW,), (CLIPPED,), (SMALL_PALETTE,), (UNCOMMON,), (UNCOMMON, CLIPPED)]
    assert len({how_read(names) for names in kinds}) == len(kinds)


def test_sixteen_bits_reach_the_model(tmp_path):
    from utils.config.batch import RecordPass
    from utils.data.crop_pixels import cut_out
    from utils.data.options import PixelOptions

    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    found = {}
    for deep in (False, True):
        options = PixelOptions(image_channels=1, center_crop=True, preserve_input_precision=deep)
        pixels = cut_out(str(tmp_path / "ramp.png"), None, (64, 64), options, 0, RecordPass(0, 0)).pixels
        assert pixels.shape == (1, 64, 64)
        found[deep] = pixels
    np.testing.assert_allclose(found[True][0], ramp / 257, atol=1e-3)
    assert len(np.unique(found[True])) == 4096
    assert len(np.unique(found[False])) <= 256


def png_of(values: np.ndarray) -> bytes:
    """A PNG of 16-bit colours [H, W, 3 or 4], which PIL can't write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_of(values: np.ndarray, order: str, is_compressed: bool) -> bytes:
    """A TIFF of 16-bit colours [H, W, 3 or 4], its bytes in the order "<" or ">"."""
    height, width, channels = values.shape
    content = values.astype(f"{order}u2").tobytes()
    content = zlib.compress(content) if is_compressed else content
    content += b"\0" * (len(content) % 2)
    tags = {256: width, 257: height, 258: 0, 259: 8 if is_compressed else 1, 262: 2, 273: 8, 277: channels, 278: height}
    tags |= {279: len(content), 284: 1} | ({338: 2} if channels == 4 else {})
    begin = 8 + len(content)
    tags[258] = begin + 2 + 12 * len(tags) + 4  # where the bits of each channel stand
    entries = [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items() if tag != 258]
    entries.insert(2, struct.pack(f"{order}HHII", 258, 3, channels, tags[258]))
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", begin)
    directory = struct.pack(f"{order}H", len(tags)) + b"".join(entries) + struct.pack(f"{order}I", 0)
    return magic + content + directory + struct.pack(f"{order}H", 16) * channels


SIXTEEN_BITS = {
    "png": png_of,
    "tiff": lambda values: tiff_of(values, "<", False),
    "big-endian tiff": lambda values: tiff_of(values, ">", False),
    "compressed tiff": lambda values: tiff_of(values, "<", True),
    "compressed big-endian tiff": lambda values: tiff_of(values, ">", True),
}


@pytest.mark.parametrize("has_alpha", [False, True])
@pytest.mark.parametrize("form", SIXTEEN_BITS)
def test_sixteen_bits_of_colours_reach_the_model(form, has_alpha):
    from utils.data.pixels import read_deep

    colours = np.random.default_rng(0).integers(0, 65536, (24, 40, 3), np.uint16)
    alpha = np.full((24, 40, 1), 40001, np.uint16)
    file = SIXTEEN_BITS[form](np.concatenate([colours, alpha], axis=2) if has_alpha else colours)
    plain = colours / 257
    on_black = plain * (40001 / 65535 if has_alpha else 1)
    expected = {
        1: on_black @ [[0.299], [0.587], [0.114]],
        3: on_black,
        4: np.concatenate([plain, alpha / 257 if has_alpha else alpha * 0.0 + 255], axis=2),
    }
    for channels, values in expected.items():
        found, seen = read_deep(file, channels, "black")
        np.testing.assert_allclose(np.asarray(found), values, atol=1e-3)
        assert (seen is not None) == has_alpha


def test_integers_beyond_sixteen_bits_are_not_all_white(tmp_path):
    from utils.data.pixels import read_deep

    values = np.linspace(0, 2**31 - 1, 64 * 64).reshape(64, 64).astype(np.int32)
    Image.fromarray(values).save(tmp_path / "deep.tiff")
    found, _ = read_deep(str(tmp_path / "deep.tiff"), 1, "white")
    np.testing.assert_allclose(np.asarray(found)[..., 0], values / (2**31 - 1) * 255, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("deep", [False, True])
def test_channels_of_an_image(tmp_path, channels, deep):
    from utils.config.batch import RecordPass
    from utils.data.crop_pixels import cut_out
    from utils.data.options import PixelOptions

    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 0], pixels[:, :4, 3] = 200, 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    options = PixelOptions(image_channels=channels, preserve_input_precision=deep, center_crop=True)
    found = cut_out(str(tmp_path / "half.png"), None, (8, 8), options, 0, RecordPass(0, 0)).pixels
    assert found.dtype == (np.float32 if deep else np.uint8)
    seen = {1: ([60], [255]), 3: ([200, 0, 0], [255, 255, 255]), 4: ([200, 0, 0, 255], None)}[channels]
    np.testing.assert_allclose(found[:, 4, 0], seen[0], atol=1)
    if seen[1] is not None:
        np.testing.assert_allclose(found[:, 4, 7], seen[1], atol=1)
    else:
        assert found[3, 4, 7] == 0
