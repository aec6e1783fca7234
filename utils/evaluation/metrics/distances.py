"""The mathematics of the scores, in float64: distances of sets of features, spreads and intervals.

Sets are arrays [N, d], one row an image. Nothing here knows where features come from. What can't be computed raises
`NotComputable`, whose message says why; no number is ever made up for it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
BLOCK_ROWS = 1024
SAME_IMAGE = 1e-5  # of the features' spread


class NotComputable(Exception):  # noqa: N818  no error: the set is what it is
    """A score that a set of images does not have, and why."""


class Failed(NotComputable):
    """A score that there should have been: something broke, such as a feature that is not finite."""


@dataclass(frozen=True)
class Moments:
    """Mean [d] and unbiased covariance [d, d] of `count` features, in float64."""

    mean: Array
    covariance: Array
    count: int


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, None where there is none."""

    value: float
    error: float | None = None


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float


def as_features(features: Array, least: int = 1) -> Array:
    """Features as float64 [N, d].

    Raises:
        NotComputable: if there are fewer than `least`.
        Failed: if one is not finite.
    """
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2:
        raise NotComputable(f"features must be [N, d], got {list(rows.shape)}")
    if len(rows) < least:
        raise NotComputable(f"{len(rows)} images are too few: at least {least} are needed")
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=1)).nonzero()[0][0])
        raise Failed(f"the features of image {bad} are not finite")
    return rows


# Frechet distance


def moments(features: Array) -> Moments:
    """Mean and covariance of features [N, d], N at least 2."""
    rows = as_features(features, 2)
    mean = rows.mean(axis=0)
    centred = rows - mean
    return Moments(mean, centred.T @ centred / (len(rows) - 1), len(rows))


def square_root(symmetric: Array) -> Array:
    """The square root of a covariance."""
    values, vectors = np.linalg.eigh(symmetric)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def frechet_distance(first: Moments, second: Moments, root: Array | None = None) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al. 2017, equation 6).

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)); the last trace is the sum of the square roots of the
    eigenvalues of S2^(1/2) S1 S2^(1/2), which is symmetric: no matrix square root of a product is needed.

    Args:
        root: S2^(1/2), where it is known.
    """
    if first.mean.shape != second.mean.shape:
        raise NotComputable(f"features of {len(first.mean)} and {len(second.mean)} dimensions can't be compared")
    root = square_root(second.covariance) if root is None else root
    product = root @ first.covariance @ root
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    difference = first.mean - second.mean
    return float(difference @ difference + np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross)


def frechet_infinity(features: Array, reference: Moments, seed: int = 0, num_points: int = 15) -> Estimate:
    """The Frechet distance extrapolated to infinitely many images (Chong and Forsyth 2020).

    A line in 1/N is fitted to the distances of `num_points` random subsets, of sizes from a third of the set to all of
    it, and read at 0. The error is that of the line's intercept; the subsets overlap, so it is a lower bound.
    """
    rows = as_features(features, 30)
    sizes = np.linspace(max(len(rows) // 3, 10), len(rows), num_points).astype(int)
    generator = np.random.default_rng(seed)
    root = square_root(reference.covariance)
    subsets = [rows[generator.permutation(len(rows))[:size]] for size in sizes]
    distances = [frechet_distance(moments(subset), reference, root) for subset in subsets]
    x = 1 / sizes
    design = np.stack([np.ones_like(x), x], axis=1)
    coefficients, residual, _, _ = np.linalg.lstsq(design, np.array(distances), rcond=None)
    variance = (residual[0] if len(residual) else 0.0) / (num_points - 2)
    error = math.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0])
    return Estimate(float(coefficients[0]), error)


def frechet_by_group(features: Array, reference: Moments, groups: Array) -> Array:
    """The Frechet distances [G] of disjoint groups of the images, which `groups` [N] numbers."""
    rows, root = as_features(features, 2), square_root(reference.covariance)
    return np.array([frechet_distance(moments(rows[groups == group]), reference, root) for group in np.unique(groups)])


# Kernel distances

Kernel = Callable[[Array, Array], Array]


def polynomial_kernel(first: Array, second: Array) -> Array:
    """(x.y / d + 1)^3 of each pair (Binkowski et al. 2018): [N, M]."""
    return (first @ second.T / first.shape[1] + 1) ** 3


def gaussian_kernel(first: Array, second: Array, sigma: float = 10.0) -> Array:
    """exp(-|x - y|^2 / (2 sigma^2)) of each pair: [N, M]."""
    return np.exp(-squared_distances(first, second) / (2 * sigma**2))


def squared_distances(first: Array, second: Array) -> Array:
    """Squared Euclidean distance of each pair: [N, M], never below 0."""
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1)[None] - 2 * first @ second.T
    return squares.clip(0)


def _row_sums(first: Array, second: Array, kernel: Kernel) -> tuple[Array, Array, Array]:
    """(sums over each row [N], over each column [M], the diagonal) of the kernel's matrix, in blocks of rows."""
    rows, columns, diagonal = np.zeros(len(first)), np.zeros(len(second)), np.zeros(min(len(first), len(second)))
    for start in range(0, len(first), BLOCK_ROWS):
        block = kernel(first[start : start + BLOCK_ROWS], second)
        rows[start : start + len(block)] = block.sum(1)
        columns += block.sum(0)
        places = np.arange(start, min(start + len(block), len(diagonal)))
        diagonal[places] = block[places - start, places]
    return rows, columns, diagonal


