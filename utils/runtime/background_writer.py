"""Writing that continues while the training does: from copies in host memory, on a thread."""

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
    """Copies of tensors in host memory, which are kept: fresh memory costs thirty times as long as the copy itself.

    Where each process holds a part of a tensor, all must copy it, and one keeps what they come to.
    """

    def __init__(self, keeps: bool = True, are_kept: bool = True):
        """Args:
        keeps: whether this process is the one that keeps them.
        are_kept: whether they serve more than one save. Only then are they pinned: torch never gives pinned memory
            back.
        """
        self._keeps = keeps
        self._are_kept = are_kept
        self._kept: dict[str, Tensor] = {}

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor's values as they are now, in the buffer of that name; without values where none are kept."""
        tensor = whole(tensor.detach())
        if not self._keeps:
            return tensor.to("meta")
        kept = self._kept.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            pinned = tensor.is_cuda and self._are_kept
            kept = self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return kept.copy_(tensor)

    def have_room_for(self, tensors: Iterable[Tensor]) -> bool:
        """Whether host memory holds copies of them all, beside what is held already; taken for granted if unknown."""
        wanted = sum(map(taken_bytes, tensors)) - sum(map(taken_bytes, self._kept.values()))
        return wanted <= 0 or wanted < 0.9 * available_memory()


def available_memory() -> float:
    """Bytes of host memory that are free; without end where the system does not say."""
    if not MEMORY_FACTS.exists():
        return math.inf
    facts = dict(line.split(":") for line in MEMORY_FACTS.read_text(encoding="utf-8").splitlines())
    return 1024 * int(facts["MemAvailable"].split()[0])


def taken_bytes(tensor: Tensor) -> int:
    """The host memory that a copy takes: of a GPU's, which is pinned, the next power of two."""
    is_pinned = tensor.is_cuda or tensor.is_pinned()
    return 1 << (tensor.nbytes - 1).bit_length() if is_pinned and tensor.nbytes else tensor.nbytes


class BackgroundWriter:
    """Runs one job after the other, on a thread or, where that was not asked for (`is_on`), at once."""

    def __init__(self, is_on: bool):
        self.is_on = is_on
        self._pool = ThreadPoolExecutor(1) if is_on else None
        self._last: Future | None = None

    def run(self, job: Callable[[], object]) -> None:
        """Begins a job when the one before is done, whose error is raised here."""
        self.join()
        if self._pool is None:
            job()
        else:
            self._last = self._pool.submit(job)

    def join(self) -> None:
        """Waits for the last job, and raises its error."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Waits for the last job; its error is raised if there is no other."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        if kind is None:
            self.join()
