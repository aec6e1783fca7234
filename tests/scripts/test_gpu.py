"""The GPU proof: its runner continues after any failure, and its sections run at a small size on a CPU."""

import json
import signal
import sys
import time

import pytest
import torch

from benchmarks import gpu, gpu_proofs, gpu_speed
from benchmarks.gpu_runs import FAILED, HOLDS, SKIPPED, Bench, Finding, Run
from tests import tiny
from tests.conftest import reset_accelerate
from tests.launching import succeed
from tests.repository import ROOT


@pytest.fixture
def bench(tmp_path):
    """On a CPU, with ten minutes left."""
    (tmp_path / "out").mkdir()
    device = torch.device("cpu")
    yield Bench(tmp_path / "scratch", tmp_path / "out", device, is_tiny=True, ends_at=time.monotonic() + 600)
    reset_accelerate()


def section(name, function, seconds=1.0, needs_cuda=False):
    return gpu.Section(name, seconds, needs_cuda, function)


# The runner


def test_what_fails_is_said_and_the_next_section_begins(bench, capsys):
    def fails(bench):
        raise KeyError("of its own")

    def is_short(bench):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def ends(bench):
        raise SystemExit(3)

    def holds(bench):
        return Finding(HOLDS, "all is well", {"number": 3})

    sections = [section(each.__name__, each) for each in (fails, is_short, ends, holds)]
    found = gpu.run_all([*sections, section("graphs", holds, needs_cuda=True)], bench)
    assert [each.verdict for each in found.values()] == [FAILED, FAILED, FAILED, HOLDS, SKIPPED]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["fails", "is_short", "ends", "holds", "graphs"]
    written = json.loads((bench.out / "fails.json").read_text())
    assert "in fails" in written["facts"]["traceback"]
    assert json.loads((bench.out / "holds.json").read_text())["facts"] == {"number": 3}
    assert list(json.loads((bench.out / "summary.json").read_text())) == list(found)
    assert (bench.out / "summary.md").read_text() == gpu.summary(found)


def test_a_section_that_takes_too_long_is_cut_off(bench, monkeypatch):
    monkeypatch.setattr(gpu, "SLOW", 1.0)

    def hangs(bench):
        bench.note("one part holds")
        try:
            time.sleep(60)
        except Exception:  # noqa: BLE001 - as the product has it in places
            pytest.fail("the product would have taken it for an error of its own")

    before = signal.getsignal(signal.SIGALRM)
    began = time.monotonic()
    finding = gpu.run_section(section("hangs", hangs, seconds=0.2), bench)
    assert time.monotonic() - began < 30
    assert finding.verdict == FAILED
    assert "cut off" in finding.says
    assert "one part holds" in finding.says
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_section_whose_time_is_not_left_is_skipped(bench):
    bench.ends_at = time.monotonic() + 5
    finding = gpu.run_section(section("long", lambda bench: pytest.fail("it began"), seconds=60), bench)
    assert finding.verdict == SKIPPED
    assert gpu.run_section(section("short", lambda bench: Finding(HOLDS, ""), seconds=1), bench).verdict == HOLDS


def test_an_outer_timer_goes_on():
    handler, rang = signal.getsignal(signal.SIGALRM), []
    signal.signal(signal.SIGALRM, lambda *_: rang.append(None))
    outer = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(gpu.CutOff), gpu.within(0.05):
            time.sleep(10)
        time.sleep(0.5)
        assert rang
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *outer)


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--tiny" in capsys.readouterr().err


def test_the_table_sets_our_speed_beside_the_peers():
    ours = {"case": "sd 512", "batch": 64, "what": "eager", "ms": 500.0, "images_per_second": 128.0, "size": 32}
    peer = {"case": "sd 512", "batch": 64, "what": "theirs", "ms": 1000.0, "images_per_second": 64.0, "is_peer": True}
    other = peer | {"batch": 16, "images_per_second": 32.0}
    assert gpu_speed.cells(ours, [ours, peer, other])[-1] == "2.00"
    assert gpu_speed.cells(ours, [ours, other])[-1] == "4.00 (b16)"
    assert gpu_speed.cells(ours, [ours])[-1] == ""
    assert "halved to 32" in gpu_speed.cells(ours, [ours])[2]
    found = {"sd": Finding(HOLDS, "a | b", {"speeds": [ours]}), "peers": Finding(HOLDS, "", {"speeds": [peer]})}
    assert "| sd 512 | 64 | eager, halved to 32 at once | 128 | 500 |" in gpu.summary(found)
    assert "a / b" in gpu.summary(found)


