"""Files that are whole at any moment, and what was written stays written."""

import logging
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
MARKER = ".not_training_data"  # of folders that this toolkit writes, which are left out where they lie among data
MARKER_TEXT = """A training, an evaluation or a cache writes this folder.
Where it lies within a folder of training data, its files are left out of the data.
"""


def mark_as_own(folder: Path) -> None:
    """Marks a folder as one whose files are no training data; it must exist."""
    file = folder / MARKER
    if not file.exists():
        file.write_text(MARKER_TEXT, encoding="utf-8")


def sync_file(file: Path) -> None:
    """Has the disk keep what was written to a file. It is opened for writing, without which Windows syncs none."""
    with open(file, "r+b") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Has the disk keep the names in a folder; Windows opens no folders, and keeps them by itself."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def usual_modes(path: Path) -> None:
    """Gives a file, or all files below a folder, the permissions of the umask: safetensors' files have fewer.

    A new file shows what these are in that folder: a process can't read its umask without changing it.
    """
    folder = path if path.is_dir() else path.parent
    probe = folder / f".tmp-mode-{os.getpid()}-{threading.get_ident()}"
    probe.unlink(missing_ok=True)
    with open(probe, "xb") as opened:
        usual = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
    probe.unlink()
    for each in path.rglob("*") if path.is_dir() else (path,):
        mode = each.lstat().st_mode
        if stat.S_ISREG(mode) and usual & ~mode:
            each.chmod(stat.S_IMODE(mode) | usual)


def write_tensors(tensors: Mapping[str, "Tensor"], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with the permissions of the umask."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata)
    usual_modes(path)


@contextmanager
def or_without(what: object) -> Iterator[None]:
    """Context manager: an error of the disk is a warning that names what is not written, and the training continues."""
    try:
        yield
    except OSError as error:
        logger.warning("%s can't be written: %s; the training continues without", what, error.strerror or error)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path aside to write to, which then becomes `path`: at any moment it is either the old file or the new."""
    aside = path.with_name(f".tmp-{path.name}")
    yield aside
    os.replace(aside, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text so that the file is at any moment either the old or the new one."""
    with replacing(path) as aside:
        aside.write_bytes(text.encode("utf-8", "backslashreplace"))  # names of files need not be Unicode
