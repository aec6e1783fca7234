"""Images and histograms in trackers: accelerate's interface has numbers alone for most of them."""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

SUFFICIENT_BINS = 64


class Picture(NamedTuple):
    """An image and its caption."""

    image: Image.Image
    caption: str


ImageWriter = Callable[["GeneralTracker", Sequence[Picture], str, int], None]
HistogramWriter = Callable[["GeneralTracker", np.ndarray, str, int], None]


def log_images(tracker: "GeneralTracker", pictures: Sequence[Picture], tag: str, step: int) -> None:
    """Sends images to a tracker under `tag`; does nothing for trackers that take none."""
    write = IMAGES.get(tracker.name)
    if write is not None:
        write(tracker, pictures, tag, step)
    elif hasattr(tracker, "log_images"):  # as accelerate's trackers take them
        tracker.log_images({tag: [np.asarray(each.image.convert("RGB")) for each in pictures]}, step=step)


def log_histogram(tracker: "GeneralTracker", numbers: np.ndarray, name: str, step: int) -> None:
    """Sends a histogram of numbers to a tracker; does nothing for trackers that have none, or if one is not finite."""
    write = HISTOGRAMS.get(tracker.name)
    if write is not None and np.isfinite(numbers).all():
        write(tracker, numbers, name, step)


def _tensorboard_images(tracker: "GeneralTracker", pictures: Sequence[Picture], tag: str, step: int) -> None:
    """One strip if all images have one size, else a tag for each."""
    pixels = [np.asarray(each.image.convert("RGB")) for each in pictures]
    if len({each.shape for each in pixels}) == 1:
        tracker.log_images({tag: np.stack(pixels)}, step=step, dataformats="NHWC")
    else:
        for index, each in enumerate(pixels):
            tracker.log_images({f"{tag}/{index}": each[None]}, step=step, dataformats="NHWC")


def _media_images(tracker: "GeneralTracker", pictures: Sequence[Picture], tag: str, step: int) -> None:
    """W&B and SwanLab: a list of their own Image, with captions."""
    media = sys.modules[tracker.name].Image
    shown = [media(each.image, caption=f"{index}: {each.caption}") for index, each in enumerate(pictures)]
    tracker.log({tag: shown}, step=step)


def _trackio_images(tracker: "GeneralTracker", pictures: Sequence[Picture], tag: str, step: int) -> None:
    media = sys.modules[tracker.name].Image
    shown = {f"{tag}/{index}": media(each.image, caption=each.caption) for index, each in enumerate(pictures)}
    tracker.log(shown, step=step)


def _aim_images(tracker: "GeneralTracker", pictures: Sequence[Picture], tag: str, step: int) -> None:
    shown = {f"{tag}_{index}": (each.image, each.caption) for index, each in enumerate(pictures)}
    tracker.log_images(shown, step=step)


def _clearml_images(tracker: "GeneralTracker", pictures: Sequence[Picture], tag: str, step: int) -> None:
    shown = {f"{tag}_{index}": np.asarray(each.image.convert("RGB")) for index, each in enumerate(pictures)}
    tracker.log_images(shown, step=step)


def _comet_images(tracker: "GeneralTracker", pictures: Sequence[Picture], tag: str, step: int) -> None:
    for index, each in enumerate(pictures):
        tracker.tracker.log_image(each.image, name=f"{tag}_{index}", step=step)


def _mlflow_images(tracker: "GeneralTracker", pictures: Sequence[Picture], tag: str, step: int) -> None:
    mlflow = sys.modules[tracker.name]
    for index, each in enumerate(pictures):
        mlflow.log_image(each.image, key=f"{tag}_{index}", step=step)


def _dvclive_images(tracker: "GeneralTracker", pictures: Sequence[Picture], tag: str, step: int) -> None:
    for index, each in enumerate(pictures):
        tracker.tracker.log_image(f"{tag}/{index}_step_{step}.png", each.image)


IMAGES: dict[str, ImageWriter] = {
    "tensorboard": _tensorboard_images,
    "wandb": _media_images,
    "swanlab": _media_images,
    "trackio": _trackio_images,
    "aim": _aim_images,
    "clearml": _clearml_images,
    "comet_ml": _comet_images,
    "mlflow": _mlflow_images,
    "dvclive": _dvclive_images,
}


def _tensorboard_histogram(tracker: "GeneralTracker", numbers: np.ndarray, name: str, step: int) -> None:
    tracker.tracker.add_histogram(name, numbers, step)


def _media_histogram(tracker: "GeneralTracker", numbers: np.ndarray, name: str, step: int) -> None:
    """W&B and trackio, which have a Histogram of their own."""
    media = getattr(sys.modules[tracker.name], "Histogram", None)
    if media is not None:
        tracker.log({name: media(numbers.ravel())}, step=step)


def _aim_histogram(tracker: "GeneralTracker", numbers: np.ndarray, name: str, step: int) -> None:
    tracker.tracker.track(sys.modules[tracker.name].Distribution(numbers.ravel()), name=name, step=step)


def _clearml_histogram(tracker: "GeneralTracker", numbers: np.ndarray, name: str, step: int) -> None:
    counts, edges = np.histogram(numbers, bins=SUFFICIENT_BINS)
    labels = [f"{edge:.3g}" for edge in (edges[:-1] + edges[1:]) / 2]
    tracker.tracker.get_logger().report_histogram(name, "values", counts.tolist(), iteration=step, xlabels=labels)


def _comet_histogram(tracker: "GeneralTracker", numbers: np.ndarray, name: str, step: int) -> None:
    tracker.tracker.log_histogram_3d(numbers, name=name, step=step)


HISTOGRAMS: dict[str, HistogramWriter] = {
    "tensorboard": _tensorboard_histogram,
    "wandb": _media_histogram,
    "trackio": _media_histogram,
    "aim": _aim_histogram,
    "clearml": _clearml_histogram,
    "comet_ml": _comet_histogram,
}
"""MLflow, SwanLab and DVCLive have none."""
