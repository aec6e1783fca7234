"""Gradients where memory is short: smaller pieces, the same training."""

import json
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from tests.comparing import assert_same_bits, losses, weights
from tests.conftest import mostly_slow
from tests.launching import command, launcher, run
from utils.config.options import UserError
from utils.runtime.engines import Engine
from utils.runtime.memory import is_out_of_memory
from utils.training.backward import Gradients, setting
from utils.training.objective import Objective
from utils.training.state import TrainingState

FLAGS = ["--max_train_steps", 4, "--learning_rate", 1e-3, "--adam_epsilon", 1e-5]


def test_what_says_that_memory_was_short():
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(MemoryError())
    for words in (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 4",
    ):
        assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_setting_keeps_the_samples():
    assert setting(4, 12) == "--train_batch_size 4 --gradient_accumulation_steps 3"
    assert setting(5, 12) == "--train_batch_size 4 --gradient_accumulation_steps 3"
    assert setting(1, 7) == "--train_batch_size 1 --gradient_accumulation_steps 7"


@pytest.fixture
def memory(monkeypatch):
    """memory(2) has a forward pass of over two samples fail, from its `after`-th call on."""

    def limit(samples: int, after: int = 1) -> None:
        original, calls = Objective.forward, []

        def forward(self, encoded):
            calls.append(None)
            if len(calls) >= after and len(encoded.batch) > samples:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return original(self, encoded)

        monkeypatch.setattr(Objective, "forward", forward)

    return limit


@pytest.mark.parametrize("more", mostly_slow([(), ("--gradient_accumulation_steps", 2, "--use_ema")], ()))
def test_out_of_memory_in_a_step_changes_nothing(train, memory, monkeypatch, caplog, tmp_path, more):
    data = tiny.make_images(tmp_path / "data", 12)
    flags = [*FLAGS, "--train_batch_size", 5, "--checkpointing_steps", 3, *more]
    whole = train("sd", *flags, data=data, out="whole")
    memory(2, after=5 if more else 3)
    short = train("sd", *flags, data=data, out="short")
    assert any(
        "out of memory in step" in record.message and "--train_batch_size" in record.message
        for record in caplog.records
    )
    torch.testing.assert_close(losses(short), losses(whole), rtol=1e-5, atol=1e-6)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(short)[name], tensor, rtol=1e-4, atol=2e-6)
    state = json.loads((short / "checkpoint-3" / "training_state.json").read_text())
    assert state["samples_at_once"] == 2
    monkeypatch.undo()
    memory(2)  # a resumed run begins with what fits
    caplog.clear()
    again = train("sd", *flags, "--resume_from_checkpoint", "checkpoint-3", data=data, out="short")
    assert not any("out of memory" in record.message for record in caplog.records)
    torch.testing.assert_close(losses(again), losses(whole), rtol=1e-5, atol=1e-6)


def test_one_sample_that_does_not_fit(refused, memory):
    memory(0)
    refused(
        ["--train_batch_size", 2],
        "out of memory in step 1 with one sample at a time",
        "--gradient_checkpointing, --cache",
    )


def test_find_batch_size_takes_what_fits(train, memory, caplog, tmp_path):
    data = tiny.make_images(tmp_path / "data", 8)
    flags = [*FLAGS, "--train_batch_size", 2, "--gradient_accumulation_steps", 4]
    whole = train("sd", *flags, data=data, out="whole")
    memory(4)
    found = train("sd", *flags, "--find_batch_size", data=data, out="found")
    assert any("--train_batch_size 4 --gradient_accumulation_steps 2" in record.message for record in caplog.records)
    torch.testing.assert_close(losses(found), losses(whole), rtol=1e-5, atol=1e-6)


class Summing(torch.nn.Module):
    """A model of one weight that takes so many samples."""

    def __init__(self, most: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.most = most
        self.seen: list[int] = []

    def forward(self, values):
        self.seen.append(len(values))
        if len(values) > self.most:
            raise torch.OutOfMemoryError
        return self.weight * values


class Values:
    """A batch, for these tests, of plain numbers."""

    def __init__(self, values: torch.Tensor):
        self.values, self.slots = values, tuple(range(len(values)))

    def __len__(self) -> int:
        return len(self.values)

    def part(self, begin: int, end: int) -> "Values":
        return Values(self.values[begin:end])

    def to(self, device: torch.device) -> "Values":
        return self


def test_the_rehearsal_halves_and_leaves_no_gradient():
    """Two processes, of which the other fails once where this one would not."""
    others = iter([1.0, 0.0, 0.0])
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=2,
        sync_gradients=True,
        no_sync=lambda model: nullcontext(),
        backward=lambda loss: loss.backward(),
        reduce=lambda failed: failed + next(others),
        mixed_precision="no",
    )
    model, encoder = Summing(4), SimpleNamespace(encode=lambda batch: batch.values)
    gradients = Gradients(Engine(accelerator), model, encoder, 0, 1, 16, 1.0, 16, can_retry=True, cures=[])
    gradients.rehearse(Values(torch.ones(16)))
    assert model.seen == [16, 8, 4, 1]
    assert gradients.size == 4
    assert model.weight.grad is None
    model.most = 0
    others = iter([0.0] * 9)
    with pytest.raises(UserError, match=r"in the rehearsal.*one sample at a time; try a smaller --resolution"):
        gradients.rehearse(Values(torch.ones(16)))


