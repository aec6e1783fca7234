"""What the trainable pipelines have in common, and what a family must answer."""

import copy
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from utils.families.vae import LatentSpace
from utils.options import UserError, first_line, option, require, require_positive

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

LOADING_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError)
MAX_TOKENS = 10_000  # a tokenizer that does not say its length says a number beyond all bounds
XFORMERS_MISSING = "--enable_xformers_memory_efficient_attention: its kernels do not load here"
XFORMERS_CURE = "leave the flag out, PyTorch's attention is as fast, or install the xformers wheel of this torch"
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
        if self.enable_xformers_memory_efficient_attention and find_spec("xformers") is None:
            raise UserError(f"{XFORMERS_MISSING} (it is not installed); {XFORMERS_CURE}")
        if self.non_ema_revision is not None and self.pretrained_model_name_or_path.endswith(".safetensors"):
            raise UserError("--non_ema_revision is of a pipeline on the Hub, not of a single file; leave it out")


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
        for name in self.tokenizer_names:
            if getattr(self.pipeline, name).model_max_length > MAX_TOKENS:
                raise UserError(f"--pretrained_model {source.path}: its {name} is missing or has no model_max_length")
        self.check(source, {name: getattr(self.pipeline, name).config for name in (*self.trainable_names(), "vae")})
        if source.options.unet_config is not None:
            self._probe_unet()

    @classmethod
    def check(cls, source: "PipelineSource", configs: Mapping[str, Mapping]) -> None:
        """Refuses parts that don't fit together, by their configs; what a config does not say is taken to fit."""
        unet, encoders = configs["unet"], [configs[name] for name in cls.text_encoder_names]
        in_channels, latent_channels = unet.get("in_channels", 4), configs["vae"].get("latent_channels", 4)
        if in_channels != latent_channels:
            raise UserError(
                f"the UNet takes {in_channels} channels but the VAE's latents have {latent_channels}; "
                "inpainting and depth models are not trained here"
            )
        expected, width = unet.get("cross_attention_dim"), sum(_of(encoder, "hidden_size") for encoder in encoders)
        if isinstance(expected, int) and expected != width:
            flag = f"--unet_config {source.options.unet_config}" if source.options.unet_config else "the UNet"
            raise UserError(f"{flag} has cross_attention_dim {expected} but the text encoders give {width}")
        skip, layers = source.options.clip_skip, min(_of(encoder, "num_hidden_layers") for encoder in encoders)
        if skip is not None:
            require(skip < layers - 1, "clip_skip", skip, f"be below {layers - 1} for these text encoders")

    def _probe_unet(self) -> None:
        """Runs a fresh UNet once without memory or arithmetic, to refuse what would fail or not train."""
        ids = self.tokenizer()([""])
        with torch.no_grad():
            states = self.encode_text(ids, torch.tensor([False]))
        unet = copy.deepcopy(self.unet).to("meta")
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

    def encode_text(self, input_ids: Tensor, dropped: Tensor) -> TextStates:
        """The text states of [B, text encoders, tokens] input ids.

        Args:
            dropped: [B] bool, where the caption was dropped: there the states are those that inference has without a
                prompt. The ids there are of "".
        """
        raise NotImplementedError

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
            except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
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
    def check_before_loading(cls, source: "PipelineSource", resolution: int) -> None:
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

    def index(self) -> dict:
        """The pipeline's `model_index.json`."""
        if Path(self.path).is_dir():
            return _read_config(Path(self.path, "model_index.json"), "--pretrained_model")
        file = _download(self.path, "model_index.json", self.options.revision, "--pretrained_model")
        return _read_config(file, "--pretrained_model")

    def config(self, part: str) -> dict | None:
        """The config of a part (unet, vae, scheduler, ...) without its weights; None for a single file's on the Hub.

        Raises:
            UserError: if it is not there.
        """
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        root, flag, revision = self.path, "--pretrained_model", self.options.revision
        if part == "unet" and self.options.unet_config is not None:
            return _read_config(Path(self.options.unet_config), "--unet_config")
        if part == "vae" and self.options.pretrained_vae_model_name_or_path is not None:
            root, revision = self.options.pretrained_vae_model_name_or_path, None
            flag = "--pretrained_vae_model_name_or_path"
            if not (Path(root) / "vae").is_dir():
                part = ""
        elif self.is_single_file:
            root, flag, revision = self.options.pretrained_model_config, "--pretrained_model_config", None
        if root is None:
            return None
        if not Path(root).is_dir():
            if Path(root).is_absolute() or root.startswith("."):
                raise UserError(f"{flag} {root} does not exist")
            return _read_config(_download(root, str(PurePosixPath(part, file)), revision, flag), flag)
        return _read_config(Path(root, part, file), flag)

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
            path = options.pretrained_vae_model_name_or_path
            subfolder = "vae" if (Path(path) / "vae" / "config.json").is_file() else None
            flag = f"--pretrained_vae_model_name_or_path {path}"
            parts["vae"] = _component(AutoencoderKL, flag, path, dtypes.frozen, subfolder=subfolder)
        if with_unet and options.unet_config is not None:
            parts["unet"] = _fresh_unet(options.unet_config).to(dtypes.unet)
        elif with_unet and options.non_ema_revision is not None:
            parts["unet"] = _component(
                UNet2DConditionModel,
                f"--non_ema_revision {options.non_ema_revision}",
                self.path,
                dtypes.unet,
                subfolder="unet",
                revision=options.non_ema_revision,
            )
        return parts

    def _from_pretrained(self, pipeline_class: "type[DiffusionPipeline]", **arguments: Any) -> "DiffusionPipeline":
        try:
            return pipeline_class.from_pretrained(
                self.path,
                revision=self.options.revision,
                variant=self.options.variant,
                use_safetensors=True,
                **arguments,
            )
        except LOADING_ERRORS as error:
            raise UserError(f"--pretrained_model {self.path} can't be loaded: {first_line(error)}") from error

    def _load_single_file(self, pipeline_class: "type[DiffusionPipeline]", parts: dict) -> "DiffusionPipeline":
        # a part given as None counts as missing there, and a part that is missing is left out anyway
        given = {name: part for name, part in parts.items() if part is not None}
        try:
            return pipeline_class.from_single_file(self.path, config=self.options.pretrained_model_config, **given)
        except LOADING_ERRORS as error:
            raise UserError(f"--pretrained_model {self.path} can't be loaded: {first_line(error)}") from error


