"""The Stable Diffusion XL family."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from utils.config.batch import Conditioning
from utils.formats.modelspec import V_MARK, ZERO_SNR_MARK
from utils.formats.original_layout import (
    UNET_PREFIX,
    VAE_PREFIX,
    OriginalModel,
    OriginalPart,
    clip_layout,
    open_clip_layout,
    unet_layout,
    vae_layout,
)
from utils.models.base import TextStates
from utils.models.text_to_image import TextFamily, is_in_read_layers

SCALING_FACTOR = 0.13025  # of the published VAE's latents


class StableDiffusionXL(TextFamily):
    """Stable Diffusion XL: two text encoders, and conditioning on image size and crop (Podell et al. 2023)."""

    pipeline_class_name = "StableDiffusionXLPipeline"
    default_resolution = 1024
    default_output_dir = "sdxl-model-finetuned"
    default_validation_epochs = 1
    text_encoder_names = ("text_encoder", "text_encoder_2")
    tokenizer_names = ("tokenizer", "tokenizer_2")
    prompt_argument_names: ClassVar = {
        "encoder_hidden_states": "prompt_embeds",
        "text_embeds": "pooled_prompt_embeds",
    }
    ui_prefixes: ClassVar = {
        "unet": ("lora_unet_",),
        "text_encoder": ("lora_te1_", "lora_te_"),
        "text_encoder_2": ("lora_te2_",),
    }
    ui_names_are_original = True
    words_in_metadata = ("sdxl", "stable-diffusion-xl")
    published_widths = (2048,)
    published_inputs: ClassVar = {
        **{("unet", name): 2816 for name in ("label_emb.0.0", "add_embedding.linear_1")},
        **{("text_encoder_2", name): 1280 for name in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")},
    }
    published_blocks: ClassVar = {
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    }
    v_prediction_note = (
        "The model predicts v: ComfyUI and Forge read the mark `v_pred` in a single file of SDXL; A1111 does so after "
        "version 1.10, and ComfyUI's node ModelSamplingDiscrete with `v_prediction` sets it for files without the mark."
    )

    @classmethod
    def original_model(cls, configs: Mapping[str, Mapping]) -> OriginalModel:
        """Returns the layout of SDXL, whose text encoders are the embedders of its conditioner."""
        parts = {
            "unet": OriginalPart(UNET_PREFIX, unet_layout),
            "vae": OriginalPart(VAE_PREFIX, vae_layout),
            "text_encoder": OriginalPart("conditioner.embedders.0.transformer.", clip_layout),
            "text_encoder_2": OriginalPart("conditioner.embedders.1.model.", open_clip_layout),
        }
        activations = {"text_encoder": "quick_gelu", "text_encoder_2": "gelu"}
        marks = (V_MARK, ZERO_SNR_MARK)
        return OriginalModel("stable-diffusion-xl-v1-base", parts, activations, SCALING_FACTOR, marks)

    @property
    def has_zeros_without_prompt(self) -> bool:
        """Whether inference without a prompt uses zeros as embeddings, as the pipeline's config says."""
        return self.pipeline.config.force_zeros_for_empty_prompt

    def _encode_chunks(self, input_ids: Tensor, unskipped: Tensor) -> TextStates:
        """Returns the text embeddings of [N, 2, tokens] input ids.

        Returns:
            "encoder_hidden_states" [N, tokens, sum of widths], the penultimate layers without final norm, concatenated;
            and "text_embeds" [N, projection], the second encoder's pooled output.
        """
        skip = self.source.options.clip_skip
        outputs = [
            encoder(input_ids[:, index], output_hidden_states=True) for index, encoder in enumerate(self.text_encoders)
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        if skip is not None:
            skipped = torch.cat([output.hidden_states[-(skip + 2)] for output in outputs], dim=-1)
            hidden = torch.where(unskipped.view(-1, 1, 1), hidden, skipped)
        return {"encoder_hidden_states": hidden, "text_embeds": outputs[1].text_embeds}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the UNet's prediction [B, C, h, w]. Crops stay float32: bf16 would round 1023 pixels to 1024."""
        states = dict(conditioning.states)
        added = {"text_embeds": states.pop("text_embeds"), "time_ids": conditioning.crops}
        return denoiser(noisy, timesteps, added_cond_kwargs=added, **states).sample

    def reads_text_parameter(self, encoder: int, name: str) -> bool:
        """True for all of the second encoder, whose pooled output is used; of the first, up to the layer read."""
        if encoder == 1:
            return True
        layers = self.text_encoders[encoder].config.num_hidden_layers
        return (
            is_in_read_layers(name, layers - 1 - (self.source.options.clip_skip or 0))
            and "final_layer_norm" not in name
        )
