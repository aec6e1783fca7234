"""The report that a run writes: while it trains, at its end however it ends, and without changing its bits."""

import json
import subprocess
import sys
import time

import pytest

from tests.comparing import assert_same_bits, losses, weights
from tests.repository import ROOT
from utils.config.options import Diverged, Stopped, UserError
from utils.runtime.machine import git_state
from utils.runtime.processes import OutputFolder
from utils.runtime.stop_requests import repeat_command
from utils.training.description import corners
from utils.training.layer_statistics import is_due
from utils.training.reporting import RunReport

DRAWN = ("--validation_prompt", "a red square", "--num_validation_images", 1, "--validation_num_inference_steps", 2)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_with_everything_has_the_bits_of_one_with_nothing(train):
    flags = ["--max_train_steps", 3, "--train_batch_size", 2, "--lr_scheduler", "cosine"]
    plain = train("sd", *flags, out="plain")
    out = train("sd", *flags, "--report", *DRAWN, out="report")
    assert_same_bits(weights(plain), weights(out))
    assert losses(plain) == losses(out)
    # The page, its pictures, and what was written for it.
    page = (out / "report.html").read_text()
    values = lines(out / "metrics.jsonl")
    assert f"last {values[-1]['train_loss']:.4g} at step 3" in page
    assert "finished" in page
    assert "--lr_scheduler" in page
    for name in ("plots/training_curves.png", "plots/lr_schedule.png", "contact_sheet.png", "model_summary.json"):
        assert (out / name).is_file()
    assert not (plain / "report.html").exists()
    # The records.
    assert [line["samples_seen"] for line in values] == [2, 4, 6]
    assert all(abs(line["time"] - time.time()) < 600 and line["host_memory_gb"] > 0 for line in values)
    layers = lines(out / "layer_statistics.jsonl")
    assert [line["step"] for line in layers] == [1, 3]
    tensor = weights(out)["conv_in.weight"]
    rows = layers[-1]["layers"]
    mean, deviation, norm, dead, *gradient = next(rows[name] for name in rows if name.endswith("conv_in.weight"))
    assert norm == pytest.approx(float(tensor.norm()), rel=0.05)
    assert abs(mean - float(tensor.mean())) < 0.01
    assert deviation == pytest.approx(float(tensor.std()), rel=0.05)
    assert dead == 0
    assert gradient[2] > 0
    run = json.loads((out / "run.json").read_text())
    assert run["state"] == "finished"
    assert run["changed_options"]["lr_scheduler"] == {"value": "cosine", "default": "constant"}
    assert run["data"]["images"] == 6
    assert run["hardware"]["cpu_count"] >= 1
    assert run["planned_learning_rates"]["steps"] == [1, 2, 3]
    rates = [line["learning_rate"] for line in values]
    assert run["planned_learning_rates"]["rates"] == pytest.approx(rates)
    model = json.loads((out / "model_summary.json").read_text())
    unet = next(part for part in model["parts"] if part["name"] == "unet")
    assert unet["trained"] == unet["parameters"] == sum(each.numel() for each in weights(out).values())
    assert model["step_flops"] > 2 * 3 * model["forward_flops"]["denoiser"]


def test_an_unconditional_run(train):
    out = train("pixels", "--max_train_steps", 2, "--report")
    page = (out / "report.html").read_text()
    assert "Training loss" in page
    assert page.count("data:image/jpeg") > 1
    assert "sample 0" in page


