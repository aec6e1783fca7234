"""What follows each optimizer step: metrics, measurements, checkpoints, and whether the run continues."""

import logging
import signal
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from utils.config.options import Diverged, Stopped, UserError
from utils.data.loader import Waiting
from utils.data.order import GlobalBatches
from utils.data.plan import PlannedImages
from utils.data.stream import StreamedBatches, StreamedImages
from utils.runtime.atomic_files import or_without
from utils.runtime.background_writer import BackgroundWriter
from utils.runtime.processes import OutputFolder, on_main_process, write_json
from utils.runtime.stop_requests import StopRequests, agreed, stopped
from utils.training.backward import Gradients, StepSums
from utils.training.checkpoint import Checkpoints
from utils.training.ema import MovingAverage
from utils.training.log import RunLog, StepMetrics
from utils.training.objective import Objective
from utils.training.optimizer_options import OptimizerOptions, ScheduleOptions
from utils.training.options import CheckpointOptions, EmaOptions, TrackingOptions
from utils.training.posthoc_ema import AverageLengths
from utils.training.preparation import DataPreparation
from utils.training.state import CheckpointSaver, RunState, evaluating
from utils.training.validation_loss import HeldOut, History, measurement_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validation:
    """What is measured on the held-out images, if there are any, and kept in `best/`."""

    held_out: HeldOut | None
    history: History
    objective: Objective
    state: RunState
    folder: OutputFolder

    def measure(self, step: int) -> dict[str, float] | None:
        """Measures the validation loss of the weights and of their average; gives what is logged of it.

        Nothing is measured twice. None where a signal to any process broke it off: the resumed run does it.
        """
        if self.held_out is None or any(each.step == step for each in self.history.measurements):
            return {}
        state, curves = self.state, []
        logger.info("measuring the validation loss of step %d", step)
        for average in (None, state.average) if state.average is not None and step > 0 else (None,):
            with evaluating(state.adaptation, average, state.optimizer):
                curve = self.held_out.losses(self.objective)
            if curve is None:
                return None
            curves.append(curve)
        measurement = measurement_of(step, *curves)
        self.history.add(measurement, write=self.held_out.is_main_process)
        if step > 0 and self.history.best() is measurement:
            with evaluating(state.adaptation, state.average, state.optimizer):
                write = state.exporting()
                on_main_process(state.accelerator, lambda: self.folder.replace("best", write))
        if self.history.is_over():
            best = self.history.best()
            logger.info("no lower validation loss since step %d (%.5f): the run ends", best.step, best.decisive)
        return self.history.logged(measurement)

    def begin(self, step: int, requests: StopRequests) -> None:
        """Measures before the first step of a run.

        Raises:
            Stopped: if a signal broke it off.
        """
        if self.measure(step) is None:
            raise Stopped(f"stopped before step {step + 1}", requests.number or signal.SIGTERM)


def _choose_length(
    wanted: Sequence[float], lengths: AverageLengths, validation: Validation, requests: StopRequests
) -> MovingAverage:
    """The average of the length that has the lowest validation loss, all of which `ema_lengths.json` holds."""
    held_out = validation.held_out
    if held_out is None:
        return lengths.of_length(wanted[0])
    measured = {}
    for length in wanted:
        with evaluating(validation.state.adaptation, lengths.of_length(length), optimizer=None):
            curve = held_out.losses(validation.objective)
        if curve is None:
            raise Stopped("stopped while the length of the average was chosen", requests.number or signal.SIGTERM)
        measured[length] = float(curve.mean())
    best = min(measured, key=measured.get)
    logger.info("validation loss by length: %s", ", ".join(f"{name:g}: {loss:.5f}" for name, loss in measured.items()))
    if held_out.is_main_process:
        with or_without(file := validation.folder.path / "ema_lengths.json"):
            write_json(file, {"chosen": best, "validation_loss": measured})
    return lengths.of_length(best)


