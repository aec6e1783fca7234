"""Experiment trackers of a run, such as TensorBoard."""

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from utils.config.options import first_line

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger(__name__)


class Trackers:
    """The trackers of a run. One that fails is dropped with a warning, so that it can't end the training."""

    def __init__(self, accelerator: "Accelerator"):
        self._accelerator = accelerator

    def log(self, values: dict[str, float], step: int) -> None:
        """Logs numbers to all trackers."""
        self.each(lambda tracker: tracker.log(values, step=step))

    def finish(self) -> None:
        """Closes all trackers."""
        self.each(lambda tracker: tracker.finish())

    def each(self, use: Callable[["GeneralTracker"], None]) -> None:
        """Calls `use` with each tracker, and drops those that raise."""
        for tracker in list(self._accelerator.trackers):
            try:
                use(tracker)
            except tracker_errors() as error:
                self._accelerator.trackers.remove(tracker)
                logger.warning(
                    "%s can't be written: %s; the training continues without it (metrics.jsonl has the numbers)",
                    tracker.name,
                    first_line(error),
                )


def tracker_errors() -> tuple[type[Exception], ...]:
    """Returns what trackers raise if their disk, network or service fails."""
    own = [
        getattr(sys.modules.get(module), name, OSError)
        for module, name in (("wandb.errors", "Error"), ("comet_ml.exceptions", "CometException"))
    ]
    return OSError, RuntimeError, ValueError, EOFError, *own
