"""LoRA layers of peft, computed by fewer kernels."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def shorten(module: nn.Module, adapter: str) -> None:
    """Has plain LoRA layers compute W x + s B (A x) as three products, of which the last scales and adds.

    peft takes a kernel each for scaling and adding, and under autocast two casts of x. Weights, their names and what is
    saved stay peft's, which computes all other layers itself: with dropout, of DoRA, quantised, or of convolutions.
    """
    from peft.tuners.lora import Linear

    layers = [
        layer
        for layer in module.modules()
        if type(layer) is Linear and not layer.lora_variant and isinstance(layer.lora_dropout[adapter], nn.Identity)
    ]
    for layer in layers:
        layer.forward = _ShortForward(layer, adapter)


def num_shortened(module: nn.Module) -> int:
    """How many layers in a module do so."""
    return sum(isinstance(layer.forward, _ShortForward) for layer in module.modules())


class _ShortForward:
    """The forward pass of a LoRA layer while its adapter is at work."""

    def __init__(self, layer: nn.Module, adapter: str):
        self._layer = layer
        self._adapter = adapter
        self._theirs = layer.forward
        self._scaling = layer.scaling[adapter]

    def __call__(self, inputs: Tensor, *arguments: Any, **named: Any) -> Tensor:
        layer, adapter = self._layer, self._adapter
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        is_plain = inputs.dtype == down.dtype or torch.is_autocast_enabled(inputs.device.type)
        if not is_plain or arguments or named or layer.merged or layer.disable_adapters:
            return self._theirs(inputs, *arguments, **named)
        output = layer.base_layer(inputs)
        low = functional.linear(inputs, down).flatten(0, -2)
        return torch.addmm(output.flatten(0, -2), low, up.t(), alpha=self._scaling).view_as(output)
