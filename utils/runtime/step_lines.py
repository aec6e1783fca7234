"""JSON Lines by step: a resumed run drops lines it will write again, and keeps lines that can't be read.

Each line has the step first, and at its end `time` (Unix seconds) and `samples_seen` (training samples of all processes
since the run's first step). Lines of earlier releases lack these two.
"""

import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from utils.config.user_files import FileError, open_regular, open_to_append, parse_json
from utils.runtime.atomic_files import replacing

logger = logging.getLogger(__name__)
LINE_LIMIT = 16 << 20  # bytes of a line; a longer one was not written here
BEGINNING = b'{"step": '
STEP = re.compile(rb'\{"step": (\d{1,18})\D')


def keep_steps(path: Path, last_step: int) -> None:
    """Drops the lines after `last_step`, which a resumed run writes again; keeps lines that can't be read."""
    if not path.is_file():
        return
    num_unread = 0
    with replacing(path) as aside, open_regular(path) as old, aside.open("wb") as new:
        for line, is_whole, is_end in _lines(old):
            values = read_line(line) if is_whole else None
            if values is None and is_whole and _is_written_again(line, last_step):
                logger.warning("%s: dropped a truncated line", path)
            elif values is None or values["step"] <= last_step:
                num_unread += values is None and bool(line.strip()) and is_end
                new.write(line if line.endswith(b"\n") or not is_end else line + b"\n")
    warn_of_unread(path, num_unread)


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, bool, bool]]:
    """Yields (a line or a part of a too long one, whether it is a whole line, whether a line ends with it)."""
    is_continued = False
    while line := file.readline(LINE_LIMIT):
        is_end = line.endswith(b"\n") or len(line) < LINE_LIMIT
        yield line, is_end and not is_continued, is_end
        is_continued = not is_end


def whole_lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a file, without those that are too long; none if there is no file.

    Raises:
        OSError, FileError: if it can't be read.
    """
    if path.is_file():
        with open_regular(path) as opened:
            yield from (line for line, is_whole, _ in _lines(opened) if is_whole)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the values of the lines of a file that can be read; see `whole_lines`."""
    return (values for line in whole_lines(path) if (values := read_line(line)) is not None)


def read_line(line: bytes) -> dict[str, Any] | None:
    """Returns the values of a line for a step; None if it is not such a line."""
    try:
        values = parse_json(line.decode("utf-8"), "a line")
    except ValueError:
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return values if type(step) in (int, float) and 0 <= step < math.inf else None


def _is_written_again(line: bytes, last_step: int) -> bool:
    """Whether a truncated line is of a step that the run will do again."""
    if line.endswith(b"\n"):
        return False
    if found := STEP.match(line):
        return int(found[1]) > last_step
    return BEGINNING.startswith(line) or (line.startswith(BEGINNING) and line[len(BEGINNING) :].isdigit())


def warn_of_unread(path: Path, count: int) -> None:
    """Warns about lines that can't be read and are kept."""
    if count:
        logger.warning("%s: %d lines are not JSON of a step; they are kept but ignored", path, count)


@dataclass
class SampleCount:
    """Training samples that a run has seen after each step, also if it was resumed with another global batch.

    Attributes:
        per_step: the global batch.
        first_step: the step from which the run resumed.
        before: samples seen up to it.
    """

    per_step: int = 0
    first_step: int = 0
    before: int = 0

    def begin(self, per_step: int, first_step: int = 0, before: int = 0) -> None:
        """Sets the counts, once the data is known."""
        self.per_step, self.first_step, self.before = per_step, first_step, before

    def at(self, step: int) -> int:
        """Returns the samples seen after a step."""
        return self.before + (step - self.first_step) * self.per_step

    def stamp(self, step: int, moment: float | None = None) -> dict[str, float]:
        """Returns `time` and `samples_seen` for a line of a step; the time is now unless given."""
        return {"time": round(time.time() if moment is None else moment, 3), "samples_seen": self.at(step)}


def samples_before(path: Path, step: int, per_step: int) -> int:
    """Returns the samples seen after `step`, from a file of lines by step.

    Args:
        path: the file, which may be missing.
        per_step: the global batch up to `step`, for lines that do not say how many samples were seen.
    """
    last = b""
    for line in whole_lines(path):
        if (found := STEP.match(line)) and int(found[1]) <= step:
            last = line
    values = read_line(last) or {}
    seen = values.get("samples_seen")
    return step * per_step if type(seen) is not int else seen + (step - values["step"]) * per_step


class JsonLines:
    """A file to which JSON lines are appended. Lines that can't be written are dropped, with one warning."""

    def __init__(self, path: Path):
        self._path = path
        self._file: FileIO | None = None
        self._is_cut = False  # a full disk truncated the last line
        self._has_failed = False

    def write(self, values: Mapping[str, object]) -> None:
        """Appends a line, unbuffered."""
        line = (b"\n" if self._is_cut else b"") + json.dumps(values).encode() + b"\n"
        try:
            if self._file is None:
                self._file = open_to_append(self._path)
            written = self._file.write(line)
        except FileError as error:
            self._warn(error.reason)
            return
        except OSError as error:
            self._warn(error.strerror or str(error))
            return
        self._is_cut = written < len(line)
        if self._is_cut:
            self._warn("no space left on the disk")

    def _warn(self, why: str) -> None:
        if not self._has_failed:
            logger.warning("%s can't be written: %s; lines will be missing from it", self._path, why)
        self._has_failed = True

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
