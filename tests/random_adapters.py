"""Adapters of random values for the layers of a pipeline, and weights that differ from a base's."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from utils.formats.adapter_files import AdapterLayer
from utils.formats.adapter_names import Component
from utils.formats.adapter_writer import write_diffusers, write_kohya
from utils.models.streamed_components import base_of_streamed
from utils.models.streamed_pipeline import read_streamed


def components(pipeline: Path) -> list[Component]:
    """What adapters can change in a pipeline."""
    return base_of_streamed(read_streamed(str(pipeline), "--pipeline")).components


def weight(pipeline: Path, layer: AdapterLayer) -> torch.Tensor:
    """The weight of a layer in a pipeline's folder."""
    return read_streamed(str(pipeline), "--pipeline").parts[layer.component][f"{layer.name}.weight"].read()


def layers(
    pipeline: Path, kind: str = "lora", rank: int = 4, seed: int = 0, parts: Sequence[str] = ("unet", "text_encoder")
) -> list[AdapterLayer]:
    """Random updates of attention layers and a convolution: of kind lora, dora, loha or lokr."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    found = []
    for component in components(pipeline):
        for name, shape in component.shapes.items():
            if component.name not in parts or not name.endswith(("attn2.to_k", "to_q", "conv1", "q_proj", "proj_in")):
                continue
            out, inner = shape[0], torch.Size(shape[1:]).numel()
            if kind in ("lora", "dora"):
                ones = [1] * (len(shape) - 2)
                tensors = {"down": drawn(rank, *shape[1:]), "up": drawn(out, rank, *ones)}
                if kind == "dora":
                    tensors["magnitude"] = drawn(out).abs() + 0.5
            elif len(shape) > 2:
                continue
            elif kind == "loha":
                ends = {"w1_a": (out, rank), "w1_b": (rank, inner), "w2_a": (out, rank), "w2_b": (rank, inner)}
                tensors = {f"hada_{end}": drawn(*size) for end, size in ends.items()}
            else:
                tensors = {"lokr_w1": drawn(2, 2), "lokr_w2_a": drawn(out // 2, rank)}
                tensors["lokr_w2_b"] = drawn(rank, inner // 2)
            record = "lora" if kind == "dora" else kind
            found.append(AdapterLayer(component.name, name, record, tensors, rank, rank / 2, shape))
    return found


def write(pipeline: Path, file: Path, form: str = "kohya", **of: object) -> list[AdapterLayer]:
    """Writes such an adapter in the names of kohya or diffusers; gives its layers."""
    found = layers(pipeline, **of)
    if form == "kohya":
        write_kohya(found, components(pipeline), file, torch.float32, {"ss_network_dim": "4", "modelspec.title": "own"})
    else:
        write_diffusers(found, file)
    return found


def tuned(pipeline: Path, target: Path, updates: Sequence[AdapterLayer] = (), more: Sequence[str] = ()) -> Path:
    """A copy of a pipeline with updates in its weights, and other values in further tensors, named by component."""
    shutil.copytree(pipeline, target)
    changed = {(layer.component, f"{layer.name}.weight"): layer for layer in updates}
    for file in target.glob("*/*.safetensors"):
        tensors, part = load_file(file), file.parent.name
        for name, tensor in tensors.items():
            if (part, name) in changed:
                tensors[name] = changed[part, name].merged(tensor)
            elif f"{part}.{name}" in more:
                tensors[name] = tensor + 0.5
        save_file(tensors, file, {"format": "pt"})
    return target
