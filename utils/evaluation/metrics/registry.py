"""Computes the scores of a set of images with the table of metrics."""

import logging
import math
from collections.abc import Iterable

import numpy as np
import torch

from utils.config.options import first_line
from utils.evaluation.metrics.base import Case, Scores
from utils.evaluation.metrics.distances import Failed, NotComputable
from utils.evaluation.metrics.scores import Score, missing
from utils.evaluation.metrics.table import METRICS

logger = logging.getLogger(__name__)


def score(case: Case, names: Iterable[str]) -> Scores:
    """Returns the scores of a set of images by some metrics; a score that can't be computed has the reason instead.

    A metric that fails is marked as failed, and the others are still computed.
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
    """The score, or a failed score of the same name if its value is not finite."""
    if found.value is None or math.isfinite(found.value):
        return found
    logger.warning("%s failed: its value is not finite", found.name)
    return missing(found.name, "not finite", failed=True)
