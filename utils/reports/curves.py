"""Curves as inline SVG: axes, raw values faint, smoothed values strong, every spike kept."""

import itertools
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from utils.config.terminal import visible

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 36
MOST_POINTS = 600  # of a curve
WIDE_RANGE = 100.0  # ratio between the 99 % and 1 % quantiles above which an axis is logarithmic
SMOOTHED_SHARE = 25  # a smoothed curve averages over about one 25th of the run
TICKS = 5


class Series(NamedTuple):
    """A curve of a chart.

    Attributes:
        name: what the legend calls it.
        x, y: [N] numbers; gaps where y is not finite.
        colour: number of its colour, from 0.
        kind: raw (faint), line, dashed, or points (a line with a mark at each value).
        in_legend: whether the legend lists it.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    kind: str = "line"
    in_legend: bool = True


def smoothed(values: np.ndarray) -> np.ndarray:
    """Returns an exponential moving average, [N], without the bias of its start (as in Adam, arXiv 1412.6980).

    Values that are not finite are left out of it, and stay gaps.
    """
    span = min(max(len(values) / SMOOTHED_SHARE, 5.0), 500.0)
    decay, total, weight = 1 - 2 / (span + 1), 0.0, 0.0
    found = np.full(len(values), math.nan)
    for place, value in enumerate(values.tolist()):
        if math.isfinite(value):
            total = decay * total + (1 - decay) * value
            weight = decay * weight + (1 - decay)
            found[place] = total / weight
    return found


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Returns at most `most` points of a curve: the least and the greatest value of each of most / 2 bins, in order.

    First and last value are kept. A bin without a finite value keeps one gap.
    """
    if len(x) <= most:
        return x, y
    edges = np.linspace(0, len(x), most // 2).astype(int)
    kept = {0, len(x) - 1}
    for start, stop in itertools.pairwise(edges):
        part = y[start:stop]
        finite = np.flatnonzero(np.isfinite(part))
        if len(finite) == 0:
            kept.add(int(start))
            continue
        kept |= {int(start + finite[part[finite].argmin()]), int(start + finite[part[finite].argmax()])}
    chosen = np.array(sorted(kept))
    return x[chosen], y[chosen]


def number(value: float | None, digits: int = 4) -> str:
    """Returns a number with some significant digits; "-" if it is not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    if abs(value) >= 1000 and value == round(value):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def short_number(value: float) -> str:
    """Returns a number for an axis: 10k, 1.5M, 0.02, 1e-5."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    text = f"{value:.4g}"
    if "e" in text:
        head, _, exponent = text.partition("e")
        return f"{head}e{int(exponent)}"
    return text


def ticks(low: float, high: float) -> list[float]:
    """Returns round numbers between two numbers."""
    if not high > low:
        return [low]
    rough = (high - low) / TICKS
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns powers of ten between two positive numbers, and 2 and 5 times these if there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(exponents) // TICKS)
    factors = (1, 2, 5) if len(exponents) <= 3 else (1,)
    found = [factor * 10.0**exponent for exponent in list(exponents)[::every] for factor in factors]
    return [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)] or [low]


class Axis(NamedTuple):
    """An axis: from its numbers to pixels."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def pixels(self, values: np.ndarray) -> np.ndarray:
        """Returns the places of values on it, [N]."""
        low, high = self.low, self.high
        if self.is_log:
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.log10(values)
            low, high = math.log10(low), math.log10(high)
        return self.start + (values - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Returns the numbers to write at it."""
        return log_ticks(self.low, self.high) if self.is_log else ticks(self.low, self.high)


def _x_axis(series: Sequence[Series]) -> Axis | None:
    every = np.concatenate([each.x[np.isfinite(each.x)] for each in series])
    if len(every) == 0:
        return None
    low, high = float(every.min()), float(every.max())
    return Axis(low, high if high > low else low + 1, LEFT, WIDTH - RIGHT)


def _y_axis(series: Sequence[Series], from_zero: bool) -> Axis | None:
    every = np.concatenate([each.y[np.isfinite(each.y)] for each in series])
    if len(every) == 0:
        return None
    low, high = float(every.min()), float(every.max())
    if low > 0 and not from_zero:
        least, most = np.quantile(every, (0.01, 0.99))
        if most / least > WIDE_RANGE or high / low > WIDE_RANGE**2:
            return Axis(low, high, HEIGHT - BOTTOM, TOP, is_log=True)
    if from_zero:
        low = min(low, 0.0)
    margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(low if from_zero and low == 0 else low - margin, high + margin, HEIGHT - BOTTOM, TOP)


def chart(title: str, series: Sequence[Series], x_label: str, from_zero: bool = False) -> str:
    """Returns a chart as SVG whose texts are escaped; an empty text if there is nothing to draw.

    Args:
        from_zero: whether the vertical axis begins at 0.
    """
    shown = [each for each in series if np.isfinite(each.y).any() and np.isfinite(each.x).any()]
    if not shown:
        return ""
    horizontal, vertical = _x_axis(shown), _y_axis(shown, from_zero)
    if horizontal is None or vertical is None:
        return ""
    label = escape(visible(title))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label} over {escape(x_label)}">']
    # Grid and axes.
    for value, place in zip(vertical.ticks(), vertical.pixels(np.array(vertical.ticks())), strict=True):
        parts.append(f'<path class="grid" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{place + 4:.1f}" class="end">{short_number(value)}</text>')
    for value, place in zip(horizontal.ticks(), horizontal.pixels(np.array(horizontal.ticks())), strict=True):
        parts.append(f'<path class="grid" d="M{place:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{place:.1f}" y="{HEIGHT - BOTTOM + 15}" class="mid">{short_number(value)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" class="mid">{escape(x_label)}</text>')
    # Curves: the faint ones below, the dashed ones above.
    for each in sorted(shown, key=lambda each: ("raw", "line", "points", "dashed").index(each.kind)):
        parts += _drawn(each, horizontal, vertical)
    return "".join([*parts, "</svg>"])


def _drawn(series: Series, horizontal: Axis, vertical: Axis) -> list[str]:
    """The SVG elements of a curve."""
    x, y = thinned(series.x, series.y)
    points = [*zip(horizontal.pixels(x).tolist(), vertical.pixels(y).tolist(), strict=True)]
    path, is_gap = [], True
    for across, down in points:
        if not (math.isfinite(across) and math.isfinite(down)):
            is_gap = True
            continue
        path.append(f"{'M' if is_gap else 'L'}{across:.1f} {down:.1f}")
        is_gap = False
    colour = series.colour % 8
    parts = [f'<path class="{series.kind} c{colour}" d="{"".join(path)}"/>']
    if series.kind == "points" or len(path) == 1:
        whole = [(across, down) for across, down in points if math.isfinite(across) and math.isfinite(down)]
        if len(whole) <= 60:
            parts += [f'<circle class="f{colour}" cx="{across:.1f}" cy="{down:.1f}" r="3"/>' for across, down in whole]
    return parts
