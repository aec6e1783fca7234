"""Captions, their files and blank ones, in any encoding."""

import io
import itertools
import json
import logging
import os
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from tests.records import found, records_of
from tests.text_files import CHINESE, make_pictures, planned, png, write_tar
from utils.config.batch import RecordPass
from utils.config.options import UserError
from utils.data.captions import MAX_CAPTION, CaptionOptions, compose, folder_caption
from utils.data.options import BucketOptions
from utils.data.source_options import ColumnLabels, DataOptions, LabelledSource, SourceOptions
from utils.data.sources import read_records
from utils.data.stream import Lane, open_stream


class TestCaptions:
    TAGS = "one, two, three, four, five, six"

    def composed(self, caption: str, count: int = 1, **options) -> list[str]:
        made = CaptionOptions(**options)
        return [compose(caption, made, 0, RecordPass(7, variant)) for variant in range(count)]

    def test_nothing_asked_nothing_changed(self):
        assert self.composed("a , strange,, caption") == ["a , strange,, caption"]

    def test_prefix_suffix_and_trigger(self):
        assert self.composed("a dog", caption_prefix="photo of", caption_suffix="in snow") == ["photo of a dog in snow"]
        assert self.composed("a dog", trigger_word="sks") == ["sks, a dog"]
        assert self.composed("a sks dog", trigger_word="sks") == ["a sks dog"]
        assert self.composed("", trigger_word="sks") == ["sks"]

    def test_shuffled_tags_keep_the_first(self):
        texts = self.composed(self.TAGS, 50, shuffle_tags=True, keep_tokens=2)
        assert all(text.startswith("one, two, ") for text in texts)
        assert all(sorted(text.split(", ")) == sorted(self.TAGS.split(", ")) for text in texts)
        assert len(set(texts)) > 15

    def test_dropped_tags(self):
        texts = self.composed(self.TAGS, 400, tag_dropout=0.5, keep_tokens=1)
        kept = Counter(tag for text in texts for tag in text.split(", "))
        assert kept["one"] == 400
        assert all(150 < kept[tag] < 250 for tag in ("two", "six"))

    def test_folder_names(self):
        assert folder_caption("10_sks dog/a.png", "/data") == "sks dog"
        assert folder_caption("a.png", "/data/cats") == "cats"


def write_list(file: Path, captions: dict[str, str]) -> None:
    """A list of images with a caption each, in the form that its name says."""
    rows = [{"file_name": name, "text": text} for name, text in captions.items()]
    if file.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), file)
    elif file.name == "captions.json":
        file.write_text(json.dumps(captions))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        file.write_text("".join(f"{name},{text}\n" for name, text in [("file_name", "text"), *captions.items()]))


