"""A second reader of adapters, by the rules of the UIs alone, with which exports are checked.

It shares no code with the writer. The rules are those of ComfyUI (comfy/lora.py, comfy/utils.py, comfy/weight_adapter),
which AUTOMATIC1111, Forge and SD.Next apply too: a table has a name for each weight of the base in the original
layout and in diffusers', and whatever the file has under other names is not loaded. DoRA is computed as LyCORIS does.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from utils.config.tensor_files import read_safetensors

Place = tuple[int, str]
"""A layer of the base: 0 for the UNet, 1 and 2 for the text encoders, and the layer's name there."""
RESNET = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1"}
RESNET |= {"conv_shortcut": "skip_connection"}
OUTSIDE = {
    **{"conv_in": "input_blocks_0_0", "conv_out": "out_2"},
    **{"time_embedding_linear_1": "time_embed_0", "time_embedding_linear_2": "time_embed_2"},
    **{"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"},
}
"""The UNet's layers outside of its blocks, in diffusers' and in the original layout, with underscores."""


def ui_names(unet: Collection[str], encoders: Sequence[Collection[str]]) -> dict[str, Place]:
    """Returns the UIs' table of names: the layer that each name stands for.

    Args:
        unet: names of the UNet's layers in diffusers' layout.
        encoders: names of the layers of each text encoder, in the order of the pipeline.
    """
    table: dict[str, Place] = {}
    for layer in unet:
        flat = layer.replace(".", "_")
        table[f"lora_unet_{flat}"] = (0, layer)
        original = _original_name(flat, unet)
        if original is not None:
            table[f"lora_unet_{original}"] = (0, layer)
    for number, names in enumerate(encoders, start=1):
        words = ["lora_te1", "lora_te"] if number == 1 else [f"lora_te{number}"]
        for layer in names:
            table |= {f"{word}_{layer.replace('.', '_')}": (number, layer) for word in words}
    return table


def _original_name(flat: str, unet: Collection[str]) -> str | None:
    """Returns a UNet layer's name in the original layout, from its name in diffusers' with underscores.

    The original layout numbers all blocks of a half: each level has its residual blocks, and one more that changes the
    size, on the way down by itself, on the way up at the end of the level's last block.
    """
    if flat in OUTSIDE:
        return OUTSIDE[flat]
    if found := re.fullmatch(r"mid_block_(attentions|resnets)_(\d+)_(.+)", flat):
        kind, index, rest = found[1], int(found[2]), found[3]
        return f"middle_block_{1 if kind == 'attentions' else 2 * index}_{_inner(kind, rest)}"
    if found := re.fullmatch(r"(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", flat):
        way, level, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        number = _blocks_before(unet, way, level) + index
        half = f"input_blocks_{number + 1}" if way == "down" else f"output_blocks_{number}"
        return f"{half}_{int(kind == 'attentions')}_{_inner(kind, rest)}"
    if found := re.fullmatch(r"down_blocks_(\d+)_downsamplers_0_conv", flat):
        level = int(found[1])
        return f"input_blocks_{_blocks_before(unet, 'down', level) + _residuals(unet, 'down', level) + 1}_0_op"
    if found := re.fullmatch(r"up_blocks_(\d+)_upsamplers_0_conv", flat):
        level = int(found[1])
        has_attention = any(name.startswith(f"up_blocks.{level}.attentions.") for name in unet)
        last = _blocks_before(unet, "up", level) + _residuals(unet, "up", level) - 1
        return f"output_blocks_{last}_{2 if has_attention else 1}_conv"
    return None


def _inner(kind: str, rest: str) -> str:
    return RESNET.get(rest, rest) if kind == "resnets" else rest


def _residuals(unet: Collection[str], way: str, level: int) -> int:
    """Returns the number of residual blocks of a level."""
    pattern = re.compile(rf"{way}_blocks\.{level}\.resnets\.(\d+)\.")
    return len({found[1] for name in unet if (found := pattern.match(name))})


def _blocks_before(unet: Collection[str], way: str, level: int) -> int:
    """Returns the number of original blocks before a level; on the way down each level has one that resizes."""
    return sum(_residuals(unet, way, each) + (way == "down") for each in range(level))