def test_the_rehearsal_holds_the_optimizers_state():
    """A fused AdamW makes it, by a step that changes nothing; any other has a placeholder of its size on a GPU."""
    torch.manual_seed(0)
    found = []
    for is_held in (False, True):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 6))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        accelerator = SimpleNamespace(device=torch.device("cpu"), scaler=None)
        engine = SimpleNamespace(spreads=False, decides_on_device=True, accelerator=accelerator)
        state = TrainingState(engine, None, [], None, optimizer, [], [], [], *4 * [None])
        if is_held:
            model = Summing(2)
            with state.holding_optimizer_state():
                held = optimizer.state[weight]
                assert {name: float(value.sum()) for name, value in held.items()} == dict.fromkeys(held, 0.0)
                assert held["exp_avg"].shape == weight.shape
                assert weight.grad is None
                model(torch.ones(2))
        for step in range(3):
            weight.grad = torch.full((6,), 0.1 * (step + 1))
            optimizer.step()
        found.append(weight.detach().clone())
    assert torch.equal(*found)


def test_memory_that_the_optimizers_state_takes_halves_the_batch():
    """What would fit without it, and run out in the second step."""
    model, encoder = Summing(8), SimpleNamespace(encode=lambda batch: batch.values)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=2,
        sync_gradients=True,
        no_sync=lambda model: nullcontext(),
        backward=lambda loss: loss.backward(),
        reduce=lambda failed: failed,
        mixed_precision="no",
    )

    @contextmanager
    def holding():
        model.most = 2
        yield
        model.most = 8

    gradients = Gradients(Engine(accelerator), model, encoder, 0, 1, 8, 1.0, 8, can_retry=True, cures=[])
    gradients.rehearse(Values(torch.ones(8)), holding)
    assert gradients.size == 2


class Graphed(torch.autograd.Function):
    """A product whose gradient is written over the one before, as that of a CUDA graph is."""

    memory = torch.zeros(2)

    @staticmethod
    def forward(context, weight, values):
        context.save_for_backward(values)
        return weight.sum() * values

    @staticmethod
    def backward(context, gradient):
        (values,) = context.saved_tensors
        Graphed.memory.fill_((gradient * values).sum())
        return Graphed.memory.detach(), None


@pytest.mark.parametrize("owns_memory", [True, False])
def test_accumulated_gradients_have_memory_of_their_own(owns_memory):
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        no_sync=lambda model: nullcontext(),
        backward=lambda loss: loss.backward(),
        mixed_precision="no",
    )
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.ones(2))
    model.unused = torch.nn.Parameter(torch.ones(2))
    model.forward = lambda values: Graphed.apply(model.weight, values)
    encoder = SimpleNamespace(encode=lambda batch: batch.values)
    gradients = Gradients(Engine(accelerator), model, encoder, 0, 2, 4, 1.0, 2, can_retry=True, cures=[])
    batches = [Values(torch.tensor([1.0, 2.0])), Values(torch.tensor([3.0, 4.0]))]
    with gradients.of(batches[0]) as found:
        assert list(found) == ["weight"]
    gradients.owns_memory = owns_memory
    places = set()
    for step in range(3):
        gradients.add_up(step, batches)
        assert (model.weight.grad.tolist() == [10.0, 10.0]) == owns_memory
        assert model.unused.grad is None
        places.add(model.weight.grad.data_ptr())
        model.weight.grad = None  # as an optimizer's zero_grad does
    assert not owns_memory or len(places) == 1


@pytest.mark.nightly
def test_three_processes_resume_bit_by_bit(pipelines, images, tmp_path):
    """DistributedDataParallel orders its sums anew after its first backward pass: from three on that shows."""
    words = [*launcher("torch.distributed.run"), "--nproc_per_node", "3", "--master_port", "29651"]
    flags = (
        "--train_batch_size",
        1,
        "--learning_rate",
        1e-3,
        "--checkpointing_steps",
        2,
        "--dataloader_num_workers",
        0,
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run([*words, *command(pipelines, images, whole, *flags, "--max_train_steps", 4)])
    run([*words, *command(pipelines, images, parts, *flags, "--max_train_steps", 2)])
    more = ("--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    run([*words, *command(pipelines, images, parts, *flags, *more)])
    assert losses(whole) == losses(parts)
    assert_same_bits(weights(whole), weights(parts))
    assert Path(whole / "checkpoint-4").exists()


@pytest.mark.parametrize(("precision", "expected"), [("fp16", 64.0), ("bf16", 1.0)])
def test_the_compile_gate_scales_the_loss_of_fp16_so_that_nothing_overflows(monkeypatch, precision, expected):
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1, mixed_precision=precision)
    gradients = Gradients(Engine(accelerator), Summing(4), None, 0, 1, 4, 1.0, 4, can_retry=True, cures=[])

    @contextmanager
    def of(batch):
        yield {"weight": torch.tensor(float("inf") if gradients.gate_scale > 100 else 1.0)}

    monkeypatch.setattr(gradients, "of", of)
    gradients.settle_gate_scale(Values(torch.ones(4)))
    assert gradients.gate_scale == expected
