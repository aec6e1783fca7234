"""Files that would run code."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_unconditional
from tests import tiny
from tests.comparing import assert_same_bits, losses, weights
from tests.conftest import message, reset_accelerate
from tests.text_runs import FLAGS


class Payload:
    """What writes a file where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.fixture
def marker(tmp_path) -> Iterator[Path]:
    path = tmp_path / "code-was-run"
    yield path
    assert not path.exists()


def pickled(path: Path, marker: Path) -> None:
    """Weights in torch's format, which write the marker where they are unpickled by plain pickle."""
    torch.save({"weight": Payload(marker)}, path)
    with zipfile.ZipFile(path) as file:
        assert any(name.endswith("data.pkl") for name in file.namelist())


@pytest.mark.parametrize("more", [(), ("--allow_pickle",)])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_would_run_code(train, capsys, pipelines, tmp_path, marker, part, more):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "pipeline")
    name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    (folder / part / f"{name}.safetensors").unlink()
    pickled(folder / part / ("pytorch_model.bin" if part == "text_encoder" else f"{name}.bin"), marker)
    train(str(folder), *FLAGS, "--max_train_steps", 1, *more, expect=2)
    said = message(capsys)
    assert "can't be loaded" in said if more else "--allow_pickle" in said


@pytest.mark.parametrize("more", [(), ("--allow_pickle",)])
def test_a_single_file_that_would_run_code(train, capsys, tmp_path, marker, more):
    pickled(tmp_path / "model.ckpt", marker)
    train(str(tmp_path / "model.ckpt"), *FLAGS, *more, expect=2)
    assert ("can't be read as tensors only" if more else "--allow_pickle") in message(capsys)


def test_pickles_of_tensors_alone_are_loaded_where_allowed(train, pipelines, tmp_path):
    whole = train("sd", *FLAGS, "--max_train_steps", 1, out="whole")
    folder = shutil.copytree(pipelines["sd"], tmp_path / "pipeline")
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = folder / part / f"{name}.safetensors"
        torch.save(load_file(file), file.with_name("pytorch_model.bin" if name == "model" else f"{name}.bin"))
        file.unlink()
    pickles = train(str(folder), *FLAGS, "--max_train_steps", 1, "--allow_pickle", out="pickles")
    assert_same_bits(weights(whole), weights(pickles))


def test_code_beside_a_pipeline_is_not_run(train, capsys, pipelines, tmp_path, marker):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "pipeline")
    (folder / "pipeline.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (folder / "unet" / "my_unet.py").write_text(f"open({str(marker)!r}, 'w')\n")
    train(str(folder), *FLAGS, "--max_train_steps", 1, out="beside")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["my_unet", "MyUNet"]}))
    train(str(folder), *FLAGS, "--max_train_steps", 1, out="named", expect=2)
    assert "can't be loaded" in message(capsys)


def test_pickles_in_a_checkpoint_are_not_read(train, marker):
    out = train("sd", *FLAGS, "--max_train_steps", 2)
    for name in ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin"):
        (out / "checkpoint-2" / name).write_bytes(pickle.dumps(Payload(marker)))
    train("sd", *FLAGS, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    assert len(losses(out)) == 3


def test_pickled_arrays_in_parquet_and_npz_are_no_images(train, capsys, tmp_path, marker):
    data = tiny.make_images(tmp_path / "data", 4)
    np.savez(data / "001.npz", image=np.array([Payload(marker)], dtype=object))
    train("sd", *FLAGS, "--max_train_steps", 1, data=data)


@pytest.mark.parametrize("more", [(), ("--allow_pickle",)])
def test_a_model_without_words_that_would_run_code(train, capsys, pipelines, tmp_path, marker, more):
    folder = shutil.copytree(train("pixels", "--max_train_steps", 1, "--train_batch_size", 2), tmp_path / "pipeline")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    pickled(folder / "unet" / "diffusion_pytorch_model.bin", marker)
    flags = ["--max_train_steps", 1, "--train_batch_size", 2, *more]
    reset_accelerate()
    argv = ["--train_data_dir", train.images, "--pretrained_model", folder, "--resolution", tiny.RESOLUTION, *flags]
    assert (
        train_unconditional.main(
            [str(word) for word in (*argv, "--output_dir", tmp_path / "again", "--report_to", "none")]
        )
        == 2
    )
    said = message(capsys)
    assert "can't be loaded" in said if more else "--allow_pickle" in said
