"""Sources of records, and odd names and lines in them."""

import csv
import io
import json
import shutil
import tarfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pictures import make_picture, painted
from tests.records import found, records_of
from utils.config.options import UserError
from utils.data.captions import CaptionOptions
from utils.data.images import read_header, read_rgb
from utils.data.source_options import SourceOptions
from utils.data.survey import survey


class TestSources:
    def test_metadata_lists_and_missing_captions(self, tmp_path):
        for index in range(3):
            make_picture(tmp_path / f"{index}.png")
        lines = [{"file_name": "0.png", "text": ["a", "b"]}, {"file_name": "1.png", "text": None}]
        (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        records = records_of(tmp_path)
        assert found(records) == {"0.png": ("a", "b"), "1.png": ("",)}
        assert records.sources[0].table.num_left_out == 1

    def test_a_first_row_may_leave_out_what_others_have(self, tmp_path):
        for index in range(2):
            make_picture(tmp_path / f"{index}.png")
        lines = [{"file_name": "0.png"}, {"file_name": "1.png", "text": "a"}]
        (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        assert found(records_of(tmp_path)) == {"0.png": ("",), "1.png": ("a",)}

    def test_shards_number_their_classes_alike(self, tmp_path):
        from datasets import ClassLabel, Dataset, Features
        from datasets import Image as ImageFeature

        from utils.data.parquet_files import NeededColumns, check_shards, read_footers

        for number, names in enumerate((["cat", "dog"], ["dog", "cat"], ["cat", "dog"])):
            features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
            rows = {"image": [Image.new("RGB", (8, 8))] * 2, "label": [0, 1]}
            folder = tmp_path / ("data" if number != 1 else "other")
            folder.mkdir(exist_ok=True)
            Dataset.from_dict(rows, features=features).to_parquet(folder / f"{number}.parquet")

        def shards() -> list[str]:
            names = sorted(file.name for file in (tmp_path / "data").iterdir())
            footers = read_footers(tmp_path / "data", names, "train_data_dir")
            return check_shards(
                tmp_path / "data", footers, NeededColumns(("image",), ("label",)), "train_data_dir"
            ).names

        assert shards() == ["0.parquet", "2.parquet"]
        shutil.copy(tmp_path / "other" / "1.parquet", tmp_path / "data")
        with pytest.raises(UserError, match=r"1\.parquet is not a shard.*numbers in its column label mean dog, cat"):
            shards()

    def test_metadata_csv_in_subfolders(self, tmp_path):
        for name in ("x", "y"):
            make_picture(tmp_path / name / "a.png")
            with open(tmp_path / name / "metadata.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([["file_name", "words"], ["a.png", f"a {name}, with a comma"]])
        records = records_of(tmp_path, caption_column="words")
        assert found(records) == {"x/a.png": ("a x, with a comma",), "y/a.png": ("a y, with a comma",)}
        with pytest.raises(UserError, match=r"--caption_column text is not a column.*words"):
            records_of(tmp_path)

    def test_a_file_name_that_leaves_the_folder_is_refused(self, tmp_path):
        make_picture(tmp_path / "secret.png")
        make_picture(tmp_path / "data" / "a.png")
        names = ["../secret.png", str(tmp_path / "secret.png"), "a.png", "gone.png", "sub/../../secret.png"]
        lines = [json.dumps({"file_name": name, "text": "x"}) for name in names]
        (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
        records = records_of(tmp_path / "data")
        assert list(found(records)) == ["a.png"]
        reasons = dict(records.refused)
        assert [("points outside the folder" in reasons[name]) for name in names if name != "a.png"] == [
            True,
            False,
            False,
            True,
        ]
        assert "must be relative" in reasons[names[1]]
        assert reasons["gone.png"] == "is listed but does not exist"

    def test_pairs(self, tmp_path):
        for name in ("a.jpg", "b.png", "c.webp", "d.png", "10_cat/e.png"):
            make_picture(tmp_path / name)
        (tmp_path / "a.txt").write_text("first\n\nsecond\n", encoding="utf-8")
        (tmp_path / "b.caption").write_text("ein Käfer", encoding="utf-16")
        (tmp_path / "c.json").write_text(json.dumps({"caption": ["x", "y"], "width": 3}))
        assert found(records_of(tmp_path)) == {
            "a.jpg": ("first", "second"),
            "b.png": ("ein Käfer",),
            "c.webp": ("x", "y"),
            "d.png": ("",),
            "10_cat/e.png": ("",),
        }
        by_folder = found(records_of(tmp_path, CaptionOptions(on_missing_caption="folder")))
        assert by_folder["10_cat/e.png"] == ("cat",)
        assert by_folder["d.png"] == (tmp_path.name,)
        (tmp_path / "d.json").write_text("{broken")
        assert dict(records_of(tmp_path).refused).keys() == {"d.png"}

    @pytest.mark.parametrize("layout", ["beside", "split folders", "images by split", "keys by split"])
    def test_captions_json(self, tmp_path, layout):
        root = tmp_path / "train" if layout == "split folders" else tmp_path
        within = "images/train" if layout == "images by split" else "images"
        for name in ("a.png", "b.png", "c.png"):
            make_picture(root / within / name)
        captions = {"a.png": "one", "b.png": ["two", "three"]}
        if layout == "images by split":
            make_picture(root / "images/validation/v.png")
            captions["v.png"] = "not this"
        if layout == "keys by split":
            make_picture(root / "images/v.png")
            captions = {"train": captions | {"c.png": ""}, "validation": {"v.png": "not this"}}
        (root / "captions.json").write_text(json.dumps(captions))
        listed = {Path(key).name: value for key, value in found(records_of(tmp_path)).items()}
        assert listed == {"a.png": ("one",), "b.png": ("two", "three"), "c.png": ("",)}

    def test_a_saved_dataset_and_a_subset(self, tmp_path):
        from datasets import Dataset

        pixels = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(9)]
        Dataset.from_dict({"picture": pixels, "words": [f"caption {index}" for index in range(9)]}).save_to_disk(
            tmp_path
        )
        options = {"dataset_name": str(tmp_path), "image_column": "picture", "caption_column": "words"}
        assert len(records_of(**options)) == 9
        some = records_of(**options, max_train_samples=4)
        assert len(some) == 4
        assert found(some) == found(records_of(**options, max_train_samples=4))
        assert read_rgb(some.image(0)).size == (8, 8)

    def test_parquet_with_image_bytes(self, tmp_path):
        import pyarrow as pa
        import pyarrow.parquet

        file = io.BytesIO()
        Image.new("RGB", (12, 8), "blue").save(file, "PNG")
        for number in range(2):
            columns = {"image": [file.getvalue()] * 2, "text": [f"{number}", None], "width": [12, 12], "height": [8, 8]}
            pyarrow.parquet.write_table(pa.table(columns), tmp_path / f"part-{number}.parquet")
        records = records_of(tmp_path)
        assert [records.captions(index) for index in range(4)] == [("0",), ("",), ("1",), ("",)]
        assert read_rgb(records.image(3)).size == (12, 8)
        assert survey(records, tmp_path / "memory").sizes.tolist() == [[12, 8]] * 4

    def test_tar_shards(self, tmp_path):
        for shard in range(2):
            with tarfile.open(tmp_path / f"{shard:03d}.tar", "w") as archive:
                for number in range(3):
                    picture = make_picture(tmp_path / "x.png", (30 + shard, 20 + number))
                    archive.add(picture, f"d/{number}.png")
                    if number < 2:
                        (tmp_path / "x.txt").write_text(f"caption {shard} {number}")
                        archive.add(tmp_path / "x.txt", f"d/{number}.txt")
        for name in ("x.png", "x.txt"):
            (tmp_path / name).unlink()
        records = records_of(tmp_path)
        assert found(records)["001.tar/d/1.png"] == ("caption 1 1",)
        assert found(records)["001.tar/d/2.png"] == ("",)
        assert [read_rgb(records.image(index)).size for index in (0, 5)] == [(30, 20), (31, 22)]
        whole = (tmp_path / "001.tar").read_bytes()
        (tmp_path / "001.tar").write_bytes(whole[:2000])
        cut = records_of(tmp_path)
        assert 3 <= len(cut) < 6
        assert "broken" in cut.refused[0][1] or survey(cut, tmp_path / "m").reasons

    def test_a_caption_column_of_numbers_is_refused(self, tmp_path):
        from datasets import Dataset

        Dataset.from_dict({"image": [Image.new("RGB", (8, 8))], "text": [3]}).save_to_disk(tmp_path)
        with pytest.raises(UserError, match="--caption_column text must hold strings"):
            records_of(dataset_name=str(tmp_path))

    def test_several_sources(self, tmp_path):
        for name, count in (("dogs", 2), ("cats", 6)):
            for number in range(count):
                make_picture(tmp_path / name / f"{number}.png")
        file = tmp_path / "data.yaml"
        file.write_text(
            "sources:\n"
            "- {train_data_dir: dogs, repeats: 3, trigger_word: sks, on_missing_caption: folder}\n"
            "- {train_data_dir: cats, name: other, caption_dropout: 1}\n"
        )
        records = records_of(dataset_file=str(file))
        assert [records.key(index) for index in (0, 2)] == ["dogs/0.png", "other/0.png"]
        assert records.captions(0) == ("dogs",)
        assert records.source(0).captions.trigger_word == "sks"
        assert records.source(2).captions.caption_dropout == 1
        assert records.repeats() == [3, 1]
        file.write_text("- {train_data_dir: dogs, weight: 1}\n- {train_data_dir: cats, weight: 3}\n")
        assert records_of(dataset_file=str(file)).repeats() == [1, 1]
        file.write_text("- {train_data_dir: dogs, weight: 0.5}\n- {train_data_dir: cats, weight: 0.5}\n")
        assert records_of(dataset_file=str(file)).repeats() == [2, Fraction(2, 3)]

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ("- {train_data_dir: dogs, repeat: 3}", "source 1: repeat is unknown; did you mean repeats"),
            ("- {train_data_dir: dogs, loss_weight: -1}", "source 1: loss_weight must be a number from 1e-6 to 1e6"),
            ("- {train_data_dir: dogs, repeats: 0}", "source 1: repeats must be a number from 1e-6 to 1e6"),
            ("- {train_data_dir: dogs, repeats: 1, weight: 1}", "give one"),
            ("- {train_data_dir: dogs, shuffle_tags: 3}", "shuffle_tags must be bool, got 3"),
            ("- {train_data_dir: dogs, caption_dropout: 3}", "source 1: --caption_dropout must be between"),
            ("- {train_data_dir: nowhere}", "source 1: --train_data_dir must be a folder"),
            ("- {repeats: 1}", "has neither dataset_name nor train_data_dir"),
            ("- {train_data_dir: dogs, weight: 1}\n- {train_data_dir: dogs}", "give all sources a weight, or none"),
            ("nothing", "must hold a list of sources"),
            ("{sources: [], more: 1}", "must hold a list of sources"),
            ("- {", "can't be read"),
        ],
    )
    def test_bad_dataset_files(self, tmp_path, text, named):
        make_picture(tmp_path / "dogs" / "a.png")
        (tmp_path / "data.yaml").write_text(text)
        with pytest.raises(UserError, match=named):
            records_of(dataset_file=str(tmp_path / "data.yaml"))


class TestOddNamesAndLines:
    def test_names_that_are_no_unicode(self, train, tmp_path):
        import os

        folder = tmp_path / "data"
        folder.mkdir()
        for name in (b"caf\xe9.png", "蝶.png".encode()):
            make_picture(folder / "x.png")
            os.rename(folder / "x.png", os.path.join(os.fsencode(folder), name))
        (folder / "broken.png").write_bytes(b"")
        flags = ["--max_train_steps", 2, "--train_batch_size", 1, "--max_bad_fraction", 0.5, "--cache_latents"]
        out = train("sd", *flags, "--encoding_cache_dir", tmp_path / "cache", data=folder)
        assert json.loads((out / "data_report.json").read_text())["trained"] == 2
        train("sd", "--dry_run", data=folder, out="dry")

    def test_halves_of_characters_in_captions(self, tmp_path):
        make_picture(tmp_path / "a.png")
        (tmp_path / "captions.json").write_text('{"a.png": "bad \\ud83d emoji"}')
        assert found(records_of(tmp_path)) == {"a.png": ("bad ? emoji",)}

    def test_one_bad_line_costs_one_image(self, tmp_path):
        for name in "abcd":
            make_picture(tmp_path / f"{name}.png")
        lines = [
            json.dumps({"file_name": "a.png", "text": "x"}),
            "{half",
            json.dumps({"file_name": "b.png"}),
            json.dumps({"text": "no name"}),
            '{"file_name": "c.png", "text": NaN}',
            json.dumps({"file_name": "n" * 5000 + ".png", "text": "x"}),
        ]
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
        records = records_of(tmp_path)
        assert found(records) == {"a.png": ("x",), "b.png": ("",), "c.png": ("",)}
        assert {name for name, _ in records.refused} >= {"metadata.jsonl, line 2", "metadata.jsonl, line 4"}
        assert records.sources[0].table.num_left_out == 1

    def test_a_pipe_named_as_an_image_is_passed_over(self, tmp_path):
        import os

        make_picture(tmp_path / "a.png")
        os.mkfifo(tmp_path / "b.png")
        assert list(found(records_of(tmp_path))) == ["a.png"]

    def test_captions_of_old_windows_files_in_capitals_and_tags(self, tmp_path):
        for name in ("a.png", "b.png"):
            make_picture(tmp_path / name)
        (tmp_path / "a.TXT").write_bytes("ein Käfer".encode("cp1252"))
        (tmp_path / "b.json").write_text(json.dumps({"tags": ["1girl", "solo"]}))
        assert found(records_of(tmp_path)) == {"a.png": ("ein Käfer",), "b.png": ("1girl, solo",)}

    def test_a_turned_tiff_and_one_of_floats(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        painted(40, 80).save(tmp_path / "turned.tiff", exif=exif)
        header = read_header(str(tmp_path / "turned.tiff"))
        assert (header.width, header.height) == read_rgb(str(tmp_path / "turned.tiff")).size == (80, 40)
        Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tiff")
        assert np.asarray(read_rgb(str(tmp_path / "float.tiff")))[0, 0, 0] == 128

    def test_bad_shards_beside_good_ones(self, tmp_path):
        with tarfile.open(tmp_path / "good.tar", "w") as archive:
            archive.add(make_picture(tmp_path / "aside" / "a.png"), "a.png")
        (tmp_path / "aside" / "a.png").unlink()
        (tmp_path / "junk.tar").write_bytes(b"junk" * 500)
        (tmp_path / "empty.tar").write_bytes(b"")
        records = records_of(tmp_path)
        assert len(records) == 1
        assert {name for name, _ in records.refused} == {"junk.tar", "empty.tar"}

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"data_format": "parquet", "dataset_name": "x"}, "--data_format parquet is the format of"),
            ({"data_format": "pairs"}, "--data_format pairs is the format of --train_data_dir"),
        ],
    )
    def test_formats_that_do_not_go(self, options, named):
        with pytest.raises(UserError, match=named):
            SourceOptions(**options)
