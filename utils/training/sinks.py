"""Sinks of the log: experiment trackers and whatever else shows a run while it trains, a class each."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from utils.runtime.tracker_media import Picture, log_histogram, log_images
from utils.runtime.trackers import Trackers
from utils.sampling.samples import Sample

if TYPE_CHECKING:
    from accelerate import Accelerator


class Sink:
    """Takes what a run logs, in the order of its steps; a subclass overrides the methods for what it shows.

    All processes call it. A sink must neither raise an error of its disk, network or service nor wait for them: the
    training continues without it.
    """

    def step(self, values: Mapping[str, float], step: int) -> None:
        """Takes the metrics of an optimizer step, as in `metrics.jsonl`."""

    def values(self, values: Mapping[str, float], step: int) -> None:
        """Takes measurements made between steps, such as the validation loss and scores."""

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Takes the values of a weight or gradient."""

    def images(self, samples: Sequence[Sample], step: int, tag: str) -> None:
        """Takes samples."""

    def close(self) -> None:
        """Ends it; the last steps were passed on before."""


class TrackerSink(Sink):
    """Passes everything to the experiment trackers of `--report_to`."""

    def __init__(self, accelerator: "Accelerator"):
        self._trackers = Trackers(accelerator)

    def step(self, values: Mapping[str, float], step: int) -> None:
        """Logs numbers."""
        self._trackers.log(dict(values), step)

    def values(self, values: Mapping[str, float], step: int) -> None:
        """Logs numbers."""
        self._trackers.log(dict(values), step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Logs the distribution of the values, if all are finite."""
        numbers = values.detach().float().cpu().numpy()
        self._trackers.each(partial(log_histogram, numbers=numbers, name=name, step=step))

    def images(self, samples: Sequence[Sample], step: int, tag: str) -> None:
        """Logs the images under `tag`."""
        pictures = [Picture(sample.image, sample.caption) for sample in samples]
        self._trackers.each(partial(log_images, pictures=pictures, tag=tag, step=step))
