"""Which charts a report shows, of one run or of several laid over each other."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from utils.reports.curves import Series, chart, number, smoothed
from utils.reports.records import RunRecord, as_dict, as_number

AXES = {"steps": ("step", "step"), "samples": ("samples_seen", "training samples seen"), "hours": ("hours", "hours")}
"""By name: the column, and its label."""
MOST_CURVE = 1000  # timesteps of the validation loss


class Shown(NamedTuple):
    """A chart of the page.

    Attributes:
        title: what it shows.
        svgs: the chart by horizontal axis, see AXES; or one under "".
        legend: (colour, kind, name) of its curves.
        facts: numbers in words, below it.
    """

    title: str
    svgs: Mapping[str, str]
    legend: Sequence[tuple[int, str, str]]
    facts: Sequence[str]


class Curve(NamedTuple):
    """A curve before its horizontal axis is chosen: the columns of its axis by name, and its values, [N] each."""

    name: str
    columns: Mapping[str, np.ndarray]
    y: np.ndarray
    colour: int = 0
    kind: str = "line"
    in_legend: bool = True


def over_axes(title: str, curves: Sequence[Curve], facts: Sequence[str] = (), from_zero: bool = False) -> Shown | None:
    """Returns a chart over steps, samples and hours; None if there is nothing to draw."""
    svgs = {}
    for axis, (column, label) in AXES.items():
        series = [
            Series(each.name, each.columns[column], each.y, each.colour, each.kind)
            for each in curves
            if column in each.columns
        ]
        svgs[axis] = chart(title, series, label, from_zero)
    if not svgs["steps"]:
        return None
    for axis, svg in svgs.items():
        svgs[axis] = svg or '<p class="none">not recorded by this run</p>'
    legend = [(each.colour % 8, each.kind, each.name) for each in curves if each.in_legend]
    return Shown(title, svgs, legend if len(legend) > 1 else [], facts)


def training_charts(records: Sequence[RunRecord]) -> list[Shown]:
    """Returns the charts of what each step and each measurement recorded."""
    found = [
        _loss(records),
        _validation(records, "Validation loss", ("loss", "ema_loss")),
        _validation(records, "Validation loss relative to the first measurement", ("relative_loss",)),
        _learning_rate(records),
        _gradients(records),
        _skipped(records),
        _column(records, "Throughput in images per second", "images_per_second", is_smoothed=True),
        _column(records, "Share of time spent waiting for data", "data_wait", is_smoothed=True),
        _memory(records),
        _epochs(records),
    ]
    return [each for each in found if each is not None]


def _names(records: Sequence[RunRecord], what: Sequence[str]) -> list[str]:
    """The names of a chart's curves: those of runs if there are several."""
    if len(records) == 1:
        return list(what)
    return [record.name if len(what) == 1 else f"{record.name}: {each}" for record in records for each in what]


def _loss(records: Sequence[RunRecord]) -> Shown | None:
    curves, facts = [], []
    for colour, record in enumerate(records):
        values = record.metrics["train_loss"]
        is_one = len(records) == 1
        curves.append(Curve("each step", record.metrics, values, colour, "raw", is_one))
        curves.append(Curve("smoothed" if is_one else record.name, record.metrics, smoothed(values), colour))
        facts += _facts(record, values, smoothed(values), len(records) > 1)
    return over_axes("Training loss", curves, facts)


def _facts(record: RunRecord, values: np.ndarray, smooth: np.ndarray, is_named: bool) -> list[str]:
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) == 0:
        return []
    last, least = finite[-1], finite[values[finite].argmin()]
    before = f"{record.name}: " if is_named else ""
    return [
        f"{before}last {number(values[last])} at step {number(record.steps[last])} (smoothed {number(smooth[last])}), "
        f"least {number(values[least])} at step {number(record.steps[least])}"
    ]


