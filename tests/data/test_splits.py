"""Splits, and what is held out of them."""

import json
import tarfile
from pathlib import Path

import pytest

from tests.pictures import make_picture
from tests.records import found, records_of
from utils.config.options import UserError


class TestSplits:
    def keys(self, folder: Path, split: str = "train", **options) -> set[str]:
        return {Path(key).name for key in found(records_of(folder, dataset_split=split, **options))}

    @pytest.mark.parametrize("form", ["pairs", "metadata", "metadata above", "parquet", "tar", "captions_json"])
    def test_only_the_asked_split_is_trained_on(self, tmp_path, form):
        import pyarrow as pa
        import pyarrow.parquet

        for split, count in (("train", 2), ("validation", 3)):
            names = [f"{split}{number}.png" for number in range(count)]
            folder = tmp_path / ("aside" if form in ("parquet", "tar") else split)
            files = [
                make_picture(folder / "images" / name if form == "captions_json" else folder / name) for name in names
            ]
            if form == "metadata":
                lines = [json.dumps({"file_name": name, "text": "x"}) for name in names]
                (folder / "metadata.jsonl").write_text("\n".join(lines))
            elif form == "metadata above":
                with (tmp_path / "metadata.jsonl").open("a") as file:
                    file.writelines(json.dumps({"file_name": f"{split}/{name}", "text": "x"}) + "\n" for name in names)
            elif form == "captions_json":
                (folder / "captions.json").write_text(json.dumps(dict.fromkeys(names, "x")))
            elif form == "parquet":
                columns = {"image": [file.read_bytes() for file in files], "text": names}
                pyarrow.parquet.write_table(pa.table(columns), tmp_path / f"{split}-00000-of-00001.parquet")
            elif form == "tar":
                with tarfile.open(tmp_path / f"{split}-0.tar", "w") as archive:
                    for file in files:
                        archive.add(file, file.name)
        if (tmp_path / "aside").exists():
            import shutil

            shutil.rmtree(tmp_path / "aside")
        assert len(self.keys(tmp_path)) == 2
        assert len(self.keys(tmp_path, "validation")) == 3
        assert not any(source.table.refused for source in records_of(tmp_path).sources)
        for wrong in ("vaildation", "test"):
            with pytest.raises(UserError, match=f"--dataset_split {wrong} does not exist in .*, which has"):
                self.keys(tmp_path, wrong)

    def test_a_splits_own_metadata_may_list_images_beside_it(self, tmp_path):
        for split in ("train", "test"):
            make_picture(tmp_path / "images" / f"{split}.png")
            (tmp_path / split).mkdir()
            line = json.dumps({"file_name": f"../images/{split}.png", "text": "x"})
            (tmp_path / split / "metadata.jsonl").write_text(line)
        assert self.keys(tmp_path) == {"train.png"}
        assert self.keys(tmp_path, "test") == {"test.png"}

    @pytest.mark.parametrize("caption_file", ["captions.json", "train/captions.json", "keys"])
    @pytest.mark.parametrize("images", ["images/{}", "{}/images", "images", "{}"])
    def test_captions_json_beside_images_in_any_layout(self, tmp_path, caption_file, images):
        captions = {"train": {"a.png": "one", "b.png": "two"}, "validation": {"v.png": "not this"}}
        for split, names in captions.items():
            for name in names:
                make_picture(tmp_path / images.format(split) / name)
        if caption_file == "keys":
            (tmp_path / "captions.json").write_text(json.dumps(captions))
        elif caption_file == "captions.json":
            (tmp_path / "captions.json").write_text(json.dumps(captions["train"] | captions["validation"]))
        else:
            for split, mapping in captions.items():
                (tmp_path / split).mkdir(exist_ok=True)
                (tmp_path / split / "captions.json").write_text(json.dumps(mapping))
        records = records_of(tmp_path)
        listed = {Path(key).name: value for key, value in found(records).items()}
        expected = {"a.png": ("one",), "b.png": ("two",)}
        if images == "images" and caption_file == "captions.json":  # nothing says which is of which split
            expected["v.png"] = ("not this",)
        assert listed == expected
        assert not records.refused

    def test_folders_of_classes_may_be_called_so(self, tmp_path):
        for name in ("test", "cat"):
            make_picture(tmp_path / name / "a.png")
        assert len(records_of(tmp_path)) == 2
