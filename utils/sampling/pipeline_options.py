"""Options that name what to draw with: a pipeline, the adapters on top of it, and their scales."""

import math
from dataclasses import dataclass
from pathlib import Path

from utils.config.flag_rules import OnHub
from utils.config.options import option, require
from utils.models.options import weight_files
from utils.models.scaled_adapters import ScaledAdapter, parse_adapters
from utils.runtime.hub_files import require_model

MODEL_CURE = "give a folder, a Hub name or a .safetensors file"


def require_adapters(flag: str, words: list[str] | None) -> tuple[ScaledAdapter, ...]:
    """Returns the adapters that a flag names.

    Raises:
        UserError: for an adapter that does not exist, is named twice, or has a scale that is not finite.
    """
    found = parse_adapters(flag, words)
    for each in found:
        require_model(flag, each.source, MODEL_CURE, (".safetensors",))
    return found


@dataclass(frozen=True)
class PipelineOptions:
    pipeline: str | None = option(None, "pipeline to draw from: a folder, a Hub name or a single .safetensors file")
    pipeline_config: str | None = option(
        None,
        "pipeline folder or Hub name with the configs of a single-file --pipeline; by default beside it or on the Hub",
        acts_with=(*weight_files("pipeline", "baseline"), "checkpoints"),
    )
    lora: list[str] | None = option(
        None,
        "LoRAs to load into the pipeline, each a folder, .safetensors file or Hub name; NAME=0.8 sets its scale, which "
        "is 1 by default",
        is_repeatable=True,
    )
    lora_scale: float = option(
        1.0, "factor by which the scale of each --lora is multiplied", acts_with=("lora", "checkpoints")
    )
    lora_scales: list[float] | None = option(
        None,
        "draw and score all images at each of these factors, such as 0 0.5 1; the report shows them side by side",
        is_repeatable=True,
    )
    revision: str | None = option(
        None, "Hub revision of the pipeline: branch, tag or commit", acts_with=(OnHub("pipeline"), "checkpoints")
    )
    variant: str | None = option(None, "variant of the weight files, such as fp16")
    images: str | None = option(None, "folder of existing images to score, instead of drawing any")

    def __post_init__(self) -> None:
        if self.images is not None:
            require(Path(self.images).is_dir(), "images", self.images, "be a folder that exists")
        require_model("pipeline", self.pipeline, MODEL_CURE, (".safetensors",))
        require_adapters("lora", self.lora)
        require(math.isfinite(self.lora_scale), "lora_scale", self.lora_scale, "be a finite number")
        for scale in self.lora_scales or ():
            require(math.isfinite(scale), "lora_scales", scale, "be finite numbers")
        require_model("pipeline_config", self.pipeline_config, "give a pipeline folder or a Hub name")

    @property
    def adapters(self) -> tuple[ScaledAdapter, ...]:
        """The adapters of --lora with their own scales."""
        return parse_adapters("lora", self.lora)

    @property
    def factors(self) -> tuple[float, ...]:
        """The factors of a sweep, each once and in the order given; empty without one."""
        return tuple(dict.fromkeys(self.lora_scale * scale + 0.0 for scale in self.lora_scales or ()))
