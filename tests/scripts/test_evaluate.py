"""evaluate_pipeline.py, run in this process: what it draws, scores and writes down."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

from tests import tiny
from tests.comparing import assert_same, images_in
from tests.conftest import message, reset_accelerate
from tests.launching import succeed
from tests.scripts.conftest import PROMPTS
from tests.tiny import class_conditional, unconditional
from utils.evaluation.metrics.features import Network
from utils.evaluation.metrics.table import METRICS


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
    succeed([*command, *words], OMP_NUM_THREADS="1")
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


@pytest.mark.slow
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
    assert "not known to have the same prompts" in (out / "report.md").read_text()


def test_a_folder_of_pictures_is_no_output_folder(pipelines, tmp_path, capsys):
    data = tiny.make_images(tmp_path / "data", 3)
    (data / "metadata.jsonl").unlink()
    before = sorted(path.name for path in data.iterdir())
    from evaluate_pipeline import main

    reset_accelerate()
    words = ["--pipeline", pipelines["sd"], "--prompts", "a", "--metrics", "lpips_diversity", "--no_download"]
    assert main([str(word) for word in [*words, "--output_dir", data]]) == 2
    assert "contains images that no run wrote" in message(capsys)
    assert sorted(path.name for path in data.iterdir() if path.name != ".lock") == before


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
    assert "stopped after 4 of 12 images; run the same command to continue" in capsys.readouterr().err
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
    assert "stopped while computing scores; run the same command to continue" in capsys.readouterr().err
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


def test_images_carry_the_web_uis_line_of_settings(evaluate, pipelines):
    flags = ["--prompts", "a red, square", "--negative_prompt", "blue", "--images_per_prompt", 1, "--metrics", "none"]
    _, out = evaluate("--pipeline", pipelines["sd"], *flags, "--scheduler", "euler", "--guidance_scale", 3)
    (file,) = out.rglob("00000_*.png")
    info = Image.open(file).info
    assert info["parameters"] == (
        "a red, square\nNegative prompt: blue\nSteps: 2, Sampler: Euler, Schedule type: Uniform, CFG scale: 3, "
        f"Seed: {info['seed']}, Size: 32x32, Model: sd, RNG: CPU"
    )
    assert info["prompt"] == "a red, square"
