"""Encodings kept on the disk under keys that are made of what they were computed from.

A shard is a safetensors file: `keys` [n, 16] and tensors [n, ...] of what lies under each. It is written aside, synced
and renamed, so that it is whole or not there; one that is cut off is seen by its length. Its name follows from its
keys, so that the same entries make the same file, whoever writes it.
"""

import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from utils.disk import sync_file, sync_folder
from utils.options import UserError, option, require_positive

logger = logging.getLogger(__name__)
KEY_SIZE = 16
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
CACHE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class CacheOptions:
    cache_latents: bool = option(False, "encode each image once, and train on what the VAE made of it")
    cache_text_embeddings: bool = option(False, "encode each distinct caption once, and train on that")
    encoding_cache_dir: str | None = option(
        None,
        "where encodings are kept, for this and later runs; by default diffusion_fine_tuning in HF_HOME",
    )
    cache_variants: int | None = option(
        None,
        "crops, flips and tag orders that an image has: epoch e trains on number e modulo this; by default 1 of what "
        "is cached, and new ones each epoch of what is not",
    )
    cache_dtype: str | None = option(
        None, "how encodings are stored; by default as they are computed", choices=list(CACHE_DTYPES)
    )
    cache_batch_size: int = option(8, "images or captions encoded at once when the cache is filled")
    cache_only: bool = option(False, "fill the cache and stop")
    verify_cache: bool = option(False, "fill the cache, encode everything again, compare, and stop")

    def __post_init__(self) -> None:
        require_positive(self, "cache_variants", "cache_batch_size")
        is_used = self.cache_latents or self.cache_text_embeddings
        for name in ("cache_only", "verify_cache"):
            if getattr(self, name) and not is_used:
                raise UserError(f"--{name} goes with --cache_latents or --cache_text_embeddings; give one of them")
        if self.cache_dtype is not None and not is_used:
            raise UserError("--cache_dtype goes with --cache_latents or --cache_text_embeddings; give one of them")

    @property
    def folder(self) -> Path:
        """Where encodings and what is known of image files are kept."""
        if self.encoding_cache_dir is not None:
            return Path(self.encoding_cache_dir)
        from huggingface_hub.constants import HF_HOME

        return Path(HF_HOME) / "diffusion_fine_tuning"

    @property
    def cut_variants(self) -> int | None:
        """Crops and flips of an image, or None where each pass has its own."""
        return self.cache_variants or (1 if self.cache_latents else None)

    @property
    def text_variants(self) -> int | None:
        """Orders of a caption's tags, or None where each pass has its own."""
        return self.cache_variants or (1 if self.cache_text_embeddings else None)


def make_key(*facts: object) -> bytes:
    """A key of JSON-ready facts: equal only for equal facts."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=KEY_SIZE).digest()


class EntryStore:
    """Entries of one kind in a folder, memory-mapped when they are read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._names: list[str] = []
        self._shards: dict[int, dict[str, Tensor]] = {}  # mapped when first read
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
        self._shards = {}
        names, keys = [], []
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            try:
                shard = map_tensors(path)
                if shard.get("keys", torch.zeros(0)).shape[1:] != (KEY_SIZE,):
                    raise ValueError(f"{path} holds no keys")
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                logger.warning("left aside a damaged cache file, its entries are encoded again: %s", error)
                if SHARD_NAME.fullmatch(path.name):
                    path.unlink(missing_ok=True)
                continue
            keys.append(shard["keys"].numpy().copy())
            names.append(path.name)
        self._names = names
        counts = [len(each) for each in keys]
        shard_numbers = np.repeat(np.arange(len(names), dtype=np.int32), counts)
        rows = np.concatenate([np.arange(count, dtype=np.int32) for count in counts] or [np.zeros(0, np.int32)])
        prefixes = prefixes_of(np.concatenate(keys) if keys else np.zeros((0, KEY_SIZE), np.uint8))
        order = np.argsort(prefixes, kind="stable")
        self._prefixes = prefixes[order]
        self._places = np.stack([shard_numbers, rows], 1)[order]

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

    def read(self, place: np.ndarray) -> dict[str, Tensor]:
        """The tensors of the entry at a place that `find` gave; they lie in the mapped file."""
        shard = int(place[0])
        if shard not in self._shards:
            self._shards[shard] = map_tensors(self.folder / self._names[shard])
        row = int(place[1])
        return {name: tensor[row] for name, tensor in self._shards[shard].items() if name != "keys"}

    def write(self, keys: Sequence[bytes], tensors: Mapping[str, Tensor]) -> None:
        """Writes entries as one shard: float16 tensors that overflowed must have been widened before.

        Raises:
            UserError: if there is no room or no permission.
        """
        table = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_SIZE)
        content = {"keys": torch.from_numpy(table.copy())} | {name: each.contiguous() for name, each in tensors.items()}
        name = f"{hashlib.blake2b(table.tobytes(), digest_size=12).hexdigest()}.safetensors"
        temporary = self.folder / f".tmp-{socket.gethostname()}-{os.getpid()}-{name}"
        try:
            save_file(content, temporary)
            sync_file(temporary)
            os.replace(temporary, self.folder / name)
            sync_folder(self.folder)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"--encoding_cache_dir: {self.folder} can't be written: {error}") from error

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_shards": {}}  # a worker maps the files itself


def prefixes_of(keys: np.ndarray) -> np.ndarray:
    """[n] uint64, the first half of [n, 16] keys: enough to tell a billion entries apart but for one time in 37."""
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64).reshape(-1)


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped and not read; no file stays open.

    Raises:
        OSError, ValueError: if it is not whole.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"{path} is no whole safetensors file")
        header = json.loads(file.read(length))
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ValueError(f"{path} is no safetensors file")
    header.pop("__metadata__", None)
    if not all(entry.get("dtype") in DTYPES and "data_offsets" in entry for entry in header.values()):
        raise ValueError(f"{path} holds what no cache does")
    if not header or size != 8 + length + max(entry["data_offsets"][1] for entry in header.values()):
        raise ValueError(f"{path} is cut off")
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length :]
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = content[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


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
