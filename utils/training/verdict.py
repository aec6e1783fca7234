"""The verdict of a run: measures it from time to time, judges the measurements, and records what was found."""

import json
import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
from safetensors import SafetensorError
from torch import Tensor

from utils.config.options import Stopped, first_line
from utils.config.progress import Progress
from utils.config.tensor_files import read_safetensors
from utils.config.user_files import read_bytes
from utils.evaluation.judging import LEARNING, WORDS, Conditions, Verdict, judge
from utils.evaluation.readings import Reading
from utils.reports.records import VERDICT
from utils.runtime.atomic_files import or_without, replacing, write_tensors
from utils.runtime.processes import on_main_process, write_json
from utils.runtime.step_lines import read_line
from utils.sampling.samples import Sample
from utils.training.options import TrainingOptions
from utils.training.probes import FRACTIONS, HELD_OUT, OUTSIDE, TRAINED, Found, Probes
from utils.training.session import Session
from utils.training.state import TrainingState

logger = logging.getLogger(__name__)
READINGS, BASE = "verdict.jsonl", "verdict_base.bin"
FILE_LIMIT = 1 << 28
POINTS = 2001  # of the learning-rate schedule
TIME_SHARE = 0.03  # of the run's time that measurements may take
SHORT_RUN = 600.0  # seconds: a shorter run may take as much for them as one of this length


class RunVerdict:
    """Measures and judges a run. Without probes (`--no_verdict`, or nothing to measure) it does nothing.

    Attributes:
        verdict: the latest verdict; None before the first certain one.
    """

    def __init__(self, session: Session, state: TrainingState, probes: Probes | None, conditions: Conditions):
        self.verdict: Verdict | None = None
        self._session, self._state, self._probes, self._conditions = session, state, probes, conditions
        self._readings: list[Reading] = []
        self._spent, self._cost, self._began = 0.0, 0.0, time.monotonic()
        self._first_step = state.step
        self._rates = _rates_so_far(state)
        places = [max(1, round(part * state.total_steps)) for part in FRACTIONS]
        self._steps = {step: places.index(step) for step in places}

    @classmethod
    def begin(cls, options: TrainingOptions, session: Session, state: TrainingState, probes: Probes | None) -> Self:
        """Creates it; a new run measures the base, a resumed one takes up its measurements.

        Raises:
            Stopped: if a signal interrupted the measurement.
        """
        if probes is not None and not probes.has_any:
            logger.warning("no verdict: there is no image to measure, such as in a stream without held-out images")
            probes = None
        own = cls(session, state, probes, _conditions(options, session, state, probes))
        on_main_process(session.accelerator, own._tidy)
        if probes is None:
            return own
        if state.step:
            own._take_up()
        if not own._readings:
            own._measure(state.progress())
        if not own._readings:
            raise Stopped(f"stopped before step {state.step + 1}", session.requests.number or signal.SIGTERM)
        return own

    def _tidy(self) -> None:
        """Removes what an earlier run left, unless this one continues it."""
        folder = self._session.folder.path
        if self._probes is None or not self._state.step:
            for name in (VERDICT, READINGS, BASE):
                (folder / name).unlink(missing_ok=True)

    def _take_up(self) -> None:
        """Reads the measurements up to the first step, and the predictions of the base."""
        read = partial(_kept, self._session.folder.path, self._state.step)
        readings, base = on_main_process(self._session.accelerator, read)
        if readings:
            self._readings = readings
            self._probes.load_base(base)
        else:
            logger.warning("no measurements of the base are left: the verdict compares with step %d", self._state.step)

    def is_due(self, progress: Progress, has_samples: bool) -> bool:
        """Whether a measurement after this step is due and within the time that it may take; all agree on it.

        Args:
            has_samples: whether samples are drawn after this step.
        """
        if self._probes is None:
            return False
        if progress.is_last:
            return True
        is_near = progress.step - self._readings[-1].step < progress.total_steps / 32
        rank = self._steps.get(progress.step, len(self._steps))
        if rank == len(self._steps) and (not has_samples or is_near):
            return False
        return on_main_process(self._session.accelerator, partial(self._is_affordable, progress, rank))

    def _is_affordable(self, progress: Progress, rank: int) -> bool:
        """Whether this measurement, the last, and those that matter more fit into their share of the run's time.

        Args:
            rank: number of planned measurements that matter more.
        """
        elapsed = time.monotonic() - self._began
        done = max(1, progress.step - self._first_step)
        whole = elapsed / done * (progress.total_steps - self._first_step)
        if rank == 0 and whole < SHORT_RUN:  # a short run too is judged once before its half
            return True
        to_come = sum(other < rank and step > progress.step for step, other in self._steps.items())
        return self._spent + (2 + to_come) * self._cost <= TIME_SHARE * max(SHORT_RUN, whole)

    def measure(self, progress: Progress) -> dict[str, float]:
        """Measures after a step, and returns values to log."""
        if self._readings and self._readings[-1].step == progress.step:
            return {}
        self._measure(progress)
        return self._values()

    def _measure(self, progress: Progress) -> None:
        """Measures the weights that would be exported now, records it, and judges."""
        began, is_base = time.monotonic(), not self._readings
        with self._state.evaluating():
            found = self._probes.measure(is_base)
        if found is None:  # a signal: the run ends, and a resumed one measures again
            return
        self._cost = time.monotonic() - began
        self._spent += self._cost
        self._readings.append(_reading(found, progress.step, self._learnt(progress.step), self._state.skips.total))
        self._conditions = replace(self._conditions, total_steps=progress.total_steps)
        self._judge()
        base = self._probes.base_predictions() if is_base else None
        on_main_process(self._session.accelerator, partial(self._write, base))

    def _learnt(self, step: int) -> float:
        """The share of the sum of all learning rates that was applied before a step."""
        steps, sums = self._rates.T
        return float(np.interp(step, steps, sums) / sums[-1]) if sums[-1] > 0 else 0.0

    def _judge(self) -> None:
        before, self.verdict = self.verdict, judge(self._readings, self._conditions)
        if self.verdict is None or (before is not None and before.word == self.verdict.word):
            return
        level = logging.INFO if self.verdict.word == LEARNING else logging.WARNING
        logger.log(level, "verdict at step %d: %s", self._readings[-1].step, self.verdict.line)

    def conclude(self, ended: str = "", samples: Sequence[Sample] = ()) -> Verdict | None:
        """Judges the whole run; all processes must call it.

        Args:
            ended: why the run has diverged; empty if it has not.
            samples: samples of the result, to look for copies among them.
        """
        if self._probes is None or not self._readings:
            return None
        copies = on_main_process(self._session.accelerator, partial(self._probes.copies, samples)) if samples else []
        known = self._conditions
        self._conditions = replace(
            known, total_steps=self._state.step, ended=ended or known.ended, copies=copies or known.copies
        )
        self.verdict = judge(self._readings, self._conditions)
        on_main_process(self._session.accelerator, partial(self._write, None))
        return self.verdict

    def _values(self) -> dict[str, float]:
        """The signals, and each verdict as 0 or 1, for trackers."""
        if self.verdict is None:
            return {}
        words = {f"verdict/{word.replace(' ', '_')}": float(word == self.verdict.word) for word in WORDS}
        signals = {f"verdict_signals/{name}": value for name, value in self.verdict.signals.items()}
        return words | signals

    def _write(self, base: dict[str, Tensor] | None) -> None:
        folder = self._session.folder.path
        if base:
            with or_without(file := folder / BASE):
                write_tensors(base, file)
        lines = [json.dumps({"step": each.step} | each.as_record()) for each in self._readings]
        with or_without(file := folder / READINGS), replacing(file) as aside:
            aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
        if self.verdict is not None:
            with or_without(file := folder / VERDICT):
                write_json(file, self.verdict.as_record(self._best(self.verdict.best_step)))

    def _best(self, step: int) -> str | None:
        """Where the weights of the lowest loss are: best, checkpoint-N, or final for the result; None if nowhere."""
        folder = self._session.folder.path
        if step and self._readings[0].held_out is not None and (folder / "best").is_dir():
            return "best"
        if (folder / f"checkpoint-{step}").is_dir():
            return f"checkpoint-{step}"
        return "final" if step and step == self._state.total_steps else None