@dataclass(frozen=True)
class KernelDistance:
    """The squared maximum mean discrepancy of N and M samples.

    Attributes:
        unbiased: the full U-statistic: no sample is compared with itself. May be below 0.
        biased: the V-statistic: the diagonals count.
        without_first: [N] the U-statistic without each sample of the first set.
        without_second: [M] the same of the second set.
    """

    unbiased: float
    biased: float
    without_first: Array
    without_second: Array

    @property
    def error(self) -> float:
        """The jackknife's standard error of the U-statistic, over both sets."""
        return jackknife_error(self.without_first, self.without_second)


def kernel_distance(first: Array, second: Array, kernel: Kernel) -> KernelDistance:
    """The squared maximum mean discrepancy (Gretton et al. 2012, equations 3 and 5), with every delete-one value.

    Each set needs 3 samples, so that without one there are still pairs.
    """
    x, y = as_features(first, 3), as_features(second, 3)
    if x.shape[1] != y.shape[1]:
        raise NotComputable(f"features of {x.shape[1]} and {y.shape[1]} dimensions can't be compared")
    n, m = len(x), len(y)
    x_rows, _, x_diagonal = _row_sums(x, x, kernel)
    y_rows, _, y_diagonal = _row_sums(y, y, kernel)
    cross_rows, cross_columns, _ = _row_sums(x, y, kernel)
    within_x, within_y, cross = (x_rows - x_diagonal).sum(), (y_rows - y_diagonal).sum(), cross_rows.sum()
    mean_x, mean_y = within_x / (n * (n - 1)), within_y / (m * (m - 1))
    without_first = (
        (within_x - 2 * (x_rows - x_diagonal)) / ((n - 1) * (n - 2)) + mean_y - 2 * (cross - cross_rows) / ((n - 1) * m)
    )
    without_second = (
        mean_x
        + (within_y - 2 * (y_rows - y_diagonal)) / ((m - 1) * (m - 2))
        - 2 * (cross - cross_columns) / (n * (m - 1))
    )
    biased = x_rows.sum() / n**2 + y_rows.sum() / m**2 - 2 * cross / (n * m)
    return KernelDistance(float(mean_x + mean_y - 2 * cross / (n * m)), float(biased), without_first, without_second)


def jackknife_error(*without_one: Array) -> float:
    """The standard error of a statistic of independent sets from its delete-one values for each set."""
    return math.sqrt(sum((len(each) - 1) / len(each) * ((each - each.mean()) ** 2).sum() for each in without_one))


def subset_kid(first: Array, second: Array, size: int = 1000, num_subsets: int = 100, seed: int = 0) -> Estimate:
    """The conventional KID: mean and deviation over random subsets, which overlap: it is no error bar."""
    x, y = as_features(first, size), as_features(second, size)
    if size < 2:
        raise NotComputable("subsets need 2 images")
    generator, found = np.random.default_rng(seed), []
    for _ in range(num_subsets):
        some = x[generator.choice(len(x), size, replace=False)]
        others = y[generator.choice(len(y), size, replace=False)]
        within = sum(
            (kernel.sum() - np.trace(kernel)) / (size * (size - 1))
            for kernel in (polynomial_kernel(some, some), polynomial_kernel(others, others))
        )
        found.append(within - 2 * polynomial_kernel(some, others).mean())
    return Estimate(float(np.mean(found)), float(np.std(found)))


# Manifolds of nearest neighbours


