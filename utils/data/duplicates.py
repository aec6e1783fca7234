"""Images of the same bytes: known by lengths, sizes, digests and pieces of the files, so that few are read in full."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from utils.config.user_files import open_regular
from utils.data.image_facts import Remembered, stamps_of
from utils.data.images import image_bytes
from utils.data.sources import Records
from utils.data.survey import DIGEST_SIZE, Survey, map_chunks

FIRST_PIECE = 4 << 10  # from the middle of a file: what is read of each that may be a copy, as much as a header
WHOLE = 256 << 10  # bytes up to which all of a file is compared
PIECE, NUM_PIECES = 16 << 10, 16  # of longer ones, from the first byte to the last
MANY = 5_000
SIGNATURE_SIZE = 16


def first_of_same(records: Records, known: Survey, folder: Path) -> np.ndarray:
    """[N] of images of the same bytes the number of one, that of the lowest identity; of others their own.

    Args:
        folder: which remembers what was read of the images.
    """
    firsts = np.arange(len(records))
    numbers = _numbers(records, known, folder, np.zeros(len(records), bool), are_two=False)
    chosen = np.flatnonzero(numbers >= 0)
    order = chosen[np.argsort(numbers[chosen], kind="stable")]
    for same in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
        if len(same):
            firsts[same] = min(same.tolist(), key=records.identity)
    return firsts


def shared_with(records: Records, known: Survey, others: Records, known_others: Survey, folder: Path) -> list[int]:
    """The numbers of the images whose bytes are among others'; `folder` as of `first_of_same`."""
    both = Records(
        [*records.sources, *others.sources],
        np.concatenate([records.source_numbers, others.source_numbers + len(records.sources)]),
        np.concatenate([records.rows, others.rows]),
    )
    is_other = np.arange(len(both)) >= len(records)
    numbers = _numbers(both, known.followed_by(known_others), folder, is_other, are_two=True)
    return np.flatnonzero(numbers[: len(records)] >= 0).tolist()


class KnownBytes:
    """Tells of images that come one by one whether they have the bytes of one that is known.

    Few are read for it: those as long as a known one.
    """

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}
        self._lengths: frozenset[int] = frozenset()

    def learn(self, names: Iterable[str], num_bytes: np.ndarray, digests: Iterable[bytes]) -> None:
        """Takes the images that are known, by their names, lengths and digests as of a `Survey`."""
        self._names = dict(zip(digests, names, strict=True))
        self._names.pop(b"", None)
        self._lengths = frozenset(num_bytes.tolist())

    def find(self, image: str | bytes) -> str | None:
        """The name of a known image of the same bytes, if there is one and the image can be read."""
        if not self._names:
            return None
        with contextlib.suppress(OSError, ValueError):
            length = len(image) if isinstance(image, bytes) else os.stat(image).st_size
            if length in self._lengths:
                content = image_bytes(image)
                return self._names.get(hashlib.blake2b(content, digest_size=DIGEST_SIZE).digest())
        return None


def _numbers(records: Records, known: Survey, folder: Path, is_other: np.ndarray, are_two: bool) -> np.ndarray:
    """[N] int64, the same of images of the same bytes; -1 of those that are like no other one.

    Args:
        is_other: [N] bool, of which of two sets an image is.
        are_two: whether only what is alike across the two sets counts.
    """
    numbers = _numbered(known.num_bytes, *known.sizes.T.astype(np.int64))
    numbers[known.num_bytes < 0] = -1
    _drop_single(numbers, is_other, are_two)

    # digests that happen to be known settle it where all that are alike have one
    has_digest = known.digests != b""
    lacking = np.unique(numbers[~has_digest])
    settled = has_digest & (numbers >= 0) & ~np.isin(numbers, lacking)
    _tell_apart(numbers, np.flatnonzero(settled), known.digests[settled].tolist())
    _drop_single(numbers, is_other, are_two)

    # a small piece tells most others apart; only those that it does not are read further
    for name, signature in (("piece", _piece), ("whole", _whole)):
        unsettled = np.flatnonzero((numbers >= 0) & ~settled)
        _tell_apart(numbers, unsettled, _signatures(records, unsettled, folder, name, signature))
        _drop_single(numbers, is_other, are_two)
    return numbers


