"""Captions, metadata and lists of sources as people and programs write them, in any encoding, whole or broken."""

import bz2
import contextlib
import gzip
import io
import itertools
import json
import logging
import lzma
import os
import random
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from utils.config.options import UserError
from utils.data.captions import MAX_CAPTION, CaptionOptions, is_written_list
from utils.data.options import BucketOptions, SelectionOptions
from utils.data.plan import PlannedImages, plan_images
from utils.data.source_options import ColumnLabels, DataOptions, LabelledSource, SourceOptions, source_entries
from utils.data.sources import Records, read_records
from utils.data.stream import Lane, open_stream
from utils.data.survey import survey
from utils.training.preparation import say_what_was_left_out

CHINESE = "一只猫坐在草地上"


def make_pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "red").save(folder / name)


def records_of(folder: Path, captions: CaptionOptions | None = None, **options) -> Records:
    return read_records(
        DataOptions(), SourceOptions(train_data_dir=str(folder), **options), captions or CaptionOptions(), 0
    )


def found(records: Records) -> dict[str, tuple[str, ...]]:
    """Captions by key."""
    return {records.key(index): records.captions(index) for index in range(len(records))}


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


def planned(records: Records, folder: Path) -> PlannedImages:
    known = survey(records, folder / "memory", show_progress=False)
    options = SelectionOptions(max_bad_fraction=1.0)
    return plan_images(records, known, 32, 1, BucketOptions(), options, lambda count, bad: None)


