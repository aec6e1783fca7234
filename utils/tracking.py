"""What a run says of itself while it trains: progress bar, metrics.jsonl, TensorBoard and W&B."""

import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.options import UserError, option, require_positive
from utils.step_lines import keep_steps
from utils.terminal import progress_bar

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger(__name__)
ENOUGH_LOSSES = 20  # of an epoch, to say what is out of the ordinary in the next
TRACKERS = ("tensorboard", "wandb", "comet_ml")


@dataclass(frozen=True)
class TrackingOptions:
    report_to: str = option("tensorboard", "where metrics and samples go", choices=(*TRACKERS, "all", "none"))
    logging_dir: str = option("logs", "folder of the trackers' files in output_dir")
    tracker_project_name: str = option("text2image-fine-tune", "name of the project in the trackers", is_text=True)
    logging_steps: int = option(
        1,
        "optimizer steps whose numbers are read from the device at once, a step after the last; so often processes "
        "also agree to stop",
    )
    debug_loss: bool = option(False, "log each image's loss under its file's name")
    max_skipped_steps: int = option(10, "steps in a row without a finite loss and gradient after which the run ends")
    layer_norm_steps: int | None = option(
        None,
        "optimizer steps between gradient norms of each layer in layers.jsonl and the trackers; outliers are named",
    )
    histogram_steps: int | None = option(
        None, "optimizer steps between histograms of each layer's weights and gradients in the trackers"
    )

    def __post_init__(self) -> None:
        require_positive(self, "logging_steps", "max_skipped_steps", "layer_norm_steps", "histogram_steps")

    @property
    def trackers(self) -> list[str]:
        """The trackers asked for; with all those that are installed.

        Raises:
            UserError: if one that is named is not installed.
        """
        if self.report_to == "none":
            return []
        if self.report_to == "all":
            return [name for name in TRACKERS if find_spec(name)]
        if not find_spec(self.report_to):
            raise UserError(f"--report_to {self.report_to} is not installed; pip install {self.report_to}")
        return [self.report_to]


class Sample(NamedTuple):
    """A drawn image and its caption."""

    image: Image.Image
    caption: str


class StepMetrics(NamedTuple):
    """What an optimizer step measured. Tensors stay on the device until they are read.

    Attributes:
        step: optimizer steps done.
        epoch: passes over the data so far.
        loss: mean weighted loss over the global batch.
        grad_norm: norm of the gradients before clipping.
        learning_rate: the UNet's.
        keys: names of this process's images, to be named if the step goes wrong.
        loss_by_key: with --debug_loss (name, loss) of this process's images.
        waited: seconds that the training thread waited for data.
        sums: [n] numbers of all processes together, which the loop wants to know when they are read.
    """

    step: int
    epoch: float
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float
    keys: Sequence[str] = ()
    loss_by_key: Sequence[tuple[str, Tensor]] = ()
    waited: float = 0.0
    sums: Tensor | None = None


