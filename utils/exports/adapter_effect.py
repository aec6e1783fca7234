"""How far the update of an adapter's file may be from the run's: by rounding its factors to the file's dtype alone.

All updates (LoRA, LoHa, LoKr, with or without a core) are sums of products of their factors. With factors `v` whose
rounding errors are at most `e`, an update `f` therefore changes by at most f(|v| + e) - f(|v|), element by element.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from utils.formats.adapter_files import AdapterLayer
from utils.formats.ui_reader import UiUpdate

UI_ROLES = {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"}
"""What UIs call the tensors of a layer that have other names there."""
ROUNDING = 1e-5  # of float32 sums of products in another order, relative to the sum of their absolute values
TINY = torch.finfo(torch.float32).tiny
AT_ONCE = 2**22  # values that are compared at a time
ROWS = 8  # of a layer, where not all are compared
OUTPUTS = ("up", "lora_up.weight", "magnitude", "dora_scale", "hada_w1_a", "hada_w2_a")
OUTPUTS_OF_PRODUCT = ("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a")
"""Tensors with an axis of outputs; the outputs of a LoKr update are the pairs of those of its two factors."""
CORES = {"hada_w1_a": "hada_t1", "hada_w2_a": "hada_t2", "lokr_w2_a": "lokr_t2"}
"""With a core, the outputs of these are their second axis."""


def rounding_error(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the largest errors of values that are rounded to a dtype: half a step, which is absolute near 0.

    Of values beyond the largest of the dtype it is infinite.
    """
    if dtype == torch.float32:
        return torch.zeros_like(values)
    limits = torch.finfo(dtype)
    errors = (values.abs() * limits.eps).clamp(min=limits.smallest_normal * limits.eps) / 2
    return errors.masked_fill(values.abs() > limits.max, torch.inf)


def allowed_difference(layer: AdapterLayer, dtype: torch.dtype) -> Tensor:
    """Returns how far the update of rounded tensors may be from the layer's, in the shape of its weight; no magnitude.

    Args:
        layer: the layer; the factors of a LoKr without low-rank factors are rounded with their scale, as UIs need it.
        dtype: dtype that the tensors were rounded to.
    """
    values = {role: each.float().cpu().abs() for role, each in layer.tensors.items() if role != "magnitude"}
    alpha = abs(layer.alpha)
    if layer.has_whole_factors:
        values["lokr_w1"], alpha = values["lokr_w1"] * abs(layer.scale), float(layer.rank)
    raised = {role: each + rounding_error(each, dtype) for role, each in values.items()}
    below = replace(layer, tensors=values, alpha=alpha).delta()
    above = replace(layer, tensors=raised, alpha=alpha).delta()
    return above.mul_(1 + ROUNDING).sub_(below).add_(TINY)


def allowed_for_dora(layer: AdapterLayer, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the same for the weight with a weight-decomposed update, m s / |s| for the sum s of each output.

    Args:
        layer: the layer, with a magnitude for each output.
        weight: its weight in float32.
        dtype: dtype that the tensors were rounded to.
    """
    others = [1] * (weight.dim() - 1)
    magnitude = layer.tensors["magnitude"].float().cpu().abs().flatten()
    error = rounding_error(magnitude, dtype).reshape(-1, *others)
    magnitude = magnitude.reshape(-1, *others)
    summed = (weight + layer.delta().cpu()).abs()
    change = allowed_difference(layer, dtype) + ROUNDING * weight.abs()
    length, longest = (each.flatten(1).norm(dim=1).reshape(-1, *others) for each in (summed, change))
    shortest = (length - longest).clamp(min=TINY)
    moved = (magnitude + error) * (change + summed * longest / length) / shortest
    return moved + error * summed / length + ROUNDING * magnitude * summed / length


def is_within(given: Tensor, wanted: Tensor, allowed: Tensor) -> bool:
    """Whether values are as near as allowed, and not finite in the same places; where any is allowed, any is right."""
    if given.shape != wanted.shape:
        return False
    flat = (each.flatten().split(AT_ONCE) for each in (given, wanted, allowed.expand_as(wanted)))
    return all(_are_within(*parts) for parts in zip(*flat, strict=True))


def _are_within(given: Tensor, wanted: Tensor, allowed: Tensor) -> bool:
    """The same for a few of the values, since comparing takes several times their memory."""
    is_bound = torch.isfinite(allowed)
    finite = torch.isfinite(wanted)
    if bool(((finite != torch.isfinite(given)) & is_bound).any()):
        return False
    finite &= is_bound
    return bool(((given - wanted).abs()[finite] <= allowed[finite]).all())


def has_same_rows(update: UiUpdate, layer: AdapterLayer, weight: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether an update changes a fixed few of a layer's outputs as it should: first, last, and some in between.

    Args:
        update: what a UI reads.
        layer: what it should be.
        weight: the layer's weight; None to compare the updates without a magnitude.
        dtype: dtype that the tensors were rounded to.
    """
    # The same outputs of both, without computing the others.
    update = replace(update, values={role: _few_of(role, each, update.values) for role, each in update.values.items()})
    tensors = {role: _few_of(role, each, layer.tensors) for role, each in layer.tensors.items()}
    outputs = _outputs(layer)
    some = replace(layer, tensors=tensors, shape=(len(outputs), *layer.shape[1:]))

    # Their updates, or their weights.
    if weight is None or "magnitude" not in layer.tensors:
        return is_within(update.delta(some.shape), some.delta().cpu(), allowed_difference(some, dtype))
    weight = weight.detach()[outputs].float().cpu()
    return is_within(update.merged(weight), some.merged(weight), allowed_for_dora(some, weight, dtype))


def _few(count: int, most: int) -> Tensor:
    """Returns at most so many of the first `count` numbers, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64, device="cpu").round().long()


def _numbers(role: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> tuple[int, Tensor]:
    """Returns a tensor's axis of outputs, and the numbers of those that are compared."""
    axis = 1 if CORES.get(role) in tensors else 0
    return axis, _few(tensor.shape[axis], ROWS if role in OUTPUTS else ROWS // 2)


def _few_of(role: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Returns a tensor with the outputs that are compared; itself if it has no axis of outputs."""
    tensor = tensor.detach().cpu()
    if role not in (*OUTPUTS, *OUTPUTS_OF_PRODUCT):
        return tensor
    axis, numbers = _numbers(role, tensor, tensors)
    return tensor.index_select(axis, numbers)


def _outputs(layer: AdapterLayer) -> Tensor:
    """Returns the numbers of a layer's outputs that are compared."""
    if layer.kind != "lokr":
        return _few(layer.shape[0], ROWS)
    tensors = layer.tensors
    first, second = (name if name in tensors else f"{name}_a" for name in ("lokr_w1", "lokr_w2"))
    (_, one), (axis, other) = (_numbers(role, tensors[role], tensors) for role in (first, second))
    return (one[:, None] * tensors[second].shape[axis] + other[None, :]).flatten()
