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
    """The peak learning rates, and the factor on them at each step.

    Attributes:
        optimizer: its options, with the learning rates scaled by `--scale_lr`.
        scale: the factor of `--scale_lr`; 1 without it.
        schedule: the schedule's options, with the warm-up decided.
        total_steps: optimizer steps of the whole run.
    """

    optimizer: OptimizerOptions
    scale: float
    schedule: ScheduleOptions
    total_steps: int
    _factor: Callable[[int], float]

    @classmethod
    def fit(cls, options: TrainingOptions, resumption: Resumption, global_batch: int, total_steps: int) -> Self:
        """Computes the learning rates of a run of `total_steps` optimizer steps.

        Raises:
            UserError: for an invalid schedule.
        """
        optimizer = options.optimizer.scaled(global_batch)
        schedule = resumption.schedule(options.schedule, total_steps)
        scale = optimizer.learning_rate / options.optimizer.learning_rate
        factor = rate_factor(schedule, optimizer.learning_rate, total_steps)
        return cls(optimizer, scale, schedule, total_steps, factor)

    def factor(self, step: int, reductions: int = 0) -> float:
        """Returns the factor on the peak learning rates at an optimizer step.

        Args:
            step: the optimizer step, from 0.
            reductions: number of reductions by reduce_on_plateau so far.
        """
        factor = self._factor(step)
        if self.schedule.lr_scheduler != "reduce_on_plateau":
            return factor
        return factor * self.schedule.lr_gamma**reductions