@pytest.mark.slow
def test_samples_seen_are_exact_after_another_batch(train):
    flags = ["--lr_scheduler", "constant", "--validation_split", 0.3]
    train("sd", "--max_train_steps", 2, "--train_batch_size", 3, *flags)
    more = ["--resume_from_checkpoint", "latest", "--allow_changed_options"]
    out = train("sd", "--max_train_steps", 4, "--train_batch_size", 1, *flags, *more)
    assert [line["samples_seen"] for line in lines(out / "metrics.jsonl")] == [3, 6, 7, 8]
    measured = lines(out / "validation.jsonl")
    assert [(line["step"], line["samples_seen"]) for line in measured][-1] == (4, 8)
    out = train("sd", "--max_train_steps", 5, "--train_batch_size", 2, *flags, *more)
    assert [line["samples_seen"] for line in lines(out / "metrics.jsonl")] == [3, 6, 7, 8, 10]


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "finished"),
        (Stopped("stopped after step 3", 15), "stopped"),
        (Diverged("the run has diverged"), "diverged"),
        (UserError("--x: no"), "failed"),
        (KeyboardInterrupt(), "stopped"),
    ],
)
def test_the_state_at_the_end(tmp_path, error, state):
    folder = OutputFolder(str(tmp_path))
    folder.record({}, {}, [], state="running")
    report = RunReport(folder, True, True)

    def run():
        with report.lasting():
            report.begin(lambda folder: None)
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    assert json.loads((tmp_path / "run.json").read_text())["state"] == state
    assert state in (tmp_path / "report.html").read_text()


def test_an_error_after_a_divergence_is_a_divergence(tmp_path):
    folder = OutputFolder(str(tmp_path))
    folder.record({}, {}, [])
    report = RunReport(folder, False, True)
    report.begin(lambda folder: None)
    folder.add_to_record(outcome={"diverged": "3 consecutive steps"})
    with pytest.raises(UserError), report.lasting():
        raise UserError("3 consecutive steps")
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "diverged"
    assert not (tmp_path / "report.html").exists()


def test_a_report_that_fails_costs_one_warning(tmp_path, monkeypatch, caplog):
    folder = OutputFolder(str(tmp_path))
    folder.record({}, {}, [])
    (tmp_path / "report.html").mkdir()
    report = RunReport(folder, True, True)
    with report.lasting():
        report.begin(lambda folder: 1 / 0)
    assert len([record for record in caplog.records if "the run continues" in record.message]) == 1


def test_a_run_that_never_began_leaves_the_report_of_an_earlier_one(tmp_path):
    with pytest.raises(UserError), RunReport(OutputFolder(str(tmp_path)), True, True).lasting():
        raise UserError("refused")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_is_written_anew_by_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.training.reporting.LEAST_PAUSE", 0.1)
    monkeypatch.chdir(tmp_path)
    folder = OutputFolder(str(tmp_path / "out"))
    folder.path.mkdir()
    folder.record({}, {}, [], state="running")
    report = RunReport(folder, True, True)
    with report.lasting():
        report.begin(lambda folder: None)
        for _ in range(300):
            if (folder.path / "report.html").exists():
                break
            time.sleep(0.1)
        assert "running" in (folder.path / "report.html").read_text()
    assert "finished" in (folder.path / "report.html").read_text()


def test_refreshing_loads_no_torch():
    code = "import sys, utils.reports.refresh, utils.tools.report; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_git_and_the_command(tmp_path, monkeypatch):
    assert git_state(tmp_path) is None
    subprocess.run(["git", "init", "-q", "-b", "mine", str(tmp_path)], check=True)
    assert git_state(tmp_path) == {"commit": "(initial)", "branch": "mine", "dirty": False}
    monkeypatch.setattr("utils.runtime.machine.GIT_SECONDS", 0.0)
    assert git_state(tmp_path) is None
    for name in ("ACCELERATE_MIXED_PRECISION", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    words = ["a.py", "--resume_from_checkpoint=latest", "--hub_token", "hf_x", "--x", "a b"]
    assert repeat_command(words) == "python a.py --x 'a b'"


def test_when_layers_are_measured():
    assert [step for step in range(1, 1001) if is_due(step, range(1000))] == [1, *range(125, 1001, 125)]
    assert [step for step in range(11, 21) if is_due(step, range(10, 20))] == [11, 20]


def test_the_corners_of_a_schedule():
    steps = list(range(1, 101))
    linear = [min(step / 10, 1.0) for step in steps]
    assert [step for step, _ in corners(steps, linear)] == [1, 10, 100]
    assert corners([1], [0.0]) == [(1, 0.0)]
