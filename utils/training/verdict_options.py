"""The options of the verdict: whether the run judges itself, and on which captions it looks for forgetting."""

from dataclasses import dataclass

from utils.config.flag_rules import Absent, Resume
from utils.config.options import option
from utils.config.user_files import require_file


@dataclass(frozen=True)
class VerdictOptions:
    no_verdict: bool = option(
        False,
        "don't measure during training whether the run learns, diverges, overfits, forgets or copies, and leave out "
        "verdict.json",
        resume=Resume.REPORTING,
    )
    forgetting_prompts: str | None = option(
        None,
        "text file of captions outside the training data, one per line, on which predictions should stay those of the "
        "base model; default: 64 plain captions. At most 64 are used",
        resume=Resume.REPORTING,
        acts_with=(Absent("no_verdict"),),
    )

    def __post_init__(self) -> None:
        if self.forgetting_prompts is not None:
            require_file(self.forgetting_prompts, "forgetting_prompts")
