"""Reading files of tensors: only regular ones are opened, where the libraries would wait for a pipe without end.

What they raise of a broken file is theirs; `FileError` says that it is no file.
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
    b"version https://git-lfs": "is a pointer of Git LFS; fetch the file itself with git lfs pull",
    b"<!DOCTYPE": "is a web page; fetch the file again",
    b"<html": "is a web page; fetch the file again",
    b"GGUF": "is a GGUF file, which is quantised; give the weights in fp32, fp16 or bf16",
    b"\x1f\x8b": "is compressed by gzip; unpack it with gunzip",
    b"7z\xbc\xaf": "is a 7z archive; unpack it",
    b"Rar!": "is a rar archive; unpack it",
}
"""What is called a file of tensors and is none, by its first bytes in any case."""
TEXTS = (".json", ".txt", ".model", ".jinja", ".yaml")
DAMAGED = (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error)
"""What torch raises of pickles that are cut short or no pickles."""
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


def refuse_other_content(path: str | os.PathLike) -> None:
    """Refuses what was saved in the place of a file of tensors.

    Raises:
        FileError: saying what it is, and what to do.
    """
    with open_regular(path) as file:
        head = file.read(64).lstrip(b"\xef\xbb\xbf \r\n\t")
        is_empty = not head and not file.seek(0, os.SEEK_END)
    if is_empty:
        raise FileError(path, "is empty; fetch the file again")
    for mark, reason in OTHER_CONTENT.items():
        if head.lower().startswith(mark.lower()):
            raise FileError(path, reason)


def read_pickle(path: str | os.PathLike, mmap: bool = False) -> Any:
    """What a file that `torch.save` wrote holds, on the CPU, of which nothing but tensors is unpickled.

    Args:
        mmap: whether the tensors are mapped and not read, where the file is of torch 1.6 or later.

    Raises:
        FileError: if it is no regular file, or nothing that can be read so, saying what it is.
        OSError: if it can't be opened.
    """
    import torch

    require_regular(path)
    refuse_other_content(path)
    with open_regular(path) as file:
        head = file.read(16)
    if head[8:9] == b"{":
        raise FileError(path, "is a safetensors file; let its name end with .safetensors")
    is_mapped = mmap and zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except (UnpicklingError, *DAMAGED) as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            cure = "save its state_dict() as safetensors, or give another file"
            raise FileError(path, f"holds objects other than tensors, which are not unpickled; {cure}") from error
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise FileError(path, "is damaged, cut short or not of torch.save; fetch the file again") from error


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
