"""What a weight file says about itself: the fields of ModelSpec, and the marks of a noise schedule.

The fields: https://github.com/Stability-AI/ModelSpec, version 1.0.1. The marks are empty tensors, which ComfyUI and its
relatives look for.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from utils.formats.streaming import HASH_KEY, NO_HASH

VERSION = "1.0.1"
IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
EPOCH = "SOURCE_DATE_EPOCH"  # https://reproducible-builds.org/specs/source-date-epoch/
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


@dataclass(frozen=True)
class ModelFacts:
    """What a weight file says about its model; None for what is unknown, which is left out.

    Attributes:
        architecture: name of the architecture in ModelSpec.
        title: name of the model.
        resolution: width and height in pixels.
        prediction_type: prediction type, as diffusers names it.
        merged_from: the model that training started from.
        licence: its licence, as its own card says.
        encoder_layer: text encoder layer that is read, from the last one, which is 1.
    """

    architecture: str
    title: str
    resolution: tuple[int, int] | None = None
    prediction_type: str | None = None
    merged_from: str | None = None
    licence: str | None = None
    encoder_layer: int | None = None


def modelspec(facts: ModelFacts, adapter: str | None = None) -> dict[str, str]:
    """Returns the metadata of a weight file; `write_streamed` fills in its hash.

    Args:
        facts: what to say.
        adapter: kind of adapter that the file holds, such as lora; None for a whole model.
    """
    architecture = facts.architecture if adapter is None else f"{facts.architecture}/{adapter}"
    size = facts.resolution
    found = {
        "sai_model_spec": VERSION,
        "architecture": architecture,
        "implementation": IMPLEMENTATION,
        "title": facts.title,
        "resolution": None if size is None else f"{size[0]}x{size[1]}",
        "prediction_type": PREDICTIONS.get(facts.prediction_type or ""),
        "date": written_at(),
        "merged_from": facts.merged_from,
        "license": facts.licence,
        "encoder_layer": None if facts.encoder_layer is None else str(facts.encoder_layer),
    }
    return {f"modelspec.{name}": value for name, value in found.items() if value} | {HASH_KEY: NO_HASH}


def written_at() -> str:
    """Returns the time in ISO 8601, or that of SOURCE_DATE_EPOCH, with which equal runs write equal files."""
    given = os.environ.get(EPOCH, "")
    seconds = int(given) if given.isdecimal() else None
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def schedule_marks(scheduler_config: Mapping[str, object]) -> list[str]:
    """Returns the names of the empty tensors that mark a noise schedule."""
    predicts_v = scheduler_config.get("prediction_type") == "v_prediction"
    is_zero = bool(scheduler_config.get("rescale_betas_zero_snr"))
    return [V_MARK] * predicts_v + [ZERO_SNR_MARK] * is_zero
