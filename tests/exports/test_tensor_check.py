"""The check of exported weights finds what is wrong, by name."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from utils.exports.tensor_check import check_folder, check_single_file, same_bits
from utils.models.folder_form import FolderForm
from utils.models.single_file_writer import write_single_file

UNET = "model.diffusion_model.out.2.bias"


@pytest.fixture(scope="module")
def files(pipelines, tmp_path_factory) -> dict[str, Path]:
    """Single files of the pipelines, by name."""
    root, found = tmp_path_factory.mktemp("files"), {}
    for kind in ("sd", "sd2", "sdxl"):
        found[kind] = root / f"{kind}.safetensors"
        write_single_file(pipelines[kind], found[kind])
    return found


def damaged(file: Path, target: Path, change) -> Path:
    """A copy of a file with other tensors."""
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    change(tensors)
    save_file(tensors, target, metadata)
    return target


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl"])
def test_nothing_is_wrong_with_what_was_written(pipelines, files, kind):
    found = check_single_file(files[kind], pipelines[kind])
    assert not found.faults
    stored = [load_file(file) for file in pipelines[kind].rglob("*.safetensors")]
    assert found.num_tensors == sum(map(len, stored))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors[UNET].add_(1e-7), "unet: 1 tensors are not the run's: conv_out.bias"),
        (lambda tensors: tensors.pop(UNET), "unet: 1 tensors are missing: conv_out.bias"),
        (lambda tensors: tensors.update({"x.y": torch.zeros(2)}), "1 tensors are unknown: x.y"),
        (
            lambda tensors: tensors.update({"model.diffusion_model.out.9.bias": torch.zeros(2)}),
            "1 tensors are read by nothing: model.diffusion_model.out.9.bias",
        ),
        (lambda tensors: tensors.update({UNET: tensors[UNET].half()}), "unet: 1 tensors are not the run's"),
        (
            lambda tensors: tensors.pop("first_stage_model.encoder.mid.attn_1.q.weight"),
            "vae: 1 tensors are missing: encoder.mid_block.attentions.0.to_q.weight",
        ),
        (
            lambda tensors: tensors["conditioner.embedders.1.model.text_projection"].mul_(2),
            "text_encoder_2: 1 tensors are not the run's: text_projection.weight",
        ),
        (
            lambda tensors: tensors["conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias"].add_(1),
            "text_encoder_2: 3 tensors are not the run's: encoder.layers.1.self_attn.k_proj.bias",
        ),
        (lambda tensors: tensors.update(v_pred=torch.empty(0)), "1 tensors mark another schedule: v_pred"),
    ],
)
def test_each_fault_of_a_file_is_named(pipelines, files, tmp_path, change, said):
    found = check_single_file(damaged(files["sdxl"], tmp_path / "x.safetensors", change), pipelines["sdxl"])
    assert len(found.faults) == 1
    assert said in found.faults[0]


def test_a_missing_mark_is_named(pipelines, files, tmp_path):
    file = damaged(files["sd2"], tmp_path / "x.safetensors", lambda tensors: tensors.pop("v_pred"))
    assert check_single_file(file, pipelines["sd2"]).faults == ["x.safetensors: 1 tensors are missing: v_pred"]


def test_a_file_that_cannot_be_read_is_a_fault(pipelines, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    (fault,) = check_single_file(tmp_path / "x.safetensors", pipelines["sd"]).faults
    assert "can't be read back" in fault


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_files_are_compared_with_rounded_weights(pipelines, tmp_path, dtype):
    write_single_file(pipelines["sd"], tmp_path / "x.safetensors", dtype=dtype)
    assert not check_single_file(tmp_path / "x.safetensors", pipelines["sd"], dtype).faults
    assert check_single_file(tmp_path / "x.safetensors", pipelines["sd"]).faults


def test_a_folder_is_compared_with_modules(pipelines, tmp_path):
    folder = shutil.copytree(pipelines["sd"], tmp_path / "sd")
    pipeline = DiffusionPipeline.from_pretrained(pipelines["sd"])
    modules = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    assert not check_folder(folder, modules).faults
    with torch.no_grad():
        pipeline.unet.conv_out.bias[0] += 1
    assert check_folder(folder, modules).faults == ["unet: 1 tensors are not the run's: conv_out.bias"]
    assert len(check_folder(folder, modules, FolderForm(torch.float16)).faults) == 2
    shutil.rmtree(folder / "text_encoder")
    assert any("text_encoder" in fault for fault in check_folder(folder, modules).faults)


def test_infinite_values_are_a_fault_of_fp16_alone(pipelines, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(pipelines["sd"])
    with torch.no_grad():
        pipeline.unet.conv_out.bias[0] = 1e6
    pipeline.save_pretrained(tmp_path / "whole")
    assert not check_folder(tmp_path / "whole", {"unet": pipeline.unet}).faults
    unet = DiffusionPipeline.from_pretrained(tmp_path / "whole").unet.half()
    unet.save_pretrained(tmp_path / "half" / "unet")
    (fault,) = check_folder(tmp_path / "half", {"unet": pipeline.unet}, FolderForm(torch.float16)).faults
    assert "1 values of 1 tensors are beyond 65504" in fault


def test_nan_has_bits_too():
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(nan, torch.tensor([1.0, float("nan")]))
    assert not same_bits(torch.tensor(0.0), torch.tensor(-0.0))
