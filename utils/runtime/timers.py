"""Timers of a run: what is due every so many minutes, after the same step on all processes."""

import time
from collections.abc import Callable, Sequence

SECONDS = 60.0  # of a minute


class Timer:
    """Says when so many minutes have passed since the first step, or since the last restart.

    The clock of the main process decides. It sends the number of an interval to all processes once the interval is
    over. All of them restart the timer after the same step, so a number that was sent before a restart, and is read
    after it, counts no more.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float]):
        """Args:
        minutes: length of an interval; None: the timer never ends.
        clock: returns the time in seconds.
        """
        self._seconds = None if minutes is None else SECONDS * minutes
        self._clock = clock
        self._since: float | None = None
        self._number = 1
        self._is_sent = False

    def asked(self, is_main: bool) -> float:
        """Returns the number of the interval, once, when it is over on the main process; otherwise 0.

        The first call, after the first step, starts the timer.
        """
        if self._seconds is None or not is_main:
            return 0.0
        now = self._clock()
        if self._since is None:
            self._since = now
        if self._is_sent or now - self._since < self._seconds:
            return 0.0
        self._is_sent = True
        return float(self._number)

    def is_over(self, number: float) -> bool:
        """Whether a number, as all processes have received it, is that of the current interval."""
        return number == self._number

    def restart(self) -> None:
        """Starts the next interval; all processes must call it after the same step."""
        self._number += 1
        self._is_sent = False
        self._since = self._clock()


class Timers:
    """The timers of a run.

    Attributes:
        checkpoints: when a checkpoint is due.
        samples: when samples, and the validation loss, are due.
    """

    COUNT = 2

    def __init__(
        self,
        checkpoint_minutes: float | None = None,
        sample_minutes: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.checkpoints, self.samples = Timer(checkpoint_minutes, clock), Timer(sample_minutes, clock)

    def asked(self, is_main: bool) -> list[float]:
        """Returns what this process sends to the others: `COUNT` numbers of intervals that are over, or 0."""
        return [self.checkpoints.asked(is_main), self.samples.asked(is_main)]

    def is_checkpoint_due(self, heard: Sequence[float]) -> bool:
        """Whether a checkpoint is due by the sums of what all processes sent; these are empty if none were read."""
        return bool(heard) and self.checkpoints.is_over(heard[0])

    def are_samples_due(self, heard: Sequence[float]) -> bool:
        """Whether samples are due, likewise."""
        return bool(heard) and self.samples.is_over(heard[1])
