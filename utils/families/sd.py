"""Stable Diffusion 1.x and 2.x."""

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

    def encode_text(self, input_ids: Tensor) -> TextStates:
        """{"encoder_hidden_states": [B, tokens, width]} of [B, 1, tokens] input ids."""
        encoder, skip = self.text_encoders[0], self.source.options.clip_skip
        if skip is None:
            return {"encoder_hidden_states": encoder(input_ids[:, 0]).last_hidden_state}
        hidden = encoder(input_ids[:, 0], output_hidden_states=True).hidden_states[-(skip + 1)]
        return {"encoder_hidden_states": getattr(encoder, "text_model", encoder).final_layer_norm(hidden)}

    def predict(self, unet: nn.Module, noisy: Tensor, timesteps: Tensor, states: TextStates, crops: Tensor) -> Tensor:
        """The UNet's prediction [B, C, h, w]; the crops condition nothing here."""
        return unet(noisy, timesteps, encoder_hidden_states=states["encoder_hidden_states"]).sample

    def reads_text_parameter(self, encoder: int, name: str) -> bool:
        """All but the layers that clip_skip leaves out."""
        layers = self.text_encoders[encoder].config.num_hidden_layers
        return is_in_read_layers(name, layers - (self.source.options.clip_skip or 0))

    def prompt_arguments(self, prompt: str, negative_prompt: str | None) -> dict[str, Tensor]:
        """`prompt_embeds` and `negative_prompt_embeds`, each [1, tokens, width]."""
        tokenize, device = self.tokenizer(), self.unet.device
        embeds, negative = (
            self.encode_text(tokenize([text]).to(device))["encoder_hidden_states"]
            for text in (prompt, negative_prompt or "")
        )
        return {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
