"""The first second of a script: what it says and refuses before it imports torch, which takes several."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.config.help import without_torch
from utils.config.options import UserError, parse_truth, refuse_missing_docstrings
from utils.config.output_folder import refuse_used
from utils.config.terminal import one_line, print_line

SOURCES = {  # what a run reads, and the flags that say so
    "model": ("pretrained_model_name_or_path", "pretrained_model", "pipeline"),
    "data": ("train_data_dir", "dataset_name", "dataset_file"),
    "reference": ("reference",),
}


def start(words: Sequence[str], adds_to_output: bool = False) -> None:
    """Refuses a used output folder and says what is being loaded; --help then does without torch.

    The process exits with 2 if the folder is refused. Everything else about the options is judged once they are parsed.

    Args:
        adds_to_output: whether a used folder is taken as it is.
    """
    without_torch(words)
    if {"-h", "--help"} & set(words) or os.environ.get("RANK", "0") != "0":
        return
    given = _look_ahead(words)
    try:
        refuse_missing_docstrings()
        is_new = not (adds_to_output or given.resume_from_checkpoint or given.overwrite_output_dir or given.dry_run)
        if given.output_dir and is_new:
            refuse_used(Path(os.path.expanduser(given.output_dir)))
        elif given.dry_run and given.output_dir and not (given.resume_from_checkpoint or given.overwrite_output_dir):
            _refuse_read_folder(given)
    except UserError as error:
        print_line(f"error: {error}", sys.stderr)
        sys.exit(2)
    print_line(f"loading torch and diffusers, which takes some seconds; {_read(given)}", sys.stderr)


def _refuse_read_folder(given: argparse.Namespace) -> None:
    """Refuses a dry run into the folder of its model, as the run itself is: it would be overwritten.

    Raises:
        UserError: naming both flags.
    """
    place = os.path.realpath(os.path.expanduser(given.output_dir))
    for flag in SOURCES["model"]:
        value = getattr(given, flag)
        if value and os.path.isdir(os.path.expanduser(value)) and os.path.realpath(os.path.expanduser(value)) == place:
            raise UserError(
                f"--output_dir {one_line(given.output_dir)} is the folder of --{flag}: the model would be overwritten; "
                "choose another folder"
            )


def _look_ahead(words: Sequence[str]) -> argparse.Namespace:
    """The few flags that matter here, as far as they can be read; all None where a value is missing."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("output_dir", "resume_from_checkpoint", *sum(SOURCES.values(), ())):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    for name in ("overwrite_output_dir", "dry_run"):
        parser.add_argument(
            f"--{name}", f"--{name.replace('_', '-')}", dest=name, nargs="?", const=True, type=parse_truth
        )
    try:
        return parser.parse_known_args(list(words))[0]
    except argparse.ArgumentError:
        return parser.parse_known_args([])[0]


def _read(given: argparse.Namespace) -> str:
    """What will be read and from where, and where the result goes."""
    parts = []
    for what, flags in SOURCES.items():
        value = next((getattr(given, flag) for flag in flags if getattr(given, flag)), None)
        if value is not None:
            where = "" if os.path.exists(os.path.expanduser(value)) else " (from the Hub, or its cache)"
            parts.append(f"{what} {one_line(value, 200)}{where}")
    if given.output_dir:
        parts.append(f"output {one_line(given.output_dir, 200)}")
    return ", ".join(parts) or "then the options are read"
