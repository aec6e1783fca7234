"""The learning rate of each optimizer step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from utils.training.optimizer_options import OptimizerOptions, ScheduleOptions
from utils.training.optimizers import rate_factor
from utils.training.options import TrainingOptions
from utils.training.resume import Resumption


@dataclass(frozen=True)
class LearningRates:
    """The peak rates, and the factor on them at each step.

    Attributes:
        optimizer: its options; rates are multiplied by what `--scale_lr` asks for.
        scale: what `--scale_lr` multiplied rates by, 1 without it.
        schedule: with a warm-up that fits the run, or is the checkpoint's.
        total_steps: of the whole run.
    """

    optimizer: OptimizerOptions
    scale: float
    schedule: ScheduleOptions
    total_steps: int
    _factor: Callable[[int], float]

    @classmethod
    def fit(cls, options: TrainingOptions, resumption: Resumption, global_batch: int, total_steps: int) -> Self:
        """The rates of a run of a length.

        Raises:
            UserError: for a schedule that can't be made.
        """
        optimizer = options.optimizer.scaled(global_batch)
        schedule = resumption.schedule(options.schedule, total_steps)
        scale = optimizer.learning_rate / options.optimizer.learning_rate
        factor = rate_factor(schedule, optimizer.learning_rate, total_steps)
        return cls(optimizer, scale, schedule, total_steps, factor)

    def factor(self, step: int, reductions: int = 0) -> float:
        """The factor on the peak rates for optimizer step `step`, from 0.

        Args:
            reductions: how often reduce_on_plateau has lowered them.
        """
        factor = self._factor(step)
        if self.schedule.lr_scheduler != "reduce_on_plateau":
            return factor
        return factor * self.schedule.lr_gamma**reductions