class TestCaptionFiles:
    def test_what_is_not_utf_8_is_counted_and_named(self, tmp_path, caplog):
        texts = {"0": "猫", "1": CHINESE, "2": "1girl, 长发", "3": "红色的苹果"}
        for name, text in texts.items():
            make_pictures(tmp_path, f"{name}.png")
            (tmp_path / f"{name}.txt").write_bytes(text.encode("gbk"))
        (tmp_path / "1.txt").rename(tmp_path / "1.TXT")
        records = records_of(tmp_path)
        assert found(records) == {f"{name}.png": (text,) for name, text in texts.items()}
        told = "4 texts are not UTF-8 and read as gb18030 (a guess; give --text_encoding if it is wrong): 0.txt: '猫'"
        assert any(told in record.message for record in caplog.records)
        assert planned(records, tmp_path).report()["not_utf_8"] == {tmp_path.name: {"gb18030 (guessed)": 4}}
        said = records_of(tmp_path, text_encoding="gbk")
        assert found(said) == found(records)
        assert not said.sources[0].table.texts.counts
        with pytest.raises(UserError, match="--text_encoding must be an encoding"):
            records_of(tmp_path, text_encoding="klingon")

    def test_utf_8_is_never_read_as_anything_else(self, tmp_path):
        texts = ["a café", "naïve", "日本語", "кот", "ﬁn", "\ufeffa dog"]
        for number, text in enumerate(texts):
            make_pictures(tmp_path, f"{number}.png")
            (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
        records = records_of(tmp_path)
        assert [records.captions(index) for index in range(6)] == [(text.lstrip("\ufeff"),) for text in texts]
        assert not records.sources[0].table.texts.counts

    def test_one_bad_file_costs_one_image(self, tmp_path):
        make_pictures(tmp_path, *(f"{number}.png" for number in range(5)))
        (tmp_path / "0.txt").write_text("a dog")
        with (tmp_path / "1.txt").open("wb") as file:
            file.truncate(5 * 10**9)
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "2.txt").symlink_to("pipe")
        (tmp_path / "3.json").write_text("[" * 200_000)
        (tmp_path / "4.txt").write_bytes(bytes(range(256)))
        begin = time.monotonic()
        records = records_of(tmp_path)
        assert time.monotonic() - begin < 5
        assert found(records) == {"0.png": ("a dog",)}
        reasons = {name: reason.partition("can't be read: ")[2] for name, reason in records.refused}
        assert reasons == {
            "1.png": "has 5 GB; at most 65.5 kB are read",
            "2.png": "is a pipe, not a file",
            "3.png": "is nested more than 100 deep",
            "4.png": "is not text: it contains zero bytes",
        }
        assert planned(records, tmp_path / "m").bad == dict(records.refused)

    @pytest.mark.parametrize("is_tar", [False, True])
    def test_captions_that_differ_are_counted_and_the_first_is_named(self, tmp_path, caplog, is_tar):
        texts = {"0.txt": "a", "0.caption": "b", "0.json": '"c"', "1.txt": "a, b", "1.json": '{"tags": ["a", "b"]}'}
        texts |= {"2.caption": "x", "2.json": '{"width": 5}', "3.txt": "", "3.caption": "y"}
        if is_tar:
            members = {f"{number}.png": png() for number in range(4)}
            write_tar(tmp_path / "a.tar", members | {name: text.encode() for name, text in texts.items()})
        else:
            make_pictures(tmp_path, *(f"{number}.png" for number in range(4)))
            for name, text in texts.items():
                (tmp_path / name).write_text(text)
        captions = found(records_of(tmp_path))
        assert list(captions.values()) == [("a",), ("a, b",), ("x",), ("",)]
        place = "a.tar/" if is_tar else ""
        told = "2 images have several caption files with different captions; the first is read (.txt before .caption "
        assert f"{told}before .json), such as {place}0.txt instead of {place}0.caption, {place}0.json" in caplog.text

    def test_two_spellings_of_an_ending_and_names_with_both(self, tmp_path, caplog):
        make_pictures(tmp_path, "0.png", "1.png")
        for name, text in {"0.TXT": "upper", "0.txt": "lower", "1.txt": "one", "1.png.txt": "one"}.items():
            (tmp_path / name).write_text(text)
        records_of(tmp_path)
        assert "1 images have several caption files with different captions" in caplog.text

    def test_of_very_many_images_a_sample_is_compared(self, tmp_path, caplog, monkeypatch):
        """The files of a few images are held at a time."""
        monkeypatch.setattr("utils.data.folders.NUM_TOGETHER", 2)
        for most, told in ((9, "7 images have several"), (5, "4 images of 4 compared have several")):
            monkeypatch.setattr("utils.data.folders.MOST_COMPARED", most)
            folder = tmp_path / str(most)
            folder.mkdir()
            make_pictures(folder, *(f"{number}.png" for number in range(8)))
            for number in range(7):
                (folder / f"{number}.txt").write_text("a")
                (folder / f"{number}.caption").write_text("b")
            records_of(folder)
            assert told in caplog.text

    def test_samples_of_several_shards_are_counted_together(self, tmp_path, caplog):
        for shard in range(3):
            members = {"0.png": png(), "0.txt": b"a", "0.json": b'"a"' if shard == 1 else b'"b"'}
            write_tar(tmp_path / f"{shard}.tar", members)
        records_of(tmp_path)
        assert "2 images have several caption files" in caplog.text
        assert "such as 0.tar/0.txt instead of 0.tar/0.json" in caplog.text

    def test_captions_beside_images_that_a_list_names_are_counted(self, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        make_pictures(tmp_path, "0.png", "1.png")
        (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a  b\n1.png,b\n")
        (tmp_path / "0.txt").write_text("a b\n")
        assert found(records_of(tmp_path)) == {"0.png": ("a  b",), "1.png": ("b",)}
        assert "captions are read from metadata.csv; 1 text files beside images are not, such as 0.txt" in caplog.text
        assert "WARNING" not in caplog.text

    @pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet", "captions.json"])
    def test_captions_beside_images_that_contradict_a_list_are_named(self, tmp_path, caplog, name):
        make_pictures(tmp_path, *(f"{number}.png" for number in range(5)))
        listed = {"0.png": "a", "1.png": "b", "2.png": "c", "3.png": "", "4.png": "e"}
        write_list(tmp_path / name, listed)
        beside = {"0.txt": "other", "1.txt": "b", "2.json": '{"width": 5}', "3.caption": "only here", "4.txt": ""}
        for file, text in beside.items():
            (tmp_path / file).write_text(text)
        records_of(tmp_path)
        told = (
            f"2 images have different captions in {name} and in a file beside them: {name} is used, such as for 0.png"
        )
        assert f"--train_data_dir {tmp_path}: {told} instead of 0.txt" in caplog.text
        if name == "metadata.jsonl":
            read_records(DataOptions(), SourceOptions(dataset_name=str(tmp_path)), CaptionOptions(), 0)
            assert f"--dataset_name {tmp_path}: {told} instead of 0.txt" in caplog.text

    def test_labels_in_a_list_are_not_compared_with_captions(self, tmp_path, caplog):
        make_pictures(tmp_path, "0.png")
        write_list(tmp_path / "metadata.csv", {"0.png": "cat"})
        (tmp_path / "0.txt").write_text("a photo of a cat")
        source = LabelledSource(train_data_dir=str(tmp_path), caption_column="text")
        read_records(DataOptions(), source, ColumnLabels(), 0)
        assert "different captions" not in caplog.text

    @pytest.mark.parametrize(
        ("text", "told"), [("a", ""), ("other", "1 images have other captions in metadata.csv than")]
    )
    def test_metadata_beside_a_captions_json(self, tmp_path, caplog, text, told):
        make_pictures(tmp_path, "0.png", "1.png")
        write_list(tmp_path / "captions.json", {"0.png": "a", "1.png": "b"})
        write_list(tmp_path / "metadata.csv", {"0.png": text})
        assert found(records_of(tmp_path)) == {"0.png": ("a",), "1.png": ("b",)}
        assert told in caplog.text
        assert bool(told) == ("other captions" in caplog.text)
        (tmp_path / "metadata.csv").write_text("file_name,caption\n0.png,a\n")
        records_of(tmp_path)
        assert "metadata.csv can't be compared with it: --caption_column text is not a column" in caplog.text

    def test_a_captions_json_is_read_so_too(self, tmp_path):
        make_pictures(tmp_path, "0.png", "1.png")
        texts = {"0.png": CHINESE, "1.png": "x" * (MAX_CAPTION + 1)}
        (tmp_path / "captions.json").write_bytes(json.dumps(texts, ensure_ascii=False).encode("utf-16"))
        records = records_of(tmp_path)
        assert found(records) == {"0.png": (CHINESE,), "1.png": ("",)}
        assert [name for name, _ in records.refused] == ["1.png"]
        (tmp_path / "captions.json").write_text('{"0.png": "one", "0.png": "two"}')
        with pytest.raises(UserError, match=r"captions.json: has the key '0.png' twice, with different values"):
            records_of(tmp_path)

    @pytest.mark.parametrize("other", ["images/0.png", "./0.png", "x\\..\\0.png"])
    def test_two_names_of_one_image_in_a_captions_json(self, tmp_path, other):
        make_pictures(tmp_path / "images", "0.png", "1.png")
        (tmp_path / "captions.json").write_text(json.dumps({"0.png": "one", other: "one", "1.png": None}))
        if ".." not in other:
            assert found(records_of(tmp_path)) == {"images/0.png": ("one",), "images/1.png": ("",)}
            (tmp_path / "captions.json").write_text(json.dumps({"0.png": "one", other: "two"}))
            with pytest.raises(
                UserError, match=r"captions.json: 1 images have two entries .* as '0.png' and '.*'; keep"
            ):
                records_of(tmp_path)
        else:
            assert [name for name, _ in records_of(tmp_path).refused] == [other]

    def test_long_captions_in_rows_cost_their_images(self, tmp_path):
        from datasets import Dataset

        pictures = [Image.new("RGB", (40, 40), (number, 0, 0)) for number in range(3)]
        rows = {"image": pictures, "text": ["a", "x" * 10**6, None]}
        Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
        source = SourceOptions(dataset_name=str(tmp_path / "saved"))
        images = planned(read_records(DataOptions(), source, CaptionOptions(), 0), tmp_path)
        assert images.bad == {"row 1": "its caption has 1,000,000 characters; at most 65,536 are read"}
        assert (len(images.records), images.missing_captions) == (2, 1)


BLANKS = ["", " ", "\n\n", "\u200b", "\xa0", "\u200b \u2060", None]


class TestBlankCaptions:
    """In every format a blank text is no caption."""

    def columns(self, blank: object) -> pa.Table:
        picture = io.BytesIO()
        Image.new("RGB", (40, 40)).save(picture, "PNG")
        images = pa.array([picture.getvalue()] * 2, pa.binary())
        return pa.table({"image": images, "text": pa.array([blank, "a"], pa.string())})

    def write(self, folder: Path, kind: str, blank: str | None) -> None:
        """Two images, of which the second has the caption a."""
        if kind in ("parquet", "dataset"):
            parquet.write_table(self.columns(blank), folder / "train.parquet")
            return
        if kind == "tar":
            members = {"0.png": png(), "0.txt": (blank or "").encode(), "1.png": png(), "1.txt": b"a"}
            write_tar(folder / "a.tar", members)
            return
        make_pictures(folder, "0.png", "1.png")
        if kind.startswith("."):
            text = blank or ""
            contents = {
                ".json": json.dumps(blank),
                ".list.json": json.dumps([blank]),
                ".map.json": json.dumps({"text": blank}),
            }
            suffix = ".json" if "json" in kind else kind
            (folder / f"0{suffix}").write_text(contents.get(kind, text))
            (folder / f"1{suffix}").write_text('"a"' if suffix == ".json" else "a")
        elif kind == "metadata.csv":
            (folder / kind).write_text(f'file_name,text\n0.png,"{blank or ""}"\n1.png,a\n')
        else:
            write_list(folder / kind, {"0.png": blank, "1.png": "a"})

    @pytest.mark.parametrize("blank", BLANKS)
    @pytest.mark.parametrize(
        "kind",
        [
            *(".txt", ".caption", ".json", ".list.json", ".map.json", "metadata.jsonl", "metadata.csv"),
            *("metadata.parquet", "captions.json", "parquet", "dataset", "tar"),
        ],
    )
    def test_a_blank_caption_is_none(self, tmp_path, kind, blank):
        self.write(tmp_path, kind, blank)
        flag = "dataset_name" if kind == "dataset" else "train_data_dir"
        options = CaptionOptions(on_missing_caption="empty")
        records = read_records(DataOptions(), SourceOptions(**{flag: str(tmp_path)}), options, 0)
        assert list(records.all_captions()) == [(), ("a",)]

    @pytest.mark.parametrize("blank", BLANKS)
    @pytest.mark.parametrize("kind", ["parquet", "tar"])
    def test_in_streams_too(self, tmp_path, kind, blank):
        self.write(tmp_path, kind, blank)
        options = CaptionOptions(on_missing_caption="error")
        source = SourceOptions(train_data_dir=str(tmp_path))
        stream = open_stream(DataOptions(streaming=True), source, options, 32, BucketOptions())
        with pytest.raises(UserError, match="has no caption"):
            list(itertools.islice(Lane(stream, 0, 1, 2, 0).groups(), 2))
