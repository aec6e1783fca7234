"""The fate of each file of a folder."""

import json
import os
from collections import Counter
from pathlib import Path

from tests.records import keys, records_of
from tests.source_files import fates_of, ledger_of, parquet, picture, png, tar, touch
from utils.data.file_ledger import Ledger
from utils.data.file_listing import Fate, list_folder
from utils.data.options import BucketOptions, SelectionOptions
from utils.data.plan import plan_images
from utils.data.survey import survey


class TestFates:
    def test_every_file_has_one(self, tmp_path):
        data, memory = tmp_path / "data", tmp_path / "memory"
        for name in ("a.png", "b.png", "small.png", "b_copy.jpg", "sub/e.png"):
            picture(data / name, (8, 8) if name == "small.png" else (40, 40))
        for name in ("a.txt", "b.txt", "b.caption", "lone.txt", "x.txt", "README.md", "notes.txt", "x.heic", "y.psd"):
            touch(data / name)
        for name in ("clip.mp4", "more.zip", "Thumbs.db", ".DS_Store", "__MACOSX/a.png", ".cache/b.png", "broken.png"):
            touch(data / name)
        (data / "gone.png").symlink_to(tmp_path / "nowhere.png")
        (data / "loop.png").symlink_to(data / "loop.png")
        os.mkfifo(tmp_path / "pipe")
        (data / "pipe.png").symlink_to(tmp_path / "pipe")
        records = records_of(data)
        known = survey(records, memory)
        selection = SelectionOptions(max_bad_fraction=1.0, min_image_size=20)
        images = plan_images(records, known, 32, 1, BucketOptions(), selection, lambda count, bad: None)
        ledger = Ledger()
        ledger.train_on(images)
        found = fates_of(ledger, tmp_path)
        assert found == {
            **dict.fromkeys(("a.png", "b.png", "b_copy.jpg", "sub/e.png"), "trained"),
            **dict.fromkeys(("a.txt", "b.txt"), "caption"),
            **dict.fromkeys(("b.caption", "README.md", "notes.txt"), "other"),
            **dict.fromkeys(("lone.txt", "x.txt"), "caption without image"),
            **dict.fromkeys(("x.heic", "y.psd", "clip.mp4", "more.zip"), "no reader"),
            **dict.fromkeys(("Thumbs.db", ".DS_Store", "__MACOSX/a.png", ".cache/b.png"), "hidden"),
            **dict.fromkeys(("broken.png", "gone.png", "loop.png", "pipe.png"), "unreadable"),
            "small.png": "filtered",
        }
        walked = [name for _, _, names in os.walk(data) for name in names]
        files, members = ledger.counts()
        assert sum(files.values()) == len(walked) == ledger.report()["files"]
        assert files == Counter(found.values())
        assert not members
        assert images.bad.keys() == {"x.heic", "broken.png", "gone.png", "loop.png", "pipe.png"}
        images.bad["a.png"] = "found out while training"
        assert ledger.counts()[0]["unreadable"] == 5
        assert fates_of(ledger, tmp_path)["a.png"] == "unreadable"

    def test_lists_and_splits(self, tmp_path):
        data = tmp_path / "data"
        for split in ("train", "test"):
            for name in ("a.png", "b.png", "mask.png"):
                picture(data / split / name)
            touch(data / split / "a.txt")
            lines = [{"file_name": "a.png", "text": "x", "mask": "mask.png"}]
            touch(data / split / "metadata.jsonl", "\n".join(map(json.dumps, lines)))
        found = fates_of(ledger_of(data, tmp_path / "memory", mask_column="mask"), tmp_path)
        assert {name: fate for name, fate in found.items() if name.startswith("train/")} == {
            "train/a.png": "trained",
            "train/b.png": "not listed",
            "train/mask.png": "mask",
            "train/metadata.jsonl": "metadata",
            "train/a.txt": "other",
        }
        assert {fate for name, fate in found.items() if name.startswith("test/")} == {"other split"}

    def test_members_of_shards_are_counted_alike(self, tmp_path):
        data = tmp_path / "data"
        names = ("a.png", "a.txt", "a.jpg", "b.png", "c.txt", "d.heic", "d.txt", ".hidden", "note.md")
        tar(data / "0.tar", *names)
        touch(data / "README.md")
        ledger = ledger_of(data, tmp_path / "memory")
        files, members = ledger.counts()
        assert files == {"shard": 1, "other": 1}
        assert sum(members.values()) == len(names)
        found = {name.removeprefix("0.tar/"): fate for name, fate in fates_of(ledger, tmp_path).items()}
        assert found == {
            **dict.fromkeys(("a.png", "b.png"), "trained"),
            "a.txt": "caption",
            "a.jpg": "duplicate",
            **dict.fromkeys(("c.txt", "d.txt"), "caption without image"),
            "d.heic": "no reader",
            ".hidden": "hidden",
            **dict.fromkeys(("note.md", "README.md"), "other"),
            "0.tar": "shard",
        }
        assert ledger.images.bad.keys() == {"0.tar/d.heic"}

    def test_rows_are_counted_and_those_not_trained_on_named(self, tmp_path):
        parquet(tmp_path / "data" / "train-0.parquet", image=[png(), png(), b"none"], text=["a", "b", "c"])
        ledger = ledger_of(tmp_path / "data", tmp_path / "memory", max_train_samples=2)
        files, members = ledger.counts()
        assert files == {"shard": 1}
        assert sum(members.values()) == 3
        assert members["not drawn"] == 1
        assert fates_of(ledger, tmp_path).keys() >= {"train-0.parquet"}

    def test_pictures_without_a_reader_end_the_run_where_they_are_many(self, refused, tmp_path):
        for number in range(3):
            picture(tmp_path / "data" / f"{number}.png")
        for number in range(30):
            touch(tmp_path / "data" / f"p{number}.heic")
            touch(tmp_path / "data" / f"p{number}.txt")
        refused([], "30 of 33 images can't be read", "p0.heic: ", "pip install pillow-heif", data=tmp_path / "data")

    def test_pictures_of_which_readable_ones_are_there_are_no_fault(self, tmp_path, caplog):
        for suffix in (".jpg", ".heic", ".txt", ".psd"):
            (picture if suffix == ".jpg" else touch)(tmp_path / f"a{suffix}")
        touch(tmp_path / "film.mov")
        touch(tmp_path / "c.txt")
        records = records_of(tmp_path)
        assert keys(records) == ["a.jpg"]
        assert not records.refused
        assert "1 files are not read, such as film.mov: " in caplog.text
        assert "1 captions have no image, such as c.txt" in caplog.text

    def test_a_million_files_take_little_memory(self):
        fates = list_folder(Path(__file__).parent).fates
        for number in range(20_000):
            fates.add(f"folder/{number}.png", Fate("other"))
        assert len(fates._names) < 20_000 * 20
        assert fates.by_fate()[Fate("other")] == 20_000
