"""The verdict of real runs: its files, its cost in bits and time, resumed runs, and every family."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest

from tests import tiny
from tests.comparing import assert_same_bits, weights
from tests.launching import succeed
from tests.repository import ROOT
from utils.config.progress import Progress
from utils.evaluation.judging import WORDS
from utils.training.probes import FEWEST_IMAGES, MOST_IMAGES, probe_size
from utils.training.verdict import RunVerdict

FLAGS = ["--train_batch_size", 2, "--learning_rate", 1e-3, "--max_train_steps", 4, "--lr_scheduler", "constant"]


def verdict_of(out):
    return json.loads((out / "verdict.json").read_text())


def steps_of(out):
    return [json.loads(line)["step"] for line in (out / "verdict.jsonl").read_text().splitlines()]


def test_a_run_records_its_verdict_and_trains_the_same_bits(train, tmp_path):
    flags = [*FLAGS, "--validation_split", 0.3, "--random_flip", "--checkpointing_steps", 2]
    judged = train("sd", *flags, out="judged", verdict=True)
    found = verdict_of(judged)
    assert found["verdict"] in WORDS
    assert set(found) >= {"interval", "since_step", "best_checkpoint", "advice", "evidence", "signals"}
    assert steps_of(judged)[0] == 0
    first = json.loads((judged / "verdict.jsonl").read_text().splitlines()[0])
    assert first["bare"] != first["trained"]
    assert steps_of(judged)[-1] == 4
    outcome = json.loads((judged / "run.json").read_text())["outcome"]
    assert outcome["verdict"] == found["verdict"]
    assert found["verdict"] in (judged / "README.md").read_text()
    plain = train("sd", *flags, out="plain")
    assert not (plain / "verdict.json").exists()
    assert_same_bits(weights(judged), weights(plain))


@pytest.mark.slow
def test_a_resumed_run_continues_the_measurements(train):
    flags = [*FLAGS, "--validation_split", 0.3, "--checkpointing_steps", 2]
    whole = train("sd", *flags, out="whole", verdict=True)
    kept = verdict_of(whole)
    lines = (whole / "verdict.jsonl").read_text()
    (whole / "verdict.json").unlink()
    shutil.rmtree(whole / "checkpoint-4")
    train("sd", *flags, "--resume_from_checkpoint", "latest", out="whole", verdict=True)
    again = verdict_of(whole)
    assert again["signals"] == pytest.approx(kept["signals"], rel=1e-4)
    assert (again["verdict"], again["since_step"]) == (kept["verdict"], kept["since_step"])
    assert len((whole / "verdict.jsonl").read_text().splitlines()) >= 2
    assert "drift" in again["signals"]
    assert lines.splitlines()[0] == (whole / "verdict.jsonl").read_text().splitlines()[0]


@pytest.mark.parametrize("samples", [100, 10**4, 10**7])
def test_the_size_fits_the_run(samples):
    size = probe_size(samples, 10**9, 7, 0.025)
    assert FEWEST_IMAGES <= size.images <= MOST_IMAGES
    assert size.captions <= 2 * size.images
    if size.images > FEWEST_IMAGES:
        assert 7 * (5 * 4 * size.images) <= 0.025 * 3 * samples


def test_measurements_that_cost_too_much_are_left_out(monkeypatch):
    verdict = RunVerdict.__new__(RunVerdict)
    verdict._steps, verdict._first_step, verdict._spent = {25: 1, 44: 0, 62: 2}, 0, 10.0
    now = [0.0]
    monkeypatch.setattr("utils.training.verdict.time", SimpleNamespace(monotonic=lambda: now[0]))
    verdict._began = 0.0

    def affordable(step, rank, cost, elapsed):
        verdict._cost, now[0] = cost, elapsed
        return verdict._is_affordable(Progress(step, 100, 0, 0), rank)

    # a short run may take 18 s in all: the measurement before the half comes first
    assert affordable(44, 0, 4.0, 30.0)
    assert affordable(44, 0, 40.0, 30.0)
    assert not affordable(44, 0, 40.0, 900.0)
    assert not affordable(25, 1, 4.0, 30.0)
    assert affordable(25, 1, 2.5, 30.0)
    # a run of an hour, three per cent of it
    assert affordable(25, 1, 30.0, 900.0)
    assert not affordable(25, 1, 40.0, 900.0)


def test_a_missing_file_of_captions_is_named(refused):
    refused(["--forgetting_prompts", "nowhere.txt"], "--forgetting_prompts", "nowhere.txt", verdict=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("sdxl", ["--adaptation", "lora", "--train_text_encoder", "--use_ema"]),
        ("sd", ["--cache_latents", "--cache_text_embeddings", "--validation_split", 0.3]),
        ("pixels", ["--validation_split", 0.3]),
        ("labels", []),
    ],
)
def test_every_family_is_judged(train, name, more):
    out = train(name, *FLAGS, *more, verdict=True)
    found = verdict_of(out)
    assert found["verdict"] in WORDS
    assert ("change_held_out" in found["signals"]) == ("--validation_split" in more)


@pytest.mark.slow
def test_a_stream_without_held_out_images_has_no_verdict(train, tmp_path, caplog):
    import pyarrow as pa
    import pyarrow.parquet

    images = sorted(tiny.make_images(tmp_path / "data", 8).glob("*.png"))
    table = {"image": [path.read_bytes() for path in images], "text": ["a red square"] * len(images)}
    (tmp_path / "shards").mkdir()
    pyarrow.parquet.write_table(pa.table(table), tmp_path / "shards" / "0.parquet")
    out = train("sd", *FLAGS, "--streaming", data=tmp_path / "shards", verdict=True)
    assert not (out / "verdict.json").exists()
    assert "no verdict" in caplog.text


@pytest.mark.slow
def test_a_rate_far_too_high_diverges_and_a_tiny_one_learns_nothing(train, tmp_path):
    data = tiny.make_images(tmp_path / "data", 12)
    flags = ["--train_batch_size", 4, "--max_train_steps", 12, "--lr_scheduler", "constant", "--validation_split", 0.3]
    high = verdict_of(train("sd", *flags, "--learning_rate", 1.0, data=data, out="high", verdict=True))
    assert high["verdict"] == "diverging"
    assert high["since_step"] < 6
    low = verdict_of(train("sd", *flags, "--learning_rate", 1e-12, data=data, out="low", verdict=True))
    assert low["verdict"] == "not learning"
    assert low["since_step"] < 6


@pytest.mark.nightly
def test_two_processes_reach_the_verdict_of_one(pipelines, tmp_path):
    data = tiny.make_images(tmp_path / "data", 10)
    flags = ["--pretrained_model", pipelines["sd"], "--train_data_dir", data, "--resolution", 32, "--report_to", "none"]
    flags += ["--validation_split", 0.4, "--max_train_steps", 1, "--lr_warmup_steps", 0, "--no_export_check"]
    script = str(ROOT / "train_text_to_image.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29633"]
    succeed([sys.executable, script, *flags, "--train_batch_size", 2, "--output_dir", tmp_path / "one"])
    succeed([*launch, script, *flags, "--train_batch_size", 1, "--output_dir", tmp_path / "two"])
    one, two = verdict_of(tmp_path / "one"), verdict_of(tmp_path / "two")
    assert one["verdict"] == two["verdict"]
    assert one["signals"] == pytest.approx(two["signals"], rel=1e-2, abs=1e-4)


@pytest.mark.slow
def test_samples_are_compared_with_training_images(train, monkeypatch):
    """A sample that is a training image has distance 0, and a held-out image about that of held-out images."""
    from PIL import Image

    from utils.sampling.samples import Sample
    from utils.training.probes import Probes
    from utils.training.validation_loss import read_crop

    found = {}

    def spied(self, samples):
        crops = [
            read_crop(self._task.family, images, number, self._still) for images in self._images for number in (0, 1)
        ]
        copies = [Sample(Image.fromarray(crop.pixels.transpose(1, 2, 0)), "") for crop in crops]
        found["copies"] = own(self, copies)
        return own(self, samples)

    own = Probes.copies
    monkeypatch.setattr(Probes, "copies", spied)
    flags = ["--validation_prompt", "a red square", "--validation_num_inference_steps", 2, "--validation_split", 0.4]
    train("sd", *FLAGS, *flags, verdict=True)
    assert found["copies"][:2] == pytest.approx([0, 0], abs=1e-3)
    assert min(found["copies"][2:]) > 0.5
