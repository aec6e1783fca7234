"""Masked loss: masks found, cut as their images are, cached, and weighed."""

import io
import json
import shutil
import tarfile
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from tests import tiny
from tests.test_cache import files
from tests.test_data import records_of
from tests.test_equivalences import assert_same_bits, losses, weights
from utils.config.batch import MaskFile, Noised, RecordPass
from utils.config.options import UserError
from utils.data import stream
from utils.data import survey as headers
from utils.data.crop_pixels import cut_out
from utils.data.encodings import MaskPlan
from utils.data.images import read_mask
from utils.data.mask_values import MaskCensus, mask_values
from utils.data.masks import FolderMasks, called_masks
from utils.data.oddities import ODDITIES, UNCOMMON
from utils.data.options import ImageOptions
from utils.data.survey import take_census
from utils.diffusion.losses import mask_weights, weighted_loss
from utils.diffusion.options import LossOptions
from utils.training.preparation import warn_of_called_masks

MASKED = (40, 20, 90, 70)  # left, top, right, bottom


def mask_image(size: tuple[int, int] = (120, 90), box: tuple[int, int, int, int] = MASKED) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def masked_folder(folder: Path, count: int = 6, in_alpha: bool = False) -> Path:
    """Images of which each has a mask, in its alpha channel or in `masks` beside the folder."""
    random = np.random.default_rng(0)
    masks = folder.parent / "masks"
    folder.mkdir(parents=True)
    masks.mkdir(exist_ok=True)
    for number in range(count):
        image = Image.fromarray(random.integers(0, 255, (90, 120, 3), np.uint8))
        mask = mask_image(box=(10 * number, 20, 10 * number + 50, 70))
        if in_alpha:
            image.putalpha(mask)
        else:
            mask.save(masks / f"{number}.png")
        image.save(folder / f"{number}.webp", lossless=True, exact=True)
        (folder / f"{number}.txt").write_text(f"image {number}")
    return folder


class TestCut:
    @pytest.mark.parametrize("degrees", [0.0, 20.0])
    @pytest.mark.parametrize("scale", [1, 2])
    def test_a_mask_is_cut_as_its_image_is(self, tmp_path, degrees, scale):
        """The image is its own mask, painted: in every crop, mirrored or turned, both show the same."""
        mask = mask_image()
        mask.convert("RGB").save(tmp_path / "image.png")
        mask.resize((120 * scale, 90 * scale), Image.Resampling.NEAREST).save(tmp_path / "mask.png")
        options = ImageOptions(random_flip=True, random_rotation=degrees, color_jitter=0.0)
        seen = set()
        for identity in range(20):
            file = MaskFile(str(tmp_path / "mask.png"), is_alpha=False)
            image, passing = str(tmp_path / "image.png"), RecordPass(identity, 0)
            found = cut_out(image, file, (48, 48), options, 0, passing, (24, 24))
            means = found.pixels[0].astype(float).reshape(24, 2, 24, 2).mean((1, 3))
            assert found.mask.shape == (24, 24)
            assert np.abs(means - found.mask).mean() < 4
            seen.add(found.mask.tobytes())
        assert len(seen) > 2

    def test_alpha_and_brightness(self, tmp_path):
        image = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
        image.paste((0, 255, 0, 128), (0, 0, 16, 32))
        image.save(tmp_path / "a.png")
        arguments = (str(tmp_path / "a.png"), MaskFile(b"", is_alpha=True), (32, 32), ImageOptions(), 0)
        mask = cut_out(*arguments, RecordPass(0, 0), (4, 4)).mask
        assert mask.tolist() == [[128, 128, 255, 255]] * 4
        Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
        mask = cut_out(str(tmp_path / "b.png"), *arguments[1:], RecordPass(0, 0), (4, 4)).mask
        assert (mask == 255).all()

    def test_a_mask_of_another_shape_is_refused(self, tmp_path):
        mask_image().save(tmp_path / "a.png")
        mask_image().rotate(90, expand=True).save(tmp_path / "turned.png")
        file = MaskFile(str(tmp_path / "turned.png"), is_alpha=False)
        with pytest.raises(ValueError, match="its mask of 90x120 has not the shape of 120x90"):
            cut_out(str(tmp_path / "a.png"), file, (32, 32), ImageOptions(), 0, RecordPass(0, 0), (4, 4))


