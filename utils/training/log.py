"""Logs a run while it trains: progress bar, metrics.jsonl, and sinks such as experiment trackers."""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from utils.config.terminal import progress_bar
from utils.reports.records import LAYER_STATISTICS
from utils.runtime.memory import used_memory
from utils.runtime.step_lines import JsonLines, SampleCount, keep_steps
from utils.sampling.samples import Sample
from utils.training import layer_statistics
from utils.training.optimizers import NamedParameter
from utils.training.options import TrackingOptions
from utils.training.sinks import Sink

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
METRICS, EPOCHS, LAYERS = "metrics.jsonl", "epochs.jsonl", "layers.jsonl"
ENOUGH_LOSSES = 20  # steps that an epoch needs for its loss range to define outliers in the next
SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # engines of which no process has a whole layer
TIMED_STEP = 3  # the step after which the time per step is logged on a CPU


class StepMetrics(NamedTuple):
    """The metrics of an optimizer step. Tensors stay on the device until they are read.

    Attributes:
        step: optimizer steps done.
        epoch: passes over the data so far.
        loss: [] mean weighted loss over the global batch.
        grad_norm: [] norm of the gradients before clipping.
        learning_rate: the denoiser's learning rate.
        keys: names of this process's images, logged if the step is skipped.
        loss_by_key: with --debug_loss, (name, loss) of this process's images.
        waited: seconds that the training thread waited for data.
        sums: [n] sums over all processes, returned to the training loop once read; None in a single process.
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


class Timing(NamedTuple):
    """The seconds that a step took, and the Unix time at its end."""

    seconds: float
    moment: float


@dataclass
class Skips:
    """Counts of steps skipped because loss or gradient was not finite, over the whole run; saved in checkpoints."""

    total: int = 0
    in_a_row: int = 0

    LAST: ClassVar[int] = 10

    def verdict(self, steps: int) -> str:
        """Returns why a run of `steps` steps has diverged; empty if it has not."""
        if 2 * self.total > steps:
            return f"{self.total} of {steps} steps had no finite loss and gradient"
        if self.in_a_row >= self.LAST:
            return f"the last {self.in_a_row} of {steps} steps had no finite loss and gradient"
        return ""


class SentNumbers:
    """A step's numbers, being copied from the GPU to the host.

    The copy and an event are queued right behind the step. Reading waits only for that event and not for later work
    such as the next step, so that the GPU never runs out of work.
    """

    def __init__(self, row: Tensor):
        """Args:
        row: [n] numbers on the device.
        """
        self._row, self._event = row, None
        if row.is_cuda:
            self._row = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
            self._row.copy_(row, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    @staticmethod
    def read(sent: Sequence["SentNumbers"]) -> list[list[float]]:
        """Returns the numbers of several steps; waits for the last."""
        if sent[-1]._event is not None:
            sent[-1]._event.synchronize()
        return torch.stack([each._row for each in sent]).tolist()


class RunLog:
    """Writes metrics on the main process; the numbers of several steps are read together once the next step is queued.

    `metrics.jsonl` has a line per step: step, epoch, train_loss, grad_norm, learning_rate, images_per_second (the mean
    over the steps read together), the fraction of time spent waiting for data (data_wait), and the memory in use (see
    `used_memory`). Non-finite numbers are written as null. `epochs.jsonl` has a line per epoch: minimum, maximum and
    mean loss of its steps.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        folder: Path,
        steps: range,
        seen: SampleCount,
        steps_together: int = 1,
        skips: Skips | None = None,
        sinks: Sequence[Sink] = (),
    ):
        """Args:
        steps: the steps to come: from the number of optimizer steps done before to that of the whole run.
        seen: the global batch, and the samples seen after each step.
        steps_together: steps whose numbers are read together.
        skips: counts so far, continued up to the last step read.
        sinks: what else shows the run.
        """
        self._accelerator = accelerator
        self._sinks = list(sinks)
        self._seen = seen
        self._skips = skips or Skips()
        self._unread: list[float] = []
        self._epochs = EpochLosses()
        self._layers = LayerNorms()
        self._steps_together = steps_together
        self._steps, self._done, self._is_timed = steps, steps.start, False
        self._pending: list[tuple[StepMetrics, SentNumbers, float]] = []
        self._counted_from = self._last_step_at = time.perf_counter()
        self._files = {name: JsonLines(folder / name) for name in (METRICS, EPOCHS, LAYERS, LAYER_STATISTICS)}
        self._bar = progress_bar(
            total=steps.stop,
            initial=steps.start,
            unit="step",
            desc="training",
            disable=not accelerator.is_local_main_process,
        )
        if accelerator.is_main_process:
            for name in self._files:
                keep_steps(folder / name, steps.start)

    def step(self, metrics: StepMetrics) -> list[float]:
        """Takes a step's metrics; writes those of earlier steps once there are enough to read together.

        Returns:
            The sums (`StepMetrics.sums`) of the steps read since the last call, added up; empty if none were.
        """
        if len(self._pending) >= self._steps_together:
            self._write_pending()
        sums, self._unread = self._unread, []
        self._pending.append((metrics, SentNumbers(_numbers(metrics)), time.time()))
        self._last_step_at = time.perf_counter()
        return sums

    @contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Context manager for work that does not count towards training speed; earlier steps are written first.

        Args:
            what: the work, whose duration is passed on as `{what}_seconds`.
        """
        self._write_pending()
        began = time.perf_counter()
        try:
            yield
        finally:
            self._counted_from = time.perf_counter()
        self._pass_values({f"{what}_seconds": round(self._counted_from - began, 4)}, self._done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        """Writes the remaining steps, and ends the progress bar's line, so that an error message starts a new line."""
        self._write_pending()
        self._bar.close()
        for sink in self._sinks:
            sink.close()
        for file in self._files.values():
            file.close()

    def _write_pending(self) -> None:
        if not self._pending:
            return
        steps = [(metrics, moment) for metrics, _, moment in self._pending]
        self._done = steps[-1][0].step
        rows = SentNumbers.read([sent for _, sent, _ in self._pending])
        memory = used_memory(self._accelerator.device)
        self._pending = []
        seconds = (self._last_step_at - self._counted_from) / len(steps)
        self._counted_from = self._last_step_at
        self._log_duration(steps[-1][0].step, seconds)
        before = [self._unread] if self._unread else []
        self._unread = [sum(column) for column in zip(*(row[2:] for row in rows), *before, strict=True)]
        for (metrics, moment), (loss, grad_norm, *_) in zip(steps, rows, strict=True):
            self._write(metrics, loss, grad_norm, Timing(seconds, moment), memory)
        self._bar.update(len(steps))

    def _log_duration(self, done: int, seconds: float) -> None:
        """On a CPU, logs the time per step once, for users who expect a GPU to be used."""
        if self._is_timed or self._accelerator.device.type != "cpu" or not self._accelerator.is_main_process:
            return
        if done < self._steps.start + TIMED_STEP:  # the first ones take longer
            return
        self._is_timed = True
        num_left = max(0, self._steps.stop - done)
        left = timedelta(seconds=round(seconds * num_left))
        logger.info(
            "training on the CPU takes %.2g s per step: about %s for the remaining %d steps", seconds, left, num_left
        )

    def _write(
        self, metrics: StepMetrics, loss: float, grad_norm: float, timing: Timing, memory: dict[str, float]
    ) -> None:
        seconds = timing.seconds
        speed = self._seen.per_step / seconds
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
        values |= memory
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append(METRICS, {"step": metrics.step} | finite, timing.moment)
        self._count_skipped(metrics, loss, grad_norm)
        ended = self._epochs.add(metrics.step, int(metrics.epoch), loss)
        if ended is not None:
            self._append(EPOCHS, ended)
            numbers = {f"epoch_loss_{name}": ended[name] for name in ("min", "max", "mean")}
            self._pass_values(numbers, metrics.step)
        by_key = {f"loss_for_{key}": value.item() for key, value in metrics.loss_by_key}  # --debug_loss
        for sink in self._sinks:
            sink.step(values | by_key, metrics.step)

    def _count_skipped(self, metrics: StepMetrics, loss: float, grad_norm: float) -> None:
        """Counts a skipped step and logs its images. All processes see the same numbers and call this together."""
        if math.isfinite(loss) and (math.isfinite(grad_norm) or self._scaler_searches()):
            self._skips.in_a_row = 0
            return
        from accelerate.utils import gather_object

        self._skips.total += 1
        self._skips.in_a_row += 1
        keys = gather_object(list(metrics.keys))
        message = "step %d was skipped: loss %s, gradient norm %s; its images: %s"
        logger.warning(message, metrics.step, loss, grad_norm, ", ".join(keys[:64]))

    def _scaler_searches(self) -> bool:
        """Whether the fp16 scaler is searching for its largest scale, which skips some steps at the start and later.

        Gradients that overflow at a scale below 1 are caused by the model, not by the scaler.
        """
        scaler = self._accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1

    def layers(self, parameters: Iterable[NamedParameter], step: int, options: TrackingOptions) -> None:
        """Logs each layer's gradient norm and histograms of its weights and gradients, when due."""
        self._layer_statistics(parameters, step, options)
        is_due = options.layer_norm_steps is not None and step % options.layer_norm_steps == 0
        has_histograms = options.histogram_steps is not None and step % options.histogram_steps == 0
        named = (
            [(name, each) for name, each, _ in parameters if each.grad is not None] if is_due or has_histograms else []
        )
        if is_due and named:
            scaler = self._accelerator.scaler
            norms = self._layers.measure(named, 1.0 if scaler is None else scaler.get_scale())
            for name, (norm, usual) in self._layers.outliers(norms).items():
                logger.warning("step %d: the gradient norm of %s is %.3g, usually about %.3g", step, name, norm, usual)
            self._layers.remember(norms)
            self._append(LAYERS, {"step": step, "grad_norms": norms})
            self._pass_values({f"grad_norm/{name}": norm for name, norm in norms.items()}, step)
        if has_histograms and self._accelerator.is_main_process:
            for name, parameter in named:
                for sink in self._sinks:
                    sink.histogram(f"weights/{name}", parameter, step)
                    sink.histogram(f"gradients/{name}", parameter.grad, step)

    def _layer_statistics(self, parameters: Iterable[NamedParameter], step: int, options: TrackingOptions) -> None:
        """Records statistics of each layer, when due; not where no process has a whole layer."""
        accelerator = self._accelerator
        if not (options.report and accelerator.is_main_process and layer_statistics.is_due(step, self._steps)):
            return
        named = [(name, each) for name, each, _ in parameters]
        if accelerator.distributed_type in SHARDING or not named:
            return
        scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
        self._append(LAYER_STATISTICS, {"step": step, "layers": layer_statistics.statistics(named, scale)})

    def _append(self, name: str, values: dict, moment: float | None = None) -> None:
        if self._accelerator.is_main_process:
            self._files[name].write(values | self._seen.stamp(values["step"], moment))

    def values(self, values: dict[str, float], step: int) -> None:
        """Passes measurements made between steps to the sinks, and logs a validation loss."""
        self._pass_values(values, step)
        if "validation_loss" in values and self._accelerator.is_main_process:
            logger.info("step %d: %s", step, ", ".join(f"{k} {v:.5f}" for k, v in values.items() if "/" not in k))

    def _pass_values(self, values: Mapping[str, float], step: int) -> None:
        for sink in self._sinks:
            sink.values(values, step)

    def images(self, samples: Sequence[Sample], step: int, tag: str) -> None:
        """Passes samples to the sinks under `tag`."""
        if samples:
            for sink in self._sinks:
                sink.images(samples, step, tag)


