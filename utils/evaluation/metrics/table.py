"""The table of metrics. It imports nothing heavy: the module of a metric is imported when the metric is computed."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from utils.config.late import Late

if TYPE_CHECKING:
    from utils.evaluation.metrics.base import Case, Scores


def _of(module: str, name: str) -> Late:
    """A function in a module of this folder, imported on its first call."""
    return Late(f"utils.evaluation.metrics.{module}", name)


class Metric(NamedTuple):
    """An entry of the table.

    Attributes:
        compute: returns the scores, or raises `NotComputable`.
        network: the name in `NETWORKS` of the network that it needs.
        is_default: whether it is computed by default.
        compares: whether it needs a reference.
        scores: the names of its scores.
        summary: what it measures, in one line.
    """

    compute: Callable[["Case"], "Scores"]
    network: str
    is_default: bool
    compares: bool
    scores: tuple[str, ...]
    summary: str


METRICS: dict[str, Metric] = {
    "kid": Metric(
        _of("kid", "kid"),
        "main",
        True,
        True,
        ("kid", "kid_subsets"),
        "distance between feature distributions, unbiased for any number of images",
    ),
    "fid": Metric(
        _of("fid", "fid"),
        "main",
        True,
        True,
        ("fid", "fid_infinity", "fid_mean_of_groups"),
        "Frechet distance, FID-infinity, and the mean over seed groups, whose differences have intervals",
    ),
    "clip_score": Metric(
        _of("clip_score", "clip_score"),
        "clip",
        True,
        False,
        ("clip_score", "clip_score_hessel", "clip_r_precision"),
        "similarity of images and prompts; R-precision",
    ),
    "lpips_diversity": Metric(
        _of("diversity", "lpips_diversity"),
        "lpips",
        True,
        False,
        ("lpips_diversity", "lpips_within_prompts"),
        "mean perceptual distance of pairs, of the same prompt and of all images",
    ),
    "prdc": Metric(
        _of("kid", "prdc"),
        "main",
        True,
        True,
        ("precision", "recall", "density", "coverage"),
        "precision, recall, density and coverage",
    ),
    "inception_score": Metric(
        _of("fid", "inception"), "main", False, False, ("inception_score",), "confidence and diversity of classes"
    ),
    "fd_dinov2": Metric(
        _of("fid", "fd_dinov2"),
        "dino",
        False,
        True,
        ("fd_dinov2", "fd_dinov2_infinity", "fd_dinov2_mean_of_groups"),
        "Frechet distance in DINOv2 features",
    ),
    "cmmd": Metric(
        _of("kid", "cmmd"),
        "cmmd",
        False,
        True,
        ("cmmd", "cmmd_unbiased"),
        "distance between CLIP feature distributions, as published and unbiased",
    ),
    "clip_i": Metric(
        _of("clip_score", "clip_i"), "clip", False, True, ("clip_i",), "similarity to the reference images in CLIP"
    ),
    "dino_i": Metric(
        _of("clip_score", "dino_i"), "dino", False, True, ("dino_i",), "similarity to the reference images in DINOv2"
    ),
    "vendi": Metric(
        _of("diversity", "vendi"), "main", False, False, ("vendi",), "effective number of different images"
    ),
    "memorisation": Metric(
        _of("diversity", "memorisation"),
        "main",
        False,
        False,
        ("memorisation",),
        "similarity of images to their nearest training images, with the nearest pairs",
    ),
    "pickscore": Metric(
        _of("clip_score", "pickscore"),
        "pickscore",
        False,
        False,
        ("pickscore",),
        "human preference, by --pickscore_model",
    ),
    "hpsv2": Metric(
        _of("clip_score", "hpsv2"), "hpsv2", False, False, ("hpsv2",), "human preference, by --hpsv2_model"
    ),
}
DEFAULT_METRICS = tuple(name for name, metric in METRICS.items() if metric.is_default)