@dataclass(frozen=True)
class UiUpdate:
    """What a UI loads for one layer.

    Attributes:
        values: its tensors by the last part of their names.
        alpha: its alpha; None if the file has none.
    """

    values: Mapping[str, Tensor]
    alpha: float | None

    def used(self) -> set[str]:
        """Returns the names of the tensors that a UI uses."""
        own, found = set(self.values), set()
        if "lora_up.weight" in own:
            found = {"lora_up.weight", "lora_down.weight", "lora_mid.weight"}
        elif "hada_w1_a" in own:
            found = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}
        elif {"lokr_w1", "lokr_w1_a"} & own:
            found = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
        return (found | {"dora_scale"}) & own if found else set()

    def delta(self, shape: Sequence[int]) -> Tensor:
        """Returns the difference that a UI adds to a weight of this shape at strength 1, in float32.

        Raises:
            KeyError, RuntimeError: if a tensor is missing, or the tensors do not fit.
        """
        read = {name: tensor.to(torch.float32) for name, tensor in self.values.items()}
        if "lora_up.weight" in read:
            down = read["lora_down.weight"]
            product, inner = torch.mm(read["lora_up.weight"].flatten(1), down.flatten(1)), down.shape[0]
        elif "hada_w1_a" in read:
            product = _rebuilt(read, "hada_w1", "hada_t1") * _rebuilt(read, "hada_w2", "hada_t2")
            inner = read["hada_w1_b"].shape[0]
        else:
            product, inner = self._kronecker(read)
        scale = 1.0 if self.alpha is None or inner is None else self.alpha / inner
        return product.mul_(scale).reshape(tuple(shape))

    @staticmethod
    def _kronecker(read: Mapping[str, Tensor]) -> tuple[Tensor, int | None]:
        """Returns a LoKr update, and the inner dimension that alpha is divided by; None if both factors are whole."""
        inner = None
        first, second = read.get("lokr_w1"), read.get("lokr_w2")
        if first is None:
            inner, first = read["lokr_w1_b"].shape[0], _rebuilt(read, "lokr_w1", "")
        if second is None:
            inner, second = read["lokr_w2_b"].shape[0], _rebuilt(read, "lokr_w2", "lokr_t2")
        rest = second.shape[2:]
        product = torch.einsum("ab,cd...->acbd...", first, second)
        return product.reshape(first.shape[0] * second.shape[0], first.shape[1] * second.shape[1], *rest), inner

    def merged(self, weight: Tensor) -> Tensor:
        """Returns a weight with the update at strength 1, in float32; DoRA as LyCORIS: over the norm of the sum."""
        summed = weight.to(torch.float32) + self.delta(weight.shape)
        if "dora_scale" not in self.values:
            return summed
        scale = self.values["dora_scale"].to(torch.float32)
        if scale.shape[0] == summed.shape[0]:
            norm = summed.reshape(summed.shape[0], -1).norm(dim=1).reshape(-1, *[1] * (summed.dim() - 1))
        else:
            norm = summed.transpose(0, 1).reshape(summed.shape[1], -1).norm(dim=1)
            norm = norm.reshape(1, -1, *[1] * (summed.dim() - 2))
        return summed * (scale / norm)


def _rebuilt(read: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    if core not in read:
        return torch.mm(read[f"{name}_a"], read[f"{name}_b"])
    return torch.einsum("ijkl,jr,ip->prkl", read[core], read[f"{name}_b"], read[f"{name}_a"])


@dataclass(frozen=True)
class UiFile:
    """What a UI reads of a file.

    Attributes:
        updates: the updates by layer.
        unknown: names of tensors for which the base has no layer.
        unread: names of tensors of known layers that no rule reads.
    """

    updates: dict[Place, UiUpdate] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def read_as_ui(file: Path, table: Mapping[str, Place]) -> UiFile:
    """Reads a file as the UIs do.

    Args:
        table: the UIs' names, from `ui_names`.

    Raises:
        OSError, SafetensorError: if it can't be read.
    """
    found = UiFile()
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_safetensors(file).items():
        owner, _, part = name.partition(".")
        if owner in table:
            grouped.setdefault(owner, {})[part] = tensor
        else:
            found.unknown.append(name)
    for owner, values in grouped.items():
        alpha = values.pop("alpha", None)
        update = UiUpdate(values, None if alpha is None else float(alpha))
        found.unread.extend(f"{owner}.{part}" for part in sorted(set(values) - update.used()))
        found.updates[table[owner]] = update
    return found
