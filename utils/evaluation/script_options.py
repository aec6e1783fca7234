"""The options of evaluate_pipeline.py, and which of them go together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.config.first_checks import announce
from utils.config.options import UserError, nearest, option, parse, require, require_positive
from utils.config.output_folder import refuse_same_folder
from utils.config.terminal import set_up_logging
from utils.evaluation.metrics.table import DEFAULT_METRICS, METRICS
from utils.evaluation.options import FeatureOptions, ReferenceOptions, ScoreOptions
from utils.models.options import LoadingOptions
from utils.runtime.hub_files import require_model
from utils.runtime.options import PRECISIONS
from utils.sampling.options import (
    DRAWING,
    MODEL_CURE,
    GenerationOptions,
    PipelineOptions,
    PromptOptions,
    SamplingControlOptions,
)

PURPOSE = "Draws images from any diffusers pipeline, on one GPU or many, scores them, and writes a report."


@dataclass(frozen=True)
class RunOptions:
    output_dir: str = option("evaluation", "folder of the images and the report; a stopped run there continues")
    overwrite_output_dir: bool = option(False, "replace images there that were drawn with other settings")
    metrics: list[str] | None = option(
        None,
        f"what is computed, by default {', '.join(DEFAULT_METRICS)}; or all, or none",
        choices=(*METRICS, "all", "none"),
    )
    seed: int = option(0, "every image follows from it, its prompt's number and its own")
    mixed_precision: str | None = option(
        None, "arithmetic of the pipeline; by default what `accelerate launch` says", choices=tuple(PRECISIONS)
    )
    allow_tf32: bool = option(False, "matrix products in TF32 on Ampere and later GPUs")
    title: str | None = option(None, "the report's", is_text=True)
    report_prompts: int = option(24, "prompts whose images the report shows")
    export_geneval: str | None = option(
        None, "folder to write the images to in GenEval's layout, for its own tool", acts_with=DRAWING
    )

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "be from 0 to 2**63 - 1")
        require_positive(self, "report_prompts")

    @property
    def names(self) -> list[str]:
        """The metrics to compute, each once."""
        asked = list(dict.fromkeys(DEFAULT_METRICS if self.metrics is None else self.metrics))
        return list(METRICS) if "all" in asked else [name for name in asked if name != "none"]


@dataclass(frozen=True)
class ComparisonOptions:
    baseline: str | None = option(
        None, "pipeline to compare with, on the same prompts and seeds; with --images a folder of its images"
    )
    labels: list[str] | None = option(
        None, "what the report calls the baseline and the pipeline, in this order", is_text=True
    )
    baseline_lora: str | None = option(None, "LoRA on top of the baseline")
    checkpoints: str | None = option(
        None, "output folder of a training: each of its checkpoints is scored, and the best one found"
    )
    best_by: str | None = option(None, "score by which the best checkpoint is chosen; by default the first computed")

    def __post_init__(self) -> None:
        folder = self.checkpoints
        require(folder is None or Path(folder).is_dir(), "checkpoints", folder, "be a folder that exists")
        if self.baseline is not None and self.checkpoints is not None:
            raise UserError("--baseline compares two pipelines and --checkpoints many; give one")
        if self.labels is not None:
            count = 1 if self.baseline is None else 2
            fits = len(set(self.labels)) == len(self.labels) == count and self.checkpoints is None
            must = "be two names with a --baseline, one without, none with --checkpoints"
            require(fits, "labels", " ".join(self.labels), must)
        if self.baseline_lora is not None and self.baseline is None:
            raise UserError("--baseline_lora goes on top of a --baseline")
        for name in ("baseline", "baseline_lora"):
            require_model(name, getattr(self, name), MODEL_CURE, (".safetensors",))
        if self.best_by is not None and self.checkpoints is None:
            raise UserError("--best_by chooses among --checkpoints; give both or neither")


@dataclass(frozen=True)
class Options:
    """All options of this script, by group."""

    pipeline: PipelineOptions
    loading: LoadingOptions
    prompts: PromptOptions
    generation: GenerationOptions
    controls: SamplingControlOptions
    reference: ReferenceOptions
    features: FeatureOptions
    scores: ScoreOptions
    comparison: ComparisonOptions
    run: RunOptions


def read_options(argv: Sequence[str] | None) -> Options:
    """The options given; refuses those that don't go together, before torch is loaded.

    Raises:
        UserError: for a flag that is unknown, or a value that it does not take.
    """
    set_up_logging()
    options: Options = parse(Options, argv, PURPOSE)
    check_together(options)
    sources = {"model": options.pipeline.pipeline, "reference": options.reference.reference}
    announce(sources, options.run.output_dir, takes_used_folder=True)
    return options


def check_together(options: Options) -> None:
    """Refuses options that do not go together."""
    pipeline, comparison, prompts = options.pipeline, options.comparison, options.prompts
    read = {
        "images": [pipeline.images],
        "reference": [options.reference.reference],
        "training_images": [options.reference.training_images],
        "captions_dir": [prompts.captions_dir],
        "init_images": [prompts.init_images],
        "baseline": [comparison.baseline],
    }
    refuse_same_folder({"output_dir": options.run.output_dir, "export_geneval": options.run.export_geneval}, read)
    given = [
        name for name, value in (("pipeline", pipeline.pipeline), ("images", pipeline.images)) if value is not None
    ]
    if len(given) != 1 and not (comparison.checkpoints is not None and not given):
        raise UserError("--pipeline PATH says what to draw from, or --images FOLDER what was drawn; give one of them")
    if pipeline.images is not None:
        if comparison.checkpoints is not None:
            raise UserError("--checkpoints are drawn from; leave out --images")
        if prompts.init_images is not None or prompts.class_labels is not None:
            raise UserError("--images are drawn already; leave out --init_images and --class_labels")
        if comparison.baseline is not None and not Path(comparison.baseline).is_dir():
            raise UserError(f"--baseline {comparison.baseline} must be a folder of images, as --images is")
    check_best_by(comparison.best_by, options.run.names)
    if options.generation.strength is not None and prompts.init_images is None:
        raise UserError("--strength is how far --init_images are changed; give both or neither")
    size = (options.generation.height, options.generation.width)
    if (size[0] is None) != (size[1] is None):
        raise UserError("--height and --width go together; give both or neither")


def check_best_by(name: str | None, metrics: Sequence[str]) -> None:
    """Refuses to choose by a score that there is not, or that is not computed."""
    of = {each: metric for metric, entry in METRICS.items() for each in entry.scores}
    if name is None:
        return
    hint = nearest(name, of)
    require(name in of, "best_by", name, f"be one of {', '.join(of)}", f"did you mean {hint}?" if hint else "")
    require(of[name] in metrics, "best_by", name, "be computed", f"its metric is not among --metrics: add {of[name]}")
