"""Option groups of training, and the groups that both training scripts share, in the order of `--help`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from utils.config.flag_rules import IsNot, Resume
from utils.config.options import (
    UserError,
    first_line,
    option,
    require,
    require_fraction,
    require_not_negative,
    require_positive,
)
from utils.config.progress import Progress
from utils.config.training_length import LengthOptions
from utils.data.captions import CaptionOptions
from utils.data.options import (
    HELD_OUT,
    BucketOptions,
    CacheOptions,
    HeldOutOptions,
    ImageOptions,
    LoaderOptions,
    SelectionOptions,
)
from utils.data.source_options import DataOptions, LabelOptions, SourceOptions
from utils.diffusion.options import LossOptions, NoiseOptions
from utils.evaluation.options import EvaluationOptions, FeatureOptions
from utils.models.options import (
    ATTENTION,
    PICKLES,
    QUANTIZATIONS,
    LoadingOptions,
    PartOptions,
    PerceptualOptions,
    TermOptions,
    check_quantization,
)
from utils.runtime.hub_files import require_model
from utils.runtime.options import RuntimeOptions
from utils.runtime.prometheus_options import PrometheusOptions
from utils.runtime.tracker_table import find_trackers, tracker_names
from utils.sampling.options import SamplingControlOptions
from utils.sampling.sample_options import SamplingOptions, ValidationOptions
from utils.training.adapters import ADAPTATIONS, EVERY_ADAPTER, FORMATS, LORA_ALONE, AdaptationSpec
from utils.training.export_options import ExportOptions
from utils.training.optimizer_options import OptimizerOptions, ScheduleOptions
from utils.training.verdict_options import VerdictOptions

REPORT_TO = f"trackers for metrics and samples, separated by commas: {', '.join(tracker_names())}; all; none"
RECOMPUTING = "--gradient_checkpointing"  # a resumed run may add it when memory is short
WITH_ADAPTERS = (IsNot("adaptation", ("full",)),)
COMPILED = ("blocks", "denoiser")
DEFAULT_INTERVAL = 500  # optimizer steps between checkpoints


@dataclass(frozen=True)
class TrainedOptions:
    """Which weights train, and in which precision (of a model all of whose weights may train).

    Attributes:
        help_title: title of the group in `--help`.
        train_text_encoder: whether the text encoders train too.
    """

    help_title: ClassVar[str] = "trained"
    train_text_encoder: ClassVar[bool] = False

    @property
    def start_path(self) -> str | None:
        """The adapter to continue from; None if there is none."""
        return None

    train_layers: str | None = option(
        None,
        "train only the weights whose names match this regular expression, such as attn2 for cross-attention",
        is_text=True,
        resume=Resume.STRUCTURE,
    )
    pure_bf16: bool = option(
        False,
        "keep trained weights in bfloat16 only; updates are computed in float32 and rounded stochastically",
        resume=Resume.STRUCTURE,
        engines={
            "DeepSpeed": "use FSDP2",
            "FSDP2": "it shards weights in float32 and computes in the mixed precision",
        },
    )

    def __post_init__(self) -> None:
        if self.train_layers is not None:
            try:
                re.compile(self.train_layers)
            except re.error as error:
                raise UserError(f"--train_layers {self.train_layers} is not a regular expression: {error}") from error

    @property
    def trains_base(self) -> bool:
        """Whether the denoiser's own weights train in float32."""
        return not self.pure_bf16

    @property
    def structure(self) -> dict[str, object]:
        """The settings that must equal the checkpoint's for a run to resume from it, by flag."""
        return {name: getattr(self, name) for name in ("train_text_encoder", "train_layers", "pure_bf16")}


