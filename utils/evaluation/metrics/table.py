"""The table of metrics. It imports nothing heavy: the module of a metric is imported when that is computed."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from utils.config.late import Late

if TYPE_CHECKING:
    from utils.evaluation.metrics.base import Case, Scores


def _of(module: str, name: str) -> Late:
    """A function of a module of this room."""
    return Late(f"utils.evaluation.metrics.{module}", name)


class Metric(NamedTuple):
    """An entry of the table.

    Attributes:
        compute: gives its scores, or raises `NotComputable`.
        network: the network of `NETWORKS` that it needs.
        is_default: whether it is computed where nothing is said.
        compares: whether it needs a reference.
        scores: the names of what it gives.
        summary: what it says, in a line.
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
        "distance of the feature distributions, unbiased also of few images",
    ),
    "fid": Metric(
        _of("fid", "fid"),
        "main",
        True,
        True,
        ("fid", "fid_infinity", "fid_mean_of_groups"),
        "Frechet distance, with FID-infinity and the mean of seed groups, whose difference has an interval",
    ),
    "clip_score": Metric(
        _of("clip_score", "clip_score"),
        "clip",
        True,
        False,
        ("clip_score", "clip_score_hessel", "clip_r_precision"),
        "how well images fit their prompts; R-precision",
    ),
    "lpips_diversity": Metric(
        _of("diversity", "lpips_diversity"),
        "lpips",
        True,
        False,
        ("lpips_diversity", "lpips_within_prompts"),
        "perceptual distance of all pairs, within prompts and over all",
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
        _of("fid", "inception"), "main", False, False, ("inception_score",), "sure and varied classes"
    ),
    "fd_dinov2": Metric(
        _of("fid", "fd_dinov2"),
        "dino",
        False,
        True,
        ("fd_dinov2", "fd_dinov2_infinity", "fd_dinov2_mean_of_groups"),
        "Frechet distance in DINOv2's features",
    ),
    "cmmd": Metric(
        _of("kid", "cmmd"),
        "cmmd",
        False,
        True,
        ("cmmd", "cmmd_unbiased"),
        "distance of CLIP's distributions, as published and unbiased",
    ),
    "clip_i": Metric(
        _of("clip_score", "clip_i"), "clip", False, True, ("clip_i",), "similarity to the reference's images in CLIP"
    ),
    "dino_i": Metric(
        _of("clip_score", "dino_i"), "dino", False, True, ("dino_i",), "similarity to the reference's images in DINOv2"
    ),
    "vendi": Metric(
        _of("diversity", "vendi"), "main", False, False, ("vendi",), "about how many different images there are"
    ),
    "memorisation": Metric(
        _of("diversity", "memorisation"),
        "main",
        False,
        False,
        ("memorisation",),
        "the nearest training image of each, with the nearest pairs",
    ),
    "pickscore": Metric(
        _of("clip_score", "pickscore"),
        "pickscore",
        False,
        False,
        ("pickscore",),
        "what people would pick, by --pickscore_model",
    ),
    "hpsv2": Metric(
        _of("clip_score", "hpsv2"), "hpsv2", False, False, ("hpsv2",), "human preference, by --hpsv2_model"
    ),
}
DEFAULT_METRICS = tuple(name for name, metric in METRICS.items() if metric.is_default)
