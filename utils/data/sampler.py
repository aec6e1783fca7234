"""Which image stands at which place of which step: a function of the seed and the step alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from utils.seeding import Stream, generator


class Draw(NamedTuple):
    """A record and how many times it was drawn before."""

    record: int
    passing: int


class Piece(NamedTuple):
    """One micro-batch: an optimizer step and the slots of its global batch."""

    step: int
    slots: tuple[int, ...]


@dataclass(frozen=True)
class GlobalBatches:
    """The stream of global batches over the records.

    Each pass over the records is a seeded permutation, one follows the other, and step s takes the next `size` of them:
    a remainder at a pass's end carries over, so over E passes each record is drawn E times.
    """

    num_records: int
    size: int
    seed: int

    def draw(self, step: int, slot: int) -> Draw:
        """What stands at `slot`, in [0, size), of the global batch of optimizer step `step`, from 0."""
        passing, place = divmod(step * self.size + slot, self.num_records)
        return Draw(int(_order(self.seed, passing, self.num_records)[place]), passing)

    def steps_in(self, epochs: int) -> int:
        """Optimizer steps after which every record was drawn `epochs` times."""
        return -(-epochs * self.num_records // self.size)

    def epochs_before(self, step: int) -> int:
        """Whole epochs that the first `step` optimizer steps have drawn."""
        return step * self.size // self.num_records


@lru_cache(maxsize=4)
def _order(seed: int, passing: int, num_records: int) -> np.ndarray:
    return generator(seed, passing, 0, Stream.ORDER).permutation(num_records)


class Pieces:
    """The micro-batches of one process, in order: what its DataLoader takes as a sampler.

    The process at `rank` of `num_processes` takes the slots [rank * size / num_processes, (rank + 1) * size /
    num_processes) of each global batch, in pieces of at most `micro_batch`.
    """

    def __init__(
        self, global_batch: int, micro_batch: int, rank: int, num_processes: int, first_step: int, last_step: int
    ):
        begin, end = rank * global_batch // num_processes, (rank + 1) * global_batch // num_processes
        self.slots = [tuple(range(at, min(at + micro_batch, end))) for at in range(begin, end, micro_batch)]
        self.steps = range(first_step, last_step)

    def __iter__(self) -> Iterator[Piece]:
        for step in self.steps:
            for slots in self.slots:
                yield Piece(step, slots)

    def __len__(self) -> int:
        return len(self.steps) * len(self.slots)
