"""Writes a safetensors file tensor by tensor, so that a model need not fit into memory.

The format: https://huggingface.co/docs/safetensors#format. Files are those that the library itself writes, byte for
byte, given the same tensors and metadata.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.runtime.atomic_files import replacing, sync_file, usual_modes

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's names of dtypes."""
LIBRARYS_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")
"""The library sorts tensors by alignment, widest first; the order of dtypes of one width is its own."""
HASH_KEY = "modelspec.hash_sha256"  # https://github.com/Stability-AI/ModelSpec: the hash of all bytes after the header
NO_HASH = "0x" + "0" * 64


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor to write.

    Attributes:
        name: its name in the file.
        dtype: its dtype in the file.
        shape: its shape.
        read: returns its values, when they are written; they are converted to `dtype`.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_streamed(tensors: Sequence[StreamedTensor], file: Path, metadata: Mapping[str, str]) -> str:
    """Writes a safetensors file atomically, holding one tensor at a time.

    Args:
        tensors: the tensors, in any order.
        file: the file to write or replace.
        metadata: the file's metadata; a value of `HASH_KEY` is replaced with the hash.

    Returns:
        The SHA-256 of all bytes after the header, in hexadecimal digits.

    Raises:
        ValueError: if two tensors have one name, or `read` returns another shape.
    """
    if len({each.name for each in tensors}) != len(tensors):
        raise ValueError(f"{file}: two tensors have the same name")
    ordered = sorted(tensors, key=lambda each: (LIBRARYS_ORDER.index(DTYPES[each.dtype]), each.name))
    stated = {HASH_KEY: NO_HASH} if HASH_KEY in metadata else {}
    header = _header(ordered, {**metadata, **stated})
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as aside:
        digest = hashlib.sha256()
        with open(aside, "wb") as opened:
            opened.write(header)
            for each in ordered:
                data = _bytes_of(each)
                digest.update(data)
                opened.write(data)
            if stated:  # it has as many characters as its placeholder
                opened.seek(0)
                opened.write(_header(ordered, {**metadata, HASH_KEY: f"0x{digest.hexdigest()}"}))
        sync_file(aside)
        usual_modes(aside)
    return digest.hexdigest()


def _header(tensors: Sequence[StreamedTensor], metadata: Mapping[str, str]) -> bytes:
    """Returns the length of the header and the header, padded with spaces to a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for each in tensors:
        offsets = [begin, begin + each.num_bytes]
        entries[each.name] = {"dtype": DTYPES[each.dtype], "shape": list(each.shape), "data_offsets": offsets}
        begin = offsets[1]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes_of(tensor: StreamedTensor) -> memoryview:
    values = tensor.read().detach()
    if tuple(values.shape) != tensor.shape:
        raise ValueError(f"{tensor.name} has shape {tuple(values.shape)}, expected {tensor.shape}")
    values = values.to("cpu", tensor.dtype).contiguous()
    return memoryview(values.flatten().view(torch.uint8).numpy())
