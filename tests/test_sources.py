"""Which files of a folder are the data, and what becomes of every other."""

import base64
import io
import json
import logging
import os
import re
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from tests import tiny
from utils.config.options import UserError, option, parse, with_values
from utils.data.captions import CaptionOptions
from utils.data.file_ledger import Ledger
from utils.data.file_listing import Fate, list_folder
from utils.data.folders import list_files
from utils.data.options import BucketOptions, SelectionOptions
from utils.data.plan import plan_images
from utils.data.source_options import DataOptions, SourceOptions
from utils.data.sources import Records, read_records
from utils.data.stream import open_stream
from utils.data.survey import survey
from utils.runtime.atomic_files import MARKER, mark_as_own


def records_of(folder: Path | None = None, **options) -> Records:
    """The records of a folder, or of the source that the options name."""
    if folder is not None:
        options["train_data_dir"] = str(folder)
    return read_records(DataOptions(), SourceOptions(**options), CaptionOptions(), 0)


def keys(records: Records) -> list[str]:
    return [records.key(index) for index in range(len(records))]


def ledger_of(folder: Path, memory: Path, **options) -> Ledger:
    """The fates of a folder's files."""
    records = records_of(folder, **options)
    known = survey(records, memory)
    selection = SelectionOptions(max_bad_fraction=1.0, min_image_size=options.pop("min_image_size", None))
    ledger = Ledger()
    ledger.train_on(plan_images(records, known, 32, 1, BucketOptions(), selection, lambda count, bad: None))
    return ledger


def fates_of(ledger: Ledger, folder: Path) -> dict[str, str]:
    """The fate of each file, as it is written down."""
    ledger.write(folder, is_last=True)
    lines = [json.loads(line) for line in (folder / "data_report.jsonl").read_text().splitlines()]
    assert len({line["file"] for line in lines}) == len(lines)
    return {line["file"]: line["fate"] for line in lines}


