"""Writes the results of an evaluation: results.json, a Markdown table, and one self-contained HTML file."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.config.terminal import json_text, markdown, markdown_cell, visible
from utils.evaluation.findings import ARROWS, Entry, Findings, adapter_lines, computed_names
from utils.evaluation.metrics.comparison import Difference
from utils.evaluation.metrics.distances import Interval
from utils.evaluation.metrics.scores import Score
from utils.evaluation.report_pictures import curves, prompt_sections, sweep_record, sweep_sections, thumbnail
from utils.runtime.atomic_files import write_text
from utils.runtime.processes import write_json

SCHEMA_VERSION = 1
TEMPLATE = Path(__file__).with_name("report.html.jinja")
RANKED = 8


def write_report(findings: Findings, folder: Path, num_prompts: int = 24) -> None:
    """Writes `results.json`, `report.md` and `report.html`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results(findings))
    write_text(folder / "report.md", as_markdown(findings))
    write_text(folder / "report.html", html(findings, num_prompts))


def results(findings: Findings) -> dict[str, object]:
    """Returns all numbers as JSON; numbers that are not finite become null."""
    found: dict[str, object] = {"schema_version": SCHEMA_VERSION, "title": findings.title, "entries": {}}
    for entry in findings.entries:
        found["entries"][entry.name] = {
            "images": len(entry.subject),
            "invalid_images": {state: {"count": len(names), "names": names} for state, names in entry.invalid.items()},
            "drawn_with": entry.facts,
            "seconds": round(entry.seconds, 3),
            "step": entry.step,
            "scores": {score.name: score.record() for score in entry.scores},
        }
        if entry.scale is not None:
            found["entries"][entry.name]["scale"] = entry.scale
        if entry.differences:
            found["entries"][entry.name]["differences"] = {each.name: each.record() for each in entry.differences}
    if findings.is_sweep:
        found["sweep"] = sweep_record(findings.entries)
    if findings.differences:
        found["differences"] = {each.name: each.record() for each in findings.differences}
    if findings.best is not None:
        found["best_checkpoint"] = {"score": findings.best[0], "checkpoint": findings.best[1]}
    return _finite(found | {"notes": notes(findings), "run": findings.run})


def _finite(value: object) -> object:
    """The same value with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def notes(findings: Findings) -> list[str]:
    """Returns notes for the top of the report, such as counts of invalid images."""
    found = list(findings.notes)
    for entry in findings.entries:
        for state, names in entry.invalid.items():
            if names:
                what = {"nan": "NaN", "constant": "of one colour"}.get(state, state)
                ending = "metrics that read them fail" if state == "unreadable" else "the scores include them"
                shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
                found.append(
                    f"{entry.name}: {len(names)} of {len(entry.subject)} images are {what} ({shown}); {ending}"
                )
    return found


def invalid_counts(findings: Findings) -> str:
    """Returns one line with the number of invalid images of each entry, even if it is 0."""
    counts = [
        f"{entry.name} {sum(map(len, entry.invalid.values()))} of {len(entry.subject)}" for entry in findings.entries
    ]
    return f"Images that are unreadable, NaN, black or of one colour: {', '.join(counts)}."


def number(value: float | None) -> str:
    """Returns a number as text with four significant digits; "-" for None."""
    if value is None:
        return "-"
    if value == 0 or 0.001 <= abs(value) < 10000:
        digits = 0 if value == 0 else max(0, 3 - math.floor(math.log10(abs(value))))
        return f"{value:.{min(digits, 5)}f}"
    return f"{value:.3e}"


def _range(interval: Interval | None) -> str:
    return "" if interval is None else f"{number(interval.low)} to {number(interval.high)}"


def _details(score: Score) -> str:
    """All details of a score in one line: counts, network, settings, errors, remark."""
    parts = [f"{score.count} images"]
    if score.reference_count is not None:
        parts.append(
            f"{score.reference_count} reference images" if score.reference_count else "a reference of unknown size"
        )
    parts.append(f"features of {score.network} ({score.weights[:12]})" if score.network else "")
    parts += [f"{name}: {value}" for name, value in score.settings.items()]
    if score.error is not None:
        parts.append(f"standard error {number(score.error)}")
    parts += [f"{name}: {_shown(value)}" for name, value in score.details.items() if isinstance(value, int | float)]
    return "; ".join(filter(None, [*parts, score.remark]))


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else number(value)


def _missing(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """(name, reason) of each score that an entry lacks; it names the entries unless all of them lack it."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        for score in entry.scores:
            if score.value is None:
                found.setdefault((score.name, score.reason), []).append(entry.name)
    return [
        (name, reason if len(of) == len(entries) else f"{', '.join(of)}: {reason}")
        for (name, reason), of in found.items()
    ]


def _rows(findings: Findings) -> list[dict]:
    """The rows of the table, one for each score."""
    by_name = {each.name: each for each in findings.differences}
    rows = []
    for name in computed_names(findings.entries):
        # The score of each entry; in a sweep, also its difference from the baseline.
        scores = [entry.score(name) for entry in findings.entries]
        known = [score for score in scores if score is not None and score.value is not None]
        cells = [
            {
                "value": number(None if score is None else score.value),
                "interval": "" if score is None else _range(score.interval),
                "difference": _difference({each.name: each for each in entry.differences}.get(name)),
            }
            for entry, score in zip(findings.entries, scores, strict=True)
        ]
        rows.append(
            {
                "name": name,
                "arrow": ARROWS[known[0].better],
                "cells": cells,
                "difference": _difference(by_name.get(name)),
                "facts": _details(known[-1]),
            }
        )
    return rows


