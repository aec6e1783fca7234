"""Statistics of many turns: medians, spreads, ratios with intervals, and when a longer start has paid off."""

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
    """A value and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Turns:
    """The turns of a contestant, with one record of benchmarks/launch.py each.

    Attributes:
        warm_up: number of steps at the start of each turn that don't count, including the first.
        batch: samples per step.
    """

    records: Sequence[dict[str, Any]]
    warm_up: int
    batch: int

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Returns the steps that count, of all turns."""
        return [step for record in self.records for step in record["steps"][self.warm_up :]]

    @property
    def seconds_by_turn(self) -> list[list[float]]:
        """Returns the seconds of each step that counts, by turn; on a GPU, between events of its stream."""
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
        """Returns median, 10th and 90th percentile over the steps."""
        rates = sorted(self.batch / each for turn in self.seconds_by_turn for each in turn)
        return statistics.median(rates), quantile(rates, 0.1), quantile(rates, 0.9)

    def phase_seconds(self, phase: str) -> float:
        """Returns the mean seconds of a phase per step."""
        return statistics.fmean(step["phases"].get(phase, 0.0) for step in self.steps)

    def share(self, seconds: float) -> float:
        """Returns the share of `seconds` in the mean time of a step, by the host's clock."""
        return seconds / statistics.fmean(step["seconds"] for step in self.steps)

    @property
    def outside_seconds(self) -> float:
        """Returns the time of a step outside forward, backward, optimizer and EMA."""
        return statistics.fmean(
            step["seconds"] - sum(step["phases"].get(phase, 0.0) for phase in COMPUTING) for step in self.steps
        )

    @property
    def host_seconds(self) -> float:
        """Returns Python's own time per step: without waiting for a GPU or data, or on a CPU without computing."""
        blocked = self.phase_seconds("blocked") + self.phase_seconds("data")
        if any(record["device_seconds"] for record in self.records):
            return statistics.fmean(step["seconds"] for step in self.steps) - blocked
        computed = sum(self.phase_seconds(phase) for phase in PHASES)
        return statistics.fmean(step["seconds"] for step in self.steps) - computed

    @property
    def synchronising(self) -> float:
        """Returns the number of synchronising calls per step."""
        return statistics.fmean(step["calls"].get("synchronising", 0) for step in self.steps)

    @property
    def memory(self) -> int:
        """Returns the peak memory in bytes during training."""
        return max(record["memory"]["steps"] for record in self.records)

    def start_seconds(self, part: str | None = None) -> float:
        """Returns the median time from the command to the end of the first step, or of a part of it."""
        if part == "main":
            return statistics.median(record["main_seconds"] for record in self.records)
        first = [record["steps"][0] for record in self.records]
        return statistics.median(step["seconds"] if part is None else step["phases"].get(part, 0.0) for step in first)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Returns a quantile of sorted values, with linear interpolation."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def ratio(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """Returns the speed of ours relative to theirs, by median seconds, with a bootstrap over rounds and their steps.

    Turns of a round ran one after the other, so the bootstrap draws both sides of a round together.
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
    """Returns the step at which ours has caught up despite a longer start; infinite if never."""
    later = ours.start_seconds() - theirs.start_seconds()
    gained = theirs.step_seconds - ours.step_seconds
    if later <= 0:
        return 1.0
    return 1 + later / gained if gained > 0 else math.inf
