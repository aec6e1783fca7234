"""The tables and texts of a report: verdict, headline numbers, options, layers, the model's parts, the data."""

import math
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from utils.config.terminal import json_text
from utils.config.user_files import size_text
from utils.evaluation.judging import LEARNING
from utils.reports.charts import num_skipped
from utils.reports.curves import number, smoothed
from utils.reports.records import RunRecord, as_dict, as_number

STATES = ("running", "finished", "stopped", "diverged", "failed")
MOST_ROWS = 1000  # layers, options
LONGEST = 400  # characters of a value
RECENT_STEPS = 100  # steps whose speed is shown


def short_text(value: object) -> str:
    """Returns a value as a text of bounded length: strings as they are, the rest as JSON."""
    text = value if isinstance(value, str) else "none" if value is None else json_text(value, other=str)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def duration(seconds: float) -> str:
    """Returns a time in words, such as 1:02:03."""
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) and seconds >= 0 else "-"


def verdict_of(record: RunRecord) -> dict[str, Any] | None:
    """Returns the verdict as texts and a style; None without one."""
    found = record.verdict
    word = found.get("verdict")
    if not isinstance(word, str):
        outcome = as_dict(record.run.get("outcome"))
        why = outcome.get("diverged")
        return {"word": "diverged", "style": "bad", "lines": [short_text(why)], "facts": []} if why else None
    evidence = found.get("evidence")
    lines = [short_text(line) for line in evidence[:20]] if isinstance(evidence, list) else []
    facts = []
    interval = found.get("interval")
    if isinstance(interval, list) and len(interval) == 2:
        low, high = (number(as_number(each)) for each in interval)
        signal = found.get("signal")
        of = f" of {short_text(signal)}" if isinstance(signal, str) else ""
        if low != "-" or high != "-":
            facts.append((f"95 % interval{of}", f"{low} to {high}"))
    for key, name in (("since_step", "since step"), ("best_checkpoint", "best checkpoint"), ("advice", "change this")):
        if found.get(key) not in (None, ""):
            facts.append((name, short_text(found[key])))
    signals = [(name, as_number(value)) for name, value in as_dict(found.get("signals")).items()]
    shown = ", ".join(f"{short_text(name)} {number(value)}" for name, value in signals[:40] if math.isfinite(value))
    if shown:
        facts.append(("signals", shown))
    return {"word": short_text(word), "style": "good" if word == LEARNING else "bad", "lines": lines, "facts": facts}


def headline(record: RunRecord) -> list[tuple[str, str]]:
    """Returns the numbers that say at a glance where the run stands, by name."""
    metrics, facts = record.metrics, []
    steps, total = record.steps, record.total_steps
    done = int(steps[-1]) if len(steps) else 0
    facts.append(("state", state_text(record)))
    facts.append(("step", f"{done:,}" + (f" of {total:,}" if total else "")))
    hours, samples = last(metrics["hours"]), last(metrics["samples_seen"])
    facts.append(("time", duration(hours * 3600)))
    speed = recent(metrics["images_per_second"])
    facts.append(("images per second", number(speed)))
    facts.append(("samples seen", number(samples)))
    batch = as_number(record.run.get("global_batch"))
    if record.state == "running" and total and speed > 0 and math.isfinite(batch):
        facts.append(("time left", duration((total - done) * batch / speed)))
    facts.append(("training loss", number(last(smoothed(metrics["train_loss"])))))
    losses = [(as_number(each.get("ema_loss", each.get("loss"))), each.get("step")) for each in record.validation]
    losses = [pair for pair in losses if math.isfinite(pair[0])]
    if losses:
        facts.append(("validation loss", f"{number(losses[-1][0])} (least {number(min(losses)[0])})"))
        if losses[0][1] == 0 and losses[0][0] > 0:
            facts.append(("against before training", f"{100 * (losses[-1][0] / losses[0][0] - 1):+.1f} %"))
    skipped = num_skipped(record)
    if skipped:
        facts.append(("skipped steps", f"{skipped:,}"))
    peak = metrics["device_memory_gb"]
    peak = peak[np.isfinite(peak)]
    facts += [("device memory", f"{number(float(peak.max()))} GB at most")] if len(peak) else []
    return [(name, value) for name, value in facts if value != "-"]


