"""Checkpoints and samples by steps, epochs and minutes in runs."""

import pytest

from tests.comparing import assert_same_bits, losses, weights
from tests.conftest import message
from tests.launching import command, launcher, run
from utils.runtime.timers import Timers

FLAGS = ("--train_batch_size", 2, "--max_train_steps", 7)
DRAWN = ("--num_samples", 1, "--num_inference_steps", 2)


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by a minute whenever it is read."""
    now = [0.0]

    def read() -> float:
        now[0] += 60
        return now[0]

    monkeypatch.setattr("utils.training.session.Timers", lambda *minutes: Timers(*minutes, clock=read))
    return now


def names(folder, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def test_checkpoints_and_samples_by_minutes(train, clock, capsys):
    plain = train("pixels", *FLAGS, "--num_samples", 0, "--no_final_checkpoint", out="plain")
    assert not names(plain, "checkpoint-*")
    clock[0] = 0
    flags = ("--checkpointing_minutes", 3, "--save_images_minutes", 4.5, "--no_final_checkpoint")
    out = train("pixels", *FLAGS, *DRAWN, *flags, out="minutes")
    assert names(out, "checkpoint-*")
    assert "checkpoint-1" not in names(out, "checkpoint-*")  # the interval begins with the first step
    assert len(names(out / "samples", "step-[1-9]*")) >= 1
    assert_same_bits(weights(plain), weights(out))


def test_checkpoints_by_epochs_and_steps(train):
    flags = ("--checkpointing_epochs", 1, "--no_final_checkpoint", "--num_samples", 0)
    out = train("pixels", *FLAGS, *flags)  # 6 images, 2 a step
    assert names(out, "checkpoint-*") == ["checkpoint-3", "checkpoint-6"]
    more = ("--checkpointing_steps", 2, "--checkpointing_epochs", 2, "--overwrite_output_dir")
    out = train("pixels", *FLAGS, *more, "--no_final_checkpoint", "--num_samples", 0)
    assert names(out, "checkpoint-*") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_the_learning_rate_does_not_follow_the_clock(train, capsys):
    flags = ("--validation_split", 0.3, "--lr_scheduler", "reduce_on_plateau", "--save_images_minutes", 1)
    train("pixels", *FLAGS, *flags, expect=2)
    assert "--save_images_minutes 1 measures the validation loss by the clock" in message(capsys)


@pytest.mark.nightly
def test_two_processes_save_and_draw_after_the_same_steps(pipelines, images, tmp_path):
    words = [*launcher("torch.distributed.run"), "--nproc_per_node", "2", "--master_port", "29637"]
    flags = ("--train_batch_size", 1, "--max_train_steps", 12)
    plain, out = tmp_path / "plain", tmp_path / "minutes"
    run([*words, *command(pipelines, images, plain, *flags)])
    drawn = ("--validation_prompts", "a", "b", "--validation_num_inference_steps", 1, "--validation_minutes", 0.005)
    run([*words, *command(pipelines, images, out, *flags, *drawn, "--checkpointing_minutes", 0.002)])
    assert len(names(out, "checkpoint-*")) > 1
    assert len(names(out / "samples", "step-*")) > 1
    assert all(len(names(folder, "*.png")) == 2 for folder in (out / "samples").glob("step-*"))
    assert losses(plain) == losses(out)
    assert_same_bits(weights(plain), weights(out))
