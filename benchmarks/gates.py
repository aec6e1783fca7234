"""Gates: check that the fast path learns the same as the plain path, before any speed is printed.

Each gate is a function of the records of child processes and returns a verdict. "Plain" is our script with all
optimisations off. "Varied" is the same, but splits each batch into two halves and adds up their gradients: it trains on
the same numbers with other kernel shapes, so it differs only by rounding and by what that grows to.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils.training.speed import allowed_error, typical_error

GRADIENT_ERROR = 1e-4  # relative error of each tensor in float32
FLOORS = {"fp32": 1e-2, "bf16": 1e-4}  # share of the root mean square of all gradients below which one is rounding
SPREADS = 3.0
LOSS_FLOORS = {"fp32": 1e-4, "bf16": 5e-3}  # relative spread of losses below which it is rounding
UPDATE_COSINE = 0.98
REPRODUCED_COSINE = 0.995  # tensors whose update the plain path reproduces at this cosine are checked individually
LEAST_MOVE = 0.5  # least norm of an update, relative to the plain path's


Tensors = Mapping[str, Tensor]


class Verdict(NamedTuple):
    """The result of a gate."""

    name: str
    holds: bool
    says: str


def cosine(one: Tensor, other: Tensor) -> float:
    """Returns the cosine between two tensors; 1 if both are zero, 0 if only one is."""
    one, other = one.double().flatten(), other.double().flatten()
    norms = float(one.norm() * other.norm())
    if norms == 0:
        return float(not one.any() and not other.any())
    return float(one @ other) / norms


def root_mean_square(tensors: Sequence[Tensor]) -> float:
    """Returns the root mean square over all elements of all tensors."""
    return math.sqrt(sum(float(each.double().square().sum()) for each in tensors) / sum(map(Tensor.numel, tensors)))


def names_agree(gate: str, fast: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> Verdict | None:
    """Returns a failed verdict if two sets of tensors can't be compared, else None."""
    if not plain:
        return Verdict(gate, False, "nothing was recorded for the plain path")
    other = sorted(set(fast) ^ set(plain))
    if other:
        return Verdict(gate, False, f"{len(other)} tensors are on one side only, such as {other[0]}")
    wrong = next((name for name in plain if fast[name].shape != plain[name].shape), None)
    return None if wrong is None else Verdict(gate, False, f"{wrong} has another shape")


def gradients_agree(fast: Tensors, plain: Tensors, precision: str, exact: Tensors | None = None) -> Verdict:
    """Compares the gradients of the first step, tensor by tensor.

    float32 is compared by relative error, bfloat16 by the distance of both paths to float32. A tensor whose true
    gradient is zero (the bias of an attention key) has only rounding errors and would never agree; so the error of a
    tensor far below the root mean square of all gradients is taken relative to that.

    Args:
        exact: for bfloat16, the gradients of the plain path in float32. The fast path's error may be twice that of
            the plain path, plus 1 % (`allowed_error`).
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
        if not error - limit <= excess:  # NaN counts as the worst
            excess, worst, place, allowed = error - limit, error, name, limit
        if math.isnan(error):
            break
    says = f"relative error {worst:.2g} in {place}, {allowed:.2g} allowed; {len(plain)} tensors"
    return Verdict(gate, excess <= 0, says)


def relative_error(found: Tensor, expected: Tensor, floor: float) -> float:
    """Returns the relative error of a tensor by root mean squares; relative to `floor` if that is larger."""
    size = math.sqrt(expected.numel())
    difference = float((found.double() - expected.double()).norm()) / size
    scale = max(float(expected.double().norm()) / size, floor)
    return difference / scale if scale else float(difference > 0)


def losses_agree(fast: Sequence[float], plain: Sequence[float], varied: Sequence[float], precision: str) -> Verdict:
    """Checks that each step's loss differs by at most three times the plain path's own spread up to that step."""
    gate = f"losses of {len(plain)} steps"
    if not plain or not len(fast) == len(plain) == len(varied):
        return Verdict(gate, False, f"{len(fast)} losses were recorded, but {len(plain)} and {len(varied)} of others")
    spread, worst, place = 0.0, 0.0, 0
    for step, (found, expected, other) in enumerate(zip(fast, plain, varied, strict=True)):
        spread = max(spread, abs(other - expected))
        allowed = SPREADS * max(spread, LOSS_FLOORS[precision] * abs(expected))
        share = abs(found - expected) / allowed if allowed else float(found != expected)
        if not share <= worst:
            worst, place = share, step
        if math.isnan(share):
            break
    says = f"at most {worst:.2g} of what is allowed, in step {place + 1}; the plain path's spread is {spread:.2g}"
    return Verdict(gate, worst <= 1, says)


def updates_agree(start: Tensors, fast: Tensors, plain: Tensors, varied: Tensors) -> Verdict:
    """Compares the updates of the weights: all together, and each tensor that the plain path reproduces.

    If a gradient is only rounding, Adam's step is noise, as the varied path shows; such tensors count in the total.
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
            return Verdict(gate, False, f"{name} hardly changed: {found.norm():.2g}, expected {expected.norm():.2g}")
        if float(expected.norm()) and cosine(other, expected) >= REPRODUCED_COSINE:
            held, own = held + 1, cosine(found, expected)
            if own < worst:
                worst, place = own, name
    if not plain_squares:
        return Verdict(gate, False, "the weights of the plain path did not change")
    together = dots / math.sqrt(fast_squares * plain_squares)
    says = f"cosine {together:.4f} of all; at least {worst:.4f} for each of {held} reproducible tensors"
    says += f", in {place}" if place else ""
    return Verdict(gate, together >= UPDATE_COSINE and worst >= UPDATE_COSINE, f"{says}; {UPDATE_COSINE} needed")


def export_loads(found: Mapping[str, object], alone: bool) -> Verdict:
    """Checks that a process without our code loaded the export and drew with it."""
    gate = "the export in plain diffusers"
    if not alone:
        return Verdict(gate, False, "our code was on the path of the process that must not use it")
    if found.get("why") or not found.get("draws"):
        return Verdict(gate, False, str(found.get("why") or "it draws no image"))
    loss = found.get("loss")
    is_number = isinstance(loss, float) and math.isfinite(loss)
    return Verdict(gate, is_number, f"it loads, draws, and has a loss of {loss}")


def tensors_of(folder: str, is_adapter: bool) -> dict[str, Tensor]:
    """Returns the trained tensors of an export, from all shards of the denoiser."""
    from pathlib import Path

    from safetensors.torch import load_file

    place = Path(folder)
    files = (
        [place / "pytorch_lora_weights.safetensors"] if is_adapter else sorted((place / "unet").glob("*.safetensors"))
    )
    return {name: each.to(torch.float32) for file in files for name, each in load_file(file).items()}
