"""What runs and drawings leave behind, read and compared."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file


def entries(folder: Path) -> dict[bytes, dict[str, torch.Tensor]]:
    """All that is in a cache, by key."""
    found = {}
    for file in sorted(folder.rglob("[!.]*.safetensors")):
        tensors = load_file(file)
        keys, _ = tensors.pop("keys"), tensors.pop("checksums")
        for row, key in enumerate(keys):
            found[key.numpy().tobytes()] = {name: tensor[row] for name, tensor in tensors.items()}
    return found


def files(folder: Path) -> dict[str, bytes]:
    """The shards of a cache, by their names."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("[!.]*.safetensors"))}


def weights(folder: Path, name: str = "unet") -> dict[str, torch.Tensor]:
    """All tensors of a saved part."""
    tensors: dict[str, torch.Tensor] = {}
    for file in (folder / name).glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def lora(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file."""
    return load_file(folder / "pytorch_lora_weights.safetensors")


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train_loss"] for line in lines]


CPU = torch.device("cpu")
CLOSE = 3  # of 255, in single pixels: sums in another order


def images_in(folder):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("[!.]*.png"))}


def assert_same(first, second, most=CLOSE):
    assert first.keys() == second.keys()
    assert max(np.abs(first[name] - second[name]).max() for name in first) <= most


def measured(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]
