"""All that an optimizer step changes, saved and restored as one."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from utils.adaptation import Adaptation
from utils.checkpoint import TrainingState, load_optimizer, read_state, write_state
from utils.ema import MovingAverage
from utils.optim import NamedParameter
from utils.options import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class RunState:
    """The trained weights, their moving average, the optimizer and fp16's gradient scaler.

    Attributes:
        seed, global_batch: what the position in the data follows from, beside the step.
    """

    accelerator: "Accelerator"
    adaptation: Adaptation
    average: MovingAverage | None
    optimizer: torch.optim.Optimizer
    parameters: list[NamedParameter]
    seed: int
    global_batch: int

    def save(self, folder: Path, step: int) -> None:
        """Writes all of it after `step` optimizer steps; for one process to call."""
        scaler = self.accelerator.scaler
        state = TrainingState(
            step=step,
            seed=self.seed,
            global_batch=self.global_batch,
            ema_updates=None if self.average is None else self.average.num_updates,
            scaler=None if scaler is None else scaler.state_dict(),
        )
        write_state(folder, state, self.optimizer, self.parameters)
        self.adaptation.save(folder, self.average)

    def load(self, folder: Path) -> int:
        """Restores the optimizer, the average and the scaler; the weights were loaded when the adaptation was made.

        Returns:
            The optimizer steps done.

        Raises:
            UserError: if the checkpoint is of a run with another seed.
        """
        saved = read_state(folder)
        if saved.seed != self.seed:
            raise UserError(
                f"--seed {self.seed} is not that of {folder}, which has {saved.seed}; give --seed {saved.seed}"
            )
        load_optimizer(folder, self.optimizer, self.parameters)
        if self.average is not None and saved.ema_updates is not None:
            self.adaptation.load_average(folder, self.average, saved.ema_updates)
        if self.accelerator.scaler is not None and saved.scaler:
            self.accelerator.scaler.load_state_dict(saved.scaler)
        return saved.step


@contextmanager
def evaluating(adaptation: Adaptation, average: MovingAverage | None) -> Iterator[None]:
    """Within it the trained modules are in evaluation mode and hold the averages, where there are any."""
    adaptation.evaluation_mode()
    try:
        with nullcontext() if average is None else average.in_place():
            yield
    finally:
        adaptation.train_mode()
