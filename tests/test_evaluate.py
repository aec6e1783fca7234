"""evaluate_pipeline.py, run in this process: what it draws, scores, refuses and writes down."""

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import networks, tiny
from tests.conftest import message, reset_accelerate
from tests.test_generation import assert_same, images_in
from tests.tiny import class_conditional, unconditional
from utils.config.options import UserError
from utils.config.progress import Progress
from utils.data import colours
from utils.evaluation.metrics.features import Network
from utils.evaluation.metrics.table import METRICS
from utils.evaluation.options import ReferenceOptions
from utils.evaluation.references import read_images

ROOT = Path(__file__).parent.parent
PROMPTS = ["a red square", "a blue square", "a green square"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "clip": networks.make_clip(root / "clip"),
        "dino": networks.make_dino(root / "dino"),
        "alex": networks.make_trunk(root / "alex.pth"),
        "own": networks.make_own(root / "own.py"),
    }


@pytest.fixture(scope="module")
def real_images(tmp_path_factory) -> Path:
    return tiny.make_images(tmp_path_factory.mktemp("real"), 24)


@pytest.fixture
def flags(models) -> list:
    """What gives every network, but for the preference models."""
    return [
        *("--feature_module", models["own"], "--clip_model", models["clip"], "--cmmd_model", models["clip"]),
        *("--dino_model", models["dino"], "--lpips_weights", models["alex"], "--lpips_size", 64),
    ]


@pytest.fixture
def evaluate(tmp_path):
    """evaluate("--pipeline", ..., out="a") runs the script and gives its results and its folder."""

    def run(*flags, out="out", expect=0):
        from evaluate_pipeline import main

        reset_accelerate()
        folder = tmp_path / out
        assert main([str(word) for word in ["--output_dir", folder, "--num_inference_steps", 2, *flags]]) == expect
        return json.loads((folder / "results.json").read_text()) if (
            folder / "results.json"
        ).is_file() else None, folder

    return run


def test_every_metric_is_computed_and_reported(evaluate, pipelines, flags, models, real_images, tmp_path, capsys):
    found, folder = evaluate(
        *("--pipeline", pipelines["sd"], "--prompts", *PROMPTS, "--images_per_prompt", 4, "--metrics", "all", *flags),
        *("--reference", real_images, "--training_images", real_images, "--pickscore_model", models["clip"]),
        *("--hpsv2_model", models["clip"], "--kid_subset_size", 8, "--export_geneval", tmp_path / "geneval"),
    )
    scores = found["entries"]["pipeline"]["scores"]
    absent = {name: score["not_computed"] for name, score in scores.items() if score["value"] is None}
    assert list(absent) == ["fid_infinity", "fd_dinov2_infinity"]  # of 12 images
    assert set(scores) == {name for metric in METRICS.values() for name in metric.scores}
    assert scores["kid"]["images"] == 12
    assert scores["kid"]["reference_images"] == 24
    assert len(scores["kid"]["weights_sha256"]) == 64
    assert scores["kid"]["settings"]["preparation"] == "resized to 32"
    assert scores["kid"]["interval_95"][0] < scores["kid"]["value"] < scores["kid"]["interval_95"][1]
    assert "not comparable" in scores["fid"]["remark"]
    assert "12 images for 32 features" in scores["fd_dinov2"]["remark"]
    assert scores["clip_score"]["interval_method"] == "bootstrap over prompts"
    assert scores["memorisation"]["details"]["nearest_pairs"][0]["training_image"].endswith(".png")
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert "http" not in page.replace("https://www.w3.org", "")
    assert page.count("data:image") > 24
    assert "Worst by CLIP score" in page
    table = (folder / "report.md").read_text()
    assert all(f"| {name} " in table for name in scores if scores[name]["value"] is not None)
    assert table in capsys.readouterr().out
    sample = tmp_path / "geneval" / "pipeline" / "00001"
    assert json.loads((sample / "metadata.jsonl").read_text()) == {"prompt": PROMPTS[1]}
    assert (sample / "samples" / "00003.png").read_bytes() == (
        folder / "images" / "pipeline" / "00001_00003.png"
    ).read_bytes()


