"""The options of training, and those that both training scripts have, by group, in the order of `--help`."""

import re
from dataclasses import dataclass
from importlib.util import find_spec
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
from utils.sampling.options import SamplingControlOptions, SamplingOptions, ValidationOptions
from utils.training.adapters import ADAPTATIONS, EVERY_ADAPTER, LORA_ALONE, AdaptationSpec
from utils.training.optimizer_options import OptimizerOptions, ScheduleOptions

TRACKERS = ("tensorboard", "wandb", "comet_ml")
RECOMPUTING = "--gradient_checkpointing"  # which a resumed run may add when memory is short
COMPILED = ("blocks", "denoiser")


@dataclass(frozen=True)
class TrainedOptions:
    """Which weights train, and in which arithmetic, where all of them may.

    Attributes:
        help_title: of the group in `--help`.
        train_text_encoder: whether text encoders train too.
    """

    help_title: ClassVar[str] = "trained"
    train_text_encoder: ClassVar[bool] = False

    train_layers: str | None = option(
        None,
        "regular expression that the names of the weights to train must hold, such as attn2 for cross-attention",
        is_text=True,
        resume=Resume.STRUCTURE,
    )
    pure_bf16: bool = option(
        False,
        "keep the weights that train in bfloat16 alone, stepped in float32 and rounded stochastically",
        resume=Resume.STRUCTURE,
        engines={
            "DeepSpeed": "use FSDP2",
            "FSDP2": "weights are spread in float32 and computed with in the mixed precision",
        },
    )

    def __post_init__(self) -> None:
        if self.train_layers is not None:
            try:
                re.compile(self.train_layers)
            except re.error as error:
                raise UserError(f"--train_layers {self.train_layers} is no regular expression: {error}") from error

    @property
    def trains_base(self) -> bool:
        """Whether the denoiser's own weights train, in float32."""
        return not self.pure_bf16

    @property
    def structure(self) -> dict[str, object]:
        """What a checkpoint can only be resumed with, by flag."""
        return {name: getattr(self, name) for name in ("train_text_encoder", "train_layers", "pure_bf16")}


@dataclass(frozen=True)
class AdaptationOptions(TrainedOptions):
    help_title: ClassVar[str] = "adaptation"

    adaptation: str = option(
        "full",
        "what trains: all weights, or adapters: lora, loha (https://arxiv.org/abs/2108.06098), "
        "lokr (https://arxiv.org/abs/2212.10650)",
        choices=tuple(ADAPTATIONS),
        resume=Resume.STRUCTURE,
    )
    train_text_encoder: bool = option(False, "train the text encoders too", resume=Resume.STRUCTURE)
    rank: int | None = option(None, "rank of the adapters' matrices, 4 by default", resume=Resume.STRUCTURE)
    lora_alpha: float | None = option(
        None, "scale of the adapters' update times the rank; by default the rank", resume=Resume.STRUCTURE
    )
    lora_dropout: float = option(0.0, "dropout of the LoRA layers' input, or of the ranks of LoHa and LoKr")
    lora_target_modules: list[str] | None = option(
        None,
        "ends of the names of the UNet layers that are adapted; by default to_k to_q to_v to_out.0",
        is_text=True,
        resume=Resume.STRUCTURE,
    )
    use_dora: bool = option(False, "weight-decomposed LoRA (https://arxiv.org/abs/2402.09353)", resume=Resume.STRUCTURE)
    use_rslora: bool = option(
        False, "scale by alpha / sqrt(rank) (https://arxiv.org/abs/2312.03732)", resume=Resume.STRUCTURE
    )
    quantize_base: str | None = option(
        None,
        "keep the frozen UNet under the LoRA in nf4 (4 bits) or int8, by bitsandbytes",
        choices=QUANTIZATIONS,
        resume=Resume.STRUCTURE,
        engines={"FSDP2": "frozen weights are spread already"},
    )
    fused_lora: bool = option(
        True,
        "compute LoRA layers by fewer kernels than peft, which saves and loads them as ever",
        resume=Resume.COST,
        acts_with=("adaptation=lora",),
    )
    lora_weights: str | None = option(None, "LoRA file, or a folder that holds one, whose training continues")
    export_fused: bool = option(
        False, "also save the pipeline with the LoRA fused in, in output_dir/fused", resume=Resume.SAVING
    )

    def __post_init__(self) -> None:
        require_positive(self, "rank", "lora_alpha")
        check_quantization(self.quantize_base)
        super().__post_init__()
        if self.train_layers is not None and self.adaptation != "full":
            raise UserError("--train_layers goes with --adaptation full; adapters have --lora_target_modules")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "be in [0, 1)")
        if self.pure_bf16 and self.adaptation != "full":
            raise UserError("--pure_bf16 is for --adaptation full: adapters are small, and train in float32")
        for name in EVERY_ADAPTER + LORA_ALONE:
            value = getattr(self, name)
            if name not in self.spec.flags and value not in (None, False, 0.0):
                raise UserError(f"--{name} {value} goes with --adaptation lora, got --adaptation {self.adaptation}")
        if self.lora_weights is not None:
            if Path(self.lora_weights).suffix in PICKLES:
                raise UserError(
                    f"--lora_weights {self.lora_weights} would need unpickling, which can run code; convert it to a "
                    ".safetensors file"
                )
            cure = "give a .safetensors file, or a folder that holds one"
            require_model("lora_weights", self.lora_weights, cure, (".safetensors",))
            must = "be a file or folder that exists"
            require(Path(self.lora_weights).exists(), "lora_weights", self.lora_weights, must)
            for name in ("rank", "lora_alpha", "lora_target_modules", "use_dora", "use_rslora"):
                if getattr(self, name) not in (None, False):
                    raise UserError(f"--{name} is that of the file given as --lora_weights; leave it out")

    @property
    def lora_rank(self) -> int:
        """The rank of new LoRA matrices."""
        return self.rank or 4

    @property
    def trains_base(self) -> bool:
        """Whether the denoiser's own weights train, in float32."""
        return self.spec.trains_base and super().trains_base

    @property
    def spec(self) -> AdaptationSpec:
        """What is known of the way to train."""
        return ADAPTATIONS[self.adaptation]

    @property
    def structure(self) -> dict[str, object]:
        """What a checkpoint can only be resumed with, by flag."""
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
        """The UNet's target modules, also where they were given with commas."""
        if self.lora_target_modules is None:
            return None
        return [name for word in self.lora_target_modules for name in word.split(",") if name]


