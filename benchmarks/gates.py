"""Whether the fast path learns what the plain path learns: gates before any speed is printed.

Each is a function of what child processes recorded, and gives a verdict. "Plain" is our script with every optimisation
switched off, "varied" the same with each batch in two halves whose gradients are added up: by design it trains on the
same numbers, but its kernels see other shapes, so what it differs by is rounding, and what that grows to.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils.training.speed import allowed_error, typical_error

GRADIENT_ERROR = 1e-4  # float32: relative, of each tensor
FLOORS = {"fp32": 1e-2, "bf16": 1e-4}  # of the root mean square of all gradients: below it a tensor's own is rounding
SPREADS = 3.0
LOSS_FLOORS = {"fp32": 1e-4, "bf16": 5e-3}  # relative; below it a spread is rounding
UPDATE_COSINE = 0.98
REPRODUCED_COSINE = 0.995  # tensors whose update the plain path reproduces at this cosine are held to the gate each
LEAST_MOVE = 0.5  # of the plain path's update


Tensors = Mapping[str, Tensor]


class Verdict(NamedTuple):
    """What a gate found."""

    name: str
    holds: bool
    says: str


def cosine(one: Tensor, other: Tensor) -> float:
    """The cosine between two tensors; of two that are zero 1, of one 0."""
    one, other = one.double().flatten(), other.double().flatten()
    norms = float(one.norm() * other.norm())
    if norms == 0:
        return float(not one.any() and not other.any())
    return float(one @ other) / norms


def root_mean_square(tensors: Sequence[Tensor]) -> float:
    """Over all elements of all tensors."""
    return math.sqrt(sum(float(each.double().square().sum()) for each in tensors) / sum(map(Tensor.numel, tensors)))


def names_agree(gate: str, fast: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> Verdict | None:
    """A verdict where two sets of tensors can't be compared."""
    if not plain:
        return Verdict(gate, False, "nothing was recorded of the plain path")
    other = sorted(set(fast) ^ set(plain))
    if other:
        return Verdict(gate, False, f"{len(other)} tensors are on one side only, such as {other[0]}")
    wrong = next((name for name in plain if fast[name].shape != plain[name].shape), None)
    return None if wrong is None else Verdict(gate, False, f"{wrong} has another shape")


def gradients_agree(fast: Tensors, plain: Tensors, precision: str, exact: Tensors | None = None) -> Verdict:
    """Of the first step, tensor by tensor: float32 by relative error, bfloat16 by how far off float32 both are.

    A tensor whose gradient is rounding, for its true one is zero (an attention key's bias), would never agree: one
    far below the root mean square of all is held to an error relative to that.

    Args:
        exact: with bfloat16 the gradients of the plain path in float32. The fast path's may be twice as far off them
            as the plain path's, and 1 % more (`allowed_error`).
    """
    gate = f"gradients of the first step, {precision}"
    reference = plain if exact is None else exact
    wrong = names_agree(gate, fast, plain) or names_agree(gate, reference, plain)
    if wrong is not None:
        return wrong
    floor = FLOORS[precision] * root_mean_square(list(reference.values()))
    excess, worst, place, allowed = -math.inf, 0.0, "", GRADIENT_ERROR
    rounding = {}
    if exact is not None:
        rounding = {name: relative_error(plain[name], expected, floor) for name, expected in exact.items()}
    usual = typical_error(rounding.values())
    for name, expected in reference.items():
        error = relative_error(fast[name], expected, floor)
        limit = allowed_error(max(rounding[name], usual)) if rounding else GRADIENT_ERROR
        if not error - limit <= excess:  # not a number is worst
            excess, worst, place, allowed = error - limit, error, name, limit
        if math.isnan(error):
            break
    says = f"relative error {worst:.2g} in {place}, of {allowed:.2g} allowed; {len(plain)} tensors"
    return Verdict(gate, excess <= 0, says)


def relative_error(found: Tensor, expected: Tensor, floor: float) -> float:
    """Of a tensor by root mean squares; relative to `floor` where that is larger."""
    size = math.sqrt(expected.numel())
    difference = float((found.double() - expected.double()).norm()) / size
    scale = max(float(expected.double().norm()) / size, floor)
    return difference / scale if scale else float(difference > 0)