def test_a_baseline_is_drawn_of_the_same_seeds_and_differences_are_paired(evaluate, pipelines, flags, real_images):
    shared = ["--prompts", *PROMPTS, "--images_per_prompt", 4, *flags, "--reference", real_images]
    found, folder = evaluate("--pipeline", pipelines["sd"], "--baseline", pipelines["sd"], *shared)
    assert_same(images_in(folder / "images" / "baseline"), images_in(folder / "images" / "pipeline"))
    for name in ("kid", "clip_score", "lpips_within_prompts", "precision", "fid_mean_of_groups"):
        assert abs(found["differences"][name]["difference"]) < 1e-3 * (1 + abs(found["differences"][name]["before"]))
        assert found["differences"][name]["verdict"] == "no difference seen"
    assert found["differences"]["fid"]["interval_95"] is None  # of all images there is but one FID
    other, _ = evaluate("--pipeline", pipelines["sd2"], "--baseline", pipelines["sd"], *shared, out="other")
    assert (
        other["entries"]["baseline"]["scores"]["kid"]["value"] == found["entries"]["baseline"]["scores"]["kid"]["value"]
    )
    low, high = other["differences"]["clip_score"]["interval_95"]
    assert low <= other["differences"]["clip_score"]["difference"] <= high


@pytest.mark.slow
def test_the_scores_do_not_depend_on_batch_size_or_processes(evaluate, pipelines, flags, real_images, tmp_path):
    shared = ["--pipeline", pipelines["sd"], "--prompts", *PROMPTS, "--num_images", 8, *flags]
    shared += ["--reference", real_images, "--metrics", "kid", "clip_score", "lpips_diversity", "prdc"]
    one, folder = evaluate(*shared, "--batch_size", 1, "--feature_batch_size", 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "evaluate_pipeline.py"]
    two_folder = tmp_path / "two"
    words = [*shared, "--num_inference_steps", 2, "--batch_size", 3, "--output_dir", two_folder]
    done = subprocess.run(
        [*command, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert_same(images_in(folder / "images" / "pipeline"), images_in(two_folder / "images" / "pipeline"))
    two = json.loads((two_folder / "results.json").read_text())
    for name, score in one["entries"]["pipeline"]["scores"].items():
        other = two["entries"]["pipeline"]["scores"][name]
        if score["value"] is not None:
            assert other["value"] == pytest.approx(score["value"], rel=0.02, abs=1e-3), name
            assert other["images"] == 8


def test_killed_while_drawing_and_started_again(evaluate, pipelines, tmp_path, monkeypatch):
    """A process that dies after five images, without a chance to tidy."""
    from utils.sampling import drawer as generation

    shared = ["--pipeline", pipelines["sd"], "--prompts", *PROMPTS, "--batch_size", 2, "--metrics", "none"]
    _, whole = evaluate(*shared, out="whole")
    save = generation.Drawer._save
    counted = []

    def dying(self, pixels, task, path):
        counted.append(path)
        if len(counted) == 6:
            path.with_name(f".tmp-{path.name}").write_bytes(b"half")
            raise KeyboardInterrupt
        save(self, pixels, task, path)

    monkeypatch.setattr(generation.Drawer, "_save", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*shared, out="half")
    monkeypatch.undo()
    assert len(images_in(tmp_path / "half" / "images" / "pipeline")) == 5
    _, half = evaluate(*shared, out="half")
    assert_same(images_in(whole / "images" / "pipeline"), images_in(half / "images" / "pipeline"))


def test_another_setting_in_the_same_folder_is_refused(evaluate, pipelines, capsys):
    shared = ["--pipeline", pipelines["sd"], "--prompts", *PROMPTS, "--metrics", "none", "--images_per_prompt", 1]
    evaluate(*shared)
    evaluate(*shared, "--guidance_scale", 2, expect=2)
    assert "drawn with another guidance_scale" in message(capsys)
    evaluate(*shared, "--guidance_scale", 2, "--overwrite_output_dir")


def test_checkpoints_are_scored_and_the_best_is_found(evaluate, train, flags, images, real_images, tmp_path):
    training = train("sd", "--max_train_steps", 2, "--checkpointing_steps", 1, "--learning_rate", 1e-2, out="training")
    (training / "checkpoint-7.tmp").mkdir()
    found, folder = evaluate(
        *("--checkpoints", training, "--captions_dir", images, "--max_prompts", 2, "--best_by", "kid", *flags),
        *("--reference", real_images, "--metrics", "kid", "clip_score"),
    )
    assert list(found["entries"]) == ["base", "checkpoint-1", "checkpoint-2"]
    values = {name: entry["scores"]["kid"]["value"] for name, entry in found["entries"].items()}
    assert len(set(values.values())) == 3
    best = min(("checkpoint-1", "checkpoint-2"), key=values.get)
    assert found["best_checkpoint"] == {"score": "kid", "checkpoint": best}
    assert "data:image/svg+xml" in (folder / "report.html").read_text()


def test_lora_checkpoints_too(evaluate, train, flags, images):
    training = train("sd", "--adaptation", "lora", "--max_train_steps", 1, "--checkpointing_steps", 1, out="training")
    found, _ = evaluate("--checkpoints", training, "--prompts", "a", *flags, "--metrics", "clip_score")
    assert list(found["entries"]) == ["base", "checkpoint-1"]


def test_unconditional_pipelines_need_no_prompts(evaluate, flags, real_images, tmp_path):
    found, folder = evaluate(
        *("--pipeline", unconditional(tmp_path / "ddpm"), "--num_images", 8, *flags, "--reference", real_images)
    )
    scores = found["entries"]["pipeline"]["scores"]
    assert len(images_in(folder / "images" / "pipeline")) == 8
    assert scores["kid"]["value"] is not None
    assert scores["clip_score"]["not_computed"] == "the images have no prompts"


def test_images_already_drawn_are_scored(evaluate, flags, images, real_images):
    found, _ = evaluate("--images", images, *flags, "--reference", real_images, "--metrics", "kid", "clip_score")
    scores = found["entries"]["images"]["scores"]
    assert scores["clip_score"]["value"] > 0
    assert found["entries"]["images"]["images"] == 6


def test_folders_of_other_prompts_are_not_paired(evaluate, flags, real_images, tmp_path):
    folders = [tiny.make_images(tmp_path / name, 8) for name in ("before", "after", "other")]
    lines = (folders[2] / "metadata.jsonl").read_text()
    (folders[2] / "metadata.jsonl").write_text(lines.replace("a red square", "a pink square"))
    shared = ["--baseline", folders[0], *flags, "--reference", real_images, "--metrics", "kid"]
    same, _ = evaluate("--images", folders[1], *shared, out="same")
    other, out = evaluate("--images", folders[2], *shared, out="others")
    assert same["differences"]["kid"]["interval_95"] == pytest.approx([0, 0], abs=1e-9)
    assert other["differences"]["kid"]["interval_95"] is None
    assert "not known to be of the same prompts" in (out / "report.md").read_text()


def test_statistics_are_kept_and_read_again(evaluate, flags, real_images, tmp_path):
    file, images = tmp_path / "reference.npz", tiny.make_images(tmp_path / "some", 12)
    shared = ["--images", images, *flags, "--metrics", "kid", "fid", "prdc"]
    first, _ = evaluate(*shared, "--reference", real_images, "--save_reference", file, out="first")
    second, _ = evaluate(*shared, "--reference", file, out="second")
    for name in ("kid", "fid", "precision", "coverage"):
        values = [each["entries"]["images"]["scores"][name]["value"] for each in (first, second)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    with np.load(file, allow_pickle=False) as kept:  # as pytorch-fid and clean-fid read them
        assert kept["mu"].shape == (8,)
        assert kept["sigma"].shape == (8, 8)
        assert kept["mu"].dtype == np.float64
        assert int(kept["n"]) == 24


def test_the_fingerprint_of_a_reference_says_whether_colours_are_converted(real_images, tmp_path):
    shutil.copytree(real_images, tmp_path / "converted")
    for name in ("000.png", "001.png"):
        with Image.open(real_images / name) as image:
            image.save(tmp_path / "converted" / name, icc_profile=colours.ADOBE_RGB)

    def of_bytes_alone(folder: Path) -> str:
        contents = [path.read_bytes() for path in sorted(folder.glob("*.png"))]
        return hashlib.sha256(b"".join([b"None", *contents])).hexdigest()

    found = [
        read_images("reference", str(path), ReferenceOptions(), 0) for path in (real_images, tmp_path / "converted")
    ]
    assert found[0].fingerprint == of_bytes_alone(real_images)
    assert found[1].fingerprint != of_bytes_alone(tmp_path / "converted")


def test_a_folder_of_pictures_is_no_output_folder(pipelines, tmp_path, capsys):
    data = tiny.make_images(tmp_path / "data", 3)
    (data / "metadata.jsonl").unlink()
    before = sorted(path.name for path in data.iterdir())
    from evaluate_pipeline import main

    reset_accelerate()
    words = ["--pipeline", pipelines["sd"], "--prompts", "a", "--metrics", "lpips_diversity", "--no_download"]
    assert main([str(word) for word in [*words, "--output_dir", data]]) == 2
    assert "holds pictures that no run wrote" in message(capsys)
    assert sorted(path.name for path in data.iterdir() if path.name != ".lock") == before


def test_statistics_from_before_colours_were_converted_are_warned_of(
    evaluate, images, flags, real_images, tmp_path, caplog
):
    file, old = tmp_path / "reference.npz", tmp_path / "old.npz"
    shared = ["--images", images, *flags, "--metrics", "fid"]
    evaluate(*shared, "--reference", real_images, "--save_reference", file, out="first")
    evaluate(*shared, "--reference", file, out="second")
    assert "before colours were converted" not in caplog.text
    with np.load(file) as arrays:
        facts = json.loads(str(arrays["fingerprint"])) | {"version": 1}
        np.savez(old, **dict(arrays) | {"fingerprint": np.array(json.dumps(facts))})
    evaluate(*shared, "--reference", old, out="third")
    assert "before colours were converted" in caplog.text


def test_a_reference_may_be_a_dataset(evaluate, images, flags, real_images, tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    files = sorted(str(path) for path in real_images.glob("*.png"))
    rows = {"picture": files, "caption": ["x"] * len(files)}
    features = Features({"picture": ImageColumn(), "caption": Value("string")})
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "dataset")
    shared = ["--images", images, *flags, "--metrics", "kid", "--reference_resolution", 32]
    columns = ["--reference_image_column", "picture", "--reference_caption_column", "caption"]
    first, _ = evaluate(*shared, "--reference", tmp_path / "dataset", *columns, out="first")
    second, _ = evaluate(*shared, "--reference", real_images, out="second")
    third, _ = evaluate(*shared[:-2], "--reference", real_images, out="third")
    values = [each["entries"]["images"]["scores"]["kid"]["value"] for each in (first, second, third)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert values[2] != pytest.approx(values[1], rel=1e-4)


@pytest.fixture
def statistics() -> dict[str, np.ndarray]:
    return {"mu": np.zeros(8), "sigma": np.eye(8)}


def test_bare_statistics_give_fid_alone(evaluate, images, flags, statistics, tmp_path):
    np.savez(tmp_path / "bare.npz", **statistics)
    found, _ = evaluate(
        "--images", images, *flags, "--reference", tmp_path / "bare.npz", "--metrics", "kid", "fid", "cmmd"
    )
    scores = found["entries"]["images"]["scores"]
    assert scores["fid"]["value"] > 0
    assert "mu and sigma alone" in scores["kid"]["not_computed"]
    assert "one network" in scores["cmmd"]["not_computed"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mu": None}, "holds no mu"),
        ({"mu": np.zeros(7)}, "must be [d] and [d, d]"),
        ({"mu": np.full(8, np.nan)}, "not finite"),
        ({"sigma": np.triu(np.ones((8, 8)))}, "not symmetric"),
        ({"sigma": -np.eye(8)}, "negative variance"),
        ({"sigma": np.eye(8) + 3 * np.eye(8)[::-1]}, "negative eigenvalue"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "mu is empty"),
        ({"n": np.array("many")}, "n must be the number of images"),
        ({"n": np.array(np.nan)}, "n must be the number of images"),
        ({"fingerprint": np.array("[]")}, "must be a JSON object"),
        ({"mu": np.zeros(16), "sigma": np.eye(16)}, "has 16 features, the network small has 8"),
        ({"fingerprint": np.array('{"network": "small", "settings": "other", "weights": "x"}')}, "another settings"),
        ({"mu": np.array([object()] * 8, dtype=object)}, "can't be read as statistics"),
    ],
)
def test_bad_statistics_are_refused_before_anything_is_drawn(
    evaluate, pipelines, flags, statistics, tmp_path, capsys, change, named
):
    changed = {name: value for name, value in (statistics | change).items() if value is not None}
    np.savez(tmp_path / "bad.npz", **changed)
    _, folder = evaluate(
        "--pipeline", pipelines["sd"], "--prompts", "a", *flags, "--reference", tmp_path / "bad.npz", expect=2
    )
    assert named in message(capsys)
    assert not list(folder.rglob("*.png"))


def test_a_broken_image_in_the_reference_is_named_before_anything_is_drawn(
    evaluate, pipelines, flags, real_images, tmp_path, capsys
):
    broken = tmp_path / "broken"
    tiny.make_images(broken)
    (broken / "003.png").write_bytes((broken / "003.png").read_bytes()[:80])
    _, folder = evaluate("--pipeline", pipelines["sd"], "--prompts", "a", *flags, "--reference", broken, expect=2)
    assert "003.png" in message(capsys)
    assert not list(folder.rglob("*.png"))


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
        assert "no pair" in scores["lpips_diversity"]["not_computed"]
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
    assert ".png that are not finite" in scores["vendi"]["not_computed"]
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
    assert "has 16 features, the network small has 8" in message(capsys)
    broken = tiny.make_images(tmp_path / "broken")
    (broken / "003.png").write_bytes((broken / "003.png").read_bytes()[:80])
    evaluate(*shared, "--training_images", broken, "--metrics", "memorisation", expect=2)
    assert "003.png" in message(capsys)
    assert not list(folder.rglob("*.png"))


def test_a_checkpoint_of_nothing_is_not_scored_as_the_base(evaluate, pipelines, tmp_path, capsys):
    (tmp_path / "training" / "checkpoint-10" / "unet").mkdir(parents=True)
    words = ["--checkpoints", tmp_path / "training", "--pipeline", pipelines["sd"], "--prompts", "a"]
    _, folder = evaluate(*words, expect=2)
    assert "checkpoint-10 holds no weights" in message(capsys)
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
        ([], "--pipeline PATH says what to draw from"),
        (["--pipeline", "/nowhere"], "--pipeline /nowhere does not exist; give a folder"),
        (["--pipeline", "{sd}"], "draws prompts; give --prompts"),
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
        (["--checkpoints", "{sd}", "--prompts", "a"], "holds no checkpoint-N"),
        (["--checkpoints", "{sd}", "--prompts", "a", "--best_by", "kidd"], "did you mean kid"),
        (["--checkpoints", "{sd}", "--prompts", "a", "--best_by", "vendi"], "its metric is not among --metrics"),
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


# While training


@pytest.fixture
def in_training(pipelines, models, real_images, tmp_path):
    """in_training(first_step=...) is a TrainingEvaluation and a pipeline that it draws from."""
    from accelerate import Accelerator

    from utils.evaluation.options import EvaluationOptions, FeatureOptions
    from utils.evaluation.while_training import TrainingEvaluation
    from utils.runtime.stop_requests import StopRequests
    from utils.sampling.pipelines import PipelineSpec, load_pipeline
    from utils.sampling.samples import Surroundings

    def make(first_step=0, **more):
        reset_accelerate()
        options = {"eval_metrics": ["kid", "clip_score"], "eval_steps": 2, "eval_num_images": 6} | more
        options = {"eval_reference": str(real_images), "eval_num_inference_steps": 2} | options
        features = FeatureOptions(feature_module=str(models["own"]), clip_model=str(models["clip"]), no_download=True)
        surroundings = Surroundings(Accelerator(cpu=True), tmp_path, 3, StopRequests(tmp_path, None))
        pipeline = load_pipeline(PipelineSpec(str(pipelines["sd"])), torch.float32)
        evaluation = TrainingEvaluation(EvaluationOptions(**options), features, surroundings, pipeline, PROMPTS)
        evaluation.begin(first_step)
        return evaluation, pipeline

    return make


def test_training_is_scored_by_the_same_code(in_training, evaluate, pipelines, flags, real_images, tmp_path):
    evaluation, pipeline = in_training()
    assert [step for step in range(1, 8) if evaluation.is_due(Progress(step, 7, 0, 0))] == [2, 4, 6, 7]
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    found = evaluation.measure(pipeline, 2)
    torch.testing.assert_close(torch.rand(3), expected)  # the training's randomness is left alone
    results, _ = evaluate(
        *("--pipeline", pipelines["sd"], "--prompts", *PROMPTS, "--num_images", 6, "--seed", 3, *flags),
        *("--reference", real_images, "--metrics", "kid", "clip_score"),
    )
    scores = results["entries"]["pipeline"]["scores"]
    assert set(found) == {"kid", "clip_score", "clip_score_hessel", "clip_r_precision"}
    assert all(found[name] == pytest.approx(scores[name]["value"], rel=1e-3, abs=1e-4) for name in found)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert evaluation.measure(pipeline, 4)["kid"] != found["kid"]
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "evaluation" / "evaluation.jsonl").read_text().splitlines()
    ]
    assert steps == [2, 4]
    in_training(first_step=2)
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "evaluation" / "evaluation.jsonl").read_text().splitlines()
    ]
    assert steps == [2]


