"""Options of the model: a pretrained pipeline, or the shape of a denoiser from scratch, and extra loss terms."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from utils.config.flag_rules import Absent, OnHub, Resume
from utils.config.options import UserError, as_number, option, require, require_not_negative, require_positive

MODEL_SIZES = ("tiny", "small", "base", "large")
WEIGHT_INITS = ("default", "xavier_kaiming")
SHAPE_FLAGS = ("model_channels", "channel_mult", "layers_per_block", "attention_resolutions", "attention_head_dim")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
CHUNK_TOKENS = 75  # caption tokens per pass of a CLIP text encoder: its 77 without start and end
XFORMERS_MISSING = "--enable_xformers_memory_efficient_attention: its kernels can't be loaded"
XFORMERS_CURE = "leave the flag out (PyTorch's attention is as fast), or install the xformers wheel for this torch"
ATTENTION = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}
CPU_ATTENTION = ("flash", "math")
QUANTIZATIONS = ("nf4", "int8")

PROMPTS = ("validation_prompts", "validation_prompt", "validation_prompts_file")
PRETRAINED = (
    *("pretrained_model_name_or_path", "vae", "perceptual_network", "eval_metrics"),
    *("pipeline", "checkpoints", "images"),  # the metrics of images also load networks
)


def weight_files(*flags: str) -> tuple[str, ...]:
    """Returns the conditions that one of some flags names a single weight file."""
    return tuple(f"{flag}=*{ending}" for flag in flags for ending in (".safetensors", *PICKLES))


@dataclass(frozen=True)
class ShapeOptions:
    """The shape of a denoiser from scratch."""

    model_config_name_or_path: str | None = option(
        None, "JSON config of the denoiser, or a folder or Hub name that has one (its weights are not loaded)"
    )
    model_size: str | None = option(
        None,
        "size of the denoiser (default: base); levels that the resolution does not allow are left out",
        choices=MODEL_SIZES,
        resume=Resume.STRUCTURE,
    )
    model_channels: int | None = option(
        None, "channels of the UNet's first level, or width of the transformer", resume=Resume.STRUCTURE
    )
    channel_mult: list[int] | None = option(
        None, "channels per level as multiples of --model_channels, such as 1 2 2", resume=Resume.STRUCTURE
    )
    layers_per_block: int | None = option(
        None, "residual blocks per UNet level, or blocks of the transformer", resume=Resume.STRUCTURE
    )
    attention_resolutions: list[int] | None = option(
        None, "edges of the levels with attention, such as 16 8; 0 for none", resume=Resume.STRUCTURE
    )
    attention_head_dim: int | None = option(None, "channels per attention head", resume=Resume.STRUCTURE)
    patch_size: int | None = option(None, "edge of the transformer's patches (default: 2)", resume=Resume.STRUCTURE)
    dropout: float = option(0.0, "dropout rate in the denoiser", acts_with=(Absent("pretrained_model_name_or_path"),))
    weight_init: str = option(
        "default",
        "weight initialization: diffusers' with the last layer of each residual branch set to zero, or Xavier for all "
        "matrices and Kaiming for all convolutions",
        choices=WEIGHT_INITS,
        acts_with=(Absent("pretrained_model_name_or_path"),),
    )

    def __post_init__(self) -> None:
        require_positive(self, "model_channels", "layers_per_block", "attention_head_dim", "patch_size")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "be in [0, 1)")
        for multiple in self.channel_mult or ():
            require(multiple > 0, "channel_mult", multiple, "be whole numbers above 0, such as 1 2 2")
        for edge in self.attention_resolutions or ():
            require(edge >= 0, "attention_resolutions", edge, "be edges of levels, such as 16 8")
        given = [name for name in SHAPE_FLAGS if getattr(self, name) is not None]
        if self.model_config_name_or_path is not None and (given or self.model_size is not None):
            flag = given[0] if given else "model_size"
            raise UserError(f"--model_config_name_or_path sets the denoiser's whole shape; leave out --{flag}")

    @property
    def given(self) -> list[str]:
        """Names of the shape flags that were given."""
        names = ("model_config_name_or_path", "model_size", *SHAPE_FLAGS, "patch_size")
        return [name for name in names if getattr(self, name) is not None]

    @property
    def structure(self) -> dict[str, object]:
        """The options that a checkpoint's weights depend on, by flag."""
        return {name: getattr(self, name) for name in ("model_size", *SHAPE_FLAGS, "patch_size")}


@dataclass(frozen=True)
class LoadingOptions:
    """Which weights may be missing when pretrained parts are loaded."""

    allow_missing_weights: list[str] | None = option(
        None,
        "prefixes of weight names that pretrained parts may lack or have in excess, such as "
        "text_encoder.text_projection; missing weights are initialized randomly",
        acts_with=PRETRAINED,
    )

    def __post_init__(self) -> None:
        for prefix in self.allow_missing_weights or ():
            require(bool(prefix.strip()), "allow_missing_weights", repr(prefix), "be a prefix of weight names")


