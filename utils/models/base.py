"""Base class of the model families: what all trained pipelines share, and what each family implements."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from utils.config.batch import Conditioning
from utils.config.options import UserError, first_line, require
from utils.diffusion.process import BETAS, Process
from utils.formats.original_layout import OriginalModel
from utils.models.folder_form import FLOAT32, FolderForm, in_dtype
from utils.models.latent_space import LatentSpace
from utils.models.options import XFORMERS_CURE, XFORMERS_MISSING, PartOptions
from utils.models.quantization import quantize_linears
from utils.runtime.memory import align

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TextStates = dict[str, Tensor]
"""Inputs of a family's denoiser that come from captions, by the denoiser's names; the first axis is the sample.

"encoder_hidden_states" [B, chunks * tokens, width]; with several chunks also "encoder_attention_mask"
[B, chunks * tokens] bool, True where the caption has tokens; and any further inputs of the family, from the first
chunk. A family without text encoders has class labels ("class_labels" [B] int64) or nothing.
"""


class Words(Protocol):
    """A tokenizer for the loader's workers.

    Attributes:
        max_tokens: number of tokens read of a caption.
    """

    max_tokens: int

    def __call__(self, captions: list[str]) -> Tensor:
        """Returns the token ids [B, text encoders, tokens] int64 of B captions."""

    def num_tokens(self, captions: Sequence[str]) -> np.ndarray:
        """Returns [B] int64, the number of tokens of each caption before truncation."""


class Family(ABC):
    """A loaded pipeline of one architecture, and how it is trained.

    Attributes:
        pipeline: the diffusers pipeline; its components are the ones being trained.
        latent_space: where it denoises: the latents of its VAE, or pixels.
        options: options of its components, such as those that save memory.
        denoiser_name: the pipeline's name for the denoiser.
        coder_names: the pipeline's names for its encoder and decoder of latents, if it has any.
        process_kinds: the forward processes that it can be trained with.
        measures_scaling: whether the scaling of its latents must still be measured on the data and set by `rescale`.
    """

    pipeline_class_name: str
    default_resolution: int
    default_output_dir: str
    default_validation_epochs: int
    denoiser_name = "unet"
    coder_names: ClassVar[tuple[str, ...]] = ("vae",)
    measures_scaling: bool = False
    process_kinds: ClassVar[Sequence[type[Process]]] = BETAS
    text_encoder_names: ClassVar[tuple[str, ...]] = ()
    denoiser_lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    text_encoder_lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, pipeline: "DiffusionPipeline", latent_space: LatentSpace, options: PartOptions):
        self.pipeline = pipeline
        self.latent_space = latent_space
        self.options = options
        self._resting: list[str] = []
        self._is_quantized = False
        self._device: torch.device | None = None

    @classmethod
    def pipeline_class(cls) -> "type[DiffusionPipeline]":
        """Returns the diffusers class of the pipeline."""
        import diffusers

        return getattr(diffusers, cls.pipeline_class_name)

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser, such as the UNet."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def text_encoders(self) -> list[nn.Module]:
        """The text encoders, in the order of `text_encoder_names`."""
        return [getattr(self.pipeline, name) for name in self.text_encoder_names]

    @classmethod
    def original_model(cls, configs: Mapping[str, Mapping]) -> OriginalModel | None:
        """Returns the layout of the pipeline as one file of the original code; None if it has none.

        Args:
            configs: configs of its components by name, that of the scheduler included.
        """
        return None

    @staticmethod
    def check_sizes(sizes: Sequence[tuple[int, int]], vae_config: Mapping) -> None:
        """Refuses image widths and heights that the VAE's downscaling does not divide."""
        factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
        for edge in (edge for size in sizes for edge in size):
            below = edge - edge % factor
            cure = f"try {below} or {below + factor}" if below else f"try {factor}"
            flag = "resolution" if len(sizes) == 1 else "bucket_step"
            require(edge % factor == 0, flag, edge, f"be divisible by {factor} for this VAE", cure)

    @abstractmethod
    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the denoiser's prediction [B, C, h, w] for noisy latents [B, C, h, w] at timesteps [B]."""

    @abstractmethod
    def tokenizer(self) -> Words:
        """Returns a tokenizer for the loader's workers: B captions -> [B, text encoders, tokens] int64."""

    @abstractmethod
    def encode_text(self, input_ids: Tensor, dropped: Tensor) -> TextStates:
        """Returns the text embeddings of tokenized captions.

        Args:
            input_ids: [B, text encoders, tokens] int64.
            dropped: [B] bool, True where the caption was dropped: the result is that of no prompt at inference.
        """

    @abstractmethod
    def reads_text_parameter(self, encoder: int, name: str) -> bool:
        """Whether the pipeline's text embeddings depend on this parameter of text encoder number `encoder`."""

    @property
    @abstractmethod
    def text_dtype(self) -> torch.dtype:
        """The dtype of the text embeddings."""

    def text_facts(self) -> list[object]:
        """Returns what text embeddings depend on besides the encoders' weights: tokenizers and settings."""
        return []

    @abstractmethod
    def float32_pipeline(self, **parts: nn.Module) -> "DiffusionPipeline":
        """Returns the pipeline in float32, with some components replaced, for export."""

    @property
    def clip_skip(self) -> int | None:
        """Number of last text encoder layers that are skipped; None without text encoders."""
        return None

    def as_exported(self) -> "DiffusionPipeline":
        """Returns the pipeline with the weights in memory, of the class and with the scheduler that are exported."""
        return self.pipeline

    @abstractmethod
    def probe(self, pipeline: "DiffusionPipeline") -> np.ndarray:
        """Draws one small image in few steps with a pipeline of this family: [H, W, channels] in [0, 1]."""

    def prepare_saving(self) -> None:
        """Downloads what a saved pipeline needs and training does not, early, while an error costs nothing."""
        return

    def save_pipeline(self, folder: Path, form: FolderForm = FLOAT32, **parts: nn.Module) -> None:
        """Writes the pipeline to a folder, with some components replaced."""
        whole = self.float32_pipeline(**parts)
        for name, part in whole.components.items():
            if isinstance(part, nn.Module):
                setattr(whole, name, in_dtype(part, form.dtype, name))
        whole.save_pretrained(folder, **form.arguments)

    def base_files(self, name: str) -> list[Path]:
        """Returns the safetensors files that a component was loaded from; empty if it was loaded from others."""
        return []

    def trainable_names(self) -> tuple[str, ...]:
        """Returns the names of the components that can be trained, the denoiser first."""
        return (self.denoiser_name, *self.text_encoder_names)

    @property
    def _part_names(self) -> tuple[str, ...]:
        return (*self.trainable_names(), *self.coder_names)

    def freeze(self) -> None:
        """Freezes all components and puts them in evaluation mode."""
        for name in self._part_names:
            getattr(self.pipeline, name).requires_grad_(False).eval()

    def rest(self, device: torch.device, *, vae: bool, text_encoders: bool) -> None:
        """Moves encoders that are no longer needed from the device to the CPU, until `awake` needs them."""
        self._resting = list(self.coder_names) * vae + list(self.text_encoder_names) * text_encoders
        self._device = device
        self._move(self._resting, torch.device("cpu"))

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Context manager: all components are on the device, or with --sampling_cpu_offload only those of `alone`."""
        one_by_one = self.options.sampling_cpu_offload
        parts = self._part_names
        if not one_by_one:
            self._move(self._resting, self._device)
        try:
            yield
        finally:
            if one_by_one:
                self._move([name for name in parts if name not in self._resting], self._device)
            self._move(self._resting, torch.device("cpu"))

    @contextmanager
    def alone(self, *names: str) -> Iterator[None]:
        """Context manager: with --sampling_cpu_offload, only these components are on the device and in the pipeline.

        The pipeline then finds that device from its components.
        """
        if not self.options.sampling_cpu_offload:
            yield
            return
        others = {name: getattr(self.pipeline, name) for name in self._part_names if name not in names}
        self._move(list(others), torch.device("cpu"))
        self._move(names, self._device)
        for name in others:
            setattr(self.pipeline, name, None)
        try:
            yield
        finally:
            for name, part in others.items():
                setattr(self.pipeline, name, part)

    def _move(self, names: Sequence[str], device: torch.device | None) -> None:
        for name in names:
            if not (name == self.denoiser_name and self._is_quantized):  # quantized weights stay where they were packed
                getattr(self.pipeline, name).to(device)
        if names and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def to(self, device: torch.device) -> None:
        """Moves all components to the device. An fp16 VAE that overflows is cast to bf16 if supported, else float32."""
        for vae in (getattr(self.pipeline, name) for name in self.coder_names):
            if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
                has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
                vae.to(torch.bfloat16 if has_bfloat16 else torch.float32)
        for name in self._part_names:
            align(getattr(self.pipeline, name).to(device))

    def use_attention(self) -> None:
        """Enables the requested attention kernels.

        Raises:
            UserError: if they are not available.
        """
        options = self.options
        if options.enable_xformers_memory_efficient_attention:
            try:
                self.denoiser.enable_xformers_memory_efficient_attention()
            except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:  # no wheel, no GPU, no kernel
                raise UserError(f"{XFORMERS_MISSING} ({first_line(error)}); {XFORMERS_CURE}") from error
        if options.enable_npu_flash_attention:
            try:
                self.denoiser.enable_npu_flash_attention()
            except (ImportError, RuntimeError, AttributeError) as error:
                raise UserError(f"--enable_npu_flash_attention needs an Ascend NPU and torch_npu: {error}") from error

    def use_channels_last(self, vae: bool) -> None:
        """Converts the denoiser's weights, and with `vae` those of the VAE if there is one, to channels-last.

        Convolutions then produce and accept activations in the same layout.
        """
        self.denoiser.to(memory_format=torch.channels_last)
        encoder = getattr(self.latent_space, "vae", None)
        if vae and isinstance(encoder, torch.nn.Module):
            encoder.to(memory_format=torch.channels_last)

    def save_memory(self) -> None:
        """Enables the requested slicing and tiling, which compute one part after the other."""
        options = self.options
        if options.attention_slicing:
            self.denoiser.set_attention_slice("max")
        if options.vae_slicing:
            self.latent_space.vae.enable_slicing()
        if options.vae_tiling:
            self.latent_space.vae.enable_tiling()

    def quantize_unet(self, kind: str, device: torch.device) -> None:
        """Quantizes the frozen UNet's linear layers to 4 or 8 bits, on the device."""
        quantize_linears(self.denoiser, kind, device)
        self._is_quantized = True

    def rescale(self, factor: float) -> None:
        """Sets the scaling factor of the latents, in a family that measures it."""
        raise NotImplementedError

    def use_gradient_checkpointing(self, text_encoders: bool, vae: bool) -> None:
        """Recomputes activations in the backward pass, in the denoiser and in the chosen encoders."""
        self.denoiser.enable_gradient_checkpointing()
        if vae:
            self.latent_space.vae.enable_gradient_checkpointing()
        if text_encoders:
            for encoder in self.text_encoders:
                encoder.gradient_checkpointing_enable()


def fitting_steps(pipeline: "DiffusionPipeline") -> int | None:
    """Returns the noise schedule's length if the pipeline's default number of steps exceeds it, else None.

    diffusers refuses more steps than the schedule has, and DDPMPipeline defaults to 1000.
    """
    own = inspect.signature(type(pipeline).__call__).parameters.get("num_inference_steps")
    longest = pipeline.scheduler.config.get("num_train_timesteps")
    if own is None or not isinstance(own.default, int) or not isinstance(longest, int):
        return None
    return longest if own.default > longest else None