@dataclass(frozen=True)
class AdaptationOptions(TrainedOptions):
    help_title: ClassVar[str] = "adaptation"

    adaptation: str = option(
        "full",
        "train all weights (full) or adapters: lora, loha (https://arxiv.org/abs/2108.06098), "
        "lokr (https://arxiv.org/abs/2212.10650)",
        choices=tuple(ADAPTATIONS),
        resume=Resume.STRUCTURE,
    )
    train_text_encoder: bool = option(False, "train the text encoders too", resume=Resume.STRUCTURE)
    rank: int | None = option(None, "rank of the adapter matrices; default: 4", resume=Resume.STRUCTURE)
    lora_alpha: float | None = option(
        None, "alpha: the adapter update is scaled by alpha / rank; default: the rank", resume=Resume.STRUCTURE
    )
    lora_dropout: float = option(0.0, "dropout on the input of LoRA layers, or on the ranks of LoHa and LoKr")
    lora_target_modules: list[str] | None = option(
        None,
        "suffixes of the names of the UNet layers to adapt; default: to_k to_q to_v to_out.0",
        is_text=True,
        resume=Resume.STRUCTURE,
    )
    use_dora: bool = option(
        False, "use DoRA, weight-decomposed LoRA (https://arxiv.org/abs/2402.09353)", resume=Resume.STRUCTURE
    )
    use_rslora: bool = option(
        False,
        "scale the adapter update by alpha / sqrt(rank) (https://arxiv.org/abs/2312.03732)",
        resume=Resume.STRUCTURE,
    )
    quantize_base: str | None = option(
        None,
        "quantize the frozen UNet under the LoRA to nf4 (4 bits) or int8 with bitsandbytes",
        choices=QUANTIZATIONS,
        resume=Resume.STRUCTURE,
        engines={"FSDP2": "it shards frozen weights already"},
    )
    fused_lora: bool = option(
        True,
        "compute LoRA layers with fewer kernels than peft; saved files are unchanged",
        resume=Resume.COST,
        acts_with=("adaptation=lora",),
    )
    lora_weights: str | None = option(
        None,
        "adapter file, or a folder that contains one, to continue training from: LoRA, DoRA, LoHa or LoKr as "
        "diffusers, PEFT, kohya's sd-scripts and LyCORIS write them",
    )
    lora_format: str = option(
        "both",
        "format of the exported adapter: diffusers', or kohya's for ComfyUI, A1111 and other UIs, in output_dir/ui",
        choices=FORMATS,
        resume=Resume.SAVING,
        acts_with=WITH_ADAPTERS,
    )
    trigger_words: list[str] | None = option(
        None,
        "words that call what the adapter learnt, stored in its file for UIs, which show them",
        is_text=True,
        resume=Resume.SAVING,
        acts_with=WITH_ADAPTERS,
    )
    export_tag_frequency: bool = option(
        False,
        "store in the adapter's file for UIs how often each tag, separated by commas, is in the captions",
        resume=Resume.SAVING,
        acts_with=WITH_ADAPTERS,
    )
    export_fused: bool = option(
        False, "also save the pipeline with the LoRA fused into its weights, in output_dir/fused", resume=Resume.SAVING
    )

    @property
    def start_path(self) -> str | None:
        """The adapter to continue from, --lora_weights."""
        return self.lora_weights

    def __post_init__(self) -> None:
        require_positive(self, "rank", "lora_alpha")
        check_quantization(self.quantize_base)
        super().__post_init__()
        # Options of another adaptation.
        if self.train_layers is not None and self.adaptation != "full":
            raise UserError("--train_layers goes with --adaptation full; adapters have --lora_target_modules")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "be in [0, 1)")
        if self.pure_bf16 and self.adaptation != "full":
            raise UserError("--pure_bf16 needs --adaptation full: adapters are small and train in float32")
        for name in EVERY_ADAPTER + LORA_ALONE:
            value = getattr(self, name)
            if name not in self.spec.flags and value not in (None, False, 0.0):
                raise UserError(f"--{name} {value} goes with --adaptation lora, got --adaptation {self.adaptation}")
        # The LoRA file to continue from, which sets the options of its adapters.
        if self.lora_weights is not None:
            if Path(self.lora_weights).suffix in PICKLES:
                raise UserError(
                    f"--lora_weights {self.lora_weights} is a pickle, and unpickling can run code; convert it to a "
                    ".safetensors file"
                )
            cure = "give a .safetensors file, or a folder that contains one"
            require_model("lora_weights", self.lora_weights, cure, (".safetensors",))
            must = "be a file or folder that exists"
            require(Path(self.lora_weights).exists(), "lora_weights", self.lora_weights, must)
            for name in ("rank", "lora_alpha", "lora_target_modules", "use_dora", "use_rslora"):
                if getattr(self, name) not in (None, False):
                    raise UserError(f"--{name} is set by the file given as --lora_weights; leave it out")

    @property
    def lora_rank(self) -> int:
        """The rank of new LoRA matrices."""
        return self.rank or 4

    @property
    def trains_base(self) -> bool:
        """Whether the denoiser's own weights train in float32."""
        return self.spec.trains_base and super().trains_base

    @property
    def spec(self) -> AdaptationSpec:
        """The table row of this adaptation."""
        return ADAPTATIONS[self.adaptation]

    @property
    def structure(self) -> dict[str, object]:
        """The settings that must equal the checkpoint's for a run to resume from it, by flag."""
        shared = {"adaptation": self.adaptation} | super().structure
        if self.adaptation == "full" or self.lora_weights is not None:
            return shared
        adapters = {
            "rank": self.lora_rank,
            "lora_alpha": self.lora_alpha or self.lora_rank,
            "lora_target_modules": self.targets,
        }
        if self.adaptation == "lora":
            names = ("use_dora", "use_rslora", "quantize_base")
            adapters |= {name: getattr(self, name) for name in names}
        return shared | adapters

    @property
    def targets(self) -> list[str] | None:
        """The UNet's target modules; they may also be given separated by commas."""
        if self.lora_target_modules is None:
            return None
        return [name for word in self.lora_target_modules for name in word.split(",") if name]


