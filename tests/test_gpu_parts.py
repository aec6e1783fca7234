"""What only shows on a GPU, by its mechanism: on stand-ins for what a CPU lacks."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from utils.models.perceptual_loss import _resized
from utils.runtime.background_writer import HostBuffers, taken_bytes
from utils.runtime.memory import is_out_of_memory
from utils.runtime.processes import allow_tf32, is_tf32_allowed, without_tf32
from utils.runtime.sharding import _exchanged, spread_like
from utils.training import ema
from utils.training import log as tracking
from utils.training.ema import MovingAverage
from utils.training.log import RunLog, SentNumbers, StepMetrics
from utils.training.optimizer_options import OptimizerOptions
from utils.training.optimizers import NamedParameter, build_optimizer
from utils.training.options import EmaOptions
from utils.training.per_parameter import PerParameter


@pytest.fixture(autouse=True)
def _tf32_as_before():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class TestOutOfMemory:
    @pytest.mark.parametrize(
        "said",
        [
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
            "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory",
            "CUDA error: out of memory",
        ],
    )
    def test_the_words_of_libraries(self, said):
        assert is_out_of_memory(RuntimeError(said))
        assert not is_out_of_memory(ValueError(said))

    @pytest.mark.parametrize("where", ["GET", "FIND"])
    @pytest.mark.parametrize(("free", "expected"), [(0.01, True), (0.2, False)])
    def test_cudnn_without_an_engine_is_short_of_memory_only_where_it_is(self, monkeypatch, where, free, expected):
        error = RuntimeError(f"{where} was unable to find an engine to execute this computation")
        assert not is_out_of_memory(error)  # no GPU
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 8e10), int(8e10)))
        assert is_out_of_memory(error) == expected

    def test_other_errors_are_none(self):
        assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


class TestTF32:
    @pytest.mark.parametrize(("flags", "expected"), [([], False), (["--allow_tf32", "true"], True)])
    def test_one_flag_is_for_products_and_convolutions(self, train, flags, expected):
        torch.backends.cudnn.allow_tf32 = not expected
        train("sd", "--max_train_steps", 1, "--no_final_checkpoint", *flags)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == expected

    def test_networks_that_score_compute_without_it(self, monkeypatch):
        from utils.evaluation.metrics.features import Network

        seen = []

        class Scores(Network):
            name, settings = "stub", ""

            def __init__(self):
                self.module = nn.Identity()

            def pixels(self, image):
                return torch.zeros(3, 2, 2)

            def features(self, pixels):
                seen.append(is_tf32_allowed())
                return pixels.flatten(1)

        monkeypatch.setattr("utils.evaluation.metrics.features.read_picture", lambda picture: None)
        allow_tf32(True)
        Scores()([SimpleNamespace(name="a")], torch.device("cpu"))
        assert seen == [False]
        assert is_tf32_allowed()

    def test_it_comes_back_after_an_error(self):
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = True, False
        with pytest.raises(KeyError), without_tf32():
            raise KeyError
        assert torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("size", "other"), [((40, 24), 16), ((16, 9), 32), ((20, 20), 20)])
def test_deterministic_resizing_is_the_interpolation(size, other):
    images = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    expected = functional.interpolate(images, (other, other), mode="bicubic", antialias=True)
    weights = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), images)
    torch.use_deterministic_algorithms(True)
    try:
        found = _resized(images, other)
        (gradient,) = torch.autograd.grad((found * weights).sum(), images)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


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
    with RunLog(accelerator, tmp_path, 0, 9, 1, together) as log:
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


class TestAverages:
    """Averages on the host, of weights on a GPU."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_values_from_elsewhere_are_exchanged(self, dtype):
        parameter = nn.Parameter(torch.randn(3, 4).to(dtype))
        before, place = parameter.detach().clone(), parameter.data_ptr()
        average = torch.randn(3, 4)
        put_back = _exchanged(parameter, average)
        assert torch.equal(parameter.detach(), average)  # in float32 also of bfloat16 weights
        assert dtype != torch.float32 or parameter.data_ptr() == place
        put_back()
        assert parameter.dtype == dtype
        assert torch.equal(parameter.detach(), before)

    def test_they_are_lent_where_they_lie(self):
        parameters = [nn.Parameter(torch.randn(2, 2)) for _ in range(3)]
        average = MovingAverage(parameters, EmaOptions(use_ema=True, offload_ema=True))
        before = [each.data_ptr() for each in parameters]
        with average.lent():
            assert [each.data_ptr() for each in parameters] == [each.data_ptr() for each in average.averages]
        assert [each.data_ptr() for each in parameters] == before

    @pytest.mark.parametrize("foreach", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("offload", [False, True])
    def test_chunks_average_the_same(self, monkeypatch, foreach, dtype, offload):
        found = []
        for chunk in (1 << 30, 40):  # bytes: one weight has more
            monkeypatch.setattr(ema, "CHUNK", chunk)
            torch.manual_seed(0)
            parameters = [nn.Parameter(torch.randn(size).to(dtype)) for size in (3, 4, 20, 1, 9, 9)]
            options = EmaOptions(use_ema=True, offload_ema=offload, foreach_ema=foreach)
            average = MovingAverage(parameters, options)
            for _ in range(3):
                for each in parameters:
                    each.data.add_(torch.randn_like(each))
                average.update()
            found.append(average.averages)
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))

    def test_staging_gives_the_values(self):
        class OnAGpu(torch.Tensor):
            device, is_cuda = torch.device("meta"), False

        values = [torch.randn(size) for size in ((2, 3), (5,), ())]
        staging = ema.Staging()
        for count in (3, 2):
            taken = staging.take([value.as_subclass(OnAGpu) for value in values[:count]])
            assert all(torch.equal(*pair) for pair in zip(taken, values[:count], strict=True))
            assert len({each.untyped_storage().data_ptr() for each in taken}) == 1


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


