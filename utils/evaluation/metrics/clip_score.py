"""Scores of CLIP-like models: similarity of image and prompt, and of image and reference."""

import numpy as np

from utils.evaluation.metrics.base import Case, Scores
from utils.evaluation.metrics.distances import NotComputable, clip_scores, unit_rows
from utils.evaluation.metrics.features import ClipFeatures
from utils.evaluation.metrics.scores import ByImage, Score

HESSEL_FACTOR = 2.5
BLOCK = 1024


def _texts(case: Case, network: str) -> tuple[np.ndarray, int]:
    """(features [N, d] of the prompt of each image, number of truncated prompts)."""
    prompts = list(case.prompts())
    distinct = list(dict.fromkeys(prompts))
    clip: ClipFeatures = case.networks.get(network)
    found, num_cut = clip.texts(distinct, case.networks.device)
    if not np.isfinite(found).all():
        bad = int((~np.isfinite(found).all(1)).nonzero()[0][0])
        raise NotComputable(f"the {clip.name} features of the prompt {distinct[bad]!r} are not finite")
    rows = {prompt: row for row, prompt in enumerate(distinct)}
    return found[[rows[prompt] for prompt in prompts]], num_cut


def clip_score(case: Case) -> Scores:
    """CLIP score, mean of 100 * max(cos, 0); Hessel et al. (2021), mean of 2.5 * max(cos, 0); R-precision."""
    # Similarity of each image to its own prompt.
    texts, num_cut = _texts(case, "clip")
    images, clusters = case.subject.features("clip"), case.subject.images.clusters
    values = clip_scores(images, texts)
    clip: ClipFeatures = case.networks.get("clip")
    settings = {"model": case.networks.options.clip_model, "preparation": clip.settings, "prompts_cut": num_cut}
    facts = case.facts("clip")
    remark = f"{num_cut} prompts were truncated to the length of the text encoder" if num_cut else ""
    scores = [
        Score(
            "clip_score",
            float(values.mean()),
            "higher",
            settings=settings | {"definition": "mean over pairs of 100 * max(cos, 0)"},
            remark=remark,
            spread=ByImage(values, clusters),
            by_image=values,
            **facts,
        ),
        Score(
            "clip_score_hessel",
            float(values.mean() / 100 * HESSEL_FACTOR),
            "higher",
            settings=settings | {"definition": "mean over pairs of 2.5 * max(cos, 0), no prefix"},
            spread=ByImage(values / 100 * HESSEL_FACTOR, clusters),
            **facts,
        ),
    ]

    # Retrieval: whether an image is most similar to its own prompt among all prompts.
    prompts = case.prompts()
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < 2:
        reason = "it needs at least 2 different prompts"
        return [*scores, Score("clip_r_precision", None, "higher", reason=reason)]
    pool = unit_rows(texts[[prompts.index(prompt) for prompt in distinct]])
    number = {prompt: row for row, prompt in enumerate(distinct)}
    right, unit = [], unit_rows(images)
    own = np.array([number[prompt] for prompt in prompts])
    for start in range(0, len(unit), BLOCK):
        right.append((unit[start : start + BLOCK] @ pool.T).argmax(1) == own[start : start + BLOCK])
    hits = np.concatenate(right).astype(float)
    definition = f"share of images whose own prompt has the largest cosine of {len(distinct)}"
    retrieval = Score(
        "clip_r_precision",
        float(hits.mean()),
        "higher",
        settings=settings | {"definition": definition},
        spread=ByImage(hits, clusters),
        **facts,
    )
    return [*scores, retrieval]


def _similarity(case: Case, network: str, name: str) -> Scores:
    """The mean cosine between generated and reference images in the features of a network."""
    reference = case.reference_images()
    generated, real = unit_rows(case.subject.features(network)), unit_rows(reference.features(network))
    values = generated @ real.mean(0)  # the mean of all cosines
    settings = {
        "definition": "mean cosine of each image to all of the reference",
        "preparation": case.networks.get(network).settings,
    }
    spread = ByImage(values, case.subject.images.clusters)
    facts = case.facts(network) | {"reference_count": len(reference)}
    return [Score(name, float(values.mean()), "higher", settings=settings, spread=spread, by_image=values, **facts)]


def clip_i(case: Case) -> Scores:
    """CLIP-I (Ruiz et al. 2023): the mean cosine between CLIP features of generated and reference images."""
    return _similarity(case, "clip", "clip_i")


def dino_i(case: Case) -> Scores:
    """DINO-I: the mean cosine between DINOv2 features of generated and reference images."""
    return _similarity(case, "dino", "dino_i")


def pickscore(case: Case) -> Scores:
    """PickScore (Kirstain et al. 2023): logit scale of the model times the cosine of image and prompt."""
    return _preference(case, "pickscore", lambda clip: clip.scale, "logit scale times cosine")


def hpsv2(case: Case) -> Scores:
    """HPSv2 (Wu et al. 2023): 100 times the cosine of image and prompt."""
    return _preference(case, "hpsv2", lambda _: 100.0, "100 times the cosine")


def _preference(case: Case, network: str, factor, definition: str) -> Scores:
    """The mean of a factor times the cosine of image and prompt."""
    clip: ClipFeatures = case.networks.get(network)
    texts, num_cut = _texts(case, network)
    cosines = (unit_rows(case.subject.features(network)) * unit_rows(texts)).sum(1)
    values = factor(clip) * cosines
    model = getattr(case.networks.options, f"{network}_model")
    settings = {"model": model, "definition": definition, "preparation": clip.settings, "prompts_cut": num_cut}
    spread = ByImage(values, case.subject.images.clusters)
    facts = case.facts(network) | {"network": network}
    return [Score(network, float(values.mean()), "higher", settings=settings, spread=spread, by_image=values, **facts)]
