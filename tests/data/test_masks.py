"""Masks found, cut as their images are, and weighed."""

import json
import shutil
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.masked import STILL, WHITE, mask_image, masked_folder
from tests.records import records_of
from utils.config.batch import MaskFile, Noised, RecordPass
from utils.config.options import UserError
from utils.data.crop_pixels import cut_out
from utils.data.images import read_mask
from utils.data.masks import FolderMasks, called_masks
from utils.data.options import ImageOptions
from utils.diffusion.losses import mask_weights, weighted_loss
from utils.diffusion.options import LossOptions
from utils.training.preparation import warn_of_called_masks


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
        with pytest.raises(ValueError, match="its mask of 90x120 does not have the shape of 120x90"):
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
        with pytest.raises(OSError, match=r"2\.\w+ and 2\.\w+ are copies of it, not masks"):
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
        assert (
            "1 training images have names of masks of others, such as a_mask.png of a.png; if they are masks"
            in caplog.text
        )

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
        with pytest.raises(UserError, match=r"--mask_column m\.png: no member of the 1 tar shards has this"):
            records_of(tmp_path / "shard.tar", mask_column="m.png")
