"""The Stable Diffusion 1.x and 2.x family."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from utils.config.batch import Conditioning
from utils.models.base import TextStates
from utils.models.text_to_image import TextFamily, is_in_read_layers


class StableDiffusion(TextFamily):
    """Stable Diffusion: the normalized last layer of a CLIP text encoder conditions the UNet (Rombach et al. 2022)."""

    pipeline_class_name = "StableDiffusionPipeline"
    default_resolution = 512
    default_output_dir = "sd-model-finetuned"
    default_validation_epochs = 5
    text_encoder_names = ("text_encoder",)
    tokenizer_names = ("tokenizer",)
    prompt_argument_names: ClassVar = {"encoder_hidden_states": "prompt_embeds"}

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
