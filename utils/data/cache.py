"""Encodings kept on the disk under keys that are made of what they were computed from.

A shard is a safetensors file: `keys` [n, 16], tensors [n, ...] of what lies under each, and `checksums` [n, 8] of both.
It is written aside, synced and renamed, so that it is whole or not there. Its name follows from its keys, so that the
same entries make the same file, whoever writes it. Each entry is compared with its checksum when it is read. Files are
not mapped into memory: one that is cut off while it is in use raises an error, where a mapped one kills the process.
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
NO_SHARD = "it is no file of this cache"
NO_CHECKSUMS = "it has no checksums, an earlier version wrote it"
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
    """A key of JSON-ready facts: equal only for equal facts."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=KEY_SIZE).digest()


class Field(NamedTuple):
    """Where a tensor [n, ...] lies in a shard: row r in the `row_bytes` bytes from `begin` + r * `row_bytes`.

    Attributes:
        words: its name, dtype and shape, for the checksums.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    row_bytes: int
    words: bytes

    @staticmethod
    def of(name: str, dtype: torch.dtype, shape: Sequence[int], begin: int) -> "Field":
        """That of a tensor whose rows have such a shape."""
        row_bytes = math.prod(shape) * dtype.itemsize
        return Field(dtype, tuple(shape), begin, row_bytes, f"{name} {dtype} {tuple(shape)}".encode())


@dataclass(frozen=True)
class Shard:
    """What is known of a shard once its header has been read.

    Attributes:
        fields: the tensors of its entries, by name.
        keys: [n, 16] uint8.
        checksums: n of `CHECKSUM_SIZE` bytes, one behind the other.
    """

    path: Path
    fields: dict[str, Field]
    keys: np.ndarray
    checksums: bytes

    @staticmethod
    def open(path: Path) -> "Shard":
        """Reads the header, the keys and the checksums.

        Raises:
            OSError, ValueError: if it can't be read, or is no whole shard.
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
            raise ValueError("its keys are not those that were written")
        of_entries = {name: each for name, each in fields.items() if name not in OWN_TENSORS}
        return Shard(path, of_entries, keys.reshape(-1, KEY_SIZE), checksums.tobytes())

    def rows(self, numbers: Iterable[int]) -> Iterator[dict[str, Tensor]]:
        """The tensors of entries.

        Raises:
            OSError, ValueError: at one that is not what was written.
        """
        with open(self.path, "rb", buffering=0) as file:
            for row in numbers:
                content = {
                    name: _read_at(file, field.begin + row * field.row_bytes, field.row_bytes)
                    for name, field in self.fields.items()
                }
                written = self.checksums[row * CHECKSUM_SIZE : (row + 1) * CHECKSUM_SIZE]
                if written != checksum(self.keys[row].tobytes(), self.fields, content):
                    raise ValueError("an entry is not what was written (its checksum differs)")
                yield {
                    name: torch.from_numpy(content[name]).view(field.dtype).view(field.shape)
                    for name, field in self.fields.items()
                }


Form = Mapping[str, tuple[tuple[int, ...], Sequence[torch.dtype]]]
"""What entries must be: the shape of each of their tensors, and the dtypes that it may have."""


