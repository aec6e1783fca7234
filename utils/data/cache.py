"""Encodings cached on disk, under keys derived from everything they were computed from.

A shard is a safetensors file with `keys` [n, 16], the tensors [n, ...] of the entries, and `checksums` [n, 8] of both.
It is written to a temporary file, synced and renamed, so that it is complete or absent. Its name is a digest of its
keys, so that the same entries make the same file, whichever process writes it. Each entry is verified against its
checksum when it is read. Files are not memory-mapped: truncating a file in use raises an error, whereas a mapped file
would kill the process.
"""

import hashlib
import json
import logging
import math
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import psutil
import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor

from utils.config.options import ProcessError, UserError
from utils.config.user_files import open_regular, parse_json
from utils.runtime.atomic_files import sync_file, sync_folder, write_tensors

logger = logging.getLogger(__name__)
KEY_SIZE = 16
CHECKSUM_SIZE = 8
HEADER_LIMIT = 1 << 20
MAX_DIMENSIONS = 8
NO_SHARD = "it is not a file of this cache"
NO_CHECKSUMS = "it has no checksums because an earlier version wrote it"
OWN_TENSORS = {"keys": KEY_SIZE, "checksums": CHECKSUM_SIZE}
READING_THREADS = 8
SHARD_ENTRIES = 256
SHARD_NAME = re.compile(r"[0-9a-f]{24}\.safetensors")
STALE_SECONDS = 24 * 3600
LARGEST_PROCESS = 2**31
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "U8": torch.uint8,
}


def make_key(*facts: object) -> bytes:
    """Returns the key [16 bytes] of JSON-serializable facts; equal only for equal facts."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=KEY_SIZE).digest()


class Field(NamedTuple):
    """Location of a tensor [n, ...] in a shard: row r is the `row_bytes` bytes from `begin` + r * `row_bytes`.

    Attributes:
        shape: of one row.
        begin: offset in the file, in bytes.
        words: its name, dtype and shape as text, for the checksums.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    row_bytes: int
    words: bytes

    @staticmethod
    def of(name: str, dtype: torch.dtype, shape: Sequence[int], begin: int) -> "Field":
        """Returns the field of a tensor whose rows have this shape and whose first byte is at `begin`."""
        row_bytes = math.prod(shape) * dtype.itemsize
        return Field(dtype, tuple(shape), begin, row_bytes, f"{name} {dtype} {tuple(shape)}".encode())


@dataclass(frozen=True)
class Shard:
    """A shard whose header, keys and checksums have been read.

    Attributes:
        fields: the tensors of its entries, by name.
        keys: [n, 16] uint8.
        checksums: n concatenated checksums of `CHECKSUM_SIZE` bytes each.
    """

    path: Path
    fields: dict[str, Field]
    keys: np.ndarray
    checksums: bytes

    @staticmethod
    def open(path: Path) -> "Shard":
        """Reads the header, the keys and the checksums.

        Raises:
            OSError, ValueError: if it can't be read, or is not a complete shard.
        """
        with open_regular(path) as file:
            fields, count = _read_header(file)
            for name, size in OWN_TENSORS.items():
                if name not in fields:
                    raise ValueError(NO_CHECKSUMS if "keys" in fields else NO_SHARD)
                if (fields[name].dtype, fields[name].shape) != (torch.uint8, (size,)):
                    raise ValueError(NO_SHARD)
            keys, checksums = (_read_at(file, fields[name].begin, count * size) for name, size in OWN_TENSORS.items())
        if SHARD_NAME.fullmatch(path.name) and path.name != shard_name(keys.tobytes()):
            raise ValueError("its keys have changed since it was written")
        of_entries = {name: each for name, each in fields.items() if name not in OWN_TENSORS}
        return Shard(path, of_entries, keys.reshape(-1, KEY_SIZE), checksums.tobytes())

    def rows(self, numbers: Iterable[int]) -> Iterator[dict[str, Tensor]]:
        """Yields the tensors of the entries at these rows, by name.

        Raises:
            OSError, ValueError: if an entry can't be read or does not match its checksum.
        """
        with open(self.path, "rb", buffering=0) as file:
            for row in numbers:
                content = {
                    name: _read_at(file, field.begin + row * field.row_bytes, field.row_bytes)
                    for name, field in self.fields.items()
                }
                written = self.checksums[row * CHECKSUM_SIZE : (row + 1) * CHECKSUM_SIZE]
                if written != checksum(self.keys[row].tobytes(), self.fields, content):
                    raise ValueError("an entry has changed since it was written (its checksum differs)")
                yield {
                    name: torch.from_numpy(content[name]).view(field.dtype).view(field.shape)
                    for name, field in self.fields.items()
                }


