"""LoRA layers of peft, computed by fewer kernels."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def shorten(module: nn.Module, adapter: str) -> None:
    """Computes plain LoRA layers as W x + s B (A x) in three products, of which the last one scales and adds.

    peft takes a kernel each for scaling and adding, and under autocast two casts of x. Weights, their names and what is
    saved stay peft's, which computes all other layers itself: with dropout, of DoRA, quantised, or of convolutions.

    The layers become a subclass of peft's. A function put in place of each layer's `forward` would be an object of its
    own, by whose identity Dynamo guards: one graph a layer, where the subclass has one for all layers alike.
    """
    from peft.tuners.lora import Linear

    for layer in module.modules():
        if type(layer) is Linear and not layer.lora_variant and isinstance(layer.lora_dropout[adapter], nn.Identity):
            layer.short_adapter, layer.short_scaling = adapter, float(layer.scaling[adapter])
            layer.__class__ = _short_linear()


def num_shortened(module: nn.Module) -> int:
    """How many layers in a module are computed so."""
    return sum(hasattr(layer, "short_adapter") for layer in module.modules())


@lru_cache(maxsize=1)
def _short_linear() -> type[nn.Module]:
    from peft.tuners.lora import Linear

    class ShortLinear(Linear):
        """A LoRA layer that is computed in three products while its adapter is at work."""

        def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
            """[..., features] of [..., features]."""
            down, up = self.lora_A[self.short_adapter].weight, self.lora_B[self.short_adapter].weight
            is_plain = x.dtype == down.dtype or torch.is_autocast_enabled(x.device.type)
            if not is_plain or arguments or named or self.merged or self.disable_adapters:
                return super().forward(x, *arguments, **named)
            output = self.base_layer(x)
            low = functional.linear(x, down).flatten(0, -2)
            return torch.addmm(output.flatten(0, -2), low, up.t(), alpha=self.short_scaling).view_as(output)

    return ShortLinear
