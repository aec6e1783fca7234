"""How long a run is."""

import re
from dataclasses import dataclass

from utils.config.flag_rules import Resume
from utils.config.options import option, require, require_positive


@dataclass(frozen=True)
class LengthOptions:
    num_train_epochs: int = option(100, "passes over the data", resume=Resume.LENGTH)
    max_train_steps: int | None = option(None, "optimizer steps, instead of --num_train_epochs", resume=Resume.LENGTH)
    max_train_time: str | None = option(
        None,
        "HH:MM:SS after which the run saves its state and ends; --resume_from_checkpoint latest resumes",
        resume=Resume.LENGTH,
    )

    def __post_init__(self) -> None:
        require_positive(self, "num_train_epochs", "max_train_steps")
        time = self.max_train_time
        is_time = time is None or re.fullmatch(r"\d+:[0-5]\d:[0-5]\d", time)
        require(bool(is_time), "max_train_time", time, "be HH:MM:SS, such as 11:45:00")

    @property
    def seconds(self) -> float | None:
        """The time after which the run ends."""
        if self.max_train_time is None:
            return None
        hours, minutes, seconds = (int(part) for part in self.max_train_time.split(":"))
        return 3600.0 * hours + 60 * minutes + seconds
