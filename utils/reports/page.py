"""The report of a run, or of several, as one HTML file without network: what is in the records, as text and pictures.

Texts from the records are escaped. The page needs no script: one of a few lines only moves the border between two
pictures, which otherwise lie side by side.
"""

import base64
import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from utils.config.terminal import visible
from utils.reports.charts import AXES, evaluation_charts, timestep_chart, training_charts
from utils.reports.pictures import before_and_after, contact_sheet, film_strips, last_samples, num_samples
from utils.reports.records import RunRecord
from utils.reports.tables import (
    data_rows,
    differing_options,
    headline,
    layer_rows,
    model_rows,
    option_rows,
    score_rows,
    short_text,
    state_text,
    surroundings,
    verdict_of,
)
from utils.runtime.atomic_files import write_text

logger = logging.getLogger(__name__)
TEMPLATE, SCRIPT, STYLE = (Path(__file__).with_name(f"page.{kind}") for kind in ("html.jinja", "js", "css"))
FILE = "report.html"
FEW_LAYERS = 40  # shown without opening them


def write_page(records: Sequence[RunRecord], file: Path) -> None:
    """Writes the report of one run, or of several laid over each other, at once and whole."""
    write_text(file, html(records))


def html(records: Sequence[RunRecord]) -> str:
    """Returns the report as HTML."""
    from jinja2 import Environment

    def shown(value: object) -> object:
        return visible(value) if type(value) is str else value

    environment = Environment(autoescape=True, finalize=shown, trim_blocks=True, lstrip_blocks=True)
    script = SCRIPT.read_text(encoding="utf-8")
    one = records[0] if len(records) == 1 else None
    film = film_strips(one) if one else last_samples(records)
    charts, timesteps = training_charts(records), timestep_chart(records)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=one.name if one else f"{len(records)} runs",
        subtitle=_subtitle(records),
        style=STYLE.read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        written=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        refreshes=one is not None and one.state == "running",
        runs=[
            {"name": each.name, "colour": place % 8, "headline": headline(each), "verdict": verdict_of(each)}
            for place, each in enumerate(records)
        ],
        axes=list(AXES),
        charts=charts,
        timesteps=timesteps,
        notes=_notes(records),
        film=film,
        more_samples=max(0, num_samples(one) - len(film)) if one else 0,
        pairs=before_and_after(one) if one else [],
        data=data_rows(one) if one else [],
        sheet=contact_sheet(one) if one else "",
        options=option_rows(one) if one else [],
        knows_defaults=one is not None and isinstance(one.run.get("changed_options"), dict),
        differences=differing_options(records) if not one else [],
        layers=layer_rows(one) if one else None,
        few_layers=FEW_LAYERS,
        model=model_rows(one) if one else None,
        scores=score_rows(records),
        score_charts=evaluation_charts(records),
        surroundings=surroundings(one) if one else [],
        repeat=short_text(one.run.get("repeat") or "") if one else "",
    )


def _subtitle(records: Sequence[RunRecord]) -> str:
    if len(records) > 1:
        return ", ".join(f"{record.name}: {state_text(record)}" for record in records)
    options = records[0].run.get("options")
    options = options if isinstance(options, dict) else {}
    parts = [options.get("pretrained_model_name_or_path"), options.get("adaptation")]
    return ", ".join(short_text(part) for part in parts if isinstance(part, str))


def _notes(records: Sequence[RunRecord]) -> list[str]:
    return [
        f"{record.name}: metrics.jsonl is long; the curves show every {record.stride}th line of it"
        for record in records
        if record.stride > 1
    ]