@dataclass(frozen=True)
class CheckpointOptions:
    checkpointing_steps: int = option(500, "optimizer steps between checkpoints", resume=Resume.SAVING)
    checkpoints_total_limit: int | None = option(
        None, "newest checkpoints to keep; by default all", resume=Resume.SAVING
    )
    final_checkpoint: bool = option(
        True,
        "also write a checkpoint after the last step, so that a longer run can resume",
        resume=Resume.SAVING,
    )
    resume_from_checkpoint: str | None = option(
        None,
        "resume from latest, from checkpoint-N in output_dir, or from a path; latest without a checkpoint starts anew",
        resume=Resume.SAVING,
    )
    async_checkpointing: bool | None = option(
        None,
        "write checkpoints from copies in host memory while training continues; by default on a GPU, where that memory "
        "holds the copies twice",
        resume=Resume.SAVING,
    )
    allow_changed_options: bool = option(
        False,
        "resume although options that change the training, or the data, are others than the checkpoint's",
        resume=Resume.SAVING,
        acts_with=("resume_from_checkpoint",),
    )

    def __post_init__(self) -> None:
        require_positive(self, "checkpointing_steps", "checkpoints_total_limit")

    def is_due(self, progress: Progress) -> bool:
        """Whether a checkpoint is written after a step."""
        return progress.is_multiple_of(self.checkpointing_steps) or (self.final_checkpoint and progress.is_last)


