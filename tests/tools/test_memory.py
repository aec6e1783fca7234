"""The tools hold one tensor at a time: their memory is a few times that of the largest, whatever the model's size."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests import random_adapters
from tests.launching import succeed
from tests.repository import ROOT
from utils.formats.streaming import StreamedTensor, write_streamed

MEASURED = """
import importlib, resource, sys
tool = importlib.import_module(f"utils.tools.{sys.argv[1]}")
import diffusers, transformers, torch
for name in ("UNet2DConditionModel", "StableDiffusionPipeline", "loaders.single_file_utils"):
    __import__(f"diffusers.{name}") if "." in name else getattr(diffusers, name)
transformers.CLIPTextModel
torch.linalg.svd(torch.ones(300, 300)), torch.linalg.qr(torch.ones(300, 30))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert tool.main(sys.argv[2:]) == 0
print("MB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def large(folder: Path, target: Path, value: float) -> tuple[Path, int]:
    """A copy of a tiny pipeline with a UNet of 1 GB in fp16, as wide as a real one; and the largest tensor's MB."""
    random_adapters.tuned(folder, target)
    config = {"sample_size": 64, "cross_attention_dim": 32, "attention_head_dim": 8, "layers_per_block": 1}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    unet.save_config(target / "unet")
    tensors = [
        StreamedTensor(name, torch.float16, tuple(each.shape), lambda each=each: drawn(each.shape, value))
        for name, each in unet.state_dict().items()
    ]
    write_streamed(tensors, target / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return target, max(each.num_bytes for each in tensors) >> 20


def drawn(shape: torch.Size, value: float) -> torch.Tensor:
    """Values of rank 1 for each shape, which differ from those of another `value`."""
    rows = torch.linspace(0, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return (rows * value).expand(shape)


def used(tool: str, *words: object) -> float:
    """The MB that a tool needs beside its modules."""
    said = succeed([sys.executable, "-c", MEASURED, tool, *map(str, words)], cwd=ROOT)
    return float(said.split("MB")[-1])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_large_model_needs_a_few_times_the_largest_tensor(pipelines, tmp_path):
    base, largest = large(pipelines["sd"], tmp_path / "base", 0.1)
    limit = 8 * largest  # a tensor in fp16, twice that in float32, their sum, and what the allocator keeps
    assert limit < 600
    assert used("convert", base, tmp_path / "file.safetensors", "--to", "single_file") < limit
    file = tmp_path / "file.safetensors"
    assert used("convert", file, tmp_path / "again", "--to", "folder", "--pipeline_config", base) < limit
    random_adapters.write(base, tmp_path / "lora.safetensors", rank=2, parts=("unet",))
    merged = tmp_path / "merged.safetensors"
    assert used("merge", "--pipeline", file, "--lora", tmp_path / "lora.safetensors", "--out", merged) < limit
    assert used("extract", "--base", file, "--tuned", merged, "--rank", 2, "--out", tmp_path / "x.safetensors") < limit
