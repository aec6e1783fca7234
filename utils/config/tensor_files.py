"""Reading files of tensors: only regular ones are opened, where the libraries would wait for a pipe without end.

What they raise of a broken file is theirs; `FileError` says that it is no file.
"""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config.user_files import FileError, open_regular, require_regular, size_text

if TYPE_CHECKING:
    from safetensors import safe_open
    from torch import Tensor

TEXTS = (".json", ".txt", ".model", ".jinja", ".yaml")
MAX_TEXT = 256 << 20  # bytes; the largest tokenizers have 35 MB


def open_safetensors(path: str | os.PathLike) -> "safe_open":
    """A safetensors file, of which single tensors can be read.

    Raises:
        FileError: if it is no regular file.
        OSError, SafetensorError: if it can't be read.
    """
    from safetensors import safe_open

    require_regular(path)
    return safe_open(path, "pt")


def read_safetensors(path: str | os.PathLike) -> dict[str, "Tensor"]:
    """The tensors of a safetensors file; raises as `open_safetensors`."""
    from safetensors.torch import load_file

    require_regular(path)
    return load_file(path)


def read_pickle(path: str | os.PathLike, mmap: bool = False) -> Any:
    """What a file that `torch.save` wrote holds, on the CPU, of which nothing but tensors is unpickled.

    Args:
        mmap: whether the tensors are mapped and not read, where the file is of torch 1.6 or later.

    Raises:
        FileError: if it is no regular file; else as `torch.load`.
    """
    import torch

    require_regular(path)
    is_mapped = mmap and zipfile.is_zipfile(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)


def read_arrays(path: str | os.PathLike, names: tuple[str, ...]) -> Mapping[str, Any]:
    """Those arrays of an .npz file that are there; nothing is unpickled.

    Raises:
        FileError: if it is no regular file; else as `numpy.load`.
    """
    import numpy as np

    with open_regular(path) as opened, np.load(opened, allow_pickle=False) as file:
        return {name: file[name] for name in names if name in file}


def require_regular_files(folder: str | os.PathLike) -> None:
    """Refuses a model's folder that holds what a library would open and wait for, or read into memory without end.

    Raises:
        FileError: naming a file that is none, or a text that is too long.
    """
    root = Path(folder)
    for path in [*root.glob("*"), *root.glob("*/*")] if root.is_dir() else ():
        if path.exists() and not path.is_dir():
            require_regular(path)
            if path.suffix in TEXTS and (size := path.stat().st_size) > MAX_TEXT:
                raise FileError(path, f"has {size_text(size)}; no more than {size_text(MAX_TEXT)} are read")