def _difference(found: Difference | None) -> dict[str, str]:
    """A difference as texts, which are empty if there is none."""
    if found is None:
        return dict.fromkeys(("value", "interval", "verdict", "style"), "")
    return {
        "value": ("+" if found.value > 0 else "") + number(found.value),
        "interval": _range(found.interval),
        "verdict": found.verdict,
        "style": found.verdict if found.verdict in ("better", "worse") else "",
    }


def as_markdown(findings: Findings) -> str:
    """Returns the scores as a Markdown table, and the list of what was not computed."""
    names = [entry.label for entry in findings.entries]
    head = ["score", *names, *(["difference"] if findings.differences else []), "details"]
    lines = [f"# {markdown(findings.title)}", "", *(f"{markdown(note)}\n" for note in notes(findings))]
    lines += ["| " + " | ".join(markdown_cell(each) for each in head) + " |", "|" + "---|" * len(head)]
    for row in _rows(findings):
        cells = [", ".join(filter(None, (_with_range(cell), _in_words(cell["difference"])))) for cell in row["cells"]]
        extra = [_in_words(row["difference"])] if findings.differences else []
        lines.append(
            "| "
            + " | ".join(markdown_cell(each) for each in [row["name"] + row["arrow"], *cells, *extra, row["facts"]])
            + " |"
        )
    lines += ["", markdown(invalid_counts(findings))]
    adapters = adapter_lines(findings.entries)
    lines += ["", "Adapters and their scales:", "", *(f"- {markdown(line)}" for line in adapters)] if adapters else []
    absent = _missing(findings.entries)
    if absent:
        lines += ["", "Not computed:", ""] + [f"- {markdown(name)}: {markdown(reason)}" for name, reason in absent]
    if findings.best is not None:
        lines += ["", f"Best checkpoint by {markdown(findings.best[0])}: {markdown(findings.best[1])}"]
    return "\n".join(lines) + "\n"


def _in_words(difference: dict[str, str]) -> str:
    return f"{_with_range(difference)} {difference['verdict']}".strip()


def _with_range(cell: dict) -> str:
    return f"{cell['value']} ({cell['interval']})" if cell["interval"] else cell["value"]


def _ranked(entry: Entry) -> list[dict]:
    score = entry.score("clip_score")
    prompts = entry.subject.images.prompts
    if score is None or score.by_image is None or prompts is None or len(prompts) < 2:
        return []
    order = np.argsort(score.by_image, kind="stable")
    count = min(RANKED, len(order) // 2)
    groups = (("Worst by CLIP score", order[:count]), ("Best by CLIP score", order[::-1][:count]))
    return [
        {
            "title": f"{title}, {entry.name}",
            "cards": [
                {"picture": read, "score": number(float(score.by_image[index])), "text": prompts[index]}
                for index in indices.tolist()
                if (read := thumbnail(entry.subject.images.pictures[index])) is not None
            ],
        }
        for title, indices in groups
    ]


def _pairs(findings: Findings) -> list[dict]:
    entry = findings.entries[-1]
    score = entry.score("memorisation")
    if score is None or score.value is None or findings.training is None:
        return []
    found = []
    for pair in score.details["nearest_pairs"]:
        drawn = thumbnail(entry.subject.images.pictures[pair["image_index"]])
        nearest = thumbnail(findings.training.images.pictures[pair["training_index"]])
        if drawn is not None and nearest is not None:
            text = pair["training_image"]
            found.append({"picture": drawn, "nearest": nearest, "score": number(pair["cosine"]), "text": text})
    return found


def html(findings: Findings, num_prompts: int = 24) -> str:
    """Returns the report as one HTML file; all texts in it are escaped."""
    from jinja2 import Environment

    # What to show: first and last entry, at most num_prompts prompts.
    environment = Environment(autoescape=True, finalize=lambda value: visible(value) if type(value) is str else value)
    entries = findings.entries
    shown = [entries[0], entries[-1]] if len(entries) > 1 else entries
    num_all = len(set(entries[-1].subject.images.clusters.tolist()))
    more = f"{num_prompts} of {num_all} prompts, evenly spaced." if num_all > num_prompts else ""
    settings = {entry.name: entry.facts for entry in entries} | {"run": findings.run}
    best = findings.best
    sweep = sweep_sections(entries, num_prompts) if findings.is_sweep else []
    sections = [] if sweep else prompt_sections(shown, num_prompts)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=findings.title,
        subtitle=_subtitle(findings),
        notes=notes(findings),
        entries=[entry.label for entry in entries],
        adapters=adapter_lines(entries),
        compared_with=entries[0].label if any(entry.differences for entry in entries) else "",
        rows=_rows(findings),
        has_differences=bool(findings.differences),
        invalid=invalid_counts(findings),
        missing=_missing(entries),
        curves=curves(entries),
        best="" if best is None else f"Best by {best[0]}: {best[1]}.",
        prompts=sections,
        sweep=sweep,
        over="scales" if findings.is_sweep else "checkpoints",
        compact=all(len(side["pictures"]) == 1 for section in sections for side in section["sides"]),
        more_prompts=more if entries[-1].subject.images.prompts is not None else "",
        ranked=_ranked(entries[-1]),
        pairs=_pairs(findings),
        settings=json_text(_finite(settings), indent=2, other=str),
    )


def _subtitle(findings: Findings) -> str:
    images = findings.entries[-1].subject.images
    parts = [f"{len(images)} images"]
    if images.prompts is not None:
        parts.append(f"{len(set(images.clusters.tolist()))} prompts")
    return ", ".join(parts) + (
        f"; {' and '.join(entry.name for entry in findings.entries)}" if len(findings.entries) == 2 else ""
    )
