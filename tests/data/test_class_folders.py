"""Folders as classes: splits, twins and nested ones."""

import shutil

import pytest

from tests.conftest import message
from tests.pictures import touch_images
from tests.records import class_records
from tests.unconditional_runs import SHORT
from utils.config.options import UserError
from utils.data.captions import CaptionOptions
from utils.data.source_options import DataOptions, LabelledSource, LabelOptions, SourceOptions
from utils.data.sources import read_records

LAYOUTS = {
    "a class called train": ("train cat dog", "cat dog train", "read as classes, like the folders beside them: train;"),
    "classes called test and val": ("test val cat", "cat test val", "beside them: test, val;"),
    "deeper": ("all/train all/cat", "cat train", "all/train"),
    "within splits": ("train/train train/cat val/train val/cat", "cat train", "train/train, val/train"),
    "splits": ("train/cat train/dog test/cat test/dog", "cat dog", None),
    "a split beside folders": (
        "train/cat train/dog more/cat",
        "cat dog",
        "train is read as the split train, and 1 im",
    ),
    "another split alone": (
        "test/cat cat dog",
        "cat dog",
        "also training on test, because there is no folder named train;",
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_class_folders_called_as_splits_are(tmp_path, classes, caplog, case):
    folders, names, said = LAYOUTS[case]
    image = next(classes.rglob("*.png"))
    for folder in folders.split():
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(image, tmp_path / folder / "a.png")
        (tmp_path / folder / "a.txt").write_text("beside it")
    source = LabelledSource(train_data_dir=str(tmp_path))
    records = read_records(DataOptions(), source, LabelOptions(class_conditional=True).for_source(source), 0)
    found = {records.captions(index)[0] for index in range(len(records))}
    assert found == set(names.split())
    assert said in caplog.text if said else not caplog.text


MERGED = {
    "of two parents": ("cat/old/0.png cat/young/0.png dog/old/0.png dog/young/0.png", "old young", "cat dog"),
    "at two depths": ("cat/0.png more/cat/0.png more/dog/0.png", "cat dog", "cat more"),
    "of one name": ("n1/images/0.png n2/images/0.png", "images", "n1 n2"),
    "below a split": ("train/a/cat/0.png train/b/cat/0.png test/a/cat/0.png", "cat", "a b"),
    "below a shared folder": ("all/cat/x/0.png all/dog/x/0.png", "x", "cat dog"),
}


@pytest.mark.parametrize("case", MERGED)
def test_folders_of_one_name_in_several_places_are_refused_until_a_rule_is_given(tmp_path, case):
    names, inner, outer = MERGED[case]
    touch_images(tmp_path, *names.split())
    with pytest.raises(UserError, match=rf"--train_data_dir {tmp_path}: .*occur in several places, such as .*/.*inner"):
        class_records(tmp_path)
    assert set(class_records(tmp_path, "inner").values()) == set(inner.split())
    assert set(class_records(tmp_path, "outer").values()) == set(outer.split())


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            "cat/0.png dog/0.png banner.png",
            "1 images are in no class folder (in the top folder), beside the class folders cat",
        ),
        ("train/cat/0.png train/dog/0.png train/1.png", "(in train/), beside the class folders cat, dog; move them to"),
    ],
)
def test_images_beside_the_folders_of_classes_are_refused(tmp_path, names, said):
    touch_images(tmp_path, *names.split())
    with pytest.raises(UserError) as raised:
        class_records(tmp_path)
    assert said in str(raised.value)


def test_folders_that_mean_what_they_say_are_no_fault(tmp_path, caplog):
    touch_images(tmp_path / "a", "all/cat/0.png", "all/dog/0.png")
    assert set(class_records(tmp_path / "a").values()) == {"cat", "dog"}
    touch_images(tmp_path / "b", "cat/train/0.png", "dog/train/0.png", "cat/test/0.png")
    assert class_records(tmp_path / "b") == {"cat/train/0.png": "cat", "dog/train/0.png": "dog"}
    touch_images(tmp_path / "cats", "0.png")
    touch_images(tmp_path / "dogs", "train/0.png")
    (tmp_path / "sources.yaml").write_text("- {train_data_dir: cats}\n- {train_data_dir: dogs}\n")
    source = LabelledSource()
    captions = LabelOptions(class_conditional=True).for_source(source)
    records = read_records(DataOptions(dataset_file=str(tmp_path / "sources.yaml")), source, captions, 0)
    assert [records.captions(index)[0] for index in range(2)] == ["cats", "dogs"]
    assert not caplog.records


def test_nested_folders_without_a_contradiction_are_named(tmp_path, caplog):
    touch_images(tmp_path, "cat/persian/0.png", "cat/siamese/0.png", "dog/0.png")
    assert set(class_records(tmp_path).values()) == {"persian", "siamese", "dog"}
    assert "such as persian for cat/persian; --class_folders outer uses the outer one, such as cat" in caplog.text
    caplog.clear()
    assert set(class_records(tmp_path, "outer").values()) == {"cat", "dog"}
    assert not caplog.records


def test_folders_called_tar_are_classes(tmp_path):
    touch_images(tmp_path, "cat.tar/0.png", "dog.tar/1.png", "mouse/2.png")
    assert set(class_records(tmp_path).values()) == {"cat.tar", "dog.tar", "mouse"}
    source = SourceOptions(train_data_dir=str(tmp_path))
    records = read_records(DataOptions(), source, CaptionOptions(on_missing_caption="folder"), 0)
    assert {records.captions(row)[0] for row in range(3)} == {"cat.tar", "dog.tar", "mouse"}


def test_class_folders_go_with_classes_by_folders(tmp_path):
    touch_images(tmp_path, "cat/0.png")
    source = LabelledSource(train_data_dir=str(tmp_path), caption_column="label")
    for is_conditional in (False, True):
        with pytest.raises(UserError, match="--class_folders outer needs classes from folder names"):
            LabelOptions(class_conditional=is_conditional, class_folders="outer").for_source(source)


def test_one_class_that_is_a_split_is_named(train, classes, tmp_path, capsys):
    for split in ("train", "test"):
        shutil.copytree(classes / "cat", tmp_path / "data" / split)
    train("labels", *SHORT, data=tmp_path / "data", expect=2)
    assert "got one, data, as the folder train is taken for a split;" in message(capsys)
