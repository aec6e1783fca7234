"""What processes exchange after each step, in one collective whose sums are read one step late."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from utils.config.options import UserError
from utils.config.progress import Progress
from utils.evaluation.judging import Verdict
from utils.runtime.processes import on_main_process
from utils.runtime.stop_requests import Wish, agreed
from utils.runtime.timers import Timers
from utils.sampling.samples import Sample
from utils.training.backward import StepSums
from utils.training.data import Feed, TrainingData
from utils.training.log import RunLog, StepMetrics
from utils.training.options import TrackingOptions
from utils.training.prometheus_sink import PrometheusSink
from utils.training.session import Session
from utils.training.sinks import TrackerSink
from utils.training.state import TrainingState


class Exchange:
    """Sums over all processes a step's loss, the count of unreadable images, timers, and requests to save or stop.

    The sums are read once the next step is queued, so that the device never waits for the host.

    Attributes:
        log: the log of each step's metrics.
    """

    def __init__(
        self, options: TrackingOptions, session: Session, data: TrainingData, feed: Feed, state: TrainingState
    ):
        self._options, self._session, self._data, self._feed, self._state = options, session, data, feed, state
        self.log = RunLog(
            session.accelerator,
            session.folder.path,
            range(state.step, state.total_steps),
            session.surroundings.seen,
            options.logging_steps,
            state.skips,
            sinks=[TrackerSink(session.accelerator), *PrometheusSink.start(options, session, data, state)],
        )
        self._heard: Sequence[float] = ()

    @property
    def wish(self) -> Wish:
        """The save or stop that all processes agree on, from the sums read last."""
        wish = agreed(self._heard[Timers.COUNT :])
        return wish._replace(saves=wish.saves or self._timers.is_checkpoint_due(self._heard))

    def progress(self) -> Progress:
        """Returns how far the run has come, and whether samples are due by the timer that all processes agree on."""
        return replace(self._state.progress(), is_sample_time=self._timers.are_samples_due(self._heard))

    @property
    def _timers(self) -> Timers:
        return self._session.requests.timers

    def _asked(self) -> list[float]:
        """What this process asks for: intervals that are over, then requests to save or stop."""
        is_main = self._session.accelerator.is_main_process
        return [*self._timers.asked(is_main), *self._session.requests.asked(is_main)]

    def step(self, found: StepSums, grad_norm: Tensor) -> None:
        """Exchanges the results of a step, and logs them.

        Args:
            found: this process's losses and images.
            grad_norm: [] norm of the gradients before clipping.

        Raises:
            UserError: if --max_skipped_steps consecutive steps were skipped, or too many images can't be read.
        """
        accelerator, batches, step = self._session.accelerator, self._data.batches, self._state.step
        # This process's numbers, and their sums over all processes.
        num_unreadable = self._data.note_unreadable(found.unreadable)
        asked = [float(num_unreadable), *self._asked()]
        total_loss, sums = found.loss, None
        if accelerator.num_processes > 1:
            both = accelerator.reduce(torch.cat([total_loss[None], _sent(asked, accelerator.device)]))
            total_loss, sums = both[0], both[1:]
        # Log the step's metrics; this returns the sums of the steps read since.
        metrics = StepMetrics(
            step=step,
            epoch=float(step * batches.size / batches.samples_per_epoch),
            loss=total_loss / batches.size,
            grad_norm=grad_norm,
            learning_rate=self._state.learning_rate,
            keys=found.keys,
            loss_by_key=found.loss_by_key if self._options.debug_loss else (),
            waited=self._feed.waiting.seconds,
            sums=sums,
        )
        read = self.log.step(metrics)
        heard = asked if sums is None else read
        if any(heard[:1]):
            self._data.share_unreadable()
        self._end_if_diverged()
        self._heard = heard[1:]

    def listen_again(self) -> Progress:
        """Adds requests made since, such as a signal that interrupted a measurement; all processes must call it.

        Returns:
            The progress, which the measurement may have ended.
        """
        accelerator = self._session.accelerator
        now = accelerator.reduce(torch.tensor(self._asked(), device=accelerator.device)).tolist()
        before = self._heard or [0.0] * len(now)
        self._heard = [one + other for one, other in zip(now, before, strict=True)]
        return self.progress()

    def _end_if_diverged(self) -> None:
        """Ends the run if --max_skipped_steps consecutive steps were skipped."""
        limit = self._options.max_skipped_steps
        if self._state.skips.in_a_row < limit:
            return
        why = f"{limit} consecutive steps had no finite loss and gradient"
        record_outcome(self._session, self._state, why)
        last = next((path.name for path in reversed(self._session.resumption.checkpoints.found())), "none was written")
        raise UserError(
            f"{why} (--max_skipped_steps); lower --learning_rate or check the images named above; last "
            f"checkpoint: {last}"
        )


def record_outcome(
    session: Session, state: TrainingState, verdict: str, samples: Sequence[Sample] = ()
) -> Verdict | None:
    """Concludes the verdict, and adds the outcome of a run to `run.json`; all processes must call it.

    Args:
        verdict: why the run has diverged; empty if it has not.
        samples: samples of the result.
    """
    judged = None if state.judge_of_run is None else state.judge_of_run.conclude(verdict, samples)
    outcome = {"steps": state.step, "skipped_steps": state.skips.total, "diverged": verdict or None}
    if judged is not None:
        outcome |= {"verdict": judged.word, "verdict_since_step": judged.since_step}
    on_main_process(session.accelerator, partial(session.folder.add_to_record, outcome=outcome))
    return judged


def _sent(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Copies numbers to the device without waiting for queued work."""
    tensor = torch.tensor(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
