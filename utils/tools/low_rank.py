"""Matrices of low rank: the best approximation of a difference of weights, and smaller ranks of given factors.

By the theorem of Eckart, Young and Mirsky the first r singular vectors are the best approximation of rank r in the
Frobenius norm. Convolutions are matrices of [out, in * height * width], as in LoRA's factors.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SHARE_FOR_EXACT = 8  # below one in so many of a matrix's singular values, only these are computed
OVERSAMPLING = 32  # additional random directions, of which the best are kept (Halko et al. 2011)
ITERATIONS = 12


@dataclass(frozen=True)
class Factors:
    """An approximation of a weight's difference: up @ down, in the shape of the weight.

    Attributes:
        up: [out, rank, 1, ...] float32.
        down: [rank, in, ...] float32.
        kept: the sum of squares of the approximation.
        total: the sum of squares of the difference.
    """

    up: Tensor
    down: Tensor
    kept: float
    total: float

    @property
    def rank(self) -> int:
        """The number of directions."""
        return int(self.down.shape[0])

    @property
    def share(self) -> float:
        """The share of the difference's energy, the sum of its squared singular values, that is kept."""
        return min(1.0, self.kept / self.total) if self.total else 1.0


def energy_of(tensor: Tensor) -> float:
    """Returns the sum of squares, added in float64 without a copy in it."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def factorize(difference: Tensor, rank: int | None, energy: float | None = None) -> Factors:
    """Returns the best factors of a weight's difference.

    Args:
        difference: [out, in, ...], of finite values.
        rank: the rank; the largest one with `energy`.
        energy: chooses the smallest rank that holds this share of the sum of squared singular values.
    """
    matrix = difference.float().flatten(1)
    total = energy_of(matrix)
    most = min(matrix.shape)
    limit = most if rank is None else min(rank, most)
    if energy is None and limit * SHARE_FOR_EXACT < most:
        left, values, right = _leading(matrix, limit)
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    count = limit if energy is None else min(limit, _rank_for(values, energy * total))
    kept = float(values[:count].double().square().sum())
    return _shaped(left[:, :count], values[:count], right[:count], difference.shape, kept, total)


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the leading singular vectors and values, by a randomized method; equal inputs give equal results."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        count = min(rank + max(OVERSAMPLING, rank), *matrix.shape)
        left, values, right = torch.svd_lowrank(matrix, q=count, niter=ITERATIONS)
    return left, values, right.T


def _rank_for(values: Tensor, energy: float) -> int:
    """Returns how many singular values, largest first, have this sum of squares; at least 1."""
    sums = values.double().square().cumsum(0)
    return min(int((sums < energy * (1 - 1e-6)).sum()) + 1, len(values))


def _shaped(left: Tensor, values: Tensor, right: Tensor, shape: torch.Size, kept: float, total: float) -> Factors:
    """Returns factors of equal norm."""
    roots = values.sqrt()
    up, down = left * roots, roots[:, None] * right
    others = [1] * (len(shape) - 2)
    return Factors(
        up.reshape(*up.shape, *others).float().contiguous(),
        down.reshape(-1, *shape[1:]).float().contiguous(),
        kept,
        total,
    )


def shortened(up: Tensor, down: Tensor, rank: int | None, energy: float | None = None) -> Factors:
    """Returns the best factors of smaller rank of up @ down, which is never formed; in float64 inside.

    Args:
        up: [out, rank, ...], where all dimensions but the first two are 1.
        down: [rank, in, ...].
        rank: the new rank; the largest one with `energy`.
        energy: chooses the smallest rank that holds this share of the sum of squared singular values.
    """
    left, lower = torch.linalg.qr(up.double().flatten(1))
    right, upper = torch.linalg.qr(down.double().flatten(1).T)
    inner_left, values, inner_right = torch.linalg.svd(lower @ upper.T, full_matrices=False)
    total = float(values.square().sum())
    count = len(values) if rank is None else min(rank, len(values))
    count = count if energy is None else min(count, _rank_for(values, energy * total))
    kept = float(values[:count].square().sum())
    shape = torch.Size((up.shape[0], *down.shape[1:]))
    return _shaped(left @ inner_left[:, :count], values[:count], (inner_right @ right.T)[:count], shape, kept, total)


def relative_error(kept: float, total: float) -> float:
    """Returns the norm of what is lost, divided by the norm of the whole."""
    return math.sqrt(max(0.0, 1 - kept / total)) if total else 0.0
