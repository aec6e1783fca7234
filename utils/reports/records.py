"""Reads the records of a run's folder: options, metrics, measurements, samples, verdict.

Any of them may be missing, damaged, half written or written by an earlier release: what can be read is shown.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.config.options import UserError
from utils.config.user_files import read_json
from utils.runtime.step_lines import read_line, whole_lines

METRICS = (
    *("time", "samples_seen", "epoch", "train_loss", "grad_norm", "learning_rate", "images_per_second", "data_wait"),
    *("host_memory_gb", "device_memory_gb", "device_allocated_gb", "device_reserved_gb"),
)
"""Numbers of a line of metrics.jsonl that are shown."""
EPOCHS = ("epoch", "min", "max", "mean")
MOST_LINES = 1_000_000  # of metrics.jsonl; of a longer file every n-th line is read
USUAL_LINE = 150  # bytes: fewer than a line of metrics.jsonl has, to estimate the number of lines from below
MOST_MEASUREMENTS = 5_000  # lines of files that are written now and then; the last ones are kept
MOST_SAMPLES = 64  # images of a step
PAUSE_SECONDS = 3600.0  # between steps: longer ones are between a run and its continuation, and do not count as hours
FILE_CLOCK_SECONDS = 60.0  # by which the clock of a file server may be late
STEP_FOLDER = re.compile(r"step-(\d{1,18})")
SAMPLES, FINAL, BASE, SAMPLE_LINES, GRID_RECORD = "samples", "final", "base", "samples.jsonl", "samples.json"
BASE_STEP = -1
NOT_SAMPLES = ("grid.png", "film_strip.png")
VERDICT = "verdict.json"
SHEET, MODEL_SUMMARY, LAYER_STATISTICS = "contact_sheet.png", "model_summary.json", "layer_statistics.jsonl"


class Samples(NamedTuple):
    """The samples drawn after a step.

    Attributes:
        step: the step; None for the last ones, of the result; BASE_STEP for those of the base where step 0 is not it.
        label: what to call them.
        files: PNG files by name.
    """

    step: int | None
    label: str
    files: Mapping[str, Path]


@dataclass(frozen=True)
class RunRecord:
    """What the folder of a run says about it.

    Attributes:
        folder: the folder.
        name: what the run is called in a report of several.
        run: run.json.
        metrics: [N] float64 by name, of metrics.jsonl, with `step` and `hours`; NaN where a line has no such number.
        epochs: the same of epochs.jsonl.
        validation: lines of validation.jsonl.
        evaluation: lines of evaluation/evaluation.jsonl.
        layers: lines of layer_statistics.jsonl.
        verdict: verdict.json.
        model: model_summary.json.
        data: data_report.json.
        samples: drawn samples, by step; the last ones are those of the result.
        captions: what a sample shows, by its file's name.
        stride: every how many lines of metrics.jsonl were read.
    """

    folder: Path
    name: str
    run: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, np.ndarray] = field(default_factory=dict)
    epochs: Mapping[str, np.ndarray] = field(default_factory=dict)
    validation: Sequence[Mapping[str, Any]] = ()
    evaluation: Sequence[Mapping[str, Any]] = ()
    layers: Sequence[Mapping[str, Any]] = ()
    verdict: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Samples] = ()
    captions: Mapping[str, str] = field(default_factory=dict)
    stride: int = 1

    @property
    def steps(self) -> np.ndarray:
        """The steps of the metrics, [N] ascending."""
        return self.metrics["step"]

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None if not recorded."""
        total = self.run.get("total_steps")
        return total if type(total) is int and total > 0 else None

    @property
    def state(self) -> str:
        """The state of the run: running, finished, stopped, diverged or failed; unknown for earlier releases."""
        outcome = as_dict(self.run.get("outcome"))
        state = self.run.get("state")
        if isinstance(state, str):
            return state
        return ("diverged" if outcome.get("diverged") else "finished") if outcome else "unknown"

    def sheet(self) -> Path | None:
        """The contact sheet of the training images, if there is one."""
        file = self.folder / SHEET
        return file if file.is_file() else None