def measured(record: RunRecord, name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns the columns of a value of validation.jsonl, and the value, [N] each; axes it lacks are looked up."""
    lines = [line for line in record.validation if math.isfinite(as_number(line.get(name)))]
    steps = np.array([as_number(line.get("step")) for line in lines])
    columns = {"step": steps}
    for column in ("samples_seen", "hours"):
        known = record.metrics[column]
        if len(known) and np.isfinite(known).all() and len(steps):
            columns[column] = np.interp(steps, np.r_[0.0, record.steps], np.r_[0.0, known])
    return columns, np.array([as_number(line.get(name)) for line in lines])


def _validation(records: Sequence[RunRecord], title: str, names: Sequence[str]) -> Shown | None:
    curves, facts, words = [], [], {"loss": "weights", "ema_loss": "their average", "relative_loss": "relative loss"}
    for place, record in enumerate(records):
        for number_of_name, name in enumerate(names):
            columns, values = measured(record, name)
            if len(values) == 0:
                continue
            said = words[name] if len(records) == 1 else record.name + ("" if name != "ema_loss" else ", average")
            if len(records) == 1:
                curves.append(Curve(said, columns, values, number_of_name, "points"))
            else:
                curves.append(Curve(said, columns, values, place, "dashed" if name == "ema_loss" else "points"))
            best = int(values.argmin())
            facts.append(
                f"{said}: last {number(values[-1])} at step {number(columns['step'][-1])}, "
                f"least {number(values[best])} at step {number(columns['step'][best])}"
            )
    return over_axes(title, curves, facts)


def _learning_rate(records: Sequence[RunRecord]) -> Shown | None:
    curves, facts, is_one = [], [], len(records) == 1
    for colour, record in enumerate(records):
        planned = planned_rates(record)
        if is_one and planned is not None:
            columns = {"step": planned[0]}
            batch = as_number(record.run.get("global_batch"))
            if math.isfinite(batch) and record.run.get("first_step") == 0:
                columns["samples_seen"] = planned[0] * batch
            curves.append(Curve("as planned", columns, planned[1], 1, "dashed"))
        rates = record.metrics["learning_rate"]
        curves.append(Curve("as run" if is_one else record.name, record.metrics, rates, colour))
        if len(rates):
            said = f"last {number(rates[-1])}, largest {number(float(np.nanmax(np.r_[rates, 0.0])))}"
            facts.append(said if is_one else f"{record.name}: {said}")
    return over_axes("Learning rate", curves, facts, from_zero=True)


def planned_rates(record: RunRecord) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the steps and the learning rates that were planned, [N] each; None if not recorded."""
    planned = as_dict(record.run.get("planned_learning_rates"))
    steps, rates = planned.get("steps"), planned.get("rates")
    if not (isinstance(steps, list) and isinstance(rates, list) and 0 < len(steps) == len(rates)):
        return None
    return np.array([as_number(each) for each in steps]), np.array([as_number(each) for each in rates])


def num_skipped(record: RunRecord) -> int:
    """Returns the number of steps that were skipped, as their loss or gradient was not finite.

    The outcome counts those of the whole run; until it is known, the steps without a finite number are counted.
    """
    known = as_dict(record.run.get("outcome")).get("skipped_steps")
    if type(known) is int:
        return known
    return int(_lost(record).sum())


def _lost(record: RunRecord) -> np.ndarray:
    """Whether each step has no finite loss or gradient norm, [N]."""
    return ~(np.isfinite(record.metrics["train_loss"]) & np.isfinite(record.metrics["grad_norm"]))


def _skipped(records: Sequence[RunRecord]) -> Shown | None:
    """A chart of the steps without a finite loss and gradient, added up; None if there are none."""
    counts = [np.cumsum(_lost(record)).astype(float) for record in records]
    if not any(count.any() for count in counts):
        return None
    curves = [Curve(each.name, each.metrics, counts[place], place) for place, each in enumerate(records)]
    return over_axes("Steps without a finite loss and gradient, in total", curves, from_zero=True)


def _gradients(records: Sequence[RunRecord]) -> Shown | None:
    curves, facts, is_one = [], [], len(records) == 1
    for colour, record in enumerate(records):
        values = record.metrics["grad_norm"]
        if is_one:
            curves.append(Curve("each step", record.metrics, values, colour, "raw"))
        curves.append(Curve("smoothed" if is_one else record.name, record.metrics, smoothed(values), colour))
        said = f"{num_skipped(record):,} steps without a finite loss and gradient"
        facts.append(said if is_one else f"{record.name}: {said}")
    return over_axes("Gradient norm before clipping", curves, facts)


def _column(records: Sequence[RunRecord], title: str, name: str, is_smoothed: bool) -> Shown | None:
    curves, facts, is_one = [], [], len(records) == 1
    for colour, record in enumerate(records):
        values = record.metrics[name]
        if is_one and is_smoothed:
            curves.append(Curve("each step", record.metrics, values, colour, "raw"))
        shown = smoothed(values) if is_smoothed else values
        curves.append(Curve("smoothed" if is_one else record.name, record.metrics, shown, colour))
        finite = values[np.isfinite(values)]
        if len(finite):
            said = f"median {number(float(np.median(finite)))}, last {number(finite[-1])}"
            facts.append(said if is_one else f"{record.name}: {said}")
    return over_axes(title, curves, facts, from_zero=True)


def _memory(records: Sequence[RunRecord]) -> Shown | None:
    kinds = {
        "host_memory_gb": "host",
        "device_memory_gb": "device, peak",
        "device_reserved_gb": "device, reserved",
        "device_allocated_gb": "device, allocated",
    }
    curves, facts, is_one = [], [], len(records) == 1
    for place, record in enumerate(records):
        for colour, (name, said) in enumerate(kinds.items()):
            values = record.metrics[name]
            if not np.isfinite(values).any() or (not is_one and colour > 1):
                continue
            whole = said if is_one else f"{record.name}: {said}"
            kind = "dashed" if colour == 0 and not is_one else "line"
            curves.append(Curve(whole, record.metrics, values, colour if is_one else place, kind))
            facts.append(f"{whole} at most {number(float(np.nanmax(values)))} GB")
    return over_axes("Memory in GB", curves, facts, from_zero=True)


def _epochs(records: Sequence[RunRecord]) -> Shown | None:
    curves = []
    if len(records) == 1 and len(records[0].epochs["step"]) > 1:
        epochs = records[0].epochs
        columns = {"step": epochs["step"]}
        for colour, name in enumerate(("mean", "min", "max")):
            curves.append(Curve(name, columns, epochs[name], colour, "points" if name == "mean" else "dashed"))
    return over_axes("Training loss by epoch", curves)


def timestep_chart(records: Sequence[RunRecord]) -> Shown | None:
    """Returns the validation loss over the timesteps: at first, at best and last; of several runs, the last."""
    series, legend = [], []
    for place, record in enumerate(records):
        lines = [line for line in record.validation if _curve_of(line) is not None]
        if not lines:
            continue
        best = min(lines[1:] or lines, key=lambda line: as_number(line.get("ema_loss", line.get("loss"))))
        first = "before training" if lines[0].get("step") == 0 else f"step {lines[0].get('step')}"
        chosen = {f"best, step {best.get('step')}": best, f"last, step {lines[-1].get('step')}": lines[-1]}
        shown = {first: lines[0], **chosen} if len(records) == 1 else {record.name: lines[-1]}
        if best is lines[-1] and len(records) == 1:
            shown.pop(f"best, step {best.get('step')}", None)
        for offset, (name, line) in enumerate(shown.items()):
            values = _curve_of(line)
            colour, kind = (offset, "dashed" if offset == 0 and len(shown) > 1 else "points")
            colour = colour if len(records) == 1 else place
            places = (np.arange(len(values)) + 0.5) / len(values)
            series.append(Series(name, 100 * places, values, colour, kind))
            legend.append((colour % 8, kind, name))
    svg = chart("Validation loss over the timesteps", series, "timestep, in % of all (0: no noise, 100: only noise)")
    return Shown("Validation loss over the timesteps", {"": svg}, legend, ()) if svg else None


def _curve_of(line: Mapping[str, Any]) -> np.ndarray | None:
    """The loss at each timestep, [T]; None if the line has none."""
    values = line.get("ema_curve") or line.get("curve")
    if not isinstance(values, list) or not 0 < len(values) <= MOST_CURVE:
        return None
    return np.array([as_number(value) for value in values])


def evaluation_charts(records: Sequence[RunRecord]) -> list[Shown]:
    """Returns a chart of each score of evaluation.jsonl over the steps."""
    values: dict[str, dict[int, tuple[list[float], list[float]]]] = {}
    for place, record in enumerate(records):
        for line in record.evaluation:
            for name, score in as_dict(line.get("scores")).items():
                value = as_number(as_dict(score).get("value"))
                if math.isfinite(value):
                    steps, scores = values.setdefault(str(name), {}).setdefault(place, ([], []))
                    steps.append(as_number(line.get("step")))
                    scores.append(value)
    found = []
    for name, by_run in values.items():
        series = [
            Series(records[place].name, np.array(x), np.array(y), place, "points") for place, (x, y) in by_run.items()
        ]
        legend = [(place % 8, "points", records[place].name) for place in by_run] if len(records) > 1 else []
        svg = chart(name, series, "step")
        last = [
            f"{records[place].name}: " * (len(records) > 1) + f"last {number(y[-1])}"
            for place, (_, y) in by_run.items()
        ]
        found.append(Shown(name, {"": svg}, legend, last))
    return found
