"""What goes wrong around a run: disks, damaged folders, killed loaders, losses that are not finite."""

import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import accelerate
import pytest
from PIL import Image

from tests import tiny
from tests.comparing import assert_same_bits, losses, weights
from tests.conftest import message
from tests.launching import command
from tests.text_runs import FLAGS
from utils.data.loader import TrainingDataset
from utils.training import validation_loss as held_out
from utils.training.checkpoint import Checkpoints, damage
from utils.training.encoding import CacheFiller, Encoder
from utils.training.log import RunLog
from utils.training.objective import Objective
from utils.training.saving import CheckpointSaver
from utils.training.state import TrainingState
from utils.training.validation_loss import HeldOut

BOTH = pytest.mark.parametrize("kind", ["sd", "pixels"])


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """small_disk(64) makes a disk of so many KiB."""
    mounted = []

    def mount(kibibytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "none", str(folder)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("disks can't be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def size_of(folder: Path) -> int:
    """KiB of all files, in whole pages."""
    return sum(4 * -(-path.stat().st_size // 4096) for path in folder.rglob("*") if path.is_file())


@BOTH
def test_a_disk_that_fills_while_it_saves(train, kind, small_disk, capsys):
    """The checkpoint before stays, nothing half written does, and with room the run goes on to the same end."""
    whole = train(kind, *FLAGS, "--max_train_steps", 4, out="whole")
    disk = small_disk(int(1.5 * size_of(whole / "checkpoint-2")) + 200)
    out = train(kind, *FLAGS, "--max_train_steps", 4, out=disk / "out", expect=2)
    said = message(capsys)
    assert "checkpoint-4 can't be written to" in said
    assert "No space left" in said
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-2"]
    assert not list(out.glob(".tmp*"))
    more = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    train(kind, *FLAGS, *more, out=disk / "out")
    assert_same_bits(weights(whole), weights(out))


@BOTH
def test_a_disk_that_fills_while_it_exports(train, kind, small_disk, capsys):
    whole = train(kind, *FLAGS, "--max_train_steps", 2, out="whole")
    disk = small_disk(size_of(whole) - size_of(whole / "unet") // 2)
    out = train(kind, *FLAGS, "--max_train_steps", 2, out=disk / "out", expect=2)
    said = message(capsys)
    assert "the result can't be written to" in said
    assert "resume with --resume_from_checkpoint latest" in said
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    train(kind, *FLAGS, "--max_train_steps", 2, "--resume_from_checkpoint", "latest", out=disk / "out")
    assert_same_bits(weights(whole), weights(out))


@BOTH
def test_a_disk_that_refuses_samples_and_records(train, kind, monkeypatch, caplog):
    """What shows the training is left out with a warning each; the training is what it would have been."""
    samples = ["--validation_prompt", "a", "--validation_steps", 1] if kind == "sd" else ["--save_images_steps", 1]
    flags = [*FLAGS, "--max_train_steps", 2, "--validation_split", 0.3, *samples]
    whole = train(kind, *flags, out="whole")

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", refuse)
        patch.setattr(held_out, "replacing", refuse)
        out = train(kind, *flags, out="refused")
    assert_same_bits(weights(whole), weights(out))
    for name in ("samples", "validation.jsonl"):
        assert any(f"{name}" in line and "can't be written: No space left" in line for line in caplog.messages)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    "name",
    [
        *("run.json", "data_report.json", "data_report.jsonl", "metrics.jsonl", "epochs.jsonl", "validation.jsonl"),
        *("samples", "unet", "model_index.json", "checkpoint-2", "checkpoint-1", "best", ".lock"),
    ],
)
def test_what_stands_where_the_run_writes_ends_in_one_line_or_a_result(train, kind, name, tmp_path, capsys):
    """A folder in place of a file, or a file in place of a folder, of an output folder that is resumed in."""
    flags = [*FLAGS, "--checkpointing_steps", 1, "--validation_split", 0.3]
    out = train(kind, *flags, "--max_train_steps", 1)
    path = out / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_bytes(b"a file")
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
        (path / "kept").write_bytes(b"of the user's")
    words = ["--max_train_steps", 2, "--resume_from_checkpoint", "latest", "--output_dir", out, "--report_to", "none"]
    status = run_again(train, kind, [*flags, *words])
    assert status in (0, 2)
    if status == 2:
        assert str(out) in message(capsys)
    else:
        assert (out / "model_index.json").is_file()


def run_again(train, kind: str, flags: Sequence[object]) -> int:
    """The status of a run whose end is not known."""
    try:
        train(kind, *flags)
    except AssertionError as error:
        return int(str(error).split()[1])
    return 0


def test_a_disk_that_is_full_before(train, small_disk, capsys):
    disk = small_disk(64)
    (disk / "filled").write_bytes(b"0" * 48 * 1024)
    train("sd", *FLAGS, "--max_train_steps", 40, out=disk / "out", expect=2)
    assert "No space left" in message(capsys)


def test_a_disk_that_becomes_read_only(train, small_disk, capsys):
    disk = small_disk(100_000)
    out = train("sd", *FLAGS, "--max_train_steps", 2, out=disk / "out")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    more = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    train("sd", *FLAGS, *more, out=disk / "out", expect=2)
    assert "Read-only" in message(capsys)
    assert not list(out.glob(".tmp*"))


def test_an_image_that_vanishes(train, tmp_path, caplog, capsys):
    """Between the survey and its use: replaced, named and counted; with error, the run ends with its name."""
    data = tiny.make_images(tmp_path / "data", 8)
    fetch = TrainingDataset.__getitem__

    def vanish(self, piece):
        (data / "003.png").unlink(missing_ok=True)
        return fetch(self, piece)

    flags = [*FLAGS, "--max_train_steps", 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingDataset, "__getitem__", vanish)
        out = train("sd", *flags, "--max_bad_fraction", 0.2, data=data, out="skip")
        report = json.loads((out / "data_report.json").read_text())
        assert "003.png" in json.dumps(report)
    data = tiny.make_images(tmp_path / "again", 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingDataset, "__getitem__", vanish)
        train("sd", *flags, "--on_bad_image", "error", data=data, out="error", expect=2)
    assert "003.png" in message(capsys)


@BOTH
def test_a_save_that_was_killed_leaves_nothing_that_counts(train, kind, monkeypatch):
    """As kill -9 leaves it: whatever was written aside is passed over, and removed at the next start."""
    whole = train(kind, *FLAGS, "--max_train_steps", 4, out="whole")
    parts = train(kind, *FLAGS, "--max_train_steps", 2, out="parts")
    aside = parts / ".tmp-checkpoint-4-123"
    shutil.copytree(parts / "checkpoint-2", aside)
    (aside / "manifest.json").unlink()
    (parts / "checkpoint-4").mkdir()  # named, and empty
    train(kind, *FLAGS, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", out="parts")
    assert not aside.exists()
    assert_same_bits(weights(whole), weights(parts))
    assert losses(whole) == losses(parts)


def test_what_is_no_checkpoint_is_passed_over(train, tmp_path):
    out = train("sd", *FLAGS, "--max_train_steps", 2)
    for name in ("checkpoint-20.tmp", "checkpoint-best", "checkpoint-", "my-checkpoint-9"):
        (out / name).mkdir()
    (out / "checkpoint-5").write_text("a file")
    assert [path.name for path in Checkpoints(out, None).listed()] == ["checkpoint-2"]
    train("sd", *FLAGS, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    assert len(losses(out)) == 3


def test_a_length_that_is_behind_already(train):
    out = train("sd", *FLAGS, "--max_train_steps", 4)
    before = weights(out)
    train("sd", *FLAGS, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    assert len(losses(out)) == 4
    assert_same_bits(before, weights(out))


def test_an_average_that_begins_with_a_resumed_run(train, caplog):
    out = train("sd", *FLAGS, "--max_train_steps", 2)
    train("sd", *FLAGS, "--max_train_steps", 2, "--use_ema", "--resume_from_checkpoint", "latest")
    assert any("has no moving average; it starts from the weights" in record.message for record in caplog.records)
    assert_same_bits(weights(out / "checkpoint-2"), weights(out))


@pytest.fixture
def kill_a_worker() -> Callable[[], None]:
    """As the kernel's out-of-memory killer."""
    others = set(multiprocessing.active_children())

    def kill() -> None:
        worker = next(each for each in multiprocessing.active_children() if each not in others)
        os.kill(worker.pid, signal.SIGKILL)

    return kill


@BOTH
def test_a_loader_that_is_killed(train, kind, monkeypatch, capsys):
    def die(self, piece):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(TrainingDataset, "__getitem__", die)
    train(kind, *FLAGS, "--max_train_steps", 2, "--dataloader_num_workers", 1, expect=2)
    said = message(capsys)
    assert "a data-loader worker was killed (out of memory?" in said
    assert said.endswith("lower --dataloader_num_workers; no step was done yet")


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (Encoder, "encode", 6),  # in a step of two micro-batches
        (TrainingState, "update", 3),
        (HeldOut, "losses", 2),
        (CheckpointSaver, "save", 1),
        (RunLog, "step", 3),
    ],
)
def test_a_worker_that_is_killed_at_any_place(train, kill_a_worker, monkeypatch, capsys, tmp_path, owner, name, call):
    """The step in which it is noticed is not done, and those before are saved."""
    data = tiny.make_images(tmp_path / "data", 10)
    flags = [*FLAGS, "--gradient_accumulation_steps", 2, "--max_train_steps", 30, "--checkpointing_steps", 3]
    flags += ["--validation_split", 0.3, "--validation_steps", 3, "--dataloader_num_workers", 2]
    calls, original = [], getattr(owner, name)

    def killing(*arguments, **named):
        calls.append(None)
        if len(calls) == call:
            kill_a_worker()
        return original(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, killing)
        parts = train("sd", *flags, data=data, out="parts", expect=2)
    said = message(capsys)
    step = len(losses(parts))
    assert step < 7
    assert f"lower --dataloader_num_workers; saved checkpoint-{step}; resume with: python " in said
    assert said.endswith("--resume_from_checkpoint latest")
    assert not damage(parts / f"checkpoint-{step}")
    if owner is Encoder:
        more = ["--max_train_steps", step + 2, "--dataloader_num_workers", 0]
        train("sd", *flags, *more, "--resume_from_checkpoint", "latest", data=data, out="parts")
        whole = train("sd", *flags, *more, data=data, out="whole")
        assert losses(whole) == losses(parts)
        assert_same_bits(weights(whole), weights(parts))


def test_a_worker_that_is_killed_while_the_cache_is_filled(train, kill_a_worker, monkeypatch, capsys, tmp_path):
    flags = ["--cache_latents", "--encoding_cache_dir", tmp_path / "cache", "--cache_batch_size", 1]
    with pytest.MonkeyPatch.context() as patch:
        moments = CacheFiller.moments

        def killing(self, pixels):
            kill_a_worker()
            return moments(self, pixels)

        patch.setattr(CacheFiller, "moments", killing)
        train("sd", *FLAGS, *flags, "--max_train_steps", 2, "--dataloader_num_workers", 1, expect=2)
    assert message(capsys).endswith("lower --dataloader_num_workers")
    train("sd", *FLAGS, *flags, "--max_train_steps", 2, "--dataloader_num_workers", 1, out="again")


def test_a_worker_that_runs_out_of_memory(train, monkeypatch, capsys):
    """It is no lack of the device's memory, for which a step is begun again with smaller pieces."""

    def fail(self, piece):
        raise MemoryError("no more")

    monkeypatch.setattr(TrainingDataset, "__getitem__", fail)
    for workers in (0, 1):
        train("sd", *FLAGS, "--max_train_steps", 2, "--dataloader_num_workers", workers, out=f"{workers}", expect=2)
        assert "out of memory while a batch was loaded" in message(capsys)


def test_a_process_that_reads_headers_and_is_killed(train, monkeypatch, capsys, tmp_path):
    data = tiny.make_images(tmp_path / "data", 8)  # of which nothing is remembered
    monkeypatch.setattr("utils.data.survey.MANY", 1)
    monkeypatch.setattr("utils.data.survey._read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    train("sd", *FLAGS, "--max_train_steps", 2, data=data, expect=2)
    assert "a process that reads files was killed" in message(capsys)


@pytest.mark.slow
def test_a_loader_that_hangs(train, monkeypatch, capsys):
    monkeypatch.setattr(TrainingDataset, "__getitem__", lambda self, piece: signal.pause())
    flags = ["--dataloader_num_workers", 1, "--dataloader_timeout", 2]
    train("sd", *FLAGS, "--max_train_steps", 2, *flags, expect=2)
    assert "no batch was loaded within --dataloader_timeout" in message(capsys)


def test_processes_that_would_train_apart(refused, monkeypatch):
    """As accelerate does where the GPUs that it was launched for are not there."""
    create = accelerate.Accelerator.__init__

    def create_alone(self, *arguments, **named) -> None:
        create(self, *arguments, **named)
        monkeypatch.setenv("WORLD_SIZE", "2")

    monkeypatch.setattr(accelerate.Accelerator, "__init__", create_alone)
    refused([], "2 processes were started but accelerate joined 1")


@pytest.fixture
def losses_that_are_not_finite(monkeypatch) -> Callable[[set[int]], None]:
    """losses_that_are_not_finite({2, 3}) spoils the losses of steps 2 and 3, of one micro-batch each, from 1."""

    def arrange(steps: set[int]) -> None:
        def forward(self, encoded):
            losses = plain(self, encoded)
            return losses * math.nan if encoded.batch.step + 1 in steps else losses

        monkeypatch.setattr(Objective, "forward", forward)

    plain = Objective.forward
    return arrange


@BOTH
def test_a_diverged_run_says_so_and_ends_with_1(train, kind, losses_that_are_not_finite, capsys, monkeypatch):
    """In its error, its record and its model card; the result is written."""
    cards, verdict = [], "3 of 4 steps had no finite loss and gradient"
    monkeypatch.setattr("utils.training.session.create_repository", lambda folder, options: folder.name)
    monkeypatch.setattr(
        "utils.training.model_card.upload", lambda folder, *_: cards.append((folder / "README.md").read_text())
    )
    losses_that_are_not_finite({1, 2, 4})
    out = train(kind, *FLAGS, "--max_train_steps", 4, "--push_to_hub", expect=1)
    assert f"the run has diverged: {verdict}" in message(capsys)
    assert json.loads((out / "run.json").read_text())["outcome"] == {
        "steps": 4,
        "skipped_steps": 3,
        "diverged": verdict,
    }
    assert f"**The training has diverged: {verdict}.**" in cards[0]
    assert (out / "model_index.json").exists()


def test_a_resumed_run_counts_the_steps_before(train, losses_that_are_not_finite):
    losses_that_are_not_finite({1, 2})
    flags = ["--train_batch_size", 1, "--checkpointing_steps", 3]
    out = train("pixels", *flags, "--max_train_steps", 3, expect=1)
    train("pixels", *flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert json.loads((out / "run.json").read_text())["outcome"] == {"steps": 4, "skipped_steps": 2, "diverged": None}
    losses_that_are_not_finite({5})
    train("pixels", *flags, "--max_train_steps", 5, "--resume_from_checkpoint", "latest", expect=1)


def test_a_run_whose_last_steps_are_not_finite(train, losses_that_are_not_finite, capsys):
    flags = ["--train_batch_size", 1, "--max_skipped_steps", 50, "--max_train_steps", 21]
    losses_that_are_not_finite(set(range(12, 22)))
    train("pixels", *flags, expect=1)
    assert "the last 10 of 21 steps had no finite loss and gradient" in message(capsys)


def test_weights_that_are_not_finite_are_named(train, monkeypatch, capsys):
    """As after a last step that was too large."""
    update = TrainingState.update

    def spoil(state, *others):
        update(state, *others)
        state.parameters[0].parameter.data.view(-1)[0] = math.inf

    monkeypatch.setattr(TrainingState, "update", spoil)
    train("sd", *FLAGS, "--max_train_steps", 1, expect=1)
    assert "the run has diverged: its weights are not all finite" in message(capsys)


@pytest.mark.slow
def test_a_killed_runs_lock_does_not_block(train, pipelines, images, tmp_path):
    words = [sys.executable, *command(pipelines, images, tmp_path / "out", *FLAGS, "--max_train_steps", 10_000)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (tmp_path / "out" / "checkpoint-2").is_dir():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "out" / ".lock").exists()
    train("sd", *FLAGS, "--max_train_steps", 3, "--resume_from_checkpoint", "checkpoint-2")


def test_an_unexpected_error_of_a_save_is_raised(train, monkeypatch):
    """Nothing hides what nobody foresaw."""
    monkeypatch.setattr(TrainingState, "saving", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train("sd", *FLAGS, "--max_train_steps", 2)
