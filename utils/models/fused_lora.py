"""Computes peft's LoRA layers with fewer kernels."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def shorten(module: nn.Module, adapter: str) -> None:
    """Computes plain LoRA layers as W x + s B (A x) in three products, the last of which also scales and adds.

    peft launches one kernel each for scaling and adding, and under autocast casts x twice. Weights, their names and
    saved files stay peft's, and so do all other layers: with dropout, DoRA, quantized, or convolutions.

    The layers get a subclass of peft's class. Replacing each layer's `forward` by a function would compile one graph
    per layer, because Dynamo guards on a function's identity; the subclass compiles one graph for all similar layers.
    """
    from peft.tuners.lora import Linear

    for layer in module.modules():
        if type(layer) is Linear and not layer.lora_variant and isinstance(layer.lora_dropout[adapter], nn.Identity):
            layer.short_adapter, layer.short_scaling = adapter, float(layer.scaling[adapter])
            layer.__class__ = _short_linear()


def num_shortened(module: nn.Module) -> int:
    """Returns the number of layers in a module that are computed this way."""
    return sum(hasattr(layer, "short_adapter") for layer in module.modules())


@lru_cache(maxsize=1)
def _short_linear() -> type[nn.Module]:
    from peft.tuners.lora import Linear

    class ShortLinear(Linear):
        """A LoRA layer computed in three products while its adapter is active."""

        def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
            """Maps [..., input features] to [..., output features]."""
            down, up = self.lora_A[self.short_adapter].weight, self.lora_B[self.short_adapter].weight
            is_plain = x.dtype == down.dtype or torch.is_autocast_enabled(x.device.type)
            if not is_plain or arguments or named or self.merged or self.disable_adapters:
                return super().forward(x, *arguments, **named)
            output = self.base_layer(x)
            low = functional.linear(x, down).flatten(0, -2)
            return torch.addmm(output.flatten(0, -2), low, up.t(), alpha=self.short_scaling).view_as(output)

    return ShortLinear
