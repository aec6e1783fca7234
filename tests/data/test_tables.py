"""Shards of tables."""

import base64
import json
from functools import partial
from pathlib import Path

import pytest

from tests.records import records_of
from tests.source_files import parquet, png
from utils.config.options import UserError
from utils.data.captions import CaptionOptions
from utils.data.options import BucketOptions
from utils.data.source_options import DataOptions, SourceOptions
from utils.data.stream import open_stream
from utils.data.survey import survey


class TestShardsOfTables:
    """Parquet files that `datasets` reads wrongly, or refuses without a name."""

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        ("columns", "told"),
        [
            ({"caption": ["x", "y"]}, "it has the columns image, caption, the other image, text"),
            ({}, "it has the columns image, the other image, text"),
            ({"text": [["x"], ["y"]]}, r"its column text holds list<\w+: string>, in the other it holds string"),
        ],
    )
    def test_shards_of_other_columns_are_named(self, tmp_path, columns, told, streaming):
        parquet(tmp_path / "train-0.parquet", image=[png(), png()], text=["a", "b"])
        parquet(tmp_path / "train-1.parquet", image=[png(), png()], **columns)
        source = SourceOptions(train_data_dir=str(tmp_path))
        read = partial(records_of, tmp_path)
        if streaming:
            read = partial(open_stream, DataOptions(streaming=True), source, CaptionOptions(), 32, BucketOptions())
        with pytest.raises(UserError, match=rf"train-1.parquet is not a shard of the same .* train-0.parquet: {told}"):
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
            UserError, match=r"train-4.jsonl is not a shard of the same table as train-0.jsonl: its column"
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
            UserError, match="--image_column image must hold one image in each row, got a list; write a row"
        ):
            records_of(tmp_path / "a")
        parquet(tmp_path / "b" / "0.parquet", image=[[[[255, 0, 0]] * 8] * 8], text=["pixels"])
        assert len(records_of(tmp_path / "b")) == 1