def read_run(folder: Path, name: str = "") -> RunRecord:
    """Reads the records of a run's folder.

    Raises:
        UserError: if it has none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the output_dir of a run")
    if not any((folder / each).is_file() for each in ("run.json", "metrics.jsonl")):
        raise UserError(f"{folder} has neither run.json nor metrics.jsonl; give the output_dir of a run")
    metrics, stride = _read_columns(folder / "metrics.jsonl", METRICS)
    run = _read_object(folder / "run.json")
    samples = find_samples(folder / SAMPLES, run)
    return RunRecord(
        folder=folder,
        name=name or folder.resolve().name,
        run=run,
        metrics=metrics | {"hours": hours_of(metrics["time"])},
        epochs=_read_columns(folder / "epochs.jsonl", EPOCHS)[0],
        validation=_read_lines(folder / "validation.jsonl"),
        evaluation=_read_lines(folder / "evaluation" / "evaluation.jsonl"),
        layers=_read_lines(folder / LAYER_STATISTICS),
        verdict=_read_object(folder / VERDICT),
        model=_read_object(folder / MODEL_SUMMARY),
        data=_read_object(folder / "data_report.json"),
        samples=samples,
        captions=_captions(folder / SAMPLES, samples),
        stride=stride,
    )


def as_dict(value: object) -> dict[str, Any]:
    """Returns the value if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_number(value: object) -> float:
    """Returns the value as a float; NaN if it is no number."""
    return float(value) if type(value) in (int, float) else math.nan


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON file's object; empty if it is missing or can't be read."""
    try:
        return as_dict(read_json(file))
    except (OSError, ValueError, UserError):
        return {}


def _lines(file: Path) -> Iterator[bytes]:
    """The whole lines of a file, as far as it can be read."""
    with suppress(OSError, ValueError, UserError):
        yield from whole_lines(file)


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """The last lines of a file, sorted by step."""
    found = [values for line in _lines(file) if (values := read_line(line)) is not None]
    return sorted(found, key=lambda values: values["step"])[-MOST_MEASUREMENTS:]


def _read_columns(file: Path, names: Sequence[str]) -> tuple[dict[str, np.ndarray], int]:
    """Reads numbers of lines by step: ([N] by name with `step`, every how many lines were read)."""
    try:
        stride = 1 + file.stat().st_size // (USUAL_LINE * MOST_LINES)
    except OSError:
        stride = 1
    rows = []
    for number, line in enumerate(_lines(file)):
        values = read_line(line) if number % stride == 0 else None
        if values is not None:
            rows.append([as_number(values.get(name)) for name in ("step", *names)])
    table = np.array(rows, dtype=np.float64).reshape(len(rows), 1 + len(names))
    table = table[np.argsort(table[:, 0], kind="stable")]
    return dict(zip(("step", *names), table.T, strict=True)), stride


def hours_of(times: np.ndarray) -> np.ndarray:
    """Returns the hours of training at each step, [N], from Unix times; pauses between parts of a run don't count."""
    passed = np.diff(times, prepend=times[:1])
    return np.cumsum(np.where((passed > PAUSE_SECONDS) | (passed < 0), 0.0, passed)) / 3600


def find_samples(folder: Path, run: Mapping[str, Any]) -> list[Samples]:
    """Returns the samples in a folder, by step, without those that an earlier run left there.

    Args:
        run: run.json.
    """
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        number = STEP_FOLDER.fullmatch(path.name)
        step = BASE_STEP if path.name == BASE else None if number is None else int(number[1])
        if (step is None and path.name != FINAL) or _is_outdated(path, step, run):
            continue
        files = {file.name: file for file in sorted(path.glob("*.png")) if file.name not in NOT_SAMPLES}
        first = dict(list(files.items())[:MOST_SAMPLES])
        if first:
            named = {None: "result", BASE_STEP: "base", 0: "before training"}
            found.append(Samples(step, named.get(step, f"step {step}"), first))
    return sorted(found, key=lambda each: math.inf if each.step is None else each.step)


def _is_outdated(path: Path, step: int | None, run: Mapping[str, Any]) -> bool:
    """Whether samples are older than the run, which did not resume from them."""
    started, first_step = as_number(run.get("started")), as_number(run.get("first_step"))
    if step is not None and not (step > first_step or (step == first_step == 0)):
        return False
    try:
        return path.stat().st_mtime < started - FILE_CLOCK_SECONDS
    except OSError:
        return True


def _captions(folder: Path, samples: Sequence[Samples]) -> dict[str, str]:
    """The prompt or class of each sample by its file's name, as far as records beside the samples say it."""
    found = {}
    for values in _read_lines(folder / SAMPLE_LINES):
        file, prompt = values.get("file"), values.get("prompt")
        if isinstance(file, str) and isinstance(prompt, str):
            found[Path(file).name] = prompt
    for each in samples:
        record = _read_object(next(iter(each.files.values())).parent / GRID_RECORD).get("samples")
        for values in map(as_dict, record if isinstance(record, list) else []):
            if isinstance(values.get("file"), str) and isinstance(values.get("of"), str):
                found[values["file"]] = values["of"]
    return found
