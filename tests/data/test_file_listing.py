"""Listing folders: links, own and home folders, held-out files."""

import json
import logging
import os
from collections import Counter
from pathlib import Path

import pytest

from tests import tiny
from tests.records import keys, records_of
from tests.source_files import fates_of, ledger_of, parquet, picture, png, tar, touch
from utils.config.options import UserError, option, parse, with_values
from utils.data.captions import CaptionOptions
from utils.data.file_listing import list_folder
from utils.data.folders import list_files
from utils.data.source_options import DataOptions, SourceOptions
from utils.data.sources import read_records
from utils.runtime.atomic_files import MARKER, mark_as_own


class TestListing:
    def test_links_pipes_and_cycles_end(self, tmp_path):
        picture(tmp_path / "z" / "a.png")
        (tmp_path / "z" / "up").symlink_to(tmp_path)
        (tmp_path / "b").symlink_to(tmp_path / "z")
        (tmp_path / "self").symlink_to(tmp_path / "self")
        os.mkfifo(tmp_path / "pipe.png")
        (tmp_path / "null.png").symlink_to("/dev/null")
        listing = list_folder(tmp_path)
        assert listing.names == ["self", "z/a.png"]  # the folder itself goes before a link to it
        assert listing.special == {
            "pipe.png": "is a pipe, not a file",
            "null.png": "is a device, not a file",
        }
        records = records_of(tmp_path)
        assert keys(records) == ["z/a.png"]
        assert dict(records.refused) == listing.special

    def test_a_caption_that_is_a_pipe(self, tmp_path):
        picture(tmp_path / "a.png")
        picture(tmp_path / "b.png")
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "a.txt").symlink_to(tmp_path / "pipe")
        records = records_of(tmp_path)
        assert keys(records) == ["b.png"]
        assert "a pipe, not a file" in dict(records.refused)["a.png"]

    def test_many_nested_folders(self, tmp_path):
        names, here = [], os.open(tmp_path, os.O_RDONLY)
        try:
            for _ in range(1500):
                os.mkdir("d", dir_fd=here)
                inner = os.open("d", os.O_RDONLY, dir_fd=here)
                os.close(here)
                here = inner
                names.append("d")
            file = os.open("a.png", os.O_CREAT | os.O_WRONLY, dir_fd=here)
            os.write(file, png())
            os.close(file)
        finally:
            os.close(here)
        try:
            assert list_files(tmp_path) == ["/".join([*names, "a.png"])]
        finally:  # pytest's own cleaning is recursive
            for _ in range(1499):
                (tmp_path / "d" / "d").rename(tmp_path / "e")
                (tmp_path / "d").rmdir()
                (tmp_path / "e").rename(tmp_path / "d")

    def test_folders_that_cannot_be_listed_are_named(self, tmp_path, monkeypatch, caplog):
        picture(tmp_path / "a.png")
        picture(tmp_path / "locked" / "b.png")
        scan = os.scandir
        error = PermissionError(13, "Permission denied")

        def scandir(path):
            if Path(path).name == "locked":
                raise error
            return scan(path)

        monkeypatch.setattr(os, "scandir", scandir)
        assert list_files(tmp_path) == ["a.png"]
        assert "locked, which can't be listed: Permission denied" in caplog.text

    def test_names_that_are_no_unicode(self, tmp_path):
        folder = tmp_path / "data"
        picture(folder / "x.png")
        os.rename(folder / "x.png", os.fsencode(folder) + b"/caf\xe9.png")
        found = fates_of(ledger_of(folder, tmp_path / "memory"), tmp_path)
        assert found == {"caf\udce9.png": "trained"}

    @pytest.mark.parametrize("name", ["we[i]rd", "a*b", "q?x", "{a,b}", "d::e", "[0-9]"])
    def test_paths_that_look_like_patterns(self, tmp_path, name):
        folder = tmp_path / name
        parquet(folder / "train-0.parquet")
        parquet(tmp_path / "axb" / "train-0.parquet")  # which the pattern a*b would find too
        assert len(records_of(folder)) == 2
        if name == "{a,b}":
            assert len(records_of(dataset_name=str(folder))) == 2
        else:
            with pytest.raises(UserError, match="in the path of a folder as a pattern; give it as --train_data_dir"):
                records_of(dataset_name=str(folder))
            records_of(folder).sources[0].table._dataset.save_to_disk(tmp_path / "saved")
            (tmp_path / "saved").rename(tmp_path / f"saved {name}")
            assert len(records_of(dataset_name=str(tmp_path / f"saved {name}"))) == 2
        assert keys(records_of(tar(tmp_path / "tars" / name / f"{name}.tar", "a.png"))) == [f"{name}.tar/a.png"]
        touch(tmp_path / "texts" / name / "a.txt", "caption")
        picture(tmp_path / "texts" / name / "a.png")
        assert records_of(tmp_path / "texts" / name).captions(0) == ("caption",)


