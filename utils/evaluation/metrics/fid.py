"""FID, FID-infinity and FD-DINOv2; the Inception Score."""

from dataclasses import replace

import numpy as np

from utils.evaluation.metrics.base import Case, Scores
from utils.evaluation.metrics.distances import (
    NotComputable,
    frechet_by_group,
    frechet_distance,
    frechet_infinity,
    inception_score,
)
from utils.evaluation.metrics.image_sets import Subject
from utils.evaluation.metrics.scores import ByGroup, Score

LEAST_FOR_INFINITY = 60


def seed_groups(case: Case) -> np.ndarray | None:
    """Returns the group number [N] of each image, by its seed; None if there are too few images.

    If prompts have at least as many images as there are groups, each group has the same seeds of every prompt.
    """
    count, samples = case.options.fid_groups, case.subject.images.samples
    if len(samples) < 2 * count:
        return None
    if samples.max() + 1 >= count:
        groups = samples % count
        if np.bincount(groups, minlength=count).min() >= 2:
            return groups
    return np.arange(len(samples)) % count


def _frechet(case: Case, network: str, name: str) -> Scores:
    """The Frechet distance in the features of a network, its extrapolation, and its mean over groups."""
    # Distance of all images.
    reference, features = case.needed_reference(), case.subject.features(network)
    real = reference.moments(network)
    n, d = features.shape
    value = frechet_distance(case.subject.moments(network), real)
    remark = ""
    if n < d:
        remark = f"far too high with {n} images for {d} features; compare only at the same number of images"
    elif n < 50000:
        remark = f"with {n} images: not comparable with an {name.upper()} of 50,000"
    if isinstance(reference, Subject) and len(reference) < d:
        remark += f"; the reference has {len(reference)} images"
    facts = case.facts(network) | {"reference_count": len(reference)}
    settings = {"preparation": case.networks.get(network).settings, "covariance": "unbiased", "arithmetic": "float64"}
    found = [Score(name, value, "lower", settings=settings, remark=remark, **facts)]

    # Mean over groups of images, whose spread gives intervals of differences.
    groups = seed_groups(case)
    if groups is None:
        reason = f"{n} images are too few for {case.options.fid_groups} groups of at least two images"
        by_groups = Score(f"{name}_mean_of_groups", None, "lower", reason=reason)
    else:
        by_groups = _mean_of_groups(f"{name}_mean_of_groups", frechet_by_group(features, real, groups), groups)
        by_groups = replace(by_groups, settings=settings, **facts)

    # Extrapolation to infinitely many images.
    if n >= LEAST_FOR_INFINITY:
        infinite = frechet_infinity(features, real)
        settings = settings | {"extrapolation": "15 subsets of a third to all of the images, a line in 1/N"}
        remark = f"some subsets have fewer images than the {d} features" if n < 3 * d else ""
        found.append(
            Score(
                f"{name}_infinity", infinite.value, "lower", infinite.error, settings=settings, remark=remark, **facts
            )
        )
    else:
        reason = f"{n} images are too few to extrapolate; it needs at least {LEAST_FOR_INFINITY}"
        found.append(Score(f"{name}_infinity", None, "lower", reason=reason))
    return [*found, by_groups]


def _mean_of_groups(name: str, by_group: np.ndarray, groups: np.ndarray) -> Score:
    """The mean distance over groups: far higher than the distance of all images, so only differences are meaningful."""
    size = int(np.bincount(groups).min())
    details = {"groups": len(by_group), "images_of_a_group": size, "deviation_of_groups": float(by_group.std(ddof=1))}
    remark = f"higher than the distance of all images, as each group has {size} images: use it only for differences"
    return Score(name, float(by_group.mean()), "lower", remark=remark, spread=ByGroup(by_group), details=details)


def fid(case: Case) -> Scores:
    """FID: the Frechet distance in the features of the main network, and its limit for infinitely many images."""
    return _frechet(case, "main", "fid")


def fd_dinov2(case: Case) -> Scores:
    """FD-DINOv2: the Frechet distance in DINOv2 features (Stein et al. 2023)."""
    return _frechet(case, "dino", "fd_dinov2")


def inception(case: Case) -> Scores:
    """The Inception Score over 10 parts; another main network uses its own classes instead of ImageNet's."""
    network = case.networks.get("main")
    if network.class_weights is None:
        raise NotComputable(f"the network {network.name} has no classes")
    logits = case.subject.features("main").astype(np.float64) @ network.class_weights.T
    order = np.random.default_rng(0).permutation(len(logits))  # so that each part has images of all prompts
    found = inception_score(logits[order])
    settings = {
        "parts": min(10, len(logits) // 2),
        "classes": len(network.class_weights),
        "preparation": network.settings,
    }
    remark = "only meaningful for images similar to ImageNet" if network.name == "inception" else ""
    deviation = {"deviation_of_parts": found.error}
    facts = case.facts("main")
    return [
        Score("inception_score", found.value, "higher", settings=settings, remark=remark, details=deviation, **facts)
    ]
