"""Options that all tools share: the dtype of the result, its check, and where it is written."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from utils.config.options import UserError, option, parse
from utils.config.output_folder import check_writable
from utils.config.terminal import one_line, print_line, set_up_logging
from utils.config.user_files import what_is_at
from utils.models.options import PICKLES
from utils.runtime.hub_files import require_model

DTYPES = ("fp32", "fp16", "bf16")
FILE = ".safetensors"
LORA_FORMATS = ("diffusers", "kohya", "both")
RUN_FILES = ("run.json", "checkpoint-*")  # of a training run, which --overwrite never touches


@dataclass(frozen=True)
class OutputOptions:
    """How the result is written."""

    dtype: str | None = option(None, "dtype of the weights; by default that of the input", choices=DTYPES)
    overwrite: bool = option(False, "replace what is there under the name of the output")
    check: bool = option(True, "read the result back and compare it with what should be there, bit for bit")


class ToolOptions(Protocol):
    """All options of a tool, by group."""

    @property
    def output(self) -> OutputOptions:
        """How the result is written."""


Read = TypeVar("Read", bound=ToolOptions)


class Job(NamedTuple):
    """What a tool is asked to do.

    Attributes:
        what: it in words, without the output.
        read: files and folders that are read; None for those that are not given.
        out: the output.
        is_file: whether the output must be a file or, if False, a folder; None if either will do.
    """

    what: str
    read: Sequence[str | None]
    out: str
    is_file: bool | None = None


def read_checked(kind: type[Read], argv: Sequence[str] | None, purpose: str, job_of: Callable[[Read], Job]) -> Read:
    """Returns the given options, checks where the result goes, and prints what is done, before torch is loaded.

    Args:
        kind: class of the tool's options.
        argv: the arguments; None: those of the command line.
        purpose: what `--help` says of the tool.
        job_of: returns what the options ask for.

    Raises:
        UserError: for an unknown flag, an invalid value, or an output that exists.
    """
    set_up_logging()
    options: Read = parse(kind, argv, purpose)
    job = job_of(options)
    require_place(job, options.output.overwrite)
    print_line(f"{job.what} to {job.out}; loading torch first, which takes a few seconds")
    return options


def require_place(job: Job, overwrite: bool) -> None:
    """Refuses an output that exists, is an input or inside one, or has the wrong ending; creates nothing.

    Args:
        job: what is read, and the output, which messages call --out.
        overwrite: whether the output may exist.

    Raises:
        UserError: with the reason.
    """
    # Its ending.
    path, shown = Path(job.out), f"--out {one_line(job.out)}"
    if job.is_file is True and path.suffix != FILE:
        raise UserError(f"{shown} must end in {FILE}; give {one_line(job.out.rstrip('/'))}{FILE}")
    if job.is_file is False and path.suffix == FILE:
        raise UserError(f"{shown} is named as a file, but a folder is written; leave {FILE} out")

    # What is read must stay.
    own = Path(os.path.realpath(job.out))
    for name in job.read:
        read = None if name is None or not os.path.exists(name) else Path(os.path.realpath(name))
        if read is not None and (own == read or (own in read.parents and own.is_dir())):
            raise UserError(f"{shown} would replace what is read, {one_line(name)}; choose another place")
        if read is not None and read in own.parents:
            raise UserError(f"{shown} lies inside of what is read, {one_line(name)}; choose another place")

    # What is there already.
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        if not overwrite:
            raise UserError(f"{shown} exists; choose another place, or give --overwrite")
        if path.is_dir() == (path.suffix == FILE):
            raise UserError(f"{shown} can't be replaced: {what_is_at(path)}; choose another place")
        if any(any(path.glob(name)) for name in RUN_FILES if path.is_dir()):
            raise UserError(f"{shown} is the folder of a training run, which --overwrite keeps; choose another place")
    check_writable("out", _existing(own.parent), is_folder=True)


def require_input(flag: str, value: str | None) -> None:
    """Refuses an input that is missing, needs unpickling, or is neither a folder nor a safetensors file.

    Raises:
        UserError: with the reason.
    """
    cure = f"give a folder or a {FILE} file"
    if value is None:
        raise UserError(f"--{flag} is missing; {cure}")
    if Path(value).suffix in PICKLES:
        raise UserError(f"--{flag} {value} needs unpickling, which can run code; {cure}")
    if not os.path.lexists(value):
        raise UserError(f"--{flag} {value} does not exist; {cure}")
    require_model(flag, value, cure, (FILE,))


def _existing(folder: Path) -> Path:
    """Returns the nearest folder above that exists."""
    return next(each for each in (folder, *folder.parents) if each.is_dir())
