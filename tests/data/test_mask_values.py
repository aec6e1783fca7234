"""What the values of a mask mean."""

import io
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from tests import tiny
from tests.masked import BLACK, STILL, WHITE, mask_image, masked_folder, values
from tests.records import records_of
from utils.config.batch import MaskFile
from utils.config.options import UserError
from utils.data import stream
from utils.data import survey as headers
from utils.data.encodings import MaskPlan
from utils.data.mask_values import MaskCensus, mask_values
from utils.data.oddities import ODDITIES, UNCOMMON
from utils.data.options import ImageOptions
from utils.data.survey import take_census


def census_of(*masks: bytes, count: int | None = None) -> MaskCensus:
    census = MaskCensus("--mask_dir m", len(masks) if count is None else count)
    for number, mask in enumerate(masks):
        census.add(f"{number}.png", mask_values(b"", MaskFile(mask, is_alpha=False)))
    return census


def palette(colours: list[int], index: int) -> bytes:
    image = Image.new("P", (8, 8), index)
    image.putpalette(colours)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class TestValues:
    @pytest.mark.parametrize(
        ("mask", "words"),
        [
            (BLACK, "are black everywhere (0.png, 1.png)"),
            (values(np.ones((8, 8), np.uint8)), "0.0039 of white, so the loss would count almost nowhere; multiply"),
            (values(np.full((8, 8), 5, np.uint8)), "are nearly black"),
            (values(np.ones((8, 8), np.uint16)), "1.5e-05 of white"),
            (values(np.full((8, 8), 255, np.uint16)), "0.0039 of white"),
            (values(np.full((8, 8, 4), (255, 255, 255, 0), np.uint8)), "are transparent everywhere"),
            (values(np.full((8, 8, 2), (255, 0), np.uint8)), "are transparent everywhere"),
            (palette([0, 0, 0, 1, 1, 1], 1), "0.0039 of white"),
            (palette([0, 0, 0, 255, 255, 255], 0), "are black everywhere"),
        ],
    )
    def test_masks_by_which_nothing_would_be_learnt_are_refused(self, mask, words):
        with pytest.raises(UserError) as raised:
            census_of(mask, mask).check()
        assert str(raised.value).startswith("--mask_dir m: all 2 masks are ")
        assert words in str(raised.value)
        census_of(mask, WHITE).check()

    def test_masks_that_hold_numbers_of_classes_are_named(self):
        """Also inside a border of white, and beside other masks that are white."""
        classes = np.full((16, 16), 255, np.uint8)
        classes[2:-2, 2:-2] = np.arange(144).reshape(12, 12) % 12
        bordered = values(classes)
        soft = values(np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1)))
        (line,) = census_of(bordered, values(np.ones((8, 8), np.uint8)), WHITE, soft).warnings()
        assert "2 of 4 masks hold mostly values near black, which look like class numbers, such as 0.png, 1.png" in line
        assert not census_of(WHITE, soft).warnings()

    @pytest.mark.parametrize("kind", ["stuff", "cells", "blurred at their edges"])
    def test_flat_areas_of_many_greys_are_named(self, kind):
        """As numbers of classes up to 182 are, with 255 for none."""
        random = np.random.default_rng(0)
        masks = []
        for _ in range(3):
            cells = random.choice([*range(20, 183), 255], (4, 4)).astype(np.uint8)
            mask = Image.fromarray(cells.repeat(16, 0).repeat(16, 1))
            if kind == "stuff":
                mask.paste(0, (0, 0, 64, 20))
            if kind == "blurred at their edges":
                mask = mask.resize((48, 48), Image.Resampling.BILINEAR)
            masks.append(values(mask))
        lines = [line for line in census_of(*masks, WHITE).warnings() if "grey levels" in line]
        assert lines[0].startswith("--mask_dir m: 3 of 4 masks have flat areas in ")
        assert len(lines) == 1

    def test_soft_masks_are_none_of_them(self):
        """Blurred, smooth, noisy, with smooth edges, or of a few grades."""
        random = np.random.default_rng(0)
        disc = mask_image().filter(ImageFilter.GaussianBlur(5))
        wide = Image.fromarray(np.tile(np.linspace(0, 255, 2000).astype(np.uint8), (4, 1)))
        steps = Image.fromarray(np.array([[0, 128, 255, 64]], np.uint8).repeat(32, 0).repeat(32, 1))
        smooth = Image.new("L", (400, 400))
        ImageDraw.Draw(smooth).ellipse((40, 40, 350, 300), 255)
        smooth = smooth.resize((90, 90), Image.Resampling.LANCZOS)
        noise = Image.fromarray(random.integers(0, 256, (64, 64), np.uint8))
        soft = [values(each) for each in (disc, wide, steps, smooth, noise, Image.new("L", (1, 1), 99))]
        assert not [line for line in census_of(*soft, WHITE).warnings() if "grey levels" in line]

    @pytest.mark.parametrize("in_bytes", [False, True])
    def test_masks_that_are_copies_of_their_images_are_named(self, tmp_path, in_bytes):
        census = MaskCensus("--mask_dir m", 3)
        for number in range(3):
            image = tmp_path / f"{number}.png"
            mask_image(box=(10, 10, 20 + number, 20)).save(image)
            mask = tmp_path / f"mask{number}.png"
            mask.write_bytes(image.read_bytes() if number else WHITE)
            source = mask.read_bytes() if in_bytes else str(mask)
            for given in (image.read_bytes(), str(image)):
                assert mask_values(given, MaskFile(source, is_alpha=False)).is_copy == (number > 0)
            census.add(image.name, mask_values(given, MaskFile(source, is_alpha=False)))
        assert "2 of 3 masks are copies of their images, so the image's brightness" in "".join(census.warnings())
        assert "such as 1.png, 2.png; replace them with masks" in "".join(census.warnings())

    @pytest.mark.parametrize(
        "mask",
        [
            WHITE,
            values(np.ones((8, 8), bool)),
            values(np.full((8, 8), 65535, np.uint16)),
            values(np.ones((8, 8), np.float32), "TIFF"),
            palette([0, 0, 0, 255, 255, 255], 1),
        ],
    )
    def test_what_is_white(self, mask):
        assert census_of(mask).brightest == 1
        soft = values(np.arange(256, dtype=np.uint8)[None].repeat(2, 0))
        assert census_of(mask, soft).warnings() == []
        assert "all 1 masks are white everywhere and change nothing" in census_of(mask).warnings()[0]

    def test_what_is_allowed_but_may_not_be_meant(self):
        soft, red = values(np.full((8, 8), 77, np.uint8)), values(np.full((8, 8, 3), (255, 0, 0), np.uint8))
        census_of(soft, soft).check()
        assert "all 2 masks are at most 0.3 of white" in census_of(soft, soft).warnings()[0]
        (line,) = census_of(BLACK, BLACK, BLACK, BLACK, WHITE).warnings()
        assert line.startswith("--mask_dir m: 4 of 5 masks are black everywhere")
        assert line.endswith("such as 0.png, 1.png, 2.png")
        assert "1 of 2 inspected masks have colours" in census_of(red, WHITE, count=9).warnings()[0]
        assert "have colours" in census_of(palette([0, 0, 0, 192, 128, 128], 1)).warnings()[0]

    def test_few_are_looked_at_and_all_where_these_are_black(self, tmp_path, monkeypatch):
        data = tiny.make_images(tmp_path / "data", 6)
        masks = tmp_path / "masks"
        masks.mkdir()
        for number, file in enumerate(sorted(data.glob("*.png"))):
            (masks / file.name).write_bytes(BLACK if number < 5 else WHITE)
        records = records_of(data, mask_dir=str(masks))
        looked = []
        original = headers.mask_values
        monkeypatch.setattr(headers, "mask_values", lambda *each: looked.append(each) or original(*each))
        (few,) = take_census(records, np.arange(len(records)) > 0, "--mask_dir m", 2)
        assert (few.looked_at, few.brightest) == (2, 1)
        (most,) = take_census(records, np.arange(len(records)) != 5, "--mask_dir m", 2)
        assert most.looked_at == most.black == 5
        with pytest.raises(UserError, match="all 5 masks are black everywhere"):
            most.check()
        for file in masks.iterdir():
            file.write_bytes(WHITE[:40])
        (none,) = take_census(records, np.ones(len(records), bool), "--mask_dir m", 2)
        assert none.looked_at == 0
        assert len(looked) == 2 + 5 + 2  # of masks that can't be read, as many as asked for

    @pytest.mark.parametrize("flags", [[], ["--dry_run"], ["--normalize_masked_loss", "--unmasked_weight", 0.1]])
    def test_a_run_ends_before_it_starts(self, refused, tmp_path, flags):
        data = masked_folder(tmp_path / "data", 3)
        for file in (tmp_path / "masks").iterdir():
            Image.open(file).point(lambda value: value // 255).save(file)
        where = tmp_path / "masks"
        refused([*STILL, "--mask_dir", where, *flags], f"--mask_dir {where}: all 3 masks are nearly black", data=data)

    def test_clear_images_and_masks_of_a_stream(self, refused, train, tmp_path, monkeypatch, caplog):
        (tmp_path / "clear").mkdir()
        Image.new("RGBA", (32, 32), (9, 9, 9, 0)).save(tmp_path / "clear" / "0.png")
        refused([*STILL, "--alpha_mask"], "all 1 masks are transparent everywhere", data=tmp_path / "clear")
        with tarfile.open(tmp_path / "shard.tar", "w") as archive:
            for name, content in ((f"{n}.{end}", c) for n in range(4) for end, c in (("png", WHITE), ("m.png", BLACK))):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        monkeypatch.setattr(stream, "MASKS_LOOKED_AT", 3)
        flags = [*STILL, "--streaming", "--mask_column", "m.png"]
        words = "--mask_column m.png: all 3 inspected masks are black everywhere"
        refused([*flags, "--dry_run"], words, data=tmp_path / "shard.tar")
        train("sd", *flags, data=tmp_path / "shard.tar")  # where masks of another kind may follow
        assert words in caplog.text


def test_what_is_cached_of_masks_changes_with_how_they_are_read(tmp_path):
    """Masks of uncommon bit depths are made anew, and those of 8 and 16 bits keep the keys that they had."""
    masks, data = tmp_path / "masks", tmp_path / "data"
    for folder in (masks, data):
        folder.mkdir()
    ramp = np.arange(64).reshape(8, 8)
    modes = {"a": ramp.astype(np.uint8), "b": (ramp * 1000).astype(np.uint16), "c": (ramp / 64).astype(np.float32)}
    for name, pixels in modes.items():
        Image.fromarray(ramp.astype(np.uint8)).save(data / f"{name}.png")
        Image.fromarray(pixels).save(masks / f"{name}.tiff")
    transparent = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    transparent.save(data / "d.png", transparency=(0, 0, 0))
    for flags, expected in (
        ({"mask_dir": str(masks)}, [b"", b"", b"by bit depth", None]),
        ({"alpha_mask": True}, [b"", b"", b"", b""]),
    ):
        records = records_of(data, **flags)
        known = headers.survey(records, tmp_path / "memory")
        wanted = np.ones(len(records), bool)
        headers.add_digests(known, records, wanted, tmp_path / "memory")
        headers.survey_masks(known, records, tmp_path / "memory", with_digests=True)
        planned = SimpleNamespace(survey=known, records=records)
        plan = MaskPlan(planned, ImageOptions(), 0, 1, None)
        for index, how in enumerate(expected):
            bytes_of = known.digests if "alpha_mask" in flags else known.mask_digests
            start = b"alpha" if "alpha_mask" in flags else b""
            content = b"everywhere" if how is None else start + bytes_of[index] + how
            assert plan._content(index) == content
        known.oddities[:] |= 1 << ODDITIES.index(UNCOMMON)
        assert plan._content(0).endswith(b"by bit depth") == ("alpha_mask" in flags)
