"""Stable Diffusion 1.x and 2.x."""

import torch
from torch import Tensor, nn

from utils.families.base import Family, TextStates, is_in_read_layers


class StableDiffusion(Family):
    """One CLIP text encoder, whose last layer, normed, conditions the UNet (Rombach et al. 2022)."""

    pipeline_class_name = "StableDiffusionPipeline"
    default_resolution = 512
    default_output_dir = "sd-model-finetuned"
    default_validation_epochs = 5
    text_encoder_names = ("text_encoder",)
    tokenizer_names = ("tokenizer",)

    def encode_text(self, input_ids: Tensor, dropped: Tensor) -> TextStates:
        """{"encoder_hidden_states": [B, tokens, width]} of [B, 1, tokens] ids; clip_skip spares dropped captions."""
        encoder, skip = self.text_encoders[0], self.source.options.clip_skip
        output = encoder(input_ids[:, 0], output_hidden_states=skip is not None)
        if skip is None:
            return {"encoder_hidden_states": output.last_hidden_state}
        skipped = getattr(encoder, "text_model", encoder).final_layer_norm(output.hidden_states[-(skip + 1)])
        return {"encoder_hidden_states": torch.where(dropped.view(-1, 1, 1), output.last_hidden_state, skipped)}

    def predict(self, unet: nn.Module, noisy: Tensor, timesteps: Tensor, states: TextStates, crops: Tensor) -> Tensor:
        """The UNet's prediction [B, C, h, w]; the crops condition nothing here."""
        return unet(noisy, timesteps, encoder_hidden_states=states["encoder_hidden_states"]).sample

    def reads_text_parameter(self, encoder: int, name: str) -> bool:
        """All but the layers that clip_skip leaves out."""
        layers = self.text_encoders[encoder].config.num_hidden_layers
        return is_in_read_layers(name, layers - (self.source.options.clip_skip or 0))

    def prompt_arguments(self, prompt: str, negative_prompt: str | None) -> dict[str, Tensor]:
        """`prompt_embeds` and `negative_prompt_embeds`, each [1, tokens, width]."""
        device = self.unet.device
        ids = self.tokenizer()([prompt, negative_prompt or ""]).to(device)
        # one by one, as the pipeline encodes them; like it, without clip_skip for the negative prompt
        embeds = self.encode_text(ids[:1], torch.tensor([False], device=device))
        negative = self.encode_text(ids[1:], torch.tensor([True], device=device))
        return {
            "prompt_embeds": embeds["encoder_hidden_states"],
            "negative_prompt_embeds": negative["encoder_hidden_states"],
        }
