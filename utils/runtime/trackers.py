"""The trackers of a run, such as TensorBoard."""

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
    """The trackers of a run. One that fails is given up with a warning: the training is worth more than its curve."""

    def __init__(self, accelerator: "Accelerator"):
        self._accelerator = accelerator

    def log(self, values: dict[str, float], step: int) -> None:
        """Sends numbers."""
        self.each(lambda tracker: tracker.log(values, step=step))

    def finish(self) -> None:
        """Closes them all."""
        self.each(lambda tracker: tracker.finish())

    def each(self, use: Callable[["GeneralTracker"], None]) -> None:
        """Uses each tracker, and gives up those that raise."""
        for tracker in list(self._accelerator.trackers):
            try:
                use(tracker)
            except tracker_errors() as error:
                self._accelerator.trackers.remove(tracker)
                logger.warning(
                    "%s can't be written: %s; the training continues without it, metrics.jsonl has the numbers",
                    tracker.name,
                    first_line(error),
                )


def tracker_errors() -> tuple[type[Exception], ...]:
    """What a tracker raises where its disk, its network or its service fails."""
    own = [
        getattr(sys.modules.get(module), name, OSError)
        for module, name in (("wandb.errors", "Error"), ("comet_ml.exceptions", "CometException"))
    ]
    return OSError, RuntimeError, ValueError, EOFError, *own
