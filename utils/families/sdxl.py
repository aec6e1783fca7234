"""Stable Diffusion XL base."""

import torch
from torch import Tensor, nn

from utils.families.base import Family, TextStates, is_in_read_layers


class StableDiffusionXL(Family):
    """Two text encoders, and conditioning on the image's size and crop (Podell et al. 2023)."""

    pipeline_class_name = "StableDiffusionXLPipeline"
    default_resolution = 1024
    default_output_dir = "sdxl-model-finetuned"
    default_validation_epochs = 1
    text_encoder_names = ("text_encoder", "text_encoder_2")
    tokenizer_names = ("tokenizer", "tokenizer_2")

    def encode_text(self, input_ids: Tensor, dropped: Tensor) -> TextStates:
        """States of [B, 2, tokens] input ids; of dropped captions zeros, where inference has them without a prompt.

        Returns:
            "encoder_hidden_states" [B, tokens, sum of widths], the layers before the last, unnormed, side by side; and
            "text_embeds" [B, projection], the second encoder's pooled state.
        """
        states = self._states(input_ids, dropped)
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return states
        return {name: state.masked_fill(dropped.view(-1, *[1] * (state.ndim - 1)), 0) for name, state in states.items()}

    def _states(self, input_ids: Tensor, unskipped: Tensor) -> TextStates:
        """The states; clip_skip spares the samples where `unskipped`, [B] bool."""
        skip = self.source.options.clip_skip
        outputs = [
            encoder(input_ids[:, index], output_hidden_states=True) for index, encoder in enumerate(self.text_encoders)
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        if skip is not None:
            skipped = torch.cat([output.hidden_states[-(skip + 2)] for output in outputs], dim=-1)
            hidden = torch.where(unskipped.view(-1, 1, 1), hidden, skipped)
        return {"encoder_hidden_states": hidden, "text_embeds": outputs[1].text_embeds}

    def predict(self, unet: nn.Module, noisy: Tensor, timesteps: Tensor, states: TextStates, crops: Tensor) -> Tensor:
        """The UNet's prediction [B, C, h, w]. The crops stay float32: bf16 would turn 1023 pixels into 1024."""
        conditions = {"text_embeds": states["text_embeds"], "time_ids": crops}
        return unet(
            noisy,
            timesteps,
            encoder_hidden_states=states["encoder_hidden_states"],
            added_cond_kwargs=conditions,
        ).sample

    def reads_text_parameter(self, encoder: int, name: str) -> bool:
        """The second encoder whole, for its pooled state; of the first what lies before the layer that is read."""
        if encoder == 1:
            return True
        layers = self.text_encoders[encoder].config.num_hidden_layers
        return (
            is_in_read_layers(name, layers - 1 - (self.source.options.clip_skip or 0))
            and "final_layer_norm" not in name
        )

    def prompt_arguments(self, prompt: str, negative_prompt: str | None) -> dict[str, Tensor]:
        """The embeddings and pooled embeddings of both prompts; without a negative prompt as the pipeline has it."""
        device = self.unet.device
        ids = self.tokenizer()([prompt, negative_prompt or ""]).to(device)
        none, every = torch.tensor([False], device=device), torch.tensor([True], device=device)
        # one by one, as the pipeline encodes them; like it, without clip_skip for the negative prompt
        states = self._states(ids[:1], none)
        negative = self.encode_text(ids[1:], every) if negative_prompt is None else self._states(ids[1:], every)
        return {
            "prompt_embeds": states["encoder_hidden_states"],
            "pooled_prompt_embeds": states["text_embeds"],
            "negative_prompt_embeds": negative["encoder_hidden_states"],
            "negative_pooled_prompt_embeds": negative["text_embeds"],
        }