@dataclass(frozen=True)
class CheckpointOptions:
    checkpointing_steps: int | None = option(
        None,
        "write a checkpoint every N optimizer steps; default: 500, if neither --checkpointing_epochs nor "
        "--checkpointing_minutes is given. Of several intervals, each counts",
        resume=Resume.SAVING,
    )
    checkpointing_epochs: int | None = option(
        None, "write a checkpoint after every N epochs (passes over the data)", resume=Resume.SAVING
    )
    checkpointing_minutes: float | None = option(
        None,
        "write a checkpoint once N minutes have passed since the last one, whatever caused it; fractions are allowed",
        resume=Resume.SAVING,
    )
    checkpoints_total_limit: int | None = option(
        None, "number of newest checkpoints to keep; default: all", resume=Resume.SAVING
    )
    final_checkpoint: bool = option(
        True,
        "also write a checkpoint after the last step, so that a longer run can resume from it",
        resume=Resume.SAVING,
    )
    resume_from_checkpoint: str | None = option(
        None,
        "resume from latest, from checkpoint-N in output_dir, or from a path; latest starts anew if there is none",
        resume=Resume.SAVING,
    )
    async_checkpointing: bool | None = option(
        None,
        "write checkpoints from copies in host memory while training continues; default: on a GPU if host memory can "
        "hold the copies twice",
        resume=Resume.SAVING,
    )
    allow_changed_options: bool = option(
        False,
        "resume although options that affect training, or the data, differ from the checkpoint's",
        resume=Resume.SAVING,
        acts_with=("resume_from_checkpoint",),
    )

    def __post_init__(self) -> None:
        require_positive(self, "checkpointing_steps", "checkpointing_epochs", "checkpointing_minutes")
        require_positive(self, "checkpoints_total_limit")

    @property
    def interval(self) -> int | None:
        """Optimizer steps between checkpoints; None if only epochs or minutes count."""
        if self.checkpointing_epochs is None and self.checkpointing_minutes is None:
            return self.checkpointing_steps or DEFAULT_INTERVAL
        return self.checkpointing_steps

    @property
    def snapshot_interval(self) -> int:
        """Optimizer steps between the snapshots of --ema_lengths, which must not depend on the clock."""
        return self.checkpointing_steps or DEFAULT_INTERVAL

    def is_due(self, progress: Progress) -> bool:
        """Whether to write a checkpoint after a step; the timer of --checkpointing_minutes is asked elsewhere."""
        is_planned = progress.is_multiple_of(self.interval) or progress.ends_epochs(self.checkpointing_epochs)
        return is_planned or (self.final_checkpoint and progress.is_last)


