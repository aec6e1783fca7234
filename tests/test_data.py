"""The way of the data, from files to batches, against what is known of it."""

import csv
import io
import json
import math
import os
import shutil
import tarfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests import tiny
from utils.config.batch import RecordPass
from utils.config.options import UserError
from utils.data import images
from utils.data import survey as headers
from utils.data.buckets import NONE, plan_buckets
from utils.data.captions import CaptionOptions, compose, folder_caption
from utils.data.crop_plan import make_cut, plan_cut
from utils.data.images import open_image, read_header, read_rgb
from utils.data.options import BucketOptions, ImageOptions, SelectionOptions, area_buckets
from utils.data.order import GlobalBatches, Pieces
from utils.data.plan import PlannedImages, plan_images
from utils.data.source_options import DataOptions, SourceOptions
from utils.data.sources import Records, read_records
from utils.data.survey import add_digests, survey


def records_of(folder: Path | None = None, captions: CaptionOptions | None = None, **options) -> Records:
    """The records of a folder, or of the sources that the options name."""
    data = DataOptions(dataset_file=options.pop("dataset_file", None))
    if folder is not None:
        options["train_data_dir"] = str(folder)
    return read_records(data, SourceOptions(**options), captions or CaptionOptions(), 0)


def plan(
    folder: Path,
    resolution: int,
    buckets: BucketOptions | None = None,
    group_size: int = 1,
    memory: Path = Path(os.environ["HF_HOME"]),
    selection: SelectionOptions | None = None,
    **options,
) -> PlannedImages:
    """A folder's images, planned."""
    records = records_of(folder, **options)
    known = survey(records, memory)
    selection = selection or SelectionOptions()
    return plan_images(
        records, known, resolution, group_size, buckets or BucketOptions(), selection, lambda count, bad: None
    )


def uses(batches: GlobalBatches, steps: int, count: int) -> np.ndarray:
    """How often each record is drawn in the first steps."""
    drawn = Counter(batches.draw(step, slot).record for step in range(steps) for slot in range(batches.size))
    return np.array([drawn[record] for record in range(count)])


def one_source(bucket_of: np.ndarray, size: int, group_size: int, seed: int = 0) -> GlobalBatches:
    return GlobalBatches(bucket_of, np.zeros(len(bucket_of), int), [Fraction(1)], size, group_size, seed)


class TestSampler:
    @pytest.mark.parametrize(("num_records", "size"), [(6, 4), (5, 8), (100, 7), (3, 3)])
    def test_each_record_is_drawn_once_a_pass(self, num_records, size):
        batches = one_source(np.zeros(num_records, int), size, 1, seed=3)
        steps = batches.steps_in(epochs=size)
        drawn = [batches.draw(step, slot)[:2] for step in range(steps) for slot in range(size)]
        assert Counter(drawn) == Counter({(r, p): 1 for r in range(num_records) for p in range(size)})
        assert batches.epochs_before(steps) == size

    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("epochs", [1, 3])
    def test_in_buckets_each_image_is_used_once_an_epoch_give_or_take_one(self, seed, epochs):
        random = np.random.default_rng(seed)
        group = int(random.choice([1, 2, 4, 8]))
        counts = random.integers(group, 120, 12)
        bucket_of = np.repeat(np.arange(12), counts)
        batches = one_source(bucket_of, group * int(random.integers(1, 6)), group, seed)
        steps = batches.steps_in(epochs)
        assert np.abs(uses(batches, steps, len(bucket_of)) - epochs).max() <= 1
        assert batches.epochs_before(steps) == epochs
        for step in range(steps):  # a group is of one bucket
            buckets = [batches.draw(step, slot).bucket for slot in range(batches.size)]
            assert all(len(set(buckets[at : at + group])) == 1 for at in range(0, batches.size, group))

    def test_any_step_can_be_asked_for_first(self):
        bucket_of = np.repeat(np.arange(3), [10, 20, 7])
        in_order = one_source(bucket_of, 8, 2)
        drawn = {(step, slot): in_order.draw(step, slot) for step in range(40) for slot in range(8)}
        for step, slot in [(39, 7), (0, 0), (20, 3), (3, 1)]:
            assert one_source(bucket_of, 8, 2).draw(step, slot) == drawn[step, slot]

    def test_repeats_and_weights(self):
        source_of, bucket_of = np.repeat([0, 1], [30, 300]), np.arange(330) % 3
        repeated = GlobalBatches(bucket_of, source_of, [Fraction(10), Fraction(1)], 16, 4, 0)
        used = uses(repeated, repeated.steps_in(4), 330)
        assert repeated.samples_per_epoch == 600
        assert set(used[:30]) <= {39, 40, 41}
        assert set(used[30:]) <= {3, 4, 5}
        halves = GlobalBatches(bucket_of, source_of, [Fraction(330, 60), Fraction(330, 600)], 16, 4, 0)
        used = uses(halves, 200, 330)
        assert abs(used[:30].sum() - 1600) <= 16

    @pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
    @pytest.mark.parametrize("num_buckets", [1, 2])
    def test_processes_share_the_slots(self, num_processes, num_buckets):
        batches = one_source(np.arange(20) % num_buckets, 10, 5)
        pieces = [
            piece
            for rank in range(num_processes)
            for piece in Pieces(batches, 3, rank, num_processes, first_step=5, last_step=6)
        ]
        assert [slot for piece in pieces for slot in piece.slots] == list(range(10))
        assert all(len({batches.draw(5, slot).bucket for slot in piece.slots}) == 1 for piece in pieces)


class TestBuckets:
    def test_all_sizes_of_the_area(self):
        sizes = area_buckets(512 * 512, 64, 256, 1024)
        assert {(512, 512), (1024, 256), (256, 1024), (576, 448), (448, 576), (704, 320)} <= set(sizes)
        assert all(width * height <= 512 * 512 and width % 64 == height % 64 == 0 for width, height in sizes)
        assert {(height, width) for width, height in sizes} == set(sizes)

    @pytest.mark.parametrize("seed", range(5))
    def test_the_nearest_by_the_logarithm_of_the_aspect_ratio(self, seed):
        random = np.random.default_rng(seed)
        shapes = random.integers(40, 4000, (300, 2))
        options = BucketOptions(use_aspect_ratio_buckets=True)
        planned = plan_buckets(shapes, 512, options, np.ones(300), 1)
        everywhere = options.sizes(512)
        for (width, height), number in zip(shapes, planned.bucket_of, strict=True):
            best = min(abs(math.log(width / height) - math.log(w / h)) for w, h in everywhere)
            w, h = planned.sizes[number]
            assert abs(abs(math.log(width / height) - math.log(w / h)) - best) < 1e-8

    def test_small_buckets_are_merged_and_reported(self):
        shapes = np.array([(512, 512)] * 10 + [(1024, 256)] * 3 + [(256, 1024)] * 4)
        planned = plan_buckets(shapes, 512, BucketOptions(use_aspect_ratio_buckets=True), np.ones(17), 4)
        assert sorted(planned.sizes) == [(256, 1024), (512, 512)]
        assert planned.merged == [((1024, 256), 3, [(512, 512)])]
        assert np.bincount(planned.bucket_of).min() == 4

    def test_no_upscale(self):
        shapes = np.array([(300, 400), (2000, 1000), (100, 400), (512, 512), (520, 300)])
        options = BucketOptions(use_aspect_ratio_buckets=True, no_upscale=True)
        planned = plan_buckets(shapes, 512, options, np.ones(5), 1)
        assert planned.bucket_of[2] == NONE  # its shorter edge is under the least
        sizes = [planned.sizes[number] if number != NONE else None for number in planned.bucket_of]
        assert sizes[0] == (256, 384)
        assert sizes[3] == (512, 512)
        assert sizes[4] == (512, 256)
        for size, shape in zip(sizes, shapes, strict=True):
            assert size is None or (size[0] <= shape[0] and size[1] <= shape[1])

    def test_an_explicit_list(self):
        options = BucketOptions(use_aspect_ratio_buckets=True, buckets=["512x512", "768x512"])
        planned = plan_buckets(np.array([(900, 600), (500, 500), (100, 400)]), 512, options, np.ones(3), 1)
        assert [planned.sizes[number] for number in planned.bucket_of] == [(768, 512), (512, 512), (512, 512)]

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"buckets": ["512"]}, "--use_aspect_ratio_buckets"),
            ({"use_aspect_ratio_buckets": True, "buckets": ["512"]}, "--buckets"),
            ({"use_aspect_ratio_buckets": True, "buckets": ["511x512"]}, "divisible by 8"),
            ({"use_aspect_ratio_buckets": True, "bucket_step": 12}, "--bucket_step"),
            ({"no_upscale": True}, "--no_upscale"),
        ],
    )
    def test_bad_options(self, options, named):
        with pytest.raises(UserError, match=named):
            BucketOptions(**options)


