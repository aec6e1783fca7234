"""Runs that are asked to end before their time, and go on as if they had not been."""

import contextlib
import itertools
import json
import logging
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import TextIO

import pytest
from tqdm import tqdm

from tests import tiny
from tests.comparing import assert_same_bits, losses, measured, weights
from tests.launching import command, launcher
from tests.repository import ROOT
from utils.config.options import AGREED_SECONDS, MAIN_SECONDS, Diverged, Stopped, UserError, run_script
from utils.config.standard_streams import flush_streams, hide, lasting_streams
from utils.runtime.stop_requests import SIGNALS, StopRequests, agreed, resume_command
from utils.sampling.prompt_samples import PromptSampler
from utils.training.compatibility import LAUNCHED
from utils.training.encoding import CacheFiller, Encoder
from utils.training.exchange import Exchange
from utils.training.saving import CheckpointSaver
from utils.training.validation_loss import HeldOut

FLAGS = ["--train_batch_size", 2, "--max_train_steps", 6, "--learning_rate", 1e-3, "--use_ema"]

SLOW = pytest.mark.slow


@pytest.fixture
def signal_at(monkeypatch) -> Callable:
    """signal_at(Encoder, "encode", 3) sends this process a SIGTERM when the method is called for the third time."""

    def arrange(owner: type, name: str, call: int, number: int = signal.SIGTERM) -> None:
        original, calls = getattr(owner, name), []

        def wrapped(*arguments, **named):
            calls.append(None)
            if len(calls) == call:
                signal.raise_signal(number)
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, wrapped)

    return arrange


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("sd", signal.SIGTERM),
        *(pytest.param("sd", each, marks=SLOW) for each in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)),
        pytest.param("pixels", signal.SIGTERM, marks=SLOW),
    ],
)
def test_a_signal_in_a_step(train, signal_at, monkeypatch, capsys, kind, number):
    """With two micro-batches a step: the step is finished, saved, and gone on from, bit by bit."""
    flags = [*FLAGS, "--gradient_accumulation_steps", 2]
    whole = train(kind, *flags, out="whole")
    handlers = [signal.getsignal(each) for each in SIGNALS]
    signal_at(Encoder, "encode", 5, number)
    parts = train(kind, *flags, out="parts", expect=128 + number)
    assert handlers == [signal.getsignal(each) for each in SIGNALS]
    said = capsys.readouterr().err.strip().splitlines()[-1]
    name = signal.Signals(number).name
    assert said.startswith(f"stopped {name} after step 3, which is saved in {parts}; continue with")
    assert said.endswith("--resume_from_checkpoint latest")
    assert [path.name for path in parts.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (parts / "model_index.json").exists()
    monkeypatch.undo()
    train(kind, *flags, "--resume_from_checkpoint", "latest", out="parts")
    assert losses(whole) == losses(parts)
    for name in ("unet", "unet_ema"):
        assert_same_bits(weights(whole / "checkpoint-6", name), weights(parts / "checkpoint-6", name))


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        pytest.param(HeldOut, "_batch", 1, marks=SLOW),
        pytest.param(HeldOut, "_batch", 3, marks=SLOW),
        pytest.param(HeldOut, "_batch", -1, marks=SLOW),
        (CheckpointSaver, "save", 1),
        pytest.param(PromptSampler, "_denoise", 1, marks=SLOW),  # before the first step
        pytest.param(PromptSampler, "_denoise", 2, marks=SLOW),
    ],
)
def test_a_signal_while_it_validates_or_saves(train, signal_at, monkeypatch, tmp_path, owner, name, call):
    data = tiny.make_images(tmp_path / "data", 10)
    flags = [*FLAGS, "--validation_split", 0.3, "--validation_steps", 2, "--checkpointing_steps", 2]
    flags += ["--validation_prompts", "red", "--validation_num_inference_steps", 1]
    whole = train("sd", *flags, data=data, out="whole")
    num_held_out = 10 - json.loads((whole / "data_report.json").read_text())["trained"]
    signal_at(owner, name, call if call > 0 else 7 * num_held_out)  # the last: at step 0 plain, then with the average
    parts = train("sd", *flags, data=data, out="parts", expect=143)
    assert not (parts / "model_index.json").exists()  # the run is not at its end
    monkeypatch.undo()
    train("sd", *flags, "--resume_from_checkpoint", "latest", data=data, out="parts")
    assert losses(whole) == losses(parts)
    assert measured(whole) == measured(parts)
    assert_same_bits(weights(whole), weights(parts))
    assert_same_bits(weights(whole / "best"), weights(parts / "best"))


