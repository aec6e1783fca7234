"""What the trainable pipelines have in common, and what a family must answer."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from utils.families.vae import LatentSpace
from utils.options import UserError, option, require, require_positive

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

TextStates = dict[str, Tensor]
"""What a family's denoiser reads of a caption; the names are the family's own, the first axis is the sample."""


@dataclass(frozen=True)
class ModelOptions:
    pretrained_model_name_or_path: str | None = option(
        None, "pipeline folder, Hub name or single .safetensors file to start from", aliases=["--pretrained_model"]
    )
    pretrained_vae_model_name_or_path: str | None = option(None, "folder or Hub name of another VAE")
    pretrained_model_config: str | None = option(
        None,
        "pipeline folder or Hub name that describes a single-file model; by default found on the Hub by its weights",
    )
    unet_config: str | None = option(None, "JSON config of a fresh UNet, which is trained from scratch")
    revision: str | None = option(None, "revision of the pipeline on the Hub")
    variant: str | None = option(None, "variant of the weight files, such as fp16")
    non_ema_revision: str | None = option(None, "revision of the UNet, where it differs")
    clip_skip: int | None = option(None, "last layers of the text encoders to leave out, as the pipelines' clip_skip")
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass, to save memory")
    enable_xformers_memory_efficient_attention: bool = option(False, "attention by xformers instead of PyTorch's SDPA")
    enable_npu_flash_attention: bool = option(False, "flash attention of Ascend NPUs")

    def __post_init__(self) -> None:
        require_positive(self, "clip_skip")
        if self.pretrained_model_name_or_path is None:
            raise UserError("--pretrained_model is missing; give a pipeline folder, a Hub name or a .safetensors file")
        if self.unet_config is not None:
            require(Path(self.unet_config).is_file(), "unet_config", self.unet_config, "be a JSON file that exists")


@dataclass(frozen=True)
class ComponentDtypes:
    """The dtypes that the weights are loaded in."""

    unet: torch.dtype
    text_encoders: torch.dtype
    frozen: torch.dtype


class Family:
    """A pipeline of one architecture, its parts loaded, with what its training needs to know of them.

    Attributes:
        pipeline: the live diffusers pipeline; its parts are those that are trained.
        latent_space: its VAE.
    """

    pipeline_class_name: str
    default_resolution: int
    default_output_dir: str
    default_validation_epochs: int
    text_encoder_names: tuple[str, ...]
    tokenizer_names: tuple[str, ...]
    unet_lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    text_encoder_lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, source: "PipelineSource", dtypes: ComponentDtypes, prediction_type: str | None):
        self.source = source
        self.pipeline = source.load(self.pipeline_class(), dtypes, self.text_encoder_names)
        self.pipeline.scheduler = _scheduler_for(self.pipeline.scheduler, prediction_type)
        self.latent_space = LatentSpace(self.pipeline.vae)
        self._check_parts()

    @classmethod
    def pipeline_class(cls) -> "type[DiffusionPipeline]":
        """The diffusers class of the pipeline."""
        import diffusers

        return getattr(diffusers, cls.pipeline_class_name)

    @property
    def unet(self) -> nn.Module:
        """The denoiser."""
        return self.pipeline.unet

    @property
    def text_encoders(self) -> list[nn.Module]:
        """In the order of `text_encoder_names`."""
        return [getattr(self.pipeline, name) for name in self.text_encoder_names]

    def _check_parts(self) -> None:
        in_channels, latent_channels = self.unet.config.in_channels, self.latent_space.channels
        if in_channels != latent_channels:
            raise UserError(
                f"the UNet takes {in_channels} channels but the VAE's latents have {latent_channels}; "
                "inpainting and depth models are not trained here"
            )
        width = sum(encoder.config.hidden_size for encoder in self.text_encoders)
        expected = self.unet.config.cross_attention_dim
        if isinstance(expected, int) and expected != width:
            flag = "--unet_config" if self.source.options.unet_config else "the UNet"
            raise UserError(f"{flag} has cross_attention_dim {expected} but the text encoders give {width}")
        if self.source.options.clip_skip is not None:
            layers = min(encoder.config.num_hidden_layers for encoder in self.text_encoders)
            require(
                self.source.options.clip_skip < layers - 1,
                "clip_skip",
                self.source.options.clip_skip,
                f"be below {layers - 1} for these text encoders",
            )

    def check_resolution(self, resolution: int) -> None:
        """Refuses an edge whose latents would not be whole."""
        factor = self.latent_space.factor
        require(
            resolution % factor == 0,
            "resolution",
            resolution,
            f"be divisible by {factor} for this VAE",
            f"try {max(factor, resolution - resolution % factor)}",
        )

    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """A function for the loader's workers: B captions -> [B, text encoders, tokens] int64, padded and cut."""
        return Tokenize([getattr(self.pipeline, name) for name in self.tokenizer_names])

    def encode_text(self, input_ids: Tensor) -> TextStates:
        """The text states of [B, text encoders, tokens] input ids."""
        raise NotImplementedError

    def drop_captions(self, states: TextStates, dropped: Tensor) -> TextStates:
        """The states as inference has them without a caption where `dropped`, [B] bool; the ids there are of ""."""
        return states

    def predict(self, unet: nn.Module, noisy: Tensor, timesteps: Tensor, states: TextStates, crops: Tensor) -> Tensor:
        """The denoiser's prediction [B, C, h, w] of noisy latents, under text states and crops [B, 6]."""
        raise NotImplementedError

    def reads_text_parameter(self, encoder: int, name: str) -> bool:
        """Whether the pipeline's text states depend on this parameter of a text encoder."""
        raise NotImplementedError

    def prompt_arguments(self, prompt: str, negative_prompt: str | None) -> dict[str, Tensor]:
        """The keyword arguments by which the pipeline takes an encoded prompt and negative prompt."""
        raise NotImplementedError

    def trainable_names(self) -> tuple[str, ...]:
        """The parts that can be trained, the denoiser first."""
        return ("unet", *self.text_encoder_names)

    def freeze(self) -> None:
        """Freezes all parts and puts them in evaluation mode."""
        for name in (*self.trainable_names(), "vae"):
            getattr(self.pipeline, name).requires_grad_(False).eval()

    def to(self, device: torch.device) -> None:
        """Moves all parts to the device; an fp16 VAE that overflows runs in bf16 where that is had, else float32."""
        vae = self.pipeline.vae
        if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
            has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
            vae.to(torch.bfloat16 if has_bfloat16 else torch.float32)
        for name in (*self.trainable_names(), "vae"):
            getattr(self.pipeline, name).to(device)

    def use_attention(self) -> None:
        """Switches the attention kernels that were asked for.

        Raises:
            UserError: if they don't load here.
        """
        options = self.source.options
        if options.enable_xformers_memory_efficient_attention:
            try:
                self.unet.enable_xformers_memory_efficient_attention()
            except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(
                    f"--enable_xformers_memory_efficient_attention: its kernels do not load here ({reason}); leave the "
                    "flag out, PyTorch's attention is as fast, or install the xformers wheel of this torch"
                ) from error
        if options.enable_npu_flash_attention:
            try:
                self.unet.enable_npu_flash_attention()
            except (ImportError, RuntimeError, AttributeError) as error:
                raise UserError(f"--enable_npu_flash_attention needs an Ascend NPU and torch_npu: {error}") from error

    def use_gradient_checkpointing(self, text_encoders: bool) -> None:
        """Computes activations again in the backward pass, in the denoiser and if asked in the text encoders."""
        self.unet.enable_gradient_checkpointing()
        if text_encoders:
            for encoder in self.text_encoders:
                encoder.gradient_checkpointing_enable()

    def float32_pipeline(self, **parts: nn.Module) -> "DiffusionPipeline":
        """The source's pipeline in float32 with some parts replaced: what is exported."""
        return self.source.load_whole(self.pipeline_class(), scheduler=self.pipeline.scheduler, **parts)


