"""The mathematics of the scores against the field's packages, scipy, and the definitions in a few lines."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from utils.evaluation.metrics import distances
from utils.evaluation.metrics.distances import NotComputable, PairSums


def sets(count=300, others=260, width=16, shift=0.3, seed=0):
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(width, width)) / 4
    return generator.normal(size=(count, width)) @ mixing, generator.normal(size=(others, width)) @ mixing + shift


def frechet(first, second):
    return distances.frechet_distance(distances.moments(first), distances.moments(second))


def test_frechet_distance_is_the_formula_with_scipys_square_root():
    """pytorch-fid's arithmetic, to 1e-10."""
    x, y = sets()
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    difference = x.mean(0) - y.mean(0)
    expected = difference @ difference + np.trace(s1) + np.trace(s2) - 2 * np.trace(sqrtm(s1 @ s2)).real
    assert frechet(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet(x, y) == pytest.approx(frechet(y, x), rel=1e-10)
    assert abs(frechet(x, x)) < 1e-9


@pytest.mark.parametrize("count", [400, 12])  # 12: fewer images than features
def test_frechet_distance_is_torchmetrics(count):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Features(torch.nn.Module):
        num_features = 32

        def forward(self, images):
            return images.flatten(1)[:, :32].double()

    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(count, 32)), 0.5 + 2 * generator.normal(size=(count, 32))
    fid = FrechetInceptionDistance(feature=Features(), input_img_size=(1, 4, 8), normalize=True).set_dtype(
        torch.float64
    )
    fid.inception = Features()
    fid.real_features_sum, fid.fake_features_sum = torch.zeros(32).double(), torch.zeros(32).double()
    moments = [distances.moments(x), distances.moments(y)]
    for name, rows in (("real", x), ("fake", y)):
        setattr(fid, f"{name}_features_sum", torch.from_numpy(rows.sum(0)))
        setattr(fid, f"{name}_features_cov_sum", torch.from_numpy(rows.T @ rows))
        setattr(fid, f"{name}_features_num_samples", torch.tensor(count))
    fid.orig_dtype = torch.float64
    assert distances.frechet_distance(*moments) == pytest.approx(fid.compute().item(), rel=1e-6)


def test_frechet_distance_of_gaussians_that_are_known():
    """Diagonal: sum (sqrt(a) - sqrt(b))^2 + |m|^2; equal covariance: |m|^2."""
    a, b, shift = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0]), np.array([1.0, -2.0, 0.5])
    first = distances.Moments(np.zeros(3), np.diag(a), 100)
    second = distances.Moments(shift, np.diag(b), 100)
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum() + (shift**2).sum()
    assert distances.frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)
    same = distances.Moments(shift, np.diag(a), 100)
    assert distances.frechet_distance(first, same) == pytest.approx((shift**2).sum(), rel=1e-12)


def test_frechet_infinity_takes_the_bias_away():
    """Two sets of one distribution: the plain distance is biased upwards, the extrapolated one much less."""
    generator = np.random.default_rng(0)
    reference = distances.Moments(np.zeros(32), np.eye(32), 10**9)
    plain, extrapolated = [], []
    for _ in range(8):
        rows = generator.normal(size=(300, 32))
        plain.append(distances.frechet_distance(distances.moments(rows), reference))
        extrapolated.append(distances.frechet_infinity(rows, reference).value)
    assert np.mean(plain) > 0.7
    assert abs(np.mean(extrapolated)) < 0.2 * np.mean(plain)


def naive_mmd(x, y, kernel, biased):
    def mean(first, second, skip):
        pairs = [
            kernel(a, b)
            for (i, a), (j, b) in itertools.product(enumerate(first), enumerate(second))
            if not (skip and i == j)
        ]
        return sum(pairs) / len(pairs)

    return mean(x, x, not biased) + mean(y, y, not biased) - 2 * mean(x, y, False)


@pytest.mark.parametrize("biased", [True, False])
def test_kernel_distances_are_their_triple_loops(biased):
    x, y = sets(9, 7, 5)
    for kernel, plain in (
        (distances.polynomial_kernel, lambda a, b: (a @ b / 5 + 1) ** 3),
        (distances.gaussian_kernel, lambda a, b: math.exp(-((a - b) ** 2).sum() / 200)),
    ):
        found = distances.kernel_distance(x, y, kernel)
        expected = naive_mmd(x, y, plain, biased)
        assert (found.biased if biased else found.unbiased) == pytest.approx(expected, rel=1e-9, abs=1e-13)


