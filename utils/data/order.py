"""The order of images in training: which image is in which slot of which step, from the seed and the step alone."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import lcm
from typing import Any, NamedTuple

import numpy as np

from utils.config.seeding import Stream, generator


class Draw(NamedTuple):
    """A record's number, how often it was drawn before, and the number of its bucket."""

    record: int
    passing: int
    bucket: int


class Piece(NamedTuple):
    """One micro-batch: an optimizer step and slots of its global batch; for a stream also the samples in them."""

    step: int
    slots: tuple[int, ...]
    streamed: Any = None


class Interleaving:
    """Merges several streams into one, each in proportion to its share, without losing remainders.

    On its turn a stream yields `unit` samples. A stream of share n has floor((e * n + r) / unit) turns before epoch e,
    with a head start r drawn from the seed, so remainders carry over to the next epoch. Within an epoch the turns of a
    stream are spread evenly, each at a random place within its part of the epoch.
    """

    def __init__(self, shares: Sequence[Fraction], unit: int, seed: int, number: int, order: Stream):
        denominator = lcm(*(share.denominator for share in shares))
        self._shares = [int(share * denominator) for share in shares]
        self._unit = unit * denominator
        self._seed, self._number, self._order = seed, number, order
        heads = generator(seed, number, order, Stream.HEAD_START)
        self._heads = [int(heads.integers(self._unit)) for _ in shares]
        self._epochs: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}

    def turns_before(self, epoch: int) -> list[int]:
        """Returns the number of turns that each stream had before an epoch."""
        pairs = zip(self._shares, self._heads, strict=True)
        return [(epoch * share + head) // self._unit for share, head in pairs]

    def epoch_of(self, place: int) -> int:
        """Returns the epoch that contains a place of the merged stream."""
        epoch = place * self._unit // sum(self._shares)
        while sum(self.turns_before(epoch)) > place:
            epoch -= 1
        while sum(self.turns_before(epoch + 1)) <= place:
            epoch += 1
        return epoch

    def at(self, place: int) -> tuple[int, int]:
        """Returns (stream, number of its turn, from 0) at a place of the merged stream."""
        if len(self._shares) == 1:
            return 0, place
        for begin, streams, turns in self._epochs.values():
            if begin <= place < begin + len(streams):
                return int(streams[place - begin]), int(turns[place - begin])
        epoch = self.epoch_of(place)
        while len(self._epochs) >= 2:
            del self._epochs[next(iter(self._epochs))]
        begin, streams, turns = self._epochs[epoch] = self._arrange(epoch)
        return int(streams[place - begin]), int(turns[place - begin])

    def _arrange(self, epoch: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Returns (first place, streams, turns) of an epoch."""
        before, after = np.array(self.turns_before(epoch)), np.array(self.turns_before(epoch + 1))
        counts = after - before
        streams = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
        turns = np.concatenate([np.arange(first, last) for first, last in zip(before, after, strict=True)])
        drawn = generator(self._seed, epoch, self._number, self._order).random(len(streams))
        order = np.argsort((turns - before[streams] + drawn) / counts[streams], kind="stable")
        return int(before.sum()), streams[order], turns[order]


class Permutations:
    """Endless stream of the images of one bucket and source; each pass is a new permutation drawn from the seed."""

    def __init__(self, members: np.ndarray, seed: int, number: int):
        self._members = members
        self._seed, self._number = seed, number
        self._orders: dict[int, np.ndarray] = {}

    def at(self, place: int) -> tuple[int, int]:
        """Returns (record, pass) at a place of the stream."""
        passing, within = divmod(place, len(self._members))
        if passing not in self._orders:
            while len(self._orders) >= 2:
                del self._orders[next(iter(self._orders))]
            order = generator(self._seed, passing, self._number, Stream.ORDER)
            self._orders[passing] = order.permutation(self._members)
        return int(self._orders[passing][within]), passing


class GlobalBatches:
    """The stream of global batches over the images.

    A batch consists of groups, each from one bucket. Nested streams choose the bucket of each group, the source of each
    of its samples, and the image. Nothing is dropped or repeated at the end of an epoch: over E epochs each image is
    drawn E times (times its source's repeats), give or take one, for any number of processes.

    Attributes:
        size: samples per global batch.
        group_size: consecutive samples from one bucket; divides `size`.
        samples_per_epoch: images times their repeats.
    """

    def __init__(
        self,
        bucket_of: np.ndarray,
        source_of: np.ndarray,
        repeats: Sequence[Fraction],
        size: int,
        group_size: int,
        seed: int,
    ):
        self.size = size
        self.seed = seed
        num_buckets = int(bucket_of.max()) + 1
        self.group_size = group_size if num_buckets > 1 else size
        self._streams: list[list[Permutations]] = []
        self._sources: list[Interleaving] = []
        bucket_shares = []
        for bucket in range(num_buckets):
            streams, shares = [], []
            for source, repeat in enumerate(repeats):
                members = np.flatnonzero((bucket_of == bucket) & (source_of == source)).astype(np.uint32)
                if len(members):
                    streams.append(Permutations(members, seed, bucket * len(repeats) + source))
                    shares.append(repeat * len(members))
            self._streams.append(streams)
            self._sources.append(Interleaving(shares, 1, seed, bucket, Stream.SOURCE_ORDER))
            bucket_shares.append(sum(shares))
        self._buckets = Interleaving(bucket_shares, self.group_size, seed, 0, Stream.GROUP_ORDER)
        self.samples_per_epoch = sum(bucket_shares)

    @property
    def has_buckets(self) -> bool:
        """Whether there is more than one bucket."""
        return len(self._streams) > 1

    def draw(self, step: int, slot: int) -> Draw:
        """Returns the sample in `slot`, in [0, size), of the global batch of optimizer step `step`, from 0."""
        group, within = divmod(step * self.size + slot, self.group_size)
        bucket, turn = self._buckets.at(group)
        source, place = self._sources[bucket].at(turn * self.group_size + within)
        record, passing = self._streams[bucket][source].at(place)
        return Draw(record, passing, bucket)

    def steps_in(self, epochs: int) -> int:
        """Returns the number of optimizer steps after which every image was drawn `epochs` times."""
        if not self.has_buckets:
            return -(-epochs * self.samples_per_epoch // self.size)
        return -(-sum(self._buckets.turns_before(epochs)) * self.group_size // self.size)

    def epochs_before(self, step: int) -> int:
        """Returns the number of whole epochs drawn in the first `step` optimizer steps."""
        if not self.has_buckets:
            return step * self.size // self.samples_per_epoch
        return self._buckets.epoch_of(step * self.size // self.group_size)


class Pieces:
    """The micro-batches of one process, in order; the sampler of its DataLoader.

    The process at `rank` of `num_processes` takes the slots [rank * size / num_processes, (rank + 1) * size /
    num_processes) of each global batch, in pieces of at most `micro_batch` slots that lie within one group.
    """

    def __init__(
        self, batches: GlobalBatches, micro_batch: int, rank: int, num_processes: int, first_step: int, last_step: int
    ):
        size, group = batches.size, batches.group_size
        begin, end = rank * size // num_processes, (rank + 1) * size // num_processes
        self.slots: list[tuple[int, ...]] = []
        while begin < end:
            until = min(begin + micro_batch, end, (begin // group + 1) * group)
            self.slots.append(tuple(range(begin, until)))
            begin = until
        self.steps = range(first_step, last_step)

    def __iter__(self) -> Iterator[Piece]:
        for step in self.steps:
            for slots in self.slots:
                yield Piece(step, slots)

    def __len__(self) -> int:
        return len(self.steps) * len(self.slots)
