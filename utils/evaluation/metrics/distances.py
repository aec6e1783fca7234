"""The mathematics of the scores, in float64: distances between sets of features, diversity, and intervals.

Sets of features are arrays [N, d], one row per image. A score that can't be computed raises `NotComputable` with the
reason; it never gets a substitute value.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
BLOCK_ROWS = 1024
SAME_IMAGE = 1e-5  # distance of duplicates, relative to the spread of the features


class NotComputable(Exception):  # noqa: N818  not an error: the images do not have this score
    """A score can't be computed for these images; the message says why."""


class Failed(NotComputable):
    """A score should have been computable, but something failed, such as a feature that is not finite."""


@dataclass(frozen=True)
class Moments:
    """Mean [d] and unbiased covariance [d, d] of `count` features, in float64."""

    mean: Array
    covariance: Array
    count: int


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, None if that is unknown."""

    value: float
    error: float | None = None


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float


def as_features(features: Array, least: int = 1) -> Array:
    """Returns features as float64 [N, d].

    Raises:
        NotComputable: if there are fewer than `least`.
        Failed: if one is not finite.
    """
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2:
        raise NotComputable(f"features must be [N, d], got {list(rows.shape)}")
    if len(rows) < least:
        raise NotComputable(f"{len(rows)} images are too few; it needs at least {least}")
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=1)).nonzero()[0][0])
        raise Failed(f"the features of image {bad} are not finite")
    return rows


# Frechet distance


def moments(features: Array) -> Moments:
    """Returns mean and covariance of features [N, d], N at least 2."""
    rows = as_features(features, 2)
    mean = rows.mean(axis=0)
    centred = rows - mean
    return Moments(mean, centred.T @ centred / (len(rows) - 1), len(rows))


def square_root(symmetric: Array) -> Array:
    """Returns the square root [d, d] of a covariance [d, d]."""
    values, vectors = np.linalg.eigh(symmetric)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def frechet_distance(first: Moments, second: Moments, root: Array | None = None) -> float:
    """Returns the squared Frechet distance of two Gaussians (Heusel et al. 2017, equation 6).

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)); the last trace is the sum of the square roots of the
    eigenvalues of S2^(1/2) S1 S2^(1/2). That matrix is symmetric, so no square root of a non-symmetric one is needed.

    Args:
        root: S2^(1/2), if it is known.
    """
    if first.mean.shape != second.mean.shape:
        raise NotComputable(f"features of {len(first.mean)} and {len(second.mean)} dimensions can't be compared")
    root = square_root(second.covariance) if root is None else root
    product = root @ first.covariance @ root
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    difference = first.mean - second.mean
    return float(difference @ difference + np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross)


def frechet_infinity(features: Array, reference: Moments, seed: int = 0, num_points: int = 15) -> Estimate:
    """Returns the Frechet distance extrapolated to infinitely many images (Chong and Forsyth 2020).

    A line in 1/N is fitted to the distances of `num_points` random subsets, of sizes from a third of the set to all of
    it, and evaluated at 0. The error is that of the intercept; as the subsets overlap, it is a lower bound.
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
    """Returns the Frechet distances [G] of disjoint groups of images; `groups` [N] has the group of each image."""
    rows, root = as_features(features, 2), square_root(reference.covariance)
    return np.array([frechet_distance(moments(rows[groups == group]), reference, root) for group in np.unique(groups)])


# Kernel distances

Kernel = Callable[[Array, Array], Array]


def polynomial_kernel(first: Array, second: Array) -> Array:
    """Returns [N, M], (x.y / d + 1)^3 of each pair (Binkowski et al. 2018)."""
    return (first @ second.T / first.shape[1] + 1) ** 3


def gaussian_kernel(first: Array, second: Array, sigma: float = 10.0) -> Array:
    """Returns [N, M], exp(-|x - y|^2 / (2 sigma^2)) of each pair."""
    return np.exp(-squared_distances(first, second) / (2 * sigma**2))


def squared_distances(first: Array, second: Array) -> Array:
    """Returns [N, M], the squared Euclidean distance of each pair, never below 0."""
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1)[None] - 2 * first @ second.T
    return squares.clip(0)


