"""Writes files on a background thread, from copies in host memory, while the training continues."""

import logging
import math
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from utils.runtime.sharding import whole

logger = logging.getLogger(__name__)
MEMORY_FACTS = Path("/proc/meminfo")


class HostBuffers:
    """Reusable copies of tensors in host memory: allocating fresh memory costs thirty times as much as copying.

    If each process holds a shard of a tensor, all must copy it, and one keeps the whole.
    """

    def __init__(self, keeps: bool = True, are_kept: bool = True):
        """Args:
        keeps: whether this process keeps the copies.
        are_kept: whether the buffers serve more than one save. Only then are they pinned: torch never frees pinned
            memory.
        """
        self._keeps = keeps
        self._are_kept = are_kept
        self._kept: dict[str, Tensor] = {}

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Copies the tensor into the buffer of that name and returns it; a meta tensor if this process keeps none."""
        tensor = whole(tensor.detach())
        if not self._keeps:
            return tensor.to("meta")
        kept = self._kept.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            pinned = tensor.is_cuda and self._are_kept
            kept = self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return kept.copy_(tensor)

    def have_room_for(self, tensors: Iterable[Tensor]) -> bool:
        """Whether host memory has room for copies of all tensors beyond those already held; True if unknown."""
        wanted = sum(map(taken_bytes, tensors)) - sum(map(taken_bytes, self._kept.values()))
        return wanted <= 0 or wanted < 0.9 * available_memory()


def available_memory() -> float:
    """Returns the bytes of available host memory; infinity if the system does not report it."""
    if not MEMORY_FACTS.exists():
        return math.inf
    facts = dict(line.split(":") for line in MEMORY_FACTS.read_text(encoding="utf-8").splitlines())
    return 1024 * int(facts["MemAvailable"].split()[0])


def taken_bytes(tensor: Tensor) -> int:
    """Returns the bytes of host memory that a copy takes; pinned copies of GPU tensors round up to a power of two."""
    is_pinned = tensor.is_cuda or tensor.is_pinned()
    return 1 << (tensor.nbytes - 1).bit_length() if is_pinned and tensor.nbytes else tensor.nbytes


class BackgroundWriter:
    """Runs one job at a time: on a thread if `is_on`, otherwise immediately."""

    def __init__(self, is_on: bool):
        self.is_on = is_on
        self._pool = ThreadPoolExecutor(1) if is_on else None
        self._last: Future | None = None

    def run(self, job: Callable[[], object]) -> None:
        """Starts a job after the previous one has finished; raises that one's error."""
        self.join()
        if self._pool is None:
            job()
        else:
            self._last = self._pool.submit(job)

    def join(self) -> None:
        """Waits for the last job and raises its error."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Waits for the last job; raises its error unless another exception is already propagating."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        if kind is None:
            self.join()
