"""Whole optimizer steps that are recorded and replayed: on a stand-in for CUDA graphs, which a CPU lacks."""

import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from tests.comparing import assert_same_bits, losses, weights
from utils.runtime.engines import Engine
from utils.training import speed_up
from utils.training.optimizers import NamedParameter
from utils.training.state import TrainingState
from utils.training.step_graph import WARM_UPS, Outcome, StepGraph

FLAGS = ["--train_batch_size", 2, "--learning_rate", 1e-3, "--lr_scheduler", "linear", "--adam_epsilon", 1e-4]
FLAGS += ["--max_train_steps", 5, "--no_final_checkpoint"]
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "lift_fresh")  # of the device, or from Python's lists


class NoReads(TorchDispatchMode):
    """Refuses what a recording can't hold: what the host has to know, and what it gives from memory of its own."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function.overloadpacket.__name__ in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        return function(*arguments, **(named or {}))


class Replays:
    """Records as CUDA does: the same tensors are read and written at each replay, whatever Python says by then."""

    def __init__(self):
        self.count = 0
        self.damage = 1.0

    def record(self, compute: Callable[[], Outcome]) -> tuple[Outcome, Callable[[], None]]:
        for _ in range(WARM_UPS):
            compute()
        with NoReads():
            outcome = compute()
        graph: StepGraph = self.graph
        groups, parameters = graph._optimizer.param_groups, list(graph._gradients.model.parameters())
        recorded = [dict(group) for group in groups]
        gradients = {each: each.grad for each in parameters if each.grad is not None}

        @torch.no_grad()
        def replay() -> None:
            self.count += 1
            now = [dict(group) for group in groups]
            for group, values in zip(groups, recorded, strict=True):
                group.update(values)
            with torch.enable_grad():
                again = compute()
            for group, values in zip(groups, now, strict=True):
                group.update(values)
            for one, other in zip(outcome, again, strict=True):
                one.copy_(other)
            for parameter, gradient in gradients.items():
                gradient.copy_(parameter.grad * self.damage)
                parameter.grad = gradient

        return outcome, replay


@pytest.fixture
def recorded(monkeypatch) -> Replays:
    """Has runs on a CPU take --cuda_graphs, by the stand-in."""
    replays = Replays()

    def make(_, *arguments):
        replays.graph = StepGraph(replays, *arguments)
        return replays.graph

    monkeypatch.setattr("utils.training.session.check_speed", lambda *_: None)
    monkeypatch.setattr(speed_up, "CudaRecorder", lambda: None)
    monkeypatch.setattr(speed_up, "StepGraph", make)
    return replays


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("sd", ["--use_ema"]),
        pytest.param("sdxl", ["--adaptation", "lora", "--cache_latents", "--cache_text_embeddings"], marks=SLOW),
        pytest.param("sd2", ["--snr_gamma", 5, "--noise_offset", 0.1, "--max_grad_norm", 0.01], marks=SLOW),
        pytest.param("sd", ["--dream_training", "--layer_norm_steps", 2], marks=SLOW),
        pytest.param("sd", ["--mixed_precision", "bf16", "--bf16_weights", "--use_ema", "--ema_every", 2], marks=SLOW),
    ],
)
def test_recorded_steps_are_the_plain_ones(train, recorded, caplog, name, flags):
    plain = train(name, *FLAGS, *flags, out="plain")
    with caplog.at_level(logging.INFO):
        replayed = train(name, *FLAGS, *flags, "--cuda_graphs", out="replayed")
    assert "--cuda_graphs (whole steps)" in caplog.text
    assert "--cuda_graphs: recorded a step; gradients agree with the plain step's" in caplog.text
    assert recorded.count == 6, caplog.text  # the first is compared and changes nothing
    # a kernel reads rates in float32: another last bit, which the bfloat16 copy of a weight may round elsewhere
    half = "--bf16_weights" in flags
    assert losses(replayed) == pytest.approx(losses(plain), rel=1e-3 if half else 1e-5)
    for key, tensor in weights(replayed).items():
        torch.testing.assert_close(tensor, weights(plain)[key], rtol=1e-4, atol=2e-3 if half else 1e-6)


def test_each_shape_has_a_recording(train, recorded, caplog, tmp_path):
    data = tmp_path / "data"
    for index, size in enumerate([(64, 32), (32, 64), (48, 48)] * 4):
        data.mkdir(exist_ok=True)
        Image.new("RGB", size, (20 * index, 90, 200)).save(data / f"{index}.png")
        (data / f"{index}.txt").write_text("a square")
    flags = [*FLAGS, "--use_aspect_ratio_buckets", "--bucket_group_size", 2, "--max_train_steps", 9]
    flags += ["--bucket_step", 8, "--min_bucket_size", 16, "--max_bucket_size", 64]
    plain = train("sd", *flags, data=data, out="plain")
    with caplog.at_level(logging.INFO):
        replayed = train("sd", *flags, "--cuda_graphs", data=data, out="replayed")
    assert caplog.text.count("--cuda_graphs: recorded a step") == len(recorded.graph._recordings) == 3
    assert losses(replayed) == pytest.approx(losses(plain), rel=1e-5)


def test_a_recording_that_computes_something_else_is_not_used(train, recorded, caplog):
    recorded.damage = 1.5
    plain = train("sd", *FLAGS, out="plain")
    replayed = train("sd", *FLAGS, "--cuda_graphs", out="replayed")
    assert caplog.text.count("batches of this shape are computed without a graph: the recorded gradient of") == 1
    assert "is 50.00% off" in caplog.text
    assert losses(replayed) == losses(plain)


def test_what_can_not_be_recorded_is_computed_plainly(train, recorded, caplog, monkeypatch):
    def fails(_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorded, "record", fails)
    plain = train("sd", *FLAGS, out="plain")
    replayed = train("sd", *FLAGS, "--cuda_graphs", out="replayed")
    assert caplog.text.count("computed without a graph: operation not permitted when stream is capturing") == 1
    assert losses(replayed) == losses(plain)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--gradient_accumulation_steps", 2], "a step accumulates the gradients of several batches"),
        (["--optimizer", "adamw8bit"], "fused AdamW"),
        (["--fused_adamw", "false"], "fused AdamW"),
        (["--optimizer_in_backward"], "fused AdamW"),
        (["--adaptation", "lora", "--lora_dropout", 0.1], "dropout"),
    ],
)
def test_runs_whose_steps_can_not_be_recorded_say_why(train, recorded, caplog, flags, why):
    train("sd", *FLAGS, *flags, "--cuda_graphs")
    assert any("whole steps can't be recorded" in each and why in each for each in caplog.messages)
    assert not recorded.count


def test_a_resumed_run_repeats_recorded_steps(train, recorded):
    flags = [each for each in FLAGS if each != "--no_final_checkpoint"] + ["--use_ema", "--checkpointing_steps", 3]
    flags += ["--cuda_graphs"]
    whole = weights(train("sd", *flags, out="out"))
    again = train("sd", *flags, "--resume_from_checkpoint", "checkpoint-3", out="out")
    assert recorded.count == 6 + 3
    assert_same_bits(weights(again), whole)


def test_a_recorded_step_that_is_not_finite_changes_nothing():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    accelerator = SimpleNamespace(scaler=None, device=torch.device("cpu"))
    state = TrainingState(
        Engine(accelerator), None, [], None, optimizer, [NamedParameter("a", parameter, 0.1)], [], [], *4 * [None]
    )
    for gradient, is_held in ((float("nan"), 0.0), (1.0, 1.0), (1.0, 0.0)):
        parameter.grad = torch.full((3,), gradient)
        norm = state.clip(1.0)
        state.step_on_device(norm, torch.tensor(is_held))
        assert bool((parameter == 1).all()) == (gradient != 1 or is_held == 1)
    assert optimizer.state[parameter]["step"] == 1