Form = Mapping[str, tuple[tuple[int, ...], Sequence[torch.dtype]]]
"""The required shape and the allowed dtypes of each tensor of an entry, by name."""


class EntryStore:
    """The cached entries of one kind, in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._shards: list[Shard] = []
        self._prefixes = np.zeros(0, np.uint64)
        self._places = np.zeros((0, 2), np.int32)

    def open(self) -> None:
        """Creates the folder, removes temporary files of killed runs, and lists the complete shards.

        Raises:
            UserError: if the folder can't be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove_stale(self.folder)
        except OSError as error:
            raise UserError(f"--encoding_cache_dir: {self.folder} can't be written: {error.strerror}") from error
        self.refresh()

    def refresh(self) -> None:
        """Lists the complete shards that exist now, and removes damaged ones."""
        self._shards, damaged = [], {}
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            try:
                self._shards.append(Shard.open(path))
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                damaged[path.name] = str(error)
        self.remove(damaged)

        # sort all keys by their first half, so that `find` is a binary search
        counts = [len(shard.keys) for shard in self._shards]
        numbers = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        rows = np.concatenate([np.arange(count, dtype=np.int32) for count in counts] or [np.zeros(0, np.int32)])
        keys = [shard.keys for shard in self._shards] or [np.zeros((0, KEY_SIZE), np.uint8)]
        prefixes = prefixes_of(np.concatenate(keys))
        order = np.argsort(prefixes, kind="stable")
        self._prefixes = prefixes[order]
        self._places = np.stack([numbers, rows], 1)[order]

    def remove(self, damaged: Mapping[str, str]) -> None:
        """Removes damaged shards, so that their entries are encoded again. Files of anything else are kept.

        Args:
            damaged: what is wrong with each file, by name.

        Raises:
            UserError: if a file can't be removed.
        """
        if not damaged:
            return
        name, reason = next(iter(damaged.items()))
        message = "ignored %d damaged cache files in %s; their entries will be encoded again: %s: %s%s"
        more = "" if len(damaged) == 1 else ", and others"
        logger.warning(message, len(damaged), self.folder, name, reason, more)
        for name in filter(SHARD_NAME.fullmatch, damaged):
            try:
                (self.folder / name).unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"--encoding_cache_dir: {self.folder / name} can't be removed: {error}") from error

    def __len__(self) -> int:
        return len(self._prefixes)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns [n, 2] int32 the shard and row of each of [n, 16] keys; -1 for keys without an entry."""
        prefixes = prefixes_of(keys)
        at = np.minimum(np.searchsorted(self._prefixes, prefixes), max(len(self._prefixes) - 1, 0))
        places = np.full((len(keys), 2), -1, np.int32)
        if len(self._prefixes):
            is_there = self._prefixes[at] == prefixes
            places[is_there] = self._places[at[is_there]]
        return places

    def places_by_shard(self, keys: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the rows of the entries among [n, 16] keys, ascending, by the file name of their shard."""
        places = self.find(keys)
        places = np.unique(places[places[:, 0] >= 0], axis=0)
        numbers, begins = np.unique(places[:, 0], return_index=True)
        rows = np.split(places[:, 1], begins[1:]) if len(numbers) else []
        return {self._shards[number].path.name: each for number, each in zip(numbers, rows, strict=True)}

    def damaged(self, rows: Mapping[str, np.ndarray], form: Form) -> Iterator[tuple[str, str]]:
        """Reads and verifies rows; yields (shard name, what is wrong with it or "") in order.

        Args:
            rows: the rows to verify, by shard name.
            form: the required shape and dtypes of their tensors.
        """
        shards = {shard.path.name: shard for shard in self._shards}

        def look(name: str) -> str:
            shard = shards.get(name)
            if shard is None:  # a shared disk may show this process other files than the main process
                return ""
            if not _has_form(shard, form):
                return "its entries have unexpected shapes or dtypes"
            try:
                for _ in shard.rows(rows[name].tolist()):
                    pass
            except FileNotFoundError:
                return ""
            except (OSError, ValueError) as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(min(READING_THREADS, os.cpu_count() or 1)) as pool:
            yield from zip(rows, pool.map(look, rows), strict=True)

    def read(self, place: np.ndarray) -> dict[str, Tensor]:
        """Returns the tensors of the entry at a place returned by `find`, by name.

        Raises:
            ProcessError: if the entry has changed since the run began.
        """
        shard = self._shards[int(place[0])]
        try:
            return next(shard.rows([int(place[1])]))
        except (OSError, ValueError) as error:
            raise ProcessError(
                f"--encoding_cache_dir: {shard.path} was changed while in use: {error}; start again with "
                "--resume_from_checkpoint latest, its entries will be encoded again"
            ) from error

    def write(self, keys: Sequence[bytes], tensors: Mapping[str, Tensor]) -> None:
        """Writes entries as one shard. The caller must widen float16 tensors that overflow.

        Args:
            keys: n keys of `KEY_SIZE` bytes.
            tensors: [n, ...] by name.

        Raises:
            UserError: if the folder can't be written, for example because the disk is full.
        """
        tensors = {name: each.contiguous() for name, each in tensors.items()}
        table, name = b"".join(keys), shard_name(b"".join(keys))
        content = {"keys": _table(table, KEY_SIZE), "checksums": _table(_checksums(keys, tensors), CHECKSUM_SIZE)}
        temporary = self.folder / f".tmp-{socket.gethostname()}-{os.getpid()}-{name}"
        try:
            write_tensors(content | tensors, temporary)
            sync_file(temporary)
            os.replace(temporary, self.folder / name)
            sync_folder(self.folder)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"--encoding_cache_dir: {self.folder} can't be written: {error}") from error


