"""Finds images with identical bytes by file length, image size, digests and pieces of files, to read few in full."""

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

FIRST_PIECE = 4 << 10  # bytes read first from the middle of each possible copy, about as long as a header
WHOLE = 256 << 10  # bytes up to which a file is compared in full
PIECE, NUM_PIECES = 16 << 10, 16  # bytes and number of pieces of longer files, evenly spaced
MANY = 5_000
SIGNATURE_SIZE = 16


def first_of_same(records: Records, known: Survey, folder: Path) -> np.ndarray:
    """Returns [N]: for each image, the index of the one among its copies with the lowest identity, or its own index.

    Args:
        known: lengths, sizes and digests of the images.
        folder: cache of digests read from the images.
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
    """Returns the indices of the images in `records` whose bytes also occur in `others`.

    Args:
        folder: as in `first_of_same`.
    """
    both = Records(
        [*records.sources, *others.sources],
        np.concatenate([records.source_numbers, others.source_numbers + len(records.sources)]),
        np.concatenate([records.rows, others.rows]),
    )
    is_other = np.arange(len(both)) >= len(records)
    numbers = _numbers(both, known.followed_by(known_others), folder, is_other, are_two=True)
    return np.flatnonzero(numbers[: len(records)] >= 0).tolist()


class KnownBytes:
    """Checks images one by one for having the same bytes as a known image.

    Reads only images of the same length as a known one.
    """

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}
        self._lengths: frozenset[int] = frozenset()

    def learn(self, names: Iterable[str], num_bytes: np.ndarray, digests: Iterable[bytes]) -> None:
        """Sets the known images.

        Args:
            names: their names.
            num_bytes: their lengths in bytes.
            digests: their digests, as in `Survey`.
        """
        self._names = dict(zip(digests, names, strict=True))
        self._names.pop(b"", None)
        self._lengths = frozenset(num_bytes.tolist())

    def find(self, image: str | bytes) -> str | None:
        """Returns the name of a known image with the same bytes; None if there is none or the image can't be read."""
        if not self._names:
            return None
        with contextlib.suppress(OSError, ValueError):
            length = len(image) if isinstance(image, bytes) else os.stat(image).st_size
            if length in self._lengths:
                content = image_bytes(image)
                return self._names.get(hashlib.blake2b(content, digest_size=DIGEST_SIZE).digest())
        return None


def _numbers(records: Records, known: Survey, folder: Path, is_other: np.ndarray, are_two: bool) -> np.ndarray:
    """Returns [N] int64 group numbers: the same for images with the same bytes, -1 for images without a copy.

    Args:
        is_other: [N] bool, whether an image belongs to the second of two sets.
        are_two: whether to find only copies across the two sets.
    """
    # group by file length and image size
    numbers = _numbered(known.num_bytes, *known.sizes.T.astype(np.int64))
    numbers[known.num_bytes < 0] = -1
    _drop_single(numbers, is_other, are_two)

    # use known digests to split the groups in which every image has one
    has_digest = known.digests != b""
    lacking = np.unique(numbers[~has_digest])
    settled = has_digest & (numbers >= 0) & ~np.isin(numbers, lacking)
    _tell_apart(numbers, np.flatnonzero(settled), known.digests[settled].tolist())
    _drop_single(numbers, is_other, are_two)

    # split the other groups by a small piece of each file, then by the whole file or many pieces
    for name, signature in (("piece", _piece), ("whole", _whole)):
        unsettled = np.flatnonzero((numbers >= 0) & ~settled)
        _tell_apart(numbers, unsettled, _signatures(records, unsettled, folder, name, signature))
        _drop_single(numbers, is_other, are_two)
    return numbers


def _numbered(*columns: np.ndarray) -> np.ndarray:
    """Returns [N] int64 numbers, equal where all columns are equal."""
    order, is_new = np.lexsort(columns), np.zeros(len(columns[0]), bool)
    for column in columns:
        ordered = column[order]
        is_new[1:] |= ordered[1:] != ordered[:-1]
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.cumsum(is_new)
    return numbers


def _drop_single(numbers: np.ndarray, is_other: np.ndarray, are_two: bool) -> None:
    """Sets group numbers to -1 for groups with a single image, or with images of only one of two sets."""
    there = np.flatnonzero(numbers >= 0)
    _, places = np.unique(numbers[there], return_inverse=True)
    counts = np.bincount(places)
    of_others = np.bincount(places, weights=is_other[there])
    is_shared = (of_others > 0) & (of_others < counts) if are_two else counts > 1
    numbers[there[~is_shared[places]]] = -1


def _tell_apart(numbers: np.ndarray, chosen: np.ndarray, signatures: Sequence[bytes]) -> None:
    """Splits the groups of the chosen images by signature; sets -1 for images without a signature."""
    if not len(chosen):
        return
    whole = b"".join(signature.ljust(SIGNATURE_SIZE, b"\0") for signature in signatures)
    high, low = np.frombuffer(whole, np.int64).reshape(-1, 2).T
    new = _numbered(numbers[chosen], high, low) + numbers.max() + 1
    numbers[chosen] = np.where([signature != b"" for signature in signatures], new, -1)


def _signatures(
    records: Records, indices: np.ndarray, folder: Path, name: str, signature: Callable[[str | bytes], bytes]
) -> list[bytes]:
    """Returns the signature of each image, cached in `folder`; b"" if the image can't be read.

    Args:
        name: cache column of this kind of signature.
        signature: returns the signature of an image's path or bytes.
    """
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
    """Returns a digest of the middle of an image's bytes."""
    if isinstance(image, bytes):
        return _digest(image)  # already in memory
    with open_regular(image) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - FIRST_PIECE) // 2)
        return _digest(file.read(FIRST_PIECE))


def _whole(image: str | bytes) -> bytes:
    """Returns a digest of all bytes of an image, or of pieces of a long file."""
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
