"""What an output folder holds, told without importing anything heavy: a used one is refused before all else."""

import errno
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.config.options import UserError
from utils.config.terminal import one_line

RESULTS = ("model_index.json", "pytorch_lora_weights.safetensors", "run.json")


def held_by(folder: Path) -> str:
    """The name of what an earlier run left in a folder, or an empty string."""
    found = [name for name in RESULTS if (folder / name).exists()]
    found += sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir())
    return found[0] if found else ""


def refuse_used(folder: Path) -> None:
    """Raises `UserError` if a folder holds a run that is neither resumed nor overwritten."""
    held = held_by(folder)
    if held:
        raise UserError(
            f"--output_dir {one_line(folder)} holds another run ({one_line(held)}); choose another folder, resume with "
            "--resume_from_checkpoint latest, or give --overwrite_output_dir"
        )


def check_writable(flag: str, path: Path, is_folder: bool) -> None:
    """Refuses a place that can't be written, by writing a file there that is gone at once."""
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
    """Refuses a folder to write to that is one of those that data are read from, all of them by their flags."""
    places = {os.path.realpath(folder): flag for flag, folders in read.items() for folder in folders if folder}
    for flag, folder in written.items():
        known = None if folder is None else places.get(os.path.realpath(folder))
        if known is not None:
            raise UserError(
                f"--{flag} {folder} is the folder of --{known}: what is written there would be read as data; choose "
                f"another, such as {Path(folder) / 'output'}"
            )
