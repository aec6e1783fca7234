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
from utils.models.options import LoadingOptions, weight_files
from utils.models.scaled_adapters import ScaledAdapter, parse_adapters
from utils.runtime.hub_files import require_model
from utils.runtime.options import PRECISIONS
from utils.sampling.options import DRAWING, GenerationOptions, PromptOptions, SamplingControlOptions
from utils.sampling.pipeline_options import MODEL_CURE, PipelineOptions, require_adapters

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
    baseline_config: str | None = option(
        None,
        "pipeline folder or Hub name with the configs of a single-file --baseline; by default --pipeline_config",
        acts_with=weight_files("baseline"),
    )
    baseline_variant: str | None = option(
        None, "variant of the baseline's weight files, such as fp16; by default --variant, if the folder has it"
    )
    baseline_lora: list[str] | None = option(
        None, "LoRAs to load into the baseline, named and scaled as those of --lora", is_repeatable=True
    )
    labels: list[str] | None = option(
        None,
        "names in the report of the baseline, if there is one, and the pipeline, or of each scale of --lora_scales",
        is_text=True,
    )
    checkpoints: str | None = option(
        None, "output folder of a training run; scores each of its checkpoints and finds the best"
    )
    best_by: str | None = option(None, "score that selects the best checkpoint; by default the first one computed")

    def __post_init__(self) -> None:
        folder = self.checkpoints
        require(folder is None or Path(folder).is_dir(), "checkpoints", folder, "be a folder that exists")
        if self.baseline is not None and self.checkpoints is not None:
            raise UserError("--baseline and --checkpoints exclude each other; give one")
        for name in ("baseline_lora", "baseline_config", "baseline_variant"):
            if getattr(self, name) is not None and self.baseline is None:
                raise UserError(f"--{name} needs the pipeline that it is for; give --baseline")
        require_model("baseline", self.baseline, MODEL_CURE, (".safetensors",))
        require_adapters("baseline_lora", self.baseline_lora)
        require_model("baseline_config", self.baseline_config, "give a pipeline folder or a Hub name")
        if self.best_by is not None and self.checkpoints is None:
            raise UserError("--best_by needs --checkpoints; give both or neither")

    @property
    def baseline_adapters(self) -> tuple[ScaledAdapter, ...]:
        """The adapters of --baseline_lora with their scales."""
        return parse_adapters("baseline_lora", self.baseline_lora)


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
        for name in ("baseline_lora", "baseline_variant"):
            if getattr(comparison, name) is not None:
                raise UserError(f"--images draws nothing; remove --{name}")
        if comparison.baseline is not None and not Path(comparison.baseline).is_dir():
            raise UserError(f"--baseline {comparison.baseline} must be a folder of images, as --images is")

    # Flags that need another one.
    check_adapters(pipeline, comparison)
    check_labels(pipeline, comparison)
    check_best_by(comparison.best_by, options.run.names)
    if options.generation.strength is not None and prompts.init_images is None:
        raise UserError("--strength needs --init_images; give both or neither")
    size = (options.generation.height, options.generation.width)
    if (size[0] is None) != (size[1] is None):
        raise UserError("--height and --width require each other; give both or neither")


def check_adapters(pipeline: PipelineOptions, comparison: ComparisonOptions) -> None:
    """Checks that there is a pipeline to load adapters into, and that a sweep of their scales has adapters.

    Raises:
        UserError: naming flags that exclude or need each other.
    """
    if pipeline.lora is not None and pipeline.pipeline is None and comparison.checkpoints is None:
        raise UserError("--lora needs a pipeline to load into; give --pipeline")
    if pipeline.lora_scales is None:
        return
    if comparison.checkpoints is not None:
        raise UserError(
            "--lora_scales and --checkpoints exclude each other; give the LoRA of one checkpoint to --lora, and its "
            "base to --pipeline"
        )
    if pipeline.lora is None:
        raise UserError("--lora_scales needs the adapters to scale; give --lora")


def check_labels(pipeline: PipelineOptions, comparison: ComparisonOptions) -> None:
    """Checks that there is one label for each pipeline of the report.

    Raises:
        UserError: saying how many there must be.
    """
    if comparison.labels is None:
        return
    scales = len(pipeline.factors)
    count = (comparison.baseline is not None) + max(1, scales)
    fits = len(set(comparison.labels)) == len(comparison.labels) == count and comparison.checkpoints is None
    must = "be two names with --baseline, one without it, none with --checkpoints"
    if scales:
        before = "one for the baseline and " if comparison.baseline is not None else ""
        must = f"be {count} different names: {before}one for each of the {scales} scales"
    require(fits, "labels", " ".join(comparison.labels), must)


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
