"""The report of a run: its numbers are those of the records, its texts stay text, and its size is bounded."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.config.options import UserError
from utils.reports import pictures
from utils.reports.page import html, write_page
from utils.reports.plots import write_plots
from utils.reports.records import read_run
from utils.tools.report import main, names_of

HOSTILE = '</title><script>alert(1)</script><img src=x onerror="alert(2)">{{ 7 * 7 }}\u202e&amp;"\''


def record(folder: Path, steps: int = 40, **run: object) -> Path:
    """The folder of a run with metrics, measurements and samples."""
    folder.mkdir(parents=True)
    facts = {
        "options": {"learning_rate": 1e-4, "seed": 1},
        "state": "finished",
        "total_steps": steps,
        "global_batch": 4,
    }
    facts["planned_learning_rates"] = {"steps": [1, steps], "rates": [1e-4, 0.0]}
    (folder / "run.json").write_text(json.dumps(facts | run))
    lines = [
        {"step": step, "epoch": step / 10, "train_loss": 1 / step, "grad_norm": 2.0, "learning_rate": 1e-4}
        | {
            "images_per_second": 8.0,
            "data_wait": 0.01,
            "host_memory_gb": 1.5,
            "time": 1e9 + step,
            "samples_seen": 4 * step,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    measured = [
        {"step": step, "loss": 1 - step / 100, "curve": [1.0, 0.5], "relative_loss": 0.0} for step in (0, steps)
    ]
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in measured))
    return folder


def add_samples(folder: Path, steps: range, count: int, size: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    for place in [*(f"step-{step}" for step in steps), "final"]:
        (folder / "samples" / place).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(np.roll(pixels, number, 0)).save(folder / "samples" / place / f"{number:03d}.png")


class Seen(HTMLParser):
    """Collects tags, attributes and the text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_its_numbers_are_those_of_the_records(tmp_path):
    folder = record(tmp_path / "run")
    page = Seen(html([read_run(folder)]))
    assert "last 0.025 at step 40" in page.text
    assert "least 0.025 at step 40" in page.text
    assert "weights: last 0.6 at step 40, least 0.6 at step 40" in page.text
    assert re.search(r"samples seen\s*160", page.text)
    assert re.search(r"step\s*40 of 40", page.text)
    assert "-40.0 %" in page.text
    assert "host at most 1.5 GB" in page.text


def test_the_last_point_of_a_curve_is_the_last_value(tmp_path):
    """In pixels, on the axis that the page draws."""
    folder = record(tmp_path / "run")
    page = html([read_run(folder)])
    curve = page[page.index("<h3>Throughput") :]
    raw = re.search(r'<path class="raw c0" d="([^"]+)"', curve)[1]
    places = {float(point.split(" ")[1]) for point in re.split("[ML]", raw)[1:]}
    ticks = {
        float(text): float(down) - 4
        for down, text in re.findall(r'<text x="52" y="([\d.]+)" class="end">([\d.]+)</text>', curve.split("</svg>")[0])
    }
    zero, eight = ticks[0.0], places.pop()
    assert not places
    other = max(ticks)
    assert (zero - eight) / (zero - ticks[other]) * other == pytest.approx(8.0, abs=0.05)


def test_hostile_texts_stay_text(tmp_path):
    folder = record(
        tmp_path / "run",
        changed_options={HOSTILE: {"value": HOSTILE, "default": [HOSTILE]}},
        options={"pretrained_model_name_or_path": HOSTILE},
        repeat=HOSTILE,
        ended_because=HOSTILE,
        data={"description": HOSTILE},
    )
    add_samples(folder, range(0, 10, 5), 2, 16)
    (folder / "samples" / "samples.jsonl").write_text(
        json.dumps({"step": 0, "file": "000.png", "prompt": HOSTILE}) + "\n"
    )
    (folder / "verdict.json").write_text(json.dumps({"verdict": HOSTILE, "evidence": [HOSTILE], "advice": HOSTILE}))
    (folder / "layer_statistics.jsonl").write_text(json.dumps({"step": 1, "layers": {HOSTILE: [HOSTILE] * 8}}) + "\n")
    (folder / "data_report.json").write_text(
        json.dumps({"unreadable": {HOSTILE: HOSTILE}, "buckets": {HOSTILE: HOSTILE}})
    )
    page = html([read_run(folder)])
    seen = Seen(page)
    assert seen.tags.count("script") == page.count("<script>") == 1  # that of the slider
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in seen.links)
    assert "<script>alert(1)</script>" in seen.text
    assert "{{ 7 * 7 }}" in seen.text
    assert "\u202e" not in page


