"""The results of an evaluation, from which its report is written."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from utils.evaluation.metrics.comparison import Difference
from utils.evaluation.metrics.image_sets import Subject
from utils.evaluation.metrics.scores import Score
from utils.models.scaled_adapters import ScaledAdapter, number_text

ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}


def scale_name(scale: float) -> str:
    """Returns the name of an entry of a sweep, which is that of its folder of images too."""
    return f"scale-{number_text(scale)}"


@dataclass(frozen=True)
class Entry:
    """A pipeline or a folder of images, with its scores.

    Attributes:
        name: its name in the report.
        step: optimizer steps of a checkpoint; None for anything else.
        scale: factor of all adapters in a sweep of scales; None for anything else.
        folder: the folder of its images, within the output folder if they were drawn; "" if unknown.
        differences: from the baseline, in a sweep of scales with one.
        facts: the settings that its images were drawn with.
        invalid: names of unreadable, NaN, black and one-colour images, by state.
        seconds: the time that drawing took in this run.
    """

    name: str
    subject: Subject
    scores: list[Score]
    facts: dict[str, object]
    invalid: dict[str, list[str]]
    seconds: float = 0.0
    step: int | None = None
    scale: float | None = None
    folder: str = ""
    differences: list[Difference] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Its name in words, for the columns of a sweep."""
        is_named = self.scale is None or self.name != scale_name(self.scale)
        return self.name if is_named else f"scale {number_text(self.scale)}"

    def score(self, name: str) -> Score | None:
        """Returns the score with a name; None if there is none."""
        return next((score for score in self.scores if score.name == name), None)


@dataclass(frozen=True)
class Findings:
    """All results of an evaluation.

    Attributes:
        entries: what was scored; differences compare the last entry with the first; in a sweep, each entry has its own.
        best: (name of the score that chose the best checkpoint, name of that checkpoint).
        run: options, versions and command.
        training: the training images, for the pairs of memorisation.
    """

    title: str
    entries: list[Entry]
    differences: list[Difference]
    best: tuple[str, str] | None
    run: dict[str, object]
    training: Subject | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_sweep(self) -> bool:
        """Whether the entries are the scales of a sweep, maybe after a baseline."""
        return self.entries[-1].scale is not None


def computed_names(entries: Sequence[Entry]) -> list[str]:
    """Returns the names of the scores that at least one entry has, in order."""
    return list(dict.fromkeys(score.name for entry in entries for score in entry.scores if score.value is not None))


def adapter_lines(entries: Sequence[Entry]) -> list[str]:
    """Returns which adapters at which scales each entry was drawn with, one line for entries that share them."""
    shared: dict[str, list[str]] = {}
    for entry in entries:
        adapters = [ScaledAdapter(**each) for each in entry.facts.get("adapters", ())]
        if adapters:
            shared.setdefault(", ".join(each.label for each in adapters), []).append(entry.label)
    return [f"{', '.join(labels)}: {adapters}" for adapters, labels in shared.items()]
