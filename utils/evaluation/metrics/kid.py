"""KID, CMMD, precision, recall, density and coverage."""

from utils.evaluation.metrics.base import Case, Scores
from utils.evaluation.metrics.distances import (
    NotComputable,
    gaussian_kernel,
    kernel_distance,
    manifolds,
    polynomial_kernel,
    subset_kid,
    unit_rows,
)
from utils.evaluation.metrics.scores import ByImage, ByJackknife, Score, missing

CMMD_SCALE = 1000
ENOUGH_FOR_MANIFOLDS = 50


def kid(case: Case) -> Scores:
    """KID: the unbiased estimate over all images with its jackknife error, and the conventional mean over subsets."""
    # All images.
    generated, real = case.subject.features("main"), case.needed_reference().features("main")
    found = kernel_distance(generated, real, polynomial_kernel)
    spread = ByJackknife(found.unbiased, found.without_first, found.without_second)
    facts = case.facts("main") | {"reference_count": len(real)}
    settings = {
        "kernel": "(x.y / d + 1)^3",
        "estimator": "unbiased over all images",
        "preparation": case.networks.get("main").settings,
        "arithmetic": "float64",
    }
    scores = [Score("kid", found.unbiased, "lower", spread.error, settings=settings, spread=spread, **facts)]

    # Subsets.
    size, subsets = case.options.kid_subset_size, case.options.kid_subsets
    try:
        conventional = subset_kid(generated, real, size, subsets)
    except NotComputable:
        least = min(len(generated), len(real))
        reason = f"{least} images are too few for subsets of {size} (--kid_subset_size); kid needs no subsets"
        return [*scores, missing("kid_subsets", reason)]
    settings = settings | {"estimator": f"mean over {subsets} subsets of {size}"}
    details = {"deviation_of_subsets": conventional.error}  # subsets overlap: this is not a standard error
    return [*scores, Score("kid_subsets", conventional.value, "lower", settings=settings, details=details, **facts)]


def cmmd(case: Case) -> Scores:
    """CMMD (Jayasumana et al. 2024) times 1000: the published estimator, which is biased, and an unbiased one."""
    generated = unit_rows(case.subject.features("cmmd"))
    real = unit_rows(case.needed_reference().features("cmmd"))
    found = kernel_distance(generated, real, gaussian_kernel)
    scaled = [CMMD_SCALE * each for each in (found.unbiased, found.without_first, found.without_second)]
    spread = ByJackknife(*scaled)
    settings = {
        "kernel": "exp(-|x - y|^2 / 200) of unit vectors, times 1000",
        "preparation": case.networks.get("cmmd").settings,
        "arithmetic": "float64",
    }
    facts = case.facts("cmmd") | {"reference_count": len(real)}
    published = settings | {"estimator": "biased, as published"}
    unbiased = settings | {"estimator": "unbiased"}
    remark = f"biased upwards at {len(generated)} images" if len(generated) < 2000 else ""
    return [
        Score("cmmd", CMMD_SCALE * found.biased, "lower", settings=published, remark=remark, **facts),
        Score("cmmd_unbiased", spread.value, "lower", spread.error, settings=unbiased, spread=spread, **facts),
    ]


def prdc(case: Case) -> Scores:
    """Precision and recall with 3 neighbours, density and coverage with 5."""
    generated, real = case.subject.features("main"), case.needed_reference().features("main")
    found = manifolds(generated, real)

    # Remarks on what limits their meaning.
    clusters = case.subject.images.clusters
    facts = case.facts("main") | {"reference_count": len(real)}
    remarks = []
    if min(len(generated), len(real)) < ENOUGH_FOR_MANIFOLDS:
        remarks.append(f"unreliable with fewer than {ENOUGH_FOR_MANIFOLDS} images")
    if found.num_duplicates:
        remarks.append(f"skipped {found.num_duplicates} duplicates in the reference")
    if not 0.5 < len(generated) / len(real) < 2:
        remarks.append("the sets differ in size, which affects recall and coverage")

    # One score for each; intervals need values by generated image.
    preparation = case.networks.get("main").settings
    by_name = {
        "precision": (found.precise.astype(float), "k = 3, <=", True),
        "recall": (found.recalled.astype(float), "k = 3, <=", False),
        "density": (found.densities, "k = 5, <", True),
        "coverage": (found.covered.astype(float), "k = 5, <", False),
    }
    return [
        Score(
            name,
            float(values.mean()),
            "higher",
            settings={"neighbours": rule, "preparation": preparation, "arithmetic": "float64"},
            remark="; ".join(remarks),
            spread=ByImage(values, clusters) if is_of_images else None,
            **facts,
        )
        for name, (values, rule, is_of_images) in by_name.items()
    ]