@dataclass(frozen=True)
class EmaOptions:
    use_ema: bool = option(
        False,
        "keep a moving average of the trained weights; it is what is validated and exported",
        resume=Resume.AVERAGING,
    )
    ema_decay: float = option(
        0.9999, "decay of the average; early steps use (1 + n) / (10 + n) where that is smaller", acts_with=("use_ema",)
    )
    use_ema_warmup: bool = option(
        False, "let the decay rise as 1 - (1 + n / inv_gamma)^-power instead", acts_with=("use_ema",)
    )
    ema_inv_gamma: float = option(1.0, "inverse gamma of that rise", acts_with=("use_ema",))
    ema_power: float = option(
        0.75, "power of that rise; 2/3 for runs of a million steps, 3/4 for shorter ones", acts_with=("use_ema",)
    )
    ema_every: int = option(
        1, "optimizer steps between updates of the average, each by the decay of all of them: fewer passes over it"
    )
    offload_ema: bool = option(
        False, "keep the average in host memory", resume=Resume.COST, engines={"FSDP2": "the average is spread already"}
    )
    foreach_ema: bool = option(
        True,
        "update the average of all weights by one call instead of one a weight",
        resume=Resume.COST,
        acts_with=("use_ema",),
    )
    ema_lengths: list[float] | None = option(
        None,
        "instead of --use_ema: export an average of this length, a portion of the training such as 0.1, made "
        "afterwards of snapshots (https://arxiv.org/abs/2312.02696); of several that with the lowest validation loss",
        resume=Resume.AVERAGING,
        engines={"FSDP2": "use --use_ema"},
    )
    ema_snapshot_steps: int | None = option(
        None,
        "optimizer steps between these snapshots; by default --checkpointing_steps",
        resume=Resume.AVERAGING,
    )

    def __post_init__(self) -> None:
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "be in [0, 1)")
        require_positive(self, "ema_inv_gamma", "ema_power", "ema_every", "ema_snapshot_steps")
        for length in self.ema_lengths or ():
            require(0 < length <= 0.28, "ema_lengths", length, "be over 0 and at most 0.28, the longest there is")
        if self.use_ema and self.ema_lengths:
            raise UserError("--use_ema and --ema_lengths are two kinds of averages; give one")
        if self.ema_every > 1 and not self.use_ema:
            raise UserError("--ema_every goes with --use_ema; give both or neither")
        if self.ema_snapshot_steps is not None and not self.ema_lengths:
            raise UserError("--ema_snapshot_steps goes with --ema_lengths; give both or neither")


@dataclass(frozen=True)
class TrackingOptions:
    report_to: str = option(
        "tensorboard", "where metrics and samples go", choices=(*TRACKERS, "all", "none"), resume=Resume.REPORTING
    )
    logging_dir: str = option(
        "logs",
        "folder of the trackers' files in output_dir",
        resume=Resume.SAVING,
        acts_with=(IsNot("report_to", ("none",)),),
    )
    tracker_project_name: str = option(
        "text2image-fine-tune",
        "name of the project in the trackers",
        is_text=True,
        resume=Resume.REPORTING,
        acts_with=(IsNot("report_to", ("none",)),),
    )
    logging_steps: int = option(
        1,
        "optimizer steps whose numbers are read from the device at once, a step after the last; so often processes "
        "also agree to stop",
        resume=Resume.REPORTING,
    )
    debug_loss: bool = option(False, "log each image's loss under its file's name", resume=Resume.REPORTING)
    max_skipped_steps: int = option(
        10, "steps in a row without a finite loss and gradient after which the run ends", resume=Resume.LENGTH
    )
    layer_norm_steps: int | None = option(
        None,
        "optimizer steps between gradient norms of each layer in layers.jsonl and the trackers; outliers are named",
        resume=Resume.REPORTING,
        engines={
            "DeepSpeed": "no process has a layer's whole gradient",
            "FSDP2": "no process has a layer's whole gradient",
        },
    )
    histogram_steps: int | None = option(
        None,
        "optimizer steps between histograms of each layer's weights and gradients in the trackers",
        resume=Resume.REPORTING,
        engines={
            "DeepSpeed": "no process has a layer's whole gradient",
            "FSDP2": "no process has a layer's whole gradient",
        },
        acts_with=(IsNot("report_to", ("none",)),),
    )

    def __post_init__(self) -> None:
        require_positive(self, "logging_steps", "max_skipped_steps", "layer_norm_steps", "histogram_steps")

    @property
    def trackers(self) -> list[str]:
        """The trackers asked for; with all those that are installed.

        Raises:
            UserError: if one that is named is not installed.
        """
        if self.report_to == "none":
            return []
        if self.report_to == "all":
            return [name for name in TRACKERS if find_spec(name)]
        if not find_spec(self.report_to):
            raise UserError(f"--report_to {self.report_to} is not installed; pip install {self.report_to}")
        return [self.report_to]


