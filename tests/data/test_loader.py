"""Batches of the loader, and runs on them."""

import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests import tiny
from tests.comparing import entries
from tests.pictures import make_picture, painted
from tests.records import records_of
from utils.config.batch import RecordPass
from utils.config.options import UserError
from utils.data import images
from utils.data.crop_plan import make_cut, plan_cut
from utils.data.images import open_image, read_header, read_rgb
from utils.data.options import ImageOptions
from utils.data.order import GlobalBatches


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