@dataclass(frozen=True)
class EmaOptions:
    use_ema: bool = option(
        False,
        "keep an exponential moving average (EMA) of the trained weights; validate and export that average",
        resume=Resume.AVERAGING,
    )
    ema_decay: float = option(
        0.9999, "EMA decay; at update n the smaller of this and (1 + n) / (10 + n) is used", acts_with=("use_ema",)
    )
    use_ema_warmup: bool = option(
        False, "instead, increase the EMA decay as 1 - (1 + n / inv_gamma)^-power", acts_with=("use_ema",)
    )
    ema_inv_gamma: float = option(1.0, "inverse gamma of the EMA warm-up", acts_with=("use_ema",))
    ema_power: float = option(
        0.75, "power of the EMA warm-up; 2/3 suits runs of a million steps, 3/4 shorter ones", acts_with=("use_ema",)
    )
    ema_every: int = option(
        1, "update the EMA every N optimizer steps with the combined decay of those steps, which saves time"
    )
    offload_ema: bool = option(
        False, "keep the EMA in host memory", resume=Resume.COST, engines={"FSDP2": "it shards the average already"}
    )
    foreach_ema: bool = option(
        True,
        "update the EMA of all weights in one call instead of one call per weight",
        resume=Resume.COST,
        acts_with=("use_ema",),
    )
    ema_lengths: list[float] | None = option(
        None,
        "instead of --use_ema: export an average of this length, as a fraction of the training such as 0.1, computed "
        "afterwards from snapshots (https://arxiv.org/abs/2312.02696); of several lengths, that with the lowest "
        "validation loss",
        resume=Resume.AVERAGING,
        engines={"FSDP2": "use --use_ema"},
    )
    ema_snapshot_steps: int | None = option(
        None,
        "optimizer steps between the snapshots of --ema_lengths; default: --checkpointing_steps, or 500",
        resume=Resume.AVERAGING,
    )

    def __post_init__(self) -> None:
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "be in [0, 1)")
        require_positive(self, "ema_inv_gamma", "ema_power", "ema_every", "ema_snapshot_steps")
        for length in self.ema_lengths or ():
            require(0 < length <= 0.28, "ema_lengths", length, "be over 0 and at most 0.28, the longest possible")
        if self.use_ema and self.ema_lengths:
            raise UserError("--use_ema and --ema_lengths exclude each other; give one")
        if self.ema_every > 1 and not self.use_ema:
            raise UserError("--ema_every goes with --use_ema; give both or neither")
        if self.ema_snapshot_steps is not None and not self.ema_lengths:
            raise UserError("--ema_snapshot_steps goes with --ema_lengths; give both or neither")


@dataclass(frozen=True)
class TrackingOptions(PrometheusOptions):
    report_to: str = option(
        "tensorboard",
        REPORT_TO,
        resume=Resume.REPORTING,
    )
    logging_dir: str = option(
        "logs",
        "folder inside output_dir for the trackers' files",
        resume=Resume.SAVING,
        acts_with=(IsNot("report_to", ("none",)),),
    )
    tracker_project_name: str = option(
        "text2image-fine-tune",
        "project name in the trackers",
        is_text=True,
        resume=Resume.REPORTING,
        acts_with=(IsNot("report_to", ("none",)),),
    )
    logging_steps: int = option(
        1,
        "read metrics from the device every N optimizer steps, one step late; processes also check for stop requests "
        "this often",
        resume=Resume.REPORTING,
    )
    report: bool = option(
        True,
        "write report.html and plots/ into output_dir: curves, samples, data, options and layers on one page, kept "
        "current while the run trains",
        resume=Resume.REPORTING,
    )
    debug_loss: bool = option(False, "log the loss of each image under its file name", resume=Resume.REPORTING)
    max_skipped_steps: int = option(
        10, "end the run after this many consecutive steps without a finite loss and gradient", resume=Resume.LENGTH
    )
    layer_norm_steps: int | None = option(
        None,
        "log each layer's gradient norm every N optimizer steps to layers.jsonl and the trackers, and warn of outliers",
        resume=Resume.REPORTING,
        engines={
            "DeepSpeed": "no process has a layer's whole gradient",
            "FSDP2": "no process has a layer's whole gradient",
        },
    )
    histogram_steps: int | None = option(
        None,
        "log histograms of each layer's weights and gradients to the trackers every N optimizer steps",
        resume=Resume.REPORTING,
        engines={
            "DeepSpeed": "no process has a layer's whole gradient",
            "FSDP2": "no process has a layer's whole gradient",
        },
        acts_with=(IsNot("report_to", ("none",)),),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "logging_steps", "max_skipped_steps", "layer_norm_steps", "histogram_steps")
        find_trackers(self.report_to)

    @property
    def trackers(self) -> list[str]:
        """The requested trackers; for `all`, those that are installed.

        Raises:
            UserError: if a named tracker is unknown or not installed.
        """
        return find_trackers(self.report_to)