def test_under_autocast_the_vae_decodes_in_its_own_dtype(in_training, monkeypatch):
    from diffusers import AutoencoderKL

    seen = []
    decode = AutoencoderKL.decode

    def watched(self, latents, *args, **kwargs):
        seen.append((latents.dtype, torch.is_autocast_enabled("cpu")))
        return decode(self, latents, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "decode", watched)
    evaluation, pipeline = in_training()
    evaluation.measure(pipeline, 2, around=lambda: torch.autocast("cpu", torch.bfloat16))
    assert set(seen) == {(torch.float32, False)}


def test_prompts_may_be_encoded_by_another(in_training, tmp_path):
    """As a family does, which knows clip skip and long prompts; prompts of different lengths are drawn one by one."""
    evaluation, pipeline = in_training()
    expected = evaluation.measure(pipeline, 2)

    def encode(text, longer=()):
        states = pipeline.encode_prompt(text, torch.device("cpu"), 1, True)
        states = [torch.cat([each, each[:, :3]], 1) if text in longer else each for each in states]
        return dict(zip(("prompt_embeds", "negative_prompt_embeds"), states, strict=True))

    found = evaluation.measure(pipeline, 4, encode)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert evaluation.measure(pipeline, 6, lambda text: encode(text, PROMPTS[1:2]))["kid"] != expected["kid"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"eval_metrics": None}, "--eval_steps is of --eval_metrics"),
        ({"eval_steps": 0}, "--eval_steps must be"),
        ({"eval_prompts_file": "/nowhere.txt"}, "--eval_prompts_file must be"),
        ({"eval_reference": None}, "--eval_metrics kid compares"),
        ({"eval_reference": "/nowhere"}, "--eval_reference must be"),
        ({"eval_metrics": ["lpips_diversity"]}, "--eval_metrics lpips_diversity: alexnet"),
    ],
)
def test_bad_options_of_evaluation_in_training(in_training, options, named):
    with pytest.raises(UserError, match=named):
        in_training(**options)