def test_kernel_distance_is_torchmetrics_and_blocks_change_nothing(monkeypatch):
    from torchmetrics.image.kid import poly_mmd

    x, y = sets(60, 60, 8)
    expected = poly_mmd(torch.from_numpy(x), torch.from_numpy(y)).item()
    whole = distances.kernel_distance(x, y, distances.polynomial_kernel)
    monkeypatch.setattr(distances, "BLOCK_ROWS", 7)
    parts = distances.kernel_distance(x, y, distances.polynomial_kernel)
    assert whole.unbiased == pytest.approx(expected, rel=1e-9)
    assert parts.unbiased == pytest.approx(whole.unbiased, rel=1e-12)
    np.testing.assert_allclose(parts.without_first, whole.without_first)


def test_the_jackknife_leaves_out_one_at_a_time():
    x, y = sets(8, 6, 4)
    kernel = distances.polynomial_kernel
    found = distances.kernel_distance(x, y, kernel)
    for index in range(8):
        without = distances.kernel_distance(np.delete(x, index, 0), y, kernel).unbiased
        assert found.without_first[index] == pytest.approx(without, rel=1e-9)
    for index in range(6):
        without = distances.kernel_distance(x, np.delete(y, index, 0), kernel).unbiased
        assert found.without_second[index] == pytest.approx(without, rel=1e-9)


def test_kid_is_unbiased_and_its_error_is_its_spread():
    generator = np.random.default_rng(3)
    values, errors = [], []
    for _ in range(60):
        x, y = generator.normal(size=(60, 12)), generator.normal(size=(60, 12))
        found = distances.kernel_distance(x, y, distances.polynomial_kernel)
        values.append(found.unbiased)
        errors.append(found.error)
    spread = np.std(values, ddof=1)
    assert abs(np.mean(values)) < 3 * spread / math.sqrt(60)
    assert 0.7 * spread < np.mean(errors) < 2 * spread
    assert min(values) < 0  # and is not cut off there


def test_cmmd_as_published_is_biased_at_few_images():
    generator = np.random.default_rng(0)
    rows = [distances.unit_rows(generator.normal(size=(20, 64))) for _ in range(2)]
    found = distances.kernel_distance(*rows, distances.gaussian_kernel)
    assert found.biased * 1000 > 0.5
    assert abs(found.unbiased * 1000) < 0.2


def test_manifolds_are_prdc():
    from prdc import compute_prdc

    x, y = sets(120, 140, 6, 0.4)
    ours = distances.manifolds(x, y, 5, 5)
    theirs = compute_prdc(real_features=y, fake_features=x, nearest_k=5)
    assert ours.precise.mean() == pytest.approx(theirs["precision"])
    assert ours.recalled.mean() == pytest.approx(theirs["recall"])
    assert ours.densities.mean() == pytest.approx(theirs["density"])
    assert ours.covered.mean() == pytest.approx(theirs["coverage"])


def test_manifolds_of_copies():
    """A set against itself is precise and recalled, also where the reference holds copies, which have no radius."""
    x, _ = sets(40, 40, 5)
    doubled = np.concatenate([x, x])
    found = distances.manifolds(x, doubled)
    assert found.num_duplicates == 40
    assert found.precise.all()
    assert found.recalled.all()
    assert found.covered.all()


def test_manifolds_on_a_line_that_can_be_read_off():
    line = np.arange(8.0)[:, None]
    found = distances.manifolds(np.array([[0.0], [3.5], [20], [21], [22], [23], [24]]), line, 1, 2)
    assert found.precise.tolist() == [True, True] + [False] * 5
    assert found.densities[:3].tolist() == [
        1 / 2,
        2 / 2,
        0,
    ]  # 0: the ball of 0, not that of 1, whose radius is 1; 3.5: of 3, 4


