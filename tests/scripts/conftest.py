"""Fixtures: evaluate_pipeline.py run in this process, with its networks and a reference."""

import json
from pathlib import Path

import pytest

from tests import networks, tiny
from tests.conftest import reset_accelerate

PROMPTS = ["a red square", "a blue square", "a green square"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "clip": networks.make_clip(root / "clip"),
        "dino": networks.make_dino(root / "dino"),
        "alex": networks.make_trunk(root / "alex.pth"),
        "own": networks.make_own(root / "own.py"),
    }


@pytest.fixture(scope="module")
def real_images(tmp_path_factory) -> Path:
    return tiny.make_images(tmp_path_factory.mktemp("real"), 24)


@pytest.fixture
def flags(models) -> list:
    """What gives every network, but for the preference models."""
    return [
        *("--feature_module", models["own"], "--clip_model", models["clip"], "--cmmd_model", models["clip"]),
        *("--dino_model", models["dino"], "--lpips_weights", models["alex"], "--lpips_size", 64),
    ]


@pytest.fixture
def evaluate(tmp_path):
    """evaluate("--pipeline", ..., out="a") runs the script and gives its results and its folder."""

    def run(*flags, out="out", expect=0):
        from evaluate_pipeline import main

        reset_accelerate()
        folder = tmp_path / out
        assert main([str(word) for word in ["--output_dir", folder, "--num_inference_steps", 2, *flags]]) == expect
        return json.loads((folder / "results.json").read_text()) if (
            folder / "results.json"
        ).is_file() else None, folder

    return run