def test_a_pipeline_without_prompts_is_refused_before_the_first_step(in_training, pipelines):
    evaluation, pipeline = in_training()
    evaluation.check(pipeline)
    evaluation._prompts = []
    with pytest.raises(UserError, match="give --prompts"):
        evaluation.check(pipeline)


def test_a_signal_ends_the_drawing_and_the_same_command_goes_on(evaluate, pipelines, monkeypatch, capsys):
    import signal

    from utils.sampling import drawer as generation

    shared = ["--pipeline", pipelines["sd"], "--prompts", *PROMPTS, "--batch_size", 2, "--metrics", "none"]
    save = generation.Drawer._save

    def signalled(self, pixels, task, path):
        save(self, pixels, task, path)
        if task.name == "00000_00002":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(generation.Drawer, "_save", signalled)
    _, folder = evaluate(*shared, expect=128 + signal.SIGTERM)
    assert "stopped with 4 of 12 images drawn; the same command continues" in capsys.readouterr().err
    monkeypatch.undo()
    evaluate(*shared)
    assert len(images_in(folder / "images" / "pipeline")) == 12


def test_variations_and_classes_by_the_command(evaluate, pipelines, images, flags, tmp_path):
    found, folder = evaluate(
        *("--pipeline", pipelines["sd"], "--init_images", images, "--strength", 0.5, "--images_per_prompt", 1),
        *(
            "--prompts",
            "a square",
            "--scheduler",
            "dpm++_2m",
            "--clamp_start",
            3,
            "--clamp_end",
            2,
            "--metrics",
            "vendi",
            *flags,
        ),
    )
    assert len(images_in(folder / "images" / "pipeline")) == 6
    assert found["entries"]["pipeline"]["drawn_with"]["strength"] == 0.5
    assert found["entries"]["pipeline"]["drawn_with"]["controls"]["clamp_end"] == 2.0
    assert found["entries"]["pipeline"]["drawn_with"]["scheduler"] == "DPMSolverMultistepScheduler"
    found, folder = evaluate(
        *("--pipeline", class_conditional(tmp_path / "dit"), "--class_labels", 7, 3, "--images_per_prompt", 2),
        *("--guidance_scale", 1.0, "--metrics", "lpips_diversity", "clip_score", *flags),
        out="classes",
    )
    assert list(images_in(folder / "images" / "pipeline")) == [
        f"{number:05d}_{sample:05d}.png" for number in range(2) for sample in range(2)
    ]
    scores = found["entries"]["pipeline"]["scores"]
    assert scores["lpips_within_prompts"]["settings"]["prompts"] == 2
    assert scores["clip_score"]["not_computed"] == "the images have no prompts"


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_fits_a_browsers_window(evaluate, pipelines, flags, real_images, tmp_path, width):
    """In headless Chromium, where there is one: nothing is wider than the window, and every picture shows."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    _, folder = evaluate(
        *("--pipeline", pipelines["sd"], "--baseline", pipelines["sd2"], "--prompts", *PROMPTS, "a" * 300, *flags),
        *("--reference", real_images),
    )
    script = """<script>addEventListener('load', () => {
        const page = document.documentElement, images = [...document.images];
        parent.postMessage(`wider by ${page.scrollWidth - page.clientWidth}, of ${page.clientWidth}, broken ` +
            images.filter(image => !image.naturalWidth).length, '*');
    })</script>"""
    report = (folder / "report.html").read_text()
    (tmp_path / "report.html").write_text(report.replace('loading="lazy"', "") + script)
    page = tmp_path / "page.html"
    frame = f"<iframe src='report.html' style='border: 0; width: {width}px; height: 20000px'></iframe>"
    page.write_text(frame + "<script>addEventListener('message', e => document.title = e.data)</script>")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([*command, f"file://{page}"], capture_output=True, text=True, timeout=120)
    assert f"wider by 0, of {width}, broken 0" in done.stdout


def test_a_signal_while_scores_are_computed(evaluate, pipelines, flags, real_images, monkeypatch, capsys):
    """The images that were drawn stay, and the same command continues to the scores."""
    words = ["--pipeline", pipelines["sd"], "--prompts", *PROMPTS, "--metrics", "vendi", "kid", *flags]
    words += ["--reference", real_images]
    called, calls = Network.__call__, []

    def signalled(self, pictures, device):
        calls.append(None)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return called(self, pictures, device)

    monkeypatch.setattr(Network, "__call__", signalled)
    found, _ = evaluate(*words, "--feature_batch_size", 1, expect=128 + signal.SIGTERM)
    assert found is None
    assert "stopped while scores were computed; the same command continues" in capsys.readouterr().err
    found, _ = evaluate(*words)
    assert found["entries"]["pipeline"]["scores"]["kid"]["value"] is not None


def test_features_come_in_halves_where_memory_is_short(evaluate, pipelines, flags, real_images, monkeypatch):
    words = ["--pipeline", pipelines["sd"], "--prompts", *PROMPTS, "--metrics", "kid", "lpips_diversity", *flags]
    words += ["--reference", real_images, "--feature_batch_size", 8]
    whole, _ = evaluate(*words, out="whole")
    called = Network.__call__

    def short(self, pictures, device):
        if len(pictures) > 2:
            raise torch.OutOfMemoryError
        return called(self, pictures, device)

    monkeypatch.setattr(Network, "__call__", short)
    halves, _ = evaluate(*words, out="halves")
    for name in ("kid", "lpips_diversity"):
        values = [each["entries"]["pipeline"]["scores"][name]["value"] for each in (whole, halves)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