def _kept(folder: Path, last_step: int) -> tuple[list[Reading], dict[str, Tensor]]:
    """Returns the readings up to a step, if that of the base is among them, and the predictions of the base."""
    readings: list[Reading] = []
    try:
        for line in read_bytes(folder / READINGS, FILE_LIMIT).split(b"\n"):
            record = read_line(line)
            if record is not None and record["step"] <= last_step:
                readings.append(Reading.of_record(record))
    except (OSError, ValueError, TypeError, KeyError):
        return [], {}
    if not readings or readings[0].step != 0:
        return [], {}
    try:
        return readings, read_safetensors(folder / BASE)
    except (OSError, ValueError, SafetensorError) as error:
        logger.warning("the base's predictions are lost (%s): forgetting can't be told", first_line(error))
        return readings, {}


def _rates_so_far(state: TrainingState) -> np.ndarray:
    """Returns [n, 2]: steps, and the sum of the factors on the learning rate before each; at most POINTS of them."""
    steps = np.unique(np.linspace(0, state.total_steps, min(state.total_steps + 1, POINTS)).round().astype(int))
    factors = np.array([state.rates.factor(int(step)) for step in steps[:-1]])
    sums = np.concatenate([[0.0], np.cumsum(factors * np.diff(steps))])
    return np.stack([steps, sums], axis=1)


def _conditions(options: TrainingOptions, session: Session, state: TrainingState, probes: Probes | None) -> Conditions:
    """Returns what the judgement must know of a run beside its measurements."""
    from accelerate.utils import gather_object

    optimizer = options.optimizer
    return Conditions(
        total_steps=state.total_steps,
        is_pretrained=options.model.is_pretrained,
        prediction_type=probes.prediction_type if probes is not None else "",
        contrasts=gather_object(probes.contrasts) if probes is not None else (),
        learning_rate=None if optimizer.spec.has_one_rate else optimizer.learning_rate,
        is_averaged=bool(state.averages),
    )


def _reading(found: Sequence[Found], step: int, learnt: float, skipped: int) -> Reading:
    """Arranges what was measured by image into arrays."""
    trained, held, outside = ([each for each in found if each.kind == kind] for kind in (TRAINED, HELD_OUT, OUTSIDE))

    def stacked(rows: Sequence[list[float] | None]) -> np.ndarray | None:
        return np.array(rows, dtype=np.float64) if rows and None not in rows else None

    kinds = trained[0].types if trained else {}
    return Reading(
        step,
        learnt,
        trained=stacked([each.loss for each in trained]),
        held_out=stacked([each.loss for each in held]),
        bare=stacked([each.bare for each in trained]),
        gap=stacked([each.gap for each in trained]),
        moved=stacked([each.moved for each in trained]),
        outside=stacked([each.moved for each in outside]),
        outside_loss=stacked([each.loss for each in outside]),
        types={kind: np.array([each.types[kind] for each in trained]) for kind in kinds},
        skipped=skipped,
    )
