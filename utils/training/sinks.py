"""Sinks of the log: experiment trackers and whatever else shows a run while it trains, a class each."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from utils.runtime.trackers import Trackers
from utils.sampling.samples import Sample

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker


class Sink:
    """Takes what a run logs, in the order of its steps; a subclass overrides the methods for what it shows.

    All processes call it. A sink must not raise where its disk, network or service fails, nor wait for them: the
    training goes on without it.
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
        self._trackers.each(partial(_log_histogram, name=name, values=values, step=step))

    def images(self, samples: Sequence[Sample], step: int, tag: str) -> None:
        """Logs the images under `tag`."""
        self._trackers.each(partial(_log_images, samples=samples, step=step, tag=tag))


def _log_images(tracker: "GeneralTracker", samples: Sequence[Sample], step: int, tag: str) -> None:
    if tracker.name == "tensorboard":
        pixels = np.stack([np.asarray(sample.image.convert("RGB")) for sample in samples])
        tracker.writer.add_images(tag, pixels, step, dataformats="NHWC")
    elif tracker.name == "wandb":
        import wandb

        shown = [wandb.Image(sample.image, caption=f"{i}: {sample.caption}") for i, sample in enumerate(samples)]
        tracker.log({tag: shown}, step=step)
    else:
        for index, sample in enumerate(samples):
            tracker.tracker.log_image(sample.image, name=f"{tag}_{index}", step=step)


def _log_histogram(tracker: "GeneralTracker", name: str, values: Tensor, step: int) -> None:
    numbers = values.detach().float().cpu().numpy()
    if not np.isfinite(numbers).all():
        return
    if tracker.name == "tensorboard":
        tracker.writer.add_histogram(name, numbers, step)
    elif tracker.name == "wandb":
        import wandb

        tracker.log({name: wandb.Histogram(numbers)}, step=step)
    else:
        tracker.tracker.log_histogram_3d(numbers, name=name, step=step)
