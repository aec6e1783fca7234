"""Reads a safetensors file tensor by tensor into fresh memory.

The library maps files: what was read of a mapped file stays in the process's memory, and its tensors may lie at odd
addresses, where they multiply to other last bits.
"""

import os
import struct
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from utils.config.user_files import FileError, open_regular, parse_json
from utils.formats.streaming import DTYPES

READ_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
READ_DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
LONGEST_HEADER = 100 << 20  # bytes, the library's own limit


class TensorFile:
    """A safetensors file, opened to read single tensors.

    Attributes:
        path: path of the file.
        metadata: the metadata of its header.
    """

    def __init__(self, path: str | os.PathLike):
        """Reads the header.

        Raises:
            FileError: if it is not a safetensors file.
            OSError: if it can't be read.
        """
        self.path = Path(path)
        self._file = open_regular(path)
        try:
            (length,) = struct.unpack("<Q", self._file.read(8))
            if length > LONGEST_HEADER:
                raise ValueError
            header: dict = parse_json(self._file.read(length).decode(), path)
            self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
            self._entries = {
                name: (each["dtype"], each["shape"], *each["data_offsets"]) for name, each in header.items()
            }
        except (ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
            self._file.close()
            raise FileError(path, "is not a whole safetensors file") from error
        self._begin = 8 + length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return tuple(self._entries[name][1])

    def read(self, name: str) -> Tensor:
        """Returns a tensor.

        Raises:
            FileError: if the file is too short, or has the tensor in a dtype that is unknown.
        """
        dtype, shape, begin, end = self._entries[name]
        if dtype not in READ_DTYPES:
            raise FileError(self.path, f"has {name} in the dtype {dtype}, which is not read here")
        self._file.seek(self._begin + begin)
        content = bytearray(end - begin)
        if self._file.readinto(content) != len(content):
            raise FileError(self.path, f"ends before {name}; download it again")
        if not content:
            return torch.empty(shape, dtype=READ_DTYPES[dtype])
        return torch.frombuffer(content, dtype=READ_DTYPES[dtype]).reshape(shape)


def widened_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which a stored tensor is written: its own, or float32 for 8-bit floats."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize == 1 else dtype


def widened(tensor: Tensor) -> Tensor:
    """Returns a tensor in the dtype in which it is written; see `widened_dtype`."""
    return tensor.to(widened_dtype(tensor.dtype))
