"""Approximations of low rank: as near as the best one, and exact where the rank suffices."""

import pytest
import torch

from utils.tools.low_rank import factorize, shortened


def product(factors) -> torch.Tensor:
    return factors.up.flatten(1) @ factors.down.flatten(1)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 8, 3, 3)])
def test_the_full_rank_is_exact_and_a_smaller_one_is_the_best(shape):
    difference = torch.randn(shape)
    whole = factorize(difference, None)
    torch.testing.assert_close(product(whole), difference.flatten(1), rtol=1e-4, atol=1e-5)
    values = torch.linalg.svdvals(difference.flatten(1).double())
    for rank in (1, 5):
        factors = factorize(difference, rank)
        assert factors.rank == rank
        lost = (product(factors) - difference.flatten(1)).norm()
        assert float(lost) == pytest.approx(float(values[rank:].square().sum().sqrt()), rel=1e-4)
        assert factors.share == pytest.approx(float(values[:rank].square().sum() / values.square().sum()), rel=1e-5)


def test_the_randomized_method_is_as_good_as_the_exact_one_where_no_direction_stands_out():
    difference = torch.randn(320, 480)
    values = torch.linalg.svdvals(difference)
    factors = factorize(difference, 8)
    best = float(values[:8].square().sum())
    assert factors.kept / best > 0.999
    assert torch.equal(factorize(difference, 8).up, factors.up)  # equal inputs, equal results


def test_energy_chooses_the_smallest_rank_that_holds_it():
    left, right = torch.linalg.qr(torch.randn(30, 6))[0], torch.linalg.qr(torch.randn(50, 6))[0]
    difference = left @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25])) @ right.T
    squares = torch.tensor([64, 16, 4, 1, 0.25, 0.0625])
    for energy in (0.5, 0.9, 0.99, 1.0):
        rank = factorize(difference, None, energy).rank
        shares = squares.cumsum(0) / squares.sum()
        assert rank == int((shares < energy * (1 - 1e-6)).sum()) + 1
    assert factorize(difference, 2, 0.99).rank == 2


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_a_shorter_product_is_the_best_one_of_its_rank(kernel):
    up, down = torch.randn(20, 8, *[1] * len(kernel)), torch.randn(8, 12, *kernel)
    whole = up.flatten(1) @ down.flatten(1)
    same = shortened(up, down, 8)
    torch.testing.assert_close(product(same), whole, rtol=1e-4, atol=1e-4)
    factors, best = shortened(up, down, 3), factorize(whole, 3)
    torch.testing.assert_close(product(factors), product(best), rtol=1e-3, atol=1e-3)
    assert factors.down.shape == (3, 12, *kernel)
    assert factors.share == pytest.approx(best.share, rel=1e-5)


def test_no_difference_has_factors_of_zeros():
    factors = factorize(torch.zeros(6, 4), 2)
    assert not product(factors).any()
    assert factors.share == 1.0