class TestLoss:
    @pytest.mark.parametrize("unmasked", [0.0, 0.25])
    @pytest.mark.parametrize("normalized", [False, True])
    def test_against_a_sum_over_places(self, unmasked, normalized):
        random = np.random.default_rng(0)
        error, masks = random.standard_normal((3, 4, 5, 6)), random.integers(0, 256, (3, 1, 5, 6), np.uint8)
        zeros = torch.zeros(3, 4, 5, 6)
        noised = Noised(zeros, zeros, torch.zeros(3, dtype=torch.int64), torch.ones(3), 1000)
        options = LossOptions(unmasked_weight=unmasked, normalize_masked_loss=normalized)
        found = weighted_loss(torch.from_numpy(error), noised, "epsilon", options, torch.from_numpy(masks))
        for sample in range(3):
            share = np.maximum(masks[sample, 0] / 255, unmasked)
            expected = (error[sample] ** 2 * share).sum() / error[sample].size
            expected /= share.mean() if normalized else 1
            assert float(found[sample]) == pytest.approx(expected, rel=1e-5)

    def test_a_black_mask_stays_finite(self):
        options = LossOptions(normalize_masked_loss=True)
        assert torch.isfinite(mask_weights(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), options)).all()


def masks_of(records) -> dict[str, str | bytes | None]:
    """The mask of each image by its name: the name of its file, or its bytes."""
    found = {}
    for index in range(len(records)):
        mask = records.mask(index)
        is_path = mask is not None and isinstance(mask.source, str)
        found[records.key(index)] = Path(mask.source).name if is_path else mask and mask.source
    return found