def losses_agree(fast: Sequence[float], plain: Sequence[float], varied: Sequence[float], precision: str) -> Verdict:
    """Each step's loss within three times what the plain path differs from itself by, up to that step."""
    gate = f"losses of {len(plain)} steps"
    if not plain or not len(fast) == len(plain) == len(varied):
        return Verdict(gate, False, f"{len(fast)} were recorded against {len(plain)} and {len(varied)}")
    spread, worst, place = 0.0, 0.0, 0
    for step, (found, expected, other) in enumerate(zip(fast, plain, varied, strict=True)):
        spread = max(spread, abs(other - expected))
        allowed = SPREADS * max(spread, LOSS_FLOORS[precision] * abs(expected))
        share = abs(found - expected) / allowed if allowed else float(found != expected)
        if not share <= worst:
            worst, place = share, step
        if math.isnan(share):
            break
    says = f"at most {worst:.2g} of what is allowed, in step {place + 1}; the plain path's own spread is {spread:.2g}"
    return Verdict(gate, worst <= 1, says)


def updates_agree(start: Tensors, fast: Tensors, plain: Tensors, varied: Tensors) -> Verdict:
    """What training added to the weights: of all together, and of each tensor that the plain path reproduces.

    Where a tensor's gradient is rounding, Adam's step is noise, which the varied path shows: such count only in all.
    """
    gate = "update of the weights"
    for other in (start, fast, varied):
        wrong = names_agree(gate, other, plain)
        if wrong is not None:
            return wrong
    dots, fast_squares, plain_squares = 0.0, 0.0, 0.0
    worst, place, held = 1.0, "", 0
    for name, begin in start.items():
        found, expected, other = (each[name].double() - begin.double() for each in (fast, plain, varied))
        dots += float((found * expected).sum())
        fast_squares, plain_squares = (
            fast_squares + float(found.square().sum()),
            plain_squares + float(expected.norm()) ** 2,
        )
        if not math.isfinite(float(found.sum())):
            return Verdict(gate, False, f"{name} is not finite")
        if float(found.norm()) < LEAST_MOVE * float(expected.norm()):
            return Verdict(gate, False, f"{name} has hardly moved: {found.norm():.2g} against {expected.norm():.2g}")
        if float(expected.norm()) and cosine(other, expected) >= REPRODUCED_COSINE:
            held, own = held + 1, cosine(found, expected)
            if own < worst:
                worst, place = own, name
    if not plain_squares:
        return Verdict(gate, False, "the plain path did not move")
    together = dots / math.sqrt(fast_squares * plain_squares)
    says = f"cosine {together:.4f} of all; {worst:.4f} at least of each of {held} tensors that are reproducible"
    says += f", in {place}" if place else ""
    return Verdict(gate, together >= UPDATE_COSINE and worst >= UPDATE_COSINE, f"{says}; {UPDATE_COSINE} needed")


def export_loads(found: Mapping[str, object], alone: bool) -> Verdict:
    """What a process without our code made of the export."""
    gate = "the export in plain diffusers"
    if not alone:
        return Verdict(gate, False, "our code was on the path of the process that was to do without it")
    if found.get("why") or not found.get("draws"):
        return Verdict(gate, False, str(found.get("why") or "it draws no image"))
    loss = found.get("loss")
    is_number = isinstance(loss, float) and math.isfinite(loss)
    return Verdict(gate, is_number, f"it loads, draws, and has a loss of {loss}")


def tensors_of(folder: str, is_adapter: bool) -> dict[str, Tensor]:
    """The trained tensors of an export, of all files of a denoiser that is split."""
    from pathlib import Path

    from safetensors.torch import load_file

    place = Path(folder)
    files = (
        [place / "pytorch_lora_weights.safetensors"] if is_adapter else sorted((place / "unet").glob("*.safetensors"))
    )
    return {name: each.to(torch.float32) for file in files for name, each in load_file(file).items()}
