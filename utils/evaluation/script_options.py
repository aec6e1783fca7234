"""The options of evaluate_pipeline.py, and checks of their combinations."""

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

PURPOSE = "Draws images with any diffusers pipeline, on one or more GPUs, scores them, and writes a report."


@dataclass(frozen=True)
class RunOptions:
    output_dir: str = option("evaluation", "output folder for images and report; a stopped run in it continues")
    overwrite_output_dir: bool = option(False, "replace images in --output_dir that were drawn with other settings")
    metrics: list[str] | None = option(
        None,
        f"metrics to compute, or all, or none; by default {', '.join(DEFAULT_METRICS)}",
        choices=(*METRICS, "all", "none"),
    )
    seed: int = option(0, "random seed; each image depends on it, the number of its prompt and its own number")
    mixed_precision: str | None = option(
        None, "precision of the pipeline; by default that of `accelerate launch`", choices=tuple(PRECISIONS)
    )
    allow_tf32: bool = option(False, "allow TF32 matrix multiplication on Ampere and later GPUs")
    title: str | None = option(None, "title of the report; by default it names the pipeline", is_text=True)
    report_prompts: int = option(24, "number of prompts whose images the report shows")
    export_geneval: str | None = option(
        None, "also write the images to this folder, in the layout that GenEval's tool reads", acts_with=DRAWING
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
        None, "pipeline to compare with, on the same prompts and seeds; with --images, a folder of images"
    )
    labels: list[str] | None = option(
        None, "names of the baseline and the pipeline in the report, in this order", is_text=True
    )
    baseline_lora: str | None = option(None, "LoRA to load into the baseline: a folder, .safetensors file or Hub name")
    checkpoints: str | None = option(
        None, "output folder of a training run; scores each of its checkpoints and finds the best"
    )
    best_by: str | None = option(None, "score that selects the best checkpoint; by default the first one computed")

    def __post_init__(self) -> None:
        folder = self.checkpoints
        require(folder is None or Path(folder).is_dir(), "checkpoints", folder, "be a folder that exists")
        if self.baseline is not None and self.checkpoints is not None:
            raise UserError("--baseline and --checkpoints exclude each other; give one")
        if self.labels is not None:
            count = 1 if self.baseline is None else 2
            fits = len(set(self.labels)) == len(self.labels) == count and self.checkpoints is None
            must = "be two names with --baseline, one without it, none with --checkpoints"
            require(fits, "labels", " ".join(self.labels), must)
        if self.baseline_lora is not None and self.baseline is None:
            raise UserError("--baseline_lora needs a pipeline to load into; give --baseline")
        for name in ("baseline", "baseline_lora"):
            require_model(name, getattr(self, name), MODEL_CURE, (".safetensors",))
        if self.best_by is not None and self.checkpoints is None:
            raise UserError("--best_by needs --checkpoints; give both or neither")


@dataclass(frozen=True)
class Options:
    """All options of evaluate_pipeline.py, by group."""

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
    """Reads the options and checks their combinations, before torch is loaded.

    Raises:
        UserError: for an unknown flag, an invalid value, or flags that exclude each other.
    """
    set_up_logging()
    options: Options = parse(Options, argv, PURPOSE)
    check_together(options)
    sources = {"model": options.pipeline.pipeline, "reference": options.reference.reference}
    announce(sources, options.run.output_dir, takes_used_folder=True)
    return options


def check_together(options: Options) -> None:
    """Checks the combinations of options.

    Raises:
        UserError: naming flags that exclude or need each other.
    """
    # Folders that are written must differ from those that are read.
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

    # What to score: a pipeline, images, or checkpoints.
    given = [
        name for name, value in (("pipeline", pipeline.pipeline), ("images", pipeline.images)) if value is not None
    ]
    if len(given) != 1 and not (comparison.checkpoints is not None and not given):
        raise UserError("give one of --pipeline PATH, to draw images, and --images FOLDER, to score existing ones")
    if pipeline.images is not None:
        if comparison.checkpoints is not None:
            raise UserError("--checkpoints and --images exclude each other; remove --images")
        if prompts.init_images is not None or prompts.class_labels is not None:
            raise UserError("--images draws nothing; remove --init_images and --class_labels")
        if comparison.baseline is not None and not Path(comparison.baseline).is_dir():
            raise UserError(f"--baseline {comparison.baseline} must be a folder of images, as --images is")

    # Flags that need another one.
    check_best_by(comparison.best_by, options.run.names)
    if options.generation.strength is not None and prompts.init_images is None:
        raise UserError("--strength needs --init_images; give both or neither")
    size = (options.generation.height, options.generation.width)
    if (size[0] is None) != (size[1] is None):
        raise UserError("--height and --width require each other; give both or neither")


def check_best_by(name: str | None, metrics: Sequence[str]) -> None:
    """Checks that the score of --best_by exists and is computed.

    Args:
        name: the score; None without --best_by.
        metrics: the metrics that are computed.
    """
    of = {each: metric for metric, entry in METRICS.items() for each in entry.scores}
    if name is None:
        return
    hint = nearest(name, of)
    require(name in of, "best_by", name, f"be one of {', '.join(of)}", f"did you mean {hint}?" if hint else "")
    require(of[name] in metrics, "best_by", name, "be computed", f"add its metric {of[name]} to --metrics")
