"""The demo: its data, its judge, its base, and a short run of it."""

import json

import numpy as np
import pytest
import torch

import classifier
import compare
import digits
from tests.repository import ROOT

BASE = ROOT / "demo" / "base"


def test_the_classifier_sees_no_digit_that_is_drawn_from():
    drawing, judging = digits.split_digits()
    drawn, judged = ({ink.tobytes() for ink in part.ink} for part in (drawing, judging))
    assert len(drawing.labels) + len(judging.labels) == 1797
    assert not drawn & judged


def test_the_base_learns_from_no_8_or_9(monkeypatch, tmp_path):
    digits.write_pretraining_folder(tmp_path, num_pictures=200)
    captions = [json.loads(line)["text"] for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert len(captions) == 200
    assert not [text for text in captions if "eight" in text or "nine" in text]


def test_the_evaluation_uses_wordings_and_pairs_of_no_training_caption():
    wishes = digits.evaluation_wishes(50)
    assert len({wish.prompt for wish in wishes}) == 500
    assert not {(wish.ink, wish.ground) for wish in wishes} & set(digits.training_pairs())
    told = [*digits.training_wordings(), *digits.one_colour_wordings()]
    trained = {
        digits.caption(wording, digit, ink, ground)
        for wording in told
        for digit in range(10)
        for ink in digits.PALETTE
        for ground in digits.PALETTE
    }
    assert not trained & {wish.prompt for wish in wishes}


@pytest.mark.slow
def test_the_judge_knows_the_digits_and_colours_of_real_ones():
    drawing, _ = digits.split_digits()
    generator = np.random.default_rng(0)
    pairs = digits.training_pairs()
    pictures, wishes = [], []
    for number in range(0, len(drawing.labels), 3):
        ink, ground = pairs[generator.integers(len(pairs))]
        field = digits.enlarge(drawing.ink[number], generator)
        pictures.append(digits.paint(field, digits.PALETTE[ink], digits.PALETTE[ground]))
        wishes.append(digits.Wish("", int(drawing.labels[number]), ink, ground))
    verdict = classifier.judge(pictures, wishes, classifier.train_classifier())
    assert verdict.digit_right.mean() > 0.94  # and sure of it
    assert verdict.colours_right.mean() > 0.99


def test_the_base_is_a_small_stable_diffusion_pipeline():
    from diffusers import DiffusionPipeline

    files = list(BASE.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) < 12e6
    pipeline = DiffusionPipeline.from_pretrained(BASE)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    ids = pipeline.tokenizer("a red handwritten three on a black background").input_ids
    assert len(ids) == 10
    assert pipeline.tokenizer("a zebra, ünïcode ☃").input_ids


@pytest.mark.slow
@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_a_short_demo(monkeypatch, tmp_path, capsys, adaptation):
    import run
    from tests.conftest import reset_accelerate

    reset_accelerate()
    shortened = [*run.ARGUMENTS[adaptation], "--max_train_steps", "2", "--train_batch_size", "4"]
    monkeypatch.setitem(run.ARGUMENTS, adaptation, shortened)
    monkeypatch.setattr(run, "NUM_PER_DIGIT", 3)
    monkeypatch.setattr(run, "SAMPLING_STEPS", 2)
    monkeypatch.setattr(run, "NUM_REAL", 40)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["run.py", "--adaptation", adaptation, "--output_dir", str(tmp_path)])
    torch.manual_seed(0)
    run.main()
    printed = capsys.readouterr().out
    assert "new digits (8, 9) recognised" in printed
    assert (tmp_path / "before_after.png").stat().st_size > 1000
    found = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert list(found["entries"]) == ["before", "after"]
    scores = found["entries"]["after"]["scores"]
    computed = {name for name, score in scores.items() if score["value"] is not None}
    assert computed >= {"kid", "fid", "precision", "recall", "density", "coverage", "inception_score", "memorisation"}
    assert all(scores[name]["network"] == "digit classifier" for name in computed)
    assert "--no_download" in scores["lpips_diversity"]["not_computed"]
    assert scores["clip_score"]["not_computed"]
    assert found["differences"]["kid"]["interval_95"]
    html = (tmp_path / "evaluation" / "report.html").read_text()
    assert html.count("data:image/png") > 40
    assert "not known to have the same prompts" not in html


@pytest.fixture(scope="module")
def few_pictures(tmp_path_factory):
    """A few pictures of 8 and 9 to train on, and others of them."""
    folder = tmp_path_factory.mktemp("few")
    digits.write_fine_tuning_folder(folder / "digits", num_new=96, num_rehearsed=8)
    digits.write_validation_folder(folder / "unseen", num_pictures=12)
    return folder


def _each_entry() -> list:
    """All, of which `make test` runs the first of each table."""
    tables, params = set(), []
    for entry in compare.entries():
        marks = [pytest.mark.slow] if entry.table in tables else []
        tables.add(entry.table)
        params.append(pytest.param(entry, id=f"{entry.table} {entry.name}", marks=marks))
    return params


@pytest.mark.slow
@pytest.mark.parametrize("entry", _each_entry())
def test_each_entry_of_each_table_lowers_the_validation_loss(train, few_pictures, entry):
    """At a fifth of the demo's rate, which in so few steps would overshoot; Prodigy's is found by itself."""
    flags = ["--mixed_precision", "no", "--train_batch_size", 12, "--max_train_steps", 12, "--lr_scheduler", "cosine"]
    flags += ["--validation_data_dir", few_pictures / "unseen", "--validation_steps", 100, "--no_final_checkpoint"]
    flags += ["--encoding_cache_dir", few_pictures / "cache", "--cache_latents", "--cache_text_embeddings"]
    own = list(entry.flags)
    place = own.index(compare.RATE) + 1
    own[place] = own[place] if entry.name == "prodigy" else str(float(own[place]) / 5)
    out = train(BASE, *flags, "--num_validation_timesteps", 4, *own, "--resolution", 64, data=few_pictures / "digits")
    before, after = (json.loads(line)["loss"] for line in (out / "validation.jsonl").read_text().splitlines())
    assert after < before
