"""The validation loss of a run: measures it between steps, records it, and exports `best/` at the lowest."""

import logging
import signal
from collections.abc import Callable, Sequence
from typing import Self

from utils.config.options import Stopped
from utils.config.progress import Progress
from utils.runtime.atomic_files import or_without, set_aside
from utils.runtime.processes import on_main_process, write_json
from utils.training.data import TrainingData
from utils.training.ema import MovingAverage
from utils.training.exchange import Exchange
from utils.training.options import TrainingOptions
from utils.training.posthoc_ema import AverageLengths
from utils.training.session import Session
from utils.training.state import TrainingState, evaluating
from utils.training.task import Task
from utils.training.validation_loss import History, measurement_of
from utils.training.verdict import RunVerdict

logger = logging.getLogger(__name__)


class ValidationLoss:
    """Measures the loss on the held-out images, if any, and ends a run that no longer improves (early stopping).

    Attributes:
        history: the measurements of the run.
        verdict: whether the run works, by measurements of its own.
    """

    def __init__(
        self, options: TrainingOptions, session: Session, data: TrainingData, task: Task, state: TrainingState
    ):
        self.history = History(session.folder.path, state.step, options.stopping)
        self._patience = options.schedule.lr_patience
        self._session, self._held_out, self._objective, self._state = session, data.held_out, task.objective, state
        self.verdict: RunVerdict

    @classmethod
    def begin(
        cls,
        options: TrainingOptions,
        session: Session,
        data: TrainingData,
        task: Task,
        state: TrainingState,
        is_due: bool,
    ) -> Self:
        """Creates it, and measures the loss before the run's first step.

        Args:
            is_due: whether a measurement is due at the step to resume from.

        Raises:
            Stopped: if a signal interrupted the measurement.
        """
        own = cls(options, session, data, task, state)
        if not own.history.has_best:
            on_main_process(state.accelerator, own._set_best_aside)
        if (is_due or state.step in (0, state.total_steps)) and own._measured(state.progress()) is None:
            number = session.requests.number or signal.SIGTERM
            raise Stopped(f"stopped before step {state.step + 1}", number)
        own._end_if_over()
        own.verdict = state.judge_of_run = RunVerdict.begin(options, session, state, data.probes)
        return own

    def _set_best_aside(self) -> None:
        """Renames `best/` of weights that this run has not trained, unless it reads from there."""
        best = self._session.folder.path / "best"
        sources = [source.absolute() for source in self._state.adaptation.exporter.sources]
        if not best.is_dir() or any(best.absolute() in (source, *source.parents) for source in sources):
            return
        aside = set_aside(best)
        logger.warning("%s is of a run that this one does not resume from; renamed it to %s", best, aside.name)

    @property
    def reductions(self) -> int:
        """Number of reductions of the learning rate by reduce_on_plateau so far."""
        return self.history.reductions(self._patience)

    def measure(self, exchange: Exchange, has_samples: Callable[[Progress], bool]) -> Progress:
        """Measures the loss after a step, and what the verdict needs, if they are due, and logs them.

        Args:
            exchange: the log, the progress, and signals that come meanwhile.
            has_samples: whether samples are drawn after this step; the loss is measured at the same steps.

        Returns:
            The progress: early stopping may have made this step the last.
        """
        progress, log = exchange.progress(), exchange.log
        if has_samples(progress) or progress.is_last:
            with log.paused("validation"):
                log.values(self._measured(progress) or {}, progress.step)
            progress = exchange.listen_again()
        if self.verdict.is_due(progress, has_samples(progress)):
            with log.paused("verdict"):
                log.values(self.verdict.measure(progress), progress.step)
            progress = exchange.listen_again()
        return progress

    def _measured(self, progress: Progress) -> dict[str, float] | None:
        """Measures the loss of the weights and of their average, and returns the values to log. It may end the run.

        No step is measured twice. Returns None if a signal to any process interrupted it; a resumed run repeats it.
        """
        if self._held_out is None or any(each.step == progress.step for each in self.history.measurements):
            return {}
        # Measure the weights, then their average.
        state, curves = self._state, []
        logger.info("measuring the validation loss of step %d", progress.step)
        weights_of = [[], state.averages] if state.averages and not progress.is_first else [[]]
        for averages in weights_of:
            with evaluating(state.adaptation, averages, state.optimizer):
                curve = self._held_out.losses(self._objective)
            if curve is None:
                return None
            curves.append(curve)
        # Record it, and export the weights if it is the lowest.
        stamp = self._session.surroundings.seen.stamp(progress.step)
        measurement = measurement_of(progress.step, *curves)._replace(**stamp)
        self.history.add(measurement, write=self._held_out.is_main_process)
        if not progress.is_first and self.history.best() is measurement:
            with state.evaluating():
                write = state.exporting()
                on_main_process(state.accelerator, lambda: self._session.folder.replace("best", write))
        # Early stopping.
        if self._end_if_over():
            best = self.history.best()
            logger.info("no lower validation loss since step %d (%.5f): the run ends", best.step, best.decisive)
        return self.history.logged(measurement)

    def _end_if_over(self) -> bool:
        """Ends the run with this step if early stopping says so; returns whether it did."""
        is_over = self.history.is_over()
        if is_over:
            self._state.total_steps = self._state.step
        return is_over

    def choose_length(self, wanted: Sequence[float], lengths: AverageLengths) -> MovingAverage:
        """Returns the average of the length with the lowest loss, and writes all losses to `ema_lengths.json`.

        Args:
            wanted: the lengths to choose from, as fractions of training.
            lengths: computes the average of a length.

        Raises:
            Stopped: if a signal interrupted the measurement.
        """
        if self._held_out is None:
            return lengths.of_length(wanted[0])
        state, measured = self._state, {}
        for length in wanted:
            with evaluating(state.adaptation, [lengths.of_length(length)], state.optimizer):
                curve = self._held_out.losses(self._objective)
            if curve is None:
                number = self._session.requests.number or signal.SIGTERM
                raise Stopped("stopped while choosing the length of the average", number)
            measured[length] = float(curve.mean())
        best = min(measured, key=measured.get)
        losses = ", ".join(f"{name:g}: {loss:.5f}" for name, loss in measured.items())
        logger.info("validation loss by length: %s", losses)
        if self._held_out.is_main_process:
            with or_without(file := self._session.folder.path / "ema_lengths.json"):
                write_json(file, {"chosen": best, "validation_loss": measured})
        return lengths.of_length(best)
