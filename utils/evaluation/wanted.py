"""What an evaluation scores: a pipeline or images, a baseline, each scale of a sweep, or each checkpoint of a run."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from utils.config.config_file import recorded_options
from utils.config.options import UserError
from utils.evaluation.findings import scale_name
from utils.evaluation.script_options import ComparisonOptions, Options
from utils.sampling.pipeline_options import PipelineOptions
from utils.sampling.pipelines import PipelineSpec, load_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")


class Wanted(NamedTuple):
    """Something to score: a pipeline to draw with, or a folder of images.

    Attributes:
        name: its name in the report, and that of its folder of images.
        spec: the pipeline; None for a folder of images.
        images: the folder of images; None for a pipeline.
        step: optimizer steps of a checkpoint.
        scale: the factor of all adapters, in a sweep.
    """

    name: str
    spec: PipelineSpec | None
    images: Path | None = None
    step: int | None = None
    scale: float | None = None


def everything_wanted(options: Options) -> list[Wanted]:
    """Returns what to score; the baseline or the earliest checkpoint is the first.

    Raises:
        UserError: if there are no checkpoints, or their base is unknown.
    """
    pipeline, comparison = options.pipeline, options.comparison
    if pipeline.images is not None:
        own = Wanted("images", None, Path(pipeline.images))
        return [own] if comparison.baseline is None else [Wanted("baseline", None, Path(comparison.baseline)), own]
    shared = {"revision": pipeline.revision, "variant": pipeline.variant, "config": pipeline.pipeline_config}
    if comparison.checkpoints is not None:
        return checkpoints_wanted(Path(comparison.checkpoints), pipeline, shared)
    spec = PipelineSpec(pipeline.pipeline, pipeline.adapters, pipeline.lora_scale, **shared)
    baseline = [] if comparison.baseline is None else [Wanted("baseline", baseline_spec(pipeline, comparison))]
    if pipeline.lora_scales is None:
        return [*baseline, Wanted("pipeline", spec)]
    return [
        *baseline,
        *(Wanted(scale_name(scale), replace(spec, scale=scale), scale=scale) for scale in pipeline.factors),
    ]


def baseline_spec(pipeline: PipelineOptions, comparison: ComparisonOptions) -> PipelineSpec:
    """Returns the baseline's pipeline, which has adapters, scales, configs and a variant of its own."""
    config = comparison.baseline_config or pipeline.pipeline_config
    variant = comparison.baseline_variant
    if variant is None and pipeline.variant is not None:
        files = Path(comparison.baseline).glob(f"**/*.{pipeline.variant}[.-]*")
        variant = pipeline.variant if any(files) else None
    return PipelineSpec(
        comparison.baseline, comparison.baseline_adapters, variant=variant, config=config, flag="--baseline"
    )


def checkpoints_wanted(folder: Path, pipeline: PipelineOptions, shared: dict[str, Any]) -> list[Wanted]:
    """Returns the base pipeline at step 0, if there is one, then each checkpoint of a training run in order.

    Raises:
        UserError: if there are no checkpoints, or the base is unknown.
    """
    # Checkpoints, by step.
    found = sorted((int(match[1]), each) for each in folder.iterdir() if (match := CHECKPOINT.fullmatch(each.name)))
    found = [(step, each) for step, each in found if each.is_dir()]
    if not found:
        raise UserError(f"--checkpoints {folder} contains no checkpoint-N; give the output folder of a training run")

    # The pipeline that they were trained from.
    base = pipeline.pipeline
    if base is None:
        recorded = recorded_options(folder)
        for key, name in (("config", "pretrained_model_config"), ("variant", "variant")):
            shared = shared | {key: shared[key] or recorded.get(name)}
        named = recorded.get("pretrained_model_name_or_path")
        base = named if isinstance(named, str) else None
        if base is None and (folder / "model_index.json").is_file():
            base = str(folder)  # trained from scratch: the exported pipeline has the parts that checkpoints lack
        if base is None:
            raise UserError(f"--checkpoints {folder} does not name its base pipeline; give --pipeline")
    spec = PipelineSpec(base, pipeline.adapters, pipeline.lora_scale, **shared)
    is_result = Path(base).is_dir() and Path(base).resolve() == folder.resolve()
    return [
        *([] if is_result else [Wanted("base", spec, step=0)]),
        *(Wanted(each.name, replace(spec, parts=each), step=step) for step, each in found),
    ]


def load_adapted(wanted: Sequence[Wanted], dtype: torch.dtype) -> "dict[str, DiffusionPipeline]":
    """Loads each pipeline with adapters once, so that an adapter that can't be used ends a run before it draws.

    Returns:
        The pipeline that is drawn with first, by its name, if it was loaded: it need not be loaded again.

    Raises:
        UserError: as `load_pipeline`.
    """
    # Scales and checkpoints change nothing about whether adapters fit.
    first: dict[tuple, Wanted] = {}
    for each in wanted:
        if each.spec is not None and each.spec.adapters:
            adapters = tuple(adapter.source for adapter in each.spec.adapters)
            first.setdefault((each.spec.path, each.spec.config, adapters), each)

    # One is in memory at a time; the first to draw with is the last to be loaded.
    for each in reversed(first.values()):
        pipeline = load_pipeline(each.spec, dtype)
        if each is wanted[0]:
            return {each.name: pipeline}
        del pipeline
    return {}