def _component(component_class: type, flag: str, path: str, dtype: torch.dtype, **arguments: Any) -> nn.Module:
    """A part on its own; `flag` is the option and its value that name it."""
    try:
        return component_class.from_pretrained(path, use_safetensors=True, dtype=dtype, **arguments)
    except LOADING_ERRORS as error:
        raise UserError(f"{flag} can't be loaded: {first_line(error)}") from error


def _read_config(file: Path, flag: str) -> dict:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: {file} can't be read: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise UserError(f"{flag}: {file} holds no config, which would be a JSON object")
    return config


def _download(repository: str, file: str, revision: str | None, flag: str) -> Path:
    """A small file of a Hub repository, by the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except (HTTPError, OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{flag} {repository} is no folder here, and was not found on the Hub: {reason}") from error


def _of(config: Mapping, name: str) -> int:
    return config[name] if isinstance(config, dict) else getattr(config, name)


def _fresh_unet(config_file: str) -> nn.Module:
    from diffusers import UNet2DConditionModel

    try:
        return UNet2DConditionModel.from_config(_read_config(Path(config_file), "--unet_config"))
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError, IndexError) as error:
        raise UserError(f"--unet_config {config_file} makes no UNet2DConditionModel: {first_line(error)}") from error


KNOW_SAMPLE = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


def _scheduler_for(scheduler: Any, prediction_type: str | None) -> Any:
    """The pipeline's scheduler with another prediction type, or DDIM where its class does not know that type."""
    from diffusers import DDIMScheduler

    if prediction_type is None:
        return scheduler
    knows_it = prediction_type != "sample" or type(scheduler).__name__ in KNOW_SAMPLE
    return (type(scheduler) if knows_it else DDIMScheduler).from_config(
        scheduler.config, prediction_type=prediction_type
    )


def is_in_read_layers(name: str, num_read_layers: int) -> bool:
    """Whether a parameter of a CLIP text encoder stands in one of its first layers, or before or behind them all."""
    _, found, rest = name.partition("encoder.layers.")
    return not found or int(rest.partition(".")[0]) < num_read_layers
