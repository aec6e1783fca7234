"""The check of exports compares the components that are not trained with the base."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from utils.exports.frozen_check import check_frozen
from utils.models.folder_form import FolderForm
from utils.models.weight_files import weight_files

TRAINED = ("unet", "text_encoder")
HALF = FolderForm(torch.float16)
VAE = Path("vae", "diffusion_pytorch_model.safetensors")


def change(folder: Path, name: str, value: float) -> None:
    """Changes the first value of one of a VAE's tensors."""
    tensors = load_file(folder / VAE)
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / VAE, {"format": "pt"})


@pytest.fixture
def base(pipelines, tmp_path) -> Path:
    return shutil.copytree(pipelines["sd"], tmp_path / "base")


@pytest.fixture
def exported(pipelines, tmp_path) -> Path:
    return shutil.copytree(pipelines["sd"], tmp_path / "exported")


def family(base: Path | None, pipeline: DiffusionPipeline | None = None) -> SimpleNamespace:
    """What the check asks of a family."""
    files = (lambda name: []) if base is None else lambda name: weight_files(base / name, None, with_pickles=False)
    return SimpleNamespace(base_files=files, pipeline=pipeline or SimpleNamespace(components={}))


def test_a_copy_is_compared_with_the_base(base, exported):
    found = check_frozen(exported, family(base), TRAINED)
    assert not found.findings.faults
    assert found.findings.num_tensors == len(load_file(base / VAE))
    assert found.by_files == ["vae"]
    change(exported, "decoder.conv_in.bias", 7)
    faults = check_frozen(exported, family(base), TRAINED).findings.faults
    assert faults == ["vae: 1 tensors are not the run's: decoder.conv_in.bias"]
    (exported / VAE).unlink()
    assert "are missing" in check_frozen(exported, family(base), TRAINED).findings.faults[0]


def test_values_beyond_fp16_are_faults_in_any_component(base, exported, pipelines):
    change(base, "decoder.conv_in.bias", 1e6)
    for path in exported.rglob("*.safetensors"):
        save_file({name: each.half() for name, each in load_file(base / path.relative_to(exported)).items()}, path)
    for given in (family(base), family(None, DiffusionPipeline.from_pretrained(base)), family(None)):
        (fault,) = check_frozen(exported, given, TRAINED, HALF).findings.faults
        assert "vae: 1 values of 1 tensors are beyond 65504" in fault
        assert "decoder.conv_in.bias" in fault


@pytest.mark.parametrize(
    ("dtype", "form", "way"),
    [
        (torch.float32, FolderForm(), "by_memory"),
        (torch.bfloat16, FolderForm(), "to_precision"),
        (torch.bfloat16, HALF, "left_out"),
    ],
)
def test_without_files_the_weights_in_memory_are_compared(exported, dtype, form, way):
    given = family(None, DiffusionPipeline.from_pretrained(exported, torch_dtype=dtype))
    found = check_frozen(exported, given, TRAINED, form)
    assert not found.findings.faults
    assert getattr(found, way) == ["vae"]
    assert ("vae" in found.describe()) == (way != "left_out")
    change(exported, "decoder.conv_in.bias", 7)
    assert len(check_frozen(exported, given, TRAINED, form).findings.faults) == (way != "left_out")
