"""The first second of a script: what it reads, refuses and says before it loads torch, which takes several."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from utils.config.options import leave, run_script
from utils.config.output_folder import refuse_used
from utils.config.terminal import one_line, print_line

Read = TypeVar("Read")
_read: dict[tuple[str, ...], object] = {}


def read_first(read: Callable[[Sequence[str] | None], object], names: Mapping[str, str] = MappingProxyType({})) -> None:
    """Reads the options of the command line; ends the process for `--help` and for errors of flags.

    Args:
        read: reads options.
        names: as of `run_script`.
    """

    def keep(argv: Sequence[str] | None) -> None:
        _read[tuple(sys.argv[1:])] = read(argv)

    status = run_script(keep, None, names)
    if status:
        leave(status)


def options_of(read: Callable[[Sequence[str] | None], Read], argv: Sequence[str] | None) -> Read:
    """The options in `argv`, or in the command line if None, which are not read again if they were read first."""
    words = tuple(sys.argv[1:] if argv is None else argv)
    return _read.pop(words, None) or read(argv)


def announce(sources: Mapping[str, str | None], output_dir: str | None, takes_used_folder: bool) -> None:
    """Refuses a used output folder, and says what is loaded and read; on the main process alone.

    Args:
        sources: what is read, such as the model and the data: a path or a name on the Hub, None for what is not given.
        output_dir: where the result goes; None where the model decides.
        takes_used_folder: whether the folder may hold an earlier run.

    Raises:
        UserError: if the folder holds one and may not.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if output_dir is not None and not takes_used_folder:
        refuse_used(Path(output_dir))
    if "torch" in sys.modules:
        return
    parts = [f"{what} {_shown(value)}" for what, value in sources.items() if value is not None]
    if output_dir is not None:
        parts.append(f"output {one_line(output_dir, 200)}")
    said = "; " + ", ".join(parts) if parts else ""
    print_line(f"loading torch and diffusers, which takes some seconds{said}", sys.stderr)


def _shown(source: str) -> str:
    return one_line(source, 200) + ("" if os.path.exists(source) else " (from the Hub, or its cache)")
