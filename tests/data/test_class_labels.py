"""Labels of columns, folders and shards, and the numbers of their classes."""

import json
import shutil

import pytest
from PIL import Image

from tests import tiny
from tests.conftest import message
from tests.pictures import touch_images
from tests.records import class_records
from tests.unconditional_runs import SHORT, load
from utils.config.options import UserError
from utils.data.class_folders import describe_counts, recorded_folders, warn_of_twins
from utils.data.class_labels import class_numbers, count_classes, listed_numbers
from utils.data.source_options import DataOptions, LabelledSource, LabelOptions
from utils.data.sources import read_records


def test_numbers_of_classes():
    assert class_numbers(["b", "a"], {}, 5) == {"b": 0, "a": 1}
    assert class_numbers(["new", "dog", "new 2"], {"cat": 0, "dog": 2}, 5) == {"new": 1, "dog": 2, "new 2": 3}
    known = listed_numbers({0: "tench, Tinca tinca", 7: "great shark"})
    assert class_numbers(["Tinca tinca", "tench, Tinca tinca", "x"], known, 1000)["x"] == 1
    assert class_numbers(["cafe\u0301"], {"caf\u00e9": 4}, 5) == {"cafe\u0301": 4}
    assert class_numbers(["a, b"], {"a; b": 3}, 5) == {"a, b": 3}
    with pytest.raises(UserError, match="the data has 3 classes, but the model has room for only 2"):
        class_numbers(["a", "b", "c"], {}, 2)