def prefixes_of(keys: np.ndarray) -> np.ndarray:
    """Returns [n] uint64, the first half of [n, 16] keys.

    Among a billion entries, two share a prefix with a probability of 1 in 37.
    """
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64).reshape(-1)


def shard_name(keys: bytes) -> str:
    """Returns the file name of a shard with these concatenated keys."""
    return f"{hashlib.blake2b(keys, digest_size=12).hexdigest()}.safetensors"


def checksum(key: bytes, fields: Mapping[str, Field], content: Mapping[str, np.ndarray]) -> bytes:
    """Returns the checksum of an entry: of its key and the name, dtype, shape and bytes of each tensor."""
    digest = xxhash.xxh3_64(key)
    for name in sorted(fields):
        digest.update(fields[name].words)
        digest.update(content[name])
    return digest.digest()


def _checksums(keys: Sequence[bytes], tensors: Mapping[str, Tensor]) -> bytes:
    """Returns the concatenated checksums of entries."""
    fields, content = {}, {}
    for name, tensor in tensors.items():
        fields[name] = Field.of(name, tensor.dtype, tensor.shape[1:], 0)
        content[name] = tensor.reshape(-1).view(torch.uint8).numpy()
    found = []
    for row, key in enumerate(keys):
        some = {name: each[row * fields[name].row_bytes :][: fields[name].row_bytes] for name, each in content.items()}
        found.append(checksum(key, fields, some))
    return b"".join(found)


