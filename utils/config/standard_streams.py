"""Standard output and error that never end a run, even if their reader exits before the run does."""

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET, errno.ENOTCONN}
SHORTEST_SECRET = 8  # characters; replacing shorter ones would garble other words
_SECRETS: set[str] = set()


def hide(secret: str) -> None:
    """Replaces a secret by *** wherever it would be written to standard output or error."""
    if len(secret) >= SHORTEST_SECRET:
        _SECRETS.add(secret)


class Stream:
    """A text stream that drops what can't be written, and resumes writing when it can.

    A reader that has exited (`| tee log`), a closed terminal and a full disk raise an OSError for each line, a closed
    stream a ValueError, and a character missing from the encoding a UnicodeEncodeError. None of them should end the
    training. If the reader is gone for good, the file descriptor is redirected to the null device, so that other code
    that writes to it, and Python's own flush at exit, succeed.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def write(self, text: str) -> int:
        """Writes text, or drops it if that fails."""
        for secret in _SECRETS:
            text = text.replace(secret, "***")
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self._give_up(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes several texts, or drops them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes the stream if it can be written."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def _give_up(self, error: OSError | ValueError) -> None:
        if isinstance(error, OSError) and error.errno in GONE:
            drop(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def drop(stream: TextIO) -> None:
    """Redirects the file descriptor of stdout or stderr to the null device; other streams are left alone."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # io.UnsupportedOperation is both
        return
    if descriptor in (1, 2):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        if null != descriptor:
            os.close(null)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Context manager: writing to standard output or error never raises."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def flush_streams() -> None:
    """Flushes standard output and error, dropping what fails, so that Python does not exit with status 120."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            drop(stream)
