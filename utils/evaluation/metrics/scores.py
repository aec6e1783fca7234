"""A score: a number with everything that is needed to read it, or the reason why there is none."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np

from utils.evaluation.metrics.distances import (
    Interval,
    PairedDifference,
    cluster_bootstrap,
    jackknife_error,
    normal_interval,
    paired_difference,
    student_interval,
)


class Spread(ABC):
    """What a score's interval, and that of a difference of two, are made of."""

    @abstractmethod
    def interval(self) -> tuple[Interval | None, str]:
        """The 95 % interval of the score and how it was made; None where this gives none."""

    @abstractmethod
    def difference(self, before: "Spread") -> PairedDifference | None:
        """This score less the same one of `before`, of the same prompts and seeds; None where they can't be paired."""


@dataclass(frozen=True)
class ByImage(Spread):
    """A mean over images [N] (or over other things that have a prompt), whose prompts [N] are drawn as clusters."""

    values: np.ndarray
    clusters: np.ndarray

    def interval(self) -> tuple[Interval | None, str]:
        return cluster_bootstrap(self.values, self.clusters), "bootstrap over prompts"

    def difference(self, before: Spread) -> PairedDifference | None:
        if not isinstance(before, ByImage) or len(before.values) != len(self.values):
            return None
        return paired_difference(before.values, self.values, self.clusters)


@dataclass(frozen=True)
class ByJackknife(Spread):
    """A statistic of two sets and its values without each sample of the first and of the second."""

    value: float
    without_first: np.ndarray
    without_second: np.ndarray

    @property
    def error(self) -> float:
        """The standard error."""
        return jackknife_error(self.without_first, self.without_second)

    def interval(self) -> tuple[Interval | None, str]:
        return normal_interval(self.value, self.error), "jackknife over images"

    def difference(self, before: Spread) -> PairedDifference | None:
        """Image n is left out of both sets at once, so what the pairs have in common cancels."""
        is_like = isinstance(before, ByJackknife) and len(before.without_first) == len(self.without_first)
        if not is_like or len(before.without_second) != len(self.without_second):
            return None
        pairs = self.without_first - before.without_first, self.without_second - before.without_second
        value = self.value - before.value
        return PairedDifference(value, normal_interval(value, jackknife_error(*pairs)), None, None)


@dataclass(frozen=True)
class ByGroup(Spread):
    """A score of each of a few disjoint groups of images; biased by their size, so of use for differences alone."""

    values: np.ndarray

    def interval(self) -> tuple[Interval | None, str]:
        return None, ""

    def difference(self, before: Spread) -> PairedDifference | None:
        if not isinstance(before, ByGroup) or len(before.values) != len(self.values):
            return None
        differences = self.values - before.values
        share = float((differences > 0).mean())
        return PairedDifference(float(differences.mean()), student_interval(differences), share, None)


@dataclass(frozen=True)
class Score:
    """A number of a set of images.

    Attributes:
        name: such as `kid` or `lpips_within_prompts`.
        value: None where there is none; `reason` says why.
        better: `higher`, `lower`, or empty where neither is.
        error: standard error, where one is known.
        count, reference_count: images that it was made of.
        network, weights: the feature network's name and the SHA-256 of its weights.
        settings: the definition's choices, as words by name.
        remark: what the number is worth, where that is little.
        failed: whether something that should have worked did not, such as a feature that is not finite.
        details: further numbers that stand beside it.
        by_image: [N] the value of each image, where it has one.
    """

    name: str
    value: float | None
    better: str
    error: float | None = None
    count: int = 0
    reference_count: int | None = None
    network: str = ""
    weights: str = ""
    settings: dict[str, object] = field(default_factory=dict)
    remark: str = ""
    reason: str = ""
    failed: bool = False
    details: dict[str, object] = field(default_factory=dict)
    spread: Spread | None = field(default=None, repr=False, compare=False)
    by_image: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval, where one can be made."""
        return None if self.spread is None or self.value is None else self.spread.interval()[0]

    def record(self) -> dict[str, object]:
        """All of it as JSON."""
        interval, method = (None, "") if self.spread is None else self.spread.interval()
        return {
            "value": self.value,
            "better": self.better,
            "standard_error": self.error,
            "interval_95": None if interval is None else [interval.low, interval.high],
            "interval_method": method if interval is not None else "",
            "images": self.count,
            "reference_images": self.reference_count,
            "network": self.network,
            "weights_sha256": self.weights,
            "settings": self.settings,
            "remark": self.remark,
            "not_computed": self.reason,
            "failed": self.failed,
            "details": self.details,
        }


def missing(name: str, reason: str, failed: bool = False) -> Score:
    """A score that there is not, and why."""
    return Score(name, None, "", reason=reason, failed=failed)
