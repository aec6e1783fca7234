"""Reads facts from image headers, such as sizes, once and in several processes, and caches them."""

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from utils.config.options import UserError
from utils.config.terminal import progress_bar
from utils.data.data_fingerprint import FileFacts
from utils.data.image_facts import Remembered, stamps_of
from utils.data.images import check_values, image_bytes, read_header, reason_of
from utils.data.mask_values import MaskCensus, MaskValues, mask_values
from utils.data.masks import check_same_shape
from utils.data.oddities import CONVERTED, ODDITIES, bits_of, changed_since, how_read, names_in
from utils.data.sources import Records, Source
from utils.data.tables import ImageTable, stamp_of

DIGEST_SIZE = 16
STAMP_PARTS = 3  # size and two times
NOW, BEFORE = "with turns", "with depths"  # versions of the cached facts, of this and an earlier release
REMEMBERED = {
    **{"width": pa.int32(), "height": pa.int32(), "oddities": pa.uint32()},
    **{"num_bytes": pa.int64(), "digest": pa.binary()},
}
REMEMBERED_BEFORE = REMEMBERED | {"oddities": pa.uint16()}
MANY = 5_000  # with at least so many images, several processes read
CHUNK = 500
CHUNKS_AHEAD = 256
MASKS_AHEAD = 2_000  # masks to decode before checking whether they are enough
Result = TypeVar("Result")


class Facts(NamedTuple):
    """Facts about one image.

    Attributes:
        width, height: upright size in pixels; 0 if it can't be read.
        oddities: bit mask of `ODDITIES`.
        num_bytes: length of the file, -1 if it can't be read.
        digest: digest of the file's bytes; b"" unless requested.
        reason: why it can't be read, or "".
    """

    width: int
    height: int
    oddities: int
    num_bytes: int
    digest: bytes
    reason: str