class TestStart:
    @pytest.mark.parametrize("given", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
    def test_segments_expand_where_nobody_chose(self, train, monkeypatch, given):
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            monkeypatch.delenv(name, raising=False)
        if given is not None:
            monkeypatch.setenv(given, "max_split_size_mb:512")
        train("sd", "--max_train_steps", 1, "--no_final_checkpoint")
        chosen = {name: value for name, value in os.environ.items() if name.startswith("PYTORCH_") and "ALLOC" in name}
        if given is not None:
            assert chosen == {given: "max_split_size_mb:512"}
        elif sys.platform == "linux":
            assert set(chosen.values()) == {"expandable_segments:True"}
        for name in chosen:
            monkeypatch.delenv(name)

    @pytest.mark.parametrize(
        ("flags", "environment", "is_said"),
        [
            (["--mixed_precision", "bf16"], {}, True),
            ([], {}, False),
            ([], {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "false"}, True),
            ([], {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}, False),
        ],
    )
    def test_a_run_for_a_gpu_says_that_it_trains_on_the_cpu(
        self, train, monkeypatch, caplog, flags, environment, is_said
    ):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        train("sd", "--max_train_steps", 1, "--no_final_checkpoint", *flags)
        assert ("training on the CPU" in caplog.text) == is_said


class TestStates:
    def test_state_is_laid_out_as_its_weight(self):
        weight = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
        value = torch.arange(48, dtype=torch.uint8).view(4, 3, 2, 2)
        found = spread_like(value, weight)
        assert found.stride() == weight.stride()
        assert torch.equal(found, value)
        assert spread_like(torch.tensor(3.0), weight).shape == ()
        assert spread_like(7, weight) == 7

    @pytest.mark.parametrize("in_backward", [False, True])
    def test_paged_state_is_paged_again_when_it_is_loaded(self, monkeypatch, in_backward):
        options = OptimizerOptions(optimizer="paged_adamw8bit")
        weight = nn.Parameter(torch.randn(64, 128))

        def build() -> torch.optim.Optimizer:
            named = [NamedParameter("weight", weight, 1e-3)]
            return PerParameter(named, options, True, 0) if in_backward else build_optimizer(named, options)

        first = build()
        weight.grad = torch.randn_like(weight)
        (first._parts[0] if in_backward else first).step()
        saved = first.state_dict() if not in_backward else {"state": {0: dict(first.state[weight])}, "param_groups": []}
        second = build()
        if in_backward:
            saved["param_groups"] = [{} for _ in second.param_groups]
        owner = second._parts[0] if in_backward else second
        buffers = []

        def paged(parameter, dtype):
            buffers.append(torch.zeros_like(parameter, dtype=dtype))
            return buffers[-1]

        monkeypatch.setattr(owner, "get_state_buffer", paged, raising=False)
        second.load_state_dict(saved)
        state = second.state[weight]
        assert len(buffers) == 2
        assert state["state1"] is buffers[0]
        assert state["state2"] is buffers[1]
        for name in ("state1", "state2"):
            assert torch.equal(state[name], first.state[weight][name])

    @pytest.mark.parametrize(("name", "most"), [("adamw8bit", 0), ("lion", 0), ("paged_adamw8bit", 1)])
    def test_8_bit_optimizers_wait_for_the_device_once_a_step_at_most(self, monkeypatch, name, most):
        module = pytest.importorskip("bitsandbytes").optim.optimizer
        waits = []
        monkeypatch.setattr(module, "sync_gpu", lambda tensor: waits.append(tensor))
        weights = [nn.Parameter(torch.randn(64, 128)) for _ in range(5)]
        named = [NamedParameter(f"weight{number}", each, 1e-3) for number, each in enumerate(weights)]
        optimizer = build_optimizer(named, OptimizerOptions(optimizer=name))
        for _ in range(3):
            for each in weights:
                each.grad = torch.randn_like(each)
            optimizer.step()
        assert len(waits) == 3 * most
        assert all(np.isfinite(each.detach().numpy()).all() for each in weights)