class TestMetadata:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
    @pytest.mark.parametrize(
        "text",
        [
            "file_name,text\n0.png,à la plage\n",
            "file_name;text\n0.png;à la plage\n",
            "file_name\ttext\r\n0.png\tà la plage\r\n",
            'file_name, text\n0.png, "à la plage"\n',
            "sep=;\nfile_name;text;\n0.png;à la plage;\n;;\n",
            "filename,text\n0.png,à la plage\n",
            " File Name ,text\n0.png,à la plage\n",
            ",image,text\n0,0.png,à la plage\n",
            'file_name,text\n"0.png","à la plage" \n',
        ],
    )
    def test_tables_as_spreadsheets_write_them(self, tmp_path, text, encoding):
        make_pictures(tmp_path, "0.png")
        (tmp_path / "metadata.csv").write_bytes(text.encode(encoding))
        records = records_of(tmp_path)
        assert found(records) == {"0.png": ("à la plage",)}
        assert bool(records.sources[0].table.texts.counts) == (not encoding.startswith("utf-8"))

    @pytest.mark.parametrize(
        ("lines", "line", "reason"),
        [
            ("0.png,a dog, sitting on grass", 2, "more cells than the 2 columns; put a text with a comma in quotes"),
            ("0.png", 2, "fewer cells than the 2 columns"),
            ("\n0.png,a dog,,x", 3, "more cells than the 2 columns"),
        ],
    )
    def test_a_row_that_does_not_fit_the_header_is_refused_alone(self, tmp_path, lines, line, reason):
        make_pictures(tmp_path, "0.png", "1.png")
        (tmp_path / "metadata.csv").write_text(f"file_name,text\n{lines}\n1.png,a cat\n")
        records = records_of(tmp_path)
        assert found(records) == {"1.png": ("a cat",)}
        ((place, told),) = records.refused
        assert place == f"metadata.csv, line {line}"
        assert told.startswith(reason)

    @pytest.mark.parametrize(
        ("lines", "named"),
        [
            ('0.png,"a dog\n1.png,a cat\n', "line 2 can't be read: a quote opens there that is never closed"),
            ('0.png,"a dog\n1.png,a cat"\n', "line 2 can't be read: the quote that opens there takes in line 3"),
            ('0.png,"a dog\n1.png,"a cat"\n', "line 2 can't be read: text stands behind a closing quote"),
            (f'0.png,"{"x" * 200_000}"\n', "line 2 can't be read: a cell of over 131072 characters"),
        ],
    )
    def test_quotes_that_do_not_close_are_named(self, tmp_path, lines, named):
        make_pictures(tmp_path, "0.png", "1.png")
        (tmp_path / "metadata.csv").write_text(f"file_name,text\n{lines}")
        with pytest.raises(UserError, match=named):
            records_of(tmp_path)

    def test_a_text_of_several_lines_is_one(self, tmp_path):
        make_pictures(tmp_path, "0.png")
        (tmp_path / "metadata.csv").write_text('file_name,text\n0.png,"a dog,\na ""good"" one"\n')
        assert found(records_of(tmp_path)) == {"0.png": ('a dog,\na "good" one',)}

    @pytest.mark.parametrize(
        ("header", "named"),
        [
            ("name,text", r"metadata.csv: has no column file_name; its columns are \['name', 'text'\]"),
            ("file_name,TEXT", "did you mean --caption_column TEXT"),
            ("file_name,text,text", "names the column 'text' twice"),
        ],
    )
    def test_headers_are_named(self, tmp_path, header, named):
        make_pictures(tmp_path, "0.png")
        (tmp_path / "metadata.csv").write_text(f"{header}\n0.png,a dog{',x' * (header.count(',') - 1)}\n")
        with pytest.raises(UserError, match=named):
            records_of(tmp_path)

    def test_one_bad_row_of_json_costs_one_image(self, tmp_path):
        make_pictures(tmp_path, "0.png", "1.png")
        rows = [
            json.dumps({"file_name": "0.png", "text": CHINESE}, ensure_ascii=False),
            "[" * 100_000,
            "1" * 5000,
            "[1]",
        ]
        rows.append(json.dumps({"file_name": "1.png", "text": "x" * 10**6}))
        (tmp_path / "metadata.jsonl").write_bytes("\n".join(rows).encode("gb18030"))
        records = records_of(tmp_path)
        assert found(records) == {"0.png": (CHINESE,)}
        assert dict(records.refused) == {
            "metadata.jsonl, line 2": "is nested more than 100 deep",
            "metadata.jsonl, line 3": "holds a number of 5000 digits; at most 300 are read",
            "metadata.jsonl, line 4": "is no JSON object but a list; write an object for each image",
            "1.png": "its caption has 1,000,000 characters; at most 65,536 are read",
        }

    def test_several_rows_of_an_image_are_counted_and_named(self, tmp_path, caplog):
        make_pictures(tmp_path, "0.png", "1.png", "2.png")
        names = ("0.png", "./0.png", "x/../1.png", "1.png", "2.png")
        rows = [{"file_name": name, "text": f"t{number}"} for number, name in enumerate(names)]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert found(records_of(tmp_path)) == {"0.png": ("t0", "t1"), "1.png": ("t2", "t3"), "2.png": ("t4",)}
        assert "metadata.jsonl: 2 images stand in several rows, such as '0.png'; each is used once" in caplog.text
        caplog.clear()
        records_of(tmp_path, caption_column=None)
        assert "one of its captions" not in caplog.text

    @pytest.mark.parametrize("folder", ["", "sub/"])
    def test_lists_that_contradict_each_other_are_refused(self, tmp_path, caplog, folder):
        make_pictures(tmp_path, "sub/0.png", "sub/1.png", "sub/2.png")
        prefix = "" if folder else "sub/"
        (tmp_path / "metadata.csv").write_text("file_name,text\nsub/0.png,a\nsub/1.png,b\n")
        rows = [{"file_name": f"{prefix}0.png", "text": "a"}, {"file_name": f"{prefix}2.png", "text": "c"}]
        other = tmp_path / folder / "metadata.jsonl"
        other.write_text("\n".join(map(json.dumps, rows)))
        assert found(records_of(tmp_path)) == {"sub/0.png": ("a",), "sub/1.png": ("b",), "sub/2.png": ("c",)}
        assert not caplog.records
        rows[0]["text"] = "not a"
        other.write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(
            UserError, match=r"give 1 images different captions, such as 'sub/0.png'; remove one"
        ) as told:
            records_of(tmp_path)
        assert f"metadata.csv and {folder}metadata.jsonl" in str(told.value)

    def test_lists_that_differ_in_white_space_agree_and_the_list_of_a_caption_is_named(self, tmp_path):
        make_pictures(tmp_path, "0.png", "1.png")
        texts = {"metadata.csv": ("a  red\tdog", ""), "metadata.jsonl": ("a red dog", "b")}
        for name, (first, second) in texts.items():
            rows = [{"file_name": "0.png", "text": first}, {"file_name": "1.png", "text": second}]
            lines = [f"0.png,{first}", f"1.png,{second}"]
            is_table = name.endswith(".csv")
            text = "\n".join(["file_name,text", *lines] if is_table else map(json.dumps, rows))
            (tmp_path / name).write_text(text)
        assert found(records_of(tmp_path)) == {"0.png": ("a  red\tdog",), "1.png": ("b",)}
        (tmp_path / "metadata.tsv").write_text("file_name\ttext\n1.png\tc\n")
        with pytest.raises(
            UserError, match=r"metadata.jsonl and metadata.tsv give 1 images different captions, .*'1.p"
        ):
            records_of(tmp_path)

    def test_two_masks_of_an_image_are_refused(self, tmp_path):
        make_pictures(tmp_path, "0.png", "1.png", "m/a.png", "m/b.png")
        lines = ["file_name,text,mask", "0.png,x,m/a.png", "0.png,y,m/a.png", "1.png,z,m/b.png"]
        (tmp_path / "metadata.csv").write_text("\n".join(lines))
        table = records_of(tmp_path, mask_column="mask").sources[0].table
        assert [Path(table.mask(row)).name for row in range(2)] == ["a.png", "b.png"]
        (tmp_path / "metadata.csv").write_text("\n".join([*lines, "./1.png,z,m/a.png"]))
        told = r"--mask_column mask: 1 images have two masks, such as '1.png': 'm/b.png' and 'm/a.png'; keep one for"
        with pytest.raises(UserError, match=told):
            records_of(tmp_path, mask_column="mask")

    def test_a_mask_column_of_captions_is_named(self, tmp_path):
        make_pictures(tmp_path, "0.png", "1.png", "m.png")
        (tmp_path / "metadata.csv").write_text("file_name,text,mask\n0.png,a dog,m.png\n1.png,a cat,gone.png\n")
        with pytest.raises(UserError, match=r"--mask_column text: none of its 2 values .* is the name .* as 'a dog'"):
            records_of(tmp_path, mask_column="text")
        assert len(records_of(tmp_path, mask_column="mask").refused) == 1

    def test_what_tables_write_for_nothing_is_no_caption(self, tmp_path, caplog):
        marks = ["NULL", "NaN", "None", "<NA>", " n/a ", '"NaN"', ""]
        make_pictures(tmp_path, *(f"{number}.png" for number in range(len(marks) + 1)))
        rows = "".join(f"{number}.png,{mark}\n" for number, mark in enumerate([*marks, "Nan"]))
        (tmp_path / "metadata.csv").write_text(f"file_name,text\n{rows}")
        captions = found(records_of(tmp_path))
        assert [captions.pop(f"{number}.png") for number in range(len(marks))] == [("",)] * len(marks)
        assert set(captions.values()) == {("Nan",)}
        assert "metadata.csv: 6 cells hold NaN, NULL, None, the first in line 2, and are read as empty" in caplog.text
        caplog.clear()
        lines = [json.dumps({"file_name": "0.png", "text": "NaN"}), '{"file_name": "1.png", "text": NaN}']
        (tmp_path / "metadata.csv").unlink()
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
        assert found(records_of(tmp_path)) == {"0.png": ("NaN",), "1.png": ("",)}

    @pytest.mark.parametrize("text", ["['a', 'b']", '["a"]', "('a', 'b')", "{'en': 'a'}", ' [ "a", ] '])
    def test_captions_that_are_the_text_of_a_list_are_named(self, tmp_path, caplog, text):
        make_pictures(tmp_path, "0.png", "1.png")
        rows = [{"file_name": "0.png", "text": text}, {"file_name": "1.png", "text": ["[1girl, solo]", "(x:1.2) {y}"]}]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        records = records_of(tmp_path)
        planned(records, tmp_path / "m")
        assert records.captions(0) == (text.strip(),)
        assert "1 captions are texts that look like lists, such as" in caplog.text

    @pytest.mark.parametrize("text", ["['a'", "['a', b]", "('a')", "('a b)", "{'a'}", "['']x", "[']", "''", "[", ""])
    def test_captions_that_are_no_list(self, text):
        assert not is_written_list(text)

    @pytest.mark.parametrize("begin", ["['", "('", "{'"])
    @pytest.mark.parametrize("filling", ["' ", "',", "':", " " * 8, "['"])
    def test_long_captions_take_no_time(self, begin, filling):
        text = begin + filling * (MAX_CAPTION // len(filling))
        start = time.perf_counter()
        for end in ("x", {"[": "]", "(": ")", "{": "}"}[begin[0]]):
            is_written_list(text + end)
        assert time.perf_counter() - start < 1

    @pytest.mark.parametrize(
        ("name", "text", "told"),
        [
            ("metadata.csv", "file_name,text\n", r"metadata.csv: lists no images; write a row for each, or remove it"),
            ("metadata.jsonl", "", r"metadata.jsonl: lists no images"),
            ("metadata.tsv", "\n\n", r"metadata.tsv: lists no images"),
            (
                "metadata.jsonl",
                '[\n {"file_name": "0.png"}\n]',
                "of metadata.jsonl .*line 1: begins a JSON array; write",
            ),
            ("metadata.jsonl", '[{"file_name": "0.png"}]', "line 1: is no JSON object but a list; write an object"),
            ("metadata.jsonl", '{"file_name": "0.png"}{"file_name": "1.png"}', "Extra data.*on a line of its own"),
            ("metadata.jsonl", '{"file_name": "0.png", "text": "a", "text": "b"}', "none of the 1 .*'text' twice"),
            ("metadata.csv", "0.png,a dog\n1.png,a cat\n", "no column file_name.*; write a header above its first"),
            ("metadata.csv", "#comment\nfile_name,text\n0.png,a\n", "no column file_name.*; call that of the images'"),
        ],
    )
    def test_a_list_that_says_nothing_is_named_with_its_fault(self, tmp_path, name, text, told):
        make_pictures(tmp_path, "0.png", "1.png")
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=told) as raised:
            records_of(tmp_path)
        assert "there are no images" not in str(raised.value)

    def test_an_empty_list_beside_another_is_named(self, tmp_path, caplog):
        make_pictures(tmp_path, "a/0.png", "b/0.png")
        (tmp_path / "a" / "metadata.csv").write_text("file_name,text\n0.png,x\n")
        (tmp_path / "b" / "metadata.csv").write_text("")
        assert len(records_of(tmp_path)) == 1
        assert "b/metadata.csv: lists no images" in caplog.text


