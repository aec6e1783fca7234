"""What a run says of itself: epochs, layers, histograms, and what is out of the ordinary."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from utils.tracking import EpochLosses, LayerNorms, RunLog, StepMetrics


def test_numbers_of_epochs_and_a_loss_that_leaves_them(caplog):
    losses = EpochLosses()
    ended = [losses.add(step, (step + 1) // 30, 1 + 0.01 * (step % 5)) for step in range(30)]
    assert ended[-1] == {
        "step": 29,
        "epoch": 1,
        "min": 1.0,
        "max": 1.04,
        "mean": sum(1 + 0.01 * (n % 5) for n in range(30)) / 30,
    }
    assert ended[:-1] == [None] * 29
    with caplog.at_level(logging.WARNING, logger="utils.tracking"):
        losses.add(30, 1, 1.05)
        assert not caplog.records
        losses.add(31, 1, 1.5)
    assert "loss 1.5000 is far over the last epoch's, which were 1.0000 to 1.0400" in caplog.text


def test_an_outlier_among_layers_is_named():
    norms, layer = LayerNorms(), nn.Linear(3, 2)
    for _ in range(4):
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, 2.0)
        norms.remember(norms.measure(list(layer.named_parameters()), 2.0))
    layer.weight.grad *= 11
    found = norms.outliers(norms.measure(list(layer.named_parameters()), 2.0))
    assert found.keys() == {"weight"}
    torch.testing.assert_close(torch.tensor(found["weight"]), torch.tensor([11.0, 1.0]) * 6**0.5)


def test_layers_and_histograms_of_a_run(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--max_train_steps", 4, "--train_batch_size", 3, "--max_grad_norm", 0, "--report_to", "tensorboard"]
    out = train("sd", *flags, "--layer_norm_steps", 2, "--histogram_steps", 4)
    layers = [json.loads(line) for line in (out / "layers.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in layers] == [2, 4]
    for line in layers:  # the norms of the layers make that of all
        total = sum(norm**2 for norm in line["grad_norms"].values()) ** 0.5
        assert abs(total / metrics[line["step"] - 1]["grad_norm"] - 1) < 1e-4
    assert all(0 <= line["data_wait"] <= 1 for line in metrics)
    epochs = [json.loads(line) for line in (out / "epochs.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert epochs[0]["min"] == min(line["train_loss"] for line in metrics[:2])
    events = EventAccumulator(str(next((out / "logs").rglob("events*")).parent), size_guidance={"histograms": 0})
    events.Reload()
    names = events.Tags()["histograms"]
    assert {"weights/unet.conv_in.weight", "gradients/unet.conv_in.weight"} <= set(names)


@pytest.mark.parametrize("together", [1, 2, 3])
def test_the_speed_of_a_step_is_that_of_its_own_time(tmp_path, monkeypatch, together):
    """A second a step, and hardly any time from the last to the end, are a step's images a second throughout."""
    now = [100.0]
    monkeypatch.setattr("utils.tracking.time.perf_counter", lambda: now[0])
    accelerator = SimpleNamespace(
        is_main_process=True,
        is_local_main_process=False,
        device=torch.device("cpu"),
        scaler=None,
        log=lambda values, step: None,
    )
    with RunLog(accelerator, tmp_path, 0, 4, 8, together) as log:
        for step in range(1, 5):
            now[0] += 1.0
            log.step(StepMetrics(step, 0.0, torch.tensor(0.5), torch.tensor(1.0), 1e-4))
        now[0] += 1e-3
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["images_per_second"] for line in lines] == [8.0] * 4


def test_what_processes_tell_each_other_is_read_once_also_of_steps_before_a_pause(tmp_path):
    """A pause writes steps; what they said is heard at the next one, and added to what comes after."""
    facts = {"is_local_main_process": False, "is_main_process": False, "scaler": None}
    accelerator = SimpleNamespace(**facts, device=torch.device("cpu"))
    accelerator.log = lambda *given, **named: None
    log = RunLog(accelerator, tmp_path, 0, 9, 1, steps_together=2)

    def heard(step: int, *sums: float) -> list[float]:
        numbers = (torch.tensor(1.0), torch.tensor(1.0))
        log.step(StepMetrics(step, 0.0, *numbers, 1e-3, [], [], 0.0, torch.tensor(sums)))
        return log.sums

    with log:
        assert heard(1, 1.0, 0.0) == []
        assert heard(2, 0.0, 2.0) == []
        with log.paused():
            pass
        with log.paused():
            pass
        assert heard(3, 4.0, 0.0) == [1.0, 2.0]
        assert heard(4, 0.0, 8.0) == []
        assert heard(5, 0.0, 0.0) == [4.0, 8.0]
