"""The start of processes, and what it sets for all of a run."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from utils.config.options import UserError
from utils.runtime.processes import allow_tf32, is_tf32_allowed, without_tf32
from utils.training.state import TrainingState


@pytest.fixture(autouse=True)
def _tf32_as_before():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class TestTF32:
    @pytest.mark.parametrize(("flags", "expected"), [([], False), (["--allow_tf32", "true"], True)])
    def test_one_flag_is_for_products_and_convolutions(self, train, monkeypatch, flags, expected):
        seen, update = [], TrainingState.update

        def updated(self: TrainingState, *given: object) -> None:
            seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
            update(self, *given)

        monkeypatch.setattr(TrainingState, "update", updated)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not expected)
        train("sd", "--max_train_steps", 1, "--no_final_checkpoint", *flags)
        assert seen == [(expected, expected)]
        assert torch.backends.cudnn.allow_tf32 == (not expected)  # as before the run

    def test_networks_that_score_compute_without_it(self, monkeypatch):
        from utils.evaluation.metrics.features import Network

        seen = []

        class Scores(Network):
            name, settings = "stub", ""

            def __init__(self):
                self.module = nn.Identity()

            def pixels(self, image):
                return torch.zeros(3, 2, 2)

            def features(self, pixels):
                seen.append(is_tf32_allowed())
                return pixels.flatten(1)

        monkeypatch.setattr("utils.evaluation.metrics.features.read_picture", lambda picture: None)
        allow_tf32(True)
        Scores()([SimpleNamespace(name="a")], torch.device("cpu"))
        assert seen == [False]
        assert is_tf32_allowed()

    def test_it_comes_back_after_an_error(self):
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = True, False
        with pytest.raises(KeyError), without_tf32():
            raise KeyError
        assert torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32


class TestStart:
    @pytest.mark.parametrize("given", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
    def test_segments_expand_where_nobody_chose(self, train, monkeypatch, given):
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            monkeypatch.delenv(name, raising=False)
        if given is not None:
            monkeypatch.setenv(given, "max_split_size_mb:512")
        train("sd", "--max_train_steps", 1, "--no_final_checkpoint")
        chosen = {name: value for name, value in os.environ.items() if name.startswith("PYTORCH_") and "ALLOC" in name}
        if given is not None:
            assert chosen == {given: "max_split_size_mb:512"}
        elif sys.platform == "linux":
            assert set(chosen.values()) == {"expandable_segments:True"}
        for name in chosen:
            monkeypatch.delenv(name)

    @pytest.mark.parametrize(
        ("flags", "environment", "is_said"),
        [
            (["--mixed_precision", "bf16"], {}, True),
            ([], {}, False),
            ([], {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "false"}, True),
            ([], {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}, False),
        ],
    )
    def test_a_run_for_a_gpu_says_that_it_trains_on_the_cpu(
        self, train, monkeypatch, caplog, flags, environment, is_said
    ):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        train("sd", "--max_train_steps", 1, "--no_final_checkpoint", *flags)
        assert ("running on the CPU" in caplog.text) == is_said


def test_a_process_that_trains_apart_is_refused(monkeypatch, tmp_path):
    from accelerate import Accelerator

    from tests.conftest import reset_accelerate
    from utils.runtime.options import RuntimeOptions
    from utils.runtime.processes import start_processes

    reset_accelerate()
    Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started"):
        start_processes(RuntimeOptions(), 1, [], tmp_path, "logs")