def state_text(record: RunRecord) -> str:
    """Returns the state of a run, with the reason or the age of its last record."""
    state = record.state if record.state in STATES else "unknown"
    if state == "running":
        moment = last(record.metrics["time"])
        age = time.time() - moment
        if math.isfinite(age) and age > 600:
            return f"running, or ended without a word: last record {duration(age)} ago"
    why = record.run.get("ended_because")
    return f"{state}: {short_text(why)}" if isinstance(why, str) and why else state


def last(values: np.ndarray) -> float:
    """Returns the last finite value; NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else math.nan


def recent(values: np.ndarray) -> float:
    """Returns the median of the last values; NaN if none is finite."""
    finite = values[np.isfinite(values)][-RECENT_STEPS:]
    return float(np.median(finite)) if len(finite) else math.nan


def option_rows(record: RunRecord) -> list[tuple[str, str, str]]:
    """Returns (flag, value, default) of the options that differ from their defaults.

    A record of an earlier release does not say the defaults: all its options that are not null are returned.
    """
    changed = record.run.get("changed_options")
    if isinstance(changed, dict):
        rows = [(name, as_dict(each)) for name, each in changed.items()]
        return [
            (f"--{short_text(name)}", short_text(each.get("value")), short_text(each.get("default")))
            for name, each in rows[:MOST_ROWS]
        ]
    options = as_dict(record.run.get("options"))
    rows = [(name, value) for name, value in options.items() if value is not None]
    return [(f"--{short_text(name)}", short_text(value), "") for name, value in rows[:MOST_ROWS]]


def differing_options(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Returns (flag, its value in each run) of the options in which runs differ."""
    every = [as_dict(record.run.get("options")) for record in records]
    names = dict.fromkeys(name for options in every for name in options)
    rows = []
    for name in names:
        values = [short_text(options[name]) if name in options else "not recorded" for options in every]
        if len(set(values)) > 1:
            rows.append((f"--{short_text(name)}", values))
    return rows[:MOST_ROWS]


def layer_rows(record: RunRecord) -> dict[str, Any] | None:
    """Returns the statistics of each layer at the last measurement, with the change of its norm since the first.

    Returns:
        {"step", "first_step", "rows": [(layer, values as texts)], "dead": number of layers with a dead weight}.
    """
    if not record.layers:
        return None
    first, now = record.layers[0], record.layers[-1]
    before, layers = as_dict(first.get("layers")), as_dict(now.get("layers"))
    rows, dead = [], 0
    for name, values in list(layers.items())[:MOST_ROWS]:
        numbers = _eight(values)
        start = _eight(before.get(name))[2]
        change = numbers[2] / start - 1 if start > 0 else math.nan
        dead += numbers[3] > 0.5 or numbers[7] > 0.5
        shares = [f"{100 * each:.3g} %" if math.isfinite(each) else "-" for each in (numbers[3], numbers[7])]
        cells = [number(each, 3) for each in numbers[:3]]
        cells += [f"{100 * change:+.3g} %" if math.isfinite(change) else "-", shares[0]]
        cells += [*(number(each, 3) for each in numbers[4:7]), shares[1]]
        rows.append((short_text(name), cells))
    return {"step": now.get("step"), "first_step": first.get("step"), "rows": rows, "dead": dead}


def _eight(values: object) -> list[float]:
    numbers = [as_number(each) for each in values] if isinstance(values, list) else []
    return (numbers + [math.nan] * 8)[:8]


