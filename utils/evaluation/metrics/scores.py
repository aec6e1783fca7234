"""A score: a number with the details needed to interpret it, or the reason why it was not computed."""

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
    """The values from which intervals of a score, and of a difference of scores, are computed."""

    @abstractmethod
    def interval(self) -> tuple[Interval | None, str]:
        """Returns the 95 % interval of the score, None if it has none, and the method."""

    @abstractmethod
    def difference(self, before: "Spread") -> PairedDifference | None:
        """Returns this score minus `before`, on the same prompts and seeds; None if they can't be paired."""


@dataclass(frozen=True)
class ByImage(Spread):
    """A mean over images: `values` [N] and their prompts `clusters` [N], by which the bootstrap resamples."""

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
    """A statistic of two sets, and its values without each sample of the first [N] and second [M] set."""

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
        """Leaves image n out of both scores at once, so that variation shared by the pairs cancels."""
        is_like = isinstance(before, ByJackknife) and len(before.without_first) == len(self.without_first)
        if not is_like or len(before.without_second) != len(self.without_second):
            return None
        pairs = self.without_first - before.without_first, self.without_second - before.without_second
        value = self.value - before.value
        return PairedDifference(value, normal_interval(value, jackknife_error(*pairs)), None, None)


@dataclass(frozen=True)
class ByGroup(Spread):
    """A score of each of a few disjoint groups of images; biased by their size, so it is only used for differences."""

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
    """A score of a set of images.

    Attributes:
        name: such as `kid` or `lpips_within_prompts`.
        value: the number; None if it was not computed.
        better: `higher`, `lower`, or empty if neither is better.
        error: standard error; None if unknown.
        count, reference_count: numbers of images and reference images.
        network, weights: name of the feature network, and SHA-256 of its weights.
        settings: how the score is defined, by name.
        remark: limits of its meaning, such as too few images.
        reason: why it was not computed.
        failed: whether it was not computed because of an error, such as a feature that is not finite.
        details: additional numbers, by name.
        spread: the values for its interval.
        by_image: [N], the value of each image; None if images have no values.
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
        """The 95 % interval; None if it can't be estimated."""
        return None if self.spread is None or self.value is None else self.spread.interval()[0]

    def record(self) -> dict[str, object]:
        """Returns all fields as JSON."""
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
    """Returns a score that was not computed, with the reason."""
    return Score(name, None, "", reason=reason, failed=failed)
