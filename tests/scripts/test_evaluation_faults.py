"""What evaluate_pipeline.py refuses, leaves out or names."""

import json
import logging
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.conftest import message
from tests.tiny import class_conditional
from utils.evaluation.metrics.table import METRICS


@pytest.mark.parametrize("count", [1, 2])
def test_few_images_have_reasons_and_no_nans(evaluate, flags, real_images, tmp_path, count):
    folder = tmp_path / "few"
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", (64, 64), (200, 30 * index, 5)).save(folder / f"{index}.png")
    found, out = evaluate("--images", folder, *flags, "--reference", real_images, "--metrics", "all")
    scores = found["entries"]["images"]["scores"]
    text = (out / "results.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert all(score["value"] is not None or score["not_computed"] for score in scores.values())
    assert "too few" in scores["kid"]["not_computed"]
    assert "too few" in scores["prdc"]["not_computed"]
    if count == 1:
        assert "needs pairs" in scores["lpips_diversity"]["not_computed"]
    assert found["entries"]["images"]["invalid_images"]["constant"]["count"] == count


def test_a_nan_feature_names_its_image_and_the_others_are_saved(
    evaluate, images, flags, real_images, models, tmp_path, capsys
):
    module = tmp_path / "nan.py"
    text = models["own"].read_text()
    module.write_text(
        text.replace(
            "return self.module(pixels)", "return self.module(pixels) / (pixels.mean((1, 2, 3)) > 0.42)[:, None]"
        )
    )
    bright = tmp_path / "bright"
    tiny.make_images(bright)
    Image.new("RGB", (64, 64), "black").save(bright / "black.png")
    (bright / "metadata.jsonl").unlink()
    words = ["--images", bright, *flags[2:], "--feature_module", module, "--metrics", "vendi", "lpips_diversity"]
    found, _ = evaluate(*words, expect=2)
    scores = found["entries"]["images"]["scores"]
    assert scores["vendi"]["failed"]
    assert ".png are not finite" in scores["vendi"]["not_computed"]
    assert scores["lpips_diversity"]["value"] > 0
    assert "failed: vendi" in message(capsys)


def test_invalid_images_are_listed_and_can_fail(evaluate, flags, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, colour in enumerate(("black", "red", "black")):
        image = Image.new("RGB", (64, 64), colour)
        image.putpixel((3, 3), (9, 200, 9) if colour == "red" else (0, 0, 0))
        image.save(folder / f"{index}.png")
    found, out = evaluate("--images", folder, *flags, "--metrics", "vendi", "--fail_on_invalid", expect=2)
    assert "2 images are NaN, black" in message(capsys)
    assert found["entries"]["images"]["invalid_images"]["black"]["names"] == ["0.png", "2.png"]
    assert "NaN, black or of one colour: images 2 of 3." in (out / "report.md").read_text()
    assert "2 of 3 images are black" in (out / "report.html").read_text()


def test_broken_images_are_counted_and_the_report_is_written(evaluate, flags, tmp_path, capsys, monkeypatch):
    """Of which one has a name that is no UTF-8, which pytest's processes could not send each other in a log."""
    monkeypatch.setattr(logging.getLogger("utils"), "propagate", False)
    folder = tiny.make_images(tmp_path / "images")
    (folder / "metadata.jsonl").unlink()
    (folder / "cut.png").write_bytes((folder / "000.png").read_bytes()[:90])
    (folder / "garbage.jpg").write_bytes(b"garbage")
    (folder / os.fsdecode(b"\xff.jpg")).write_bytes(b"garbage")
    words = ["--images", folder, *flags, "--metrics", "vendi", "inception_score"]
    found, out = evaluate(*words, expect=2)
    assert found["entries"]["images"]["invalid_images"]["unreadable"]["count"] == 3
    assert "cut.png can't be read" in found["entries"]["images"]["scores"]["vendi"]["not_computed"]
    assert "3 of 9 images are unreadable" in (out / "report.md").read_text()
    assert (out / "report.html").read_text().count("data:image/png") == 6
    assert "failed: inception_score, vendi" in message(capsys)


def test_sets_that_are_not_of_the_same_prompts_stand_apart(evaluate, flags, tmp_path):
    """Fewer images in the baseline, and as many of other prompts."""
    own = tiny.make_images(tmp_path / "own", 6)
    for name, count in (("fewer", 4), ("others", 6)):
        other = tiny.make_images(tmp_path / name, count)
        lines = (other / "metadata.jsonl").read_text()
        (other / "metadata.jsonl").write_text(lines.replace("a red square", "a pink square"))
        _, out = evaluate("--images", own, "--baseline", other, *flags, "--metrics", "vendi", out=f"{name} scored")
        page = (out / "report.html").read_text()
        before, after = page.index("a pink square"), page.index("a red square")
        assert before < after
        assert page.count("data:image/png") == count + 6


def test_a_score_that_is_not_finite_has_failed(evaluate, images, flags, monkeypatch, capsys):
    from utils.evaluation.metrics.scores import Score

    metric = METRICS["vendi"]._replace(compute=lambda case: [Score("vendi", float("nan"), "higher")])
    monkeypatch.setitem(METRICS, "vendi", metric)
    found, _ = evaluate("--images", images, *flags, "--metrics", "vendi", "inception_score", expect=2)
    scores = found["entries"]["images"]["scores"]
    assert (scores["vendi"]["not_computed"], scores["vendi"]["failed"]) == ("not finite", True)
    assert scores["inception_score"]["value"] > 0
    assert "failed: vendi" in message(capsys)


def test_features_of_a_network_without_classes_are_counted_before_anything_is_drawn(
    evaluate, pipelines, models, real_images, tmp_path, capsys
):
    module = tmp_path / "plain.py"
    lines = models["own"].read_text().splitlines()
    module.write_text("\n".join(line for line in lines if "class_weights" not in line))
    np.savez(tmp_path / "other.npz", mu=np.zeros(16), sigma=np.eye(16))
    shared = ["--pipeline", pipelines["sd"], "--prompts", "a", "--feature_module", module]
    _, folder = evaluate(*shared, "--reference", tmp_path / "other.npz", expect=2)
    assert "has 16 features, but the network small has 8" in message(capsys)
    broken = tiny.make_images(tmp_path / "broken")
    (broken / "003.png").write_bytes((broken / "003.png").read_bytes()[:80])
    evaluate(*shared, "--training_images", broken, "--metrics", "memorisation", expect=2)
    assert "003.png" in message(capsys)
    assert not list(folder.rglob("*.png"))


def test_a_checkpoint_of_nothing_is_not_scored_as_the_base(evaluate, pipelines, tmp_path, capsys):
    (tmp_path / "training" / "checkpoint-10" / "unet").mkdir(parents=True)
    words = ["--checkpoints", tmp_path / "training", "--pipeline", pipelines["sd"], "--prompts", "a"]
    _, folder = evaluate(*words, expect=2)
    assert "checkpoint-10 has no weights" in message(capsys)
    assert not folder.exists()


def test_networks_that_are_not_there_are_listed_with_the_reason(evaluate, images, real_images, monkeypatch, tmp_path):
    from utils.evaluation.metrics import features

    monkeypatch.setattr(features, "INCEPTION_URL", f"file://{tmp_path}/none-6726825d.pth")
    monkeypatch.setitem(features.TRUNK_URLS, "alex", f"file://{tmp_path}/none-7be5be79.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found, folder = evaluate("--images", images, "--reference", real_images)
    scores = found["entries"]["images"]["scores"]
    assert all(score["value"] is None for score in scores.values())
    assert "can't be downloaded" in scores["kid"]["not_computed"]
    assert "give --clip_model FOLDER" in scores["clip_score"]["not_computed"]
    assert "Not computed" in (folder / "report.html").read_text()


def test_texts_in_the_report_are_escaped(evaluate, pipelines, flags):
    _, folder = evaluate(
        *(
            "--pipeline",
            pipelines["sd"],
            "--prompts",
            "<img src=x onerror=alert(1)>",
            "a | b",
            *flags,
            "--metrics",
            "clip_score",
        )
    )
    assert "<img src=x" not in (folder / "report.html").read_text()
    assert {path.name for path in (folder / "images" / "pipeline").glob("*.png")} == {
        f"{number:05d}_{sample:05d}.png" for number in range(2) for sample in range(4)
    }


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "give one of --pipeline PATH"),
        (["--pipeline", "/nowhere"], "--pipeline /nowhere does not exist; give a folder"),
        (["--pipeline", "{sd}"], "needs prompts; give --prompts"),
        (["--pipeline", "{sd}", "--prompts", "a", "--metrics", "fidd"], "--metrics"),
        (["--pipeline", "{sd}", "--prompts", "a", "--scheduler", "eulr"], "did you mean euler"),
        (["--pipeline", "{sd}", "--prompts", "a", "--strength", "0.5"], "--init_images"),
        (
            ["--pipeline", "{sd}", "--prompts", "a", "--export_geneval", "/etc/passwd/x"],
            "/etc/passwd/x can't be written",
        ),
        (
            ["--images", "{sd}", "--reference", "{sd}", "--save_reference", "/etc/passwd/x.npz"],
            "--save_reference /etc/passwd/x.npz can't be written",
        ),
        (["--pipeline", "{sd}", "--prompts", "a", "--prompts_file", "x"], "give one"),
        (["--pipeline", "{sd}", "--prompts", "a", "--reference", "x.npz"], "--reference must be"),
        (["--pipeline", "{sd}", "--prompts", "a", "--inception_weights", "x.pth"], "--inception_weights must be"),
        (["--pipeline", "{sd}", "--prompts", "a", "--height", "60"], "--height must be divisible by 8"),
        (["--pipeline", "{sd}", "--prompts", "a", "--dynamic_thresholding", "0.995"], "be a percentile"),
        (["--pipeline", "{sd}", "--prompts", "a", "--clamp_start", "2"], "--clamp_start and --clamp_end"),
        (["--checkpoints", "{sd}", "--prompts", "a"], "contains no checkpoint-N"),
        (["--checkpoints", "{sd}", "--prompts", "a", "--best_by", "kidd"], "did you mean kid"),
        (["--checkpoints", "{sd}", "--prompts", "a", "--best_by", "vendi"], "add its metric"),
    ],
)
def test_bad_options_end_in_one_line(evaluate, pipelines, capsys, words, named):
    evaluate(*[word.format(sd=pipelines["sd"]) for word in words], expect=2)
    assert named in message(capsys)


def test_an_unknown_class_is_refused_before_loading(evaluate, tmp_path, capsys):
    folder = class_conditional(tmp_path / "dit")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": {"0": "tench, tinca", "1": "shark"}}))
    shutil.rmtree(folder / "transformer")
    evaluate("--pipeline", folder, "--class_labels", "tinca", "shrak", expect=2)
    assert "--class_labels shrak" in (line := message(capsys))
    assert "did you mean shark?" in line