class Tokenize:
    """Tokenizes captions for each text encoder, padded and cut to the length it takes; a cut caption keeps its end."""

    def __init__(self, tokenizers: list):
        self._tokenizers = tokenizers

    def __call__(self, captions: list[str]) -> Tensor:
        ids = [
            tokenizer(
                captions,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self._tokenizers
        ]
        return torch.stack(ids, dim=1)


@dataclass(frozen=True)
class PipelineSource:
    """Where a pipeline is loaded from."""

    options: ModelOptions

    @property
    def path(self) -> str:
        """The folder, Hub name or file."""
        return self.options.pretrained_model_name_or_path

    @property
    def is_single_file(self) -> bool:
        """Whether it is one file of weights."""
        return self.path.endswith(".safetensors")

    def load(
        self, pipeline_class: "type[DiffusionPipeline]", dtypes: ComponentDtypes, text_encoder_names: tuple[str, ...]
    ) -> "DiffusionPipeline":
        """The pipeline with what training and sampling need, on the CPU: no safety checker, no image encoder."""
        parts: dict[str, Any] = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
        parts = {name: part for name, part in parts.items() if name in pipeline_class._optional_components}
        if "requires_safety_checker" in pipeline_class.__init__.__annotations__:
            parts["requires_safety_checker"] = False
        parts |= self._own_parts(dtypes)
        if self.is_single_file:
            pipeline = self._load_single_file(pipeline_class, parts)
            for name in text_encoder_names:
                getattr(pipeline, name).to(dtypes.text_encoders)
            pipeline.unet.to(dtypes.unet)
            pipeline.vae.to(dtypes.frozen)
            return pipeline
        by_name = dict.fromkeys(text_encoder_names, dtypes.text_encoders)
        return self._from_pretrained(
            pipeline_class, dtype={"unet": dtypes.unet, "default": dtypes.frozen, **by_name}, **parts
        )

    def load_whole(self, pipeline_class: "type[DiffusionPipeline]", **parts: Any) -> "DiffusionPipeline":
        """The pipeline with all it came with, in float32, some parts replaced."""
        float32 = ComponentDtypes(torch.float32, torch.float32, torch.float32)
        replaced = self._own_parts(float32, with_unet="unet" not in parts) | parts
        if self.is_single_file:
            return self._load_single_file(pipeline_class, replaced).to(torch.float32)
        return self._from_pretrained(pipeline_class, dtype=torch.float32, **replaced)

    def _own_parts(self, dtypes: ComponentDtypes, with_unet: bool = True) -> dict[str, nn.Module]:
        """The parts that come from elsewhere than the pipeline."""
        from diffusers import AutoencoderKL, UNet2DConditionModel

        options, parts = self.options, {}
        if options.pretrained_vae_model_name_or_path is not None:
            parts["vae"] = self._component(
                AutoencoderKL,
                "pretrained_vae_model_name_or_path",
                options.pretrained_vae_model_name_or_path,
                dtypes.frozen,
            )
        if with_unet and options.unet_config is not None:
            parts["unet"] = _fresh_unet(options.unet_config).to(dtypes.unet)
        elif with_unet and options.non_ema_revision is not None:
            parts["unet"] = UNet2DConditionModel.from_pretrained(
                self.path, subfolder="unet", revision=options.non_ema_revision, use_safetensors=True, dtype=dtypes.unet
            )
        return parts

    def _component(self, component_class: type, flag: str, path: str, dtype: torch.dtype) -> nn.Module:
        subfolder = "vae" if (Path(path) / "vae" / "config.json").is_file() else None
        try:
            return component_class.from_pretrained(path, subfolder=subfolder, use_safetensors=True, dtype=dtype)
        except (OSError, ValueError) as error:
            raise UserError(f"--{flag} {path} can't be loaded: {_first_line(error)}") from error

    def _from_pretrained(self, pipeline_class: "type[DiffusionPipeline]", **arguments: Any) -> "DiffusionPipeline":
        try:
            return pipeline_class.from_pretrained(
                self.path,
                revision=self.options.revision,
                variant=self.options.variant,
                use_safetensors=True,
                **arguments,
            )
        except (OSError, ValueError) as error:
            raise UserError(f"--pretrained_model {self.path} can't be loaded: {_first_line(error)}") from error

    def _load_single_file(self, pipeline_class: "type[DiffusionPipeline]", parts: dict) -> "DiffusionPipeline":
        # a part given as None counts as missing there, and a part that is missing is left out anyway
        given = {name: part for name, part in parts.items() if part is not None}
        try:
            return pipeline_class.from_single_file(self.path, config=self.options.pretrained_model_config, **given)
        except (OSError, ValueError) as error:
            raise UserError(f"--pretrained_model {self.path} can't be loaded: {_first_line(error)}") from error


def _fresh_unet(config_file: str) -> nn.Module:
    from diffusers import UNet2DConditionModel

    try:
        config = json.loads(Path(config_file).read_text(encoding="utf-8"))
        return UNet2DConditionModel.from_config(config)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--unet_config {config_file} is no config of a UNet2DConditionModel: {error}") from error


def _scheduler_for(scheduler: Any, prediction_type: str | None) -> Any:
    """The pipeline's scheduler with another prediction type, as one that knows it."""
    from diffusers import DDIMScheduler, PNDMScheduler

    if prediction_type is None:
        return scheduler
    knows_it = not (isinstance(scheduler, PNDMScheduler) and prediction_type == "sample")
    return (type(scheduler) if knows_it else DDIMScheduler).from_config(
        scheduler.config, prediction_type=prediction_type
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_in_read_layers(name: str, num_read_layers: int) -> bool:
    """Whether a parameter of a CLIP text encoder stands in one of its first layers, or before or behind them all."""
    _, found, rest = name.partition("encoder.layers.")
    return not found or int(rest.partition(".")[0]) < num_read_layers
