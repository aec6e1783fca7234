"""The published architectures of Stable Diffusion, and pipelines of them with random weights, in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tests import tiny
from utils.models.options import ModelOptions
from utils.models.pipeline_source import ComponentDtypes
from utils.models.sd import StableDiffusion
from utils.models.sdxl import SCALING_FACTOR, StableDiffusionXL
from utils.models.text_to_image import TextFamily

TOKENS, BEGIN, END = 77, 512, 513  # length, start and end token of the tokenizer that replaces CLIP's


@dataclass(frozen=True)
class Architecture:
    """The family of a pipeline and the configs of its models; text encoders are pairs (class name, config)."""

    family: type[TextFamily]
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoders: Sequence[tuple[str, Mapping[str, Any]]]

    def parts(self) -> dict[str, nn.Module]:
        """What has weights, by its name in the pipeline."""
        import transformers
        from diffusers import AutoencoderKL, UNet2DConditionModel

        tokens = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": END}
        made = {"unet": UNet2DConditionModel(**self.unet), "vae": AutoencoderKL(**self.vae)}
        for name, (class_name, config) in zip(self.family.text_encoder_names, self.text_encoders, strict=True):
            made[name] = getattr(transformers, class_name)(transformers.CLIPTextConfig(**config, **tokens))
        return made

    def save_pipeline(
        self, folder: Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
    ) -> Path:
        """Writes the pipeline with random weights, which are drawn on a device, if it is not there yet."""
        if not (folder / "model_index.json").exists():
            torch.manual_seed(0)
            with torch.device(device):
                made = self.parts()
            parts: dict[str, Any] = {name: nn.Module.to(part, dtype) for name, part in made.items()}
            parts |= dict.fromkeys(self.family.tokenizer_names, tiny.tokenizer(folder / "vocabulary"))
            if self.family is StableDiffusion:
                parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            self.family.pipeline_class()(scheduler=tiny.scheduler(), **parts).save_pretrained(folder)
        return folder


VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
MODELS = {
    "sd": Architecture(
        StableDiffusion,
        {"sample_size": 64, "cross_attention_dim": 768},  # for the rest SD 1.5 has diffusers' defaults
        VAE | {"sample_size": 512},
        [("CLIPTextModel", CLIP_L)],
    ),
    "sdxl": Architecture(
        StableDiffusionXL,
        SDXL_UNET,
        VAE | {"sample_size": 1024, "scaling_factor": SCALING_FACTOR},
        [("CLIPTextModel", CLIP_L), ("CLIPTextModelWithProjection", CLIP_BIG_G | {"projection_dim": 1280})],
    ),
}


class MadeTokenizer(SimpleNamespace):
    """The parts of a tokenizer that a family uses; it never reads captions."""

    def get_vocab(self) -> dict[str, int]:
        """Returns the vocabulary."""
        return {"a": 0, "<|endoftext|>": END}


class MadePipeline(SimpleNamespace):
    """The parts of a pipeline that a family uses in a training step."""


@dataclass(frozen=True)
class MadeSource:
    """A `PipelineSource` whose pipeline is created in memory instead of read from files."""

    options: ModelOptions
    architecture: Architecture
    path = "made"
    is_single_file = False

    def scheduler_marks(self) -> dict[str, object]:
        """Returns no changes to the scheduler."""
        return {}

    def folder(self, pipeline_class: type) -> None:
        """Returns None: there is no folder."""

    def load(self, family: type, dtypes: ComponentDtypes) -> MadePipeline:
        """Returns the parts of the pipeline that a training step needs, on the current default device."""
        parts, by_name = self.architecture.parts(), {"unet": dtypes.denoiser, "vae": dtypes.frozen}
        parts = {name: nn.Module.to(part, by_name.get(name, dtypes.text_encoders)) for name, part in parts.items()}
        words = {"model_max_length": TOKENS, "eos_token_id": END, "all_special_tokens": ["<|endoftext|>"]}
        tokenizers = dict.fromkeys(self.architecture.family.tokenizer_names, MadeTokenizer(**words))
        config = SimpleNamespace(force_zeros_for_empty_prompt=True)
        with torch.device("cpu"):  # the scheduler indexes its tables on the CPU
            scheduler = tiny.scheduler()
        return MadePipeline(scheduler=scheduler, config=config, **tokenizers, **parts)
