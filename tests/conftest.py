"""Fixtures: tiny pipelines and images, made once a session, and the script run in this process."""

import importlib
import os
import pkgutil
import signal
import tempfile

os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")  # where headers are remembered and encodings cached
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads only wait for each other

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

import utils
from tests import tiny

torch.set_num_threads(1)
for helper in ("comparing", "launching", "source_files"):
    pytest.register_assert_rewrite(f"tests.{helper}")  # their assertions say what differs, as those of tests do


@pytest.fixture(autouse=True)
def _same_folder() -> Iterator[None]:
    """A test that changes the working directory must change it back: later tests start processes in it."""
    before = os.getcwd()
    yield
    after = os.getcwd()
    os.chdir(before)
    assert after == before, f"the test left the working directory at {after}; use monkeypatch.chdir"


def mostly_slow(values: Iterable, *fast: object) -> list:
    """Parameters of a test, of which `make test` runs some alone."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipeline folders by name: sd, sd2 (v-prediction) and sdxl."""
    root = tmp_path_factory.mktemp("pipelines")
    return {
        "sd": tiny.make_sd(root / "sd"),
        "sd2": tiny.make_sd(root / "sd2", "v_prediction"),
        "sdxl": tiny.make_sdxl(root / "sdxl"),
        "vae": tiny.make_vae(root / "vae"),
    }


@pytest.fixture(scope="session")
def more_pipelines(pipelines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Those, one of pixels, and one of classes."""
    root = tmp_path_factory.mktemp("more")
    return pipelines | {"ddpm": tiny.unconditional(root / "ddpm"), "dit": tiny.class_conditional(root / "dit")}


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imagefolder of six captioned images."""
    return tiny.make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def classes(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in a folder for each of two classes."""
    return tiny.make_classes(images, tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="session", autouse=True)
def _hangup_is_heard() -> None:
    """As from a terminal: `nohup make test` has SIGHUP ignored, and then a run leaves it so."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _modules_are_loaded() -> None:
    """Scripts import modules when they run: one first imported under a test's patch would keep what was patched."""
    for module in pkgutil.walk_packages(utils.__path__, "utils."):
        importlib.import_module(module.name)


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture
def train(pipelines: dict[str, Path], images: Path, classes: Path, tmp_path: Path) -> Callable[..., Path]:
    """train("sd", "--rank", 4, out="a") runs train_text_to_image.py in this process and gives its output folder.

    train("pixels", ...), and what else `tiny.UNCONDITIONAL` names, runs train_unconditional.py.
    """

    def run(
        pipeline: str,
        *flags: object,
        out: str = "out",
        data: Path | None = None,
        expect: int = 0,
        verdict: bool = False,
    ) -> Path:
        reset_accelerate()
        if pipeline in tiny.UNCONDITIONAL:
            from train_unconditional import main

            has_classes = "--class_conditional" in tiny.UNCONDITIONAL[pipeline]
            argv = ["--train_data_dir", data or (classes if has_classes else images)]
            argv += [pipelines.get(word, word) for word in tiny.UNCONDITIONAL[pipeline]]
        else:
            from train_text_to_image import main

            argv = ["--pretrained_model", pipelines.get(pipeline, pipeline), "--train_data_dir", data or images]
        argv += ["--resolution", tiny.RESOLUTION, "--output_dir", tmp_path / out, "--lr_warmup_steps", 0]
        extras = ["--no_export_check", "--no_report", *([] if verdict else ["--no_verdict"])]  # each takes a second
        argv += ["--train_batch_size", 4, "--report_to", "none", *extras, *flags]
        status = main([str(word) for word in argv])
        assert status == expect
        return tmp_path / out

    run.pipelines = pipelines
    run.images = images
    return run


@pytest.fixture
def refused(train: Callable[..., Path], capsys: pytest.CaptureFixture) -> Callable[..., None]:
    """refused(["--rank", 4], "--adaptation lora") holds that train_text_to_image.py ends in an error that says so."""

    def check(flags: Sequence[object], *named: str, **arguments: object) -> None:
        train("sd", *flags, expect=2, **arguments)
        line = message(capsys)
        assert all(part in line for part in named), line

    return check


def message(capsys: pytest.CaptureFixture) -> str:
    """The error's line, which must be the only one of its kind."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def reset_accelerate() -> None:
    """Forgets the accelerator of an earlier run in this process, and its `--deterministic`."""
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
    torch.use_deterministic_algorithms(False)
