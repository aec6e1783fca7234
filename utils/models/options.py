"""The options of what is trained: the pipeline, or the shape of a denoiser from scratch, and further loss terms."""

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
CHUNK_TOKENS = 75  # of a caption, in one pass of a CLIP text encoder: its 77 less the beginning and the end
XFORMERS_MISSING = "--enable_xformers_memory_efficient_attention: its kernels do not load here"
XFORMERS_CURE = "leave the flag out, PyTorch's attention is as fast, or install the xformers wheel of this torch"
ATTENTION = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}
CPU_ATTENTION = ("flash", "math")
QUANTIZATIONS = ("nf4", "int8")

PROMPTS = ("validation_prompts", "validation_prompt")
PRETRAINED = (
    *("pretrained_model_name_or_path", "vae", "perceptual_network", "eval_metrics"),
    *("pipeline", "checkpoints", "images"),  # the metrics of images need networks too
)


def weight_files(*flags: str) -> tuple[str, ...]:
    """That one of some flags names a single file of weights."""
    return tuple(f"{flag}=*{ending}" for flag in flags for ending in (".safetensors", *PICKLES))


@dataclass(frozen=True)
class ShapeOptions:
    """The shape of a denoiser from scratch."""

    model_config_name_or_path: str | None = option(
        None, "JSON config of the denoiser, or the folder or Hub name that holds one (its weights are left)"
    )
    model_size: str | None = option(
        None,
        "size of the denoiser: base by default, with as many levels as the resolution allows",
        choices=MODEL_SIZES,
        resume=Resume.STRUCTURE,
    )
    model_channels: int | None = option(
        None, "channels of the first level; of a transformer its width", resume=Resume.STRUCTURE
    )
    channel_mult: list[int] | None = option(
        None, "each level's channels in multiples of that, such as 1 2 2", resume=Resume.STRUCTURE
    )
    layers_per_block: int | None = option(
        None, "residual blocks of a level; of a transformer its blocks", resume=Resume.STRUCTURE
    )
    attention_resolutions: list[int] | None = option(
        None, "edges of the levels that attend, such as 16 8; 0 for none", resume=Resume.STRUCTURE
    )
    attention_head_dim: int | None = option(None, "channels of an attention head", resume=Resume.STRUCTURE)
    patch_size: int | None = option(
        None, "edge of the patches that a transformer sees, 2 by default", resume=Resume.STRUCTURE
    )
    dropout: float = option(0.0, "dropout in the denoiser", acts_with=(Absent("pretrained_model_name_or_path"),))
    weight_init: str = option(
        "default",
        "first weights: diffusers' with the last layer of each residual branch at zero, or matrices by Xavier and "
        "convolutions by Kaiming throughout",
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
            raise UserError(f"--model_config_name_or_path says the denoiser's whole shape; leave out --{flag}")

    @property
    def given(self) -> list[str]:
        """The flags of a shape that were given."""
        names = ("model_config_name_or_path", "model_size", *SHAPE_FLAGS, "patch_size")
        return [name for name in names if getattr(self, name) is not None]

    @property
    def structure(self) -> dict[str, object]:
        """What a checkpoint can only be resumed with, by flag."""
        return {name: getattr(self, name) for name in ("model_size", *SHAPE_FLAGS, "patch_size")}


@dataclass(frozen=True)
class LoadingOptions:
    allow_missing_weights: list[str] | None = option(
        None,
        "beginnings of the names of weights that pretrained parts may lack or have too many of, such as "
        "text_encoder.text_projection; what is missing is initialised at random",
        acts_with=PRETRAINED,
    )

    def __post_init__(self) -> None:
        for prefix in self.allow_missing_weights or ():
            require(bool(prefix.strip()), "allow_missing_weights", repr(prefix), "be the beginning of a name")


@dataclass(frozen=True)
class TermOptions:
    loss_module: str | None = option(
        None,
        "Python file with a loss term of your own, such as examples/adversarial_loss.py",
        resume=Resume.COMPARED,
        engines={"DeepSpeed": "train it by DDP", "FSDP2": "train it by DDP"},
    )
    loss_module_args: list[str] | None = option(None, "its arguments, such as weight=0.1", is_text=True)
    loss_module_lr: float | None = option(
        None, "peak learning rate of the term's own parameters; by default --learning_rate"
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
                raise UserError(f"--{name} goes with --loss_module; give both or neither")
        for word in self.loss_module_args or ():
            require("=" in word, "loss_module_args", word, "be NAME=VALUE")

    @property
    def arguments(self) -> dict[str, object]:
        """The words of `loss_module_args` by their names: numbers as such, and paths under ~ in full."""
        pairs = (word.partition("=") for word in self.loss_module_args or ())
        return {name: _as_value(value) for name, _, value in pairs}


def _as_value(word: str) -> object:
    if word.startswith("~/"):  # which the shell leaves as it is behind a =
        return os.path.expanduser(word)
    return int(word) if word.lstrip("-").isdigit() else as_number(word)


@dataclass(frozen=True)
class PerceptualOptions:
    perceptual_weight: float | None = option(
        None,
        "weight of a loss between decoded images, in the features of --perceptual_network",
        engines={"FSDP2": "train with it by DDP"},
    )
    perceptual_network: str | None = option(
        None, "folder or Hub name of an image model of transformers, such as microsoft/resnet-50 or a DINOv2"
    )
    perceptual_min_timestep: int = option(0, "smallest timestep that it applies to")
    perceptual_max_timestep: int | None = option(
        None, "timestep before which it ends; by default it applies to all, though little is to be seen in late ones"
    )

    def __post_init__(self) -> None:
        require_positive(self, "perceptual_weight", "perceptual_max_timestep")
        require_not_negative(self, "perceptual_min_timestep")
        if (self.perceptual_weight is None) != (self.perceptual_network is None):
            raise UserError("--perceptual_weight and --perceptual_network go together; give both or neither")
        begin, end = self.perceptual_min_timestep, self.perceptual_max_timestep
        if self.perceptual_weight is None and (begin or end is not None):
            raise UserError("--perceptual_min_timestep and --perceptual_max_timestep go with --perceptual_weight")
        if end is not None and end <= begin:
            raise UserError(f"--perceptual_max_timestep must be over --perceptual_min_timestep {begin}, got {end}")


@dataclass(frozen=True)
class PartOptions:
    """How the parts of a pipeline are loaded and run, whatever it draws from."""

    revision: str | None = option(
        None, "revision of the pipeline on the Hub", acts_with=(OnHub("pretrained_model_name_or_path"),)
    )
    variant: str | None = option(None, "variant of the weight files, such as fp16")
    allow_pickle: bool = option(
        False, "also load weights that are kept as pickles (.bin, .ckpt); of these too nothing but tensors is read"
    )
    gradient_checkpointing: bool = option(
        False, "compute activations again in the backward pass, to save memory", resume=Resume.COST
    )
    vae_slicing: bool = option(
        False, "run the VAE on one image after the other: less memory, the same numbers", resume=Resume.COST
    )
    vae_tiling: bool = option(False, "run the VAE on large images tile by tile: less memory, seams change a little")
    enable_xformers_memory_efficient_attention: bool = option(False, "attention by xformers instead of PyTorch's SDPA")
    enable_npu_flash_attention: bool = option(False, "flash attention of Ascend NPUs")

    def __post_init__(self) -> None:
        if self.enable_xformers_memory_efficient_attention and find_spec("xformers") is None:
            raise UserError(f"{XFORMERS_MISSING} (it is not installed); {XFORMERS_CURE}")

    @property
    def use_safetensors(self) -> bool | None:
        """As diffusers and transformers take it: True, or None for pickles where there is nothing else."""
        return None if self.allow_pickle else True


@dataclass(frozen=True)
class ModelOptions(PartOptions):
    pretrained_model_name_or_path: str | None = option(
        None, "pipeline folder, Hub name or single .safetensors file to start from", aliases=["--pretrained_model"]
    )
    pretrained_vae_model_name_or_path: str | None = option(
        None, "folder, Hub name or single .safetensors file of another VAE"
    )
    pretrained_model_config: str | None = option(
        None,
        "pipeline folder or Hub name that describes a single-file model; by default found on the Hub by its weights",
        acts_with=weight_files("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"),
    )
    unet_config: str | None = option(None, "JSON config of a fresh UNet, which is trained from scratch")
    non_ema_revision: str | None = option(
        None, "revision of the UNet, where it differs", acts_with=(OnHub("pretrained_model_name_or_path"),)
    )
    clip_skip: int | None = option(None, "last layers of the text encoders to leave out, as the pipelines' clip_skip")
    max_token_length: int = option(
        CHUNK_TOKENS, "tokens of a caption that are read, in chunks of 75; kohya's 150 and 225"
    )
    attention_slicing: bool = option(
        False, "compute attention one head after the other: less memory, slower", resume=Resume.COST
    )
    sampling_cpu_offload: bool = option(
        False,
        "while samples are drawn, keep on the device only the part of the pipeline that is at work; with --use_ema the "
        "weights that the average stands in for stay there",
        resume=Resume.COST,
        engines={"FSDP2": "weights are gathered for sampling on the device"},
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
                "--enable_xformers_memory_efficient_attention takes no mask, which --max_token_length "
                f"{length} needs; leave it out, PyTorch's attention is as fast"
            )
        if self.attention_slicing and self.enable_xformers_memory_efficient_attention:
            raise UserError("--attention_slicing would replace xformers' attention; leave one out")
        super().__post_init__()
        if self.non_ema_revision is not None and self.pretrained_model_name_or_path.endswith(".safetensors"):
            raise UserError("--non_ema_revision is of a pipeline on the Hub, not of a single file; leave it out")

    @property
    def num_chunks(self) -> int:
        """Chunks in which a caption is read, each in a pass of its own."""
        return self.max_token_length // CHUNK_TOKENS


@dataclass(frozen=True)
class UnconditionalModelOptions(ShapeOptions, PartOptions):
    """What is trained: a pretrained pipeline, or a denoiser from scratch."""

    attention_slicing: ClassVar[bool] = False
    sampling_cpu_offload: ClassVar[bool] = False

    pretrained_model_name_or_path: str | None = option(
        None,
        "folder or Hub name of a DDPM, DDIM, LDM, score, DiT or ConditionalDDPM pipeline whose training continues",
        aliases=["--pretrained_model"],
    )
    vae: str | None = option(
        None, "folder or Hub name of a pretrained VAE in whose latents a denoiser from scratch is trained"
    )

    def __post_init__(self) -> None:
        ShapeOptions.__post_init__(self)
        PartOptions.__post_init__(self)
        if self.pretrained_model_name_or_path is not None and self.given:
            raise UserError(f"--{self.given[0]} is of a denoiser from scratch; --pretrained_model has its own")
        if self.pretrained_model_name_or_path is not None and self.vae is not None:
            raise UserError("--vae is for a denoiser from scratch; the pipeline of --pretrained_model has its own")

    @property
    def origin(self) -> str:
        """What is trained from, in words."""
        return self.pretrained_model_name_or_path or self.model_config_name_or_path or (self.model_size or "base")


def check_quantization(kind: str | None) -> None:
    """Refuses a quantisation whose package is missing."""
    if kind is not None and find_spec("bitsandbytes") is None:
        raise UserError(f"--quantize_base {kind} needs bitsandbytes; pip install bitsandbytes")
