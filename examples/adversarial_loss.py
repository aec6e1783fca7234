"""Example of a custom loss term: a discriminator that distinguishes latents from the model's estimates of them.

accelerate launch train_text_to_image.py ... --loss_module examples/adversarial_loss.py --loss_module_args weight=0.05

It uses hinge losses (Lim and Ye 2017) and a small patch discriminator (Isola et al. 2017), conditioned on the timestep.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.config.batch import Predicted
from utils.models.loss_terms import LossTerm, TermFacts


class AdversarialLoss(LossTerm):
    """Trains the model to make estimates that the discriminator takes for latents.

    Args:
        weight: weight of the term.
        max_timestep: fraction of the timesteps, from 0 to 1, up to which the term applies: estimates from almost pure
            noise carry little information.
        channels: number of channels of the discriminator.
    """

    def __init__(self, facts: TermFacts, weight: float = 0.05, max_timestep: float = 0.5, channels: int = 64):
        super().__init__(facts)
        self.weight = weight
        self.num_timesteps = facts.num_timesteps
        self.end = max_timestep * facts.num_timesteps
        self.from_latents = nn.Conv2d(facts.latent_channels + 1, channels, 3, padding=1)
        self.body = nn.Sequential(
            nn.SiLU(), nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.GroupNorm(8, 2 * channels),
            nn.SiLU(), nn.Conv2d(2 * channels, 2 * channels, 3, padding=1), nn.GroupNorm(8, 2 * channels),
            nn.SiLU(), nn.Conv2d(2 * channels, 1, 1),
        )  # fmt: skip

    def judge(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Returns the discriminator's logits [B, 1, h/2, w/2] for patches: high for latents, low for estimates."""
        time = (timesteps / self.num_timesteps).to(latents.dtype).view(-1, 1, 1, 1)
        return self.body(self.from_latents(torch.cat([latents, time.expand_as(latents[:, :1])], dim=1))).float()

    def forward(self, predicted: Predicted) -> Tensor:
        """Returns the model's loss [B]: high if the discriminator recognises the estimates."""
        timesteps = predicted.noised.timesteps
        losses = -self.judge(predicted.estimate, timesteps).mean((1, 2, 3))
        return self.weight * losses * (timesteps < self.end)

    def own_losses(self, predicted: Predicted) -> Tensor:
        """Returns the discriminator's loss [B]: high if it confuses latents and estimates."""
        timesteps = predicted.noised.timesteps
        real = functional.relu(1 - self.judge(predicted.latents, timesteps)).mean((1, 2, 3))
        drawn = functional.relu(1 + self.judge(predicted.estimate, timesteps)).mean((1, 2, 3))
        return (real + drawn) * (timesteps < self.end)
