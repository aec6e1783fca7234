"""Streamed tar shards."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from tests import tiny
from utils.config.options import UserError
from utils.data.captions import CaptionOptions
from utils.data.options import BucketOptions
from utils.data.source_options import DataOptions, SourceOptions


class TestStreamedTars:
    """What the members of a sample are, and what a member that can't be read costs: itself."""

    @pytest.fixture(autouse=True, params=["on a disk", "on the Hub"])
    def place(self, request, monkeypatch, tmp_path) -> str:
        from utils.data import stream
        from utils.data.file_listing import Fates
        from utils.data.tar_streams import tar_samples

        def from_afar(source, cache_dir, left_out):
            shards = [str(path) for path in sorted(Path(source.train_data_dir).iterdir())]
            samples = tar_samples({"train": shards}, str(tmp_path / "cache"), source.mask_column)
            return samples, Fates(tmp_path), tuple(map(Path, shards))

        if request.param == "on the Hub":
            monkeypatch.setattr(stream, "_load_shards", from_afar)
        return request.param

    def rows(self, folder: Path, **options) -> tuple[dict[str, tuple[str, ...]], list[tuple[str, str]]]:
        from utils.data.stream import Lane, open_stream

        source = SourceOptions(train_data_dir=str(folder), **options)
        stream = open_stream(DataOptions(streaming=True), source, CaptionOptions(), 16, BucketOptions())
        lane = Lane(stream, 0, 1, 1, 0)
        rows = (lane._sample(row, number, 0) for number, row in enumerate(lane._rows(0)))
        self.masks = {}
        found = {}
        for sample in filter(None, rows):
            found[sample.record.key.removeprefix("a.tar/")] = sample.record.captions
            self.masks[sample.record.key] = sample.record.mask
        return found, [(key.removeprefix("a.tar/"), reason) for key, reason in lane.bad]

    def pack(self, folder: Path, members: dict[str, bytes], name: str = "a.tar") -> Path:
        folder.mkdir(exist_ok=True)
        with tarfile.open(folder / name, "w") as archive:
            for member, content in members.items():
                header = tarfile.TarInfo(member)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
        return folder

    def image(self, kind: str = "PNG") -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (16, 16), "red").save(file, kind)
        return file.getvalue()

    def test_members_of_any_ending_and_case(self, tmp_path):
        members = {
            **{"0.png": self.image(), "0.txt": b"zero"},
            **{"1.PNG": self.image(), "1.TXT": b"one"},
            **{"2.jpg": self.image("JPEG"), "2.json": b'{"caption": "two"}'},
            **{"3.webp": self.image("WEBP"), "3.Caption": b"three", "3.cls": b"no number", "3.npy": b"broken"},
            **{"4.caption": b"not read", "4.txt": b"four", "4.png": self.image()},
            **{"5.png": self.image()},
            **{"._6.png": b"of a Mac", "6.png": self.image(), "6.PNG": self.image("GIF"), "6.txt": b"six"},
        }
        found, bad = self.rows(self.pack(tmp_path / "data", members))
        assert found == {
            **{"0.png": ("zero",), "1.PNG": ("one",), "2.jpg": ("two",), "3.webp": ("three",), "4.png": ("four",)},
            **{"5.png": ("",), "6.png": ("six",)},
        }
        assert not bad

    @pytest.mark.parametrize("text", ["猫がいる", "一只猫"])
    @pytest.mark.parametrize("encoding", ["shift_jis", "gb18030", "utf-16"])
    def test_other_encodings_are_read_as_the_user_says_and_never_guessed(self, tmp_path, text, encoding):
        try:
            content = text.encode(encoding)
        except UnicodeEncodeError:
            pytest.skip("the encoding lacks a character")
        members = {"0.png": self.image(), "0.txt": content, "1.png": self.image(), "1.txt": b"one"}
        folder = self.pack(tmp_path / "data", members)
        found, bad = self.rows(folder)
        if encoding == "utf-16":  # it has a mark
            assert found == {"0.png": (text,), "1.png": ("one",)}
            return
        assert found == {"1.png": ("one",)}
        assert "--text_encoding" in dict(bad)["0.png"]
        found, bad = self.rows(folder, text_encoding=encoding)
        assert found == {"0.png": (text,), "1.png": ("one",)}
        assert not bad

    @pytest.mark.parametrize(
        ("content", "reason"),
        [(b"a" * (2 << 20), "has over 1.05 MB"), (b"[" * 100_000, "json"), (b'{"caption": 3}', "a string")],
    )
    def test_captions_that_cannot_be_read_are_named(self, tmp_path, content, reason):
        members = {"0.png": self.image(), "0.json": content, "1.png": self.image(), "1.txt": b"one"}
        found, bad = self.rows(self.pack(tmp_path / "data", members))
        assert found == {"1.png": ("one",)}
        assert reason in dict(bad)["0.png"]

    def test_a_mask_that_comes_late(self, tmp_path):
        members = {f"{number:03}.png": self.image() for number in range(120)} | {"119.mask.png": b"mask"}
        members["119.png"] = members.pop("119.png")
        self.rows(self.pack(tmp_path / "data", members), mask_column="mask.png")
        assert [key[-7:] for key, mask in self.masks.items() if mask] == ["119.png"]

    def test_masks_by_their_ending_are_no_images(self, tmp_path):
        members = {}
        for number in range(3):
            members |= {f"{number}.mask.png": b"mask", f"{number}.png": self.image(), f"{number}.txt": b"text"}
        found, _ = self.rows(self.pack(tmp_path / "data", members), mask_column="mask.png")
        assert sorted(found) == ["0.png", "1.png", "2.png"]
        assert all(mask.source == b"mask" for mask in self.masks.values())

    def test_members_that_do_not_lie_beside_each_other(self, tmp_path, place):
        members = {f"{number}.png": self.image() for number in range(3)}
        members |= {f"{number}.txt": f"{number}".encode() for number in range(3)}
        found, bad = self.rows(self.pack(tmp_path / "data", members))
        if place == "on a disk":
            assert found == {f"{number}.png": (f"{number}",) for number in range(3)}
            assert not bad
        else:
            assert sorted(found) == ["0.png", "1.png", "2.png"]
            assert sorted(key for key, reason in bad if "consecutive" in reason) == ["0.txt", "1.txt", "2.txt"]

    @pytest.mark.parametrize("harm", ["cut", "junk", "put together", "of text alone", "a header of gigabytes"])
    def test_a_shard_that_is_broken_is_named_and_the_others_are_read(self, tmp_path, harm):
        folder = self.pack(tmp_path / "data", {"0.png": self.image(), "0.txt": b"zero"})
        self.pack(folder, {"1.png": self.image(), "1.txt": b"one", "2.png": self.image(), "2.txt": b"two"}, "b.tar")
        shard = folder / "b.tar"
        if harm == "of text alone":
            self.pack(folder, {"1.txt": b"one"}, "b.tar")
        elif harm == "a header of gigabytes":
            header = tarfile.TarInfo("long")
            header.type, header.size = tarfile.GNUTYPE_LONGNAME, 3 << 30
            shard.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + b"x" * 10_000)
        else:
            content = shard.read_bytes()
            shard.write_bytes({"cut": content[:700], "junk": b"junk" * 900, "put together": 2 * content}[harm])
        found, bad = self.rows(folder)
        assert found["0.png"] == ("zero",)
        if harm != "of text alone":
            assert any("b.tar" in key for key, _ in bad)

    def test_a_lane_without_an_image_names_its_shards(self, tmp_path):
        from utils.data.stream import Lane, open_stream

        folder = self.pack(tmp_path / "data", {"0.png": self.image(), "0.txt": b"zero"})
        (folder / "b.tar").write_bytes(b"junk" * 900)
        source = SourceOptions(train_data_dir=str(folder))
        stream = open_stream(DataOptions(streaming=True), source, CaptionOptions(), 16, BucketOptions())
        with pytest.raises(UserError, match=r"no image can be read from .*b\.tar: b\.tar: .*merge them"):
            next(Lane(stream, 1, 2, 1, 0).groups())

    def test_a_dataset_of_tars(self, train, tmp_path):
        members = {}
        for number in range(6):
            members |= {f"{number}.png": self.image(), f"{number}.TXT": b"text"}
        folder = self.pack(tmp_path / "data", members, "train-0.tar")
        flags = ["--streaming", "--max_train_steps", 2, "--train_batch_size", 2, "--dataset_name", folder]
        from train_text_to_image import main

        flags += ["--pretrained_model", train.pipelines["sd"], "--resolution", tiny.RESOLUTION, "--report_to", "none"]
        assert main([str(word) for word in [*flags, "--output_dir", tmp_path / "out"]]) == 0
