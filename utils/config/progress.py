"""Progress of a run, which decides what is due after an optimizer step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress of a run after an optimizer step.

    Attributes:
        step: optimizer steps done.
        total_steps: optimizer steps of the whole run; early stopping lowers it to `step`.
        epochs_before: epochs completed before this step.
        epochs: epochs completed after this step.
        is_sample_time: whether the interval between samples, in minutes, is over.
    """

    step: int
    total_steps: int
    epochs_before: int
    epochs: int
    is_sample_time: bool = False

    @property
    def is_last(self) -> bool:
        """Whether the run ends with this step."""
        return self.step >= self.total_steps

    @property
    def is_first(self) -> bool:
        """Whether no step has been done yet."""
        return self.step == 0

    @property
    def ended_epochs(self) -> range:
        """Numbers, from 0, of the epochs that this step completed."""
        return range(self.epochs_before, self.epochs)

    def ends_epochs(self, interval: int | None) -> bool:
        """Whether this step completed an epoch whose number, from 1, is a multiple of `interval`; False for None."""
        return interval is not None and any((epoch + 1) % interval == 0 for epoch in self.ended_epochs)

    def is_multiple_of(self, interval: int | None) -> bool:
        """Whether the step is a multiple of `interval`; False for None."""
        return interval is not None and self.step % interval == 0