@dataclass(frozen=True)
class Manifolds:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Attributes:
        precise: [N] bool, which generated images lie in a ball of the reference.
        recalled: [M] bool, which reference images lie in a ball of the generated ones.
        densities: [N] the balls of the reference that hold each generated image, over k.
        covered: [M] bool, which balls of the reference hold a generated image.
        num_duplicates: reference images that have a copy among the others.
    """

    precise: Array
    recalled: Array
    densities: Array
    covered: Array
    num_duplicates: int


def neighbour_radii(rows: Array, k: int) -> Array:
    """[N] distance of each row to its k-th nearest other."""
    radii = np.empty(len(rows))
    for start, distances in _distance_blocks(rows, rows):
        places = np.arange(len(distances))
        distances[places, places + start] = -1  # itself, exactly, whatever rounding says
        radii[start : start + len(distances)] = np.partition(distances, k, axis=1)[:, k]
    return radii


def copies(rows: Array) -> Array:
    """[N] bool, which rows are an earlier one again but for the last bits, which differ between a network's batches."""
    scale = math.sqrt(((rows - rows.mean(0)) ** 2).sum(1).mean())
    found = np.zeros(len(rows), bool)
    for start, distances in _distance_blocks(rows, rows):
        earlier = np.arange(len(rows))[None] < np.arange(start, start + len(distances))[:, None]
        found[start : start + len(distances)] = ((distances <= SAME_IMAGE * scale) & earlier).any(1)
    return found


def _distance_blocks(first: Array, second: Array) -> Iterator[tuple[int, Array]]:
    """(first row, distances [rows, M]) in blocks. In float64, and after centring, equal rows come out within 1e-7."""
    centre = second.mean(axis=0)
    first, second = first - centre, second - centre
    for start in range(0, len(first), BLOCK_ROWS):
        yield start, np.sqrt(squared_distances(first[start : start + BLOCK_ROWS], second))


def manifolds(generated: Array, reference: Array, k_precision: int = 3, k_density: int = 5) -> Manifolds:
    """Which images lie in the other set's balls: k = 3 and <= for precision and recall, k = 5 and < for the others.

    Copies within the reference have balls of radius 0, so each copy counts once.
    """
    least = max(k_precision, k_density) + 2
    x, everything = as_features(generated, least), as_features(reference, least)
    if x.shape[1] != everything.shape[1]:
        raise NotComputable(f"features of {x.shape[1]} and {everything.shape[1]} dimensions can't be compared")
    y = everything[~copies(everything)]
    if len(y) < least:
        raise NotComputable(f"the reference has {len(y)} different images, at least {least} are needed")
    radii, y_radii, y_narrow = (
        neighbour_radii(x, k_precision),
        neighbour_radii(y, k_precision),
        neighbour_radii(y, k_density),
    )
    precise, densities = np.zeros(len(x), bool), np.zeros(len(x))
    recalled, covered = np.zeros(len(y), bool), np.zeros(len(y), bool)
    for start, distances in _distance_blocks(x, y):
        block = slice(start, start + len(distances))
        precise[block] = (distances <= y_radii).any(1)
        densities[block] = (distances < y_narrow).sum(1) / k_density
        recalled |= (distances <= radii[block, None]).any(0)
        covered |= (distances < y_narrow).any(0)
    return Manifolds(precise, recalled, densities, covered, len(everything) - len(y))


# Spread and sharpness


@dataclass(frozen=True)
class PairSums:
    """Sums over embeddings v of images whose distance is |v - w|^2: enough for the mean over all pairs.

    Attributes:
        count: images.
        vector: [D] sum of v.
        squares: sum of |v|^2.
        by_group: for each group of images that has pairs, the mean distance of its pairs.
    """

    count: int
    vector: Array
    squares: float

    def __add__(self, other: "PairSums") -> "PairSums":
        return PairSums(self.count + other.count, self.vector + other.vector, self.squares + other.squares)

    @staticmethod
    def of(embeddings: Array) -> "PairSums":
        """The sums of embeddings [N, D]."""
        rows = np.asarray(embeddings, np.float64)
        return PairSums(len(rows), rows.sum(0), float((rows**2).sum()))

    @property
    def mean_distance(self) -> float:
        """The mean over all pairs, 2 N / (N - 1) (mean |v|^2 - |mean v|^2).

        Raises:
            NotComputable: if there are no pairs.
        """
        if self.count < 2:
            raise NotComputable(f"{self.count} image has no pair")
        mean = self.vector / self.count
        return max(0.0, 2 * self.count / (self.count - 1) * (self.squares / self.count - float(mean @ mean)))


def vendi_score(features: Array) -> float:
    """exp of the entropy of the eigenvalues of K / N, K the cosines of the features (Friedman and Dieng 2023).

    1 if all images are alike, N if no two have anything in common.
    """
    rows = unit_rows(as_features(features, 1))
    small = rows.T @ rows if rows.shape[1] < len(rows) else rows @ rows.T  # the same eigenvalues but for zeros
    values = np.linalg.eigvalsh(small / len(rows))
    values = values[values > 1e-15]
    return float(np.exp(-(values * np.log(values)).sum()))


