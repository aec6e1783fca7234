"""Atomic file writes: a file is complete at any moment, and what was written reaches the disk."""

import itertools
import logging
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
MARKER = ".not_training_data"  # marks folders written by this toolkit, which are skipped inside training data
MARKER_TEXT = """This folder is written by a training, an evaluation or a cache.
If it lies within a folder of training data, its files are not used as data.
"""


def mark_as_own(folder: Path) -> None:
    """Marks an existing folder as one whose files are not training data."""
    file = folder / MARKER
    if not file.exists():
        file.write_text(MARKER_TEXT, encoding="utf-8")


def set_aside(path: Path) -> Path:
    """Renames a file or folder that a run must not take for its own, to `abandoned-...`; returns its new path.

    Raises:
        OSError: if it can't be renamed.
    """
    names = (f"abandoned-{path.name}" + (f"-{number}" if number else "") for number in itertools.count())
    aside = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
    path.rename(aside)
    return aside


def sync_file(file: Path) -> None:
    """Flushes a file to disk. It is opened for writing, because Windows syncs no read-only file."""
    with open(file, "r+b") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk; does nothing on Windows, where folders can't be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def usual_modes(path: Path) -> None:
    """Sets the umask's permissions on a file, or on all files below a folder; safetensors' own are stricter.

    A new file shows the right permissions: a process can't read its umask without changing it.
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
    """Writes a safetensors file with the umask's permissions."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata)
    usual_modes(path)


@contextmanager
def or_without(what: object) -> Iterator[None]:
    """Context manager: turns a disk error into a warning that names what is not written; the training continues."""
    try:
        yield
    except OSError as error:
        logger.warning("%s can't be written: %s; the training continues without it", what, error.strerror or error)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager: yields a temporary path, which then replaces `path` atomically; an error removes it."""
    aside = path.with_name(f".tmp-{path.name}")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically: at any moment the file is either the old or the new one."""
    with replacing(path) as aside:
        aside.write_bytes(text.encode("utf-8", "backslashreplace"))  # file names in it may not be valid Unicode
