"""Statistics of each layer's weights and gradients, which show layers that do not learn or that explode."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MEASUREMENTS = 8  # of a run, evenly spaced between its first step and its last
LEAST_STEPS = 50  # between two measurements: they cost about as much as a tenth of a step


def is_due(step: int, steps: range) -> bool:
    """Whether statistics are due at an optimizer step: the first, the last, and a few between them.

    Args:
        step: the step, from 1.
        steps: from the steps done before the run to those done after it.
    """
    interval = max(LEAST_STEPS, math.ceil(steps.stop / MEASUREMENTS))
    return step in (steps.start + 1, steps.stop) or step % interval == 0


@torch.no_grad()
def statistics(named: Sequence[tuple[str, Tensor]], scale: float) -> dict[str, list[float | None]]:
    """Returns [mean, deviation, norm, share of zeros] of each weight, followed by the same of its gradient, by name.

    Those of a missing gradient, and numbers that are not finite, are None. Everything is read at once.

    Args:
        named: names and weights.
        scale: the fp16 scaler's factor on the gradients.
    """
    with_gradients = [(name, each) for name, each in named if each.grad is not None]
    weights = _numbers([each.detach() for _, each in named])
    gradients = _numbers([each.grad.detach() for _, each in with_gradients])
    gradients = {
        name: [*(_over(value, scale) for value in row[:3]), row[3]]
        for (name, _), row in zip(with_gradients, gradients, strict=True)
    }
    nothing: list[float | None] = [None] * 4
    return {name: row + gradients.get(name, nothing) for (name, _), row in zip(named, weights, strict=True)}


def _over(value: float | None, scale: float) -> float | None:
    return None if value is None else value / scale


def _numbers(tensors: Sequence[Tensor]) -> list[list[float | None]]:
    """Mean, standard deviation, norm and share of zeros of each tensor."""
    if not tensors:
        return []
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors))])
    sums = torch.stack([each.sum(dtype=torch.float32) for each in tensors])
    filled = torch.stack([torch.count_nonzero(each) for each in tensors]).float()
    rows = []
    for tensor, (norm, total, count) in zip(tensors, torch.stack([norms, sums, filled], 1).tolist(), strict=True):
        size = max(1, tensor.numel())
        mean = total / size
        deviation = math.sqrt(max(0.0, norm**2 / size - mean**2)) if math.isfinite(norm) else math.nan
        row = [mean, deviation, norm, 1 - count / size]
        rows.append([float(f"{value:.6g}") if math.isfinite(value) else None for value in row])
    return rows
