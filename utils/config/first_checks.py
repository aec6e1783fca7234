"""The first second of a script: reads and checks the options before torch, which takes several seconds to load."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TypeVar

from utils.config.options import leave, run_script
from utils.config.output_folder import refuse_used
from utils.config.terminal import one_line, print_line

Read = TypeVar("Read")
INTERRUPTED = 130  # status of a process that Ctrl-C ended
_read: dict[tuple[str, ...], object] = {}


def read_first(read: Callable[[Sequence[str] | None], object], names: Mapping[str, str] = MappingProxyType({})) -> None:
    """Reads the command line's options; exits for `--help` and for invalid flags.

    Args:
        read: parses arguments into options.
        names: flag names of this script, as in `run_script`.
    """

    end_silently_on_interrupts()

    def keep(argv: Sequence[str] | None) -> None:
        _read[tuple(sys.argv[1:])] = read(argv)

    status = run_script(keep, None, names)
    if status:
        leave(status)


def end_silently_on_interrupts() -> None:
    """Ends this process without a traceback on Ctrl-C where nothing else handles it, as while torch is loaded."""
    show = sys.excepthook

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            leave(INTERRUPTED)
        show(kind, error, trace)

    sys.excepthook = end


def run_read(
    body: Callable[[Read], None],
    read: Callable[[Sequence[str] | None], Read],
    argv: Sequence[str] | None,
    names: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Runs a script's body with its options, reusing those that `read_first` parsed; returns its exit status.

    Args:
        body: what the script does.
        read: parses arguments into options.
        argv: the arguments; None: those of the command line.
        names: flag names of this script, as in `run_script`.
    """

    def run(argv: Sequence[str] | None) -> None:
        words = tuple(sys.argv[1:] if argv is None else argv)
        body(_read.pop(words, None) or read(argv))

    with command_line(body, argv):
        return run_script(run, argv, names)


@contextmanager
def command_line(body: Callable, argv: Sequence[str] | None) -> Iterator[None]:
    """Context manager: `sys.argv` is the script of a function with these arguments, as if it was run with them.

    A notebook calls the function; what a run records and says of its command must not be that of the notebook.
    """
    before = sys.argv
    if argv is not None:
        script = getattr(sys.modules.get(body.__module__), "__file__", None) or before[0]
        sys.argv = [script, *map(str, argv)]
    try:
        yield
    finally:
        sys.argv = before


def announce(sources: Mapping[str, str | None], output_dir: str | None, takes_used_folder: bool) -> None:
    """Refuses a used output folder, and prints what is being loaded; on the main process only.

    Args:
        sources: inputs by what they are, such as the model and the data: a path or Hub name; None if not given.
        output_dir: the output folder; None if the model decides it.
        takes_used_folder: whether the folder may contain an earlier run.

    Raises:
        UserError: if the folder contains one and may not.
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
    print_line(f"loading torch and diffusers, which takes a few seconds{said}", sys.stderr)


def _shown(source: str) -> str:
    return one_line(source, 200) + ("" if os.path.exists(source) else " (from the Hub or its cache)")