def _numbers(metrics: StepMetrics) -> Tensor:
    """Returns [2 + n]: loss, gradient norm and sums, on the device."""
    both = torch.stack([metrics.loss.float(), metrics.grad_norm.float()])
    return both if metrics.sums is None else torch.cat([both, metrics.sums.float()])


class EpochLosses:
    """The losses of an epoch's steps; warns of a loss far above the range of the epoch before."""

    def __init__(self):
        self._epoch = 0
        self._losses: list[float] = []
        self._before: tuple[float, float] | None = None

    def add(self, step: int, epoch: int, loss: float) -> dict[str, float] | None:
        """Takes a step's loss; returns the epoch's statistics if the step ends an epoch."""
        if math.isfinite(loss):
            self._losses.append(loss)
            if self._before is not None:
                least, largest = self._before
                if loss > largest + (largest - least):
                    message = "step %d: loss %.4f is far above the losses of the last epoch, %.4f to %.4f"
                    logger.warning(message, step, loss, least, largest)
        if epoch == self._epoch or not self._losses:
            return None
        least, largest, mean = min(self._losses), max(self._losses), sum(self._losses) / len(self._losses)
        if len(self._losses) >= ENOUGH_LOSSES:
            self._before = least, largest
        self._epoch, self._losses = epoch, []
        return {"step": step, "epoch": epoch, "min": least, "max": largest, "mean": mean}


class LayerNorms:
    """Gradient norms by layer, and which of them are outliers."""

    OUTLIER = 10.0

    def __init__(self):
        self._usual: dict[str, float] = {}

    def measure(self, named: Sequence[tuple[str, Tensor]], scale: float) -> dict[str, float]:
        """Returns the norm of each parameter's gradient, divided by the fp16 scaler's `scale`; reads all at once."""
        norms = torch.stack([norm.float() for norm in torch._foreach_norm([each.grad for _, each in named])]) / scale
        return dict(zip((name for name, _ in named), norms.tolist(), strict=True))

    def outliers(self, norms: dict[str, float]) -> dict[str, tuple[float, float]]:
        """Returns (norm, running mean) of each layer whose norm is more than OUTLIER times its running mean."""
        return {
            name: (norm, self._usual[name])
            for name, norm in norms.items()
            if name in self._usual and norm > self.OUTLIER * self._usual[name] > 0
        }

    def remember(self, norms: dict[str, float]) -> None:
        """Updates the running means."""
        for name, norm in norms.items():
            if math.isfinite(norm):
                self._usual[name] = 0.9 * self._usual.get(name, norm) + 0.1 * norm
