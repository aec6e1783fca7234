"""What the trainable pipelines have in common, and what a family must answer."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from utils.families.source import XFORMERS_CURE, XFORMERS_MISSING, ComponentDtypes, PipelineSource
from utils.families.vae import LatentSpace
from utils.options import UserError, first_line, require

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MAX_TOKENS = 10_000  # a tokenizer that does not say its length says a number beyond all bounds
TextStates = dict[str, Tensor]
"""What a family's denoiser reads of a caption; the names are the family's own, the first axis is the sample."""


class Family(ABC):
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

    def __init__(self, source: PipelineSource, dtypes: ComponentDtypes, scheduler_changes: Mapping[str, object]):
        self.source = source
        self.pipeline = source.load(self.pipeline_class(), dtypes, self.text_encoder_names)
        self.pipeline.scheduler = changed_scheduler(self.pipeline.scheduler, scheduler_changes)
        self.latent_space = LatentSpace(self.pipeline.vae)
        for name in self.tokenizer_names:
            if getattr(self.pipeline, name).model_max_length > MAX_TOKENS:
                raise UserError(f"--pretrained_model {source.path}: its {name} is missing or has no model_max_length")
        self.check(source, {name: getattr(self.pipeline, name).config for name in (*self.trainable_names(), "vae")})
        if source.options.unet_config is not None:
            self._probe_unet()

    @classmethod
    def check(cls, source: PipelineSource, configs: Mapping[str, Mapping]) -> None:
        """Refuses parts that don't fit together, by their configs; what a config does not say is taken to fit."""
        unet, encoders = configs["unet"], [configs[name] for name in cls.text_encoder_names]
        in_channels, latent_channels = unet.get("in_channels", 4), configs["vae"].get("latent_channels", 4)
        if in_channels != latent_channels:
            raise UserError(
                f"the UNet takes {in_channels} channels but the VAE's latents have {latent_channels}; "
                "inpainting and depth models are not trained here"
            )
        expected, widths = unet.get("cross_attention_dim"), _each(encoders, "hidden_size")
        if isinstance(expected, int) and widths and expected != sum(widths):
            flag = f"--unet_config {source.options.unet_config}" if source.options.unet_config else "the UNet"
            raise UserError(f"{flag} has cross_attention_dim {expected} but the text encoders give {sum(widths)}")
        skip, layers = source.options.clip_skip, min(_each(encoders, "num_hidden_layers"), default=None)
        if skip is not None and layers is not None:
            require(skip < layers - 1, "clip_skip", skip, f"be below {layers - 1} for these text encoders")

    def _probe_unet(self) -> None:
        """Runs a fresh UNet once without memory or arithmetic, to refuse what would fail or not train."""
        ids = self.tokenizer()([""])
        with torch.no_grad():
            states = self.encode_text(ids, torch.tensor([False]))
        with torch.device("meta"):
            unet = type(self.unet).from_config(self.unet.config)
        size = 2 ** len(unet.config.block_out_channels)
        noisy = torch.zeros(1, self.latent_space.channels, size, size, device="meta")
        on_meta = {name: state.to("meta", unet.dtype) for name, state in states.items()}
        flag = f"--unet_config {self.source.options.unet_config}"
        try:
            step, crops = torch.zeros(1, device="meta"), torch.zeros(1, 6, device="meta")
            prediction = self.predict(unet, noisy, step, on_meta, crops)
            (prediction - noisy).sum().backward()
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{flag} does not fit this pipeline: {first_line(error)}") from error
        for name, parameter in unet.named_parameters():
            if parameter.grad is None:
                raise UserError(f"{flag} has {name}, which nothing in this pipeline reads")

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

    @staticmethod
    def check_resolution(resolution: int, vae_config: Mapping) -> None:
        """Refuses an edge whose latents would not be whole."""
        factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
        below = resolution - resolution % factor
        cure = f"try {below} or {below + factor}" if below else f"try {factor}"
        require(resolution % factor == 0, "resolution", resolution, f"be divisible by {factor} for this VAE", cure)

    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """A function for the loader's workers: B captions -> [B, text encoders, tokens] int64, padded and cut."""
        return Tokenize([getattr(self.pipeline, name) for name in self.tokenizer_names])

    @abstractmethod
    def encode_text(self, input_ids: Tensor, dropped: Tensor) -> TextStates:
        """The text states of [B, text encoders, tokens] input ids.

        Args:
            dropped: [B] bool, where the caption was dropped: there the states are those that inference has without a
                prompt. The ids there are of "".
        """

    @abstractmethod
    def predict(self, unet: nn.Module, noisy: Tensor, timesteps: Tensor, states: TextStates, crops: Tensor) -> Tensor:
        """The denoiser's prediction [B, C, h, w] of noisy latents, under text states and crops [B, 6]."""

    @abstractmethod
    def reads_text_parameter(self, encoder: int, name: str) -> bool:
        """Whether the pipeline's text states depend on this parameter of a text encoder."""

    @abstractmethod
    def prompt_arguments(self, prompt: str, negative_prompt: str | None) -> dict[str, Tensor]:
        """The keyword arguments by which the pipeline takes an encoded prompt and negative prompt."""

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
            has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
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
            except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:  # no wheel, no GPU, no kernel
                raise UserError(f"{XFORMERS_MISSING} ({first_line(error)}); {XFORMERS_CURE}") from error
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

    @classmethod
    def check_before_loading(cls, source: PipelineSource, resolution: int) -> None:
        """`check` and `check_resolution` from the configs alone, where they can be had without the weights."""
        configs = {name: source.config(name) for name in ("unet", *cls.text_encoder_names, "vae")}
        if None not in configs.values():
            cls.check(source, configs)
            cls.check_resolution(resolution, configs["vae"])


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


def _each(configs: Sequence[Any], name: str) -> list[int]:
    """A number of each config, of a model's or read from JSON; none if one does not say it."""
    values = [config.get(name) if isinstance(config, dict) else getattr(config, name) for config in configs]
    return [] if None in values else values


KNOW_SAMPLE = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


def changed_scheduler(scheduler: Any, changes: Mapping[str, object]) -> Any:
    """The scheduler with some of its config changed, or DDIM where its class can't express what was changed.

    A noise schedule whose name only DDPM knows is given by its betas.
    """
    from diffusers import DDIMScheduler, DDPMScheduler

    if not changes:
        return scheduler
    changes = dict(changes)
    known = inspect.signature(type(scheduler).__init__).parameters
    expresses = all(name in known for name in changes) and (
        changes.get("prediction_type") != "sample" or type(scheduler).__name__ in KNOW_SAMPLE
    )
    target = type(scheduler) if expresses else DDIMScheduler
    if changes.get("beta_schedule") == "sigmoid" and target is not DDPMScheduler:
        plain = {name: changes[name] for name in ("beta_schedule", "trained_betas")} | {"rescale_betas_zero_snr": False}
        changes["trained_betas"] = DDPMScheduler.from_config(scheduler.config, **plain).betas.tolist()
        del changes["beta_schedule"]
    return target.from_config(scheduler.config, **changes)


def is_in_read_layers(name: str, num_read_layers: int) -> bool:
    """Whether a parameter of a CLIP text encoder stands in one of its first layers, or before or behind them all."""
    _, found, rest = name.partition("encoder.layers.")
    return not found or int(rest.partition(".")[0]) < num_read_layers