class EntryStore:
    """Entries of one kind in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._shards: list[Shard] = []
        self._prefixes = np.zeros(0, np.uint64)
        self._places = np.zeros((0, 2), np.int32)

    def open(self) -> None:
        """Creates the folder, removes what killed runs left, and lists the whole shards.

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
        """Lists the whole shards that are there now."""
        self._shards, damaged = [], {}
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            try:
                self._shards.append(Shard.open(path))
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                damaged[path.name] = str(error)
        self.remove(damaged)
        counts = [len(shard.keys) for shard in self._shards]
        numbers = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        rows = np.concatenate([np.arange(count, dtype=np.int32) for count in counts] or [np.zeros(0, np.int32)])
        keys = [shard.keys for shard in self._shards] or [np.zeros((0, KEY_SIZE), np.uint8)]
        prefixes = prefixes_of(np.concatenate(keys))
        order = np.argsort(prefixes, kind="stable")
        self._prefixes = prefixes[order]
        self._places = np.stack([numbers, rows], 1)[order]

    def remove(self, damaged: Mapping[str, str]) -> None:
        """Removes damaged shards, so that their entries are encoded again; what is not this cache's stays.

        Args:
            damaged: why, by the names of the files.
        """
        if not damaged:
            return
        name, reason = next(iter(damaged.items()))
        message = "left aside %d damaged cache files in %s, their entries are encoded again: %s: %s%s"
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
        """[n, 2] int32 shard and row of each of [n, 16] keys, -1 where there is no entry."""
        prefixes = prefixes_of(keys)
        at = np.minimum(np.searchsorted(self._prefixes, prefixes), max(len(self._prefixes) - 1, 0))
        places = np.full((len(keys), 2), -1, np.int32)
        if len(self._prefixes):
            is_there = self._prefixes[at] == prefixes
            places[is_there] = self._places[at[is_there]]
        return places

    def places_by_shard(self, keys: np.ndarray) -> dict[str, np.ndarray]:
        """Of [n, 16] keys the rows that are there, ascending, by the names of the shards' files."""
        places = self.find(keys)
        places = np.unique(places[places[:, 0] >= 0], axis=0)
        numbers, begins = np.unique(places[:, 0], return_index=True)
        rows = np.split(places[:, 1], begins[1:]) if len(numbers) else []
        return {self._shards[number].path.name: each for number, each in zip(numbers, rows, strict=True)}

    def damaged(self, rows: Mapping[str, np.ndarray], form: Form) -> Iterator[tuple[str, str]]:
        """(name, what is wrong with it or "") of each shard, as its rows are read and compared, in order.

        Args:
            rows: those that are wanted, by the shards' names.
            form: what their entries must be.
        """
        shards = {shard.path.name: shard for shard in self._shards}

        def look(name: str) -> str:
            shard = shards.get(name)
            if shard is None:  # on a shared disk this process may see another folder than the main one
                return ""
            if not _has_form(shard, form):
                return "its entries have other shapes than are wanted"
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
        """The tensors of the entry at a place that `find` gave.

        Raises:
            ProcessError: if it is not what was written: it has changed since the run began.
        """
        shard = self._shards[int(place[0])]
        try:
            return next(shard.rows([int(place[1])]))
        except (OSError, ValueError) as error:
            raise ProcessError(
                f"--encoding_cache_dir: {shard.path} was changed while it was in use: {error}; start again with "
                "--resume_from_checkpoint latest, its entries are encoded again"
            ) from error

    def write(self, keys: Sequence[bytes], tensors: Mapping[str, Tensor]) -> None:
        """Writes entries as one shard: float16 tensors that overflowed must have been widened before.

        Raises:
            UserError: if there is no room or no permission.
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
    """[n] uint64, the first half of [n, 16] keys: enough to tell a billion entries apart but for one time in 37."""
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64).reshape(-1)


def shard_name(keys: bytes) -> str:
    """The name of the file of a shard with these keys."""
    return f"{hashlib.blake2b(keys, digest_size=12).hexdigest()}.safetensors"


def checksum(key: bytes, fields: Mapping[str, Field], content: Mapping[str, np.ndarray]) -> bytes:
    """Changes with an entry's key and with the name, dtype, shape and bytes of each of its tensors."""
    digest = xxhash.xxh3_64(key)
    for name in sorted(fields):
        digest.update(fields[name].words)
        digest.update(content[name])
    return digest.digest()


def _checksums(keys: Sequence[bytes], tensors: Mapping[str, Tensor]) -> bytes:
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
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, width)


def _read_header(file: BinaryIO) -> tuple[dict[str, Field], int]:
    """The tensors of a safetensors file and how many rows each has; they must lie side by side and fill it.

    Raises:
        ValueError: if it is not whole, or holds what no cache does.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= size - 8:
        raise ValueError("it is cut off, or no safetensors file")
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
            raise ValueError("its header names bytes twice, or leaves some out")
        end += num_bytes
        counts.add(count)
    if end != size:
        raise ValueError("it is cut off, or longer than it was written")
    if len(counts) != 1:
        raise ValueError(NO_SHARD)
    return {name: field for name, (_, _, _, field) in fields.items()}, counts.pop()


def _field(name: str, entry: object, data: int) -> tuple[int, int, int, Field]:
    """(begin, rows, bytes, where its rows lie) of a tensor, from its place in a header before the byte `data`."""
    wanted = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or entry.keys() != wanted or not isinstance(entry["dtype"], str):
        raise ValueError(NO_SHARD)
    dtype, shape, offsets = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if dtype is None or not _are_counts(shape) or not _are_counts(offsets) or not shape or len(offsets) != 2:
        raise ValueError(NO_SHARD)
    begin, num_bytes = data + offsets[0], offsets[1] - offsets[0]
    field = Field.of(name, dtype, shape[1:], begin)
    if num_bytes != shape[0] * field.row_bytes:
        raise ValueError("its header contradicts itself")
    return begin, shape[0], num_bytes, field


def _are_counts(values: object) -> bool:
    """Whether it is a list of numbers that count bytes or rows of a file."""
    if not isinstance(values, list) or len(values) > MAX_DIMENSIONS:
        return False
    return all(type(value) is int and 0 <= value < 1 << 60 for value in values)


def _read_at(file: BinaryIO, begin: int, count: int) -> np.ndarray:
    """[count] uint8 of a file.

    Raises:
        ValueError: if it has fewer.
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
    """Whether a shard's entries are what they must be."""
    return shard.fields.keys() == form.keys() and all(
        shard.fields[name].shape == shape and shard.fields[name].dtype in dtypes
        for name, (shape, dtypes) in form.items()
    )


def _remove_stale(folder: Path) -> None:
    """Removes what writers that live no more have left half done."""
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
    """Whether a process of that number runs on this machine."""
    return process.isascii() and int(process) < LARGEST_PROCESS and psutil.pid_exists(int(process))


def in_shards(entries: Sequence, groups: Sequence[int]) -> Iterable[Sequence]:
    """Splits entries, which stand in runs of equal group, into pieces of at most `SHARD_ENTRIES` within a run."""
    begin = 0
    while begin < len(entries):
        end = begin
        while end < len(entries) and end - begin < SHARD_ENTRIES and groups[end] == groups[begin]:
            end += 1
        yield entries[begin:end]
        begin = end