def _numbered(*columns: np.ndarray) -> np.ndarray:
    """[N] int64, the same where all columns are the same."""
    order, is_new = np.lexsort(columns), np.zeros(len(columns[0]), bool)
    for column in columns:
        ordered = column[order]
        is_new[1:] |= ordered[1:] != ordered[:-1]
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.cumsum(is_new)
    return numbers


def _drop_single(numbers: np.ndarray, is_other: np.ndarray, are_two: bool) -> None:
    """Sets the numbers to -1 that only one image has, or only images of one of two sets."""
    there = np.flatnonzero(numbers >= 0)
    _, places = np.unique(numbers[there], return_inverse=True)
    counts = np.bincount(places)
    of_others = np.bincount(places, weights=is_other[there])
    is_shared = (of_others > 0) & (of_others < counts) if are_two else counts > 1
    numbers[there[~is_shared[places]]] = -1


def _tell_apart(numbers: np.ndarray, chosen: np.ndarray, signatures: Sequence[bytes]) -> None:
    """Gives the chosen images of one number several where their signatures differ; -1 without a signature."""
    if not len(chosen):
        return
    whole = b"".join(signature.ljust(SIGNATURE_SIZE, b"\0") for signature in signatures)
    high, low = np.frombuffer(whole, np.int64).reshape(-1, 2).T
    new = _numbered(numbers[chosen], high, low) + numbers.max() + 1
    numbers[chosen] = np.where([signature != b"" for signature in signatures], new, -1)


def _signatures(
    records: Records, indices: np.ndarray, folder: Path, name: str, signature: Callable[[str | bytes], bytes]
) -> list[bytes]:
    """Of each image what changes with its bytes, read once and remembered; b"" if it can't be read."""
    found = np.full(len(indices), b"", object)
    for number, source in enumerate(records.sources):
        places = np.flatnonzero(records.source_numbers[indices] == number)
        if not len(places):
            continue
        table, rows = source.table, records.rows[indices[places]]
        keys, stamps = [table.key(int(row)) for row in rows], stamps_of(table, rows)
        digest = hashlib.blake2b(f"{name}, {table.name}".encode(), digest_size=12).hexdigest()
        memory = Remembered(folder / "copies" / f"{digest}.parquet", {name: pa.binary()})
        at = memory.find(keys, stamps)
        if (at >= 0).any():
            found[places[at >= 0]] = memory.column(name)[at[at >= 0]]
        unread = np.flatnonzero(at < 0)
        work = indices[places[unread]]
        read = [each for chunk in map_chunks(_read_chunk, (records, signature), work, many=MANY) for each in chunk]
        found[places[unread]] = read
        readable = unread[[each != b"" for each in read]]
        if len(readable):
            values = {name: found[places[readable]]}
            memory.add([keys[place] for place in readable], [stamps[place] for place in readable], values)
    return found.tolist()


def _read_chunk(shared: tuple[Records, Callable[[str | bytes], bytes]], indices: np.ndarray) -> list[bytes]:
    records, signature = shared
    found = []
    for index in indices.tolist():
        try:
            found.append(signature(records.image(index)))
        except (OSError, ValueError):
            found.append(b"")
    return found


def _piece(image: str | bytes) -> bytes:
    """A digest of the middle of an image's bytes."""
    if isinstance(image, bytes):
        return _digest(image)  # which are in memory as it is
    with open_regular(image) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - FIRST_PIECE) // 2)
        return _digest(file.read(FIRST_PIECE))


def _whole(image: str | bytes) -> bytes:
    """A digest of all of an image's bytes, or of pieces of a long file."""
    if isinstance(image, bytes):
        return _digest(image)
    with open_regular(image) as file:
        length = os.fstat(file.fileno()).st_size
        places = np.linspace(0, length - PIECE, NUM_PIECES).astype(int).tolist() if length > WHOLE else [0]
        pieces = []
        for place in places:
            file.seek(place)
            pieces.append(file.read(PIECE if length > WHOLE else WHOLE))
    return _digest(*pieces)


def _digest(*pieces: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=SIGNATURE_SIZE)
    for piece in pieces:
        digest.update(piece)
    return digest.digest()
