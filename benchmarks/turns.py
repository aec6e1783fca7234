"""What the records of many turns come to: medians, spreads, ratios with an interval, and when a start has paid."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

PHASES = ("data", "encoders", "forward", "backward", "optimizer", "ema")
COMPUTING = ("forward", "backward", "optimizer", "ema")
STARTING = ("importing", "loading", "listing", "caching", "compiling")
RESAMPLINGS = 2000


class Interval(NamedTuple):
    """A value and the range in which 95 % of resamplings put it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Turns:
    """The turns of a contestant, one record each, as benchmarks/launch.py writes them.

    Attributes:
        warm_up: steps at the beginning of each that don't count, the first among them.
        batch: samples of a step.
    """

    records: Sequence[dict[str, Any]]
    warm_up: int
    batch: int

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The steps that count, of all turns."""
        return [step for record in self.records for step in record["steps"][self.warm_up :]]

    @property
    def seconds_by_turn(self) -> list[list[float]]:
        """Of each step that counts; on a GPU between events of its stream."""
        return [
            record["device_seconds"][self.warm_up - 1 :]
            if record["device_seconds"]
            else [step["seconds"] for step in record["steps"][self.warm_up :]]
            for record in self.records
        ]

    @property
    def step_seconds(self) -> float:
        """The median."""
        return statistics.median(each for turn in self.seconds_by_turn for each in turn)

    @property
    def images_per_second(self) -> tuple[float, float, float]:
        """Median, 10th and 90th percentile over the steps."""
        rates = sorted(self.batch / each for turn in self.seconds_by_turn for each in turn)
        return statistics.median(rates), quantile(rates, 0.1), quantile(rates, 0.9)

    def phase_seconds(self, phase: str) -> float:
        """The mean of a step."""
        return statistics.fmean(step["phases"].get(phase, 0.0) for step in self.steps)

    def share(self, seconds: float) -> float:
        """Of the mean time of a step, by the host's clock."""
        return seconds / statistics.fmean(step["seconds"] for step in self.steps)

    @property
    def outside_seconds(self) -> float:
        """A step's time outside forward, backward, optimizer and moving average."""
        return statistics.fmean(
            step["seconds"] - sum(step["phases"].get(phase, 0.0) for phase in COMPUTING) for step in self.steps
        )

    @property
    def host_seconds(self) -> float:
        """What Python has to do in a step: on a GPU all but waiting for it or for data, on a CPU all but computing."""
        blocked = self.phase_seconds("blocked") + self.phase_seconds("data")
        if any(record["device_seconds"] for record in self.records):
            return statistics.fmean(step["seconds"] for step in self.steps) - blocked
        computed = sum(self.phase_seconds(phase) for phase in PHASES)
        return statistics.fmean(step["seconds"] for step in self.steps) - computed

    @property
    def synchronising(self) -> float:
        """Calls a step."""
        return statistics.fmean(step["calls"].get("synchronising", 0) for step in self.steps)

    @property
    def memory(self) -> int:
        """Bytes at most, while training."""
        return max(record["memory"]["steps"] for record in self.records)

    def start_seconds(self, part: str | None = None) -> float:
        """From the command to the end of the first step, or a part of that; the median over the turns."""
        if part == "main":
            return statistics.median(record["main_seconds"] for record in self.records)
        first = [record["steps"][0] for record in self.records]
        return statistics.median(step["seconds"] if part is None else step["phases"].get(part, 0.0) for step in first)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of values in order, between neighbours in proportion."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def ratio(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """How many times as fast ours is, by median seconds; rounds are resampled, and steps within them (bootstrap).

    A round's turns were taken one after the other, so both sides' are drawn together.
    """
    import numpy as np

    random, found = np.random.default_rng(seed), []
    pairs = [(np.asarray(own), np.asarray(other)) for own, other in zip(ours, theirs, strict=True)]
    for _ in range(RESAMPLINGS):
        drawn = [pairs[number] for number in random.integers(len(pairs), size=len(pairs))]
        medians = [
            np.median(np.concatenate([random.choice(pair[side], len(pair[side])) for pair in drawn])) for side in (0, 1)
        ]
        found.append(medians[1] / medians[0])
    own, other = (statistics.median(each for turn in side for each in turn) for side in (ours, theirs))
    return Interval(other / own, *np.quantile(found, [0.025, 0.975]).tolist())


def steps_to_pay(ours: Turns, theirs: Turns) -> float:
    """The step at which ours, whose start may take longer, has caught up with the other; infinite if never."""
    later = ours.start_seconds() - theirs.start_seconds()
    gained = theirs.step_seconds - ours.step_seconds
    if later <= 0:
        return 1.0
    return 1 + later / gained if gained > 0 else math.inf
