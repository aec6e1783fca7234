"""What the processes tell each other after each step, in one collective, whose sums are read a step late."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from utils.config.options import UserError
from utils.runtime.processes import on_main_process
from utils.runtime.stop_requests import Wish, agreed
from utils.training.backward import StepSums
from utils.training.data import Feed, TrainingData
from utils.training.log import RunLog, StepMetrics
from utils.training.options import TrackingOptions
from utils.training.session import Session
from utils.training.state import TrainingState


class Exchange:
    """Adds up over the processes a step's loss, images that could not be read, and requests to save or to stop.

    The numbers are read when the next step has been queued, so that the device never waits for them.

    Attributes:
        log: what is told of each step.
    """

    def __init__(
        self, options: TrackingOptions, session: Session, data: TrainingData, feed: Feed, state: TrainingState
    ):
        self._options, self._session, self._data, self._feed, self._state = options, session, data, feed, state
        self.log = RunLog(
            session.accelerator,
            session.folder.path,
            state.step,
            state.total_steps,
            data.batches.size,
            options.logging_steps,
            state.skips,
        )
        self._heard: Sequence[float] = ()

    @property
    def wish(self) -> Wish:
        """What all processes agree to do, by what was heard last."""
        return agreed(self._heard)

    def step(self, found: StepSums, grad_norm: Tensor) -> None:
        """Exchanges what a step came to, and logs it.

        Raises:
            UserError: if one step after the other had to be skipped, or more images than allowed can't be read.
        """
        accelerator, batches, step = self._session.accelerator, self._data.batches, self._state.step
        # This process's numbers, and their sums over all.
        num_unreadable = self._data.note_unreadable(found.unreadable)
        asked = [float(num_unreadable), *self._session.requests.asked(accelerator.is_main_process)]
        total_loss, sums = found.loss, None
        if accelerator.num_processes > 1:
            both = accelerator.reduce(torch.cat([total_loss[None], _sent(asked, accelerator.device)]))
            total_loss, sums = both[0], both[1:]
        # The step's metrics; what comes back are the sums of steps that were read by now.
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

    def listen_again(self) -> None:
        """Hears what was asked for since, such as during a measurement, which a signal breaks off; for all to call."""
        accelerator = self._session.accelerator
        now = self._session.requests.asked(accelerator.is_main_process)
        both = [float(one + other) for one, other in zip(now, self._heard or [0.0] * len(now), strict=True)]
        self._heard = accelerator.reduce(torch.tensor(both, device=accelerator.device)).tolist()

    def _end_if_diverged(self) -> None:
        """Ends a run in which one step after the other had to be skipped."""
        limit = self._options.max_skipped_steps
        if self._state.skips.in_a_row < limit:
            return
        why = f"{limit} steps in a row had no finite loss and gradient"
        record_outcome(self._session, self._state, why)
        last = next((path.name for path in reversed(self._session.resumption.checkpoints.found())), "none was written")
        raise UserError(
            f"{why} (--max_skipped_steps); lower --learning_rate or look at the images named above; the last "
            f"checkpoint: {last}"
        )


def record_outcome(session: Session, state: TrainingState, verdict: str) -> None:
    """Adds what has become of a run to `run.json`; for all to call.

    Args:
        verdict: why it has diverged; empty if it has not.
    """
    outcome = {"steps": state.step, "skipped_steps": state.skips.total, "diverged": verdict or None}
    on_main_process(session.accelerator, partial(session.folder.add_to_record, outcome=outcome))


def _sent(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers on the device, without waiting for what it does now."""
    tensor = torch.tensor(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
