"""Weights of which each process keeps a part (FSDP2): taken whole, put back, and used whole for a while.

Tensors that are not spread pass through unchanged, so that nobody need ask.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of the tensor."""
    if type(tensor) in PLAIN:  # nearly all, and asked of each parameter in each step
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def laid_out_like(value: Tensor, target: Tensor) -> Tensor:
    """The value with the target's strides. Fused and 8-bit optimizers walk weights and state by raw memory alike."""
    if value.stride() == target.stride():
        return value
    return torch.empty_like(target, dtype=value.dtype, device=value.device).copy_(value)


def spread_like(value: Tensor, target: Tensor) -> Tensor:
    """A whole value, which every process has, spread and laid out as the target is; step counts stay as they are."""
    if not isinstance(value, Tensor) or value.shape != target.shape:
        return value
    if not is_sharded(target):
        return laid_out_like(value, target)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def put_in_place(parameter: nn.Parameter, value: Tensor) -> Callable[[], None]:
    """Puts other values in a parameter; gives what puts its own back.

    Nothing is copied where they are on one device. Values that lie elsewhere take the place of the parameter's own,
    which are kept there meanwhile: the device would not hold both. Of spread weights the memory itself is what is
    computed with, so their values are exchanged.
    """
    if not is_sharded(parameter):
        kept = parameter.data
        if value.device == kept.device:
            parameter.data = value
            return lambda: setattr(parameter, "data", kept)
        return _exchanged(parameter, value)
    held = own_part(parameter.data)
    kept = held.clone()
    held.copy_(own_part(value))
    return lambda: held.copy_(kept)


def _exchanged(parameter: nn.Parameter, value: Tensor) -> Callable[[], None]:
    held, kept = parameter.data, parameter.data.to(value.device, copy=True)
    if held.dtype == value.dtype:
        held.copy_(value)
        return lambda: held.copy_(kept)
    device = held.device
    parameter.data = value.to(device)
    return lambda: setattr(parameter, "data", kept.to(device))


def plain_class(module: nn.Module) -> type[nn.Module]:
    """A module's class without what spreading its weights has made of it."""
    from torch.distributed.fsdp import FSDPModule

    kind = type(module)
    return kind.__mro__[2] if issubclass(kind, FSDPModule) else kind


def sharded_parts(components: Iterable[object]) -> list[nn.Module]:
    """The parts of modules whose weights are gathered together; what is no module among them has none."""
    from torch.distributed.fsdp import FSDPModule

    modules = (each for each in components if isinstance(each, nn.Module))
    return [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]


@contextmanager
def unsharded(components: Iterable[object]) -> Iterator[None]:
    """Within it every process has all weights, so that each may run the modules among these as often as it likes.

    Every process must enter and leave it.
    """
    parts = sharded_parts(components)
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)
