"""Trackers of accelerate's table: their names, their packages, their folders, and images and histograms in each."""

import os
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from utils.config.options import ProcessError, UserError
from utils.runtime import tracker_table
from utils.runtime.tracker_folders import VARIABLES, kept_within, start_arguments
from utils.runtime.tracker_media import HISTOGRAMS, IMAGES, Picture, log_histogram, log_images
from utils.runtime.tracker_table import find_trackers, missing_package, tracker_names
from utils.runtime.trackers import start_trackers

PICTURES = [
    Picture(Image.new("RGB", (8, 8), "red"), "a red square"),
    Picture(Image.new("RGB", (16, 8), "blue"), "<b>blue</b>"),
]


def test_the_names_are_those_of_accelerates_table():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert tracker_names() == tuple(sorted(LOGGER_TYPE_TO_CLASS))
    assert set(IMAGES) == set(tracker_names())
    assert set(HISTOGRAMS) <= set(tracker_names())
    assert set(VARIABLES) <= set(tracker_names())


def test_a_list_of_trackers(monkeypatch):
    monkeypatch.setattr(tracker_table, "missing_package", lambda name: "" if name in ("aim", "wandb") else name)
    assert find_trackers("all") == ["aim", "wandb"]
    assert find_trackers("none") == []
    assert find_trackers("wandb, Aim,wandb") == ["wandb", "aim"]
    for asked, said in (
        ("comet", "did you mean comet_ml"),
        ("none,wandb", "separated by commas"),
        ("", "separated by commas"),
        ("wandb,mlflow", "pip install mlflow"),
    ):
        with pytest.raises(UserError, match=said):
            find_trackers(asked)


def test_a_folder_of_a_trackers_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "clearml").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert missing_package("clearml") in ("clearml", "")
    monkeypatch.setattr(tracker_table, "find_spec", lambda name: object())
    monkeypatch.setattr(tracker_table, "version", lambda name: "4.0.1")
    assert missing_package("clearml") == ""
    assert missing_package("aim") == "'aim<4'"


def test_variables_of_folders_are_set_while_the_run_lasts(tmp_path, monkeypatch):
    for name in (name for names in VARIABLES.values() for name in names):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    before = dict(os.environ)
    with kept_within(tmp_path, ["wandb", "mlflow", "trackio"]):
        assert os.environ["WANDB_DIR"] == start_arguments(tmp_path)["wandb"]["dir"] == "elsewhere"
        assert str(tmp_path) in os.environ["MLFLOW_TRACKING_URI"]
        assert str(tmp_path) in start_arguments(tmp_path)["mlflow"]["logging_dir"]
        assert os.environ["TRACKIO_DIR"] == str(tmp_path / "trackio")
        assert "COMET_OFFLINE_DIRECTORY" not in os.environ
    assert dict(os.environ) == before
    assert start_arguments(tmp_path)["mlflow"] == {}


class Calls(list):
    """A stand-in for a tracker of any kind, or a part of it: it keeps the names of the methods that were called."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, method: str):
        if method in ("tracker", "writer"):
            return self
        return lambda *args, **named: self.append((method, args, named)) or self


def _package(monkeypatch: pytest.MonkeyPatch, name: str, calls: Calls) -> None:
    module = ModuleType(name)
    module.Image = lambda value, caption: (value.size, caption)
    module.Histogram = module.Distribution = np.sum
    module.log_image = calls.log_image
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", [*sorted(IMAGES), "another"])
def test_each_tracker_takes_images_of_any_sizes_and_histograms(name, monkeypatch):
    calls = Calls(name)
    _package(monkeypatch, name, calls)
    log_images(calls, PICTURES, "validation", 3)
    text = repr(calls)
    assert "validation" in text
    assert "step" in text or "iteration" in text
    if name in ("wandb", "swanlab", "trackio", "aim"):
        assert "<b>blue</b>" in text
    calls.clear()
    log_histogram(calls, np.arange(6, dtype=np.float32).reshape(2, 3), "weights/a", 3)
    assert bool(calls) == (name in HISTOGRAMS)
    calls.clear()
    log_histogram(calls, np.array([1.0, np.nan]), "weights/a", 3)
    assert not calls


def test_the_start_of_trackers_changes_no_random_state(tmp_path):
    def start(*given, **named):
        random.seed(9)
        np.random.seed(9)
        torch.manual_seed(9)

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    start_trackers(SimpleNamespace(init_trackers=start, trackers=[], log_with=[]), tmp_path, "project", {})
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_any_error_of_a_tracker_that_starts_is_one_line(tmp_path):
    class ForeignError(Exception):  # as each package has its own
        pass

    def start(*given, **named):
        raise ForeignError("1 validation error\n  project.name\n  must match [a-z]")

    accelerator = SimpleNamespace(init_trackers=start, trackers=[1], log_with=["swanlab"])
    with pytest.raises(ProcessError, match=r"--report_to swanlab can't be started: 1 validation error project\.name"):
        start_trackers(accelerator, tmp_path, "project", {})
    assert not accelerator.trackers


OFFLINE = {
    "WANDB_MODE": "offline",
    "SWANLAB_MODE": "offline",
    "CLEARML_OFFLINE_MODE": "1",
    "COMET_START_ONLINE": "0",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "swanlab", "clearml", "comet_ml", "mlflow", "trackio", "dvclive", "aim"])
def test_a_run_with_each_tracker_that_is_installed(train, name, tmp_path, monkeypatch):
    """The weights are those without it, and its files are in the output folder."""
    if missing_package(name):
        pytest.skip(f"{name} is not installed")
    for variable, value in OFFLINE.items():
        monkeypatch.setenv(variable, value)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    flags = ["--max_train_steps", 2, "--validation_prompt", "a square", "--validation_num_inference_steps", 1]
    flags += ["--histogram_steps", 2, "--adaptation", "lora", "--lora_dropout", 0.5]
    out = train("sd", *flags, "--report_to", name, out="with")
    plain = train("sd", *flags, out="without")
    with_it, without = (load_file(next(Path(each).glob("*.safetensors"))) for each in (out, plain))
    assert with_it.keys() == without.keys()
    assert all(torch.equal(with_it[key], without[key]) for key in without)
    assert not os.listdir(tmp_path / "here")
    places = {"wandb": "wandb", "swanlab": "swanlog", "mlflow": "mlruns", "aim": "logs/.aim"}
    assert (out / places.get(name, name)).is_dir()
