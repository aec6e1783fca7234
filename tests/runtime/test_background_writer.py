"""Checkpoints written while the training continues: the same files, and no error lost."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.conftest import message
from tests.repository import ROOT
from utils.config.options import UserError
from utils.runtime.background_writer import BackgroundWriter, HostBuffers, taken_bytes
from utils.training.checkpoint import Checkpoints
from utils.training.optimizers import NamedParameter

RUNS = {
    "full": ("sd", "--use_ema", "--train_text_encoder"),
    "8 bits": ("sdxl", "--use_8bit_adam", "--ema_lengths", 0.1),
    "bfloat16": ("sd", "--pure_bf16", "--mixed_precision", "bf16", "--use_ema"),
    "lora": ("sdxl", "--adaptation", "lora", "--train_text_encoder", "--use_ema", "--optimizer", "prodigy"),
    "lokr": ("sd", "--adaptation", "lokr", "--rank", 2, "--use_ema", "--optimizer", "muon"),
    "term": ("sd", "--loss_module", ROOT / "examples" / "adversarial_loss.py", "--loss_module_args", "channels=8"),
}


def contents(folder: Path) -> dict[str, object]:
    """Of all files but the manifest; of tensors their bytes, for the order of a header's metadata is left to chance."""
    found: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"):
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes()
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dict
                found[name] = (
                    file.metadata(),
                    {
                        key: (each.dtype, each.reshape(-1).view(torch.uint8).numpy().tobytes())
                        for key, each in tensors.items()
                    },
                )
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("full", "lora") else [pytest.mark.slow]) for name in RUNS]
)
def test_the_same_files_as_when_the_training_waits(train, monkeypatch, name):
    """Each is written slowly, while the next steps change the weights that it is of."""
    pipeline, *flags = RUNS[name]
    flags += ["--train_batch_size", 2, "--max_train_steps", 5, "--checkpointing_steps", 2, "--learning_rate", 1e-3]
    waiting = train(pipeline, *flags, out="waiting")
    save = Checkpoints.save

    def slowly(self, step, write):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.5)
        return save(self, step, write)

    monkeypatch.setattr(Checkpoints, "save", slowly)
    behind = train(pipeline, *flags, "--async_checkpointing", out="behind")
    for step in (2, 4, 5):
        assert contents(waiting / f"checkpoint-{step}") == contents(behind / f"checkpoint-{step}")
        assert json.loads((behind / f"checkpoint-{step}" / "manifest.json").read_text())["files"]
    train(pipeline, *flags, "--max_train_steps", 6, "--resume_from_checkpoint", "latest", out="behind")


def test_an_error_behind_ends_the_run(train, monkeypatch, capsys):
    save = Checkpoints.save

    def fails(self, step, write):
        if step == 4:
            raise UserError("checkpoint-4 can't be written: No space left on device")
        return save(self, step, write)

    monkeypatch.setattr(Checkpoints, "save", fails)
    flags = ["--train_batch_size", 2, "--max_train_steps", 8, "--checkpointing_steps", 2]
    out = train("sd", *flags, "--async_checkpointing", expect=2)
    assert "checkpoint-4 can't be written: No space left on device" in message(capsys)
    assert [path.name for path in Checkpoints(out, None).found()] == ["checkpoint-2"]


def test_buffers_are_kept_and_counted(monkeypatch, tmp_path):
    buffers, tensor = HostBuffers(), torch.arange(4.0)
    first = buffers.copy("a", tensor)
    tensor += 1
    assert first.tolist() == [0, 1, 2, 3]
    assert buffers.copy("a", tensor) is first
    assert buffers.copy("a", tensor.half()) is not first
    facts = tmp_path / "meminfo"
    facts.write_text("MemTotal:       100 kB\nMemAvailable:   10 kB\n")
    monkeypatch.setattr("utils.runtime.background_writer.MEMORY_FACTS", facts)
    assert buffers.have_room_for([torch.zeros(1000)])
    assert not buffers.have_room_for([torch.zeros(5000)])


def test_without_room_the_training_waits(train, monkeypatch, caplog):
    monkeypatch.setattr(HostBuffers, "have_room_for", lambda self, tensors: False)
    out = train("sd", "--train_batch_size", 2, "--max_train_steps", 2, "--async_checkpointing")
    assert (out / "checkpoint-2").exists()
    assert any("host memory is too small" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("device", "asked", "available", "is_on"),
    [
        *[("cuda", None, 10**9, True), ("cuda", None, 5000, False), ("cpu", None, 10**9, False)],
        *[("cuda", False, 10**9, False), ("cpu", True, 10, True)],
    ],
)
def test_on_a_gpu_with_room_for_two_copies_it_is_the_default(monkeypatch, device, asked, available, is_on):
    from types import SimpleNamespace

    from utils.training import saving
    from utils.training.state import TrainingState

    monkeypatch.setattr("utils.training.state.available_memory", lambda: available)
    monkeypatch.setattr(saving, "on_main_process", lambda _, ask: ask())
    weight = NamedParameter("a", torch.nn.Parameter(torch.zeros(500)), 1.0)  # 2,000 bytes
    accelerator = SimpleNamespace(device=torch.device(device))
    state = SimpleNamespace(
        parameters=[weight], own_parameters=[], averages=[], optimizer_bytes=4000, accelerator=accelerator
    )
    state.copies_fit_twice = lambda: TrainingState.copies_fit_twice(state)
    assert saving.saves_behind(asked, state) == is_on


def test_the_writer_raises_what_its_last_job_raised():
    def fail() -> None:
        raise UserError("no")

    with BackgroundWriter(is_on=True) as writer:
        writer.run(fail)
        with pytest.raises(UserError, match="no"):
            writer.join()
        writer.join()
    with pytest.raises(UserError, match="no"), BackgroundWriter(is_on=True) as writer:
        writer.run(fail)


@pytest.mark.parametrize(("size", "expected"), [(3, 16), (4, 16), (5, 32), (0, 0)])
def test_pinned_copies_are_counted_at_the_size_that_is_taken(monkeypatch, size, expected):
    tensor = torch.zeros(size)
    assert taken_bytes(tensor) == tensor.nbytes
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    assert taken_bytes(tensor) == expected


@pytest.mark.parametrize("are_kept", [True, False])
def test_only_buffers_that_are_kept_are_pinned(monkeypatch, are_kept):
    class OnAGpu(torch.Tensor):
        is_cuda = True

    asked, empty = [], torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *given, pin_memory, **named: asked.append(pin_memory) or empty(*given, **named)
    )
    HostBuffers(are_kept=are_kept).copy("a", torch.zeros(3).as_subclass(OnAGpu))
    assert asked == [are_kept]
