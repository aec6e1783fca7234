"""Writes adapters in the names that UIs read (kohya's, LyCORIS'), and as the LoRA files of diffusers.

Facts of the UIs, as read in ComfyUI (comfy/weight_adapter), AUTOMATIC1111 (extensions-builtin/Lora), LyCORIS
(lycoris/modules) and sd-scripts (networks/lora.py): an update is scaled by alpha divided by the inner dimension of its
factors; a LoKr update with two whole factors is not scaled at all.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from utils.config.terminal import json_text
from utils.formats.adapter_files import METADATA_KEY, AdapterLayer, by_component
from utils.formats.adapter_names import TEXT_PREFIX, Component, loadable_name
from utils.formats.streaming import StreamedTensor, write_streamed

LEGACY_BEGIN, LEGACY_SIZE = 0x100000, 0x10000  # bytes of a file that AUTOMATIC1111's first hash of models covers
LEGACY_DIGITS = 8


def kohya_tensors(
    layers: Sequence[AdapterLayer], components: Sequence[Component], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns the tensors of a file in kohya's and LyCORIS' names.

    Args:
        dtype: dtype of the tensors; an alpha that it can't represent stays in float32.

    Raises:
        ValueError: if UIs have no name for a layer.
    """
    by_name = {each.name: each for each in components}
    found: dict[str, Tensor] = {}
    for layer in layers:
        owner = by_name[layer.component].ui_name(layer.name)
        for role, tensor in _as_uis_scale(layer).items():
            found[f"{owner}.{role}"] = tensor.to(dtype).contiguous()
        # UIs do not scale updates with whole factors; LyCORIS stores their rank
        alpha = torch.tensor(float(layer.rank) if layer.has_whole_factors else layer.alpha, dtype=torch.float32)
        found[f"{owner}.alpha"] = alpha.to(dtype) if float(alpha.to(dtype)) == float(alpha) else alpha
    return found


def _as_uis_scale(layer: AdapterLayer) -> dict[str, Tensor]:
    """Returns a layer's tensors by LyCORIS' names; the scale of whole LoKr factors is multiplied into the first."""
    words = {"down": "lora_down.weight", "up": "lora_up.weight"}
    found = {words.get(role, role): tensor for role, tensor in layer.tensors.items() if role != "magnitude"}
    if layer.has_whole_factors and layer.scale != 1.0:
        found["lokr_w1"] = found["lokr_w1"].float() * layer.scale
    if "magnitude" in layer.tensors:
        magnitude, others = layer.tensors["magnitude"], [1] * (len(layer.shape) - 2)
        is_by_output = magnitude.dim() == 1
        found["dora_scale"] = magnitude.reshape(*((-1, 1) if is_by_output else (1, -1)), *others)
    return found


def write_kohya(
    layers: Sequence[AdapterLayer],
    components: Sequence[Component],
    file: Path,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> None:
    """Writes a file that ComfyUI, AUTOMATIC1111, Forge, InvokeAI, SD.Next, sd-scripts and LyCORIS read.

    Args:
        dtype: see `kohya_tensors`.
        metadata: the header's metadata; the hashes that UIs know the file by are added.

    Raises:
        ValueError: if UIs have no name for a layer.
    """
    tensors = kohya_tensors(layers, components, dtype)
    _write(tensors, file, {**metadata, **_hashes(tensors, metadata)})


def write_diffusers(
    layers: Sequence[AdapterLayer],
    file: Path,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes a LoRA file for `load_lora_weights` of diffusers, with each layer's rank and alpha in its metadata.

    Args:
        layers: the layers.
        file: the file.
        dtype: dtype of the tensors.
        metadata: further metadata of the header.

    Raises:
        ValueError: for LoHa and LoKr, and for magnitudes of inputs, which diffusers does not read.
    """
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        if layer.kind != "lora":
            raise ValueError("diffusers reads no LoHa or LoKr files; write the file for UIs, or merge it into its base")
        magnitude = layer.tensors.get("magnitude")
        if magnitude is not None and magnitude.dim() != 1:
            raise ValueError("diffusers reads no DoRA with magnitudes of inputs; merge it into its base")
        owner = f"{layer.component}.{layer.name}"
        tensors[f"{owner}.lora_A.weight"] = layer.tensors["down"].to(dtype).contiguous()
        tensors[f"{owner}.lora_B.weight"] = layer.tensors["up"].to(dtype).contiguous()
        if magnitude is not None:
            shape = (-1,) if len(layer.shape) == 2 else (1, -1, *[1] * (len(layer.shape) - 2))
            tensors[loadable_name(f"{owner}.lora_magnitude_vector")] = magnitude.to(dtype).reshape(shape).contiguous()
    own = {"format": "pt", METADATA_KEY: json_text(peft_config(layers), indent=2)}
    _write(tensors, file, {**metadata, **own})


def peft_config(layers: Iterable[AdapterLayer]) -> dict[str, object]:
    """Returns what diffusers' LoRA metadata says about the layers: `unet.r`, `unet.lora_alpha` and so on."""
    found: dict[str, object] = {}
    for component, own in sorted(by_component(layers).items()):
        # without the prefix, since PEFT matches ends of names, and transformers 5 has no such prefix
        names = [layer.name.removeprefix(TEXT_PREFIX) for layer in own]
        ranks = dict(zip(names, (layer.rank for layer in own), strict=True))
        alphas = dict(zip(names, (layer.alpha for layer in own), strict=True))
        rank, alpha = usual(ranks.values()), usual(alphas.values())
        values = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: each for name, each in ranks.items() if each != rank},
            "alpha_pattern": {name: each for name, each in alphas.items() if each != alpha},
            "target_modules": sorted(names),
        }
        if any("magnitude" in layer.tensors for layer in own):
            values["use_dora"] = True
        found |= {f"{component}.{key}": value for key, value in values.items()}
    return found


def usual(values: Iterable[float]) -> float:
    """Returns the most frequent value; of several, the least."""
    every = sorted(values)
    return max(every, key=every.count)


def _write(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    streamed = [
        StreamedTensor(name, each.dtype, tuple(each.shape), lambda each=each: each) for name, each in tensors.items()
    ]
    write_streamed(streamed, file, metadata)


def _hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns the hashes by which UIs know a file: of its data, and of some bytes of it with its training metadata.

    As `precalculate_safetensors_hashes` of sd-scripts defines them.
    """
    from safetensors.torch import save

    content = save(dict(tensors), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    begin = 8 + int.from_bytes(content[:8], "little")
    legacy = content[LEGACY_BEGIN : LEGACY_BEGIN + LEGACY_SIZE]
    return {
        "sshs_model_hash": hashlib.sha256(memoryview(content)[begin:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:LEGACY_DIGITS],
    }
