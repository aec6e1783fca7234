"""References of evaluate_pipeline.py: images, datasets and statistics."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.conftest import message
from utils.data import colours
from utils.evaluation.options import ReferenceOptions
from utils.evaluation.references import read_images


def test_statistics_are_kept_and_read_again(evaluate, flags, real_images, tmp_path):
    file, images = tmp_path / "reference.npz", tiny.make_images(tmp_path / "some", 12)
    shared = ["--images", images, *flags, "--metrics", "kid", "fid", "prdc"]
    first, _ = evaluate(*shared, "--reference", real_images, "--save_reference", file, out="first")
    second, _ = evaluate(*shared, "--reference", file, out="second")
    for name in ("kid", "fid", "precision", "coverage"):
        values = [each["entries"]["images"]["scores"][name]["value"] for each in (first, second)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    with np.load(file, allow_pickle=False) as kept:  # as pytorch-fid and clean-fid read them
        assert kept["mu"].shape == (8,)
        assert kept["sigma"].shape == (8, 8)
        assert kept["mu"].dtype == np.float64
        assert int(kept["n"]) == 24


def test_the_fingerprint_of_a_reference_says_whether_colours_are_converted(real_images, tmp_path):
    shutil.copytree(real_images, tmp_path / "converted")
    for name in ("000.png", "001.png"):
        with Image.open(real_images / name) as image:
            image.save(tmp_path / "converted" / name, icc_profile=colours.ADOBE_RGB)

    def of_bytes_alone(folder: Path) -> str:
        contents = [path.read_bytes() for path in sorted(folder.glob("*.png"))]
        return hashlib.sha256(b"".join([b"None", *contents])).hexdigest()

    found = [
        read_images("reference", str(path), ReferenceOptions(), 0) for path in (real_images, tmp_path / "converted")
    ]
    assert found[0].fingerprint == of_bytes_alone(real_images)
    assert found[1].fingerprint != of_bytes_alone(tmp_path / "converted")


def test_statistics_from_before_colours_were_converted_are_warned_of(
    evaluate, images, flags, real_images, tmp_path, caplog
):
    file, old = tmp_path / "reference.npz", tmp_path / "old.npz"
    shared = ["--images", images, *flags, "--metrics", "fid"]
    evaluate(*shared, "--reference", real_images, "--save_reference", file, out="first")
    evaluate(*shared, "--reference", file, out="second")
    assert "did not convert colours" not in caplog.text
    with np.load(file) as arrays:
        facts = json.loads(str(arrays["fingerprint"])) | {"version": 1}
        np.savez(old, **dict(arrays) | {"fingerprint": np.array(json.dumps(facts))})
    evaluate(*shared, "--reference", old, out="third")
    assert "did not convert colours" in caplog.text


def test_a_reference_may_be_a_dataset(evaluate, images, flags, real_images, tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    files = sorted(str(path) for path in real_images.glob("*.png"))
    rows = {"picture": files, "caption": ["x"] * len(files)}
    features = Features({"picture": ImageColumn(), "caption": Value("string")})
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "dataset")
    shared = ["--images", images, *flags, "--metrics", "kid", "--reference_resolution", 32]
    columns = ["--reference_image_column", "picture", "--reference_caption_column", "caption"]
    first, _ = evaluate(*shared, "--reference", tmp_path / "dataset", *columns, out="first")
    second, _ = evaluate(*shared, "--reference", real_images, out="second")
    third, _ = evaluate(*shared[:-2], "--reference", real_images, out="third")
    values = [each["entries"]["images"]["scores"]["kid"]["value"] for each in (first, second, third)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert values[2] != pytest.approx(values[1], rel=1e-4)


@pytest.fixture
def statistics() -> dict[str, np.ndarray]:
    return {"mu": np.zeros(8), "sigma": np.eye(8)}


def test_bare_statistics_give_fid_alone(evaluate, images, flags, statistics, tmp_path):
    np.savez(tmp_path / "bare.npz", **statistics)
    found, _ = evaluate(
        "--images", images, *flags, "--reference", tmp_path / "bare.npz", "--metrics", "kid", "fid", "cmmd"
    )
    scores = found["entries"]["images"]["scores"]
    assert scores["fid"]["value"] > 0
    assert "only mu and sigma" in scores["kid"]["not_computed"]
    assert "another network" in scores["cmmd"]["not_computed"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mu": None}, "has no mu"),
        ({"mu": np.zeros(7)}, "must be [d] and [d, d]"),
        ({"mu": np.full(8, np.nan)}, "not finite"),
        ({"sigma": np.triu(np.ones((8, 8)))}, "not symmetric"),
        ({"sigma": -np.eye(8)}, "negative variance"),
        ({"sigma": np.eye(8) + 3 * np.eye(8)[::-1]}, "negative eigenvalue"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "mu is empty"),
        ({"n": np.array("many")}, "n must be the number of images"),
        ({"n": np.array(np.nan)}, "n must be the number of images"),
        ({"fingerprint": np.array("[]")}, "must be a JSON object"),
        ({"mu": np.zeros(16), "sigma": np.eye(16)}, "has 16 features, but the network small has 8"),
        ({"fingerprint": np.array('{"network": "small", "settings": "other", "weights": "x"}')}, "with other settings"),
        ({"mu": np.array([object()] * 8, dtype=object)}, "can't be read as statistics"),
    ],
)
def test_bad_statistics_are_refused_before_anything_is_drawn(
    evaluate, pipelines, flags, statistics, tmp_path, capsys, change, named
):
    changed = {name: value for name, value in (statistics | change).items() if value is not None}
    np.savez(tmp_path / "bad.npz", **changed)
    _, folder = evaluate(
        "--pipeline", pipelines["sd"], "--prompts", "a", *flags, "--reference", tmp_path / "bad.npz", expect=2
    )
    assert named in message(capsys)
    assert not list(folder.rglob("*.png"))


def test_a_broken_image_in_the_reference_is_named_before_anything_is_drawn(
    evaluate, pipelines, flags, real_images, tmp_path, capsys
):
    broken = tmp_path / "broken"
    tiny.make_images(broken)
    (broken / "003.png").write_bytes((broken / "003.png").read_bytes()[:80])
    _, folder = evaluate("--pipeline", pipelines["sd"], "--prompts", "a", *flags, "--reference", broken, expect=2)
    assert "003.png" in message(capsys)
    assert not list(folder.rglob("*.png"))
