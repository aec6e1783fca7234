"""PNG files of a run's main curves, for papers."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.reports.charts import measured, planned_rates
from utils.reports.curves import WIDE_RANGE, smoothed, thinned
from utils.reports.records import RunRecord
from utils.runtime.atomic_files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER, TRAINING, SCHEDULE = "plots", "training_curves.png", "lr_schedule.png"
COLUMN_INCHES, DPI = 7.0, 200
FAINT, STRONG, OTHER = "#9db8dd", "#1f4e96", "#c2501a"  # also told apart in grey


def write_plots(record: RunRecord) -> None:
    """Writes `plots/training_curves.png` and `plots/lr_schedule.png`; each only if the run recorded what it shows."""
    if len(record.steps) == 0:
        return
    folder = record.folder / FOLDER
    folder.mkdir(exist_ok=True)
    _save(training_curves(record), folder / TRAINING)
    _save(schedule(record), folder / SCHEDULE)


def training_curves(record: RunRecord) -> "Figure":
    """Draws loss, validation loss, gradient norm and throughput over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(COLUMN_INCHES, 5.2), layout="constrained")
    loss, validation, norm, speed = figure.subplots(2, 2).ravel()
    metrics = record.metrics
    _raw_and_smoothed(loss, record.steps, metrics["train_loss"], "training loss")
    _raw_and_smoothed(norm, record.steps, metrics["grad_norm"], "gradient norm")
    _raw_and_smoothed(speed, record.steps, metrics["images_per_second"], "images per second")
    speed.set_ylim(bottom=0)
    for name, said, style in (("loss", "weights", "o-"), ("ema_loss", "their average", "s--")):
        columns, values = measured(record, name)
        if len(values):
            color = STRONG if name == "loss" else OTHER
            validation.plot(columns["step"], values, style, color=color, markersize=3, linewidth=1.2, label=said)
    _label(validation, "validation loss")
    if not validation.lines:
        validation.text(0.5, 0.5, "not measured", ha="center", va="center", transform=validation.transAxes)
    return figure


def schedule(record: RunRecord) -> "Figure":
    """Draws the learning rate as planned and as run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(COLUMN_INCHES, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(*thinned(record.steps, record.metrics["learning_rate"]), color=STRONG, linewidth=1.8, label="as run")
    planned = planned_rates(record)
    if planned is not None:
        axes.plot(*planned, "--", color=OTHER, linewidth=1.2, label="as planned")
    axes.set_ylim(bottom=0)
    _label(axes, "learning rate")
    return figure


def _raw_and_smoothed(axes: "Axes", steps: np.ndarray, values: np.ndarray, name: str) -> None:
    """Draws each step's value faintly, and their moving average."""
    axes.plot(*thinned(steps, values), color=FAINT, linewidth=0.7, label="each step")
    axes.plot(*thinned(steps, smoothed(values)), color=STRONG, linewidth=1.4, label="smoothed")
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0 and finite.max() / finite.min() > WIDE_RANGE:
        axes.set_yscale("log")
    _label(axes, name)


def _label(axes: "Axes", name: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(name)
    axes.grid(alpha=0.3)
    if len(axes.lines) > 1:
        axes.legend(fontsize="small")


def _save(figure: "Figure", file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with replacing(file) as aside:
        figure.savefig(aside, dpi=DPI, format="png")