def _row_sums(first: Array, second: Array, kernel: Kernel) -> tuple[Array, Array, Array]:
    """(sum of each row [N], sum of each column [M], diagonal) of the kernel matrix, computed in blocks of rows."""
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
        unbiased: the U-statistic, which leaves out the diagonals of the kernel matrices; may be below 0.
        biased: the V-statistic, which includes the diagonals.
        without_first: [N], the U-statistic without each sample of the first set.
        without_second: [M], the U-statistic without each sample of the second set.
    """

    unbiased: float
    biased: float
    without_first: Array
    without_second: Array

    @property
    def error(self) -> float:
        """The jackknife standard error of the U-statistic, over both sets."""
        return jackknife_error(self.without_first, self.without_second)


def kernel_distance(first: Array, second: Array, kernel: Kernel) -> KernelDistance:
    """Returns the squared maximum mean discrepancy (Gretton et al. 2012, equations 3 and 5) with delete-one values.

    Each set needs 3 samples, so that pairs remain when one is left out.
    """
    # Sums of the kernel matrices.
    x, y = as_features(first, 3), as_features(second, 3)
    if x.shape[1] != y.shape[1]:
        raise NotComputable(f"features of {x.shape[1]} and {y.shape[1]} dimensions can't be compared")
    n, m = len(x), len(y)
    x_rows, _, x_diagonal = _row_sums(x, x, kernel)
    y_rows, _, y_diagonal = _row_sums(y, y, kernel)
    cross_rows, cross_columns, _ = _row_sums(x, y, kernel)
    within_x, within_y, cross = (x_rows - x_diagonal).sum(), (y_rows - y_diagonal).sum(), cross_rows.sum()
    mean_x, mean_y = within_x / (n * (n - 1)), within_y / (m * (m - 1))

    # The U-statistic without each sample in turn.
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
    """Returns the standard error of a statistic of independent sets from its delete-one values for each set."""
    return math.sqrt(sum((len(each) - 1) / len(each) * ((each - each.mean()) ** 2).sum() for each in without_one))


def subset_kid(first: Array, second: Array, size: int = 1000, num_subsets: int = 100, seed: int = 0) -> Estimate:
    """Returns the conventional KID: mean and deviation over random subsets. These overlap: it is no standard error."""
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
        precise: [N] bool, whether a generated image lies in a ball of the reference.
        recalled: [M] bool, whether a reference image lies in a ball of the generated images.
        densities: [N], number of reference balls that contain a generated image, divided by k.
        covered: [M] bool, whether a reference ball contains a generated image.
        num_duplicates: number of reference images that duplicate another one.
    """

    precise: Array
    recalled: Array
    densities: Array
    covered: Array
    num_duplicates: int


def neighbour_radii(rows: Array, k: int) -> Array:
    """Returns [N], the distance of each row to its k-th nearest neighbour."""
    radii = np.empty(len(rows))
    for start, distances in _distance_blocks(rows, rows):
        places = np.arange(len(distances))
        distances[places, places + start] = -1  # the row itself comes first, despite rounding
        radii[start : start + len(distances)] = np.partition(distances, k, axis=1)[:, k]
    return radii


def copies(rows: Array) -> Array:
    """Returns [N] bool, whether a row repeats an earlier one up to rounding, which differs between batches."""
    scale = math.sqrt(((rows - rows.mean(0)) ** 2).sum(1).mean())
    found = np.zeros(len(rows), bool)
    for start, distances in _distance_blocks(rows, rows):
        earlier = np.arange(len(rows))[None] < np.arange(start, start + len(distances))[:, None]
        found[start : start + len(distances)] = ((distances <= SAME_IMAGE * scale) & earlier).any(1)
    return found


def _distance_blocks(first: Array, second: Array) -> Iterator[tuple[int, Array]]:
    """Yields (first row, distances [rows, M]) in blocks; after centring, equal rows have distances below 1e-7."""
    centre = second.mean(axis=0)
    first, second = first - centre, second - centre
    for start in range(0, len(first), BLOCK_ROWS):
        yield start, np.sqrt(squared_distances(first[start : start + BLOCK_ROWS], second))


def manifolds(generated: Array, reference: Array, k_precision: int = 3, k_density: int = 5) -> Manifolds:
    """Returns which images lie in balls of the other set, whose radii reach the k-th nearest neighbour.

    Precision and recall use k = 3 and <=, density and coverage k = 5 and <. Duplicates in the reference would have
    balls of radius 0, so only the first of them counts.
    """
    # Features without duplicates in the reference.
    least = max(k_precision, k_density) + 2
    x, everything = as_features(generated, least), as_features(reference, least)
    if x.shape[1] != everything.shape[1]:
        raise NotComputable(f"features of {x.shape[1]} and {everything.shape[1]} dimensions can't be compared")
    y = everything[~copies(everything)]
    if len(y) < least:
        raise NotComputable(f"the reference has {len(y)} different images; it needs at least {least}")

    # Radii of the balls, and which images lie in them.
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


# Diversity


