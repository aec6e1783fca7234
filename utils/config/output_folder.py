"""Checks of the output folder that import nothing heavy, so that a used folder is refused first."""

import errno
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.config.options import UserError
from utils.config.terminal import one_line

RESULTS = ("model_index.json", "pytorch_lora_weights.safetensors", "run.json")


def held_by(folder: Path) -> str:
    """Returns the name of a file or folder that an earlier run left, or an empty string."""
    found = [name for name in RESULTS if (folder / name).exists()]
    found += sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir())
    return found[0] if found else ""


def refuse_used(folder: Path) -> None:
    """Raises `UserError` if the folder contains an earlier run."""
    held = held_by(folder)
    if held:
        raise UserError(
            f"--output_dir {one_line(folder)} contains another run ({one_line(held)}); choose another, resume with "
            "--resume_from_checkpoint latest, or give --overwrite_output_dir"
        )


def check_writable(flag: str, path: Path, is_folder: bool) -> None:
    """Refuses a path that can't be written, by creating a temporary file there."""
    try:
        if not is_folder and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        folder = path if is_folder else path.parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--{flag} {path} can't be written: {error.strerror or error}") from error


def refuse_same_folder(
    written: Mapping[str, str | Path | None], read: Mapping[str, Sequence[str | Path | None]]
) -> None:
    """Refuses an output folder that is also an input folder; both arguments map flags to folders."""
    places = {os.path.realpath(folder): flag for flag, folders in read.items() for folder in folders if folder}
    for flag, folder in written.items():
        known = None if folder is None else places.get(os.path.realpath(folder))
        if known is not None:
            raise UserError(
                f"--{flag} {folder} is the folder of --{known}: what is written there would be read as data; choose "
                f"another, such as {Path(folder) / 'output'}"
            )
