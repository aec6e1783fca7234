"""The table of metrics, and the scores of a set of images by it."""

import logging
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch

from utils.config.options import first_line
from utils.evaluation.metrics.base import Case, Scores
from utils.evaluation.metrics.clip_score import clip_i, clip_score, dino_i, hpsv2, pickscore
from utils.evaluation.metrics.distances import Failed, NotComputable
from utils.evaluation.metrics.diversity import lpips_diversity, memorisation, vendi
from utils.evaluation.metrics.fid import fd_dinov2, fid, inception
from utils.evaluation.metrics.kid import cmmd, kid, prdc
from utils.evaluation.metrics.scores import Score, missing

logger = logging.getLogger(__name__)


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

    compute: Callable[[Case], Scores]
    network: str
    is_default: bool
    compares: bool
    scores: tuple[str, ...]
    summary: str


METRICS: dict[str, Metric] = {
    "kid": Metric(
        kid,
        "main",
        True,
        True,
        ("kid", "kid_subsets"),
        "distance of the feature distributions, unbiased also of few images",
    ),
    "fid": Metric(
        fid,
        "main",
        True,
        True,
        ("fid", "fid_infinity", "fid_mean_of_groups"),
        "Frechet distance, with FID-infinity and the mean of seed groups, whose difference has an interval",
    ),
    "clip_score": Metric(
        clip_score,
        "clip",
        True,
        False,
        ("clip_score", "clip_score_hessel", "clip_r_precision"),
        "how well images fit their prompts; R-precision",
    ),
    "lpips_diversity": Metric(
        lpips_diversity,
        "lpips",
        True,
        False,
        ("lpips_diversity", "lpips_within_prompts"),
        "perceptual distance of all pairs, within prompts and over all",
    ),
    "prdc": Metric(
        prdc,
        "main",
        True,
        True,
        ("precision", "recall", "density", "coverage"),
        "precision, recall, density and coverage",
    ),
    "inception_score": Metric(inception, "main", False, False, ("inception_score",), "sure and varied classes"),
    "fd_dinov2": Metric(
        fd_dinov2,
        "dino",
        False,
        True,
        ("fd_dinov2", "fd_dinov2_infinity", "fd_dinov2_mean_of_groups"),
        "Frechet distance in DINOv2's features",
    ),
    "cmmd": Metric(
        cmmd,
        "cmmd",
        False,
        True,
        ("cmmd", "cmmd_unbiased"),
        "distance of CLIP's distributions, as published and unbiased",
    ),
    "clip_i": Metric(clip_i, "clip", False, True, ("clip_i",), "similarity to the reference's images in CLIP"),
    "dino_i": Metric(dino_i, "dino", False, True, ("dino_i",), "similarity to the reference's images in DINOv2"),
    "vendi": Metric(vendi, "main", False, False, ("vendi",), "about how many different images there are"),
    "memorisation": Metric(
        memorisation,
        "main",
        False,
        False,
        ("memorisation",),
        "the nearest training image of each, with the nearest pairs",
    ),
    "pickscore": Metric(
        pickscore, "pickscore", False, False, ("pickscore",), "what people would pick, by --pickscore_model"
    ),
    "hpsv2": Metric(hpsv2, "hpsv2", False, False, ("hpsv2",), "human preference, by --hpsv2_model"),
}
DEFAULT_METRICS = tuple(name for name, metric in METRICS.items() if metric.is_default)


def score(case: Case, names: Iterable[str]) -> Scores:
    """The scores of a set of images by some metrics; where there is none, why.

    A metric that fails is listed as failed, and the others are computed.
    """
    found: Scores = []
    for name in names:
        try:
            found += map(_finite, METRICS[name].compute(case))
        except NotComputable as reason:
            found.append(missing(name, str(reason), isinstance(reason, Failed)))
            logger.warning("%s was not computed: %s", name, reason)
        except (
            RuntimeError,
            ValueError,
            IndexError,
            np.linalg.LinAlgError,
            MemoryError,
            torch.OutOfMemoryError,
        ) as error:
            found.append(missing(name, f"{type(error).__name__}: {first_line(error)}", failed=True))
            logger.warning("%s failed: %s", name, first_line(error))
    return found


def _finite(found: Score) -> Score:
    """The score, or a failed one of its name if its value is not finite."""
    if found.value is None or math.isfinite(found.value):
        return found
    logger.warning("%s failed: its value is not finite", found.name)
    return missing(found.name, "not finite", failed=True)