def _sent(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers on the device, without waiting for what it does now."""
    tensor = torch.tensor(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Feed(NamedTuple):
    """Where a run's samples come from."""

    preparation: DataPreparation
    images: PlannedImages | StreamedImages
    batches: GlobalBatches | StreamedBatches
    waiting: Waiting


class Settings(NamedTuple):
    """What the options say of a run's course; `at_once` samples are taken by a process, where memory allows."""

    rates: OptimizerOptions
    schedule: ScheduleOptions
    ema: EmaOptions
    checkpoint: CheckpointOptions
    tracking: TrackingOptions
    at_once: int


@dataclass
class Course:
    """The parts of a run that an optimizer step concerns, and how far it goes.

    Attributes:
        total_steps: after which the run ends; fewer, once the validation loss has said so.
    """

    state: RunState
    validation: Validation
    gradients: Gradients
    saver: CheckpointSaver
    checkpoints: Checkpoints
    log: RunLog
    requests: StopRequests
    feed: Feed
    settings: Settings
    total_steps: int
    _unreadable: dict[str, str] = field(default_factory=dict)  # found by this process and not yet told to the others
    _heard: Sequence[float] = ()

    def rate_now(self, factor: float) -> float:
        """The factor on the peak learning rate: that of the schedule, and of `reduce_on_plateau`."""
        if self.settings.schedule.lr_scheduler != "reduce_on_plateau":
            return factor
        return factor * self.settings.schedule.lr_gamma ** self.validation.history.reductions(
            self.settings.schedule.lr_patience
        )

    def record(self, done: int, found: StepSums, grad_norm: Tensor, factor: float) -> None:
        """Logs optimizer step number `done`, from 1, and hears, a step late, what all processes were asked for.

        Raises:
            UserError: if one step after the other had to be skipped, or more images than allowed can't be read.
        """
        accelerator, batches, log = self.state.accelerator, self.feed.batches, self.log
        new = {
            key: why
            for key, why in found.unreadable.items()
            if key not in self.feed.images.bad and key not in self._unreadable
        }
        self._unreadable |= new
        asked = [float(len(new)), *self.requests.asked(accelerator.is_main_process)]
        total_loss, sums = found.loss, None
        if accelerator.num_processes > 1:
            both = torch.cat([total_loss[None], _sent(asked, accelerator.device)])
            both = accelerator.reduce(both)
            total_loss, sums = both[0], both[1:]
        epoch = float(done * batches.size / batches.samples_per_epoch)
        rate, mean_loss = self.settings.rates.learning_rate * factor, total_loss / batches.size
        by_key = found.loss_by_key if self.settings.tracking.debug_loss else ()
        log.step(
            StepMetrics(done, epoch, mean_loss, grad_norm, rate, found.keys, by_key, self.feed.waiting.seconds, sums)
        )
        heard = asked if sums is None else log.sums
        if any(heard[:1]):
            self.share_unreadable()
        self._stop_if_diverged(done)
        self._heard = heard[1:]

    def share_unreadable(self) -> None:
        """Tells all processes of images that one could not decode."""
        self.feed.preparation.share_unreadable(self._unreadable, self.feed.images)

    def _stop_if_diverged(self, done: int) -> None:
        """Ends a run in which one step after the other had to be skipped."""
        limit = self.settings.tracking.max_skipped_steps
        if self.state.skips.in_a_row >= limit:
            self._record_outcome(done, f"{limit} steps in a row had no finite loss and gradient")
            last = next((path.name for path in reversed(self.checkpoints.found())), "none was written")
            raise UserError(
                f"{limit} steps in a row had no finite loss and gradient (--max_skipped_steps); lower --learning_rate "
                f"or look at the images named above; the last checkpoint: {last}"
            )

    def measure(self, done: int) -> None:
        """Measures the validation loss after optimizer step number `done`, which may end the run."""
        with self.log.paused():
            self.log.values(self.validation.measure(done) or {}, done)
            self._heard = self._hear_again()  # a signal breaks a measurement off
        self.total_steps = done if self.validation.history.is_over() else self.total_steps

    def ended(self) -> AbstractContextManager[None]:
        """Within it the trained modules hold the weights of the result: those of the average that is chosen now."""
        state, average = self.state, self.state.average
        if state.lengths is not None:
            average = _choose_length(self.settings.ema.ema_lengths, state.lengths, self.validation, self.requests)
        return evaluating(state.adaptation, average, state.optimizer)

    def verdict(self) -> str:
        """Why the result, whose weights the trained modules hold now, is that of a diverged run; empty if it is none.

        For all to call.
        """
        are_finite = self.state.holds_finite_weights()
        return self.state.skips.verdict(self.total_steps) or ("" if are_finite else "its weights are not all finite")

    def conclude(self, verdict: str) -> None:
        """Says where the result is, and what has become of the run, in run.json too.

        Raises:
            Diverged: if there is a verdict, once all processes are done.
        """
        self._record_outcome(self.total_steps, verdict)
        folder = self.validation.folder.path
        if verdict:
            raise Diverged(
                f"the run has diverged: {verdict}; its result is in {folder} all the same; lower --learning_rate, or "
                "resume from an earlier checkpoint"
            )
        logger.info("the result is in %s", folder)

    def _record_outcome(self, steps: int, verdict: str) -> None:
        outcome = {"steps": steps, "skipped_steps": self.state.skips.total, "diverged": verdict or None}
        on_main_process(self.state.accelerator, partial(self.validation.folder.add_to_record, outcome=outcome))

    def _hear_again(self) -> list[float]:
        """What all processes were asked for, also since then."""
        accelerator = self.state.accelerator
        now = self.requests.asked(accelerator.is_main_process)
        both = [float(one + other) for one, other in zip(now, self._heard or [0.0] * len(now), strict=True)]
        return accelerator.reduce(torch.tensor(both, device=accelerator.device)).tolist()

    def save(self, done: int) -> None:
        """Writes what is due after optimizer step number `done`: snapshots of averages, a checkpoint.

        Raises:
            Stopped: if the run was asked to end, its state saved.
        """
        accelerator, wish = self.state.accelerator, agreed(self._heard)
        if self.state.lengths is not None and self._is_snapshot_due(done):
            on_main_process(accelerator, partial(self.state.lengths.snapshot, done))
        if wish.saves:
            on_main_process(accelerator, self.requests.remove_heard)
        if wish.saves or self.settings.checkpoint.is_due(done, self.total_steps):
            with self.log.paused():
                self.saver.save(done, self.gradients.shortened(self.settings.at_once))
        if wish.number or (wish.ends and done < self.total_steps):
            self.saver.join()
            raise stopped(wish, done, self.validation.folder.path)

    def _is_snapshot_due(self, done: int) -> bool:
        """Whether the averages among which a length is chosen are written."""
        interval = self.settings.ema.ema_snapshot_steps or self.settings.checkpoint.checkpointing_steps
        return done % interval == 0 or done == self.total_steps


def _rescue(saver: CheckpointSaver, wanted: int, step: int, size: int) -> None:
    saver.rescue(step, size if size < wanted else None)


def saves_behind(asked: bool | None, state: RunState) -> bool:
    """Whether checkpoints are written while training continues; by default on a GPU, where host memory allows it."""
    if asked is None:
        accelerator = state.accelerator
        return accelerator.device.type == "cuda" and on_main_process(accelerator, state.copies_fit_twice)
    return asked


def start_course(
    state: RunState,
    validation: Validation,
    gradients: Gradients,
    requests: StopRequests,
    feed: Feed,
    settings: Settings,
    first_step: int,
    total_steps: int,
) -> Course:
    """The course of a run that has done `first_step` steps; it opens the run's log."""
    accelerator, folder, asked = state.accelerator, validation.folder.path, settings.checkpoint
    checkpoints = Checkpoints(folder, asked.checkpoints_total_limit)
    saver = CheckpointSaver(checkpoints, state, BackgroundWriter(saves_behind(asked.async_checkpointing, state)))
    gradients.rescue = partial(_rescue, saver, settings.at_once)
    together = settings.tracking.logging_steps
    log = RunLog(accelerator, folder, first_step, total_steps, feed.batches.size, together, state.skips)
    return Course(state, validation, gradients, saver, checkpoints, log, requests, feed, settings, total_steps)
