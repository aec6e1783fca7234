"""Folders with names and files of any kind."""

import logging

from tests.records import records_of
from tests.text_files import make_pictures, planned
from utils.data.captions import CaptionOptions
from utils.data.source_options import DataOptions, SourceOptions
from utils.data.sources import read_records
from utils.training.preparation import say_what_was_left_out


class TestFolders:
    def test_the_numbers_of_folders_are_named_and_counted_where_asked(self, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        make_pictures(tmp_path, "10_cat/0.png", "10_cat/1.png", "2_cats/0.png", "dog/0.png", "0_none/0.png")
        images = planned(records_of(tmp_path), tmp_path / "m")
        say_what_was_left_out(images, 1)
        assert "--folder_repeats uses it as often as the number says, here 10 times" in caplog.text
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
            "2 images have no caption and train on their folder's name",
            "1 images have no caption and train on an empty one (see --on_missing_caption)",
        ]