class TestOwnFolders:
    def test_they_are_left_out_of_the_data(self, tmp_path, caplog):
        picture(tmp_path / "a.png")
        for name in ("marked/samples/s.png", "run/samples/s.png", "dry/contact_sheet.png", "mine/run.json"):
            (picture if name.endswith(".png") else touch)(tmp_path / name)
        mark_as_own(tmp_path / "marked")
        touch(tmp_path / "run" / "run.json", json.dumps({"options": {}, "versions": {}, "command": []}))
        touch(tmp_path / "dry" / "dry_run_report.json", "{}")
        picture(tmp_path / "mine" / "b.png")
        records = records_of(tmp_path)
        assert keys(records) == ["a.png", "mine/b.png"]
        assert all(f"skipped the folder {tmp_path}/{name}:" in caplog.text for name in ("marked", "run", "dry"))
        assert keys(records_of(tmp_path / "marked")) == ["samples/s.png"]  # it is asked for by its name
        assert (tmp_path / "marked" / MARKER).exists()

    def test_a_second_run_does_not_train_on_the_first_ones_samples(self, train, tmp_path, capsys):
        data = tiny.make_images(tmp_path / "data")
        (data / "metadata.jsonl").unlink()
        flags = [
            "--max_train_steps",
            1,
            "--train_batch_size",
            1,
            "--validation_prompt",
            "a",
            "--num_validation_images",
            1,
        ]
        flags += ["--encoding_cache_dir", data / "cache"]
        out = train("sd", *flags, "--checkpointing_steps", 1, data=data, out="data/out")
        assert list((out / "samples").rglob("*.png"))
        train("sd", *flags, "--max_train_steps", 2, "--resume_from_checkpoint", "latest", data=data, out="data/out")
        report = json.loads((train("sd", *flags, data=data, out="data/other") / "data_report.json").read_text())
        assert report["trained"] == report["fates"]["trained"] == 6
        assert report["fates"].keys() == {"trained", "output of a run"}
        train("sd", *flags, data=data, out="data", expect=2)
        assert "--output_dir" in (error := capsys.readouterr().err)
        assert "is the folder of --train_data_dir" in error

    def test_the_folder_of_held_out_images_is_not_trained_on(self, train, tmp_path):
        data = tmp_path / "data"
        for name in ("a.png", "b.png", "aside/c.png"):
            picture(data / name)
        flags = ["--max_train_steps", 1, "--train_batch_size", 1, "--validation_data_dir", data / "aside"]
        report = json.loads((train("sd", *flags, data=data) / "data_report.json").read_text())
        assert report["fates"] == {"trained": 2, "held out": 1}


class TestHeldOut:
    @pytest.mark.parametrize("flags", [("--validation_split", 0.4), ("--validation_split", "test")])
    def test_they_are_counted_as_such(self, train, tmp_path, flags, caplog):
        data = tmp_path / "data"
        for split in ("train", "test"):
            for number in range(5 if split == "train" else 2):
                picture(data / split / f"{number}.png")
                touch(data / split / f"{number}.txt")
        flags = ["--max_train_steps", 1, "--train_batch_size", 1, *flags]
        caplog.set_level(logging.INFO, "utils")
        out = train("sd", *flags, data=data)
        report = json.loads((out / "data_report.json").read_text())
        lines = [json.loads(line) for line in (out / "data_report.jsonl").read_text().splitlines()]
        assert Counter(line["fate"] for line in lines) == report["fates"]
        assert sum(report["fates"].values()) == report["files"] == 14
        is_portion = flags[-1] != "test"
        assert report["fates"]["trained"] + (report["fates"]["held out"] if is_portion else 0) == 5
        assert report["fates"].get("other split", 0) == (4 if is_portion else 0)
        assert "files          14: " in caplog.text
        train("sd", *flags, "--dry_run", data=data, out="dry")
        assert json.loads((tmp_path / "dry" / "dry_run_report.json").read_text())["fates"] == report["fates"]


class TestHomeFolders:
    def test_in_flags_and_in_files(self, tmp_path, monkeypatch, refused):
        monkeypatch.setenv("HOME", str(tmp_path))
        picture(tmp_path / "data" / "a.png")
        assert keys(records_of(**vars(with_values(SourceOptions(), {"train_data_dir": "~/data"}, "here")))) == ["a.png"]
        refused(["--output_dir=~/data", "--train_data_dir=~/data"], f"--output_dir {tmp_path}/data is the folder of")
        refused(["--output_dir", "~nobody-here/x"], "there is no user nobody-here; write ./~nobody-here/x")
        file = touch(tmp_path / "set.yaml", "- {train_data_dir: ~/data}\n")
        data = DataOptions(dataset_file=str(file))
        assert len(read_records(data, SourceOptions(), CaptionOptions(), 0)) == 1

    def test_texts_stay_as_they_are(self):
        from dataclasses import dataclass

        @dataclass(frozen=True)
        class Group:
            folders: list[str] | None = option(None, "folders")
            prompt: str | None = option(None, "prompt", is_text=True)

        @dataclass(frozen=True)
        class Options:
            group: Group

        found = parse(Options, ["--folders", "~", "~root/x", "./~/x", "--prompt", "~/ a cat"], "").group
        home = os.path.expanduser("~")
        assert found.folders == [home, os.path.expanduser("~root") + "/x", "./~/x"]
        assert found.prompt == "~/ a cat"
