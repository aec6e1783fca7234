"""A run that is to end before its time: by a signal, a time limit, or a file that asks for it."""

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

logger = logging.getLogger(__name__)
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGBREAK")  # SIGUSR1 is Slurm's notice, SIGBREAK Windows' own
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows lacks some
HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed
AGAIN_SECONDS = 1.0  # launchers send on what a terminal has sent to all: within this time it is the same signal
LOOK_SECONDS = 1.0
SAVE_FILE, STOP_FILE = "SAVE", "STOP"


class Wish(NamedTuple):
    """What all processes agree to do after a step: save, and end, by a signal or as planned (0)."""

    saves: bool
    ends: bool
    number: int = 0


class StopRequests:
    """What asks this process's run to save or to end.

    Attributes:
        number: the signal that was received, 0 for none.
    """

    def __init__(self, folder: Path, seconds: float | None):
        """Args:
        folder: the run's, in which a file SAVE or STOP asks.
        seconds: after which the run ends, counted from now.
        """
        self.number = 0
        self._received_at = 0.0
        self._folder = folder
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._looked_at = 0.0
        self._heard: set[str] = set()
        self._stuck: set[str] = set()  # heard, and can't be removed

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it a signal sets `number`; a second one, at least a second later, ends the process at once.

        SIGHUP is left alone where it is ignored (nohup). It never is such a second one: shells, launchers and the
        kernel each send one of their own when a terminal is closed. A process that accelerate has launched alone takes
        the launcher's death for a SIGTERM: the launcher passes none on.
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
        """Whether a signal was received: what takes long and is no training should break off."""
        return self.number != 0

    def check(self) -> None:
        """Raises `Stopped` if a signal was received; outside of the training, where nothing is to be saved."""
        if self.number:
            raise Stopped(f"stopped by {signal.Signals(self.number).name} before the first step", self.number)

    def remove_files(self) -> None:
        """Removes the files that ask, before a run."""
        self._heard = {SAVE_FILE, STOP_FILE}
        self.remove_heard()

    def remove_heard(self) -> None:
        """Removes those of the files that were heard, before they are answered: what is asked from now on is new."""
        for name in self._heard - self._stuck:
            try:
                _remove(self._folder / name)
            except OSError as error:
                self._stuck.add(name)
                message = "%s can't be removed, so it asks for nothing any more: %s"
                logger.warning(message, self._folder / name, error.strerror or error)
        self._heard = set()

    def asked(self, is_main: bool) -> list[float]:
        """What this process is asked for: each of the signals, a planned end, a checkpoint; 1 or 0."""
        ends = saves = False
        now = time.monotonic()
        if is_main and not self._heard and now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            there = {name for name in (SAVE_FILE, STOP_FILE) if os.path.lexists(self._folder / name)}
            self._stuck &= there  # what is gone and comes again asks again
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
    """What the sums over all processes of what they are asked for mean."""
    if not totals:
        return Wish(False, False)
    *signals, ends, saves = totals
    number = next((int(number) for number, count in zip(SIGNALS, signals, strict=True) if count), 0)
    return Wish(bool(number or ends or saves), bool(number or ends), number)


def resume_command(words: Sequence[str]) -> str:
    """The command line that continues with a run, from the one that it was started by, launcher and all."""
    shown, is_value = [], False
    for word in without_secrets(words):
        if not is_value and word.partition("=")[0] != "--resume_from_checkpoint":
            shown.append(word)
        is_value = word == "--resume_from_checkpoint"
    return shlex.join([*_launcher(), *shown, "--resume_from_checkpoint", "latest"])


def _launcher() -> list[str]:
    """What starts as many processes as there are."""
    count, precision = os.environ.get("WORLD_SIZE", "1"), os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision is not None:
        many = ["--multi_gpu"] if count != "1" else []
        return ["accelerate", "launch", *many, "--num_processes", count, "--mixed_precision", precision]
    return ["python"] if count == "1" else ["torchrun", "--nproc_per_node", count]


def stopped(wish: Wish, step: int, folder: Path) -> Stopped:
    """The end that was wished for, after a checkpoint."""
    why = signal.Signals(wish.number).name if wish.number else "as asked"
    command = resume_command(sys.argv)
    return Stopped(
        f"stopped {why} after step {step}, which is saved in {folder}; continue with: {command}", wish.number
    )