class TestCaptionFiles:
    def test_what_is_not_utf_8_is_counted_and_named(self, tmp_path, caplog):
        texts = {"0": "猫", "1": CHINESE, "2": "1girl, 长发", "3": "红色的苹果"}
        for name, text in texts.items():
            make_pictures(tmp_path, f"{name}.png")
            (tmp_path / f"{name}.txt").write_bytes(text.encode("gbk"))
        (tmp_path / "1.txt").rename(tmp_path / "1.TXT")
        records = records_of(tmp_path)
        assert found(records) == {f"{name}.png": (text,) for name, text in texts.items()}
        told = "4 texts are not UTF-8 and read as gb18030, a guess; give --text_encoding if it is wrong: 0.txt: '猫'"
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
            "4.png": "is no text: it holds zero bytes",
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
        assert f"{told}before .json), such as {place}0.txt and not {place}0.caption, {place}0.json" in caplog.text

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
        assert "such as 0.tar/0.txt and not 0.tar/0.json" in caplog.text

    def test_captions_beside_images_that_a_list_names_are_counted(self, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        make_pictures(tmp_path, "0.png", "1.png")
        (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a  b\n1.png,b\n")
        (tmp_path / "0.txt").write_text("a b\n")
        assert found(records_of(tmp_path)) == {"0.png": ("a  b",), "1.png": ("b",)}
        assert "captions are read from metadata.csv; 1 beside images are not, such as 0.txt" in caplog.text
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
        told = f"2 images have other captions in {name} than in a file beside them; {name} is used, such as for 0.png"
        assert f"--train_data_dir {tmp_path}: {told} and not 0.txt" in caplog.text
        if name == "metadata.jsonl":
            read_records(DataOptions(), SourceOptions(dataset_name=str(tmp_path)), CaptionOptions(), 0)
            assert f"--dataset_name {tmp_path}: {told} and not 0.txt" in caplog.text

    def test_labels_in_a_list_are_not_compared_with_captions(self, tmp_path, caplog):
        make_pictures(tmp_path, "0.png")
        write_list(tmp_path / "metadata.csv", {"0.png": "cat"})
        (tmp_path / "0.txt").write_text("a photo of a cat")
        source = LabelledSource(train_data_dir=str(tmp_path), caption_column="text")
        read_records(DataOptions(), source, ColumnLabels(), 0)
        assert "other captions" not in caplog.text

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
        with pytest.raises(UserError, match=r"captions.json: names '0.png' twice, with different values"):
            records_of(tmp_path)

    @pytest.mark.parametrize("other", ["images/0.png", "./0.png", "x\\..\\0.png"])
    def test_two_names_of_one_image_in_a_captions_json(self, tmp_path, other):
        make_pictures(tmp_path / "images", "0.png", "1.png")
        (tmp_path / "captions.json").write_text(json.dumps({"0.png": "one", other: "one", "1.png": None}))
        if ".." not in other:
            assert found(records_of(tmp_path)) == {"images/0.png": ("one",), "images/1.png": ("",)}
            (tmp_path / "captions.json").write_text(json.dumps({"0.png": "one", other: "two"}))
            with pytest.raises(
                UserError, match=r"captions.json: 1 images have two entries .* as '0.png' and '.*'; leave"
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


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "PNG")
    return file.getvalue()


def write_tar(file: Path, members: dict[str, bytes], behind: bytes = b"") -> None:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        end = archive.offset
    if behind:
        file.write_bytes(file.read_bytes()[:end] + behind)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


class TestTars:
    def test_members_in_capitals_and_other_encodings(self, tmp_path):
        members = {"0.PNG": png(), "0.TXT": CHINESE.encode("gbk"), "1.png": png(), "1.txt": b"a dog"}
        write_tar(tmp_path / "a.tar", members)
        assert found(records_of(tmp_path)) == {"a.tar/0.PNG": (CHINESE,), "a.tar/1.png": ("a dog",)}
        assert dict(records_of(tmp_path / "a.tar", text_encoding="ascii").refused) == {
            "a.tar/0.PNG": "its caption file 0.TXT can't be read: is not ascii: byte 0 is none of its letters"
        }

    def test_text_members_are_bounded(self, tmp_path):
        members = {"0.png": png(), "0.txt": b"x" * (MAX_CAPTION + 1), "1.png": png(), "1.json": b"[" * 10**5}
        write_tar(tmp_path / "a.tar", members | {"2.png": png()})
        records = records_of(tmp_path)
        assert list(found(records)) == ["a.tar/2.png"]
        assert dict(records.refused) == {
            "a.tar/0.png": "its caption file 0.txt can't be read: has over 65.5 kB; no more are read",
            "a.tar/1.png": "its caption file 1.json can't be read: is nested more than 100 deep",
        }

    @pytest.mark.parametrize(
        ("behind", "reason"),
        [
            (header("1.txt", 10**13), "the shard ends before its end; its header claims 10 TB"),
            (header("1.png", 10**13), "the shard ends before its end; its header claims 10 TB"),
            (header("././@LongLink", 10**13, b"L") + b"x" * 512, "a header of 10 TB"),
            (header("x", 10**9, b"x") + b"x" * 512, "a header of 1 GB"),
            (header("x", 512, b"L") * 3000, "the shard is broken"),
            (header("1.txt", -1024), "a header claims -1024 bytes"),
            (header("1.bin", -1024, b"Z"), "a header claims -1024 bytes"),
            (header("x", -1024, b"x"), "the shard is broken"),
            (header("x", 10**4, b"x") + b"1" * 10_240, "the shard is broken"),
            (b"junk" * 200, "no header stands there"),
            (bytes(10_240) + header("1.png", 512) + b"x" * 512, "its end is followed by more"),
        ],
    )
    def test_headers_that_lie_cost_what_follows(self, tmp_path, behind, reason):
        write_tar(tmp_path / "a.tar", {"0.png": png(), "0.txt": b"a dog"}, behind)
        begin = time.monotonic()
        records = records_of(tmp_path)
        assert time.monotonic() - begin < 5
        assert found(records) == {"a.tar/0.png": ("a dog",)}
        assert any(reason in told for _, told in records.refused)
        assert all(name.startswith("a.tar") for name, _ in records.refused)

    def test_two_samples_of_one_name_are_named(self, tmp_path, caplog):
        members = [("0.png", png()), ("0.txt", b"one"), ("0.png", png()), ("0.txt", b"two"), ("1.left.png", png())]
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for name, content in [*members, ("1.right.png", png())]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        records = records_of(tmp_path)
        assert found(records) == {"a.tar/0.png": ("one",), "a.tar/1.left.png": ("",)}
        assert (
            "2 images are left out, as another of their sample comes before them, such as a.tar/0.png;" in caplog.text
        )
        assert "such as a.tar/0.txt and not a.tar/another 0.txt" in caplog.text
        assert "in no list or split" not in caplog.text
        words = [fate.word for _, fate in records.sources[0].table.member_fates]
        assert sorted(words) == ["caption", "duplicate", "duplicate", "other"]

    @pytest.mark.parametrize(
        ("content", "kind"),
        [
            (gzip.compress(b"x" * 100, mtime=0), "compressed by gzip, of which gunzip makes a plain one"),
            (bz2.compress(b"x"), "compressed by bzip2"),
            (lzma.compress(b"x"), "compressed by xz"),
            (b"PK\x03\x04" + b"x" * 600, "a zip archive; unpack it"),
            (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS; fetch the file itself"),
            (b"<!DOCTYPE html><html>", "a web page; fetch the file again"),
        ],
    )
    def test_what_is_only_called_tar_is_named(self, tmp_path, content, kind):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(UserError, match=f"a.tar: is no tar file but {kind}"):
            records_of(tmp_path)
        write_tar(tmp_path / "b.tar", {"BZh.png": png()})
        assert len(records_of(tmp_path).refused) == 1


class TestFolders:
    def test_the_numbers_of_folders_are_named_and_counted_where_asked(self, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        make_pictures(tmp_path, "10_cat/0.png", "10_cat/1.png", "2_cats/0.png", "dog/0.png", "0_none/0.png")
        images = planned(records_of(tmp_path), tmp_path / "m")
        say_what_was_left_out(images, 1)
        assert "with --folder_repeats it is used as often as the number says, here 10 times" in caplog.text
        assert images.batches(1, 1, 0).samples_per_epoch == 5
        counted = planned(records_of(tmp_path, folder_repeats=True), tmp_path / "m")
        batches = counted.batches(1, 1, 0)
        assert batches.samples_per_epoch == 2 * 10 + 2 + 1
        drawn = [counted.records.key(batches.draw(step, 0).record) for step in range(23)]
        assert {name: drawn.count(name) for name in drawn} == {
            "10_cat/0.png": 10,
            "10_cat/1.png": 10,
            "2_cats/0.png": 2,
            "dog/0.png": 1,
        }

    def test_a_source_in_a_dataset_file_counts_its_own(self, tmp_path):
        make_pictures(tmp_path, "a/3_cat/0.png", "b/5_dog/0.png")
        text = "- {train_data_dir: a, folder_repeats: true, repeats: 2}\n- {train_data_dir: b}\n"
        (tmp_path / "sources.yaml").write_text(text)
        data = DataOptions(dataset_file=str(tmp_path / "sources.yaml"))
        group_of, repeats = read_records(data, SourceOptions(), CaptionOptions(), 0).groups()
        assert [int(repeats[group]) for group in group_of] == [6, 1]

    def test_images_without_a_caption_are_told_by_what_they_train_on(self, tmp_path, caplog):
        make_pictures(tmp_path, "a/0.png", "a/1.png", "b/0.png")
        text = "- {train_data_dir: a, on_missing_caption: folder}\n- {train_data_dir: b}\n"
        (tmp_path / "sources.yaml").write_text(text)
        data = DataOptions(dataset_file=str(tmp_path / "sources.yaml"))
        say_what_was_left_out(planned(read_records(data, SourceOptions(), CaptionOptions(), 0), tmp_path / "m"), 1)
        told = [record.message for record in caplog.records if "no caption" in record.message]
        assert told == [
            "2 images have no caption and train on the name of their folder",
            "1 images have no caption and train on an empty one (see --on_missing_caption)",
        ]


def bomb() -> str:
    lines = ["- &a0 [x, x, x, x, x, x, x, x, x, x]"]
    return "\n".join(lines + [f"- &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)])


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


class TestDatasetFile:
    @pytest.mark.parametrize(
        ("content", "named"),
        [
            (bomb(), "more than 100000 values at line 5, with aliases"),
            ("- &a {train_data_dir: x, name: *a}", "stands within what it refers to"),
            ("[" * 200_000, "is nested more than 100 deep"),
            ("- train_data_dir: [a, [b]]", r"source 1: train_data_dir must be one value, got \['a', \['b'\]\]"),
            ("- {train_data_dir: x, repeats: " + "9" * 1000 + "}", "a number of 1000 digits"),
            ("- {train_data_dir: x, repeats: 2020-01-01}", "'repeats': '2020-01-01' is a date to YAML"),
            ("- {train_data_dir: x, shuffle_tags: 7}", "shuffle_tags must be bool, got 7"),
            ("- train_data_dir: x\n  trigger_word: #sks\n", "'trigger_word': '#sks' is a comment to YAML; quote it"),
            ("- {train_data_dir: x, caption_prefix: Null}", "'caption_prefix': 'Null' is nothing to YAML"),
            ("- {train_data_dir: x, 0x1F: 1}", "source 1: 0x1F is unknown"),
            ("- {train_data_dir: x, =: 1}", "source 1: = is unknown"),
            ("- {train_data_dir: x, <<: 1}", "expected a mapping or list of mappings for merging"),
            ("- {train_data_dir: x, keep_tokens: 010}", "'keep_tokens': '010' is the number 8 to YAML"),
            ("- {train_data_dir: x, ? [a] : b}", "unhashable key"),
            ("- {? {a: b} : b}", "unhashable key"),
            ("- {1: 2}", "source 1: 1 is unknown"),
            ("- {train_data_dir: x, train_data_dir: y}", "'train_data_dir' stands twice in a mapping"),
            ("null", "must hold a list of sources"),
            ("5", "must hold a list of sources"),
            ("{sources: 5}", "must hold a list of sources"),
            ("{sources: [{}], more: [1]}", "more is unknown beside sources"),
            ("- {train_data_dir: x, text_encoding: klingon}", "source 1: --text_encoding must be an encoding"),
            ("# " + "x" * 50_000_000, "has 50 MB; at most 1.05 MB are read"),
            ("\x00\x01\x02\x03", "is no text"),
        ],
    )
    def test_whatever_it_holds_is_one_line(self, tmp_path, content, named):
        make_pictures(tmp_path / "x", "0.png")
        (tmp_path / "sources.yaml").write_text(content)
        begin = time.monotonic()
        with pytest.raises(UserError, match=named) as raised:
            source_entries(DataOptions(dataset_file=str(tmp_path / "sources.yaml")), SourceOptions(), CaptionOptions())
        assert time.monotonic() - begin < 5
        assert "sources.yaml" in str(raised.value)
        assert len(str(raised.value)) < 500

    def test_yes_and_no_are_true_and_false_where_nothing_else_can_be_meant(self, tmp_path):
        make_pictures(tmp_path / "x", "0.png")
        text = "- {train_data_dir: x, shuffle_tags: yes, folder_repeats: off}\n"
        (tmp_path / "sources.yaml").write_text(text)
        data = DataOptions(dataset_file=str(tmp_path / "sources.yaml"))
        (entry,) = source_entries(data, SourceOptions(), CaptionOptions())
        assert entry.captions.shuffle_tags
        assert not entry.source.folder_repeats

    def test_texts_are_texts_as_they_stand(self, tmp_path):
        make_pictures(tmp_path / "2024", "0.png")
        text = "- {train_data_dir: 2024, trigger_word: 0x1F, name: no, caption_prefix: 1.50, caption_suffix: null}\n"
        (tmp_path / "sources.yaml").write_text(text)
        data = DataOptions(dataset_file=str(tmp_path / "sources.yaml"))
        (entry,) = source_entries(data, SourceOptions(), CaptionOptions())
        assert (entry.name, entry.captions.trigger_word, entry.captions.caption_prefix) == ("no", "0x1F", "1.50")
        assert entry.captions.caption_suffix is None

    def test_each_source_has_its_encoding_and_the_file_its_own(self, tmp_path, caplog):
        for name in ("红色", "b"):
            make_pictures(tmp_path / name, "0.png")
            (tmp_path / name / "0.txt").write_bytes("кот".encode("cp866"))
        text = "- {train_data_dir: 红色, text_encoding: cp866, name: 红色的苹果}\n"
        text += "- {train_data_dir: b, text_encoding: cp437}\n"
        (tmp_path / "sources.yaml").write_bytes(text.encode("gb18030"))
        data = DataOptions(dataset_file=str(tmp_path / "sources.yaml"))
        records = read_records(data, SourceOptions(), CaptionOptions(), 0)
        assert records.captions(0) == ("кот",)
        assert records.captions(1) != ("кот",)
        assert "--dataset_file" in caplog.text
        assert "read as gb18030, a guess" in caplog.text


PIECES = [
    b"[",
    b"{",
    b'"',
    b",",
    b";",
    b"\t",
    b"\n",
    b"\0",
    b"\xff\xfe",
    b"\r",
    b"*a",
    b"&a ",
    b"!!int ",
    b"\\ud800",
    b"<<: ",
]


def mutated(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randrange(1, 6)):
        place = draw.randrange(len(changed) + 1)
        if draw.random() < 0.4 and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif draw.random() < 0.3:
            del changed[place : place + draw.randrange(20)]
        else:
            changed[place:place] = draw.choice(PIECES) * draw.choice([1, 1, 2, 150])
    return bytes(changed)


@pytest.mark.parametrize(
    "name", ["metadata.csv", "metadata.jsonl", "captions.json", "0.txt", "0.json", "a.tar", "sources.yaml"]
)
def test_mutated_files_end_in_records_or_one_line(tmp_path, name, caplog):
    caplog.set_level(logging.CRITICAL)
    folder = tmp_path / "data"
    make_pictures(folder, "0.png", "1.png")
    write_tar(
        tmp_path / "a.tar", {"0.png": png(), "0.txt": b"a dog", "d/" + "x" * 150 + ".json": b'"a"', "1.png": png()}
    )
    contents = {
        "metadata.csv": f'file_name,text\n0.png,"a {CHINESE}, b"\n1.png,é\n'.encode(),
        "metadata.jsonl": f'{{"file_name": "0.png", "text": ["{CHINESE}", null]}}\n{{"file_name": "1.png"}}\n'.encode(),
        "captions.json": f'{{"0.png": "{CHINESE}", "1.png": {{"tags": ["a", "b"]}}}}'.encode(),
        "0.txt": CHINESE.encode("gbk"),
        "0.json": b'{"caption": ["a", "b"], "width": 1.5e3}',
        "a.tar": (tmp_path / "a.tar").read_bytes(),
        "sources.yaml": b"sources:\n- {train_data_dir: data, repeats: 2}\n- train_data_dir: data\n  name: b\n",
    }
    (tmp_path / "a.tar").unlink()
    file = (tmp_path if name == "sources.yaml" else folder) / name
    if name == "a.tar":
        for picture in folder.glob("*.png"):
            picture.unlink()
    draw = random.Random(0)
    for _ in range(120):
        file.write_bytes(mutated(contents[name], draw))
        with contextlib.suppress(UserError):
            if name == "sources.yaml":
                records = read_records(DataOptions(dataset_file=str(file)), SourceOptions(), CaptionOptions(), 0)
            else:
                records = records_of(folder)
            assert all(isinstance(caption, str) for captions in found(records).values() for caption in captions)
