"""Experiment trackers of a run, such as TensorBoard."""

import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from utils.config.options import ProcessError, first_line
from utils.config.terminal import one_line
from utils.runtime.tracker_folders import start_arguments

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger(__name__)
LONGEST_REASON = 300  # characters
LOG_ARGUMENTS = {"mlflow": {"synchronous": False}}
"""By tracker: what keeps its log from making the training wait for a disk or a network."""


class Trackers:
    """The trackers of a run. One that fails is dropped with a warning, so that it can't end the training."""

    def __init__(self, accelerator: "Accelerator"):
        self._accelerator = accelerator

    def log(self, values: dict[str, float], step: int) -> None:
        """Logs numbers to all trackers."""
        self.each(lambda tracker: tracker.log(values, step=step, **LOG_ARGUMENTS.get(tracker.name, {})))

    def finish(self) -> None:
        """Closes all trackers."""
        self.each(_finish)

    def each(self, use: Callable[["GeneralTracker"], None]) -> None:
        """Calls `use` with each tracker, and drops those that raise."""
        for tracker in list(self._accelerator.trackers):
            try:
                use(tracker)
            except Exception as error:  # noqa: BLE001  foreign code: of nine trackers, each with errors of its own
                self._accelerator.trackers.remove(tracker)
                logger.warning(
                    "%s can't be written: %s; the training continues without it (metrics.jsonl has the numbers)",
                    tracker.name,
                    first_line(error),
                )


def _finish(tracker: "GeneralTracker") -> None:
    if tracker.name == "mlflow":
        sys.modules["mlflow"].flush_async_logging()
    tracker.finish()


def _report_from_this_process() -> None:
    """Keeps ClearML from forking a process to report from, for which each step would wait 0.1 s.

    A fork of a process with threads, such as those of another tracker, can also hang.
    """
    from clearml.config import ConfigWrapper

    ConfigWrapper.set_overrides({"sdk": {"development": {"report_use_subprocess": False}}})


def start_trackers(accelerator: "Accelerator", folder: Path, project: str, record: dict) -> None:
    """Opens the trackers, with the run's options as their config. The random states stay as they are.

    Args:
        folder: the output folder, in which they keep their files.
        project: name of the project in the trackers.
        record: the options by name, without secrets.

    Raises:
        ProcessError: if a tracker can't be opened.
    """
    plain = {
        name: value if isinstance(value, int | float | bool) else _as_unicode(str(value))
        for name, value in record.items()
    }
    try:
        with same_random_states():
            if "clearml" in map(str, accelerator.log_with):
                _report_from_this_process()
            accelerator.init_trackers(project, config=plain, init_kwargs=start_arguments(folder))
    except Exception as error:  # as above
        accelerator.trackers.clear()  # a tracker that did not start can't be closed
        names = ",".join(str(name) for name in accelerator.log_with)
        reason = one_line(" ".join(str(error).split()) or type(error).__name__, LONGEST_REASON)
        raise ProcessError(
            f"--report_to {names} can't be started: {reason}; --report_to none uses no tracker"
        ) from error


@contextmanager
def same_random_states() -> Iterator[None]:
    """Context manager: restores the global random states afterwards, which some trackers change, as ClearML does."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _as_unicode(text: str) -> str:
    """Returns the text with non-Unicode bytes (from file names) escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