def painted(width: int, height: int) -> Image.Image:
    """An image whose red and green say the column, and whose blue says the row, both as a share of the whole."""
    columns, rows = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    pixels = np.stack([columns * 255, columns * 255, rows * 255], axis=-1)
    return Image.fromarray(pixels.round().astype(np.uint8))


class TestImages:
    @pytest.mark.parametrize("size", [(640, 400), (300, 700), (500, 500), (200, 100)])
    @pytest.mark.parametrize("target", [(256, 256), (320, 192), (128, 448)])
    @pytest.mark.parametrize("degrees", [0.0, 10.0])
    def test_the_crop_says_what_was_cut(self, size, target, degrees):
        """The painted coordinates are those that SDXL's conditioning states."""
        options = ImageOptions(random_flip=True, random_rotation=degrees)
        scale = max(target[0] / size[0], target[1] / size[1])
        for number in range(6):
            cut = plan_cut(size, target, options, 0, RecordPass(number, 0))
            pixels = make_cut(painted(*size), cut, options).astype(float)
            crop = cut.crop
            assert pixels.shape == (3, target[1], target[0])
            assert (crop.original_width, crop.original_height, crop.width, crop.height) == (*size, *target)
            if degrees:  # the middle stays in place, and what is seen is somewhat enlarged
                scale = (cut.box[2] - cut.box[0]) ** -1 * target[0]
            seen_x = pixels[0, target[1] // 2, target[0] // 2] / 255 * size[0] * scale
            seen_y = pixels[2, target[1] // 2, target[0] // 2] / 255 * size[1] * scale
            if cut.mirrored:
                seen_x = size[0] * scale - seen_x
            tolerance = (1 + degrees) * max(size) * scale / 100 + 2
            assert abs(seen_x - (crop.left + target[0] / 2)) < tolerance
            assert abs(seen_y - (crop.top + target[1] / 2)) < tolerance

    @pytest.mark.parametrize("size", [(640, 400), (401, 700), (37, 31), (1, 1), (33, 1000)])
    @pytest.mark.parametrize("interpolation", ["lanczos", "bilinear", "nearest"])
    def test_only_what_is_kept_is_resized_to_the_same_pixels(self, size, interpolation):
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))  # PIL may clip between its passes
        options = ImageOptions(image_interpolation_mode=interpolation)
        cut = plan_cut(size, (64, 48), options, 0, RecordPass(5, 0))
        scale = max(64 / size[0], 48 / size[1])
        whole = (max(64, int(size[0] * scale + 1e-9)), max(48, int(size[1] * scale + 1e-9)))
        resized = image.resize(whole, getattr(Image.Resampling, interpolation.upper()))
        left, top = cut.crop.left, cut.crop.top
        expected = np.asarray(resized.crop((left, top, left + 64, top + 48))).transpose(2, 0, 1)
        assert np.abs(make_cut(image, cut, options).astype(int) - expected).max() <= 2

    def test_a_very_long_image_takes_no_memory_for_what_is_cropped_away(self):
        image = Image.new("RGB", (60_000, 4), "red")
        options = ImageOptions()
        cut = plan_cut(image.size, (512, 512), options, 0, RecordPass(1, 0))
        assert make_cut(image, cut, options).shape == (3, 512, 512)
        assert cut.crop.left > 0

    def test_the_whole_range_is_cropped_and_half_is_mirrored(self):
        options = ImageOptions(random_flip=True)
        cuts = [plan_cut((40, 32), (32, 32), options, 0, RecordPass(number, 0)) for number in range(400)]
        assert {cut.crop.left for cut in cuts} == set(range(9))
        assert 150 < sum(cut.mirrored for cut in cuts) < 250

    def test_centre(self):
        options = ImageOptions(center_crop=True)
        cut = plan_cut((41, 32), (32, 32), options, 0, RecordPass(0, 0))
        assert (cut.crop.top, cut.crop.left) == (0, 4)
        assert cut == plan_cut((41, 32), (32, 32), options, 0, RecordPass(0, 1))

    def test_a_rotated_image_shows_no_corner(self):
        options = ImageOptions(random_rotation=30)
        image = Image.new("RGB", (300, 200), "white")
        for number in range(10):
            cut = plan_cut(image.size, (64, 64), options, 0, RecordPass(number, 0))
            assert cut.degrees != 0
            assert make_cut(image, cut, options).min() > 240  # but for the filters' ringing

    def test_color_jitter(self):
        grey = Image.new("RGB", (64, 64), (100, 100, 100))
        options = ImageOptions(color_jitter=0.3)
        means = [
            make_cut(grey, plan_cut((64, 64), (64, 64), options, 0, RecordPass(n, 0)), options).mean()
            for n in range(50)
        ]
        assert 69 <= min(means) < 80
        assert 120 < max(means) <= 131
        same = make_cut(grey, plan_cut((64, 64), (64, 64), ImageOptions(), 0, RecordPass(0, 0)), ImageOptions())
        assert same.min() == same.max() == 100

    def test_exif_orientation_is_applied(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        for kind in ("JPEG", "PNG", "WEBP"):
            file = io.BytesIO()
            painted(20, 10).save(file, kind, exif=exif)
            assert read_rgb(file.getvalue()).size == (10, 20)
            header = read_header(file.getvalue())
            assert (header.width, header.height) == (10, 20)
            assert "turned by EXIF" in header.oddities

    @pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1", "LA", "RGBA", "I;16", "F"])
    def test_modes(self, mode):
        image = Image.new("RGB", (9, 7), (200, 100, 50))
        if mode == "I;16":
            image = Image.fromarray(np.full((7, 9), 40000, np.uint16))
        file = io.BytesIO()
        image.convert(mode).save(file, "TIFF") if mode != "I;16" else image.save(file, "PNG")
        read = read_rgb(file.getvalue())
        assert (read.mode, read.size) == ("RGB", (9, 7))
        assert read_header(file.getvalue()).width == 9
        if mode == "I;16":
            assert np.asarray(read)[0, 0].tolist() == [156, 156, 156]

    def test_transparency_is_laid_on_white_or_a_chosen_colour(self):
        file = io.BytesIO()
        Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(file, "PNG")
        assert np.asarray(read_rgb(file.getvalue())).min() == 255
        assert np.asarray(read_rgb(file.getvalue(), "#102030"))[0, 0].tolist() == [16, 32, 48]
        with pytest.raises(UserError, match="--transparency_color must be a colour"):
            ImageOptions(transparency_color="no colour")

    def test_an_animation_gives_its_first_frame(self):
        file = io.BytesIO()
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
        assert np.asarray(read_rgb(file.getvalue()))[0, 0].tolist() == [255, 0, 0]
        assert "animated, first frame taken" in read_header(file.getvalue()).oddities

    def test_what_cannot_be_read_raises(self, monkeypatch):
        for source in (b"", b"text", "/nowhere.png"):
            with pytest.raises(OSError), open_image(source):
                pass
        file = io.BytesIO()
        Image.new("L", (100, 100)).save(file, "PNG")
        for limit in (40, 9000):  # over PIL's own error, and between its warning and its error
            monkeypatch.setattr(images, "MOST_PIXELS", limit)
            with pytest.raises(ValueError, match="pixels"), open_image(file.getvalue()):
                pass


class TestCaptions:
    TAGS = "one, two, three, four, five, six"

    def composed(self, caption: str, count: int = 1, **options) -> list[str]:
        made = CaptionOptions(**options)
        return [compose(caption, made, 0, RecordPass(7, variant)) for variant in range(count)]

    def test_nothing_asked_nothing_changed(self):
        assert self.composed("a , strange,, caption") == ["a , strange,, caption"]

    def test_prefix_suffix_and_trigger(self):
        assert self.composed("a dog", caption_prefix="photo of", caption_suffix="in snow") == ["photo of a dog in snow"]
        assert self.composed("a dog", trigger_word="sks") == ["sks, a dog"]
        assert self.composed("a sks dog", trigger_word="sks") == ["a sks dog"]
        assert self.composed("", trigger_word="sks") == ["sks"]

    def test_shuffled_tags_keep_the_first(self):
        texts = self.composed(self.TAGS, 50, shuffle_tags=True, keep_tokens=2)
        assert all(text.startswith("one, two, ") for text in texts)
        assert all(sorted(text.split(", ")) == sorted(self.TAGS.split(", ")) for text in texts)
        assert len(set(texts)) > 15

    def test_dropped_tags(self):
        texts = self.composed(self.TAGS, 400, tag_dropout=0.5, keep_tokens=1)
        kept = Counter(tag for text in texts for tag in text.split(", "))
        assert kept["one"] == 400
        assert all(150 < kept[tag] < 250 for tag in ("two", "six"))

    def test_folder_names(self):
        assert folder_caption("10_sks dog/a.png", "/data") == "sks dog"
        assert folder_caption("a.png", "/data/cats") == "cats"


def make_picture(file: Path, size: tuple[int, int] = (48, 40), colour: object = "red") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)
    return file


