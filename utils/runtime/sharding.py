"""FSDP2 shards: gathers whole weights, replaces them, and uses them unsharded for a while.

Tensors that are not sharded pass through unchanged, so that callers need not check.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds only a shard of the tensor."""
    if type(tensor) in PLAIN:  # the fast path, since this is checked for each parameter in each step
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """Returns this process's shard of a tensor, sharing its memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Returns the whole tensor; every process must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def laid_out_like(value: Tensor, target: Tensor) -> Tensor:
    """Returns the value with the target's strides: fused and 8-bit optimizers read weights and state as raw memory."""
    if value.stride() == target.stride():
        return value
    return torch.empty_like(target, dtype=value.dtype, device=value.device).copy_(value)


def spread_like(value: Tensor, target: Tensor) -> Tensor:
    """Shards a whole value, present on every process, like the target; values of other shapes are left unchanged."""
    if not isinstance(value, Tensor) or value.shape != target.shape:
        return value
    if not is_sharded(target):
        return laid_out_like(value, target)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def put_in_place(parameter: nn.Parameter, value: Tensor) -> Callable[[], None]:
    """Replaces a parameter's values; returns a function that restores them.

    If both are on one device, nothing is copied. Values on another device are swapped with the parameter's own, which
    wait there: the device might not hold both. For sharded weights the values in their memory are overwritten, since
    computation uses that memory.
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
    """Returns a module's class before FSDP2 changed it."""
    from torch.distributed.fsdp import FSDPModule

    kind = type(module)
    return kind.__mro__[2] if issubclass(kind, FSDPModule) else kind


def sharded_parts(components: Iterable[object]) -> list[nn.Module]:
    """Returns the sharding units of the modules among `components`; other objects are ignored."""
    from torch.distributed.fsdp import FSDPModule

    modules = (each for each in components if isinstance(each, nn.Module))
    return [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]


@contextmanager
def unsharded(components: Iterable[object]) -> Iterator[None]:
    """Context manager: every process holds all weights, and may run the modules as often as it likes.

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
