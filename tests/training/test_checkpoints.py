"""Checkpoints: what they hold, which one a run resumes from, and which are removed."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.comparing import assert_same_bits, weights
from tests.conftest import mostly_slow
from tests.text_runs import SHORT, draw, load


def test_checkpoints_load_on_their_own_and_are_pruned(train, pipelines):
    from diffusers import UNet2DConditionModel

    common = ("--train_batch_size", 1, "--learning_rate", 1e-3, "--use_ema", "--checkpointing_steps", 2)
    out = train("sd", *common, "--max_train_steps", 4)
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    pipeline = load(pipelines["sd"])
    for name in ("unet", "unet_ema"):
        pipeline.unet = UNet2DConditionModel.from_pretrained(out, subfolder=f"checkpoint-2/{name}")
        draw(pipeline)
    config = json.loads((out / "checkpoint-2" / "unet_ema" / "config.json").read_text())
    assert config["optimization_step"] == 2
    assert config["decay"] == 0.9999
    (out / "checkpoint-77.tmp").mkdir()
    (out / "checkpoints").mkdir()
    more = ("--resume_from_checkpoint", "checkpoint-4", "--checkpoints_total_limit", 2)
    train("sd", *common, "--max_train_steps", 8, *more)
    assert {path.name for path in out.glob("checkpoint-*")} == {
        "checkpoint-6",
        "checkpoint-8",
        "checkpoint-77.tmp",
    }


@pytest.mark.parametrize("name", ["sd", "pixels"])
def test_a_finished_run_trains_no_further_step(train, name):
    out = train(name, *SHORT)
    before, lines = weights(out), (out / "metrics.jsonl").read_text()
    (out / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    train(name, *SHORT, "--resume_from_checkpoint", "latest")
    assert_same_bits(before, weights(out))
    assert (out / "metrics.jsonl").read_text() == lines


def test_latest_without_a_checkpoint_starts_anew(train, tmp_path):
    (tmp_path / "out" / "logs").mkdir(parents=True)
    (tmp_path / "out" / "run.json").write_text("{}")
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    (tmp_path / "out" / ".tmp-checkpoint-2").mkdir()
    out = train("sd", *SHORT, "--resume_from_checkpoint", "latest")
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert not list(out.glob(".tmp-*"))


def test_a_checkpoint_that_is_cut_off_is_passed_over(train):
    out = train("sd", *SHORT, "--checkpointing_steps", 1)
    file = out / "checkpoint-2" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    train("sd", *SHORT, "--resume_from_checkpoint", "latest")
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    load_file(file)


def test_later_checkpoints_of_another_branch_are_set_aside(train):
    common = ("--train_batch_size", 1, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1)
    out = train("sd", *common[:4], "--max_train_steps", 4)
    train("sd", *common, "--max_train_steps", 3, "--resume_from_checkpoint", "checkpoint-2")
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-3"}
    assert (out / "abandoned-checkpoint-4" / "manifest.json").exists()
    train("sd", *common, "--max_train_steps", 2, "--overwrite_output_dir")
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2"}


def poison(monkeypatch, steps: range) -> None:
    """Has the losses of some optimizer steps be NaN."""
    from utils.training.objective import Objective

    forward = Objective.forward
    monkeypatch.setattr(
        Objective,
        "forward",
        lambda self, encoded: forward(self, encoded) * (float("nan") if encoded.batch.step in steps else 1.0),
    )


@pytest.mark.parametrize("name", ["sd", "pixels"])
def test_a_poisoned_batch_is_skipped_and_named(train, monkeypatch, caplog, name):
    flags = ("--max_train_steps", 6, "--train_batch_size", 2, "--use_ema", "--checkpointing_steps", 1)
    poison(monkeypatch, range(4, 5))
    out = train(name, *flags)
    four, five, six = (weights(out / f"checkpoint-{step}") for step in (4, 5, 6))
    assert_same_bits(four, five)
    assert not torch.equal(five["conv_in.weight"], six["conv_in.weight"])
    assert all(torch.isfinite(tensor).all() for tensor in weights(out).values())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["train_loss"] is None for line in lines] == [False] * 4 + [True, False]
    (named,) = [record.getMessage() for record in caplog.records if "was skipped" in record.getMessage()]
    assert "step 5" in named
    assert named.count(".png") == 2


@pytest.mark.parametrize("name", ["sd", "flow"])
def test_a_run_that_diverges_ends_with_its_last_checkpoint_named(train, monkeypatch, capsys, name):
    poison(monkeypatch, range(3, 100))
    flags = ("--train_batch_size", 2, "--checkpointing_steps", 2, "--max_skipped_steps", 3, "--max_train_steps", 50)
    out = train(name, *flags, expect=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "3 consecutive steps" in error
    assert "checkpoint-6" in error
    assert all(torch.isfinite(tensor).all() for tensor in weights(out / "checkpoint-6").values())


@pytest.mark.parametrize(
    ("file", "harm", "said"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "flip", "has changed since it was written (its sha256 differs)"),
        pytest.param("optimizer.safetensors", "cut", "bytes, ", marks=pytest.mark.slow),
        pytest.param("training_state.json", "remove", "training_state.json is missing", marks=pytest.mark.slow),
        pytest.param("manifest.json", "cut", "manifest.json can't be read", marks=pytest.mark.slow),
        ("manifest.json", "remove", "manifest.json is missing"),
    ],
)
@pytest.mark.parametrize("name", mostly_slow(["sd", "labels"], "sd"))
def test_a_damaged_checkpoint_is_passed_over_or_refused(train, capsys, caplog, file, harm, said, name):
    flags = ["--train_batch_size", 2, "--checkpointing_steps", 2, "--lr_scheduler", "constant"]
    out = train(name, *flags, "--max_train_steps", 4)
    path = out / "checkpoint-4" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(content if harm == "flip" else content[: len(content) // 2])
    train(name, *flags, "--max_train_steps", 6, "--resume_from_checkpoint", "checkpoint-4", expect=2)
    error = capsys.readouterr().err
    assert "--resume_from_checkpoint checkpoint-4 is damaged: " in error
    assert said in error
    train(name, *flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert any("latest skips checkpoint-4" in record.message and said in record.message for record in caplog.records)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
