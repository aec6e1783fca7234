"""Images of the same bytes: known by lengths, sizes and pieces of the files, so that few files are read."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from utils.data.headers import Survey, map_chunks
from utils.data.sources import Records
from utils.user_files import open_regular

WHOLE = 256 << 10  # bytes up to which all of a file is compared
PIECE, NUM_PIECES = 16 << 10, 16  # of longer ones, from the first byte to the last
MANY = 5_000


def first_of_same(records: Records, known: Survey) -> np.ndarray:
    """[N] of images of the same bytes the number of one, that of the lowest identity; of others their own."""
    firsts = np.arange(len(records))
    facts = _facts(known)
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, fact in enumerate(facts):
        if fact[0] >= 0:
            alike[fact].append(index)
    chosen = [index for found in alike.values() if len(found) > 1 for index in found]
    same: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, signature in zip(chosen, _signatures(records, chosen), strict=True):
        if signature:
            same[*facts[index], signature].append(index)
    for found in same.values():
        firsts[found] = min(found, key=records.identity)
    return firsts


def shared_with(records: Records, known: Survey, others: Records, known_others: Survey) -> list[int]:
    """The numbers of the images whose bytes are among others'."""
    facts, facts_of_others = _facts(known), _facts(known_others)
    in_both = set(facts) & set(facts_of_others)
    chosen = [index for index, fact in enumerate(facts) if fact in in_both and fact[0] >= 0]
    chosen_others = [index for index, fact in enumerate(facts_of_others) if fact in in_both and fact[0] >= 0]
    there = {
        (facts_of_others[index], signature)
        for index, signature in zip(chosen_others, _signatures(others, chosen_others), strict=True)
        if signature
    }
    found = zip(chosen, _signatures(records, chosen), strict=True)
    return [index for index, signature in found if (facts[index], signature) in there]


def _facts(known: Survey) -> list[tuple[int, ...]]:
    """(length, width, height) of each image."""
    return list(map(tuple, np.column_stack([known.num_bytes, known.sizes]).tolist()))


def _signatures(records: Records, indices: Sequence[int]) -> Iterable[bytes]:
    """Of each image what changes with its bytes; b"" if it can't be read."""
    for found in map_chunks(_read_chunk, records, indices, many=MANY):
        yield from found


def _read_chunk(records: Records, indices: Sequence[int]) -> list[bytes]:
    return [_signature(records, int(index)) for index in indices]


def _signature(records: Records, index: int) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    try:
        image = records.image(index)
        if isinstance(image, bytes):
            digest.update(image)
            return digest.digest()
        with open_regular(image) as file:
            length = os.fstat(file.fileno()).st_size
            places = np.linspace(0, length - PIECE, NUM_PIECES).astype(int).tolist() if length > WHOLE else [0]
            for place in places:
                file.seek(place)
                digest.update(file.read(PIECE if length > WHOLE else WHOLE))
    except (OSError, ValueError):
        return b""
    return digest.digest()