@dataclass(frozen=True)
class TermOptions:
    """A user-defined loss term."""

    loss_module: str | None = option(
        None,
        "Python file that defines your own loss term, such as examples/adversarial_loss.py",
        resume=Resume.COMPARED,
        engines={"DeepSpeed": "use DDP to train with it", "FSDP2": "use DDP to train with it"},
    )
    loss_module_args: list[str] | None = option(None, "arguments of the loss term, such as weight=0.1", is_text=True)
    loss_module_lr: float | None = option(
        None, "peak learning rate of the loss term's own parameters (default: --learning_rate)"
    )

    def __post_init__(self) -> None:
        require_positive(self, "loss_module_lr")
        file = self.loss_module
        require(
            file is None or (Path(file).is_file() and file.endswith(".py")),
            "loss_module",
            file,
            "be a Python file that exists",
        )
        for name in ("loss_module_args", "loss_module_lr"):
            if getattr(self, name) is not None and file is None:
                raise UserError(f"--{name} needs --loss_module; give both or neither")
        for word in self.loss_module_args or ():
            require("=" in word, "loss_module_args", word, "be NAME=VALUE")

    @property
    def arguments(self) -> dict[str, object]:
        """The arguments of the loss term by name; numbers are converted, and paths starting with ~ expanded."""
        pairs = (word.partition("=") for word in self.loss_module_args or ())
        return {name: _as_value(value) for name, _, value in pairs}


def _as_value(word: str) -> object:
    if word.startswith("~/"):  # the shell does not expand it after =
        return os.path.expanduser(word)
    return int(word) if word.lstrip("-").isdigit() else as_number(word)


@dataclass(frozen=True)
class PerceptualOptions:
    """A perceptual loss between decoded images."""

    perceptual_weight: float | None = option(
        None,
        "weight of a loss between decoded images, on features of --perceptual_network",
        engines={"FSDP2": "use DDP to train with it"},
    )
    perceptual_network: str | None = option(
        None, "folder or Hub name of a transformers image model, such as microsoft/resnet-50 or a DINOv2"
    )
    perceptual_min_timestep: int = option(0, "first timestep to which the perceptual loss applies")
    perceptual_max_timestep: int | None = option(
        None, "timestep before which the perceptual loss ends (default: none, though late ones show little)"
    )

    def __post_init__(self) -> None:
        require_positive(self, "perceptual_weight", "perceptual_max_timestep")
        require_not_negative(self, "perceptual_min_timestep")
        if (self.perceptual_weight is None) != (self.perceptual_network is None):
            raise UserError("--perceptual_weight and --perceptual_network need each other; give both or neither")
        begin, end = self.perceptual_min_timestep, self.perceptual_max_timestep
        if self.perceptual_weight is None and (begin or end is not None):
            raise UserError("--perceptual_min_timestep and --perceptual_max_timestep need --perceptual_weight")
        if end is not None and end <= begin:
            raise UserError(f"--perceptual_max_timestep must be above --perceptual_min_timestep {begin}, got {end}")


@dataclass(frozen=True)
class PartOptions:
    """How the components of any pipeline are loaded and run."""

    revision: str | None = option(
        None, "revision of the pipeline on the Hub (default: main)", acts_with=(OnHub("pretrained_model_name_or_path"),)
    )
    variant: str | None = option(None, "variant of the weight files, such as fp16")
    allow_pickle: bool = option(
        False, "also load weights stored as pickles (.bin, .ckpt); only tensors are read from them"
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, slower", resume=Resume.COST
    )
    vae_slicing: bool = option(
        False, "run the VAE on one image at a time: less memory, same results", resume=Resume.COST
    )
    vae_tiling: bool = option(False, "run the VAE on tiles of large images: less memory, slight changes at seams")
    enable_xformers_memory_efficient_attention: bool = option(False, "use xformers attention instead of PyTorch's")
    enable_npu_flash_attention: bool = option(False, "use flash attention of Ascend NPUs")

    def __post_init__(self) -> None:
        if self.enable_xformers_memory_efficient_attention and find_spec("xformers") is None:
            raise UserError(f"{XFORMERS_MISSING} (it is not installed); {XFORMERS_CURE}")

    @property
    def use_safetensors(self) -> bool | None:
        """The value for diffusers and transformers: True, or None to fall back to pickles."""
        return None if self.allow_pickle else True


