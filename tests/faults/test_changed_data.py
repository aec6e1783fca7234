"""Data that changed between a run and its resumption."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.comparing import assert_same_bits, weights
from tests.conftest import message
from utils.data.data_fingerprint import FileFacts, compare, content_name, content_table, read_content, write_content
from utils.runtime.stop_requests import StopRequests
from utils.training.checkpoint import MANIFEST, STATE, _hash

FLAGS = ("--train_batch_size", 2, "--lr_scheduler", "constant", "--checkpointing_steps", 2)
ON = ("--resume_from_checkpoint", "latest")


def relist_all(checkpoint: Path) -> None:
    """The same of a checkpoint with folders."""
    paths = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST]
    facts = {str(path.relative_to(checkpoint)): {"size": path.stat().st_size, "sha256": _hash(path)} for path in paths}
    (checkpoint / MANIFEST).write_text(json.dumps({"files": facts}))


def facts(count: int, **more: np.ndarray) -> FileFacts:
    """Those of so many files."""
    values = {"num_bytes": np.arange(count), "times": np.arange(count), "digests": np.array([b""] * count, object)}
    return FileFacts(**values | more)


class TestContents:
    names = tuple(f"{number}.png" for number in range(5))

    def table(self, names=names, captions=None, masks=None, **more):
        captions = captions or [(name,) for name in names]
        return content_table(names, facts(len(names), **more), masks, captions)

    def test_a_copy_elsewhere_is_the_same(self):
        digests = np.array([b"a", b"b", b"c", b"d", b"e"], object)
        then, now = self.table(digests=digests), self.table(digests=digests, times=np.full(5, 99))
        assert compare(then, now) == ("", 0)
        assert content_name(then) == content_name(now)

    def test_without_digests_new_times_are_said(self):
        assert compare(self.table(), self.table(times=np.array([9, 1, 2, 3, 9]))) == ("", 2)

    def test_all_that_may_change_is_named(self):
        digests = np.array([b"a", b"b", b"c", b"d", b"e"], object)
        then = self.table(digests=digests, masks=facts(5, digests=digests))
        names = ("0.png", "1.png", "2.png", "3.png", "new.png")
        captions = [("0.png",), ("another",), ("2.png",), ("3.png", "two"), ("x",)]
        now = self.table(names, captions, facts(5, digests=digests[[0, 1, 3, 3, 4]]), digests=digests[[1, 0, 2, 3, 4]])
        words = compare(then, now).words
        assert words == (
            "2 changed (0.png, 1.png), 2 with other captions (1.png, 3.png), 1 with other masks (2.png), "
            "1 added (new.png), 1 missing (4.png)"
        )

    def test_captions_that_are_read_as_empty_now_are_named(self):
        then = self.table(captions=[("None",), ("NULL",), ("NA", "x"), ("",), ("None",)])
        now = self.table(captions=[(), (), ("x",), (), ("None",)])
        assert compare(then, now).words == (
            "2 with other captions (2.png, 3.png), 2 with captions such as NULL or None, which are now read as empty "
            "(0.png, 1.png)"
        )

    def test_a_damaged_record_is_not_believed(self, tmp_path):
        name = write_content(tmp_path, self.table())
        whole = (tmp_path / name).read_bytes()
        assert compare(read_content(tmp_path, name), self.table()) == ("", 0)
        for place in range(0, len(whole), 29):
            content = bytearray(whole)
            content[place] ^= 4
            (tmp_path / name).write_bytes(content)
            with pytest.raises((OSError, ValueError)):
                read_content(tmp_path, name)


def exchange(data: Path) -> None:
    """Two images of one size, with their times."""
    os.rename(data / "000.png", data / "x")
    os.rename(data / "012.png", data / "000.png")
    os.rename(data / "x", data / "012.png")


def edit_caption(data: Path) -> None:
    file = data / "metadata.jsonl"
    file.write_text(file.read_text().replace("a red square", "a pink square"))


def save_again(data: Path) -> None:
    pixels = np.asarray(Image.open(data / "003.png")).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(data / "003.png")


def rename(data: Path) -> None:
    os.rename(data / "003.png", data / "renamed.png")
    file = data / "metadata.jsonl"
    file.write_text(file.read_text().replace("003.png", "renamed.png"))


EDITS = {
    exchange: "2 changed (000.png, 012.png)",
    edit_caption: "4 with other captions (000.png, 004.png, 008.png, ...)",
    save_again: "1 changed (003.png)",
    rename: "1 added (renamed.png), 1 missing (003.png)",
}


class TestResumed:
    @pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
    def test_edited_data_are_refused_and_named(self, train, tmp_path, capsys, caplog, edit):
        data = tiny.make_images(tmp_path / "data", 13)
        out = train("sd", *FLAGS, "--max_train_steps", 2, data=data)
        edit(data)
        before = sorted(path.name for path in out.iterdir() if not path.name.startswith("data_record"))
        train("sd", *FLAGS, "--max_train_steps", 3, *ON, data=data, expect=2)
        said = message(capsys)
        assert EDITS[edit] in said
        assert "--allow_changed_options" in said
        assert sorted(path.name for path in out.iterdir() if not path.name.startswith("data_record")) == before
        train("sd", *FLAGS, "--max_train_steps", 3, *ON, "--allow_changed_options", data=data)
        assert EDITS[edit] in caplog.text

    @pytest.mark.parametrize("flags", [["--validation_split", 0.4], ["--validation_data_dir"]], ids=["part", "folder"])
    def test_other_held_out_images_are_named(self, train, tmp_path, caplog, flags):
        data, held_out = tiny.make_images(tmp_path / "data", 12), tiny.make_images(tmp_path / "held out", 5)
        flags = [*FLAGS, *flags, *([held_out] if len(flags) == 1 else [])]
        out = train("sd", *flags, "--max_train_steps", 2, data=data)
        train("sd", *flags, "--max_train_steps", 3, *ON, data=data)
        assert "the held-out images differ from those of" not in caplog.text
        edited = held_out if flags[-1] == held_out else data
        texts = (edited / "metadata.jsonl").read_text().replace("square", "squirrel")
        (edited / "metadata.jsonl").write_text(texts)
        train("sd", *flags, "--max_train_steps", 4, *ON, "--allow_changed_options", data=data)
        assert f"the held-out images differ from those of {out}/checkpoint-3: " in caplog.text
        assert "with other captions" in caplog.text

    def test_data_moved_elsewhere_go_on_without_a_word(self, train, tmp_path, caplog):
        data = tiny.make_images(tmp_path / "data")
        whole = train("sd", *FLAGS, "--max_train_steps", 3, data=data, out="whole")
        out = train("sd", *FLAGS, "--max_train_steps", 2, data=data)
        copied = tmp_path / "elsewhere"
        copied.mkdir()
        for file in data.iterdir():
            (copied / file.name).write_bytes(file.read_bytes())
        caplog.clear()
        train("sd", *FLAGS, "--max_train_steps", 3, *ON, data=copied)
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert_same_bits(weights(whole), weights(out))

    def test_a_checkpoint_without_a_record_goes_on_with_a_line(self, train, caplog):
        out = train("sd", *FLAGS, "--max_train_steps", 2)
        for file in out.glob("data_record-*"):
            file.unlink()
        train("sd", *FLAGS, "--max_train_steps", 3, *ON)
        assert caplog.text.count("changes of images or captions since") == 1

    def test_an_option_that_the_checkpoint_does_not_know_is_at_its_default(self, train, capsys):
        out = train("sd", *FLAGS, "--use_ema", "--max_train_steps", 2)
        state = out / "checkpoint-2" / STATE
        facts = json.loads(state.read_text())
        del facts["facts"]["training"]["ema_every"]
        state.write_text(json.dumps(facts))
        relist_all(out / "checkpoint-2")
        train("sd", *FLAGS, "--use_ema", "--max_train_steps", 4, *ON, "--ema_every", 2, expect=2)
        assert "--ema_every 2 (the checkpoint used 1)" in message(capsys)
        train("sd", *FLAGS, "--use_ema", "--max_train_steps", 3, *ON)

    def test_nothing_is_renamed_by_a_run_that_is_refused(self, train, capsys):
        """Neither for another seed, nor for a prompt that the pipeline does not take at last."""
        out = train("sd", *FLAGS, "--max_train_steps", 4)
        names = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
        for more in (["--seed", 1], ["--layer_rates", "nothing=2"], ["--loss_module", "/nowhere.py"]):
            train("sd", *FLAGS, "--max_train_steps", 4, "--resume_from_checkpoint", "checkpoint-2", *more, expect=2)
        assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == names

    def test_garbage_in_all_that_is_read_again(self, train, tmp_path):
        flags = (*FLAGS, "--validation_data_dir", train.images, "--layer_norm_steps", 1)
        whole = train("sd", *flags, "--max_train_steps", 3, out="whole")
        out = train("sd", *flags, "--max_train_steps", 2)
        for name in ("metrics.jsonl", "validation.jsonl", "layers.jsonl", "epochs.jsonl"):
            with (out / name).open("ab") as file:
                file.write(b"\0\0\xff" + b"[" * 3000 + b"\n")
        for name in ("run.json", "data_report.json"):
            (out / name).write_bytes(b"[" * 100_000)
        for name in ("SAVE", "STOP"):
            (out / name).mkdir()
        train("sd", *flags, "--max_train_steps", 3, *ON)
        assert_same_bits(weights(whole), weights(out))
        assert b"\0\0\xff[[" in (out / "metrics.jsonl").read_bytes()
        assert b"\0\0\xff[[" in (out / "validation.jsonl").read_bytes()
        assert len([line for line in (out / "metrics.jsonl").read_bytes().splitlines() if line.startswith(b"{")]) == 3


class TestAskingByFolders:
    @pytest.mark.parametrize("name", ["SAVE", "STOP"])
    def test_a_folder_or_a_link_asks_as_a_file_does(self, tmp_path, monkeypatch, name):
        monkeypatch.setattr("utils.runtime.stop_requests.LOOK_SECONDS", 0)
        requests = StopRequests(tmp_path, None)
        for make in (Path.mkdir, Path.touch, lambda path: path.symlink_to("/nowhere")):
            make(tmp_path / name)
            assert requests.asked(True)[-2:] == [float(name == "STOP"), float(name == "SAVE")]
            requests.remove_heard()
            assert not os.path.lexists(tmp_path / name)
            assert requests.asked(True)[-2:] == [0.0, 0.0]

    def test_a_folder_that_can_not_be_removed_asks_once(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr("utils.runtime.stop_requests.LOOK_SECONDS", 0)
        requests = StopRequests(tmp_path, None)
        (tmp_path / "SAVE" / "inside").mkdir(parents=True)
        assert requests.asked(True)[-1] == 1
        for _ in range(3):
            requests.remove_heard()
            assert requests.asked(True)[-1] == 0
        assert caplog.text.count("can't be removed") == 1
        shutil.rmtree(tmp_path / "SAVE")
        assert requests.asked(True)[-1] == 0
        (tmp_path / "SAVE").touch()
        assert requests.asked(True)[-1] == 1
        requests.remove_files()
        assert not (tmp_path / "SAVE").exists()