class RunLog:
    """Writes metrics on the main process; steps' numbers are read together, when the next step has been queued.

    `metrics.jsonl` has a line a step: step, epoch, train_loss, grad_norm, learning_rate, images_per_second (the mean of
    the steps that are read together), the share of the time spent waiting for data (data_wait), and on a GPU the most
    memory used so far. What is not finite stands there as null. `epochs.jsonl` has a line an epoch: the least, largest
    and mean loss of its steps.

    Attributes:
        sums: those of the steps that were read since the step before, added up; none if none were.
        skipped_in_a_row: steps without a finite loss and gradient, which were not taken, up to the last that was read.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        folder: Path,
        first_step: int,
        total_steps: int,
        images_per_step: int,
        steps_together: int = 1,
    ):
        self._accelerator = accelerator
        self._images_per_step = images_per_step
        self.skipped_in_a_row = 0
        self.sums: list[float] = []
        self._unread: list[float] = []
        self._epochs = EpochLosses()
        self._layers = LayerNorms()
        self._folder = folder
        self._steps_together = steps_together
        self._pending: list[StepMetrics] = []
        self._counted_from = self._last_step_at = time.perf_counter()
        self._file = None
        self._bar = progress_bar(
            total=total_steps,
            initial=first_step,
            unit="step",
            desc="training",
            disable=not accelerator.is_local_main_process,
        )
        if accelerator.is_main_process:
            path = folder / "metrics.jsonl"
            for each in (path, folder / "epochs.jsonl", folder / "layers.jsonl"):
                keep_steps(each, first_step)
            try:
                self._file = path.open("a", encoding="utf-8")
            except OSError as error:
                raise UserError(f"{path} can't be written: {error.strerror or error}") from error

    def step(self, metrics: StepMetrics) -> None:
        """Takes a step's metrics, and writes those of the steps before, if they are enough to be read together."""
        if len(self._pending) >= self._steps_together:
            self._write_pending()
        self.sums, self._unread = self._unread, []
        self._pending.append(metrics)
        self._last_step_at = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training, and does not count in its speed; all steps before it are written first."""
        self._write_pending()
        try:
            yield
        finally:
            self._counted_from = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        """Writes what is left, and ends the bar's line, so that an error's message starts one."""
        self._write_pending()
        self._bar.close()
        if self._file is not None:
            self._file.close()

    def _write_pending(self) -> None:
        if not self._pending:
            return
        steps, self._pending = self._pending, []
        rows = torch.stack(
            [_numbers(metrics) for metrics in steps]
        ).tolist()  # the one time that the device is waited for
        seconds = (self._last_step_at - self._counted_from) / len(steps)
        self._counted_from = self._last_step_at
        before = [self._unread] if self._unread else []
        self._unread = [sum(column) for column in zip(*(row[2:] for row in rows), *before, strict=True)]
        for metrics, (loss, grad_norm, *_) in zip(steps, rows, strict=True):
            self._write(metrics, loss, grad_norm, seconds)
        self._bar.update(len(steps))

    def _write(self, metrics: StepMetrics, loss: float, grad_norm: float, seconds: float) -> None:
        speed = self._images_per_step / seconds
        self._bar.set_postfix(
            loss=f"{loss:.4f}", lr=f"{metrics.learning_rate:.2e}", images_per_s=f"{speed:.1f}", refresh=False
        )
        values = {
            "epoch": round(metrics.epoch, 4),
            "train_loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": metrics.learning_rate,
            "images_per_second": round(speed, 3),
            "data_wait": round(min(1.0, metrics.waited / seconds), 4),
        }
        if self._accelerator.device.type == "cuda":
            values["device_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        if self._file is not None:
            print(json.dumps({"step": metrics.step} | finite), file=self._file, flush=True)
        self._count_skipped(metrics, loss, grad_norm)
        ended = self._epochs.add(metrics.step, int(metrics.epoch), loss)
        if ended is not None:
            self._append("epochs.jsonl", ended)
            numbers = {f"epoch_loss_{name}": ended[name] for name in ("min", "max", "mean")}
            self._accelerator.log(numbers, step=metrics.step)
        by_key = {f"loss_for_{key}": value.item() for key, value in metrics.loss_by_key}  # asked for, to find a fault
        self._accelerator.log(values | by_key, step=metrics.step)

    def _count_skipped(self, metrics: StepMetrics, loss: float, grad_norm: float) -> None:
        """Names the images of a step that was skipped. All processes see the same numbers, and come here together."""
        scaler_searches = self._accelerator.scaler is not None and math.isfinite(
            loss
        )  # for the largest scale that fits
        if math.isfinite(loss) and (math.isfinite(grad_norm) or scaler_searches):
            self.skipped_in_a_row = 0
            return
        from accelerate.utils import gather_object

        self.skipped_in_a_row += 1
        keys = gather_object(list(metrics.keys))
        message = "step %d was skipped: loss %s, gradient norm %s; its images: %s"
        logger.warning(message, metrics.step, loss, grad_norm, ", ".join(keys[:64]))

    def layers(self, parameters: Iterable[tuple[str, Tensor]], step: int, options: TrackingOptions) -> None:
        """Logs each layer's gradient norm, and histograms of its weights and gradients, at the steps that are due."""
        is_due = options.layer_norm_steps is not None and step % options.layer_norm_steps == 0
        has_histograms = options.histogram_steps is not None and step % options.histogram_steps == 0
        named = [(name, each) for name, each in parameters if each.grad is not None] if is_due or has_histograms else []
        if is_due and named:
            scaler = self._accelerator.scaler
            norms = self._layers.measure(named, 1.0 if scaler is None else scaler.get_scale())
            for name, (norm, usual) in self._layers.outliers(norms).items():
                logger.warning("step %d: the gradient of %s has norm %.3g, usually it is %.3g", step, name, norm, usual)
            self._layers.remember(norms)
            self._append("layers.jsonl", {"step": step, "grad_norms": norms})
            self._accelerator.log({f"grad_norm/{name}": norm for name, norm in norms.items()}, step=step)
        if has_histograms and self._accelerator.is_main_process:
            for tracker in self._accelerator.trackers:
                for name, parameter in named:
                    _log_histogram(tracker, f"weights/{name}", parameter, step)
                    _log_histogram(tracker, f"gradients/{name}", parameter.grad, step)

    def _append(self, name: str, values: dict) -> None:
        if self._accelerator.is_main_process:
            with (self._folder / name).open("a", encoding="utf-8") as file:
                print(json.dumps(values), file=file)

    def values(self, values: dict[str, float], step: int) -> None:
        """Sends what was measured between steps to the trackers, and to the bar's line."""
        self._accelerator.log(values, step=step)
        if "validation_loss" in values and self._accelerator.is_main_process:
            logger.info("step %d: %s", step, ", ".join(f"{k} {v:.5f}" for k, v in values.items() if "/" not in k))

    def images(self, samples: Sequence[Sample], step: int, tag: str) -> None:
        """Sends samples to the trackers, under `tag`."""
        if not samples:
            return
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                pixels = np.stack([np.asarray(sample.image.convert("RGB")) for sample in samples])
                tracker.writer.add_images(tag, pixels, step, dataformats="NHWC")
            elif tracker.name == "wandb":
                import wandb

                shown = [
                    wandb.Image(sample.image, caption=f"{i}: {sample.caption}") for i, sample in enumerate(samples)
                ]
                tracker.log({tag: shown}, step=step)
            else:
                for index, sample in enumerate(samples):
                    tracker.tracker.log_image(sample.image, name=f"{tag}_{index}", step=step)


