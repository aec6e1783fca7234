"""Writes the result of a tool beside its place, and moves it there when it is whole."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from utils.config.options import UserError
from utils.config.terminal import one_line
from utils.models.weight_files import STEMS

WEIGHTS = re.compile(rf"({STEMS})((-\d+-of-\d+)?\.safetensors|\.safetensors\.index\.json)")
CONFIGS = re.compile(
    r"(config|scheduler_config|preprocessor_config|tokenizer|tokenizer_config|vocab|special_tokens_map|added_tokens)"
    r"\.json|merges\.txt|spiece\.model"
)
"""Names of files in a component's folder that libraries read together."""


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Context manager: yields a path to write a file or a folder to, which then takes the place of `out`.

    A folder that exists keeps the files that the result does not have; in the folders of components, only files that
    libraries would read in place of the new ones are deleted. After an error nothing is left.

    Raises:
        UserError: if a folder, or what is no regular file, has the name of a file of the result, or the reverse.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".tmp-{os.getpid()}-{out.name}")
    try:
        yield aside
        if aside.is_dir() and out.is_dir():
            _merge(aside, out)
            shutil.rmtree(aside)
        else:
            _refuse_other(aside, out)
            os.replace(aside, out)
    except BaseException:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
        raise


def _merge(source: Path, target: Path) -> None:
    """Moves a folder's files to the places of those in another folder."""
    # All places, before anything is replaced.
    entries = sorted(source.rglob("*"))
    for entry in entries:
        _refuse_other(entry, target / entry.relative_to(source))

    # What would be read together with the result, and its files.
    for folder in (entry for entry in entries if entry.is_dir()):
        there, new = target / folder.relative_to(source), [each.name for each in folder.iterdir()]
        there.mkdir(exist_ok=True)
        for old in there.iterdir():
            if old.name not in new and not old.is_dir() and _is_superseded(old.name, new):
                old.unlink()
    for entry in entries:
        if not entry.is_dir():
            os.replace(entry, target / entry.relative_to(source))


def _is_superseded(old: str, new: Sequence[str]) -> bool:
    """Whether libraries would read a file in place of new ones, or together with them."""
    if weights := WEIGHTS.fullmatch(old):
        return any(each[1] == weights[1] for each in map(WEIGHTS.fullmatch, new) if each)
    return bool(CONFIGS.fullmatch(old)) and any(map(CONFIGS.fullmatch, new))


def _refuse_other(new: Path, there: Path) -> None:
    """Refuses to put a folder at the place of something else, and a file at that of a folder."""
    is_alike = there.is_dir() and not there.is_symlink() if new.is_dir() else not there.is_dir()
    if os.path.lexists(there) and not is_alike:
        kind = "a folder" if new.is_dir() else "a file"
        raise UserError(
            f"--overwrite would replace {one_line(there)} by {kind}; move that away, or choose another place"
        )
