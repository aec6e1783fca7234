"""Results are opened by transformers 4 with diffusers 0.35, in an environment of their own, and draw the run's images.

`make older` makes the environment; OLDER_PYTHON names the Python of another one.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.older_libraries import TOKEN
from tests.repository import ROOT
from tests.text_runs import SHORT, VALIDATION

PYTHON = Path(os.environ.get("OLDER_PYTHON", ROOT / ".venv-older" / "bin" / "python"))
LEARN = ("--learning_rate", 1e-2)
CALL = {"prompt": "a red square", "height": tiny.RESOLUTION, "width": tiny.RESOLUTION, "num_inference_steps": 3}
LORA = ("--adaptation", "lora", "--export_fused")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"{PYTHON} is not there; `make older` installs it"),
]
TEXT: dict[str, tuple[str, tuple[object, ...], str]] = {
    "newer base": ("sd", (), "."),
    "older base": ("older", (), "."),
    "trained text encoder": ("older", ("--train_text_encoder", "--use_ema"), "."),
    "added token": ("older", ("--validation_prompt", f"a {TOKEN} square"), "."),
    "its text encoder from copies": ("older", ("--train_text_encoder", "--async_checkpointing"), "."),
    "SDXL": ("sdxl", ("--train_text_encoder",), "."),
    "v-prediction": ("sd2", ("--rescale_betas_zero_snr",), "."),
    "half precision": ("half", (), "."),
    "some parts in half precision": ("mixed", (), "."),
    "snapshot": ("snapshot", (), "."),
    "single file": ("file", ("--pretrained_model_config", "sd"), "."),
    "bfloat16": ("older", ("--pure_bf16", "--mixed_precision", "bf16", "--train_text_encoder"), "."),
    "fused LoRA": ("older", LORA, "fused"),
    "fused LoRA of text encoders": ("sdxl", (*LORA, "--train_text_encoder"), "fused"),
    "fused LoKr": ("sd", ("--adaptation", "lokr"), "fused"),
    "LoRA file": ("older", ("--adaptation", "lora", "--train_text_encoder", "--rank", 2, "--lora_alpha", 3), "lora"),
    "checkpoint": ("older", ("--train_text_encoder", "--use_ema", "--ema_decay", 0.1), "checkpoint"),
}
UNCONDITIONAL = {
    "pixels": {"batch_size": 1},
    "labels": {"class_labels": [1]},
    "latents": {"batch_size": 1},
    "labelled latents": {"class_labels": [1], "guidance_scale": 1.0},
}


def in_older(*words: object) -> None:
    """Runs a command of older_libraries.py."""
    done = subprocess.run(
        [str(word) for word in (PYTHON, ROOT / "tests" / "older_libraries.py", *words)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def bases(pipelines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines to train from by name."""
    root = tmp_path_factory.mktemp("bases")
    in_older("make", root / "older")
    parts = ("unet", "vae", "text_encoder")
    return pipelines | {
        "older": root / "older",
        "half": tiny.in_half_precision(root / "older", root / "half", (*parts, "safety_checker")),
        "mixed": tiny.in_half_precision(root / "older", root / "mixed", ("text_encoder",)),
        "snapshot": tiny.make_snapshot(root / "older", root / "hub"),
        "file": tiny.write_single_file(pipelines["sd"], root / "model.safetensors"),
    }


@pytest.fixture
def images_of(train, bases, tmp_path):
    """The images of cases by newer libraries, in the runs, and by older ones."""

    def draw(cases: dict[str, tuple[str, tuple[object, ...], str]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        tasks, samples = [], {}
        for case, (base, flags, result) in cases.items():
            more = [bases.get(word, word) for word in flags]
            out = train(str(bases[base]), *SHORT, *VALIDATION, *LEARN, *more, out=case)
            samples[case] = np.asarray(Image.open(out / "samples" / "final" / "00_0.png")) / 255
            task = {"folder": str(out / result), "call": dict(CALL)}
            if "--validation_prompt" in flags:
                task["call"]["prompt"] = flags[flags.index("--validation_prompt") + 1]
            if result == "lora":
                task |= {"folder": str(bases[base]), "lora": str(out)}
            elif result == "checkpoint":
                checkpoint = out / "checkpoint-2"
                parts = {name: str(checkpoint / f"{name}_ema") for name in ("unet", "text_encoder")}
                task |= {"folder": str(bases[base]), "parts": parts}
            tasks.append(task)
        (tmp_path / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
        in_older("draw", tmp_path / "tasks.json", tmp_path / "drawn.npz")
        drawn = np.load(tmp_path / "drawn.npz")
        return {case: (samples[case], drawn[str(number)]) for number, case in enumerate(cases)}

    return draw


def test_older_libraries_draw_the_images_of_the_run(images_of):
    differences = {case: float(np.abs(new - old).max()) for case, (new, old) in images_of(TEXT).items()}
    differences["bfloat16"] /= 8  # whose samples are drawn in bfloat16
    wrong = {case: difference for case, difference in differences.items() if difference > 1.01 / 255}
    assert not wrong


def test_older_libraries_draw_from_unconditional_pipelines(train, tmp_path):
    from tests.older_libraries import draw

    tasks = []
    for name, call in UNCONDITIONAL.items():
        out = train(name, *SHORT, out=name)
        task = {"folder": str(out), "call": call | {"num_inference_steps": 3}}
        if name == "labels":
            task["load"] = {"custom_pipeline": str(out), "trust_remote_code": True}
        tasks.append(task)
    (tmp_path / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    in_older("draw", tmp_path / "tasks.json", tmp_path / "drawn.npz")
    older, newer = np.load(tmp_path / "drawn.npz"), draw(tasks)
    for number, name in enumerate(UNCONDITIONAL):
        np.testing.assert_allclose(older[str(number)], newer[str(number)], atol=1e-3, err_msg=name)


def test_tokenizers_of_both_agree(train, bases, tmp_path):
    """Also where the base has only the files that newer libraries write."""
    from transformers import CLIPTokenizer

    newer = shutil.copytree(bases["older"], tmp_path / "newer")
    shutil.rmtree(newer / "tokenizer")
    CLIPTokenizer.from_pretrained(bases["older"] / "tokenizer").save_pretrained(newer / "tokenizer")
    assert not (newer / "tokenizer" / "vocab.json").exists()
    out = train(str(newer), *SHORT, out="out")
    texts = [f"A {TOKEN},  Square!", "ein Käse mit 12 Löchern", "x" * 200, ""]
    (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    in_older("tokenize", out / "tokenizer", tmp_path / "texts.json", tmp_path / "ids.json")
    ids = CLIPTokenizer.from_pretrained(newer / "tokenizer")(texts).input_ids
    assert json.loads((tmp_path / "ids.json").read_text()) == ids
    assert CLIPTokenizer.from_pretrained(out / "tokenizer")(texts).input_ids == ids
