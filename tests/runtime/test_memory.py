"""Memory that was short, and freed memory that is kept."""

import logging
import platform
import sys
from textwrap import dedent

import pytest
import torch

from tests.launching import succeed
from tests.unets import NAMES
from utils.runtime.memory import is_out_of_memory


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


@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.36"), reason="for glibc, which once kept 32 MB at the most")
def test_freed_memory_is_kept():
    """Some 48 MB, taken again and again: by pages that the kernel gives anew, or gave once."""
    lines = """
        import ctypes, resource, sys
        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages
        from utils.runtime.memory import keep_freed_memory
        assert sys.argv[1] == "as it is" or keep_freed_memory()
        def take(): return b"x" * (48 * 2**20)
        take()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10): take()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    faults = {how: int(succeed([sys.executable, "-c", dedent(lines), how])) for how in ("as it is", "kept")}
    assert faults["kept"] < 100 < 5000 < faults["as it is"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("flags", "is_kept"), [((), True), (("--keep_freed_memory", "false"), False)])
def test_keeping_freed_memory_is_said(train, name, flags, is_kept, caplog):
    with caplog.at_level(logging.INFO):
        train(name, "--max_train_steps", 1, *flags)
    line = next(each for each in caplog.messages if each.startswith("active for speed: "))
    assert ("--keep_freed_memory" in line) == is_kept