def _numbers(metrics: StepMetrics) -> Tensor:
    """[2 + n] the loss, the gradients' norm and the sums, on the device."""
    both = torch.stack([metrics.loss.float(), metrics.grad_norm.float()])
    return both if metrics.sums is None else torch.cat([both, metrics.sums.float()])


class EpochLosses:
    """The losses of an epoch's steps, and whether one leaves what the epoch before it had."""

    def __init__(self):
        self._epoch = 0
        self._losses: list[float] = []
        self._before: tuple[float, float] | None = None

    def add(self, step: int, epoch: int, loss: float) -> dict[str, float] | None:
        """Takes a step's loss; gives the numbers of the epoch that it ended."""
        if math.isfinite(loss):
            self._losses.append(loss)
            if self._before is not None:
                least, largest = self._before
                if loss > largest + (largest - least):
                    message = "step %d: loss %.4f is far over the last epoch's, which were %.4f to %.4f"
                    logger.warning(message, step, loss, least, largest)
        if epoch == self._epoch or not self._losses:
            return None
        least, largest, mean = min(self._losses), max(self._losses), sum(self._losses) / len(self._losses)
        if len(self._losses) >= ENOUGH_LOSSES:
            self._before = least, largest
        self._epoch, self._losses = epoch, []
        return {"step": step, "epoch": epoch, "min": least, "max": largest, "mean": mean}


class LayerNorms:
    """Gradient norms by layer, and which of them are out of the ordinary."""

    OUTLIER = 10.0

    def __init__(self):
        self._usual: dict[str, float] = {}

    def measure(self, named: Sequence[tuple[str, Tensor]], scale: float) -> dict[str, float]:
        """The norm of each parameter's gradient, which fp16's scaler has multiplied by `scale`; read all at once."""
        norms = torch.stack([norm.float() for norm in torch._foreach_norm([each.grad for _, each in named])]) / scale
        return dict(zip((name for name, _ in named), norms.tolist(), strict=True))

    def outliers(self, norms: dict[str, float]) -> dict[str, tuple[float, float]]:
        """(norm, what is usual) of each layer whose norm is over ten times its running mean."""
        return {
            name: (norm, self._usual[name])
            for name, norm in norms.items()
            if name in self._usual and norm > self.OUTLIER * self._usual[name] > 0
        }

    def remember(self, norms: dict[str, float]) -> None:
        """Takes norms into the running means."""
        for name, norm in norms.items():
            if math.isfinite(norm):
                self._usual[name] = 0.9 * self._usual.get(name, norm) + 0.1 * norm


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


def start_trackers(accelerator: "Accelerator", options: TrackingOptions, record: dict) -> None:
    """Opens the trackers, with a run's options as plain values; `record` holds no secrets."""
    plain = {
        name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in record.items()
    }
    accelerator.init_trackers(options.tracker_project_name, config=plain)
