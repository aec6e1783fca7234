"""Files that are whole at any moment, and what was written stays written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
