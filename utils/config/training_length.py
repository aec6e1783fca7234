"""Options for the length of a run."""

import re
from dataclasses import dataclass

from utils.config.flag_rules import Resume
from utils.config.options import option, require, require_positive


@dataclass(frozen=True)
class LengthOptions:
    """How long a run is, in epochs, optimizer steps or time."""

    num_train_epochs: int = option(100, "epochs (passes over the data)", resume=Resume.LENGTH)
    max_train_steps: int | None = option(
        None, "total optimizer steps; overrides --num_train_epochs", resume=Resume.LENGTH
    )
    max_train_time: str | None = option(
        None,
        "HH:MM:SS after which the run saves its state and ends; continue it with --resume_from_checkpoint latest",
        resume=Resume.LENGTH,
    )

    def __post_init__(self) -> None:
        require_positive(self, "num_train_epochs", "max_train_steps")
        time = self.max_train_time
        is_time = time is None or re.fullmatch(r"\d+:[0-5]\d:[0-5]\d", time)
        require(bool(is_time), "max_train_time", time, "be HH:MM:SS, such as 11:45:00")

    @property
    def seconds(self) -> float | None:
        """Seconds after which the run ends, or None."""
        if self.max_train_time is None:
            return None
        hours, minutes, seconds = (int(part) for part in self.max_train_time.split(":"))
        return 3600.0 * hours + 60 * minutes + seconds
