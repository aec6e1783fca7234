"""Metadata and lists of images as people and programs write them, in any encoding, whole or broken."""

import contextlib
import json
import logging
import random
import time
from pathlib import Path

import pytest

from tests.records import found, records_of
from tests.text_files import CHINESE, make_pictures, planned, png, write_tar
from utils.config.options import UserError
from utils.data.captions import MAX_CAPTION, CaptionOptions, is_written_list
from utils.data.source_options import DataOptions, SourceOptions
from utils.data.sources import read_records


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
            ("0.png,a dog, sitting on grass", 2, "more cells than the 2 columns; quote text with a comma"),
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
            ('0.png,"a dog\n1.png,a cat\n', "line 2 can't be read: a quote opens there and is never closed"),
            ('0.png,"a dog\n1.png,a cat"\n', "line 2 can't be read: the quote that opens there runs on into line 3"),
            ('0.png,"a dog\n1.png,"a cat"\n', "line 2 can't be read: text follows a closing quote"),
            (f'0.png,"{"x" * 200_000}"\n', "line 2 can't be read: a cell has over 131072 characters"),
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
            ("file_name,text,text", "has the column 'text' twice"),
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
            "metadata.jsonl, line 3": "has a number of 5000 digits; at most 300 are read",
            "metadata.jsonl, line 4": "is not a JSON object but a list; write an object for each image",
            "1.png": "its caption has 1,000,000 characters; at most 65,536 are read",
        }

    def test_several_rows_of_an_image_are_counted_and_named(self, tmp_path, caplog):
        make_pictures(tmp_path, "0.png", "1.png", "2.png")
        names = ("0.png", "./0.png", "x/../1.png", "1.png", "2.png")
        rows = [{"file_name": name, "text": f"t{number}"} for number, name in enumerate(names)]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert found(records_of(tmp_path)) == {"0.png": ("t0", "t1"), "1.png": ("t2", "t3"), "2.png": ("t4",)}
        assert "metadata.jsonl: 2 images have several rows, such as '0.png'; each is used once" in caplog.text
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
        assert "metadata.csv: 6 cells hold NaN, NULL, None, the first on line 2, and are read as empty" in caplog.text
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
        assert "1 captions are text that looks like a list, such as" in caplog.text

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
                "in metadata.jsonl .*line 1: starts a JSON array; write",
            ),
            ("metadata.jsonl", '[{"file_name": "0.png"}]', "line 1: is not a JSON object but a list; write an object"),
            ("metadata.jsonl", '{"file_name": "0.png"}{"file_name": "1.png"}', "Extra data.*on its own line"),
            ("metadata.jsonl", '{"file_name": "0.png", "text": "a", "text": "b"}', "none of the 1 .*'text' twice"),
            ("metadata.csv", "0.png,a dog\n1.png,a cat\n", "no column file_name.*; write a header above its first"),
            ("metadata.csv", "#comment\nfile_name,text\n0.png,a\n", "no column file_name.*; rename the column"),
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