def picture(file: Path, size: tuple[int, int] = (40, 40)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(file)
    return file


def touch(file: Path, content: str = "x") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return file


def png(size: tuple[int, int] = (40, 40)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "blue").save(file, "PNG")
    return file.getvalue()


def parquet(file: Path, count: int = 2, **columns) -> Path:
    """A Parquet file of images with captions, or of other columns."""
    import pyarrow as pa
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    found = columns or {"image": [png()] * count, "text": [f"{file.stem} {number}" for number in range(count)]}
    pyarrow.parquet.write_table(pa.table(found), file)
    return file


def tar(file: Path, *names: str) -> Path:
    """A tar shard: images for the names of images, else texts."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name in names:
            content = png() if name.endswith((".png", ".jpg")) else b"text"
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


class TestDetection:
    def test_a_repository_as_it_comes_from_the_hub(self, tmp_path, caplog):
        for number in range(2):
            parquet(tmp_path / "data" / f"train-0000{number}-of-00002.parquet")
        picture(tmp_path / "banner.png")
        touch(tmp_path / "README.md", "---\nconfigs: []\n---\n![](banner.png)")
        touch(tmp_path / ".gitattributes")
        records = records_of(tmp_path)
        assert len(records) == 4
        assert records.captions(3) == ("train-00001-of-00002 1",)
        assert "left out as decoration: 1 image (banner.png)" in caplog.text
        assert records_of(tmp_path, data_format="pairs").key(0) == "banner.png"
        assert Counter(fate.word for _, fate in records.sources[0].table.fates) == {
            "shard": 2,
            "other": 2,
            "hidden": 1,
        }

    def test_shards_with_a_cover(self, tmp_path, caplog):
        tar(tmp_path / "000.tar", "a.png", "a.txt")
        picture(tmp_path / "cover.jpg")
        assert keys(records_of(tmp_path)) == ["000.tar/a.png"]
        assert "cover.jpg" in caplog.text

    @pytest.mark.parametrize(
        ("files", "named"),
        [
            (("a.png", "b.png", "c.png", "0.tar"), "1 tar shard (0.tar) and 3 images (a.png, b.png, c.png)"),
            (("banner.png", "banner.txt", "0.tar"), "1 image (banner.png)"),
            (("images/1.png", "images/2.png", "0.parquet"), "1 parquet file (0.parquet) and 2 images"),
            (("0.tar", "0.parquet"), "--data_format parquet or --data_format webdataset"),
        ],
    )
    def test_what_is_ambiguous_is_refused_with_its_counts_and_a_cure(self, tmp_path, files, named):
        for name in files:
            file = tmp_path / name
            {".png": picture, ".tar": lambda file: tar(file, "x.png"), ".parquet": parquet}.get(file.suffix, touch)(
                file
            )
        with pytest.raises(UserError, match="it is unclear which are the data; give --data_format") as error:
            records_of(tmp_path)
        assert named in str(error.value)
        kind = "webdataset" if "0.tar" in files else "parquet"
        assert len(records_of(tmp_path, data_format=kind)) in (1, 2)

    def test_tables_of_other_things_lie_beside_images(self, tmp_path, caplog):
        picture(tmp_path / "a.png")
        picture(tmp_path / "b.png")
        parquet(tmp_path / "scores.parquet", name=["a.png"], score=[1.0])
        assert keys(records_of(tmp_path)) == ["a.png", "b.png"]
        assert "scores.parquet is not read; if it lists captions, rename it" in caplog.text

    def test_metadata_in_parquet(self, tmp_path):
        for name in ("a.png", "b.png", "c.png"):
            picture(tmp_path / "images" / name)
        parquet(tmp_path / "metadata.parquet", file_name=["images/a.png", "images/b.png"], text=["one", None])
        records = records_of(tmp_path)
        assert {records.key(index): records.captions(index) for index in range(2)} == {
            "images/a.png": ("one",),
            "images/b.png": ("",),
        }
        assert records.sources[0].table.num_left_out == 1
        with pytest.raises(UserError, match=r"--caption_column words is not a column of the data: .* has text"):
            records_of(tmp_path, caption_column="words")
        touch(tmp_path / "metadata.jsonl", json.dumps({"file_name": "images/c.png", "text": "three"}))
        assert keys(records_of(tmp_path)) == ["images/c.png"]  # that of Parquet is not added to another

    @pytest.mark.parametrize(
        "name",
        ["metadata.json", "Metadata.jsonl", "metadata.jsonl.txt", "captions.csv", "metadata.xlsx", "train.jsonl"],
    )
    def test_what_looks_like_a_list_of_captions_is_named(self, tmp_path, caplog, name):
        touch(tmp_path / name, "{}")
        with pytest.raises(UserError, match=f"there are no images in .*; {name} is not read: rename it to metadata"):
            records_of(tmp_path)
        picture(tmp_path / "a.png")
        records_of(tmp_path)
        assert f"{name} is not read; if it lists captions, rename it to metadata.csv" in caplog.text
        caplog.clear()
        touch(tmp_path / "a.txt")
        records_of(tmp_path)
        assert name not in caplog.text  # all images have captions

    def test_shards_whose_names_say_no_split(self, tmp_path, caplog):
        tar(tmp_path / "train-0.tar", "a.png")
        tar(tmp_path / "extra.tar", "b.png")
        assert keys(records_of(tmp_path)) == ["extra.tar/b.png", "train-0.tar/a.png"]
        assert "taken for the split train too, though their names say no split: extra.tar" in caplog.text
        tar(tmp_path / "test-0.tar", "c.png")
        with pytest.raises(UserError, match=r"extra.tar of the data name no split, others are of test, train; rename"):
            records_of(tmp_path)

    @pytest.mark.parametrize("kind", ["metadata.jsonl", "captions.json"])
    def test_names_in_other_capitals_or_another_normal_form(self, tmp_path, kind):
        """Another normal form is the same text, as macOS writes it; other capitals are another name, and hinted at."""
        for name in ("e\u0301.png", "b.PNG", "c.png"):
            picture(tmp_path / name)
        captions = {"\u00e9.png": "one", "b.png": "two", "c.png": "three"}
        rows = "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in captions.items())
        touch(tmp_path / kind, rows if kind.endswith("l") else json.dumps(captions))
        table = records_of(tmp_path).sources[0].table
        found = {table.key(row): table.captions(row) for row in range(len(table))}
        assert (found["e\u0301.png"], found["c.png"]) == (("one",), ("three",))
        assert table.refused == [("b.png", "is listed but not there; 'b.PNG' is")]

    @pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
    @pytest.mark.parametrize("keep", [0, 7, 60, -3])
    def test_a_damaged_parquet_file_is_named(self, tmp_path, flag, keep):
        for name in ("a.parquet", "b.parquet"):
            parquet(tmp_path / name)
        damaged = tmp_path / "b.parquet"
        damaged.write_bytes(damaged.read_bytes()[:keep])
        with pytest.raises(UserError, match=rf"--{flag} {tmp_path}: b\.parquet can't be read: .*; fetch it again"):
            read_records(DataOptions(), SourceOptions(**{flag: str(tmp_path)}), CaptionOptions(), 0)
        if flag == "train_data_dir":
            with pytest.raises(UserError, match=r"--train_data_dir .*: b\.parquet can't be read: .*; fetch it again"):
                records_of(damaged)

    def test_a_table_without_images_beside_shards_of_several_splits(self, tmp_path, caplog):
        for name in ("train-0.parquet", "test-0.parquet"):
            parquet(tmp_path / name)
        parquet(tmp_path / "statistics.parquet", mean=[0.5])
        assert len(records_of(tmp_path)) == 2
        assert "left out, as they hold no images: 1 parquet file (statistics.parquet)" in caplog.text

    def test_several_configurations_of_a_dataset(self, tmp_path):
        for name in ("small", "large"):
            parquet(tmp_path / name / "train-0.parquet")
        header = "configs:\n- config_name: small\n  data_files: small/*\n- config_name: large\n  data_files: large/*"
        touch(tmp_path / "README.md", f"---\n{header}\n---\n# A dataset")
        with pytest.raises(UserError, match=r"the configurations small, large; give one: .*config_name small"):
            records_of(tmp_path)
        assert len(records_of(tmp_path / "small")) == 2
        assert len(records_of(dataset_name=str(tmp_path), dataset_config_name="large")) == 2

    def test_a_saved_dataset_within_a_folder(self, tmp_path):
        from datasets import Dataset

        Dataset.from_dict({"image": [Image.new("RGB", (8, 8))], "text": ["x"]}).save_to_disk(tmp_path / "saved")
        with pytest.raises(UserError, match=f"saved dataset in saved; give it as --dataset_name {tmp_path}/saved"):
            records_of(tmp_path)
        picture(tmp_path / "a.png")
        with pytest.raises(UserError, match=r"saved dataset in saved beside 1 image .*--data_format pairs"):
            records_of(tmp_path)
        assert keys(records_of(tmp_path, data_format="pairs")) == ["a.png"]
        picture(tmp_path / "saved" / "cover.png")
        assert len(records_of(dataset_name=str(tmp_path / "saved"))) == 1

    def test_a_folder_of_images_and_captions_as_a_dataset(self, tmp_path):
        picture(tmp_path / "a.png")
        touch(tmp_path / "a.txt")
        with pytest.raises(UserError, match=f"such as a.txt; give it as --train_data_dir {tmp_path}"):
            records_of(dataset_name=str(tmp_path))

    def test_a_folder_that_datasets_reads_half(self, tmp_path, caplog):
        for number in range(3):
            parquet(tmp_path / f"train-{number}.parquet")
        picture(tmp_path / "banner.png")
        assert len(records_of(dataset_name=str(tmp_path))) == 6
        assert "is read as parquet; 1 other files of it that may be data are not, such as banner.png" in caplog.text


class TestShardsOfTables:
    """Parquet files that `datasets` reads wrongly, or refuses without a name."""

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        ("columns", "told"),
        [
            ({"caption": ["x", "y"]}, "it has the columns image, caption, the other image, text"),
            ({}, "it has the columns image, the other image, text"),
            ({"text": [["x"], ["y"]]}, r"its column text holds list<\w+: string>, that of the other string"),
        ],
    )
    def test_shards_of_other_columns_are_named(self, tmp_path, columns, told, streaming):
        parquet(tmp_path / "train-0.parquet", image=[png(), png()], text=["a", "b"])
        parquet(tmp_path / "train-1.parquet", image=[png(), png()], **columns)
        source = SourceOptions(train_data_dir=str(tmp_path))
        read = partial(records_of, tmp_path)
        if streaming:
            read = partial(open_stream, DataOptions(streaming=True), source, CaptionOptions(), 32, BucketOptions())
        with pytest.raises(UserError, match=rf"train-1.parquet is no shard of the same .* train-0.parquet: {told}"):
            read()

    def test_shards_that_are_read_together_are_no_fault(self, tmp_path, caplog):
        import pyarrow as pa

        images = [png()]
        texts = [pa.array(["a"], kind) for kind in (pa.string(), pa.large_string())]
        for number, text in enumerate(
            [*texts, pa.array([None], pa.null()), pa.array([7]), pa.array(["a"]).dictionary_encode()]
        ):
            parquet(tmp_path / f"train-{number}.parquet", image=images, text=text)
        parquet(tmp_path / "train-5.parquet", text=["z"], image=images)
        parquet(tmp_path / "test-0.parquet", image=images, caption=["z"])
        assert [records_of(tmp_path).captions(row)[0] for row in range(6)] == ["a", "a", "", "7", "a", "z"]
        assert not caplog.records

    def test_types_that_datasets_casts_are_no_fault(self, tmp_path):
        """Columns that are not used are of any types; bytes where the first shard has bytes with a path."""
        import datasets

        first = {"image": [{"bytes": png(), "path": None}], "text": ["a"], "size": [1]}
        features = {"image": datasets.Image(), "text": datasets.Value("string"), "size": datasets.Value("int64")}
        datasets.Dataset.from_dict(first, datasets.Features(features)).to_parquet(tmp_path / "train-0.parquet")
        parquet(tmp_path / "train-1.parquet", image=[png()], text=["b"], size=["2"])
        records = records_of(tmp_path)
        assert [records.captions(row)[0] for row in range(2)] == ["a", "b"]
        assert all(isinstance(records.image(row), bytes) for row in range(2))
        parquet(tmp_path / "train-0.parquet", image=[{"bytes": png(), "path": None}], text=["a"], size=[1])
        for size in (["2"], ["x"], [[3]], [{"w": 3}], [0.5]):
            parquet(tmp_path / "train-1.parquet", image=[png()], text=["b"], size=size, more=size)
            records = records_of(tmp_path)  # nothing in it says that the column holds images
            assert [records.captions(row)[0] for row in range(2)] == ["a", "b"]
            assert all(isinstance(records.image(row), bytes) for row in range(2))

    @pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name", "streaming"])
    @pytest.mark.parametrize("is_turned", [False, True])
    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ({"path": None}, {"path": "x.png"}),
            ({"text": None}, {"text": "b"}),
            ({"path": None, "n": 1}, {"path": "x.png", "n": [1]}),
            ({"n": None, "m": 1}, {"n": "x", "m": 1.5}),
            ({"mask": None}, {"mask": {"bytes": b"x", "path": "m.png"}}),
        ],
    )
    def test_shards_whose_types_differ_where_nothing_is_lost(self, tmp_path, flag, first, second, is_turned):
        for number, row in enumerate((second, first) if is_turned else (first, second)):
            row = {"path": None, "text": "a", "mask": {"bytes": b"x", "path": None}, **row}
            columns = {"image": {"bytes": png(), "path": row.pop("path")}, **row}
            parquet(tmp_path / f"train-{number}.parquet", **{name: [value] for name, value in columns.items()})
        texts = [first.get("text", "a") or "", second.get("text", "a")]
        texts = texts[::-1] if is_turned else texts
        if flag == "streaming":
            source = SourceOptions(train_data_dir=str(tmp_path), mask_column="mask")
            stream = open_stream(DataOptions(streaming=True), source, CaptionOptions(), 32, BucketOptions())
            assert [row["text"] or "" for row in stream.dataset] == texts
            assert all(row["image"]["bytes"] == png() for row in stream.dataset)
            return
        records = records_of(**{flag: str(tmp_path)}, mask_column="mask")
        assert [records.captions(row)[0] for row in range(2)] == texts
        assert [records.image(row) for row in range(2)] == [png()] * 2

    @pytest.mark.parametrize("streaming", [False, True])
    def test_json_files_are_read_so_too(self, tmp_path, streaming):
        """A path that is missing in all rows of a file, columns that are not used, and texts that are left out."""
        rows = [
            {"image": {"bytes": None, "path": None}, "text": "a", "n": 1},
            {"image": {"bytes": None, "path": "1.png"}, "text": "b", "n": [1]},
            {"image": {"path": "2.png"}, "m": "x"},
            {"image": "3.png", "text": "d"},
        ]
        for number, row in enumerate(rows):
            (tmp_path / f"train-{number}.jsonl").write_text(json.dumps(row))
        source = SourceOptions(dataset_name=str(tmp_path))
        if streaming:
            stream = open_stream(DataOptions(streaming=True), source, CaptionOptions(), 32, BucketOptions())
            assert [row["text"] for row in stream.dataset] == ["a", "b", None, "d"]
            return
        (tmp_path / "train-5.jsonl").touch()
        records = records_of(dataset_name=str(tmp_path))
        assert [records.captions(row)[0] for row in range(4)] == ["a", "b", "", "d"]
        assert [Path(records.image(row)).name for row in range(1, 4)] == ["1.png", "2.png", "3.png"]
        (tmp_path / "train-4.jsonl").write_text(json.dumps({"image": "4.png", "text": ["e"]}))
        with pytest.raises(
            UserError, match=r"train-4.jsonl is no shard of the same table as train-0.jsonl: its column"
        ):
            records_of(dataset_name=str(tmp_path))

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_dataset_with_files_without_rows(self, tmp_path, caplog, streaming):
        import pyarrow as pa

        parquet(tmp_path / "train-00000-of-00002.parquet", image=pa.array([], pa.null()), text=pa.array([], pa.null()))
        parquet(tmp_path / "train-00001-of-00002.parquet")
        parquet(tmp_path / "test-00000-of-00001.parquet", image=[7])
        if streaming:
            source = SourceOptions(dataset_name=str(tmp_path))
            stream = open_stream(DataOptions(streaming=True), source, CaptionOptions(), 32, BucketOptions())
            assert len(list(stream.dataset)) == 2
        else:
            assert len(records_of(dataset_name=str(tmp_path))) == 2
        assert "1 files have no rows, such as train-00000-of-00002.parquet" in caplog.text
        assert "missing" not in caplog.text
        parquet(tmp_path / "train-00001-of-00002.parquet", image=pa.array([], pa.null()), text=pa.array([], pa.null()))
        with pytest.raises(UserError, match="have no rows; fetch them again"):
            records_of(dataset_name=str(tmp_path))

    def test_files_without_rows(self, tmp_path, caplog):
        parquet(tmp_path / "train-0.parquet", image=[png()], text=["a"])
        import pyarrow as pa

        parquet(tmp_path / "train-1.parquet", image=pa.array([], pa.binary()), text=pa.array([], pa.string()))
        assert len(records_of(tmp_path)) == 1
        assert "1 files have no rows, such as train-1.parquet" in caplog.text
        (tmp_path / "train-0.parquet").unlink()
        with pytest.raises(UserError, match=rf"--train_data_dir {tmp_path}: train-1.parquet has no rows"):
            records_of(tmp_path)
        with pytest.raises(UserError, match=r"train-1.parquet has no rows"):
            records_of(tmp_path / "train-1.parquet")

    @pytest.mark.parametrize(
        ("value", "told"),
        [
            (base64.b64encode(png()).decode(), "its row holds an image as base64 text; decode it, and store its bytes"),
            ("/9j/" + "A" * 60 + "==", "an image as base64 text"),
            ("data:image/png;base64,AAAA", "an image as base64 text"),
            ("https://example.com/a.png", "the address of an image; fetch it, and store its bytes"),
        ],
    )
    def test_texts_in_place_of_images_are_named(self, tmp_path, value, told):
        parquet(tmp_path / "0.parquet", image=[value], text=["a"])
        records = records_of(tmp_path)
        known = survey(records, tmp_path / "memory")
        assert told in known.reasons[0]

    def test_a_list_of_images_is_named(self, tmp_path):
        parquet(tmp_path / "a" / "0.parquet", image=[[png()], [png()]], text=["a", "b"])
        with pytest.raises(
            UserError, match="--image_column image must hold one image in each row, got a list; make a row"
        ):
            records_of(tmp_path / "a")
        parquet(tmp_path / "b" / "0.parquet", image=[[[[255, 0, 0]] * 8] * 8], text=["pixels"])
        assert len(records_of(tmp_path / "b")) == 1


NO_TARS = {
    "dead link": (lambda file: file.symlink_to("/nowhere/x.tar"), "can't be read: it is a link to what does not exist"),
    "loop": (lambda file: file.symlink_to(file), "is a link that leads to itself"),
    "png": (lambda file: file.write_bytes(png()), "is no tar file but an image; rename it to .png"),
    "json": (lambda file: file.write_text('{"error": "not found"}'), "is no tar file but JSON; fetch the file again"),
    "text": (lambda file: file.write_text("404 not found\n" * 99), "is no tar file but a text; fetch the file again"),
    "zeros": (lambda file: file.write_bytes(bytes(10240)), "hold no files"),
}


class TestWhatIsOnlyCalledTar:
    @pytest.mark.parametrize("case", NO_TARS)
    def test_it_is_named_and_the_others_are_read(self, tmp_path, caplog, case):
        make, reason = NO_TARS[case]
        tar(tmp_path / "0.tar", "a.png", "a.txt")
        make(tmp_path / "1.tar")
        records = records_of(tmp_path)
        assert keys(records) == ["0.tar/a.png"]
        assert reason in caplog.text if case == "zeros" else records.refused == [("1.tar", reason)]
        source = SourceOptions(train_data_dir=str(tmp_path))
        stream = open_stream(DataOptions(streaming=True), source, CaptionOptions(), 32, BucketOptions())
        reasons = [row["__reason__"] for row in stream.dataset]
        assert len(reasons) == 2
        assert reason.replace("hold ", "holds ") in "".join(reasons)

    @pytest.mark.parametrize("case", NO_TARS)
    def test_beside_images_it_is_no_data(self, tmp_path, caplog, case):
        make, reason = NO_TARS[case]
        picture(tmp_path / "a.png")
        make(tmp_path / "1.tar")
        assert keys(records_of(tmp_path)) == ["a.png"]
        assert reason.replace("hold ", "holds ") in caplog.text

    @pytest.mark.parametrize("case", NO_TARS)
    def test_a_dataset_with_it(self, tmp_path, caplog, case):
        make, reason = NO_TARS[case]
        tar(tmp_path / "0.tar", "a.png", "a.txt")
        make(tmp_path / "1.tar")
        read = partial(records_of, dataset_name=str(tmp_path), image_column="png", caption_column="txt")
        if "no tar file" in reason:
            with pytest.raises(UserError, match=rf"1\.tar {re.escape(reason)}; take it out of the folder"):
                read()
        else:
            assert len(read()) == 1
            assert f"1.tar {reason.replace('hold ', 'holds ')}" in caplog.text

    def test_a_tar_within_a_tar(self, tmp_path, caplog):
        tar(tmp_path / "0.tar", "inner.tar", "b.zip")
        with pytest.raises(
            UserError, match=r"there are no images .*: an archive within a shard is not read; unpack it"
        ):
            records_of(tmp_path)
        tar(tmp_path / "1.tar", "a.png", "a.txt")
        assert keys(records_of(tmp_path)) == ["1.tar/a.png"]
        assert "2 files are not read, such as 0.tar/inner.tar: an archive within a shard" in caplog.text

    def test_shards_without_files_alone(self, tmp_path):
        for name in "01":
            tar(tmp_path / f"{name}.tar")
        with pytest.raises(UserError, match=r"0\.tar, 1\.tar hold no files; fetch them again"):
            records_of(tmp_path)


class TestSeries:
    @pytest.mark.parametrize(
        ("there", "told"),
        [
            (["train-00000-of-00003.parquet"], "1 of the 3 .*: train-00001-of-00003.parquet, train-00002-of-00003"),
            (["data/a-00001-of-00003.tar", "data/a-00003-of-00003.tar"], "2 of the 3 .*: data/a-00002-of-00003.tar;"),
            (["train-00001-of-00002-0123456789abcdef.parquet"], "missing: train-00000-of-00002.parquet or train-00002"),
            (["1-of-4.tar", "3-of-4.tar"], "2 of the 4 .* missing: 2-of-4.tar, 0-of-4.tar or 4-of-4.tar;"),
            (["1-of-4.tar", "4-of-4.tar"], "2 of the 4 .* missing: 2-of-4.tar, 3-of-4.tar;"),
            (["a01of11.tar", "a10of11.tar", "a11of11.tar"], "missing: a02of11.tar, a03of11.tar, a04of11.tar, ...;"),
            (["0_of_10.tar"], "missing: 1_of_10.tar, 2_of_10.tar, 3_of_10.tar, ...;"),
            (["x-00000-of-00002.tar", "y-00001-of-00002.tar"], "missing: x-00001-of-00002.tar"),
            (
                ["data_0.parquet", "data_1.parquet", "data_3.parquet"],
                "of the 4 .* 1 are left out, missing: data_2.parquet",
            ),
            (["s-000000.parquet", "s-000002.parquet"], "missing: s-000001.parquet;"),
            (["a/7.tar", "a/9.tar", "a/10.tar"], "from a/7.tar to a/10.tar 1 are left out, missing: a/8.tar;"),
            (
                ["0.tar", "0 (1).tar"],
                r"1 files are called as copies of others, such as 0 \(1\).tar of 0.tar; take them out",
            ),
            (["a.parquet", "a(2).parquet"], r"such as a\(2\).parquet of a.parquet"),
            (["a.parquet", "a copy.parquet", "a - Copy (2).parquet"], "2 files are called as copies of others"),
        ],
    )
    @pytest.mark.parametrize("streaming", [False, True])
    def test_missing_shards_are_named(self, tmp_path, caplog, there, told, streaming):
        for name in there:
            parquet(tmp_path / name) if name.endswith(".parquet") else tar(tmp_path / name, "a.png", "a.txt")
        if streaming:
            source = SourceOptions(train_data_dir=str(tmp_path))
            open_stream(DataOptions(streaming=True), source, CaptionOptions(), 32, BucketOptions())
        else:
            assert len(records_of(tmp_path))
        assert re.search(told, caplog.text)

    @pytest.mark.parametrize(
        "there",
        [
            ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
            ["train-00000-of-00002-0123456789abcdef.parquet", "train-00001-of-00002-fedcba9876543210.parquet"],
            ["1-of-2.parquet", "2-of-2.parquet"],
            ["train-00000-of-00001.parquet", "test-00000-of-00002.parquet"],
            ["s-000000.parquet", "s-000007.parquet", "s-000100.parquet"],
            ["data_1 (1).parquet", "data_2.parquet"],
            ["copy.parquet", "a copy.parquet"],
            ["2019.parquet", "2020-v2.parquet"],
            ["profound-12.parquet", "of-3.parquet"],
            ["top10of100.parquet", "best5of9.parquet"],
            ["10of50.parquet", "7-of-3.parquet"],
        ],
    )
    @pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
    def test_whole_series_and_other_names_are_no_fault(self, tmp_path, caplog, there, flag):
        for name in there:
            parquet(tmp_path / name)
        assert len(records_of(**{flag: str(tmp_path)}))
        assert "missing" not in caplog.text
        assert "copies" not in caplog.text

    def test_a_single_shard_and_shards_of_a_dataset(self, tmp_path, caplog):
        parquet(tmp_path / "train-00000-of-00002.parquet")
        with caplog.at_level("INFO"):
            records_of(tmp_path / "train-00000-of-00002.parquet")
        (told,) = (record for record in caplog.records if "missing: train-00001-of-00002.parquet" in record.message)
        assert told.levelname == "INFO"  # it was asked for
        caplog.clear()
        records_of(dataset_name=str(tmp_path))
        assert f"--dataset_name {tmp_path}: 1 of the 2 shards" in caplog.text

    def test_pages_of_a_book_are_no_shards(self, tmp_path, caplog):
        for name in ("page-1-of-9.png", "page-3-of-9.png"):
            picture(tmp_path / name)
            touch(tmp_path / name.replace(".png", ".txt"))
        assert len(records_of(tmp_path)) == 2
        assert not caplog.records


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
        assert "locked can't be listed, its files are left out: Permission denied" in caplog.text

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
            with pytest.raises(UserError, match="in the path of a folder for a pattern; give it as --train_data_dir"):
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
        assert all(f"left out the folder {tmp_path}/{name}:" in caplog.text for name in ("marked", "run", "dry"))
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