@dataclass(frozen=True)
class HubOptions:
    push_to_hub: bool = option(False, "upload the result and its model card to the Hub", resume=Resume.SAVING)
    hub_model_id: str | None = option(
        None, "repository to upload to; default: the name of output_dir", resume=Resume.SAVING
    )
    hub_token: str | None = option(
        None,
        "Hub token; never saved, but visible in the process list and printed by launchers, under which it is refused; "
        "rather set HF_TOKEN in the environment or run `hf auth login`",
        is_text=True,
        resume=Resume.SAVING,
        acts_with=("push_to_hub",),
    )
    hub_private_repo: bool = option(
        False, "create the repository as private", resume=Resume.SAVING, acts_with=("push_to_hub",)
    )

    def __post_init__(self) -> None:
        if not self.push_to_hub and self.hub_model_id is not None:
            raise UserError("--hub_model_id goes with --push_to_hub; give both or neither")
        if self.hub_model_id is not None:
            from huggingface_hub.utils import HFValidationError, validate_repo_id

            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError as error:
                raise UserError(f"--hub_model_id {self.hub_model_id}: {first_line(error)}") from error


@dataclass(frozen=True)
class SpeedOptions:
    fast: bool = option(
        False,
        "turn on the speed options that are safe and faster on this device; the log names each with its reason, and "
        "names those left out because their check failed. A resumed run may then differ in the last bits",
        resume=Resume.COST,
    )
    compile: str | None = option(
        None,
        "compile the whole denoiser, or only its repeated transformer and convolution blocks, which takes a fifth of "
        "the time; its gradients on one batch are first compared with those of the uncompiled model",
        choices=COMPILED,
        const="denoiser",
        resume=Resume.COST,
        engines={"DeepSpeed": "leave it out", "FSDP2": "leave it out"},
    )
    torch_compile: bool = option(
        False,
        "same as --compile denoiser",
        resume=Resume.COST,
        engines={"DeepSpeed": "leave it out", "FSDP2": "leave it out"},
    )
    cuda_graphs: bool = option(
        False,
        "record the kernels of a whole optimizer step as a CUDA graph and replay them in one launch, which speeds up "
        "small batches; if a step can't be recorded, the log says why, and only the passes of --compile are recorded",
        resume=Resume.COST,
    )
    activation_memory: float | None = option(
        None,
        "with --compile: fraction of activation memory to keep, from 0 to 1; the rest is recomputed in the backward "
        "pass, cheapest first",
        resume=Resume.COST,
    )
    cudnn_benchmark: bool = option(
        False,
        "if all images have one size: let cuDNN time its convolutions and choose the fastest; a resumed run may then "
        "differ in the last bits",
        resume=Resume.COST,
    )
    attention_backend: str | None = option(
        None,
        "PyTorch attention kernel to try first; default: PyTorch chooses by shape and device",
        choices=tuple(ATTENTION),
        resume=Resume.COST,
    )
    bf16_weights: bool = option(
        False,
        "with --mixed_precision bf16: compute with a bfloat16 copy of the denoiser's weights, made once per step, "
        "instead of casting them at each use; trained and saved weights stay float32",
        resume=Resume.COST,
        engines={"DeepSpeed": "leave it out", "FSDP2": "weights are gathered in the mixed precision"},
    )
    channels_last: bool = option(
        False, "use the channels-last memory format, which is faster for convolutions on GPUs", resume=Resume.COST
    )
    keep_freed_memory: bool | None = option(
        None,
        "keep host memory freed by a step for the next step instead of returning it to the kernel (glibc only); "
        "default: on when training on a CPU",
        resume=Resume.COST,
    )

    def __post_init__(self) -> None:
        if self.torch_compile and self.compile == "blocks":
            raise UserError("--torch_compile means --compile denoiser, got --compile blocks; give one")
        if self.activation_memory is not None:
            require_fraction(self, "activation_memory")
            if self.compiled is None:
                raise UserError("--activation_memory sets what --compile keeps; give both")

    @property
    def compiled(self) -> str | None:
        """The part to compile: one of `COMPILED`, or None."""
        return self.compile or ("denoiser" if self.torch_compile else None)