def _table(content: bytes, width: int) -> Tensor:
    """Returns bytes as [n, width] uint8."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, width)


def _read_header(file: BinaryIO) -> tuple[dict[str, Field], int]:
    """Returns (the tensors of a safetensors file, their number of rows). Tensors must be contiguous and fill the file.

    Raises:
        ValueError: if the file is damaged, or not a file of this cache.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= size - 8:
        raise ValueError("it is cut off, or not a safetensors file")
    if length > HEADER_LIMIT:
        raise ValueError(NO_SHARD)
    header = parse_json(file.read(length).decode("utf-8"), "its header")
    if not isinstance(header, dict):
        raise ValueError(NO_SHARD)
    header.pop("__metadata__", None)
    fields = {name: _field(name, entry, 8 + length) for name, entry in header.items()}
    end, counts = 8 + length, set()
    for begin, count, num_bytes, _ in sorted(fields.values(), key=lambda each: each[0]):
        if begin != end:
            raise ValueError("its header lists some bytes twice, or not at all")
        end += num_bytes
        counts.add(count)
    if end != size:
        raise ValueError("it is cut off, or has extra bytes at the end")
    if len(counts) != 1:
        raise ValueError(NO_SHARD)
    return {name: field for name, (_, _, _, field) in fields.items()}, counts.pop()


def _field(name: str, entry: object, data: int) -> tuple[int, int, int, Field]:
    """Returns (first byte, number of rows, number of bytes, field) of a tensor from its header entry.

    Args:
        data: offset of the byte after the header.
    """
    wanted = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or entry.keys() != wanted or not isinstance(entry["dtype"], str):
        raise ValueError(NO_SHARD)
    dtype, shape, offsets = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if dtype is None or not _are_counts(shape) or not _are_counts(offsets) or not shape or len(offsets) != 2:
        raise ValueError(NO_SHARD)
    begin, num_bytes = data + offsets[0], offsets[1] - offsets[0]
    field = Field.of(name, dtype, shape[1:], begin)
    if num_bytes != shape[0] * field.row_bytes:
        raise ValueError("its header is inconsistent")
    return begin, shape[0], num_bytes, field


def _are_counts(values: object) -> bool:
    """Returns whether a value is a list of plausible sizes or offsets."""
    if not isinstance(values, list) or len(values) > MAX_DIMENSIONS:
        return False
    return all(type(value) is int and 0 <= value < 1 << 60 for value in values)


def _read_at(file: BinaryIO, begin: int, count: int) -> np.ndarray:
    """Returns [count] uint8 of a file, from the byte `begin`.

    Raises:
        ValueError: if the file is too short.
    """
    content, done = np.empty(count, np.uint8), 0
    file.seek(begin)
    while done < count:
        found = file.readinto(content[done:])
        if not found:
            raise ValueError("it is cut off")
        done += found
    return content


def _has_form(shard: Shard, form: Form) -> bool:
    """Returns whether the tensors of a shard have the required names, shapes and dtypes."""
    return shard.fields.keys() == form.keys() and all(
        shard.fields[name].shape == shape and shard.fields[name].dtype in dtypes
        for name, (shape, dtypes) in form.items()
    )


def _remove_stale(folder: Path) -> None:
    """Removes temporary files of writers that are no longer running."""
    here = socket.gethostname()
    for path in folder.glob(".tmp-*"):
        host, _, rest = path.name.removeprefix(".tmp-").rpartition("-")[0].rpartition("-")
        is_dead = host == here and rest.isdigit() and not _is_alive(rest)
        try:
            if is_dead or time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
        except FileNotFoundError:
            continue


def _is_alive(process: str) -> bool:
    """Returns whether a process with this id runs on this machine."""
    return process.isascii() and int(process) < LARGEST_PROCESS and psutil.pid_exists(int(process))


def in_shards(entries: Sequence, groups: Sequence[int]) -> Iterable[Sequence]:
    """Splits entries into slices of at most `SHARD_ENTRIES`, each within one run of equal groups.

    Args:
        entries: n entries, sorted by group.
        groups: the group of each entry.
    """
    begin = 0
    while begin < len(entries):
        end = begin
        while end < len(entries) and end - begin < SHARD_ENTRIES and groups[end] == groups[begin]:
            end += 1
        yield entries[begin:end]
        begin = end
