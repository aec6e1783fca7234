"""Repeated measurements of the same images, captions and noise, and intervals of what changed between them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np

HEARS = 1e-3  # of the loss: a model whose predictions differ less between captions does not use them
Z = 1.959964
SMALL_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def negated(self) -> "Interval":
        """Returns the interval of the negative."""
        return Interval(-self.mean, -self.high, -self.low)

    @property
    def is_finite(self) -> bool:
        """Whether the mean is a number."""
        return math.isfinite(self.mean)


def t_quantile(freedom: int) -> float:
    """Returns the 97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5; within 0.006 from 8 degrees on)."""
    if freedom < 1:
        return math.inf
    if freedom in SMALL_T:
        return SMALL_T[freedom]
    first = (Z**3 + Z) / (4 * freedom)
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)
    return Z + first + second


def mean_interval(values: np.ndarray) -> Interval:
    """Returns the mean of [n] values of n images with its t interval; NaN in any value makes it NaN."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, -math.inf, math.inf)
    half = t_quantile(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def ratio_interval(above: np.ndarray, below: np.ndarray) -> Interval:
    """Returns sum(above) / sum(below) over [n] images, with its interval by the delta method."""
    total, count = float(np.sum(below)), len(above)
    if total <= 0 or count < 2:
        return Interval(math.nan, -math.inf, math.inf)
    ratio = float(np.sum(above)) / total
    spread = math.sqrt(float(np.sum((above - ratio * below) ** 2)) * count / (count - 1)) / total
    half = t_quantile(count - 1) * spread
    return Interval(ratio, ratio - half, ratio + half)


def share_interval(is_so: np.ndarray) -> Interval:
    """Returns the share of [n] truths with Wilson's interval (1927), which holds also where all or none are true."""
    share, count = float(is_so.mean()), len(is_so)
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return Interval(share, middle - half, middle + half)


@dataclass(frozen=True)
class Reading:
    """One measurement; [n, T] arrays over images and timesteps.

    Attributes:
        step: optimizer steps done.
        learnt: share of the sum of all learning rates of the run that was applied so far, from 0 to 1.
        trained, held_out: losses of training images, and of held-out images if there are any.
        bare: losses of the training images without their captions.
        gap: mean squared difference of their predictions with and without the captions.
        moved: mean squared difference of the training images' predictions from the base's.
        outside: the same for captions outside of the data, [n, 1].
        outside_loss: loss with those captions, [n, 1].
        types: [n] errors relative to the power of the target, by prediction type; only of the base.
        skipped: optimizer steps skipped so far, because loss or gradient was not finite.
    """

    step: int
    learnt: float
    trained: np.ndarray | None = None
    held_out: np.ndarray | None = None
    bare: np.ndarray | None = None
    gap: np.ndarray | None = None
    moved: np.ndarray | None = None
    outside: np.ndarray | None = None
    outside_loss: np.ndarray | None = None
    types: Mapping[str, np.ndarray] = field(default_factory=dict)
    skipped: int = 0

    def as_record(self) -> dict[str, object]:
        """Returns it as JSON holds it: lists, with null for what is not finite."""
        record = {}
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                record[name] = _listed(value)
            elif name == "types":
                record[name] = {kind: _listed(errors) for kind, errors in value.items()}
            else:
                record[name] = value
        return record

    @classmethod
    def of_record(cls, record: Mapping[str, object]) -> Self:
        """Returns the reading that a record holds.

        Raises:
            ValueError, TypeError, KeyError: if it holds none.
        """
        arrays = ("trained", "held_out", "bare", "gap", "moved", "outside", "outside_loss")
        found = {name: _array(record[name]) for name in arrays if record.get(name) is not None}
        types = {kind: _array(errors) for kind, errors in dict(record.get("types") or {}).items()}
        step, learnt, skipped = int(record["step"]), float(record["learnt"]), int(record.get("skipped", 0))
        return cls(step, learnt, **found, types=types, skipped=skipped)


def _listed(values: np.ndarray) -> list:
    if values.ndim > 1:
        return [_listed(row) for row in values]
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values.tolist()]


def _array(values: object) -> np.ndarray:
    return np.array(values, dtype=np.float64)  # None becomes NaN


def change(now: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Returns [n]: each image's log ratio of losses [n, T], averaged over timesteps, so that each weighs the same."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(now / before).mean(1)


def caption_fit(reading: Reading) -> Interval | None:
    """Returns how far the model's reaction to captions is right: 1 if they fit, -1 if they say nothing of the images.

    Let f(c) be the prediction with a caption, f() the one without. If f(c) is the mean of the target given the caption,
    its error is orthogonal to f(c) - f(), so that the loss without the caption exceeds the one with it by
    E|f(c) - f()|^2. For captions that are independent of their images it is lower by the same. This returns the ratio
    of the excess to E|f(c) - f()|^2; None if the model has no captions, or hardly reacts to them.
    """
    if reading.bare is None or reading.gap is None or reading.trained is None:
        return None
    if not float(reading.gap.sum()) > HEARS * float(reading.trained.sum()):
        return None
    return ratio_interval((reading.bare - reading.trained).sum(1), reading.gap.sum(1))


def caption_gain(reading: Reading) -> Interval | None:
    """Returns the log ratio of the loss without captions to the one with them: above 0 if they help."""
    if reading.bare is None or reading.trained is None:
        return None
    return mean_interval(change(reading.bare, reading.trained))


def drift(reading: Reading, base: Reading) -> Interval | None:
    """Returns the squared change of the predictions for outside captions, relative to the base's squared error."""
    if reading.outside is None or base.outside_loss is None:
        return None
    return mean_interval((reading.outside / base.outside_loss)[:, 0])