@dataclass(frozen=True)
class EarlyStoppingOptions:
    num_validation_timesteps: int = option(
        8,
        "number of evenly spaced timesteps at which the validation loss is measured",
        resume=Resume.REPORTING,
        acts_with=HELD_OUT,
    )
    early_stopping_patience: int | None = option(
        None,
        "end the run after this many consecutive measurements without a lower validation loss",
        resume=Resume.LENGTH,
    )
    early_stopping_threshold: float = option(
        0.0,
        "minimum decrease of the validation loss that counts as lower",
        resume=Resume.LENGTH,
        acts_with=("early_stopping_patience",),
    )

    def __post_init__(self) -> None:
        require_positive(self, "num_validation_timesteps", "early_stopping_patience")
        require_not_negative(self, "early_stopping_threshold")


@dataclass(frozen=True)
class TrainingOptions:
    """All option groups of a training script. Each script subclasses it and replaces some groups with its own."""

    model: PartOptions
    loading: LoadingOptions
    adaptation: TrainedOptions
    data: DataOptions
    source: SourceOptions
    captions: CaptionOptions | LabelOptions
    selection: SelectionOptions
    image: ImageOptions
    buckets: BucketOptions
    cache: CacheOptions
    loader: LoaderOptions
    length: LengthOptions
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    loss: LossOptions
    perceptual: PerceptualOptions
    term: TermOptions
    noise: NoiseOptions
    ema: EmaOptions
    held_out: HeldOutOptions
    samples: ValidationOptions | SamplingOptions
    stopping: EarlyStoppingOptions
    verdict: VerdictOptions
    checkpoint: CheckpointOptions
    export: ExportOptions
    runtime: RuntimeOptions
    speed: SpeedOptions
    tracking: TrackingOptions
    hub: HubOptions
    evaluation: EvaluationOptions
    features: FeatureOptions
    controls: SamplingControlOptions

    @property
    def caption_options(self) -> CaptionOptions:
        """How captions are used, or class labels in their place.

        Raises:
            UserError: if the source has no labels of the requested kind.
        """
        return self.captions.for_source(self.source)

    @property
    def structure(self) -> dict[str, object]:
        """The settings that must equal the checkpoint's for a run to resume from it, by flag."""
        term = None if self.term.loss_module is None else Path(self.term.loss_module).name
        shared = {"seed": self.runtime.seed, "optimizer": self.optimizer.name, "loss_module": term}
        return shared | self.adaptation.structure

    @property
    def memory_savers(self) -> dict[str, bool]:
        """Flags that save memory, in the order to try them, and whether each is given."""
        raise NotImplementedError

    @property
    def data_name(self) -> str:
        """The name of the dataset, or of its folder or file."""
        name = self.source.dataset_name
        if name is not None and not Path(name).exists():
            return name
        return Path(name or self.source.train_data_dir or self.data.dataset_file).resolve().name
