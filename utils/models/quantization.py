"""Quantizes frozen weights to 4 or 8 bits, for adapters on top of them (QLoRA, Dettmers et al. 2023)."""

from importlib import import_module

import torch
from torch import Tensor, nn


def quantize_linears(module: nn.Module, kind: str, device: torch.device) -> None:
    """Replaces the linear layers of a frozen module by quantized ones of bitsandbytes, moved to the device.

    Args:
        module: the frozen module.
        kind: nf4 (4 bits, one scale per 64 weights) or int8 (8 bits, one scale per row).
        device: device that the layers are moved to.
    """
    layers = [(name, layer) for name, layer in module.named_modules() if type(layer) is nn.Linear]
    for name, layer in layers:
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, _quantized(layer, kind).to(device))


def _quantized(layer: nn.Linear, kind: str) -> nn.Module:
    parts = import_module("bitsandbytes").nn
    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    if kind == "nf4":
        made = parts.Linear4bit(*sizes, compute_dtype=layer.weight.dtype, quant_type="nf4")
        made.weight = parts.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    else:
        made = parts.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        made.weight = parts.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    made.register_forward_pre_hook(_cast_on_cpu)
    return made


def _cast_on_cpu(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Casts the input under CPU autocast, as it does for plain layers: the norms that follow need that dtype."""
    if inputs[0].device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return inputs
    return (inputs[0].to(torch.get_autocast_dtype("cpu")), *inputs[1:])