def test_a_signal_while_it_caches(train, signal_at, monkeypatch, tmp_path, capsys):
    flags = [*FLAGS, "--cache_latents", "--cache_text_embeddings", "--encoding_cache_dir", tmp_path / "cache"]
    flags += ["--cache_batch_size", 2]
    signal_at(CacheFiller, "moments", 2)
    out = train("sd", *flags, expect=143)
    assert "stopped by SIGTERM before the first step" in capsys.readouterr().err
    assert not list(out.glob("checkpoint-*"))
    monkeypatch.undo()
    train("sd", *flags, out="again")


def test_a_time_limit_is_a_planned_end(train, capsys):
    flags = ["--train_batch_size", 2, "--max_train_steps", 1000, "--max_train_time", "0:00:00"]
    out = train("sd", *flags)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert "stopped as requested after step 1" in capsys.readouterr().err
    train("sd", *flags, "--resume_from_checkpoint", "latest")
    assert (out / "checkpoint-2").exists()


def test_files_ask_too(train, monkeypatch, tmp_path):
    """Also one that is made while what another asked for is done."""
    monkeypatch.setattr("utils.runtime.stop_requests.LOOK_SECONDS", 0.0)
    out, exchange, save = tmp_path / "out", Exchange.step, CheckpointSaver.save
    steps = itertools.count(1)

    def exchanged(*arguments) -> None:
        if next(steps) == 2:
            (out / "SAVE").touch()
        exchange(*arguments)

    def saved(saver: CheckpointSaver, done: int, *others) -> None:
        save(saver, done, *others)
        if done == 2:
            (out / "STOP").touch()

    monkeypatch.setattr(Exchange, "step", exchanged)
    monkeypatch.setattr(CheckpointSaver, "save", saved)
    train("sd", "--train_batch_size", 1, "--max_train_steps", 10)
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert not (out / "SAVE").exists()
    assert not (out / "STOP").exists()
    assert not (out / "model_index.json").exists()


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_the_last_checkpoint_is_whole(pipelines, images, tmp_path):
    flags = ("--train_batch_size", 1, "--gradient_accumulation_steps", 40, "--checkpointing_steps", 1)
    process = subprocess.Popen(
        [sys.executable, *command(pipelines, images, tmp_path / "out", *flags)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(lambda: (tmp_path / "out" / "checkpoint-1" / "manifest.json").exists())
    process.send_signal(signal.SIGTERM)
    time.sleep(1.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    from utils.training.checkpoint import Checkpoints

    assert Checkpoints(tmp_path / "out", None).resolve("latest") is not None


def test_a_hangup_that_is_ignored_stays_so_and_is_no_second_signal(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.runtime.stop_requests.AGAIN_SECONDS", 0.0)
    monkeypatch.setattr("utils.runtime.stop_requests.os._exit", lambda status: pytest.fail("it ends at once"))
    requests = StopRequests(tmp_path, None)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with requests.listening():
            signal.raise_signal(signal.SIGHUP)
            assert requests.number == 0
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with requests.listening():
            for _ in range(3):
                signal.raise_signal(signal.SIGHUP)
            assert requests.number == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_terminal_that_is_closed(pipelines, images, tmp_path):
    """The run gets a SIGHUP, and an error for each line that it writes; it saves all the same."""
    out = tmp_path / "out"
    flags = ("--train_batch_size", 1, "--max_train_steps", 5000, "--dataloader_num_workers", 1)
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, *command(pipelines, images, out, *flags)])
    wait_for(lambda: (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text()) > 500)
    below = descendants(process)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGHUP
    steps = len(losses(out))
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{steps}"]
    wait_for(lambda: not any(alive(each) for each in below), 30)


def test_a_run_whose_output_can_not_be_written(train, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    stream = open(write, "w", buffering=1)  # noqa: SIM115
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    handler = logging.StreamHandler(stream)  # another package's own
    logging.getLogger().addHandler(handler)
    try:
        out = train("sd", "--train_batch_size", 1, "--max_train_steps", 3)
        train("sd", "--train_batch_size", 1, "--max_train_steps", 3, "--dry_run", out="dry")
        train("sd", "--no_such_flag", expect=2)
    finally:
        logging.getLogger().removeHandler(handler)
        with contextlib.suppress(OSError):
            stream.close()
    assert len(losses(out)) == 3
    assert (out / "model_index.json").exists()


@pytest.mark.slow
def test_a_reader_that_ends_is_not_the_runs_end(pipelines, images, tmp_path):
    """As in `2>&1 | tee log` when tee is killed: the run goes on to its end and exports, with status 0."""
    out = tmp_path / "out"
    words = [sys.executable, *command(pipelines, images, out, "--train_batch_size", 1, "--max_train_steps", 40)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(lambda: (out / "metrics.jsonl").exists())
    process.stdout.close()
    assert process.wait(120) == 0
    assert len(losses(out)) == 40
    assert (out / "model_index.json").exists()


class TestStreams:
    def broken(self, tmp_path) -> TextIO:
        """A pipe without a reader."""
        read, write = os.pipe()
        os.close(read)
        return open(write, "w", buffering=1)

    def test_what_can_not_be_written_is_dropped(self, tmp_path, monkeypatch):
        with open(tmp_path / "closed", "w") as closed:
            pass
        full = open("/dev/full", "w", buffering=1)  # noqa: SIM115
        for stream in (self.broken(tmp_path), full, closed, None):
            monkeypatch.setattr(sys, "stdout", stream)
            monkeypatch.setattr(sys, "stderr", stream)
            with lasting_streams():
                print("a line")
                print("another", file=sys.stderr, flush=True)
                with tqdm(range(3), mininterval=0) as bar:
                    assert list(bar) == [0, 1, 2]
                assert not sys.stderr.isatty()
            flush_streams()
            assert sys.stdout is stream
        with pytest.raises(OSError, match="No space"):
            full.close()

    def test_a_character_that_the_encoding_lacks(self, tmp_path, monkeypatch):
        with open(tmp_path / "ascii", "w", encoding="ascii") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            with lasting_streams():
                print("caf\u00e9 \udce9")
        assert (tmp_path / "ascii").read_text() == "caf\\xe9 \\udce9\n"

    def test_a_secret_is_shown_nowhere(self, monkeypatch, capsys):
        monkeypatch.setattr("utils.config.standard_streams._SECRETS", set())
        hide("hf_0123456789")
        hide("s")
        with lasting_streams():
            print("it is hf_0123456789, says", "hf_0123456789", file=sys.stderr)
        assert capsys.readouterr().err == "it is ***, says ***\n"


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def descendants(process: int) -> list[int]:
    """The processes below one, by /proc."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children] + [each for child in children for each in descendants(int(child))]


LAUNCHERS = {
    "accelerate with one process": (*launcher("accelerate.commands.launch"), "--num_processes", "1", "--cpu"),
    "torchrun with two": (*launcher("torch.distributed.run"), "--nproc_per_node", "2", "--master_port", "29641"),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_that_is_ended_leaves_a_checkpoint_and_no_process(pipelines, images, tmp_path, name, number):
    out, log = tmp_path / "out", tmp_path / "log"
    flags = ("--train_batch_size", 1, "--max_train_steps", 5000, "--dataloader_num_workers", 1)
    words = [*LAUNCHERS[name], *command(pipelines, images, out, *flags)]
    with log.open("w") as stderr:
        process = subprocess.Popen(words, stderr=stderr, start_new_session=True)
        wait_for(lambda: (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text()) > 500)
        below = descendants(process.pid)
        process.send_signal(number)
        assert process.wait(60) != 0
    wait_for(lambda: not any(alive(each) for each in below), 30)
    assert list(out.glob("checkpoint-*")), log.read_text()[-2000:]
    assert "continue with: " in log.read_text()


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_is_agreed():
    assert agreed([]) == (False, False, 0)
    assert agreed([0, 0, 0, 0, 0, 0]) == (False, False, 0)
    assert agreed([0, 0, 0, 0, 0, 1]) == (True, False, 0)
    assert agreed([0, 0, 0, 0, 2, 0]) == (True, True, 0)
    assert agreed([1, 0, 2, 0, 0, 0]) == (True, True, signal.SIGTERM)
    assert agreed([0, 0, 2, 0, 1, 1]) == (True, True, signal.SIGUSR1)
    assert agreed([0, 0, 0, 1, 0, 0]) == (True, True, signal.SIGHUP)


def test_the_resume_command_keeps_the_command_and_no_token(monkeypatch):
    for words in (["--hub_token", "s3cret"], ["--hub_token=s3cret"], ["--hub-token", "s3cret"]):
        command = resume_command(["a.py", "--x", "a b", *words, "--y", "1"])
        assert command.endswith("--x 'a b' --y 1 --resume_from_checkpoint latest")
        assert "s3cret" not in command
        assert "***" not in command
    latest = "python a.py --x 1 --resume_from_checkpoint latest"
    assert resume_command(["a.py", "--resume_from_checkpoint", "checkpoint-2", "--x", "1"]) == latest
    assert resume_command(["a.py", "--resume_from_checkpoint=latest", "--x", "1"]) == latest
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resume_command(["a.py"]) == "torchrun --nproc_per_node 2 a.py --resume_from_checkpoint latest"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launch = "accelerate launch --multi_gpu --num_processes 2 --mixed_precision bf16 a.py"
    assert resume_command(["a.py"]).startswith(launch)


@pytest.mark.parametrize("value", ["5", "1:2:3", "00:60:00", "x"])
def test_a_time_that_is_none(refused, value):
    refused(["--max_train_time", value], "--max_train_time must be HH:MM:SS")


@pytest.mark.parametrize("variable", LAUNCHED)
def test_a_token_under_a_launcher_is_refused(refused, monkeypatch, capsys, variable):
    monkeypatch.setattr("utils.training.compatibility.atexit.register", lambda *_: None)
    monkeypatch.setenv(variable, "0")
    refused(["--push_to_hub", "--hub_token", "hf_0123456789"], "--hub_token: ", "HF_TOKEN", "hf auth login")
    assert "hf_0123456789" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_no_launcher_prints_the_token(pipelines, images, tmp_path, name):
    flags = ("--max_train_steps", 1, "--hub_token", "hf_0123456789")
    words = [*LAUNCHERS[name], *command(pipelines, images, tmp_path / "out", *flags)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode != 0
    assert "error: --hub_token: launchers print the command line" in done.stderr
    assert "hf_0123456789" not in done.stderr + done.stdout


def test_loaders_processes_end_with_a_process_that_left_them_running():
    """They hear no signal of those that Python ends its processes with, and then waits for."""
    lines = """
        import torch
        from utils.data.workers import make_loader
        batches = iter(make_loader(torch.arange(4.0), 1, persistent_workers=True))
        print(next(batches).item())
    """
    words = [sys.executable, "-c", dedent(lines)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.0\n", "")


def test_an_error_of_every_process_is_printed_by_the_main_one_and_of_one_process_by_that(capsys, monkeypatch):
    """A launcher ends all processes once one has ended: the others leave the main one time to print its line."""
    waited = []
    monkeypatch.setattr("utils.config.options.time.sleep", waited.append)

    def ended_by(error: Exception, rank: int) -> str:
        def run(_argv):
            raise error

        monkeypatch.setenv("RANK", str(rank))
        assert run_script(run, []) != 0
        return capsys.readouterr().err

    wrong, stopped, diverged = UserError("--x 1: wrong"), Stopped("stopped at step 3", 15), Diverged("it diverged")
    assert [ended_by(error, 0) for error in (wrong, stopped)] == ["error: --x 1: wrong\n", "stopped at step 3\n"]
    assert not waited
    assert ended_by(wrong, 3) == "process 3: error: --x 1: wrong\n"
    assert waited == [MAIN_SECONDS]
    assert [ended_by(error, 3) for error in (stopped, diverged)] == ["", ""]
    assert waited[1:] == [AGREED_SECONDS] * 2


@pytest.mark.parametrize("name", ["SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK"])
def test_processes_of_other_launchers_wait_for_the_main_one_too(name, capsys, monkeypatch):
    waited = []
    monkeypatch.setattr("utils.config.options.time.sleep", waited.append)
    monkeypatch.delenv("RANK", raising=False)

    def run(_argv):
        raise UserError("--x 1: wrong")

    for rank, said in (("0", "error: --x 1: wrong\n"), ("2", "process 2: error: --x 1: wrong\n")):
        monkeypatch.setenv(name, rank)
        assert run_script(run, []) == 2
        assert capsys.readouterr().err == said
    assert waited == [MAIN_SECONDS]
    monkeypatch.setenv("RANK", "0")  # torchrun's or accelerate's own, on each of srun's nodes
    run_script(run, [])
    assert capsys.readouterr().err == "error: --x 1: wrong\n"
