"""Diversity of images (LPIPS over all pairs, Vendi score), and their similarity to the training images."""

import numpy as np

from utils.evaluation.metrics.base import Case, Scores
from utils.evaluation.metrics.distances import NotComputable, nearest_rows, vendi_score
from utils.evaluation.metrics.scores import ByImage, Score, missing

MOST_FOR_VENDI = 20000
NEAR = 0.95


def lpips_diversity(case: Case) -> Scores:
    """The mean LPIPS over all pairs of images, and over pairs with the same prompt; exact, in one pass."""
    network = case.networks.get("lpips")
    if len(case.subject) < 2:
        raise NotComputable("it needs pairs of images; draw at least 2 images (--num_images)")
    total, means, clusters = case.subject.pair_sums("lpips")
    settings = {"trunk": network.settings, "input": "[-1, 1]", "definition": "mean over all pairs"}
    facts = case.facts("lpips")
    scores = [Score("lpips_diversity", total.mean_distance, "higher", settings=settings, **facts)]
    if not len(means):
        reason = "no prompt has 2 images; draw at least 2 per prompt (--images_per_prompt)"
        return [*scores, missing("lpips_within_prompts", reason)]
    within = settings | {"definition": "mean over prompts of the mean over a prompt's pairs", "prompts": len(means)}
    spread = ByImage(means, clusters)
    return [
        *scores,
        Score("lpips_within_prompts", float(means.mean()), "higher", settings=within, spread=spread, **facts),
    ]


def vendi(case: Case) -> Scores:
    """The Vendi score in the features of the main network: the effective number of different images."""
    if len(case.subject) > MOST_FOR_VENDI and case.subject.features("main").shape[1] > MOST_FOR_VENDI:
        raise NotComputable(f"it takes too long for more than {MOST_FOR_VENDI} images")
    settings = {"kernel": "cosine", "preparation": case.networks.get("main").settings}
    value = vendi_score(case.subject.features("main"))
    return [Score("vendi", value, "higher", settings=settings, **case.facts("main"))]


def memorisation(case: Case) -> Scores:
    """The mean over images of the largest cosine to a training image, with the nearest pairs."""
    if case.training is None:
        raise NotComputable("it compares with the training images; give --training_images")

    # The nearest training image of each image, and the nearest pairs for the report.
    rows, cosines = nearest_rows(case.subject.features("main"), case.training.features("main"))
    order = np.argsort(-cosines, kind="stable")[: case.options.num_duplicate_pairs]
    pairs = [
        {
            "image": case.subject.images.pictures[index].name,
            "image_index": int(index),
            "training_image": case.training.images.pictures[rows[index]].name,
            "training_index": int(rows[index]),
            "cosine": float(cosines[index]),
        }
        for index in order.tolist()
    ]
    settings = {"definition": "largest cosine to a training image", "preparation": case.networks.get("main").settings}
    facts = case.facts("main") | {"reference_count": len(case.training)}
    details = {"share_over_0.95": float((cosines > NEAR).mean()), "nearest_pairs": pairs}
    spread = ByImage(cosines, case.subject.images.clusters)
    return [
        Score(
            "memorisation",
            float(cosines.mean()),
            "lower",
            settings=settings,
            spread=spread,
            details=details,
            by_image=cosines,
            **facts,
        )
    ]
