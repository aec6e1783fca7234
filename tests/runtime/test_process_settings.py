"""Runs within one process, as in a notebook: each leaves the process as it was."""

import json
import logging
import os
import signal
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests import tiny
from tests.comparing import assert_same_bits, weights
from utils.config import terminal
from utils.config.options import UserError


def _state() -> dict[str, object]:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    root = logging.getLogger()
    return {
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "hook": sys.excepthook,
        "streams": (sys.stdout, sys.stderr),
        "handlers": list(root.handlers),
        "argv": list(sys.argv),
        "environment": {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        "folder": os.getcwd(),
        "accelerate": [bool(each._shared_state) for each in (AcceleratorState, PartialState, GradientState)],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "filters": len(warnings.filters),
    }


def test_runs_in_one_process_leave_it_as_it_was(pipelines, images, tmp_path):
    """Also with other settings, where accelerate would refuse a second precision, and after an error."""
    from train_text_to_image import main
    from utils.config.terminal import set_up_logging

    set_up_logging()
    flags = ["--pretrained_model", pipelines["sd"], "--train_data_dir", images, "--resolution", tiny.RESOLUTION]
    flags += ["--train_batch_size", 2, "--max_train_steps", 1, "--report_to", "none", "--no_export_check"]
    ways = {
        "first": [],
        "bf16": ["--mixed_precision", "bf16", "--attention_backend", "math"],
        "deterministic": ["--deterministic"],
        "refused": ["--resume_from_checkpoint", tmp_path / "none"],
        "again": [],
    }
    before = None
    for name, more in ways.items():
        argv = [str(word) for word in (*flags, "--output_dir", tmp_path / name, *more)]
        assert main(argv) == (2 if name == "refused" else 0)
        before = before or _state()  # the first run loads modules
        assert _state() == before
        if name != "refused":
            command = json.loads((tmp_path / name / "run.json").read_text())["command"]
            assert command[0].endswith("train_text_to_image.py")
            assert command[1:] == argv
    assert_same_bits(weights(tmp_path / "first"), weights(tmp_path / "again"))


def test_a_bar_in_a_notebook_is_the_notebooks(monkeypatch):
    module = ModuleType("IPython")
    module.get_ipython = lambda: SimpleNamespace(kernel=object(), config={})
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.delenv("RANK", raising=False)
    assert terminal.in_notebook()
    bar = terminal.progress_bar(total=2, desc="two\nlines")
    assert not isinstance(bar.fp, terminal._BarStream)
    bar.update(2)
    bar.close()
    monkeypatch.setenv("RANK", "0")  # in a process that the notebook launched
    assert not terminal.in_notebook()


def test_what_a_notebook_shows_of_a_run(tmp_path, monkeypatch):
    from PIL import Image

    from utils.tools.notebook import show_run

    shown, display = [], ModuleType("IPython.display")
    display.HTML, display.Image, display.display = (lambda page: page), (lambda filename: filename), shown.append
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    with pytest.raises(UserError, match=r"has no report\.html and no samples"):
        show_run(tmp_path)
    for place in ("plots/training_curves.png", "samples/final/a.png"):
        (tmp_path / place).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / place)
    show_run(tmp_path)
    assert shown == [str(tmp_path / "plots/training_curves.png"), str(tmp_path / "samples/final/a.png")]
    (tmp_path / "report.html").write_text('<p class="a">learning</p>')
    show_run(str(tmp_path))
    assert 'srcdoc="&lt;p class=&quot;a&quot;&gt;learning' in shown[-1]