# Sections


def test_the_machine(bench):
    finding = gpu_proofs.machine(bench)
    assert finding.verdict == HOLDS
    assert bench.product_tflops > 0


@pytest.mark.slow
def test_speeds_in_small(bench):
    torch.set_num_threads(1)
    finding = gpu.run_section(section("sdxl", gpu_speed.sdxl, seconds=60), bench)
    assert finding.verdict == HOLDS, finding
    rows = finding.facts["speeds"]
    assert [row["what"] for row in rows] == ["eager", "compiled blocks"]
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=0.05)
    assert rows[0]["flops_per_image"] == rows[1]["flops_per_image"] > 0


def test_a_run_that_ends_in_an_error_is_heard(bench):
    run = bench.train("sd", ["--rank", 4], "refused")
    assert run.status == 2
    assert "--adaptation lora" in run.error
    assert "refused" in (bench.out / "run.log").read_text()


def test_gradients_that_are_wrong_fail_parity(bench, monkeypatch):
    exact = {"one": torch.ones(4), "other": torch.ones(9)}

    def gradients(bench, family, flags, on_cpu=False):
        return exact if "bf16" not in flags or "--bf16_weights" not in flags else exact | {"one": -torch.ones(4)}

    monkeypatch.setattr(gpu_proofs, "gradients_of", gradients)
    finding = gpu_proofs.parity(bench)
    assert finding.verdict == FAILED
    assert "bf16_weights: 1 tensors, one is 2 off" in finding.says


def test_resumed_runs_that_differ_fail(bench, monkeypatch):
    def train(pipeline, flags, out):
        (bench.folder / out / "checkpoint-4").mkdir(parents=True, exist_ok=True)
        return Run(0, bench.folder / out, "")

    monkeypatch.setattr(bench, "train", train)
    monkeypatch.setattr(gpu_proofs, "digests", lambda checkpoint: {"optimizer": checkpoint.parent.name})
    finding = gpu_proofs.resumes(bench)
    assert finding.verdict == FAILED
    assert "plain: optimizer" in finding.says
    monkeypatch.setattr(gpu_proofs, "digests", lambda checkpoint: {"optimizer": "the same"})
    assert gpu_proofs.resumes(bench).verdict == HOLDS


@pytest.mark.slow
def test_a_script_ends_after_some_steps_without_a_result(tmp_path):
    flags = ["--pretrained_model", tiny.make_sd(tmp_path / "sd"), "--train_data_dir", tiny.make_images(tmp_path / "i")]
    flags += ["--resolution", 32, "--train_batch_size", 2, "--max_train_steps", 50, "--output_dir", tmp_path / "out"]
    words = [sys.executable, ROOT / "benchmarks/launch.py", "--record", tmp_path, "--stop_after", 3]
    words += [ROOT / "train_text_to_image.py", *flags, "--report_to", "none"]
    succeed(words)
    assert len(json.loads((tmp_path / "record.json").read_text())["steps"]) == 3
    assert not (tmp_path / "out" / "model_index.json").exists()


@pytest.mark.nightly
@pytest.mark.timeout(1900)
def test_the_whole_of_it_in_small(tmp_path):
    words = [sys.executable, ROOT / "benchmarks/gpu.py", "--tiny", "--deadline", "1800", "--out", tmp_path]
    succeed(words, seconds=1890)
    verdicts = {name: said[0] for name, said in json.loads((tmp_path / "summary.json").read_text()).items()}
    skipped = {"peers"} | ({"waits"} if not torch.cuda.is_available() else set())
    assert verdicts == {each.name: SKIPPED if each.name in skipped else HOLDS for each in gpu.SECTIONS}
