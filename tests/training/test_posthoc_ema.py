"""Averages whose length is chosen after the training."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.comparing import assert_same_bits, lora, losses, weights
from utils.training.optimizers import NamedParameter
from utils.training.options import EmaOptions
from utils.training.posthoc_ema import KEPT_LENGTHS, AverageLengths, PowerAverage, factors_of, gamma_of, overlap


def test_the_power_of_a_length():
    """Values of the paper's section 3.1, and the standard deviation of the profile summed up."""
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    times = (np.arange(200_000) + 0.5) / 200_000
    for length in (0.02, 0.1, 0.25):
        profile = times ** gamma_of(length)
        mean = (profile * times).sum() / profile.sum()
        assert np.sqrt((profile * (times - mean) ** 2).sum() / profile.sum()) == pytest.approx(length, rel=1e-3)


def test_the_overlap_of_two_profiles():
    times = (np.arange(400_000) + 0.5) / 100_000  # from 0 to 4
    for end, gamma, other_end, other_gamma in ((4, 3.0, 2, 7.0), (1, 7.0, 3, 0.5), (2, 2.0, 2, 2.0)):
        one, other = (
            np.where(times < until, (power + 1) * times**power / until ** (power + 1), 0)
            for until, power in ((end, gamma), (other_end, other_gamma))
        )
        expected = (one * other).sum() / 100_000
        found = overlap(np.float64(end), np.float64(gamma), np.float64(other_end), np.float64(other_gamma))
        assert float(found) == pytest.approx(expected, rel=1e-3)


def wandering(steps: int) -> list[torch.Tensor]:
    """Weights that move as in a training: fast, then slowly, with some noise."""
    random = torch.Generator().manual_seed(0)
    goal = torch.randn(50, generator=random)
    return [
        goal * (1 - np.exp(-3 * step / steps)) + 0.05 * torch.randn(50, generator=random)
        for step in range(1, steps + 1)
    ]


def averaged(history: list[torch.Tensor], gamma: float) -> torch.Tensor:
    """The average with the weight t^(gamma + 1) - (t - 1)^(gamma + 1) of what was there at update t, in float64."""
    times = np.arange(len(history) + 1) / len(history)
    shares = np.diff(times ** (gamma + 1))
    return sum(share * each.double() for share, each in zip(shares, history, strict=True))


def test_a_kept_average_against_the_whole_history():
    history = wandering(300)
    parameter = torch.nn.Parameter(torch.zeros(50))
    average = PowerAverage([parameter], EmaOptions(), 0.07)
    for weights_now in history:
        parameter.data.copy_(weights_now)
        average.update()
    expected = averaged(history, gamma_of(0.07))
    torch.testing.assert_close(average.averages[0].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [0.03, 0.07, 0.15, 0.25])
def test_a_length_that_was_not_kept(tmp_path, length):
    history = wandering(400)
    parameter = torch.nn.Parameter(torch.zeros(50))
    lengths = AverageLengths([NamedParameter("unet.weight", parameter, 1.0)], EmaOptions(ema_lengths=[0.1]), tmp_path)
    for step, weights_now in enumerate(history, start=1):
        parameter.data.copy_(weights_now)
        lengths.update()
        if step % 20 == 0:
            lengths.snapshot(step)
    found, expected = lengths.of_length(length).averages[0].double(), averaged(history, gamma_of(length))
    last = (history[-1].double() - expected).norm()
    assert float((found - expected).norm() / last) < 0.12  # the last weights are this many times as far off
    times = np.repeat(np.arange(20.0, 401, 20), 2)
    gammas = np.tile([gamma_of(each) for each in KEPT_LENGTHS], 20)
    assert factors_of(times, gammas, 400, gamma_of(length)).sum() == pytest.approx(1, abs=0.02)


COMMON = ["--ema_lengths", 0.05, 0.2, "--ema_snapshot_steps", 1, "--train_batch_size", 2, "--learning_rate", 1e-3]
COMMON += ["--validation_split", 0.3, "--validation_steps", 100, "--checkpointing_steps", 4]


@pytest.mark.slow
@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_a_run_exports_the_length_of_the_lowest_loss_and_resumes(train, tmp_path, adaptation):
    data = tiny.make_images(tmp_path / "data", 8)
    flags = [*COMMON, "--adaptation", adaptation]
    whole = train("sd", *flags, "--max_train_steps", 8, data=data, out="whole")
    kept = json.loads((whole / "ema_lengths.json").read_text())
    assert kept["chosen"] == float(min(kept["validation_loss"], key=kept["validation_loss"].get))
    names = [f"step-{step:08d}.safetensors" for step in range(1, 9)]
    assert sorted(file.name for file in (whole / "ema_snapshots").iterdir()) == names
    of = lora if adaptation == "lora" else weights
    train("sd", *flags, "--max_train_steps", 6, data=data, out="parts")
    resumed = ["--max_train_steps", 8, "--resume_from_checkpoint", "checkpoint-4"]
    parts = train("sd", *flags, *resumed, data=data, out="parts")
    assert_same_bits(of(whole), of(parts))
    for name in names:
        assert_same_bits(*(load_file(out / "ema_snapshots" / name) for out in (whole, parts)))
    assert (parts / "ema_snapshots" / "abandoned-step-00000005.safetensors").exists()
    before = of(parts)
    other = ["--ema_lengths", 0.1, "--max_train_steps", 8, "--resume_from_checkpoint", "latest"]
    again = train("sd", *flags, *other, data=data, out="parts")  # nothing to train: another length of the same run
    assert any(not torch.equal(one, before[name]) for name, one in of(again).items())
    plain = train("sd", *flags[9:], "--max_train_steps", 8, "--train_batch_size", 2, "--learning_rate", 1e-3,
                  data=data, out="plain")  # fmt: skip
    assert losses(plain) == losses(whole)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--ema_lengths", 0.3], "--ema_lengths must be over 0 and at most 0.28"),
        (["--ema_lengths", 0.1, "--use_ema"], "give one"),
        (["--ema_lengths", 0.1, 0.2], "choosing among several lengths needs a validation loss"),
        (["--ema_snapshot_steps", 5], "--ema_snapshot_steps goes with --ema_lengths"),
    ],
)
def test_what_does_not_go(refused, flags, named):
    refused(flags, named)
