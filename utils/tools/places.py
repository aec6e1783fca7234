"""Writes the result of a tool beside its place, and moves it there when it is whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Context manager: yields a path to write a file or a folder to, which then takes the place of `out`.

    A folder that exists keeps the entries that the result does not have. After an error nothing is left.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".tmp-{os.getpid()}-{out.name}")
    try:
        yield aside
        if aside.is_dir() and out.is_dir():
            for entry in sorted(aside.iterdir()):
                _replace(entry, out / entry.name)
            aside.rmdir()
        else:
            _replace(aside, out)
    except BaseException:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
        raise


def _replace(source: Path, target: Path) -> None:
    """Moves a file or folder to the place of another."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    os.replace(source, target)
