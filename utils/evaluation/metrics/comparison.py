"""Differences between the scores of two pipelines on the same prompts and seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

from utils.evaluation.metrics.distances import Interval
from utils.evaluation.metrics.scores import Score


@dataclass(frozen=True)
class Difference:
    """The difference after - before of a score.

    Attributes:
        verdict: `better`, `worse`, or `no difference seen` if the interval contains 0; empty without an interval.
        share_higher: the share of prompts (or groups) whose score increased.
        probability: p-value, the probability of a difference this large if nothing changed.
    """

    name: str
    before: float
    after: float
    value: float
    interval: Interval | None
    share_higher: float | None
    probability: float | None
    verdict: str

    def record(self) -> dict[str, object]:
        """Returns all fields as JSON."""
        interval = None if self.interval is None else [self.interval.low, self.interval.high]
        return {
            "before": self.before,
            "after": self.after,
            "difference": self.value,
            "interval_95": interval,
            "share_higher": self.share_higher,
            "probability": self.probability,
            "verdict": self.verdict,
        }


def differences(before: Sequence[Score], after: Sequence[Score], are_paired: bool) -> list[Difference]:
    """Returns the differences of the scores that both have.

    Args:
        are_paired: whether image n of both has the same prompt and seed; if not, there are no intervals.
    """
    earlier = {score.name: score for score in before if score.value is not None}
    return [
        _difference(earlier[score.name], score, are_paired)
        for score in after
        if score.value is not None and score.name in earlier
    ]


def _difference(before: Score, after: Score, are_paired: bool) -> Difference:
    paired = None
    if are_paired and before.spread is not None and after.spread is not None:
        paired = after.spread.difference(before.spread)
    value = after.value - before.value
    interval = None if paired is None else paired.interval
    return Difference(
        after.name,
        before.value,
        after.value,
        value,
        interval,
        None if paired is None else paired.share_higher,
        None if paired is None else paired.probability,
        _verdict(interval, after.better),
    )


def _verdict(interval: Interval | None, better: str) -> str:
    """Whether a score improved, judged by the interval of its difference."""
    if interval is None or not better:
        return ""
    if interval.low <= 0 <= interval.high:
        return "no difference seen"
    return "better" if (interval.low > 0) == (better == "higher") else "worse"
