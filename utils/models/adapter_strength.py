"""Scales what trained PEFT adapters add to the weights, while samples are drawn."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def adapters_at(scale: float | None, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context manager: multiplies what adapters add to the weights by a scale; afterwards every bit is as before.

    At 0 the adapters are off, also those whose norm contains the scale (DoRA).

    Args:
        scale: None or 1 leaves them as they are.
        modules: the models that may have adapters.
    """
    if scale is None or scale == 1:
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    before = [(dict(layer.scaling), getattr(layer, "short_scaling", None), layer._disable_adapters) for layer in layers]
    try:
        for layer, (scaling, short_scaling, _) in zip(layers, before, strict=True):
            layer._disable_adapters = scale == 0  # not enable_adapters(), which changes what requires gradients
            layer.scaling.update({name: value * scale for name, value in scaling.items()})
            if short_scaling is not None:
                layer.short_scaling = short_scaling * scale
        yield
    finally:
        for layer, (scaling, short_scaling, is_off) in zip(layers, before, strict=True):
            layer._disable_adapters = is_off
            layer.scaling.update(scaling)
            if short_scaling is not None:
                layer.short_scaling = short_scaling