@dataclass(frozen=True)
class HubOptions:
    push_to_hub: bool = option(False, "upload the result and its card", resume=Resume.SAVING)
    hub_model_id: str | None = option(
        None, "repository to upload to; by default the name of output_dir", resume=Resume.SAVING
    )
    hub_token: str | None = option(
        None,
        "token of the Hub; it is written nowhere, yet others on the machine see it in the list of processes, and "
        "launchers print it, so that it is refused under them: set HF_TOKEN in the environment, or `hf auth login`",
        is_text=True,
        resume=Resume.SAVING,
        acts_with=("push_to_hub",),
    )
    hub_private_repo: bool = option(
        False, "create the repository as a private one", resume=Resume.SAVING, acts_with=("push_to_hub",)
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
        "turn on what is safe and pays on this device, each part named in the log with its reason; a part whose check "
        "fails is left out by name. A resumed run may then differ in the last bits",
        resume=Resume.COST,
    )
    compile: str | None = option(
        None,
        "compile the denoiser whole, or only its repeated blocks, of transformers and convolutions, which takes a "
        "fifth of the time; its gradients are compared with the plain one's on a batch first",
        choices=COMPILED,
        const="denoiser",
        resume=Resume.COST,
        engines={"DeepSpeed": "leave it out", "FSDP2": "leave it out"},
    )
    torch_compile: bool = option(
        False,
        "the same as --compile denoiser",
        resume=Resume.COST,
        engines={"DeepSpeed": "leave it out", "FSDP2": "leave it out"},
    )
    cuda_graphs: bool = option(
        False,
        "record the kernels of a whole optimizer step, compiled or not, and replay them as one, which spares small "
        "batches the time to launch each; where a step can't be recorded, the log says why: then only --compile's "
        "passes are, each for itself",
        resume=Resume.COST,
    )
    activation_memory: float | None = option(
        None,
        "with --compile: the portion of the activations' memory to keep, from 0 to 1; the rest is computed again in "
        "the backward pass, the cheapest first",
        resume=Resume.COST,
    )
    cudnn_benchmark: bool = option(
        False,
        "where all images have one size: have cuDNN time its convolutions and take the fastest; a resumed run may then "
        "differ in the last bits",
        resume=Resume.COST,
    )
    attention_backend: str | None = option(
        None,
        "kernels of PyTorch's attention to try first; by default PyTorch chooses by shape and device",
        choices=tuple(ATTENTION),
        resume=Resume.COST,
    )
    bf16_weights: bool = option(
        False,
        "with --mixed_precision bf16: compute with a bfloat16 copy of the denoiser's weights, made once a step, "
        "instead of casts at each use; what trains and is saved stays float32",
        resume=Resume.COST,
        engines={"DeepSpeed": "leave it out", "FSDP2": "weights are gathered in the mixed precision"},
    )
    channels_last: bool = option(
        False, "keep images' channels together in memory, as convolutions on GPUs like it", resume=Resume.COST
    )
    keep_freed_memory: bool | None = option(
        None,
        "on the host, keep memory that a step has freed for the next one; given back to the kernel it would be zeroed "
        "anew (glibc); by default on a CPU",
        resume=Resume.COST,
    )

    def __post_init__(self) -> None:
        if self.torch_compile and self.compile == "blocks":
            raise UserError("--torch_compile is --compile denoiser, got --compile blocks; give one")
        if self.activation_memory is not None:
            require_fraction(self, "activation_memory")
            if self.compiled is None:
                raise UserError("--activation_memory says what --compile keeps; give both")

    @property
    def compiled(self) -> str | None:
        """What is compiled."""
        return self.compile or ("denoiser" if self.torch_compile else None)


@dataclass(frozen=True)
class EarlyStoppingOptions:
    num_validation_timesteps: int = option(
        8,
        "timesteps, evenly spread, at which the validation loss is measured",
        resume=Resume.REPORTING,
        acts_with=HELD_OUT,
    )
    early_stopping_patience: int | None = option(
        None,
        "end the run after this many measurements in a row without a lower validation loss",
        resume=Resume.LENGTH,
    )
    early_stopping_threshold: float = option(
        0.0, "by how much the loss must be lower to count", resume=Resume.LENGTH, acts_with=("early_stopping_patience",)
    )

    def __post_init__(self) -> None:
        require_positive(self, "num_validation_timesteps", "early_stopping_patience")
        require_not_negative(self, "early_stopping_threshold")


@dataclass(frozen=True)
class TrainingOptions:
    """All option groups of a training script. Each script subclasses it and narrows the groups that are its own."""

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
    checkpoint: CheckpointOptions
    runtime: RuntimeOptions
    speed: SpeedOptions
    tracking: TrackingOptions
    hub: HubOptions
    evaluation: EvaluationOptions
    features: FeatureOptions
    controls: SamplingControlOptions

    @property
    def caption_options(self) -> CaptionOptions:
        """How the data's captions are used, or the labels in their place.

        Raises:
            UserError: if labels are asked for in a way that the source does not have.
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
        """Flags that save memory, in the order to try them, and whether they are given."""
        raise NotImplementedError

    @property
    def data_name(self) -> str:
        """The dataset's name, or that of its folder or file."""
        source = self.source
        return source.dataset_name or Path(source.train_data_dir or self.data.dataset_file).name