def model_rows(record: RunRecord) -> dict[str, Any] | None:
    """Returns the parts of the model and its totals as texts, and its layers; None if not recorded."""
    parts, layers = record.model.get("parts"), record.model.get("layers")
    if not isinstance(parts, list):
        return None
    rows = [
        [short_text(each.get(key, "")) for key in ("name", "class", "parameters_text", "trained_text", "memory_text")]
        for each in map(as_dict, parts)
    ]
    shapes = [
        [short_text(each.get(key, "")) for key in ("name", "class", "shape", "parameters")]
        for each in map(as_dict, layers if isinstance(layers, list) else [])
    ]
    totals = as_dict(record.model.get("totals"))
    return {
        "parts": rows,
        "layers": shapes[: 2 * MOST_ROWS],
        "totals": [(short_text(k), short_text(v)) for k, v in totals.items()],
    }


def data_rows(record: RunRecord) -> list[tuple[str, str]]:
    """Returns what is known of the data, by name."""
    facts, known = [], as_dict(record.run.get("data"))
    for key, name in (("description", "data"), ("fingerprint", "fingerprint"), ("held_out_images", "held out")):
        if known.get(key) is not None:
            facts.append((name, short_text(known[key])))
    report = record.data
    for key in ("images", "trained", "missing_captions", "masked", "files"):
        if type(report.get(key)) is int:
            facts.append((key.replace("_", " "), f"{report[key]:,}"))
    for key in ("buckets", "fates", "converted", "filtered"):
        counts = as_dict(report.get(key))
        if counts:
            shown = ", ".join(f"{name}: {count}" for name, count in list(counts.items())[:30])
            facts.append(({"fates": "files by fate"}.get(key, key), short_text(shown)))
    unreadable = as_dict(report.get("unreadable"))
    if unreadable:
        shown = "; ".join(f"{name}: {why}" for name, why in list(unreadable.items())[:10])
        facts.append((f"unreadable ({len(unreadable):,})", short_text(shown)))
    return facts


def surroundings(record: RunRecord) -> list[tuple[str, str]]:
    """Returns where and with what the run took place, by name."""
    run, facts = record.run, []
    hardware, git = as_dict(run.get("hardware")), as_dict(run.get("git"))
    gpus = hardware.get("gpus")
    for gpu in map(as_dict, gpus if isinstance(gpus, list) else []):
        facts.append(("GPU", f"{short_text(gpu.get('name'))}, {_size(gpu.get('memory_bytes'))}"))
    if hardware:
        facts.append(("host", f"{hardware.get('cpu_count')} CPU cores, {_size(hardware.get('host_memory_bytes'))}"))
        facts.append(("processes", f"{hardware.get('processes')} on {short_text(hardware.get('device'))}"))
    if git:
        state = "changed since" if git.get("dirty") else "unchanged"
        facts.append(("git", f"{short_text(git.get('commit'))} on {short_text(git.get('branch'))}, files {state}"))
    versions = as_dict(run.get("versions"))
    if versions:
        facts.append(("versions", short_text(", ".join(f"{name} {value}" for name, value in versions.items()))))
    return facts


def _size(count: object) -> str:
    return size_text(count) if type(count) is int and count >= 0 else "unknown memory"


def score_rows(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Returns (score, its last value in each run, with its interval) of evaluation.jsonl."""
    found: dict[str, dict[int, str]] = {}
    for place, record in enumerate(records):
        for line in record.evaluation:
            for name, score in as_dict(line.get("scores")).items():
                found.setdefault(short_text(name), {})[place] = _score(as_dict(score), line)
    return [(name, [cells.get(place, "-") for place in range(len(records))]) for name, cells in found.items()]


def _score(score: Mapping[str, Any], line: Mapping[str, Any]) -> str:
    value = as_number(score.get("value"))
    if not math.isfinite(value):
        return f"not computed: {short_text(score.get('not_computed'))}"
    interval = score.get("interval_95")
    shown = ""
    if isinstance(interval, list) and len(interval) == 2:
        shown = f" ({number(as_number(interval[0]))} to {number(as_number(interval[1]))})"
    arrow = {"lower": " ↓", "higher": " ↑"}.get(str(score.get("better")), "")
    return f"{number(value)}{arrow}{shown}, step {line.get('step')}"
