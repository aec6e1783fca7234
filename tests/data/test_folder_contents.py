"""Which files of a folder are the data."""

import json
import re
from collections import Counter
from functools import partial

import pytest
from PIL import Image

from tests.records import keys, records_of
from tests.source_files import parquet, picture, png, tar, touch
from utils.config.options import UserError
from utils.data.captions import CaptionOptions
from utils.data.options import BucketOptions
from utils.data.source_options import DataOptions, SourceOptions
from utils.data.sources import read_records
from utils.data.stream import open_stream


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
        assert "skipped as decoration: 1 image (banner.png)" in caplog.text
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
        with pytest.raises(UserError, match="it is unclear which are the data; add --data_format") as error:
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
        assert "read as part of the split train, although their names contain no split: extra.tar" in caplog.text
        tar(tmp_path / "test-0.tar", "c.png")
        with pytest.raises(
            UserError, match=r"extra.tar contain no split, those of other files contain test, train; rename"
        ):
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
        assert table.refused == [("b.png", "is listed but does not exist; 'b.PNG' does")]

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
        assert "skipped because they contain no images: 1 parquet file (statistics.parquet)" in caplog.text

    def test_several_configurations_of_a_dataset(self, tmp_path):
        for name in ("small", "large"):
            parquet(tmp_path / name / "train-0.parquet")
        header = "configs:\n- config_name: small\n  data_files: small/*\n- config_name: large\n  data_files: large/*"
        touch(tmp_path / "README.md", f"---\n{header}\n---\n# A dataset")
        with pytest.raises(UserError, match=r"the configurations small, large; choose one: .*config_name small"):
            records_of(tmp_path)
        assert len(records_of(tmp_path / "small")) == 2
        assert len(records_of(dataset_name=str(tmp_path), dataset_config_name="large")) == 2

    def test_a_saved_dataset_within_a_folder(self, tmp_path):
        from datasets import Dataset

        Dataset.from_dict({"image": [Image.new("RGB", (8, 8))], "text": ["x"]}).save_to_disk(tmp_path / "saved")
        with pytest.raises(UserError, match=f"saved dataset in saved; pass it as --dataset_name {tmp_path}/saved"):
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
        assert "is read as parquet; 1 other files that may be data are not read, such as banner.png" in caplog.text


NO_TARS = {
    "dead link": (lambda file: file.symlink_to("/nowhere/x.tar"), "can't be read: it is a link to a missing file"),
    "loop": (lambda file: file.symlink_to(file), "is a link that points to itself"),
    "png": (lambda file: file.write_bytes(png()), "is not a tar file but an image; rename it to .png"),
    "json": (
        lambda file: file.write_text('{"error": "not found"}'),
        "is not a tar file but JSON; fetch the file again",
    ),
    "text": (lambda file: file.write_text("404 not found\n" * 99), "is not a tar file but text; fetch the file again"),
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
        if "not a tar file" in reason:
            with pytest.raises(UserError, match=rf"1\.tar {re.escape(reason)}; remove it from the folder"):
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