def inception_score(logits: Array, num_splits: int = 10) -> Estimate:
    """exp of the mean KL divergence of p(class | image) from p(class) (Salimans et al. 2016): mean and deviation.

    Over `num_splits` consecutive parts, as published; over fewer where there are fewer images.
    """
    rows = as_features(logits, 2)
    shifted = rows - rows.max(1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    count, num_parts = len(logs), min(num_splits, len(logs) // 2)
    scores = []
    for number in range(num_parts):  # the authors' boundaries, also where the parts differ in size
        part = logs[number * count // num_parts : (number + 1) * count // num_parts]
        shares = np.exp(part)
        marginal = np.log(shares.mean(0).clip(1e-300))
        scores.append(math.exp((shares * (part - marginal)).sum(1).mean()))
    return Estimate(float(np.mean(scores)), float(np.std(scores)) if len(scores) > 1 else None)


# Cosines


def unit_rows(rows: Array) -> Array:
    """Rows of length 1, in float64; a row of zeros stays."""
    rows = np.asarray(rows, np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def clip_scores(images: Array, texts: Array) -> Array:
    """[N] 100 * max(cos, 0) of each image's and its text's features [N, d] (Hessel et al. 2021, without their 2.5)."""
    cosines = (unit_rows(as_features(images)) * unit_rows(as_features(texts))).sum(1)
    return 100 * cosines.clip(0)


def nearest_rows(queries: Array, pool: Array) -> tuple[Array, Array]:
    """(the row of the pool with the largest cosine to each query [N], that cosine [N])."""
    x, y = unit_rows(as_features(queries)), unit_rows(as_features(pool))
    rows, cosines = np.empty(len(x), int), np.empty(len(x))
    for start in range(0, len(x), BLOCK_ROWS):
        block = x[start : start + BLOCK_ROWS] @ y.T
        rows[start : start + len(block)] = block.argmax(1)
        cosines[start : start + len(block)] = block.max(1)
    return rows, cosines


# Intervals


def cluster_bootstrap(values: Array, clusters: Array, num_draws: int = 2000, seed: int = 0) -> Interval | None:
    """The 95 % percentile interval of the mean of `values` [N], drawing whole clusters [N] (prompts) with replacement.

    None with fewer than 2 clusters.
    """
    _, of = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(of, values), np.bincount(of)
    if len(sums) < 2:
        return None
    generator = np.random.default_rng(seed)
    means = np.empty(num_draws)
    for draw in range(num_draws):
        chosen = generator.integers(0, len(sums), len(sums))
        means[draw] = sums[chosen].sum() / counts[chosen].sum()
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(low), float(high))


@dataclass(frozen=True)
class PairedDifference:
    """The mean of after - before, its interval, the share of clusters that rose, and the chance of it without a change.

    Attributes:
        probability: two-sided, by flipping the signs of the clusters' differences at random.
    """

    value: float
    interval: Interval | None
    share_higher: float | None
    probability: float | None


def paired_difference(
    before: Array, after: Array, clusters: Array, num_draws: int = 2000, seed: int = 0
) -> PairedDifference:
    """The difference of two scores [N] of the same prompts and seeds, whose prompts [N] are drawn as clusters."""
    differences = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    _, of = np.unique(clusters, return_inverse=True)
    sums = np.bincount(of, differences)
    probability = None
    if len(sums) > 1:
        signs = np.random.default_rng(seed).choice((-1.0, 1.0), (num_draws, len(sums)))
        flipped = np.abs(signs @ sums)
        probability = float((1 + (flipped >= abs(sums.sum()) - 1e-12).sum()) / (num_draws + 1))
    interval = cluster_bootstrap(differences, clusters, num_draws, seed)
    return PairedDifference(float(differences.mean()), interval, float((sums > 0).mean()), probability)


def normal_interval(value: float, error: float) -> Interval:
    """The 95 % interval of a normal estimate."""
    return Interval(value - 1.959964 * error, value + 1.959964 * error)


STUDENT_95: Sequence[float] = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def student_interval(values: Array) -> Interval | None:
    """The 95 % interval of the mean of up to 10 independent values; None of one."""
    if len(values) < 2:
        return None
    factor = STUDENT_95[len(values) - 2] if len(values) - 2 < len(STUDENT_95) else 1.96
    half = factor * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(float(np.mean(values)) - half, float(np.mean(values)) + half)