@dataclass(frozen=True)
class PairSums:
    """Sums over embeddings v, from which the mean distance |v - w|^2 over all pairs follows.

    Attributes:
        count: number of images.
        vector: [D], sum of v.
        squares: sum of |v|^2.
    """

    count: int
    vector: Array
    squares: float

    def __add__(self, other: "PairSums") -> "PairSums":
        return PairSums(self.count + other.count, self.vector + other.vector, self.squares + other.squares)

    @staticmethod
    def of(embeddings: Array) -> "PairSums":
        """Returns the sums of embeddings [N, D]."""
        rows = np.asarray(embeddings, np.float64)
        return PairSums(len(rows), rows.sum(0), float((rows**2).sum()))

    @property
    def mean_distance(self) -> float:
        """The mean distance over all pairs, 2 N / (N - 1) (mean |v|^2 - |mean v|^2).

        Raises:
            NotComputable: if there are no pairs.
        """
        if self.count < 2:
            raise NotComputable(f"{self.count} image is too few; it needs at least 2")
        mean = self.vector / self.count
        return max(0.0, 2 * self.count / (self.count - 1) * (self.squares / self.count - float(mean @ mean)))


def vendi_score(features: Array) -> float:
    """Returns the Vendi score (Friedman and Dieng 2023): exp of the entropy of the eigenvalues of K / N, K the cosines.

    It is 1 if all images are equal, and N if all features are orthogonal.
    """
    rows = unit_rows(as_features(features, 1))
    small = rows.T @ rows if rows.shape[1] < len(rows) else rows @ rows.T  # same eigenvalues, except for zeros
    values = np.linalg.eigvalsh(small / len(rows))
    values = values[values > 1e-15]
    return float(np.exp(-(values * np.log(values)).sum()))


def inception_score(logits: Array, num_splits: int = 10) -> Estimate:
    """Returns the Inception Score (Salimans et al. 2016), mean and deviation over parts of the images.

    It is exp of the mean KL divergence of p(class | image) from p(class). The images are split into `num_splits`
    consecutive parts, as published, or fewer if there are too few images.
    """
    rows = as_features(logits, 2)
    shifted = rows - rows.max(1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    count, num_parts = len(logs), min(num_splits, len(logs) // 2)
    scores = []
    for number in range(num_parts):  # boundaries as in the original code, even if the parts differ in size
        part = logs[number * count // num_parts : (number + 1) * count // num_parts]
        shares = np.exp(part)
        marginal = np.log(shares.mean(0).clip(1e-300))
        scores.append(math.exp((shares * (part - marginal)).sum(1).mean()))
    return Estimate(float(np.mean(scores)), float(np.std(scores)) if len(scores) > 1 else None)


# Cosines


def unit_rows(rows: Array) -> Array:
    """Returns the rows normalised to length 1, in float64; a row of zeros stays."""
    rows = np.asarray(rows, np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def clip_scores(images: Array, texts: Array) -> Array:
    """Returns [N], 100 * max(cos, 0) of image and text features [N, d] (Hessel et al. 2021, without the factor 2.5)."""
    cosines = (unit_rows(as_features(images)) * unit_rows(as_features(texts))).sum(1)
    return 100 * cosines.clip(0)


def nearest_rows(queries: Array, pool: Array) -> tuple[Array, Array]:
    """Returns (row of the pool with the largest cosine to each query [N], that cosine [N])."""
    x, y = unit_rows(as_features(queries)), unit_rows(as_features(pool))
    rows, cosines = np.empty(len(x), int), np.empty(len(x))
    for start in range(0, len(x), BLOCK_ROWS):
        block = x[start : start + BLOCK_ROWS] @ y.T
        rows[start : start + len(block)] = block.argmax(1)
        cosines[start : start + len(block)] = block.max(1)
    return rows, cosines


# Intervals


def cluster_bootstrap(values: Array, clusters: Array, num_draws: int = 2000, seed: int = 0) -> Interval | None:
    """Returns the 95 % percentile interval of the mean of `values` [N] by a bootstrap over `clusters` [N] (prompts).

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
    """The mean of after - before, its interval, the share of clusters that increased, and its p-value.

    Attributes:
        probability: two-sided p-value of a permutation test that flips the signs of the clusters' differences.
    """

    value: float
    interval: Interval | None
    share_higher: float | None
    probability: float | None


def paired_difference(
    before: Array, after: Array, clusters: Array, num_draws: int = 2000, seed: int = 0
) -> PairedDifference:
    """Returns the difference of two scores [N] on the same prompts and seeds; `clusters` [N] has the prompts."""
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
    """Returns the 95 % interval of a normally distributed estimate."""
    return Interval(value - 1.959964 * error, value + 1.959964 * error)


STUDENT_95: Sequence[float] = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def student_interval(values: Array) -> Interval | None:
    """Returns the 95 % interval of the mean of up to 10 independent values; None for a single value."""
    if len(values) < 2:
        return None
    factor = STUDENT_95[len(values) - 2] if len(values) - 2 < len(STUDENT_95) else 1.96
    half = factor * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(float(np.mean(values)) - half, float(np.mean(values)) + half)
