"""Reads tensor files. Opens regular files only: libraries would wait forever on a pipe.

Libraries' errors about damaged files pass through; `FileError` is raised for anything that is not a regular file.
"""

import errno
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from utils.config.user_files import FileError, open_regular, require_regular, size_text

if TYPE_CHECKING:
    from safetensors import safe_open
    from torch import Tensor

OTHER_CONTENT = {
    b"version https://git-lfs": "is a Git LFS pointer; fetch the file itself with git lfs pull",
    b"<!DOCTYPE": "is a web page; download the file again",
    b"<html": "is a web page; download the file again",
    b"GGUF": "is a GGUF file with quantized weights; give the weights in fp32, fp16 or bf16",
    b"\x1f\x8b": "is compressed with gzip; unpack it with gunzip",
    b"7z\xbc\xaf": "is a 7z archive; unpack it",
    b"Rar!": "is a RAR archive; unpack it",
}
"""Files mistaken for tensor files, by their first bytes (ignoring case)."""
TEXTS = (".json", ".txt", ".model", ".jinja", ".yaml")
DAMAGED = (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error)
"""Exceptions that torch raises for files that are truncated or not pickles."""
MAX_TEXT = 256 << 20  # bytes; the largest tokenizers have 35 MB


def open_safetensors(path: str | os.PathLike) -> "safe_open":
    """Opens a safetensors file, from which single tensors can be read.

    Raises:
        FileError: if it is not a regular file.
        OSError, SafetensorError: if it can't be read.
    """
    from safetensors import safe_open

    require_regular(path)
    return safe_open(path, "pt")


def read_safetensors(path: str | os.PathLike) -> dict[str, "Tensor"]:
    """Returns the tensors of a safetensors file by name; raises as `open_safetensors`."""
    from safetensors.torch import load_file

    require_regular(path)
    return load_file(path)


def refuse_other_content(path: str | os.PathLike) -> None:
    """Refuses a file that is empty or of another kind than a tensor file.

    Raises:
        FileError: saying what it is and what to do.
    """
    with open_regular(path) as file:
        head = file.read(64).lstrip(b"\xef\xbb\xbf \r\n\t")
        is_empty = not head and not file.seek(0, os.SEEK_END)
    if is_empty:
        raise FileError(path, "is empty; download the file again")
    for mark, reason in OTHER_CONTENT.items():
        if head.lower().startswith(mark.lower()):
            raise FileError(path, reason)


def read_pickle(path: str | os.PathLike, mmap: bool = False) -> Any:
    """Returns the content of a file written by `torch.save`, on the CPU; unpickles nothing but tensors.

    Args:
        mmap: whether to map the tensors instead of reading them, if the file was written by torch 1.6 or later.

    Raises:
        FileError: if it is not a regular file or can't be read, saying what it is.
        OSError: if it can't be opened.
    """
    import torch

    require_regular(path)
    refuse_other_content(path)
    with open_regular(path) as file:
        head = file.read(16)
    if head[8:9] == b"{":
        raise FileError(path, "is a safetensors file; rename it to end in .safetensors")
    is_mapped = mmap and zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except (UnpicklingError, *DAMAGED) as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            cure = "save its state_dict() as safetensors, or give another file"
            raise FileError(path, f"contains objects other than tensors, which are not unpickled; {cure}") from error
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise FileError(path, "is damaged, truncated or not written by torch.save; download it again") from error


def read_arrays(path: str | os.PathLike, names: tuple[str, ...]) -> Mapping[str, Any]:
    """Returns those of the named arrays that an .npz file contains; unpickles nothing.

    Raises:
        FileError: if it is not a regular file; otherwise as `numpy.load`.
    """
    import numpy as np

    with open_regular(path) as opened, np.load(opened, allow_pickle=False) as file:
        return {name: file[name] for name in names if name in file}


def require_regular_files(folder: str | os.PathLike) -> None:
    """Refuses a model folder with files on which a library would block, or that it would read without a limit.

    Raises:
        FileError: naming a file that is not regular, or a text file that is too long.
    """
    root = Path(folder)
    for path in [*root.glob("*"), *root.glob("*/*")] if root.is_dir() else ():
        if path.exists() and not path.is_dir():
            require_regular(path)
            if path.suffix in TEXTS and (size := path.stat().st_size) > MAX_TEXT:
                raise FileError(path, f"has {size_text(size)}; at most {size_text(MAX_TEXT)} are read")