@pytest.mark.parametrize("kind", ["names", "numbers", "class labels", "truths"])
def test_labels_of_a_column(train, images, tmp_path, kind):
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    paths = [str(path) for path in sorted(images.glob("*.png"))]
    labels = {"names": ["b", "a"], "numbers": [10, 9], "class labels": [2, 0], "truths": [True, False]}[kind]
    named = {"class labels": ClassLabel(names=["b", "c", "a"]), "truths": Value("bool")}
    feature = ({"names": Value("string"), "numbers": Value("int64")} | named)[kind]
    features = Features({"image": ImageFeature(), "kind": feature})
    rows = {"image": paths, "kind": [labels[number % 2] for number in range(len(paths))]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    from tests.conftest import reset_accelerate
    from train_unconditional import main

    reset_accelerate()
    words = ["--dataset_name", tmp_path / "data", "--label_column", "kind", "--output_dir", tmp_path / "out"]
    words += [*tiny.UNCONDITIONAL["labels"], *SHORT, "--resolution", 32, "--report_to", "none"]
    assert main([str(word) for word in words]) == 0
    expected = {"names": ["a", "b"], "numbers": ["9", "10"], "class labels": ["b", "a"], "truths": ["False", "True"]}
    labels_by_number = sorted(load(tmp_path / "out").labels.items(), key=lambda pair: pair[1])
    assert [name for name, _ in labels_by_number] == expected[kind]


def test_the_whole_name_of_a_folder_is_the_class(train, classes, tmp_path):
    names = ["5_1", "6_1", "images", "a b", "日本"]
    for name in names:
        shutil.copytree(classes / "cat", tmp_path / "data" / "deep" / name)
    (tmp_path / "data" / "empty").mkdir()
    assert load(train("labels", *SHORT, data=tmp_path / "data")).labels.keys() == set(names)


def test_labels_that_are_not_there(classes, capsys, tmp_path):
    from datasets import Dataset

    from tests.conftest import reset_accelerate
    from train_unconditional import main

    images = [{"bytes": path.read_bytes(), "path": None} for path in sorted(classes.rglob("*.png"))]
    rows = {"image": images, "kind": ["a", "b", None] * 2, "share": [0.5] * 6}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    for flags, said in (([], "no folders"), (["kind"], "2 images have no label"), (["share"], "--label_column share")):
        reset_accelerate()
        words = ["--dataset_name", tmp_path / "data", "--class_conditional", "--output_dir", tmp_path / "out"]
        assert main([str(word) for word in [*words, *(["--label_column", *flags] if flags else [])]]) == 2
        line = message(capsys)
        assert said in line
        assert "--label_column" in line


@pytest.mark.parametrize("kind", ["metadata", "dataset"])
def test_a_wrong_column_is_named_by_this_scripts_flag(train, images, tmp_path, capsys, kind):
    from datasets import Dataset

    flags = ["--class_conditional", "--label_column", "labl"]
    if kind == "dataset":
        rows = {"image": [str(path) for path in sorted(images.rglob("*.png"))], "label": [0, 1] * 3}
        Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
        train("pixels", *SHORT, *flags, "--dataset_name", tmp_path / "data", expect=2)
    else:
        train("pixels", *SHORT, *flags, expect=2)
    line = message(capsys)
    assert "--label_column labl is not a column" in line
    assert "--caption_column" not in line
    assert ("did you mean --label_column label?" in line) == (kind == "dataset")


def test_classes_within_shards(tmp_path):
    import io
    import tarfile

    def shard(name: str, *members: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with tarfile.open(tmp_path / name, "w") as archive:
            for member in members:
                content = io.BytesIO()
                Image.new("RGB", (8, 8)).save(content, "PNG")
                info = tarfile.TarInfo(member)
                info.size = content.tell()
                archive.addfile(info, io.BytesIO(content.getvalue()))

    for number in range(2):
        shard(f"a/{number}.tar", f"./cat/{number}.png", f"train/{number}.png")
        shard(f"b/{('cat', 'dog')[number]}-{number}.tar", f"{number}.png")
    assert set(class_records(tmp_path / "a").values()) == {"cat", "train"}
    assert set(class_records(tmp_path / "b").values()) == {"b"}


INVISIBLE = ["\u200b", "\ufeff", "\u200f", "\xad", "\xa0", " ", "\u2060"]


@pytest.mark.parametrize("mark", INVISIBLE)
@pytest.mark.parametrize("is_column", [True, False])
def test_what_is_not_shown_sets_no_classes_apart(tmp_path, caplog, mark, is_column):
    names = ("cat", f"cat{mark}", f"{mark}dog", "a b", "a\xa0b")
    if is_column:
        touch_images(tmp_path, *(f"{number}.png" for number in range(5)))
        rows = [{"file_name": f"{number}.png", "kind": name} for number, name in enumerate(names)]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        touch_images(tmp_path, *(f"{name}/{number}.png" for number, name in enumerate(names)))
    source = LabelledSource(train_data_dir=str(tmp_path), caption_column="kind" if is_column else None)
    records = read_records(DataOptions(), source, LabelOptions(class_conditional=True).for_source(source), 0)
    assert count_classes(records) == {"cat": 2, "dog": 1, "a b": 2}
    told = [line for line in caplog.messages if "invisible characters" in line]
    assert len(told) == 1
    assert "'a b' and 'a\\xa0b' as 'a b'" in told[0]


def test_joiners_that_letters_and_emoji_need_stay(tmp_path, caplog):
    man, woman, persian = "\U0001f468", "\U0001f469", "\u0645\u06cc"
    names = (f"{man}\u200d{woman}", f"{man}{woman}", f"{persian}\u200c\u062e", f"{persian}\u062e", "\u200b")
    touch_images(tmp_path, *(f"{name}/{number}.png" for number, name in enumerate(names)))
    assert set(class_records(tmp_path).values()) == set(names)
    assert not caplog.records


@pytest.mark.parametrize("ending", ["cls", ".CLS", "label.txt"])
def test_labels_that_are_members_of_shards(tmp_path, ending):
    import io
    import tarfile

    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    labels = [b"3", b"03\n", b" cat", b"cat\r\n", b"\xef\xbb\xbfcat"]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, label in enumerate(labels):
            members = (("png", image.getvalue()), (ending.strip(".").lower(), label), ("txt", b"a caption"))
            for suffix, content in members:
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    source = LabelledSource(train_data_dir=str(tmp_path), caption_column=ending)
    records = read_records(DataOptions(), source, LabelOptions(class_conditional=True).for_source(source), 0)
    is_number = ending != "label.txt"
    assert count_classes(records) == ({"3": 2, "cat": 3} if is_number else {"3": 1, "03": 1, "cat": 3})


def test_one_text_is_one_class_and_twins_are_named(tmp_path, caplog):
    touch_images(tmp_path, "caf\u00e9/0.png", "cafe\u0301/1.png", "cat/0.png", "cat /0.png")
    assert set(class_records(tmp_path).values()) == {"caf\u00e9", "cat"}
    assert r"'caf\xe9' and 'cafe\u0301' as 'café'; 'cat ' and 'cat' as 'cat'" in caplog.text
    caplog.clear()
    warn_of_twins(["Cat", "cat", "golden retriever", "golden_retriever", "1", "01", "dog"])
    assert "3 groups of classes differ only in" in caplog.text
    caplog.clear()
    warn_of_twins(["cat", "cats", "10", "100"])
    assert not caplog.records


@pytest.mark.parametrize(
    "rows",
    [
        [("0.png", "cat"), ("0.png", "dog"), ("1.png", "dog")],
        [("0.png", ["cat", "dog"]), ("1.png", "dog")],
        [("0.png", 1), ("./0.png", "01"), ("1.png", 2)],
    ],
)
def test_an_image_of_two_classes_is_refused(train, tmp_path, capsys, rows):
    touch_images(tmp_path / "data", "0.png", "1.png")
    lines = [json.dumps({"file_name": name, "label": label}) for name, label in rows]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    train("labels", *SHORT, "--label_column", "label", data=tmp_path / "data", expect=2)
    assert "--label_column: 1 images have several labels; give each image one: 0.png: " in message(capsys)


def test_the_plan_names_classes_with_their_counts(train, classes, capsys):
    train("labels", *SHORT, "--dry_run", data=classes)
    assert "2 classes (cat: 3, dog: 3), " in capsys.readouterr().out
    assert describe_counts(list("abcdefg"), dict.fromkeys("abcdefg", 1000)).endswith("e: 1,000, and 2 more)")


@pytest.mark.parametrize(
    ("folders", "recorded", "names"),
    [
        (("cafe\u0301", "caf\u00e9"), ["cafe\u0301", "caf\u00e9"], ["cafe\u0301", "caf\u00e9"]),
        (("cafe\u0301", "caf\u00e9"), ["caf\u00e9"], None),
        (("cafe\u0301", "dog"), ["cafe\u0301", "dog"], None),
        (("", "cat", "dog"), ["cat", "data", "dog"], ["data", "cat", "dog"]),
        (("", "cat", "dog"), ["cat", "other", "dog"], None),
        (("a/x", "b/x", "c/y"), ["x", "y"], ["x", "x", "y"]),
        (("a/x", "b/x", "c/y"), ["a", "b", "c"], None),
        (("a/x", "b/x", "c/y"), [], None),
        (("cat/p", "cat/s", "dog"), ["p", "s", "dog"], None),
    ],
)
def test_the_classes_of_a_checkpoint_decide_where_its_release_named_them_so(folders, recorded, names):
    """None leaves it to today's rule."""
    found = recorded_folders(dict.fromkeys(folders, 2), recorded, "", "data")
    assert found == (None if names is None else dict(zip(folders, names, strict=True)))


def test_labels_of_a_column_that_were_twins_stay_so():
    options, twins = LabelOptions(class_conditional=True), ("cafe\u0301", "caf\u00e9")
    source = LabelledSource(train_data_dir=".", caption_column="kind")
    assert options.for_source(source, twins).of(twins) == twins
    assert options.for_source(source, twins[:1]).of(twins) == twins[1:]


def test_names_that_tables_write_for_nothing_are_classes(tmp_path, caplog):
    labels = ("NA", "None", "DE", "N/A", "NaN", "")
    touch_images(tmp_path, *(f"{number}.png" for number in range(len(labels))))
    rows = "".join(f"{number}.png,{label},NA\n" for number, label in enumerate(labels))
    (tmp_path / "metadata.csv").write_text(f"file_name,kind,more\n{rows}")
    source = LabelledSource(train_data_dir=str(tmp_path), caption_column="kind")
    records = read_records(DataOptions(), source, LabelOptions(class_conditional=True).for_source(source), 0)
    assert [records.captions(row)[0] for row in range(len(records))] == ["NA", "None", "DE", "N/A", "", ""]
    assert count_classes(records) == {"NA": 1, "None": 1, "DE": 1, "N/A": 1}
    assert "3 cells hold NA, None, N/A, the first on line 2, and are read as names" in caplog.text
    assert "1 cells hold NaN, the first on line 6, and are read as empty" in caplog.text
