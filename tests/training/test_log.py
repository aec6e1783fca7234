"""What a run says of itself: epochs, layers, histograms, and what is out of the ordinary."""

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from utils.runtime.step_lines import JsonLines, SampleCount
from utils.training import log as tracking
from utils.training.log import EpochLosses, LayerNorms, RunLog, SentNumbers, Skips, StepMetrics


class Stream:
    """A GPU's queue, as the log sees it: work is done when it is waited for, in order."""

    def __init__(self):
        self.queued = self.done = 0

    def event(self) -> SimpleNamespace:
        place = self.queued
        return SimpleNamespace(record=lambda: None, synchronize=lambda: setattr(self, "done", max(self.done, place)))


@pytest.mark.parametrize("together", [1, 3])
def test_reading_a_steps_numbers_leaves_the_next_step_queued(tmp_path, monkeypatch, together):
    """Where the log waited for all that is queued, the device would have nothing to do until the next step is."""
    stream = Stream()

    class Numbers(SentNumbers):
        def __init__(self, row):
            self._row, self._event = row, stream.event()

    monkeypatch.setattr(tracking, "SentNumbers", Numbers)
    facts = {"is_main_process": True, "is_local_main_process": False, "trackers": [], "scaler": None}
    accelerator = SimpleNamespace(device=torch.device("cpu"), **facts)
    with RunLog(accelerator, tmp_path, range(9), SampleCount(1), together) as log:
        for step in range(1, 10):
            stream.queued = step  # its kernels
            log.step(StepMetrics(step, 0.0, torch.tensor(1.0 / step), torch.tensor(1.0), 1e-3))
            assert stream.done < stream.queued
            assert stream.done == (step - 1) // together * together
    assert stream.done == 9
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train_loss"] for line in lines] == pytest.approx([1 / step for step in range(1, 10)])


def test_numbers_on_the_host_are_read_as_they_are():
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, float("inf")])]
    assert SentNumbers.read([SentNumbers(row) for row in rows]) == [[1.0, 2.0], [3.0, float("inf")]]


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
    with caplog.at_level(logging.WARNING, logger="utils.training.log"):
        losses.add(30, 1, 1.05)
        assert not caplog.records
        losses.add(31, 1, 1.5)
    assert "loss 1.5000 is far above the losses of the last epoch, 1.0000 to 1.0400" in caplog.text


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


@pytest.mark.parametrize(
    ("scale", "gradient_norms", "total"),
    [
        (None, [1.0, math.inf, math.nan, 1.0], 2),
        (65536.0, [math.inf, math.inf, math.inf, 1.0], 0),  # fp16's scaler looks for the largest scale that fits
        (0.5, [math.inf, math.inf, math.inf, 1.0], 3),  # they overflow without being scaled up
    ],
)
def test_which_steps_count_as_skipped(tmp_path, monkeypatch, scale, gradient_norms, total):
    monkeypatch.setattr("accelerate.utils.gather_object", lambda objects: objects)
    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    facts = {"is_main_process": True, "is_local_main_process": False, "trackers": []}
    accelerator, skips = SimpleNamespace(device=torch.device("cpu"), scaler=scaler, **facts), Skips()
    with RunLog(accelerator, tmp_path, range(4), SampleCount(1), skips=skips) as log:
        for step, norm in enumerate(gradient_norms, start=1):
            log.step(StepMetrics(step, 0.0, torch.tensor(1.0), torch.tensor(norm), 1e-3))
    assert (skips.total, skips.in_a_row) == (total, 0)


def test_a_verdict():
    assert not Skips(0, 0).verdict(0)
    assert not Skips(4, 4).verdict(8)
    assert Skips(5, 1).verdict(9) == "5 of 9 steps had no finite loss and gradient"
    assert not Skips(9, 9).verdict(100)
    assert Skips(10, 10).verdict(100) == "the last 10 of 100 steps had no finite loss and gradient"


def test_a_tracker_that_fails_is_given_up(train, caplog, monkeypatch):
    """Once, with a warning, and the training continues."""
    from accelerate.tracking import TensorBoardTracker

    def fail(self, *arguments, **named):
        raise OSError(28, "No space left on device")

    for name in ("log", "finish"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TensorBoardTracker, name, fail)
            flags = ["--max_train_steps", 3, "--train_batch_size", 2, "--report_to", "tensorboard"]
            out = train("sd", *flags, out=name)
        said = [record.message for record in caplog.records if "can't be written" in record.message]
        assert said == [
            "tensorboard can't be written: [Errno 28] No space left on device; the training continues without it "
            "(metrics.jsonl has the numbers)"
        ]
        assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
        caplog.clear()


def test_a_tracker_that_can_not_start(train, monkeypatch, capsys):
    from accelerate.tracking import TensorBoardTracker

    def fail(self):
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(TensorBoardTracker, "start", fail)
    train("sd", "--max_train_steps", 1, "--report_to", "tensorboard", expect=2)
    assert "--report_to tensorboard can't be started: [Errno 13] Permission denied" in capsys.readouterr().err


def test_lines_that_a_full_disk_refuses_are_left_out(tmp_path, monkeypatch, caplog):
    """Also one that was written in part; those after it are whole."""
    lines = JsonLines(tmp_path / "lines")
    lines.write({"step": 1})
    file, written = lines._file, []

    class Full:
        def write(self, line):
            written.append(line)
            if len(written) == 1:
                return file.write(line[:5])
            raise OSError(28, "No space left on device")

    lines._file = Full()
    lines.write({"step": 2})
    lines.write({"step": 3})
    lines._file = file
    lines.write({"step": 4})
    lines.close()
    assert (tmp_path / "lines").read_text() == '{"step": 1}\n{"ste\n{"step": 4}\n'
    assert [record.message.count("lines will be missing") for record in caplog.records] == [1]


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
    monkeypatch.setattr("utils.training.log.time.perf_counter", lambda: now[0])
    accelerator = SimpleNamespace(
        is_main_process=True,
        is_local_main_process=False,
        device=torch.device("cpu"),
        scaler=None,
        trackers=[],
    )
    with RunLog(accelerator, tmp_path, range(4), SampleCount(8), together) as log:
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
    accelerator.trackers = []
    log = RunLog(accelerator, tmp_path, range(9), SampleCount(1), steps_together=2)

    def heard(step: int, *sums: float) -> list[float]:
        numbers = (torch.tensor(1.0), torch.tensor(1.0))
        return log.step(StepMetrics(step, 0.0, *numbers, 1e-3, [], [], 0.0, torch.tensor(sums)))

    with log:
        assert heard(1, 1.0, 0.0) == []
        assert heard(2, 0.0, 2.0) == []
        with log.paused("samples"):
            pass
        with log.paused("samples"):
            pass
        assert heard(3, 4.0, 0.0) == [1.0, 2.0]
        assert heard(4, 0.0, 8.0) == []
        assert heard(5, 0.0, 0.0) == [4.0, 8.0]


def test_on_a_cpu_the_time_of_a_step_is_told_once(train, caplog):
    caplog.set_level(logging.INFO)
    train("pixels", "--max_train_steps", 6)
    (said,) = [line for line in caplog.messages if "s per step" in line]
    assert said.startswith("training on the CPU takes ")
    assert said.endswith("for the remaining 3 steps")
