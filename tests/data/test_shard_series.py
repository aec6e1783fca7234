"""Series of shards, whole and with gaps."""

import re

import pytest

from tests.records import records_of
from tests.source_files import parquet, picture, tar, touch
from utils.data.captions import CaptionOptions
from utils.data.options import BucketOptions
from utils.data.source_options import DataOptions, SourceOptions
from utils.data.stream import open_stream


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
                "1 of the 4 shards .* are missing: data_2.parquet",
            ),
            (["s-000000.parquet", "s-000002.parquet"], "missing: s-000001.parquet;"),
            (["a/7.tar", "a/9.tar", "a/10.tar"], "from a/7.tar to a/10.tar are missing: a/8.tar;"),
            (
                ["0.tar", "0 (1).tar"],
                r"1 files are named like copies of others, such as 0 \(1\).tar of 0.tar; remove them",
            ),
            (["a.parquet", "a(2).parquet"], r"such as a\(2\).parquet of a.parquet"),
            (["a.parquet", "a copy.parquet", "a - Copy (2).parquet"], "2 files are named like copies of others"),
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