@dataclass(frozen=True)
class ModelOptions(PartOptions):
    """The pretrained text-to-image pipeline, and how it is loaded and run."""

    pretrained_model_name_or_path: str | None = option(
        None, "pipeline folder, Hub name or single .safetensors file to start from", aliases=["--pretrained_model"]
    )
    pretrained_vae_model_name_or_path: str | None = option(
        None, "folder, Hub name or single .safetensors file of a VAE to use instead of the pipeline's"
    )
    pretrained_model_config: str | None = option(
        None,
        "pipeline folder or Hub name with configs of a single-file model (default: beside it or from the Hub)",
        acts_with=weight_files("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"),
    )
    unet_config: str | None = option(None, "JSON config of a new UNet to train from scratch")
    non_ema_revision: str | None = option(
        None, "Hub revision of the UNet, if it differs", acts_with=(OnHub("pretrained_model_name_or_path"),)
    )
    clip_skip: int | None = option(None, "number of last text-encoder layers to skip, as the pipelines' clip_skip")
    max_token_length: int = option(
        CHUNK_TOKENS, "maximum number of tokens read of a caption: a multiple of 75, such as kohya's 150 and 225"
    )
    attention_slicing: bool = option(
        False, "compute attention one head at a time: less memory, slower", resume=Resume.COST
    )
    sampling_cpu_offload: bool = option(
        False,
        "while sampling, keep only the active component on the device; with --use_ema the weights that the average "
        "replaces stay there",
        resume=Resume.COST,
        engines={"FSDP2": "weights are gathered on the device for sampling"},
        acts_with=PROMPTS,
    )

    def __post_init__(self) -> None:
        require_positive(self, "clip_skip")
        if self.pretrained_model_name_or_path is None:
            raise UserError("--pretrained_model is missing; give a pipeline folder, a Hub name or a .safetensors file")
        if self.unet_config is not None:
            require(Path(self.unet_config).is_file(), "unet_config", self.unet_config, "be a JSON file that exists")
        length, below = self.max_token_length, self.num_chunks * CHUNK_TOKENS
        cure = f"try {below} or {below + CHUNK_TOKENS}" if below > 0 else f"try {CHUNK_TOKENS}"
        fits = length == below > 0
        require(fits, "max_token_length", length, f"be a positive multiple of {CHUNK_TOKENS}", cure)
        if self.enable_xformers_memory_efficient_attention and self.num_chunks > 1:
            raise UserError(
                "--enable_xformers_memory_efficient_attention supports no mask, which --max_token_length "
                f"{length} needs; leave it out, PyTorch's attention is as fast"
            )
        if self.attention_slicing and self.enable_xformers_memory_efficient_attention:
            raise UserError("--attention_slicing would replace xformers' attention; leave one out")
        super().__post_init__()
        if self.non_ema_revision is not None and self.pretrained_model_name_or_path.endswith(".safetensors"):
            raise UserError("--non_ema_revision is for a pipeline on the Hub, not for a single file; leave it out")

    @property
    def is_pretrained(self) -> bool:
        """Whether the denoiser was trained before."""
        return self.unet_config is None

    @property
    def num_chunks(self) -> int:
        """Number of chunks of a caption, each encoded in its own pass."""
        return self.max_token_length // CHUNK_TOKENS


@dataclass(frozen=True)
class UnconditionalModelOptions(ShapeOptions, PartOptions):
    """The model to train without text: a pretrained pipeline, or a denoiser from scratch."""

    attention_slicing: ClassVar[bool] = False
    sampling_cpu_offload: ClassVar[bool] = False

    pretrained_model_name_or_path: str | None = option(
        None,
        "folder or Hub name of a DDPM, DDIM, LDM, score, DiT or ConditionalDDPM pipeline to fine-tune",
        aliases=["--pretrained_model"],
    )
    vae: str | None = option(
        None, "folder or Hub name of a pretrained VAE, to train a denoiser from scratch on its latents"
    )

    def __post_init__(self) -> None:
        ShapeOptions.__post_init__(self)
        PartOptions.__post_init__(self)
        if self.pretrained_model_name_or_path is not None and self.given:
            raise UserError(f"--{self.given[0]} is for a denoiser from scratch; --pretrained_model has its own shape")
        if self.pretrained_model_name_or_path is not None and self.vae is not None:
            raise UserError("--vae is for a denoiser from scratch; the pipeline of --pretrained_model has its own")

    @property
    def is_pretrained(self) -> bool:
        """Whether the denoiser was trained before."""
        return self.pretrained_model_name_or_path is not None

    @property
    def origin(self) -> str:
        """What training starts from, for the log: a path, a Hub name or a size."""
        return self.pretrained_model_name_or_path or self.model_config_name_or_path or (self.model_size or "base")


def check_quantization(kind: str | None) -> None:
    """Refuses a quantization whose package is not installed."""
    if kind is not None and find_spec("bitsandbytes") is None:
        raise UserError(f"--quantize_base {kind} needs bitsandbytes; pip install bitsandbytes")