class TestSources:
    def test_a_folder_of_masks(self, tmp_path):
        data = masked_folder(tmp_path / "data", 3)
        (tmp_path / "masks" / "1.png").rename(tmp_path / "masks" / "1-masklabel.png")
        (tmp_path / "masks" / "2.png").unlink()
        records = records_of(data, mask_dir=str(tmp_path / "masks"))
        assert masks_of(records) == {"0.webp": "0.png", "1.webp": "1-masklabel.png", "2.webp": None}

    @pytest.mark.parametrize("second", ["0.jpg", "0.PNG", "0.tiff"])
    def test_of_several_masks_of_an_image_none_is_taken_in_silence(self, train, tmp_path, caplog, capsys, second):
        data, masks = masked_folder(tmp_path / "data", 3), tmp_path / "masks"
        Image.new("L", (120, 90)).save(masks / second)
        records = records_of(data, mask_dir=str(masks))
        assert f"--mask_dir {masks}: 1 images have several masks, such as " in caplog.text
        with pytest.raises(OSError, match=r"0\.\w+ and 0\.\w+ are its masks; keep one"):
            read_mask(records.mask(0).source)
        assert masks_of(records)["1.webp"] == "1.png"
        train("sd", *STILL, "--mask_dir", masks, data=data, expect=2)
        assert "0.webp: its mask can't be read: " in capsys.readouterr().err

    @pytest.mark.parametrize("as_bytes", [False, True])
    def test_a_copy_of_the_image_is_no_mask_of_it(self, tmp_path, as_bytes):
        data, masks = masked_folder(tmp_path / "data", 3), tmp_path / "masks"
        shutil.copy(data / "0.webp", masks)
        shutil.copy(data / "1.webp", masks)
        (masks / "1.png").rename(masks / "1.tiff")
        shutil.copy(data / "2.webp", masks)
        shutil.copy(data / "2.webp", masks / "2.png")
        table = FolderMasks(masks)

        def mask_of(key: str) -> str | bytes:
            return table.named(key, lambda: (data / key).read_bytes() if as_bytes else str(data / key)).source

        assert [Path(mask_of(key)).name for key in ("0.webp", "1.webp")] == ["0.png", "1.tiff"]
        with pytest.raises(OSError, match=r"2\.\w+ and 2\.\w+ are copies of it and no masks"):
            read_mask(mask_of("2.webp"))

    def test_images_of_one_name_take_the_masks_of_their_own_endings(self, tmp_path):
        data = masked_folder(tmp_path / "data", 1)
        mask_image().rotate(180).save(data / "0.jpg")
        for name in ("0.jpg", "0.webp"):
            mask_image().save(tmp_path / "masks" / name)
        assert masks_of(records_of(data, mask_dir=str(tmp_path / "masks"))) == {"0.jpg": "0.jpg", "0.webp": "0.webp"}

    @pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
    @pytest.mark.parametrize("label", ["", "-masklabel"])
    def test_names_match_in_any_unicode_normal_form(self, tmp_path, forms, label):
        """As macOS and archives have them; where both are there, each image takes its own."""
        key, mask = (unicodedata.normalize(form, "häuser/café") for form in forms)
        (tmp_path / mask).parent.mkdir()
        (tmp_path / f"{mask}{label}.png").write_bytes(WHITE)
        found = FolderMasks(tmp_path).named(f"{key}.jpg", lambda: b"")
        assert found.source == str(tmp_path / f"{mask}{label}.png")
        if not label:
            (tmp_path / key).parent.mkdir()
            (tmp_path / f"{key}.png").write_bytes(WHITE)
            found = FolderMasks(tmp_path)
            for name in (key, mask):
                assert found.named(f"{name}.png", lambda: b"").source == str(tmp_path / f"{name}.png")

    def test_images_that_are_called_masks_of_others_are_named(self, tmp_path, caplog):
        pairs = called_masks(
            [
                *["1.png", "1_mask.png", "2.jpg", "2-MASK.png", "3.png", "3.mask.png", "4.png", "4-masklabel.png"],
                *["x/5.png", "x/masks/5.jpg", "y/images/6.png", "y/mask/6.png", "z_mask.png", "damask.png"],
                *["masks/7.png", "cats/7.png", "8mask.webp", "8.webp", "masked.png", "mask.png", "da.png"],
                *["9_matte.png", "9.png", "images/10.png", "masks/10_mask.png", "a_mask_mask.png", "a_mask.png"],
            ]
        )
        names = ["1_mask.png", "2-MASK.png", "3.mask.png", "4-masklabel.png", "x/masks/5.jpg", "y/mask/6.png"]
        names += ["8mask.webp", "9_matte.png", "masks/10_mask.png", "a_mask_mask.png"]
        assert [mask for mask, _ in pairs] == names
        assert dict(pairs)["y/mask/6.png"] == "y/images/6.png"
        for name in ("a.png", "a_mask.png", "b.png"):
            (tmp_path / name).write_bytes(WHITE)
        warn_of_called_masks(records_of(tmp_path))
        assert "1 images are called as masks of others, such as a_mask.png of a.png, and are trained" in caplog.text

    def test_an_image_is_not_its_own_mask(self, tmp_path):
        data = masked_folder(tmp_path / "data", 3)
        (tmp_path / "masks" / "1.png").rename(data / "1-masklabel.png")
        (tmp_path / "images").mkdir()
        shutil.copy(data / "0.webp", tmp_path / "images")
        with pytest.raises(UserError, match=r"must hold masks called NAME-masklabel\.png"):
            records_of(tmp_path / "images", mask_dir=str(tmp_path / "images"))
        assert masks_of(records_of(data, mask_dir=str(data))) == {
            "0.webp": None,
            "1.webp": "1-masklabel.png",
            "2.webp": None,
        }

    @pytest.mark.parametrize("inside", ["masks", "."])
    def test_masks_among_the_images_are_not_images(self, tmp_path, inside):
        data = masked_folder(tmp_path / "data", 3)
        for mask in sorted((tmp_path / "masks").iterdir()):
            name = mask.name if inside == "masks" else f"{mask.stem}-masklabel.png"
            (data / inside).mkdir(exist_ok=True)
            shutil.move(mask, data / inside / name)
        records = records_of(data, mask_dir=str(data / inside))
        assert list(masks_of(records)) == ["0.webp", "1.webp", "2.webp"]
        assert all(masks_of(records).values())

    def test_a_column_of_metadata(self, tmp_path):
        data = masked_folder(tmp_path / "data", 3)
        shutil.move(tmp_path / "masks", data / "masks")
        rows = [{"file_name": f"{number}.webp", "text": "x", "where": f"masks/{number}.png"} for number in range(2)]
        rows.append({"file_name": "2.webp", "text": "y", "where": None})
        (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        records = records_of(data, mask_column="where")
        assert masks_of(records) == {"0.webp": "0.png", "1.webp": "1.png", "2.webp": None}
        assert records.sources[0].table.num_left_out == 1  # the mask that no row names
        with pytest.raises(UserError, match="did you mean --mask_column where"):
            records_of(data, mask_column="wher")

    def test_a_column_of_a_dataset_and_a_member_of_a_tar(self, tmp_path):
        import datasets

        data, masks = masked_folder(tmp_path / "data", 3), tmp_path / "masks"
        rows = {
            "image": [str(data / f"{number}.webp") for number in range(3)],
            "mask": [str(masks / "0.png"), None, str(masks / "2.png")],
            "text": ["a", "b", "c"],
        }
        rows = {
            name: [{"path": None, "bytes": Path(v).read_bytes()} if v and v[0] == "/" else v for v in values]
            for name, values in rows.items()
        }
        features = datasets.Features(
            {"image": datasets.Image(), "mask": datasets.Image(), "text": datasets.Value("string")}
        )
        (tmp_path / "rows").mkdir()
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows" / "train.parquet")
        found = masks_of(records_of(tmp_path / "rows", mask_column="mask"))
        with tarfile.open(tmp_path / "shard.tar", "w") as archive:
            for number in range(3):
                archive.add(data / f"{number}.webp", f"{number}.webp")
                if number != 1:
                    archive.add(masks / f"{number}.png", f"{number}.mask.png")
        of_tar = masks_of(records_of(tmp_path / "shard.tar", mask_column="mask.png"))
        for number in range(3):
            expected = None if number == 1 else (masks / f"{number}.png").read_bytes()
            assert found[f"row {number}"] == expected
            assert of_tar[f"shard.tar/{number}.webp"] == expected
        with pytest.raises(UserError, match=r"--mask_column masc is not a column.*did you mean --mask_column mask"):
            records_of(tmp_path / "rows", mask_column="masc")
        with pytest.raises(UserError, match=r"--mask_column m\.png is the ending of no member"):
            records_of(tmp_path / "shard.tar", mask_column="m.png")


def values(array: object, kind: str = "PNG") -> bytes:
    """A mask's file of an array."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(array)).save(file, kind)
    return file.getvalue()


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


BLACK, WHITE = values(np.zeros((8, 8), np.uint8)), values(np.full((8, 8), 255, np.uint8))


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
        assert "2 of 4 masks hold mostly values near black, as numbers of classes are, such as 0.png, 1.png;" in line
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
        lines = [line for line in census_of(*masks, WHITE).warnings() if "greys" in line]
        assert lines[0].startswith("--mask_dir m: 3 of 4 masks have flat areas of together ")
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
        assert not [line for line in census_of(*soft, WHITE).warnings() if "greys" in line]

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
        assert "2 of 3 masks are copies of their images, whose brightness" in "".join(census.warnings())
        assert "such as 1.png, 2.png; give masks" in "".join(census.warnings())

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
        assert "1 of 2 masks that were looked at have colours" in census_of(red, WHITE, count=9).warnings()[0]
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
        words = "--mask_column m.png: all 3 masks that were looked at are black everywhere"
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


STILL = ["--train_batch_size", 2, "--max_train_steps", 4, "--learning_rate", 1e-3, "--adam_weight_decay", 0]


class TestRuns:
    def test_what_is_masked_does_not_train(self, train, pipelines, tmp_path):
        """Transparent images leave the weights as they are, and with a weight for them do not."""
        data = tmp_path / "data"
        data.mkdir()
        for number in range(4):
            image = Image.new("RGBA", (32, 64), (60 * number, 99, 0, 0))
            image.paste((0, 0, 0, 255), (0, 0, 32, 8))  # which is cropped away
            image.save(data / f"{number}.png")
        flags = [*STILL, "--center_crop"]
        still = train("sd", *flags, "--alpha_mask", data=data)
        assert_same_bits(weights(still), weights(Path(pipelines["sd"])))
        moved = train("sd", *flags, "--alpha_mask", "--unmasked_weight", 0.5, data=data, out="moved")
        plain = train("sd", *flags, data=data, out="plain")
        assert losses(moved)[0] == pytest.approx(0.5 * losses(plain)[0], rel=1e-5)

    def test_a_cached_run_is_a_live_one_and_masks_encode_no_image_again(self, train, tmp_path):
        data = masked_folder(tmp_path / "data")
        cache = tmp_path / "cache"
        flags = [*STILL, "--center_crop", "--encoding_cache_dir", cache]
        plain = train("sd", *flags, "--cache_latents", data=data, out="plain")
        before = files(cache / "latents")
        masked = [*flags, "--mask_dir", tmp_path / "masks"]
        live = train("sd", *masked, data=data, out="live")
        cached = train("sd", *masked, "--cache_latents", data=data, out="cached")
        assert files(cache / "latents") == before
        assert losses(cached) == pytest.approx(losses(live), rel=1e-5)
        assert losses(cached) != pytest.approx(losses(plain), rel=1e-2)
        known = files(cache / "masks")
        mask_image(box=(0, 0, 120, 90)).save(tmp_path / "masks" / "3.png")
        changed = train("sd", *masked, "--cache_latents", data=data, out="changed")
        assert known.items() <= files(cache / "masks").items()
        assert len(files(cache / "masks")) == len(known) + 1
        assert losses(changed) != losses(cached)

    def test_alpha_and_a_stream_of_them(self, train, tmp_path):
        data, alpha = masked_folder(tmp_path / "data"), masked_folder(tmp_path / "alpha", in_alpha=True)
        flags = [*STILL, "--center_crop", "--validation_split", 0.3]
        from_files = train("sd", *flags, "--mask_dir", tmp_path / "masks", data=data, out="files")
        from_alpha = train("sd", *flags, "--alpha_mask", data=alpha, out="from alpha")
        shown = [json.loads((out / "data_report.json").read_text())["masked"] for out in (from_files, from_alpha)]
        assert shown == [json.loads((from_files / "data_report.json").read_text())["trained"]] * 2
        with tarfile.open(tmp_path / "shard.tar", "w") as archive:
            for number in range(6):
                for file, name in (
                    (data / f"{number}.webp", f"{number}.webp"),
                    (data / f"{number}.txt", f"{number}.txt"),
                ):
                    archive.add(file, name)
                content = (tmp_path / "masks" / f"{number}.png").read_bytes()
                member = tarfile.TarInfo(f"{number}.mask.png")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        streamed = [*STILL, "--streaming", "--center_crop", "--shuffle_buffer_size", 1]
        shard = tmp_path / "shard.tar"
        masked = train("sd", *streamed, "--mask_column", "mask.png", data=shard, out="masked")
        plain = train("sd", *streamed, data=shard, out="plain")
        assert losses(masked)[0] < 0.8 * losses(plain)[0]

    def test_other_masks_of_the_same_shards_are_read_anew(self, train, tmp_path):
        data = masked_folder(tmp_path / "data", 4)
        edge = io.BytesIO()
        mask_image(box=(0, 0, 8, 90)).save(edge, "PNG")  # which is cropped away
        with tarfile.open(tmp_path / "shard.tar", "w") as archive:
            for number in range(4):
                archive.add(data / f"{number}.webp", f"{number}.webp")
                left = (tmp_path / "masks" / f"{number}.png").read_bytes()
                for name, content in (("left", left), ("none", edge.getvalue())):
                    member = tarfile.TarInfo(f"{number}.{name}.png")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        time.sleep(2.1)  # the facts of a newer file would not be remembered
        flags = [*STILL, "--center_crop", "--cache_latents", "--encoding_cache_dir", tmp_path / "cache"]
        left = train("sd", *flags, "--mask_column", "left.png", data=tmp_path / "shard.tar", out="left")
        none = train("sd", *flags, "--mask_column", "none.png", data=tmp_path / "shard.tar", out="none")
        assert losses(left)[0] > 0
        assert losses(none)[0] == 0

    def test_a_run_that_goes_on_without_its_masks_is_refused(self, train, refused, tmp_path):
        data = masked_folder(tmp_path / "data")
        train("sd", *STILL, "--mask_dir", tmp_path / "masks", data=data)
        resumed = [*STILL, "--max_train_steps", 5, "--resume_from_checkpoint", "latest"]
        refused(resumed, "--masks none (it was folder)", "--allow_changed_options", data=data)

    def test_where_no_image_has_one(self, refused, tmp_path):
        data = tiny.make_images(tmp_path / "data", 4)
        refused([*STILL, "--alpha_mask"], "no image has a mask", data=data)
        (tmp_path / "others").mkdir()
        mask_image().save(tmp_path / "others" / "x.png")
        refused([*STILL, "--mask_dir", tmp_path / "others"], "no image has a mask", data=data)

    def test_bad_masks_are_named(self, train, tmp_path, capsys):
        data = masked_folder(tmp_path / "data")
        (tmp_path / "masks" / "1.png").write_bytes(b"no image")
        mask_image((90, 120)).save(tmp_path / "masks" / "2.png")
        flags = [*STILL, "--mask_dir", tmp_path / "masks"]
        train("sd", *flags, data=data, expect=2)
        error = capsys.readouterr().err
        assert "1.webp: its mask can't be read" in error
        assert "2.webp: its mask of 90x120 has not the shape of 120x90" in error
        out = train("sd", *flags, "--max_bad_fraction", 0.5, data=data)
        assert sorted(json.loads((out / "data_report.json").read_text())["unreadable"]) == ["1.webp", "2.webp"]

    @pytest.mark.parametrize(
        ("flags", "named"),
        [
            (["--alpha_mask", "--mask_dir", "."], "give one"),
            (["--mask_dir", "/nowhere"], "--mask_dir must be a folder that exists"),
            (["--mask_column", "mask"], "--mask_column mask is not a column of the data"),
            (["--unmasked_weight", 0.5], "--unmasked_weight is for images with masks"),
            (["--alpha_mask", "--unmasked_weight", 2], "--unmasked_weight must be"),
        ],
    )
    def test_what_does_not_go(self, refused, flags, named):
        refused(flags, named)