def test_damaged_records_are_read_as_far_as_they_go(tmp_path):
    folder = record(tmp_path / "run")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(
            b'{"step": 41, "train_loss": null, "grad_norm": null}\nnot JSON\n\xff\xfe\n[1]\n{"step": 42, "train_lo'
        )
    (folder / "validation.jsonl").write_text('{"step": 1, "loss": "x", "curve": [1, "y"]}\n{"step": 2, "curve": 3}\n')
    (folder / "verdict.json").write_text("[1, 2")
    (folder / "model_summary.json").write_text('{"parts": [1], "layers": {}, "totals": 3}')
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation.jsonl").write_text(
        '{"step": 1, "scores": {"fid": 3, "kid": {"value": 1.5}}}\n'
    )
    (folder / "samples" / "step-1").mkdir(parents=True)
    (folder / "samples" / "step-1" / "000.png").write_bytes(b"no picture")
    found = read_run(folder)
    assert found.steps[-1] == 41
    page = Seen(html([found]))
    assert "1 steps without a finite loss and gradient" in page.text
    assert "kid" in page.text


@pytest.mark.parametrize(
    "run", [{}, {"state": 3, "options": [1], "hardware": {"gpus": 5}, "planned_learning_rates": 7}]
)
def test_an_old_or_odd_run_still_reads(tmp_path, run):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(run))
    assert "unknown" in html([read_run(folder)])
    (folder / "metrics.jsonl").write_text('{"step": 1, "train_loss": 0.5, "learning_rate": 0.1}\n')
    page = html([read_run(folder)])
    assert "last 0.5 at step 1" in page
    assert "not recorded by this run" in page


def test_many_samples_stay_within_the_budget(tmp_path, monkeypatch):
    assert pictures.STRIP_BYTES + pictures.PAIR_BYTES + pictures.SHEET_BYTES < 7e6  # a page has at most 10 MB
    monkeypatch.setattr(pictures, "STRIP_BYTES", 100_000)
    monkeypatch.setattr(pictures, "PAIR_BYTES", 50_000)
    folder = record(tmp_path / "run")
    add_samples(folder, range(0, 24, 2), 4, 64)  # noise, which JPEG compresses least
    write_page([read_run(folder)], folder / "report.html")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert 50_000 < sum(map(len, re.findall('src="data:[^"]+"', page))) < 160_000
    seen = Seen(page)
    assert "before training" in seen.text
    assert "result" in seen.text
    assert "no picture" not in seen.text
    assert "3 more, in the folder samples/" in seen.text


def test_samples_of_an_earlier_run_are_not_shown(tmp_path):
    """As --overwrite_output_dir leaves them."""
    folder = record(tmp_path / "run", started=2e9, first_step=5)
    add_samples(folder, range(5, 11, 5), 1, 16)
    (folder / "samples" / "step-10" / "000.png").touch()
    os.utime(folder / "samples" / "step-10", (2e9 + 10, 2e9 + 10))
    assert [each.step for each in read_run(folder).samples] == [5, 10]
    os.utime(folder / "samples" / "step-10", (1e9, 1e9))
    os.utime(folder / "samples" / "final", (2e9 + 20, 2e9 + 20))
    (folder / "samples" / "step-5").rename(folder / "samples" / "base")
    assert [each.label for each in read_run(folder).samples] == ["base", "result"]
    (folder / "samples" / "base").rename(folder / "samples" / "step-5")
    assert [each.label for each in read_run(folder).samples] == ["step 5", "result"]


def test_spikes_stay_in_a_thinned_curve(tmp_path):
    folder = record(tmp_path / "run", 5000)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[2600] = json.dumps(json.loads(lines[2600]) | {"images_per_second": 99.0})
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    page = html([read_run(folder)])
    curve = page[page.index("<h3>Throughput") :].split("</svg>")[0]
    raw = re.search(r'<path class="raw c0" d="([^"]+)"', curve)[1]
    down = [float(point.split(" ")[1]) for point in re.split("[ML]", raw)[1:]]
    assert len(down) <= 600
    assert min(down) < 30 < sorted(down)[1]


def test_several_runs_are_laid_over_each_other(tmp_path, capsys):
    one = record(tmp_path / "a" / "out")
    other = record(tmp_path / "b" / "out", options={"learning_rate": 5e-4, "seed": 1})
    add_samples(one, range(1), 1, 16)
    out = tmp_path / "both.html"
    assert main([str(one), str(other), "--out", str(out)]) == 0
    seen = Seen(out.read_text(encoding="utf-8"))
    assert "a/out" in seen.text
    assert "b/out" in seen.text
    assert "--learning_rate" in seen.text
    assert "0.0005" in seen.text
    assert "--seed" not in seen.text
    assert names_of([one, one]) == ["1: a/out", "2: a/out"]


@pytest.mark.parametrize("flags", [["{}", "--out", "x.txt"], ["{}/nowhere"], ["{}"]])
def test_what_the_tool_refuses(tmp_path, capsys, flags):
    assert main([flag.format(tmp_path) for flag in flags]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(UserError, match="give the output_dir of a run"):
        read_run(tmp_path)


def test_the_plots(tmp_path):
    folder = record(tmp_path / "run")
    write_plots(read_run(folder))
    for name in ("training_curves.png", "lr_schedule.png"):
        with Image.open(folder / "plots" / name) as image:
            assert min(image.size) >= 500
