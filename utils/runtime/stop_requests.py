"""Requests to save or end a run early: signals, a time limit, or a file in the output folder."""

import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from utils.config.options import Stopped, without_secrets
from utils.runtime.timers import Timers

logger = logging.getLogger(__name__)
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGBREAK")  # SIGUSR1: Slurm's notice; SIGBREAK: Windows only
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows lacks some
HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed
AGAIN_SECONDS = 1.0  # launchers forward a signal that the terminal sent to all: a repeat within this time is the same
LOOK_SECONDS = 1.0
SAVE_FILE, STOP_FILE = "SAVE", "STOP"


class Wish(NamedTuple):
    """What all processes agree to do after a step: save, and end because of signal `number` or as planned (0)."""

    saves: bool
    ends: bool
    number: int = 0


class StopRequests:
    """Requests for this process to save or to end its run.

    Attributes:
        number: the received signal; 0 if none.
        timers: what is due every so many minutes.
    """

    def __init__(self, folder: Path, seconds: float | None, timers: Timers | None = None):
        """Args:
        folder: folder of the run, where a file named SAVE or STOP is a request.
        seconds: time from now after which the run ends; None for no limit.
        timers: what is due every so many minutes; by default nothing.
        """
        self.number = 0
        self.timers = timers or Timers()
        self._received_at = 0.0
        self._folder = folder
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._looked_at = 0.0
        self._heard: set[str] = set()
        self._stuck: set[str] = set()  # heard, but can't be removed

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Context manager: a signal sets `number`; a second one, at least a second later, ends the process at once.

        SIGHUP is not handled if it is ignored (nohup), and never counts as the second signal: shells, launchers and the
        kernel each send one when a terminal is closed. If accelerate launched a single process, the launcher's death
        counts as SIGTERM, because it forwards none.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [number for number in SIGNALS if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._receive) for number in heard}
        ended = threading.Event()
        if "ACCELERATE_MIXED_PRECISION" in os.environ:
            threading.Thread(target=self._watch_parent, args=(os.getppid(), ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, _: object) -> None:
        now = time.monotonic()
        if self.number:
            if number != HANGUP and now - self._received_at >= AGAIN_SECONDS:
                os._exit(128 + number)
            return
        self.number, self._received_at = number, now

    def _watch_parent(self, parent: int, ended: threading.Event) -> None:
        while not ended.wait(LOOK_SECONDS):
            if os.getppid() != parent:
                self.number = self.number or signal.SIGTERM
                return

    @property
    def is_asked(self) -> bool:
        """Whether a signal was received, so that long work other than training should be aborted."""
        return self.number != 0

    def check(self) -> None:
        """Raises `Stopped` if a signal was received; for use before training, when there is nothing to save."""
        if self.number:
            raise Stopped(f"stopped by {signal.Signals(self.number).name} before the first step", self.number)

    def remove_files(self) -> None:
        """Removes request files left from before the run."""
        self._heard = {SAVE_FILE, STOP_FILE}
        self.remove_heard()

    def remove_heard(self) -> None:
        """Removes the request files that were read, before acting on them, so that a new file is a new request."""
        for name in self._heard - self._stuck:
            try:
                _remove(self._folder / name)
            except OSError as error:
                self._stuck.add(name)
                message = "%s can't be removed, so it is ignored from now on: %s"
                logger.warning(message, self._folder / name, error.strerror or error)
        self._heard = set()

    def asked(self, is_main: bool) -> list[float]:
        """Returns this process's requests as 0 or 1: one per signal, then a planned end, then a checkpoint."""
        ends = saves = False
        now = time.monotonic()
        if is_main and not self._heard and now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            there = {name for name in (SAVE_FILE, STOP_FILE) if os.path.lexists(self._folder / name)}
            self._stuck &= there  # a file that is gone and returns is a new request
            self._heard = there - self._stuck
            ends, saves = STOP_FILE in self._heard, SAVE_FILE in self._heard
        if is_main and self._deadline is not None:
            ends |= now >= self._deadline
        return [float(number == self.number) for number in SIGNALS] + [float(ends), float(saves)]


def _remove(path: Path) -> None:
    """Removes a file, a link or an empty folder."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def agreed(totals: Sequence[float]) -> Wish:
    """Returns the decision that follows from all processes' requests, summed."""
    if not totals:
        return Wish(False, False)
    *signals, ends, saves = totals
    number = next((int(number) for number, count in zip(SIGNALS, signals, strict=True) if count), 0)
    return Wish(bool(number or ends or saves), bool(number or ends), number)


def resume_command(words: Sequence[str]) -> str:
    """Returns the command line that resumes a run, including its launcher, from the one that started it."""
    shown = without_resuming(without_secrets(words))
    return shlex.join([*_launcher(), *shown, "--resume_from_checkpoint", "latest"])


def repeat_command(words: Sequence[str]) -> str:
    """Returns the command line that repeats a run from its start, including its launcher, without secrets."""
    return shlex.join([*_launcher(), *without_resuming(without_secrets(words))])


def without_resuming(words: Sequence[str]) -> list[str]:
    """Returns a command line without `--resume_from_checkpoint` and its value."""
    shown, is_value = [], False
    for word in words:
        is_flag = word.partition("=")[0].replace("-", "_") == "__resume_from_checkpoint"
        if not is_value and not is_flag:
            shown.append(word)
        is_value = is_flag and "=" not in word
    return shown


def _launcher() -> list[str]:
    """Returns the launcher command for the current number of processes."""
    count, precision = os.environ.get("WORLD_SIZE", "1"), os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision is not None:
        many = ["--multi_gpu"] if count != "1" else []
        return ["accelerate", "launch", *many, "--num_processes", count, "--mixed_precision", precision]
    return ["python"] if count == "1" else ["torchrun", "--nproc_per_node", count]


def stopped(wish: Wish, step: int, folder: Path) -> Stopped:
    """Returns the exception that ends a run after its checkpoint."""
    why = signal.Signals(wish.number).name if wish.number else "as requested"
    command = resume_command(sys.argv)
    return Stopped(
        f"stopped {why} after step {step}, which is saved in {folder}; continue with: {command}", wish.number
    )
