"""The options of train_unconditional.py, and which combinations are refused."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from utils.config.flag_rules import IsNot, Resume
from utils.config.options import UserError, option
from utils.config.training_length import LengthOptions
from utils.data.options import PixelOptions
from utils.data.source_options import LabelledSource, LabelOptions
from utils.diffusion.options import ProcessOptions
from utils.evaluation.options import EvaluationOptions
from utils.models.options import UnconditionalModelOptions
from utils.sampling.sample_options import SamplingOptions
from utils.training.compatibility import read_checked
from utils.training.optimizer_options import SCHEDULES, OptimizerOptions, ScheduleOptions
from utils.training.optimizer_table import without
from utils.training.options import RECOMPUTING, REPORT_TO, EmaOptions, TrackingOptions, TrainingOptions

PURPOSE = (
    "Trains an unconditional or class-conditional diffusion model, from scratch or fine-tuned, in pixels or in latents."
)
OWN_NAMES = {"caption_column": "label_column"}  # flags that have another name in the shared code


@dataclass(frozen=True)
class Length(LengthOptions):
    num_train_epochs: int = option(100, "epochs: passes over the data", aliases=["--num_epochs"], resume=Resume.LENGTH)


@dataclass(frozen=True)
class Optimizer(OptimizerOptions):
    adam_beta1: float = option(
        0.95,
        "decay of the running mean of gradients (Adam's beta1)",
        acts_with=(IsNot("optimizer", without("adam_beta1")),),
    )
    adam_weight_decay: float = option(1e-6, "decoupled weight decay of all weights but biases and norms")


@dataclass(frozen=True)
class Schedule(ScheduleOptions):
    lr_scheduler: str = option("cosine", "learning-rate schedule", choices=SCHEDULES)
    lr_warmup_steps: int | None = option(
        None, "optimizer steps of linear warm-up from 0; default: a tenth of the run, at most 500"
    )


@dataclass(frozen=True)
class Averages(EmaOptions):
    ema_decay: float = option(0.9999, "largest EMA decay", aliases=["--ema_max_decay"], acts_with=("use_ema",))
    use_ema_warmup: bool = option(
        True, "increase the EMA decay as 1 - (1 + n / inv_gamma)^-power up to --ema_decay", acts_with=("use_ema",)
    )


@dataclass(frozen=True)
class Tracking(TrackingOptions):
    report_to: str = option(
        "tensorboard",
        REPORT_TO,
        aliases=["--logger"],
        resume=Resume.REPORTING,
    )
    tracker_project_name: str = option(
        "train_unconditional",
        "project name in the trackers",
        is_text=True,
        resume=Resume.REPORTING,
        acts_with=(IsNot("report_to", ("none",)),),
    )


@dataclass(frozen=True)
class Evaluation(EvaluationOptions):
    needs_reference: ClassVar[bool] = False

    eval_reference: str | None = option(
        None,
        "real images to compare with: a folder, a dataset, or statistics in an .npz file; default: the training "
        "images, center-cropped",
        resume=Resume.REPORTING,
    )
    eval_num_inference_steps: int | None = option(
        None, "denoising steps; default: --num_inference_steps", resume=Resume.REPORTING, acts_with=("eval_metrics",)
    )

    def with_steps(self, steps: int) -> "Evaluation":
        """Returns these options with this many denoising steps, unless a number was given."""
        return replace(self, eval_num_inference_steps=self.eval_num_inference_steps or steps)


@dataclass(frozen=True)
class Options(TrainingOptions):
    """All options of this script: the shared groups, some replaced or extended here."""

    model: UnconditionalModelOptions
    source: LabelledSource
    captions: LabelOptions
    image: PixelOptions
    length: Length
    optimizer: Optimizer
    schedule: Schedule
    noise: ProcessOptions
    ema: Averages
    samples: SamplingOptions
    tracking: Tracking
    evaluation: Evaluation

    @property
    def structure(self) -> dict[str, object]:
        """The settings that must equal the checkpoint's for a run to resume from it, by flag."""
        return super().structure | self.model.structure

    @property
    def memory_savers(self) -> dict[str, bool]:
        """Flags that save memory, in the order to try them, and whether each is given."""
        return {
            RECOMPUTING: self.model.gradient_checkpointing,
            "--cache_latents": self.model.vae is None or self.cache.cache_latents,
            "--use_8bit_adam": self.optimizer.name != "adamw",
        }


def read_options(argv: Sequence[str] | None) -> Options:
    """Returns the checked options; see `read_checked`."""
    return read_checked(Options, argv, PURPOSE, check_options)


def check_options(options: Options) -> None:
    """Refuses options that exclude each other, and warns of those without effect."""
    if options.cache.cache_text_embeddings:
        raise UserError("--cache_text_embeddings: this script uses no captions; leave it out")
    if options.optimizer.text_encoder_lr is not None or options.optimizer.text_encoder_2_lr is not None:
        raise UserError("--text_encoder_lr: this script has no text encoders; leave it out")
    if options.captions.class_conditional and options.data.streaming:
        raise UserError(
            "--class_conditional needs to know all classes at the start, which --streaming does not; leave one out"
        )
    if options.export.export_single_file:
        raise UserError(
            "--export_single_file: models without text have no single-file layout that other tools read; leave it out, "
            "and use the folder"
        )
    if options.source.caption_column is not None and not options.captions.class_conditional:
        raise UserError("--label_column goes with --class_conditional; give both or neither")
    if options.samples.guidance_scale > 1 and not options.captions.class_conditional:
        raise UserError("--guidance_scale goes with --class_conditional; give both or neither")