def test_mean_over_all_pairs_is_exact():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(30, 200))
    pairs = [((a - b) ** 2).sum() for a, b in itertools.combinations(rows, 2)]
    sums = PairSums.of(rows[:11]) + PairSums.of(rows[11:])
    assert sums.mean_distance == pytest.approx(np.mean(pairs), rel=1e-12)
    assert PairSums.of(np.ones((5, 3))).mean_distance == 0
    with pytest.raises(NotComputable, match="at least 2"):
        _ = PairSums.of(rows[:1]).mean_distance


def test_vendi_counts_what_differs():
    assert distances.vendi_score(np.ones((10, 4))) == pytest.approx(1)
    assert distances.vendi_score(np.eye(6)) == pytest.approx(6)
    assert distances.vendi_score(np.repeat(np.eye(3), 5, axis=0)) == pytest.approx(3)
    rows = distances.unit_rows(np.random.default_rng(0).normal(size=(7, 20)))
    values = np.linalg.eigvalsh(rows @ rows.T / 7)
    assert distances.vendi_score(rows) == pytest.approx(math.exp(-(values * np.log(values)).sum()))


def test_inception_score_of_known_classes():
    sure = 1000 * np.tile(np.eye(4), (10, 1))
    assert distances.inception_score(sure, 1).value == pytest.approx(4)
    assert distances.inception_score(np.zeros((40, 4)), 10).value == pytest.approx(1)
    logits = np.random.default_rng(0).normal(size=(50, 6))
    shares = torch.from_numpy(logits).softmax(1)
    expected = (shares * (shares.log() - shares.mean(0).log())).sum(1).mean().exp().item()
    assert distances.inception_score(logits, 1).value == pytest.approx(expected)


@pytest.mark.parametrize("count", [10, 47, 103])
def test_inception_score_is_split_as_its_authors_split(count):
    """`preds[i * N // splits : (i + 1) * N // splits]`, whose parts differ in size where N is no multiple."""
    logits = np.random.default_rng(0).normal(size=(count, 6)) * 3
    shares, splits = torch.from_numpy(logits).softmax(1).numpy(), min(10, count // 2)
    scores = []
    for i in range(splits):
        part = shares[i * count // splits : (i + 1) * count // splits]
        divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(divergence.sum(1).mean()))
    found = distances.inception_score(logits, 10)
    assert found.value == pytest.approx(np.mean(scores), rel=1e-9)
    assert found.error == pytest.approx(np.std(scores), rel=1e-9)


def test_clip_scores_are_cut_pair_by_pair():
    images, texts = np.array([[1.0, 0], [1, 0], [0, 2]]), np.array([[-1.0, 0], [1, 1], [0, 1]])
    np.testing.assert_allclose(distances.clip_scores(images, texts), [0, 100 / math.sqrt(2), 100])


def test_the_bootstrap_draws_prompts():
    """Ten images of a prompt that are alike say no more than one."""
    generator = np.random.default_rng(0)
    by_prompt = generator.normal(size=50)
    values, prompts = np.repeat(by_prompt, 10), np.repeat(np.arange(50), 10)
    found = distances.cluster_bootstrap(values, prompts)
    half = 1.96 * by_prompt.std(ddof=1) / math.sqrt(50)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)
    assert distances.cluster_bootstrap(values[:10], prompts[:10]) is None


def test_paired_differences():
    generator = np.random.default_rng(0)
    before, prompts = generator.normal(size=100), np.arange(100) // 2
    risen = distances.paired_difference(before, before + 0.1 + 0.01 * generator.normal(size=100), prompts)
    assert risen.value == pytest.approx(0.1, abs=0.01)
    assert risen.interval.low > 0
    assert risen.share_higher == 1
    assert risen.probability < 0.01
    same = distances.paired_difference(before, before + 0.1 * generator.normal(size=100), prompts)
    assert same.interval.low < 0 < same.interval.high
    assert same.probability > 0.05


def test_what_is_too_small_or_not_finite_is_named():
    x, y = sets(20, 20, 4)
    broken = x.copy()
    broken[7, 2] = np.nan
    for compute in (
        lambda rows: distances.moments(rows),
        lambda rows: distances.kernel_distance(rows, y, distances.polynomial_kernel),
        lambda rows: distances.manifolds(rows, y),
    ):
        with pytest.raises(NotComputable, match="features of image 7"):
            compute(broken)
        with pytest.raises(NotComputable, match="too few"):
            compute(x[:1])
