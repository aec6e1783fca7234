"""The Stable Diffusion 1.x and 2.x family."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from utils.config.batch import Conditioning
from utils.formats.modelspec import V_MARK
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

CLIP_WIDTH, OPEN_CLIP_WIDTH = 768, 1024  # of the text encoders of Stable Diffusion 1 and 2


class StableDiffusion(TextFamily):
    """Stable Diffusion: the normalized last layer of a CLIP text encoder conditions the UNet (Rombach et al. 2022)."""

    pipeline_class_name = "StableDiffusionPipeline"
    default_resolution = 512
    default_output_dir = "sd-model-finetuned"
    default_validation_epochs = 5
    text_encoder_names = ("text_encoder",)
    tokenizer_names = ("tokenizer",)
    prompt_argument_names: ClassVar = {"encoder_hidden_states": "prompt_embeds"}
    ui_prefixes: ClassVar = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}
    words_in_metadata = ("sd_v1", "sd_v2", "sd1", "sd2", "stable-diffusion-v")
    published_widths = (768, 1024)
    published_blocks: ClassVar = {
        "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    v_prediction_note = (
        "The model predicts v, which no mark in a file of Stable Diffusion 1 or 2 says: in ComfyUI, put the node "
        "ModelSamplingDiscrete with `v_prediction` behind the loader; for A1111 and Forge, put a YAML config with "
        '`parameterization: "v"` beside the file, under the same name (Stable Diffusion 2: `v2-inference-v.yaml`).'
    )

    @property
    def clip_skip_of_uis(self) -> int | None:
        """See `TextFamily`: UIs call the last layer 1, diffusers 0."""
        skip = self.source.options.clip_skip
        return None if skip is None else skip + 1

    @classmethod
    def original_model(cls, configs: Mapping[str, Mapping]) -> OriginalModel:
        """Returns the layout of Stable Diffusion 1, or of 2, whose text encoder is open_clip's."""
        parts = {"unet": OriginalPart(UNET_PREFIX, unet_layout), "vae": OriginalPart(VAE_PREFIX, vae_layout)}
        if not _has_open_clip(configs):
            text = OriginalPart("cond_stage_model.transformer.", clip_layout)
            activations = {"text_encoder": "quick_gelu"}
            return OriginalModel("stable-diffusion-v1", {**parts, "text_encoder": text}, activations, 0.18215, ())
        predicts_v = configs["scheduler"].get("prediction_type") == "v_prediction"
        architecture = "stable-diffusion-v2-768-v" if predicts_v else "stable-diffusion-v2-512"
        text = OriginalPart("cond_stage_model.model.", open_clip_layout)
        activations = {"text_encoder": "gelu"}
        return OriginalModel(architecture, {**parts, "text_encoder": text}, activations, 0.18215, (V_MARK,))

    def _encode_chunks(self, input_ids: Tensor, unskipped: Tensor) -> TextStates:
        """Returns {"encoder_hidden_states": [N, tokens, width]} for [N, 1, tokens] input ids."""
        encoder, skip = self.text_encoders[0], self.source.options.clip_skip
        output = encoder(input_ids[:, 0], output_hidden_states=skip is not None)
        if skip is None:
            return {"encoder_hidden_states": output.last_hidden_state}
        skipped = getattr(encoder, "text_model", encoder).final_layer_norm(output.hidden_states[-(skip + 1)])
        return {"encoder_hidden_states": torch.where(unskipped.view(-1, 1, 1), output.last_hidden_state, skipped)}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the UNet's prediction [B, C, h, w]; the crops are not used."""
        return denoiser(noisy, timesteps, **conditioning.states).sample

    def reads_text_parameter(self, encoder: int, name: str) -> bool:
        """True for all parameters except those of layers that clip_skip leaves out."""
        layers = self.text_encoders[encoder].config.num_hidden_layers
        return is_in_read_layers(name, layers - (self.source.options.clip_skip or 0))


def _has_open_clip(configs: Mapping[str, Mapping]) -> bool:
    """Whether a pipeline is Stable Diffusion 2, by its configs; those of smaller models are told by their layers."""
    text = configs["text_encoder"]
    if text.get("hidden_size") in (CLIP_WIDTH, OPEN_CLIP_WIDTH):
        return text["hidden_size"] == OPEN_CLIP_WIDTH
    return bool(configs["unet"].get("use_linear_projection")) or text.get("hidden_act") == "gelu"