@dataclass
class Survey:
    """Facts about the images of a run.

    Attributes:
        sizes: [N, 2] int32 upright widths and heights in pixels; 0 for images that can't be read.
        oddities: [N] uint32 bit masks of `ODDITIES`.
        num_bytes: [N] int64 lengths of the files, -1 if unknown.
        digests: [N] digests of the files' bytes, 16 bytes each; b"" if unknown.
        reasons: the reason why an image can't be used, by its number.
        mask_digests: [N] digests of the mask files' bytes; b"" if unknown or without a mask file.
        is_masked: [N] bool, whether the image has a mask.
        times: [N] int64 modification times of the files, or of the shards that contain them.
        mask_bytes, mask_times: as `num_bytes` and `times`, of the mask files; -1 bytes without one.
        mask_oddities: [N] uint32 bit masks of the mask files' `ODDITIES`; 0 without one.
    """

    sizes: np.ndarray
    oddities: np.ndarray
    num_bytes: np.ndarray
    digests: np.ndarray = field(repr=False)
    reasons: dict[int, str]
    mask_digests: np.ndarray = field(repr=False)
    is_masked: np.ndarray = field(repr=False)
    times: np.ndarray = field(repr=False)
    mask_bytes: np.ndarray = field(repr=False)
    mask_times: np.ndarray = field(repr=False)
    mask_oddities: np.ndarray = field(repr=False)

    @staticmethod
    def unknown(count: int) -> "Survey":
        """Returns a survey of `count` images without any facts yet."""
        digests = np.full(count, b"", object)
        return Survey(
            sizes=np.zeros((count, 2), np.int32),
            oddities=np.zeros(count, np.uint32),
            num_bytes=np.full(count, -1, np.int64),
            digests=digests,
            reasons={},
            mask_digests=digests.copy(),
            is_masked=np.zeros(count, bool),
            times=np.zeros(count, np.int64),
            mask_bytes=np.full(count, -1, np.int64),
            mask_times=np.zeros(count, np.int64),
            mask_oddities=np.zeros(count, np.uint32),
        )

    @property
    def facts(self) -> FileFacts:
        """Facts about the image files."""
        return FileFacts(self.num_bytes, self.times, self.digests)

    @property
    def mask_facts(self) -> FileFacts:
        """Facts about the mask files."""
        return FileFacts(self.mask_bytes, self.mask_times, self.mask_digests)

    @property
    def total_bytes(self) -> int:
        """Total size in bytes of all readable images and masks."""
        return int(np.maximum(self.num_bytes, 0).sum() + np.maximum(self.mask_bytes, 0).sum())

    def oddity_counts(self) -> dict[str, int]:
        """Returns the number of images with each oddity."""
        counts = Counter({name: int((self.oddities >> bit & 1).sum()) for bit, name in enumerate(ODDITIES)})
        return {name: count for name, count in counts.items() if count}

    def how_read(self, index: int) -> bytes:
        """Returns the part of an image's cache key that reflects how its pixels are decoded, see `how_read`."""
        return how_read(names_in(int(self.oddities[index])))

    def how_mask_read(self, index: int, is_alpha: bool) -> bytes:
        """Returns the same for its mask, which colour profiles do not change."""
        names = names_in(int((self.oddities if is_alpha else self.mask_oddities)[index]))
        return how_read([name for name in names if name != CONVERTED])

    def decoded_otherwise(self, version: int) -> np.ndarray:
        """Returns [N] bool: images whose pixels or mask an earlier version of `DECODING` decoded differently."""
        return changed_since(self.oddities, version) | changed_since(self.mask_oddities, max(version, 1))

    def take(self, indices: np.ndarray) -> "Survey":
        """Returns the survey of the images at some indices, in that order."""
        places = {int(index): place for place, index in enumerate(indices)} if self.reasons else {}
        reasons = {places[index]: reason for index, reason in self.reasons.items() if index in places}
        arrays = {name: value[indices] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return Survey(**arrays, reasons=reasons)

    def followed_by(self, other: "Survey") -> "Survey":
        """Returns the survey of these images, followed by those of another survey."""
        pairs = {
            name: (value, vars(other)[name]) for name, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        arrays = {name: np.concatenate(pair) for name, pair in pairs.items()}
        moved = {index + len(self.sizes): reason for index, reason in other.reasons.items()}
        return Survey(**arrays, reasons=self.reasons | moved)


def survey(records: Records, folder: Path, show_progress: bool = False) -> Survey:
    """Reads the headers of all images; facts that `folder` has cached are not read again."""
    return _survey(records, folder, np.zeros(len(records), bool), show_progress)


def add_digests(known: Survey, records: Records, wanted: np.ndarray, folder: Path, show_progress: bool = False) -> None:
    """Adds missing digests where `wanted`, [N] bool, reading these files completely; `folder` caches the digests."""
    missing = wanted & (known.digests == b"")
    if missing.any():
        found = _survey(records.take(np.flatnonzero(missing)), folder, np.ones(missing.sum(), bool), show_progress)
        known.digests[missing] = found.digests
        numbers = np.flatnonzero(missing)
        known.reasons |= {int(numbers[place]): reason for place, reason in found.reasons.items()}


def survey_masks(
    known: Survey, records: Records, folder: Path, with_digests: bool, show_progress: bool = False
) -> None:
    """Adds facts from the headers of mask files; an image whose mask can't be read or has another shape is bad.

    Args:
        known: the survey of the images, which is completed.
        records: the images.
        folder: caches the facts.
        with_digests: whether to read mask files completely, for their digests.
        show_progress: whether to show a progress bar.
    """
    # read the headers of mask files
    masks = [records.mask(index) for index in range(len(records))]
    in_files = np.flatnonzero([mask is not None and not mask.is_alpha for mask in masks])
    tables = [replace(source, table=MaskTable(source)) for source in records.sources]
    of_masks = Records(tables, records.source_numbers[in_files], records.rows[in_files])
    found = _survey(of_masks, folder, np.full(len(in_files), with_digests), show_progress)

    # add what they say to the survey of the images
    known.mask_digests[in_files] = found.digests
    known.mask_bytes[in_files], known.mask_times[in_files] = found.num_bytes, found.times
    known.mask_oddities[in_files] = found.oddities
    is_transparent = (known.oddities >> ODDITIES.index("transparent") & 1).astype(bool)
    known.is_masked[:] = [
        mask is not None and (not mask.is_alpha or clear) for mask, clear in zip(masks, is_transparent, strict=True)
    ]

    # reject images whose mask can't be used
    for place, index in enumerate(in_files.tolist()):
        reason = found.reasons.get(place)
        if reason is None and known.sizes[index].all():
            try:
                check_same_shape(found.sizes[place].tolist(), known.sizes[index].tolist())
            except ValueError as error:
                known.reasons[index] = str(error)
        elif reason is not None:
            known.reasons.setdefault(index, f"its mask can't be read: {reason}")


def take_census(records: Records, is_masked: np.ndarray, where: str, most: int) -> list[MaskCensus]:
    """Inspects the masks of each source: an evenly spread sample, or all masks if those of the sample are nearly black.

    Args:
        records: the images.
        is_masked: [N] bool, whether an image has a mask.
        where: the flag that names the masks, with its value.
        most: size of the sample per source.
    """
    found = []
    for number, source in enumerate(records.sources):
        there = np.flatnonzero(is_masked & (records.source_numbers == number))
        if source.masks is None or not len(there):
            continue
        name = f"{where}, source {source.name}" if len(records.sources) > 1 else where
        census = MaskCensus(name, len(there))
        places = np.unique(np.linspace(0, len(there) - 1, min(len(there), most)).astype(int))
        _look_at_masks(records, there[places], census)
        others = np.delete(there, places)
        for begin in range(0, len(others), MASKS_AHEAD):
            if not census.looked_at or not census.is_nearly_black:
                break
            _look_at_masks(records, others[begin : begin + MASKS_AHEAD], census)
        found.append(census)
    return found


def _look_at_masks(records: Records, indices: np.ndarray, census: MaskCensus) -> None:
    """Adds the masks of some images to a census, except unreadable ones, which are reported elsewhere."""
    with progress_bar(total=len(indices), desc="decoding masks", leave=False) as progress:
        for values in map_chunks(_values_of_masks, records, indices, many=50, size=20):
            progress.update(len(values))
            for name, found in values:
                if found is not None:
                    census.add(name, found)


def _values_of_masks(records: Records, indices: np.ndarray) -> list[tuple[str, MaskValues | None]]:
    values: list[tuple[str, MaskValues | None]] = []
    for index in indices.tolist():
        mask, found = records.mask(index), None
        with contextlib.suppress(OSError, ValueError):
            found = mask_values(records.image(index), mask)
        values.append((records.key(index), found))
    return values


class MaskTable(ImageTable):
    """A table of the mask files of a source, as images."""

    def __init__(self, source: Source):
        self._source = source
        self.name = f"masks of {source.table.name}, {source.masks.name if source.masks else ''}"

    def __len__(self) -> int:
        return len(self._source.table)

    def key(self, row: int) -> str:
        """Returns the key of the image."""
        return self._source.table.key(row)

    def image(self, row: int) -> str | bytes:
        """Returns the mask's path or bytes."""
        return self._source.masks.of(self._source.table, row).source

    def captions(self, row: int) -> tuple[str, ...]:
        """Returns no captions."""
        return ()

    def stamp(self, row: int) -> str:
        """Returns the stamp of the mask file, or the image's if the mask is stored with it as bytes."""
        mask = self.image(row)
        return stamp_of(mask) if isinstance(mask, str) else self._source.table.stamp(row)


def _survey(records: Records, folder: Path, with_digest: np.ndarray, show_progress: bool) -> Survey:
    found = Survey.unknown(len(records))
    for number, source in enumerate(records.sources):
        places = np.flatnonzero(records.source_numbers == number)
        if len(places):
            _survey_table(source.table, records.rows[places], places, found, folder, with_digest[places], show_progress)
    return found


def _survey_table(
    table: ImageTable,
    rows: np.ndarray,
    places: np.ndarray,
    found: Survey,
    folder: Path,
    with_digest: np.ndarray,
    show_progress: bool,
) -> None:
    """Fills in the facts of some rows of a table.

    Args:
        table, rows: the images.
        places: their indices in `found`.
        found: the survey to fill in.
        folder: caches the facts.
        with_digest: [rows] bool, whether the digest is needed too.
        show_progress: whether to show a progress bar.
    """
    # take cached facts
    memory = _memory(folder, NOW, table, REMEMBERED)
    keys, stamps = [table.key(int(row)) for row in rows], stamps_of(table, rows)
    found.times[places] = [_time_of(stamp, table.name) for stamp in stamps]
    known = memory.find(keys, stamps)
    is_known = known >= 0
    if is_known.any():
        at = known[is_known]
        found.sizes[places[is_known], 0] = memory.column("width")[at]
        found.sizes[places[is_known], 1] = memory.column("height")[at]
        found.oddities[places[is_known]] = memory.column("oddities")[at]
        found.num_bytes[places[is_known]] = memory.column("num_bytes")[at]
        found.digests[places[is_known]] = memory.column("digest")[at]
        is_known &= ~with_digest | (found.digests[places] != b"")

    # read the others
    unread = np.flatnonzero(~is_known)
    if len(unread):
        _take_digests(_memory(folder, BEFORE, table, REMEMBERED_BEFORE), keys, stamps, found, places)
    work = [(int(rows[place]), bool(with_digest[place] and not found.digests[places[place]])) for place in unread]
    for place, facts in zip(unread, read_facts(table, work, show_progress), strict=True):
        index = int(places[place])
        found.sizes[index] = facts.width, facts.height
        found.oddities[index] = facts.oddities
        found.num_bytes[index] = facts.num_bytes
        found.digests[index] = b"" if facts.reason else facts.digest or found.digests[index]
        if facts.reason:
            found.reasons[index] = facts.reason
    if len(unread):
        _remember(memory, keys, stamps, found, places)


def _memory(folder: Path, release: str, table: ImageTable, columns: Mapping[str, pa.DataType]) -> Remembered:
    """Returns the cached facts of a table."""
    digest = hashlib.blake2b(f"{release}, {table.name}".encode(), digest_size=12).hexdigest()
    return Remembered(folder / "headers" / f"{digest}.parquet", columns)


def _take_digests(
    memory: Remembered, keys: Sequence[str], stamps: Sequence[str], found: Survey, places: np.ndarray
) -> None:
    """Takes missing digests from the cache of an earlier release, whose digests remain valid."""
    at = memory.find(keys, stamps)
    missing = (at >= 0) & (found.digests[places] == b"")
    if missing.any():
        found.digests[places[missing]] = memory.column("digest")[at[missing]]


def _remember(
    memory: Remembered, keys: Sequence[str], stamps: Sequence[str], found: Survey, places: np.ndarray
) -> None:
    """Caches the facts of readable images."""
    chosen = np.flatnonzero((found.sizes[places, 0] > 0) & (found.num_bytes[places] >= 0))
    at = places[chosen]
    columns = {
        **{"width": found.sizes[at, 0], "height": found.sizes[at, 1], "oddities": found.oddities[at]},
        **{"num_bytes": found.num_bytes[at], "digest": found.digests[at]},
    }
    memory.add([keys[place] for place in chosen], [stamps[place] for place in chosen], columns)


def _time_of(stamp: str, name: str) -> int:
    """Returns a file's modification time; for images without a file, a number that changes with the table's name."""
    parts = stamp.split(":")
    if len(parts) == STAMP_PARTS:
        return int(parts[1])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")


def read_facts(table: ImageTable, work: Sequence[tuple[int, bool]], show_progress: bool) -> Iterator[Facts]:
    """Yields the facts of rows in order; `work` is (row, whether to compute the digest)."""
    what = "reading images" if any(with_digest for _, with_digest in work) else "reading headers"
    progress = progress_bar(total=len(work), desc=what, disable=not show_progress or len(work) < MANY, leave=False)
    with progress:
        for facts in map_chunks(_read_chunk, table, work, many=MANY):
            progress.update(len(facts))
            yield from facts


_shared: dict[int, object] = {}
_numbers = itertools.count()


def map_chunks(
    function: Callable[[Any, Sequence], Result], shared: object, work: Sequence, many: int, size: int = CHUNK
) -> Iterator[Result]:
    """Yields function(shared, chunk) for each chunk of the work, in order, on several cores.

    For at least `many` items it forks processes, which inherit the large `shared` object and receive only the chunks.
    Otherwise it uses threads.

    Raises:
        UserError: if a process is killed.
    """
    number = next(_numbers)
    _shared[number] = shared
    try:
        with executor(len(work), many) as pool:
            chunks = (work[begin : begin + size] for begin in range(0, len(work), size))
            waiting: deque = deque()
            for chunk in chunks:
                waiting.append(pool.submit(_on_shared, function, number, chunk))
                if len(waiting) > CHUNKS_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that reads files was killed (out of memory? see dmesg); free some memory and start again"
        ) from error
    finally:
        del _shared[number]


def _on_shared(function: Callable[[Any, Sequence], Result], number: int, chunk: Sequence) -> Result:
    return function(_shared[number], chunk)


def executor(count: int, many: int) -> Executor:
    """Returns a pool of processes, forked on first use, for at least `many` items, otherwise a pool of threads.

    Only Linux forks safely; on macOS, system libraries may abort forked processes.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count < many or cores == 1 or not sys.platform.startswith("linux"):
        return ThreadPoolExecutor(4 * cores)
    return ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("fork"))


def _read_chunk(table: ImageTable, work: Sequence[tuple[int, bool]]) -> list[Facts]:
    return [_read(table, row, with_digest) for row, with_digest in work]


def _read(table: ImageTable, row: int, with_digest: bool) -> Facts:
    try:
        image = table.image(row)
        if with_digest and isinstance(image, str):
            image = image_bytes(image)
        header = check_values(image, read_header(image))
        num_bytes = len(image) if isinstance(image, bytes) else os.stat(image).st_size
    except (OSError, ValueError) as error:
        return Facts(0, 0, 0, -1, b"", reason_of(error))
    names = set(header.oddities) | ({"non-ASCII name"} if not table.key(row).isascii() else set())
    oddities = bits_of(names)
    digest = hashlib.blake2b(image, digest_size=DIGEST_SIZE).digest() if with_digest else b""
    return Facts(header.width, header.height, oddities, num_bytes, digest, "")
