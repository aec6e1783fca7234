"""What a run keeps on disk and reads again, whatever became of it in between."""

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from utils.config.options import UserError
from utils.runtime.step_lines import JsonLines, keep_steps
from utils.training.checkpoint import MANIFEST, OPTIMIZER, STATE, Checkpoints, _hash, damage
from utils.training.options import EarlyStoppingOptions
from utils.training.validation_loss import History, Measurement

FACTS = {"structure": {}, "training": {}, "total_steps": 9}


def make_checkpoint(folder: Path, step: int, **state: object) -> Path:
    """A checkpoint of a run that trains one weight."""

    def write(aside: Path) -> None:
        aside.mkdir()
        save_file({"weight/exp_avg": torch.full((3,), float(step))}, aside / OPTIMIZER)
        values = {"step": step, "facts": FACTS, "ema_updates": None, "scaler": None, "samples_at_once": None}
        (aside / STATE).write_text(json.dumps(values | {"optimizer": {}, "optimizer_groups": []} | state))

    folder.mkdir(parents=True, exist_ok=True)
    return Checkpoints(folder, None).save(step, [write])


def relist(checkpoint: Path) -> None:
    """Has the manifest say what the files are now, as one who edits by hand may."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _hash(path)}
        for path in checkpoint.iterdir()
        if path.name != MANIFEST
    }
    (checkpoint / MANIFEST).write_text(json.dumps({"files": files}))


def entry(name: str = STATE, **more: object) -> str:
    return json.dumps({"files": {name: {"size": 1, "sha256": "0" * 64} | more}})


MANIFESTS = {
    "nothing": "",
    "half": '{"files": {"training_st',
    "nested": "[" * 200_000,
    "nested maps": '{"files":' * 100_000,
    "no files": '{"files": {}}',
    "a list": "[]",
    "a list of files": '{"files": ["training_state.json"]}',
    "null": "null",
    "a number": "1" * 5000,
    "a file that is a number": '{"files": {"training_state.json": 3}}',
    "a size that is text": entry(size="1"),
    "a negative size": entry(size=-1),
    "a size without end": '{"files": {"training_state.json": {"size": Infinity, "sha256": ""}}}',
    "a hash that is a list": entry(sha256=[]),
    "outside": entry("../other"),
    "absolute": entry("/etc/passwd"),
    "itself": entry("."),
    "no name": entry(""),
    "a drive": entry("C:\\x"),
    "a zero byte": entry("a\0b"),
    "half a letter": entry("\ud800"),
    "a long name": entry("a" * 5000),
    "twice": '{"files": {"a": {"size": 1, "sha256": "0"}, "a": {"size": 2, "sha256": "0"}}}',
}


class TestManifests:
    @pytest.mark.parametrize("name", MANIFESTS)
    def test_latest_falls_back_from_any(self, tmp_path, name, caplog):
        whole, broken = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 4)
        (broken / MANIFEST).write_text(MANIFESTS[name], encoding="utf-8")
        checkpoints = Checkpoints(tmp_path, None)
        assert checkpoints.resolve("latest") == whole
        assert "skips checkpoint-4: " in caplog.text
        with pytest.raises(UserError, match="--resume_from_checkpoint checkpoint-4 is damaged"):
            checkpoints.resolve("checkpoint-4")
        assert checkpoints.found() == [whole]

    @pytest.mark.parametrize("name", [STATE, OPTIMIZER])
    def test_one_that_leaves_a_file_out(self, tmp_path, name):
        checkpoint = make_checkpoint(tmp_path, 2)
        content = json.loads((checkpoint / MANIFEST).read_text())
        del content["files"][name]
        (checkpoint / MANIFEST).write_text(json.dumps(content))
        assert damage(checkpoint) == f"{MANIFEST} does not list {name}"
        (checkpoint / name).unlink()
        assert damage(checkpoint) == f"{MANIFEST} does not list {name}"

    def test_a_pipe_or_a_folder_in_its_place(self, tmp_path):
        checkpoint = make_checkpoint(tmp_path, 2)
        (checkpoint / MANIFEST).unlink()
        (checkpoint / MANIFEST).mkdir()
        assert "is a folder" in damage(checkpoint)
        (checkpoint / MANIFEST).rmdir()
        os.mkfifo(checkpoint / MANIFEST)
        assert "is a pipe" in damage(checkpoint)

    def test_mutations_never_raise(self, tmp_path):
        checkpoint = make_checkpoint(tmp_path, 2)
        whole = {name: (checkpoint / name).read_bytes() for name in (MANIFEST, STATE, OPTIMIZER)}
        draws = random.Random(0)
        for _ in range(150):
            name = draws.choice(list(whole))
            content = bytearray(whole[name])
            for _ in range(draws.randint(1, 4)):
                place = draws.randrange(len(content))
                content[place : place + draws.choice([0, 1, 1, 7])] = draws.choice(
                    [b"", b"[", b'"', b"\0", b"9", b"-1"]
                )
            (checkpoint / name).write_bytes(content)
            if name != MANIFEST and draws.random() < 0.8:
                relist(checkpoint)
            assert isinstance(damage(checkpoint), str)
            for each, before in whole.items():
                (checkpoint / each).write_bytes(before)
        assert damage(checkpoint) == ""


STATES = {
    "no mapping": "[]",
    "nested": "[" * 200_000,
    "no facts": {"facts": None},
    "facts of lists": {"facts": {"structure": [], "training": {}, "total_steps": 1}},
    "a step that is text": {"step": "2"},
    "a negative step": {"step": -2},
    "a huge step": {"step": 10**30},
    "a step that is a truth": {"step": True},
    "another step than the name": {"step": 3},
    "averages that are text": {"ema_updates": "many"},
    "a scaler that is a list": {"scaler": []},
    "no samples at once": {"samples_at_once": 0},
    "numbers that are a list": {"optimizer": []},
    "numbers of lists": {"optimizer": {"weight": [1]}},
    "groups that are a mapping": {"optimizer_groups": {"lr": 1}},
    "groups of text": {"optimizer_groups": [{"lr": "fast"}]},
    "what is unknown": {"later": 1},
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_was_edited_and_listed_anew(tmp_path, name):
    whole, broken = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    change = STATES[name]
    if isinstance(change, dict):
        change = json.dumps(json.loads((broken / STATE).read_text()) | change)
    (broken / STATE).write_text(change)
    relist(broken)
    assert damage(broken)
    assert Checkpoints(tmp_path, None).resolve("latest") == whole


def test_an_optimizer_file_that_was_edited_and_listed_anew(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 2)
    for content in (b"", b"\xff" * 40, (1 << 60).to_bytes(8, "little"), (8).to_bytes(8, "little") + b"[[[[[[[["):
        (checkpoint / OPTIMIZER).write_bytes(content)
        relist(checkpoint)
        assert "optimizer.safetensors can't be read" in damage(checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-002",
        "checkpoint-2 (copy)",
        "checkpoint-1e3",
        "checkpoint-٣",
        "checkpoint--1",
        f"checkpoint-{9**240}",
    ],
)
def test_folders_of_other_names_neither_hide_nor_count(tmp_path, name, caplog):
    checkpoint = make_checkpoint(tmp_path, 2)
    (tmp_path / name).mkdir()
    checkpoints = Checkpoints(tmp_path, 1)
    assert checkpoints.listed() == checkpoints.found() == [checkpoint]
    assert checkpoints.resolve("latest") == checkpoint
    checkpoints.set_aside_after(1)
    assert (tmp_path / name).is_dir()
    with pytest.raises(UserError, match="is missing"):
        checkpoints.resolve(name)


class TestOthers:
    def make(self, folder: Path, *names: str) -> Path:
        folder.mkdir(parents=True)
        for name in names:
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"\x80\x04.")
        return folder

    def test_one_of_diffusers_is_named_and_kept(self, tmp_path, caplog):
        names = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "unet/config.json")
        folder = self.make(tmp_path / "checkpoint-500", *names)
        checkpoints = Checkpoints(tmp_path, 1)
        for asked in ("checkpoint-500", "latest"):
            with pytest.raises(UserError, match=r"of another program's.*start anew from its weights.*unet"):
                checkpoints.resolve(asked)
        make_checkpoint(tmp_path, 500)
        assert (tmp_path / "abandoned-checkpoint-500" / "optimizer.bin").exists()
        assert checkpoints.resolve("latest") == folder

    def test_one_of_kohya_is_named(self, tmp_path):
        self.make(tmp_path / "last-state", "optimizer.bin", "scheduler.bin", "train_state.json", "model.safetensors")
        with pytest.raises(UserError, match=r"another program's.*--lora_weights .*model.safetensors"):
            Checkpoints(tmp_path, None).resolve("last-state")


class TestPruning:
    def test_a_link_to_another_disk_is_kept_with_one_warning(self, tmp_path, caplog):
        elsewhere = make_checkpoint(tmp_path / "other disk", 1)
        out = tmp_path / "out"
        out.mkdir()
        (out / "checkpoint-1").symlink_to(elsewhere)
        checkpoints = Checkpoints(out, 1)
        for step in (2, 3, 4):
            shutil.copytree(make_checkpoint(tmp_path / "made", step), out / f"checkpoint-{step}")
            checkpoints._prune()
        assert sorted(path.name for path in out.iterdir()) == ["checkpoint-1", "checkpoint-4"]
        assert damage(elsewhere) == ""
        assert caplog.text.count("can't be removed") == 1

    def test_what_can_not_be_deleted_is_left_with_one_warning(self, tmp_path, caplog, monkeypatch):
        make_checkpoint(tmp_path, 1)
        remove = shutil.rmtree

        def refuse(path, *more, **named):
            if "checkpoint-1" in str(path):
                raise PermissionError(13, "Operation not permitted", str(path))
            remove(path, *more, **named)

        monkeypatch.setattr(shutil, "rmtree", refuse)
        checkpoints = Checkpoints(tmp_path, 1)
        for step in (2, 3):
            shutil.copytree(make_checkpoint(tmp_path / "made", step), tmp_path / f"checkpoint-{step}")
            checkpoints._prune()
            checkpoints.clean()
        assert [path.name for path in checkpoints.listed()] == ["checkpoint-3"]
        assert caplog.text.count("Operation not permitted") == 1

    def test_what_can_not_be_renamed_is_left(self, tmp_path, caplog, monkeypatch):
        for step in (1, 2):
            make_checkpoint(tmp_path, step)
        replace = os.replace

        def refuse(old, new):
            if "checkpoint-1-pruned" in str(new):
                raise OSError(16, "Device or resource busy")
            replace(old, new)

        monkeypatch.setattr(os, "replace", refuse)
        checkpoints = Checkpoints(tmp_path, 1)
        checkpoints._prune()
        checkpoints._prune()
        assert len(checkpoints.found()) == 2
        assert caplog.text.count("resource busy") == 1

    def test_files_are_hashed_as_they_are_at_last(self, tmp_path):
        """What a later job writes anew, and what the one before has written while the next one writes."""
        from utils.training import checkpoint

        order = []

        def first(aside: Path) -> None:
            aside.mkdir()
            (aside / "weights.bin").write_bytes(b"one")
            (aside / "changed.json").write_text("{}")

        def second(aside: Path) -> None:
            deadline = time.monotonic() + 20
            while "weights.bin" not in order and time.monotonic() < deadline:
                time.sleep(0.01)
            order.append("second job")
            (aside / "changed.json").write_text('{"a": 1}')

        plain = checkpoint._hash

        def noted(file: Path) -> str:
            found = plain(file)
            order.append(file.name)
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "_hash", noted)
            saved = Checkpoints(tmp_path, None).save(3, [first, second])
        assert order.index("weights.bin") < order.index("second job")
        files = json.loads((saved / MANIFEST).read_text())["files"]
        assert {name: facts["sha256"] for name, facts in files.items()} == {
            name: _hash(saved / name) for name in ("weights.bin", "changed.json")
        }

    def test_links_are_never_followed(self, tmp_path):
        precious = make_checkpoint(tmp_path / "other", 1)
        out = tmp_path / "out"
        out.mkdir()
        (out / ".tmp-checkpoint-9-1").symlink_to(precious)
        (out / "checkpoint-7").symlink_to(precious)
        checkpoints = Checkpoints(out, 1)
        checkpoints.clean()
        shutil.copytree(make_checkpoint(tmp_path / "made", 7), out / ".new")
        checkpoints.save(7, [lambda aside: shutil.copytree(out / ".new", aside)])
        assert not (out / "checkpoint-7").is_symlink()
        assert damage(precious) == ""


STRANGE = (b"\0" * 300, b"\xff\xfe garbage", b"[" * 200_000, b'{"step": "3"}', b'{"no": 1}', b"null", b'{"step": NaN}')


class TestLines:
    def test_what_is_no_line_of_a_step_stays_in_its_place(self, tmp_path, caplog):
        file = tmp_path / "metrics.jsonl"
        lines = []
        for number, each in enumerate(STRANGE):
            lines += [b'{"step": %d, "a": "\xe2\x80\xa8"}' % number, each]
        file.write_bytes(b"\n".join(lines) + b"\n")
        keep_steps(file, 3)
        again = tuple(b'{"step": %d,' % number for number in (4, 5, 6))
        assert file.read_bytes().splitlines() == [each for each in lines if not each.startswith(again)]
        assert caplog.text.count(f"{len(STRANGE)} lines are not JSON of a step") == 1

    def test_lines_of_any_length(self, tmp_path, caplog):
        file = tmp_path / "metrics.jsonl"
        long = b"x" * 40_000_000
        file.write_bytes(b'{"step": 1}\n' + long + b'\n{"step": 9}\n' + long)
        keep_steps(file, 3)
        assert file.read_bytes() == b'{"step": 1}\n' + long + b"\n" + long + b"\n"
        assert "2 lines" in caplog.text

    @pytest.mark.parametrize(
        ("end", "is_kept"),
        [(b'{"ste', False), (b'{"step": 7, "lo', False), (b'{"step": 2, "lo', True), (b"garbage", True), (b"{", False)],
    )
    def test_a_last_line_that_was_cut_off(self, tmp_path, end, is_kept):
        file = tmp_path / "metrics.jsonl"
        file.write_bytes(b'{"step": 1}\n' + end)
        keep_steps(file, 3)
        assert file.read_bytes() == b'{"step": 1}\n' + (end + b"\n" if is_kept else b"")

    @pytest.mark.parametrize("kind", ["pipe", "folder", "link to itself", "link to nothing"])
    def test_a_file_that_is_none_costs_its_lines_alone(self, tmp_path, caplog, kind):
        file = tmp_path / "metrics.jsonl"
        make = {
            "pipe": lambda: os.mkfifo(file),
            "folder": file.mkdir,
            "link to itself": lambda: file.symlink_to(file),
            "link to nothing": lambda: file.symlink_to(tmp_path / "nothing"),
        }
        make[kind]()
        keep_steps(file, 3)
        lines = JsonLines(file)
        for step in (4, 5):
            lines.write({"step": step})
        lines.close()
        assert caplog.text.count("can't be written") == (kind != "link to nothing")

    def test_the_validation_history_keeps_them_too(self, tmp_path, caplog):
        history = History(tmp_path, 0, EarlyStoppingOptions())
        for step in (0, 2, 4):
            history.add(Measurement(step, 1.0 + step, [1.0, 2.0]), write=True)
        file = tmp_path / "validation.jsonl"
        before = file.read_bytes().splitlines()
        file.write_bytes(
            b"\n".join([before[0], *STRANGE, before[1], b'{"step": 2, "loss": [], "curve": 1}', before[2]])
        )
        history = History(tmp_path, 3, EarlyStoppingOptions())
        assert [each.step for each in history.measurements] == [0, 2]
        assert f"{len(STRANGE) + 1} lines" in caplog.text
        history.add(Measurement(4, 1.0, [1.0]), write=True)  # with another number of timesteps
        after = file.read_bytes().splitlines()
        assert after[1 : 1 + len(STRANGE)] == list(STRANGE)
        assert len(after) == 3 + len(STRANGE) + 1


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"[]", b'{"scaling_factor": "x"}', b'{"scaling_factor": -1}'])
def test_a_measured_scaling_that_was_edited(tmp_path, content):
    from utils.models.latent_scaling import FILE, known_scaling

    assert known_scaling(tmp_path) is None
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"latent_scaling\.json"):
        known_scaling(tmp_path)