def found(records: Records) -> dict[str, tuple[str, ...]]:
    """Captions by key."""
    return {records.key(index): records.captions(index) for index in range(len(records))}


class TestSources:
    def test_metadata_lists_and_missing_captions(self, tmp_path):
        for index in range(3):
            make_picture(tmp_path / f"{index}.png")
        lines = [{"file_name": "0.png", "text": ["a", "b"]}, {"file_name": "1.png", "text": None}]
        (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        records = records_of(tmp_path)
        assert found(records) == {"0.png": ("a", "b"), "1.png": ("",)}
        assert records.sources[0].table.num_left_out == 1

    def test_a_first_row_may_leave_out_what_others_have(self, tmp_path):
        for index in range(2):
            make_picture(tmp_path / f"{index}.png")
        lines = [{"file_name": "0.png"}, {"file_name": "1.png", "text": "a"}]
        (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        assert found(records_of(tmp_path)) == {"0.png": ("",), "1.png": ("a",)}

    def test_shards_number_their_classes_alike(self, tmp_path):
        from datasets import ClassLabel, Dataset, Features
        from datasets import Image as ImageFeature

        from utils.data.parquet_files import NeededColumns, check_shards, read_footers

        for number, names in enumerate((["cat", "dog"], ["dog", "cat"], ["cat", "dog"])):
            features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
            rows = {"image": [Image.new("RGB", (8, 8))] * 2, "label": [0, 1]}
            folder = tmp_path / ("data" if number != 1 else "other")
            folder.mkdir(exist_ok=True)
            Dataset.from_dict(rows, features=features).to_parquet(folder / f"{number}.parquet")

        def shards() -> list[str]:
            names = sorted(file.name for file in (tmp_path / "data").iterdir())
            footers = read_footers(tmp_path / "data", names, "train_data_dir")
            return check_shards(
                tmp_path / "data", footers, NeededColumns(("image",), ("label",)), "train_data_dir"
            ).names

        assert shards() == ["0.parquet", "2.parquet"]
        shutil.copy(tmp_path / "other" / "1.parquet", tmp_path / "data")
        with pytest.raises(UserError, match=r"1\.parquet is no shard.*numbers in its column label stand for dog, cat"):
            shards()

    def test_metadata_csv_in_subfolders(self, tmp_path):
        for name in ("x", "y"):
            make_picture(tmp_path / name / "a.png")
            with open(tmp_path / name / "metadata.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([["file_name", "words"], ["a.png", f"a {name}, with a comma"]])
        records = records_of(tmp_path, caption_column="words")
        assert found(records) == {"x/a.png": ("a x, with a comma",), "y/a.png": ("a y, with a comma",)}
        with pytest.raises(UserError, match=r"--caption_column text is not a column.*words"):
            records_of(tmp_path)

    def test_a_file_name_that_leaves_the_folder_is_refused(self, tmp_path):
        make_picture(tmp_path / "secret.png")
        make_picture(tmp_path / "data" / "a.png")
        names = ["../secret.png", str(tmp_path / "secret.png"), "a.png", "gone.png", "sub/../../secret.png"]
        lines = [json.dumps({"file_name": name, "text": "x"}) for name in names]
        (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
        records = records_of(tmp_path / "data")
        assert list(found(records)) == ["a.png"]
        reasons = dict(records.refused)
        assert [("leaves the folder" in reasons[name]) for name in names if name != "a.png"] == [
            True,
            False,
            False,
            True,
        ]
        assert "must be relative" in reasons[names[1]]
        assert reasons["gone.png"] == "is listed but not there"

    def test_pairs(self, tmp_path):
        for name in ("a.jpg", "b.png", "c.webp", "d.png", "10_cat/e.png"):
            make_picture(tmp_path / name)
        (tmp_path / "a.txt").write_text("first\n\nsecond\n", encoding="utf-8")
        (tmp_path / "b.caption").write_text("ein Käfer", encoding="utf-16")
        (tmp_path / "c.json").write_text(json.dumps({"caption": ["x", "y"], "width": 3}))
        assert found(records_of(tmp_path)) == {
            "a.jpg": ("first", "second"),
            "b.png": ("ein Käfer",),
            "c.webp": ("x", "y"),
            "d.png": ("",),
            "10_cat/e.png": ("",),
        }
        by_folder = found(records_of(tmp_path, CaptionOptions(on_missing_caption="folder")))
        assert by_folder["10_cat/e.png"] == ("cat",)
        assert by_folder["d.png"] == (tmp_path.name,)
        (tmp_path / "d.json").write_text("{broken")
        assert dict(records_of(tmp_path).refused).keys() == {"d.png"}

    @pytest.mark.parametrize("layout", ["beside", "split folders", "images by split", "keys by split"])
    def test_captions_json(self, tmp_path, layout):
        root = tmp_path / "train" if layout == "split folders" else tmp_path
        within = "images/train" if layout == "images by split" else "images"
        for name in ("a.png", "b.png", "c.png"):
            make_picture(root / within / name)
        captions = {"a.png": "one", "b.png": ["two", "three"]}
        if layout == "images by split":
            make_picture(root / "images/validation/v.png")
            captions["v.png"] = "not this"
        if layout == "keys by split":
            make_picture(root / "images/v.png")
            captions = {"train": captions | {"c.png": ""}, "validation": {"v.png": "not this"}}
        (root / "captions.json").write_text(json.dumps(captions))
        listed = {Path(key).name: value for key, value in found(records_of(tmp_path)).items()}
        assert listed == {"a.png": ("one",), "b.png": ("two", "three"), "c.png": ("",)}

    def test_a_saved_dataset_and_a_subset(self, tmp_path):
        from datasets import Dataset

        pixels = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(9)]
        Dataset.from_dict({"picture": pixels, "words": [f"caption {index}" for index in range(9)]}).save_to_disk(
            tmp_path
        )
        options = {"dataset_name": str(tmp_path), "image_column": "picture", "caption_column": "words"}
        assert len(records_of(**options)) == 9
        some = records_of(**options, max_train_samples=4)
        assert len(some) == 4
        assert found(some) == found(records_of(**options, max_train_samples=4))
        assert read_rgb(some.image(0)).size == (8, 8)

    def test_parquet_with_image_bytes(self, tmp_path):
        import pyarrow as pa
        import pyarrow.parquet

        file = io.BytesIO()
        Image.new("RGB", (12, 8), "blue").save(file, "PNG")
        for number in range(2):
            columns = {"image": [file.getvalue()] * 2, "text": [f"{number}", None], "width": [12, 12], "height": [8, 8]}
            pyarrow.parquet.write_table(pa.table(columns), tmp_path / f"part-{number}.parquet")
        records = records_of(tmp_path)
        assert [records.captions(index) for index in range(4)] == [("0",), ("",), ("1",), ("",)]
        assert read_rgb(records.image(3)).size == (12, 8)
        assert survey(records, tmp_path / "memory").sizes.tolist() == [[12, 8]] * 4

    def test_tar_shards(self, tmp_path):
        for shard in range(2):
            with tarfile.open(tmp_path / f"{shard:03d}.tar", "w") as archive:
                for number in range(3):
                    picture = make_picture(tmp_path / "x.png", (30 + shard, 20 + number))
                    archive.add(picture, f"d/{number}.png")
                    if number < 2:
                        (tmp_path / "x.txt").write_text(f"caption {shard} {number}")
                        archive.add(tmp_path / "x.txt", f"d/{number}.txt")
        for name in ("x.png", "x.txt"):
            (tmp_path / name).unlink()
        records = records_of(tmp_path)
        assert found(records)["001.tar/d/1.png"] == ("caption 1 1",)
        assert found(records)["001.tar/d/2.png"] == ("",)
        assert [read_rgb(records.image(index)).size for index in (0, 5)] == [(30, 20), (31, 22)]
        whole = (tmp_path / "001.tar").read_bytes()
        (tmp_path / "001.tar").write_bytes(whole[:2000])
        cut = records_of(tmp_path)
        assert 3 <= len(cut) < 6
        assert "broken" in cut.refused[0][1] or survey(cut, tmp_path / "m").reasons

    def test_a_caption_column_of_numbers_is_refused(self, tmp_path):
        from datasets import Dataset

        Dataset.from_dict({"image": [Image.new("RGB", (8, 8))], "text": [3]}).save_to_disk(tmp_path)
        with pytest.raises(UserError, match="--caption_column text must hold strings"):
            records_of(dataset_name=str(tmp_path))

    def test_several_sources(self, tmp_path):
        for name, count in (("dogs", 2), ("cats", 6)):
            for number in range(count):
                make_picture(tmp_path / name / f"{number}.png")
        file = tmp_path / "data.yaml"
        file.write_text(
            "sources:\n"
            "- {train_data_dir: dogs, repeats: 3, trigger_word: sks, on_missing_caption: folder}\n"
            "- {train_data_dir: cats, name: other, caption_dropout: 1}\n"
        )
        records = records_of(dataset_file=str(file))
        assert [records.key(index) for index in (0, 2)] == ["dogs/0.png", "other/0.png"]
        assert records.captions(0) == ("dogs",)
        assert records.source(0).captions.trigger_word == "sks"
        assert records.source(2).captions.caption_dropout == 1
        assert records.repeats() == [3, 1]
        file.write_text("- {train_data_dir: dogs, weight: 1}\n- {train_data_dir: cats, weight: 3}\n")
        assert records_of(dataset_file=str(file)).repeats() == [1, 1]
        file.write_text("- {train_data_dir: dogs, weight: 0.5}\n- {train_data_dir: cats, weight: 0.5}\n")
        assert records_of(dataset_file=str(file)).repeats() == [2, Fraction(2, 3)]

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ("- {train_data_dir: dogs, repeat: 3}", "source 1: repeat is unknown; did you mean repeats"),
            ("- {train_data_dir: dogs, loss_weight: -1}", "source 1: loss_weight must be a number from 1e-6 to 1e6"),
            ("- {train_data_dir: dogs, repeats: 0}", "source 1: repeats must be a number from 1e-6 to 1e6"),
            ("- {train_data_dir: dogs, repeats: 1, weight: 1}", "give one"),
            ("- {train_data_dir: dogs, shuffle_tags: 3}", "shuffle_tags must be bool, got 3"),
            ("- {train_data_dir: dogs, caption_dropout: 3}", "source 1: --caption_dropout must be between"),
            ("- {train_data_dir: nowhere}", "source 1: --train_data_dir must be a folder"),
            ("- {repeats: 1}", "has neither dataset_name nor train_data_dir"),
            ("- {train_data_dir: dogs, weight: 1}\n- {train_data_dir: dogs}", "give all sources a weight, or none"),
            ("nothing", "must hold a list of sources"),
            ("{sources: [], more: 1}", "must hold a list of sources"),
            ("- {", "can't be read"),
        ],
    )
    def test_bad_dataset_files(self, tmp_path, text, named):
        make_picture(tmp_path / "dogs" / "a.png")
        (tmp_path / "data.yaml").write_text(text)
        with pytest.raises(UserError, match=named):
            records_of(dataset_file=str(tmp_path / "data.yaml"))


class TestSurvey:
    def test_headers_are_read_once(self, tmp_path, monkeypatch):
        folder = tmp_path / "data"
        for number in range(4):
            make_picture(folder / f"{number}.png", (30 + number, 20))
        monkeypatch.setattr("utils.data.image_facts.SETTLED_NANOSECONDS", 0)
        first = survey(records_of(folder), tmp_path / "memory")
        make_picture(folder / "2.png", (77, 55))
        make_picture(folder / "new.png", (11, 12))
        read = []
        original = read_header
        monkeypatch.setattr("utils.data.survey.read_header", lambda image: read.append(image) or original(image))
        second = survey(records_of(folder), tmp_path / "memory")
        assert sorted(Path(path).name for path in read) == ["2.png", "new.png"]
        assert first.sizes.tolist() == [[30, 20], [31, 20], [32, 20], [33, 20]]
        assert second.sizes.tolist() == [[30, 20], [31, 20], [77, 55], [33, 20], [11, 12]]

    @pytest.mark.parametrize("is_plain_first", [False, True])
    def test_digests_that_an_earlier_release_remembers_are_taken_over(self, tmp_path, monkeypatch, is_plain_first):
        """No file is read whole again for what only its header tells anew, but one that was changed."""
        monkeypatch.setattr("utils.data.image_facts.SETTLED_NANOSECONDS", 0)
        for number in range(4):
            make_picture(tmp_path / "data" / f"{number}.png", (30 + number, 20))
        memory, wanted = tmp_path / "memory", np.ones(4, bool)
        with monkeypatch.context() as patch:
            patch.setattr("utils.data.survey.NOW", headers.BEFORE)
            patch.setattr("utils.data.survey.REMEMBERED", headers.REMEMBERED_BEFORE)
            first = survey(records_of(tmp_path / "data"), memory)
            add_digests(first, records_of(tmp_path / "data"), wanted, memory)
        make_picture(tmp_path / "data" / "2.png", (77, 55))
        records, read = records_of(tmp_path / "data"), []
        original = headers.image_bytes
        monkeypatch.setattr("utils.data.survey.image_bytes", lambda image: read.append(image) or original(image))
        second = survey(records, memory) if is_plain_first else headers.Survey.unknown(4)
        add_digests(second, records, wanted, memory)
        assert [Path(path).name for path in read] == ["2.png"]
        assert (second.digests == first.digests).tolist() == [True, True, False, True]
        assert second.digests.all()

    def test_a_file_that_was_just_changed_is_not_remembered(self, tmp_path):
        make_picture(tmp_path / "data" / "a.png", (30, 20))
        survey(records_of(tmp_path / "data"), tmp_path / "memory")
        make_picture(tmp_path / "data" / "a.png", (20, 30))
        assert survey(records_of(tmp_path / "data"), tmp_path / "memory").sizes.tolist() == [[20, 30]]

    def test_filters_and_their_counts(self, tmp_path):
        for number, size in enumerate([(100, 100), (20, 100), (400, 40), (30, 30), (900, 800)]):
            make_picture(tmp_path / f"{number}.png", size)
        chosen = {"min_image_size": 25, "max_aspect_ratio": 3.0, "max_upscale": 2.0, "max_image_size": 850}
        planned = plan(tmp_path, 64, selection=SelectionOptions(**chosen))
        assert [planned.records.key(index) for index in range(len(planned.records))] == ["0.png"]
        assert list(planned.filtered.values()) == [1, 1, 1, 1]
        with pytest.raises(UserError, match="no image is left to train on; shorter edge under 1000: 5 images"):
            plan(tmp_path, 64, selection=SelectionOptions(min_image_size=1000))


def test_a_thousand_images_of_two_hundred_shapes_over_three_ranks(tmp_path):
    random = np.random.default_rng(0)
    shapes = random.integers(24, 90, (200, 2))
    for number in range(1000):
        make_picture(tmp_path / f"{number:04d}.png", tuple(int(edge) for edge in shapes[number % 200]))
    buckets = BucketOptions(use_aspect_ratio_buckets=True, bucket_step=8)
    planned = plan(tmp_path, 64, buckets, group_size=4)
    assert len(planned.plan.sizes) > 5
    epochs, seen = 3, {}
    for num_processes in (1, 2, 3):
        batches = planned.batches(12, 4, seed=1)
        counts, composition = Counter(), {}
        for rank in range(num_processes):
            pieces = Pieces(batches, 12 // num_processes, rank, num_processes, 0, batches.steps_in(epochs))
            for piece in pieces:
                for slot in piece.slots:
                    composition[piece.step, slot] = batches.draw(piece.step, slot)
                    counts[composition[piece.step, slot].record] += 1
        assert set(counts) == set(range(1000))
        assert max(abs(count - epochs) for count in counts.values()) <= 1
        seen[num_processes] = composition
    assert seen[1] == seen[2] == seen[3]


def test_odd_files_are_trained_on_and_bad_ones_named(train, tmp_path):
    folder = tiny.make_images(tmp_path / "data", 12)
    (folder / "metadata.jsonl").unlink()
    picture = Image.new("RGB", (50, 60), (200, 30, 30))
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("LA").save(folder / "grey alpha.png")
    Image.fromarray(np.full((40, 50), 40000, np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (1, 1), "blue").save(folder / "one.png")
    Image.new("RGB", (50, 40), "blue").save(folder / "蝶.png")
    Image.new("RGB", (4000, 9), "blue").save(folder / "long.png")
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 8
    picture.save(folder / "turned.jpg", exif=exif)
    good = len(list(folder.iterdir()))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    whole = (folder / "000.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    bomb = io.BytesIO()
    Image.new("1", (20000, 10000)).save(bomb, "PNG")
    (folder / "bomb.png").write_bytes(bomb.getvalue())
    flags = ["--max_train_steps", good, "--train_batch_size", 2, "--max_bad_fraction", 0.5]
    out = train("sdxl", *flags, "--use_aspect_ratio_buckets", "--bucket_step", 8, data=folder)
    report = json.loads((out / "data_report.json").read_text())
    assert report["unreadable"].keys() == {"empty.jpg", "text.png", "cut.png", "gone.png", "bomb.png"}
    assert report["unreadable"]["empty.jpg"] == "the file is empty"
    assert report["trained"] == good
    assert report["missing_captions"] == good + 1  # the cut one's header can be read
    odd = ("CMYK", "palette", "16-bit or more", "transparent", "turned by EXIF", "non-ASCII name")
    assert all(report["converted"][name] >= 1 for name in odd)
    assert (folder / "empty.jpg").exists()  # nothing of the user's is removed
    train("sdxl", *flags, "--on_bad_image", "error", data=folder, out="other", expect=2)


class TestStream:
    @pytest.fixture
    def shards(self, tmp_path: Path) -> Path:
        """Four Parquet shards of ten images each in two shapes; one image is cut off, one empty."""
        import pyarrow as pa
        import pyarrow.parquet

        for shard in range(4):
            rows = {"image": [], "text": [], "width": [], "height": []}
            for number in range(10):
                size = (40, 64) if number % 2 else (64, 40)
                file = io.BytesIO()
                Image.new("RGB", size, (60 * shard, 20 * number, 0)).save(file, "PNG")
                content = file.getvalue()
                if (shard, number) in ((1, 3), (2, 4)):
                    content = content[:60] if shard == 1 else b""
                for column, value in zip(rows, (content, f"{shard} {number}", *size), strict=True):
                    rows[column].append(value)
            pyarrow.parquet.write_table(pa.table(rows), tmp_path / f"{shard}.parquet")
        return tmp_path

    def stream(self, shards: Path):
        from utils.data.stream import open_stream

        buckets = BucketOptions(use_aspect_ratio_buckets=True, bucket_step=8)
        data = DataOptions(streaming=True, shuffle_buffer_size=8)
        return open_stream(data, SourceOptions(train_data_dir=str(shards)), CaptionOptions(), 64, buckets)

    def pieces(self, shards: Path, rank: int = 0, num_processes: int = 1, first_step: int = 0, last_step: int = 10):
        stream = self.stream(shards)
        batches = stream.batches(8, 2, seed=3)
        return list(stream.pieces(batches, 2, rank, num_processes, first_step, last_step))

    def contents(self, pieces) -> dict[tuple[int, int], tuple[str, ...]]:
        return {
            (piece.step, slot): piece.streamed.captions(place)
            for piece in pieces
            for place, slot in enumerate(piece.slots)
        }

    def test_the_same_batches_on_any_number_of_processes_and_after_a_resume(self, shards):
        alone = self.pieces(shards)
        contents = self.contents(alone)
        assert len(contents) == 80
        for piece in alone:
            assert len({sample.bucket for sample in piece.streamed.samples}) == 1
        for num_processes in (2, 4):
            shared = [piece for rank in range(num_processes) for piece in self.pieces(shards, rank, num_processes)]
            assert self.contents(shared) == contents
        resumed = self.contents(self.pieces(shards, first_step=6))
        assert resumed == {place: captions for place, captions in contents.items() if place[0] >= 6}

    def test_each_image_comes_once_a_pass_in_another_order(self, shards):
        counts = Counter(self.contents(self.pieces(shards)).values())
        assert len(counts) == 38  # the empty one and the one that is cut off are passed over
        assert max(counts.values()) <= 3

    @pytest.mark.parametrize("micro_batch", [1, 2])
    def test_a_run(self, train, shards, micro_batch):
        flags = ["--streaming", "--max_train_steps", 12, "--train_batch_size", micro_batch, "--random_flip"]
        whole = train("sd", *flags, "--dataloader_num_workers", 1, data=shards, out="whole")
        assert json.loads((whole / "data_report.json").read_text())["streamed"]
        train("sd", *flags[:2], 5, *flags[3:], data=shards, out="parts")
        parts = train("sd", *flags, "--resume_from_checkpoint", "latest", data=shards, out="parts")
        lines = [(out / "metrics.jsonl").read_text().splitlines() for out in (whole, parts)]
        assert [json.loads(line)["train_loss"] for line in lines[0]] == [
            json.loads(line)["train_loss"] for line in lines[1]
        ]

    def test_a_dry_run_examines_the_first(self, train, shards, capsys):
        flags = ["--streaming", "--max_train_steps", 2, "--use_aspect_ratio_buckets", "--bucket_step", 8, "--dry_run"]
        out = train("sd", *flags, "--resolution", 64, "--train_batch_size", 4, data=shards)
        said = capsys.readouterr().out
        assert "38 distinct" in said
        assert "the file is empty" in said
        assert "the image is cut off" in said
        sheet = np.asarray(Image.open(out / "contact_sheet.png"))
        assert (sheet != 255).any(axis=2).mean() > 0.2

    def test_a_stream_without_samples_is_examined(self, shards):
        from utils.training.dry_run import examine_stream

        lines = examine_stream(self.stream(shards), [], lambda texts: np.zeros(len(texts), np.int64), 75)
        assert lines == ["  none came of a stream of unknown length in 4 shards"]

    def test_what_does_not_go(self, refused, shards, tmp_path):
        refused(["--streaming"], "--max_train_steps", data=shards)
        flags = ["--streaming", "--max_train_steps", 2, "--use_aspect_ratio_buckets", "--bucket_step", 8]
        refused([*flags, "--width_column", "w"], "needs the images' sizes in the rows", data=shards)
        make_picture(tmp_path / "pictures" / "a.png")
        refused(flags[:3], "a folder of images needs no stream", data=tmp_path / "pictures")


class TestStreamedTars:
    """What the members of a sample are, and what a member that can't be read costs: itself."""

    @pytest.fixture(autouse=True, params=["on a disk", "on the Hub"])
    def place(self, request, monkeypatch, tmp_path) -> str:
        from utils.data import stream
        from utils.data.file_listing import Fates
        from utils.data.tar_streams import tar_samples

        def from_afar(source, cache_dir, left_out):
            shards = [str(path) for path in sorted(Path(source.train_data_dir).iterdir())]
            samples = tar_samples({"train": shards}, str(tmp_path / "cache"), source.mask_column)
            return samples, Fates(tmp_path), tuple(map(Path, shards))

        if request.param == "on the Hub":
            monkeypatch.setattr(stream, "_load_shards", from_afar)
        return request.param

    def rows(self, folder: Path, **options) -> tuple[dict[str, tuple[str, ...]], list[tuple[str, str]]]:
        from utils.data.stream import Lane, open_stream

        source = SourceOptions(train_data_dir=str(folder), **options)
        stream = open_stream(DataOptions(streaming=True), source, CaptionOptions(), 16, BucketOptions())
        lane = Lane(stream, 0, 1, 1, 0)
        rows = (lane._sample(row, number, 0) for number, row in enumerate(lane._rows(0)))
        self.masks = {}
        found = {}
        for sample in filter(None, rows):
            found[sample.record.key.removeprefix("a.tar/")] = sample.record.captions
            self.masks[sample.record.key] = sample.record.mask
        return found, [(key.removeprefix("a.tar/"), reason) for key, reason in lane.bad]

    def pack(self, folder: Path, members: dict[str, bytes], name: str = "a.tar") -> Path:
        folder.mkdir(exist_ok=True)
        with tarfile.open(folder / name, "w") as archive:
            for member, content in members.items():
                header = tarfile.TarInfo(member)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
        return folder

    def image(self, kind: str = "PNG") -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (16, 16), "red").save(file, kind)
        return file.getvalue()

    def test_members_of_any_ending_and_case(self, tmp_path):
        members = {
            **{"0.png": self.image(), "0.txt": b"zero"},
            **{"1.PNG": self.image(), "1.TXT": b"one"},
            **{"2.jpg": self.image("JPEG"), "2.json": b'{"caption": "two"}'},
            **{"3.webp": self.image("WEBP"), "3.Caption": b"three", "3.cls": b"no number", "3.npy": b"broken"},
            **{"4.caption": b"not read", "4.txt": b"four", "4.png": self.image()},
            **{"5.png": self.image()},
            **{"._6.png": b"of a Mac", "6.png": self.image(), "6.PNG": self.image("GIF"), "6.txt": b"six"},
        }
        found, bad = self.rows(self.pack(tmp_path / "data", members))
        assert found == {
            **{"0.png": ("zero",), "1.PNG": ("one",), "2.jpg": ("two",), "3.webp": ("three",), "4.png": ("four",)},
            **{"5.png": ("",), "6.png": ("six",)},
        }
        assert not bad

    @pytest.mark.parametrize("text", ["猫がいる", "一只猫"])
    @pytest.mark.parametrize("encoding", ["shift_jis", "gb18030", "utf-16"])
    def test_other_encodings_are_read_as_the_user_says_and_never_guessed(self, tmp_path, text, encoding):
        try:
            content = text.encode(encoding)
        except UnicodeEncodeError:
            pytest.skip("the encoding lacks a character")
        members = {"0.png": self.image(), "0.txt": content, "1.png": self.image(), "1.txt": b"one"}
        folder = self.pack(tmp_path / "data", members)
        found, bad = self.rows(folder)
        if encoding == "utf-16":  # it has a mark
            assert found == {"0.png": (text,), "1.png": ("one",)}
            return
        assert found == {"1.png": ("one",)}
        assert "--text_encoding" in dict(bad)["0.png"]
        found, bad = self.rows(folder, text_encoding=encoding)
        assert found == {"0.png": (text,), "1.png": ("one",)}
        assert not bad

    @pytest.mark.parametrize(
        ("content", "reason"),
        [(b"a" * (2 << 20), "no more are read"), (b"[" * 100_000, "json"), (b'{"caption": 3}', "a string")],
    )
    def test_captions_that_cannot_be_read_are_named(self, tmp_path, content, reason):
        members = {"0.png": self.image(), "0.json": content, "1.png": self.image(), "1.txt": b"one"}
        found, bad = self.rows(self.pack(tmp_path / "data", members))
        assert found == {"1.png": ("one",)}
        assert reason in dict(bad)["0.png"]

    def test_a_mask_that_comes_late(self, tmp_path):
        members = {f"{number:03}.png": self.image() for number in range(120)} | {"119.mask.png": b"mask"}
        members["119.png"] = members.pop("119.png")
        self.rows(self.pack(tmp_path / "data", members), mask_column="mask.png")
        assert [key[-7:] for key, mask in self.masks.items() if mask] == ["119.png"]

    def test_masks_by_their_ending_are_no_images(self, tmp_path):
        members = {}
        for number in range(3):
            members |= {f"{number}.mask.png": b"mask", f"{number}.png": self.image(), f"{number}.txt": b"text"}
        found, _ = self.rows(self.pack(tmp_path / "data", members), mask_column="mask.png")
        assert sorted(found) == ["0.png", "1.png", "2.png"]
        assert all(mask.source == b"mask" for mask in self.masks.values())

    def test_members_that_do_not_lie_beside_each_other(self, tmp_path, place):
        members = {f"{number}.png": self.image() for number in range(3)}
        members |= {f"{number}.txt": f"{number}".encode() for number in range(3)}
        found, bad = self.rows(self.pack(tmp_path / "data", members))
        if place == "on a disk":
            assert found == {f"{number}.png": (f"{number}",) for number in range(3)}
            assert not bad
        else:
            assert sorted(found) == ["0.png", "1.png", "2.png"]
            assert sorted(key for key, reason in bad if "beside" in reason) == ["0.txt", "1.txt", "2.txt"]

    @pytest.mark.parametrize("harm", ["cut", "junk", "put together", "of text alone", "a header of gigabytes"])
    def test_a_shard_that_is_broken_is_named_and_the_others_are_read(self, tmp_path, harm):
        folder = self.pack(tmp_path / "data", {"0.png": self.image(), "0.txt": b"zero"})
        self.pack(folder, {"1.png": self.image(), "1.txt": b"one", "2.png": self.image(), "2.txt": b"two"}, "b.tar")
        shard = folder / "b.tar"
        if harm == "of text alone":
            self.pack(folder, {"1.txt": b"one"}, "b.tar")
        elif harm == "a header of gigabytes":
            header = tarfile.TarInfo("long")
            header.type, header.size = tarfile.GNUTYPE_LONGNAME, 3 << 30
            shard.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + b"x" * 10_000)
        else:
            content = shard.read_bytes()
            shard.write_bytes({"cut": content[:700], "junk": b"junk" * 900, "put together": 2 * content}[harm])
        found, bad = self.rows(folder)
        assert found["0.png"] == ("zero",)
        if harm != "of text alone":
            assert any("b.tar" in key for key, _ in bad)

    def test_a_lane_without_an_image_names_its_shards(self, tmp_path):
        from utils.data.stream import Lane, open_stream

        folder = self.pack(tmp_path / "data", {"0.png": self.image(), "0.txt": b"zero"})
        (folder / "b.tar").write_bytes(b"junk" * 900)
        source = SourceOptions(train_data_dir=str(folder))
        stream = open_stream(DataOptions(streaming=True), source, CaptionOptions(), 16, BucketOptions())
        with pytest.raises(UserError, match=r"no image can be read of .*b\.tar: b\.tar: .*put them together"):
            next(Lane(stream, 1, 2, 1, 0).groups())

    def test_a_dataset_of_tars(self, train, tmp_path):
        members = {}
        for number in range(6):
            members |= {f"{number}.png": self.image(), f"{number}.TXT": b"text"}
        folder = self.pack(tmp_path / "data", members, "train-0.tar")
        flags = ["--streaming", "--max_train_steps", 2, "--train_batch_size", 2, "--dataset_name", folder]
        from train_text_to_image import main

        flags += ["--pretrained_model", train.pipelines["sd"], "--resolution", tiny.RESOLUTION, "--report_to", "none"]
        assert main([str(word) for word in [*flags, "--output_dir", tmp_path / "out"]]) == 0


def test_the_doctor(train, tmp_path, capsys):
    folder = tiny.make_images(tmp_path / "data", 12)
    (folder / "metadata.jsonl").unlink()
    (folder / "001.png").write_bytes((folder / "000.png").read_bytes())
    whole = (folder / "002.png").read_bytes()
    (folder / "002.png").write_bytes(whole[: len(whole) // 2])
    (folder / "003.txt").write_text("word " * 90)
    Image.new("RGB", (16, 16)).save(folder / "small.png")
    flags = ["--dry_run", "--use_aspect_ratio_buckets", "--bucket_step", 8, "--train_batch_size", 4]
    out = train("sdxl", *flags, "--cache_latents", data=folder)
    said = capsys.readouterr().out
    for words in (
        "13 of 13 listed",
        "000.png = 001.png",
        "002.png: ",
        "captions       2 distinct, 12 images without one",
    ):
        assert words in said
    assert "1 have over 75 tokens" in said
    assert "at most 2.00 times (small.png)" in said
    report = json.loads((out / "dry_run_report.json").read_text())
    assert report["duplicates"] == [["000.png", "001.png"]]
    assert report["unreadable"].keys() == {"002.png"}
    assert sum(report["buckets"].values()) == 13
    assert report["steps_per_epoch"] == 13 / 4
    sheet = np.asarray(Image.open(out / "contact_sheet.png"))
    assert (sheet != 255).any(axis=2).mean() > 0.2
    cached = train(
        "sdxl", *flags[1:], "--cache_latents", "--cache_text_embeddings", "--cache_only", data=folder, out="c", expect=2
    )  # one in thirteen is too many
    assert not (cached / "model_index.json").exists()
    sizes = {"latents": 0, "text states": 0}
    from tests.test_cache import entries

    flags += ["--max_bad_fraction", 0.1, "--cache_latents", "--cache_text_embeddings", "--cache_only"]
    train("sdxl", *flags[1:], "--encoding_cache_dir", tmp_path / "cache", data=folder, out="d")
    for entry in entries(tmp_path / "cache" / "text").values():
        sizes["text states"] += sum(tensor.nbytes for tensor in entry.values())
    assert report["cache_bytes"]["text states"] == sizes["text states"]
    latents = [entry["moments"].nbytes for entry in entries(tmp_path / "cache" / "latents").values()]
    assert report["cache_bytes"]["latents"] * 11 // 13 == pytest.approx(sum(latents), rel=0.1)


def test_what_is_asked_of_captions_reaches_the_batches(train, pipelines, tmp_path):
    """Prefix, trigger word and dropout, source by source, as the tokens that a batch carries."""
    from utils.data.loader import text_of

    for name in ("dogs", "cats"):
        for number in range(4):
            make_picture(tmp_path / name / f"{number}.png").with_suffix(".txt").write_text("one, two, three")
    file = tmp_path / "data.yaml"
    file.write_text(
        "- {train_data_dir: dogs, trigger_word: sks, shuffle_tags: true, caption_suffix: end}\n"
        "- {train_data_dir: cats, caption_dropout: 0.5}\n"
    )
    records = records_of(dataset_file=str(file))
    batches = GlobalBatches(np.zeros(8, int), records.source_numbers, records.repeats(), 8, 1, 0)
    texts = {"dogs": Counter(), "cats": Counter()}
    for step in range(100):
        for slot in range(8):
            draw = batches.draw(step, slot)
            texts[records.key(draw.record)[:4]][text_of(records, draw, 0, step, slot, None)] += 1
    assert all(text.startswith("sks, ") and text.endswith(" end") and not drop for text, drop in texts["dogs"])
    assert len(texts["dogs"]) == 6
    assert 150 < texts["cats"]["one, two, three", True] < 250
    out = train("sd", "--max_train_steps", 2, "--train_batch_size", 4, data=tmp_path / "dogs")
    assert (out / "model_index.json").exists()


def test_the_loss_weight_of_a_source(train, tmp_path):
    """One step on one image of each of two sources: the loss is the weighted mean of what each gives alone."""
    for name, colour in (("dogs", "red"), ("cats", "blue")):
        make_picture(tmp_path / name / "a.png", colour=colour)
    flags = ["--max_train_steps", 1, "--train_batch_size", 2, "--center_crop", "--debug_loss", "--report_to", "none"]

    def loss(first: float, second: float) -> float:
        file = tmp_path / "data.yaml"
        file.write_text(
            f"- {{train_data_dir: dogs, loss_weight: {first}}}\n- {{train_data_dir: cats, loss_weight: {second}}}\n"
        )
        from tests.conftest import reset_accelerate
        from train_text_to_image import main

        reset_accelerate()
        out = tmp_path / f"{first}-{second}"
        argv = ["--pretrained_model", train.pipelines["sd"], "--dataset_file", file, "--output_dir", out, *flags]
        assert main([str(word) for word in [*argv, "--resolution", 32]]) == 0
        return json.loads((out / "metrics.jsonl").read_text())["train_loss"]

    assert loss(0.5, 3) == pytest.approx(0.5 * (loss(1, 1e-6)) + 3 * loss(1e-6, 1), rel=1e-4)


class TestSplits:
    def keys(self, folder: Path, split: str = "train", **options) -> set[str]:
        return {Path(key).name for key in found(records_of(folder, dataset_split=split, **options))}

    @pytest.mark.parametrize("form", ["pairs", "metadata", "metadata above", "parquet", "tar", "captions_json"])
    def test_only_the_asked_split_is_trained_on(self, tmp_path, form):
        import pyarrow as pa
        import pyarrow.parquet

        for split, count in (("train", 2), ("validation", 3)):
            names = [f"{split}{number}.png" for number in range(count)]
            folder = tmp_path / ("aside" if form in ("parquet", "tar") else split)
            files = [
                make_picture(folder / "images" / name if form == "captions_json" else folder / name) for name in names
            ]
            if form == "metadata":
                lines = [json.dumps({"file_name": name, "text": "x"}) for name in names]
                (folder / "metadata.jsonl").write_text("\n".join(lines))
            elif form == "metadata above":
                with (tmp_path / "metadata.jsonl").open("a") as file:
                    file.writelines(json.dumps({"file_name": f"{split}/{name}", "text": "x"}) + "\n" for name in names)
            elif form == "captions_json":
                (folder / "captions.json").write_text(json.dumps(dict.fromkeys(names, "x")))
            elif form == "parquet":
                columns = {"image": [file.read_bytes() for file in files], "text": names}
                pyarrow.parquet.write_table(pa.table(columns), tmp_path / f"{split}-00000-of-00001.parquet")
            elif form == "tar":
                with tarfile.open(tmp_path / f"{split}-0.tar", "w") as archive:
                    for file in files:
                        archive.add(file, file.name)
        if (tmp_path / "aside").exists():
            import shutil

            shutil.rmtree(tmp_path / "aside")
        assert len(self.keys(tmp_path)) == 2
        assert len(self.keys(tmp_path, "validation")) == 3
        assert not any(source.table.refused for source in records_of(tmp_path).sources)
        for wrong in ("vaildation", "test"):
            with pytest.raises(UserError, match=f"--dataset_split {wrong} is not in .*, which has"):
                self.keys(tmp_path, wrong)

    def test_a_splits_own_metadata_may_list_images_beside_it(self, tmp_path):
        for split in ("train", "test"):
            make_picture(tmp_path / "images" / f"{split}.png")
            (tmp_path / split).mkdir()
            line = json.dumps({"file_name": f"../images/{split}.png", "text": "x"})
            (tmp_path / split / "metadata.jsonl").write_text(line)
        assert self.keys(tmp_path) == {"train.png"}
        assert self.keys(tmp_path, "test") == {"test.png"}

    @pytest.mark.parametrize("caption_file", ["captions.json", "train/captions.json", "keys"])
    @pytest.mark.parametrize("images", ["images/{}", "{}/images", "images", "{}"])
    def test_captions_json_beside_images_in_any_layout(self, tmp_path, caption_file, images):
        captions = {"train": {"a.png": "one", "b.png": "two"}, "validation": {"v.png": "not this"}}
        for split, names in captions.items():
            for name in names:
                make_picture(tmp_path / images.format(split) / name)
        if caption_file == "keys":
            (tmp_path / "captions.json").write_text(json.dumps(captions))
        elif caption_file == "captions.json":
            (tmp_path / "captions.json").write_text(json.dumps(captions["train"] | captions["validation"]))
        else:
            for split, mapping in captions.items():
                (tmp_path / split).mkdir(exist_ok=True)
                (tmp_path / split / "captions.json").write_text(json.dumps(mapping))
        records = records_of(tmp_path)
        listed = {Path(key).name: value for key, value in found(records).items()}
        expected = {"a.png": ("one",), "b.png": ("two",)}
        if images == "images" and caption_file == "captions.json":  # nothing says which is of which split
            expected["v.png"] = ("not this",)
        assert listed == expected
        assert not records.refused

    def test_folders_of_classes_may_be_called_so(self, tmp_path):
        for name in ("test", "cat"):
            make_picture(tmp_path / name / "a.png")
        assert len(records_of(tmp_path)) == 2


class TestOddNamesAndLines:
    def test_names_that_are_no_unicode(self, train, tmp_path):
        import os

        folder = tmp_path / "data"
        folder.mkdir()
        for name in (b"caf\xe9.png", "蝶.png".encode()):
            make_picture(folder / "x.png")
            os.rename(folder / "x.png", os.path.join(os.fsencode(folder), name))
        (folder / "broken.png").write_bytes(b"")
        flags = ["--max_train_steps", 2, "--train_batch_size", 1, "--max_bad_fraction", 0.5, "--cache_latents"]
        out = train("sd", *flags, "--encoding_cache_dir", tmp_path / "cache", data=folder)
        assert json.loads((out / "data_report.json").read_text())["trained"] == 2
        train("sd", "--dry_run", data=folder, out="dry")

    def test_halves_of_characters_in_captions(self, tmp_path):
        make_picture(tmp_path / "a.png")
        (tmp_path / "captions.json").write_text('{"a.png": "bad \\ud83d emoji"}')
        assert found(records_of(tmp_path)) == {"a.png": ("bad ? emoji",)}

    def test_one_bad_line_costs_one_image(self, tmp_path):
        for name in "abcd":
            make_picture(tmp_path / f"{name}.png")
        lines = [
            json.dumps({"file_name": "a.png", "text": "x"}),
            "{half",
            json.dumps({"file_name": "b.png"}),
            json.dumps({"text": "no name"}),
            '{"file_name": "c.png", "text": NaN}',
            json.dumps({"file_name": "n" * 5000 + ".png", "text": "x"}),
        ]
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
        records = records_of(tmp_path)
        assert found(records) == {"a.png": ("x",), "b.png": ("",), "c.png": ("",)}
        assert {name for name, _ in records.refused} >= {"metadata.jsonl, line 2", "metadata.jsonl, line 4"}
        assert records.sources[0].table.num_left_out == 1

    def test_a_pipe_named_as_an_image_is_passed_over(self, tmp_path):
        import os

        make_picture(tmp_path / "a.png")
        os.mkfifo(tmp_path / "b.png")
        assert list(found(records_of(tmp_path))) == ["a.png"]

    def test_captions_of_old_windows_files_in_capitals_and_tags(self, tmp_path):
        for name in ("a.png", "b.png"):
            make_picture(tmp_path / name)
        (tmp_path / "a.TXT").write_bytes("ein Käfer".encode("cp1252"))
        (tmp_path / "b.json").write_text(json.dumps({"tags": ["1girl", "solo"]}))
        assert found(records_of(tmp_path)) == {"a.png": ("ein Käfer",), "b.png": ("1girl, solo",)}

    def test_a_turned_tiff_and_one_of_floats(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        painted(40, 80).save(tmp_path / "turned.tiff", exif=exif)
        header = read_header(str(tmp_path / "turned.tiff"))
        assert (header.width, header.height) == read_rgb(str(tmp_path / "turned.tiff")).size == (80, 40)
        Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tiff")
        assert np.asarray(read_rgb(str(tmp_path / "float.tiff")))[0, 0, 0] == 128

    def test_bad_shards_beside_good_ones(self, tmp_path):
        with tarfile.open(tmp_path / "good.tar", "w") as archive:
            archive.add(make_picture(tmp_path / "aside" / "a.png"), "a.png")
        (tmp_path / "aside" / "a.png").unlink()
        (tmp_path / "junk.tar").write_bytes(b"junk" * 500)
        (tmp_path / "empty.tar").write_bytes(b"")
        records = records_of(tmp_path)
        assert len(records) == 1
        assert {name for name, _ in records.refused} == {"junk.tar", "empty.tar"}

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"data_format": "parquet", "dataset_name": "x"}, "--data_format parquet says what --train_data_dir is"),
            ({"data_format": "pairs"}, "--data_format pairs says what --train_data_dir is"),
        ],
    )
    def test_formats_that_do_not_go(self, options, named):
        with pytest.raises(UserError, match=named):
            SourceOptions(**options)


def test_an_edited_file_that_a_dataset_names_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.data.image_facts.SETTLED_NANOSECONDS", 0)
    import pyarrow as pa
    import pyarrow.parquet

    file = make_picture(tmp_path / "data" / "a.png", (40, 48))
    rows = pa.table({"image": [str(file)], "text": ["x"]})
    pyarrow.parquet.write_table(rows, tmp_path / "data" / "rows.parquet")
    source = {"train_data_dir": str(tmp_path / "data"), "data_format": "parquet"}
    first = survey(records_of(**source), tmp_path / "memory")
    make_picture(file, (64, 48))
    second = survey(records_of(**source), tmp_path / "memory")
    assert (first.sizes.tolist(), second.sizes.tolist()) == ([[40, 48]], [[64, 48]])


def test_merging_takes_the_smallest_again_after_each_merge_and_enlarges_nothing_where_asked():
    options = BucketOptions(use_aspect_ratio_buckets=True)
    shapes = np.array([(512, 512), (800, 400), (400, 800)])
    planned = plan_buckets(shapes, 512, options, np.ones(3), 8)
    assert planned.sizes == [(512, 512)]
    assert [count for _, count, _ in planned.merged] == [1, 1]
    still = BucketOptions(use_aspect_ratio_buckets=True, no_upscale=True)
    shapes = np.array([(300, 300)] * 2 + [(900, 600)] * 9)
    planned = plan_buckets(shapes, 512, still, np.ones(11), 4)
    targets = np.array(planned.sizes)[planned.bucket_of]
    assert (targets <= shapes).all()
    assert not planned.merged


def test_the_facts_of_a_large_table_are_read_without_sending_it_to_each_process(tmp_path, monkeypatch):
    """Processes inherit the table: a chunk of rows is all that is pickled."""
    from utils.data import survey as headers

    for number in range(12):
        make_picture(tmp_path / f"{number}.png", (20 + number, 30))
    records = records_of(tmp_path)
    table = records.sources[0].table
    monkeypatch.setattr(type(table), "__reduce_ex__", lambda *_: pytest.fail("the table was pickled"))
    monkeypatch.setattr(headers, "MANY", 1)
    monkeypatch.setattr(headers, "CHUNK", 3)
    facts = list(headers.read_facts(table, [(row, True) for row in range(12)], False))
    assert sorted(fact.width for fact in facts) == [20 + number for number in range(12)]
    assert all(len(fact.digest) == headers.DIGEST_SIZE for fact in facts)


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
