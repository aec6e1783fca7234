"""A loss term of one's own: a discriminator that tells latents from the model's estimates of them.

accelerate launch train_text_to_image.py ... --loss_module examples/adversarial_loss.py --loss_module_args weight=0.05

The hinge losses (Lim and Ye 2017) of a small network that judges patches (Isola et al. 2017), told the timestep.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.config.batch import Predicted
from utils.models.loss_terms import LossTerm, TermFacts


class AdversarialLoss(LossTerm):
    """The model is to make estimates that the discriminator takes for latents.

    Args:
        weight: of the term.
        max_timestep: from which on estimates are left alone: of noise alone there is little to tell; a portion of all.
        channels: width of the discriminator.
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
        """[B, 1, h/2, w/2] what it makes of each patch: high for latents, low for estimates."""
        time = (timesteps / self.num_timesteps).to(latents.dtype).view(-1, 1, 1, 1)
        return self.body(self.from_latents(torch.cat([latents, time.expand_as(latents[:, :1])], dim=1))).float()

    def forward(self, predicted: Predicted) -> Tensor:
        """What the model is punished for: estimates that are seen through."""
        timesteps = predicted.noised.timesteps
        losses = -self.judge(predicted.estimate, timesteps).mean((1, 2, 3))
        return self.weight * losses * (timesteps < self.end)

    def own_losses(self, predicted: Predicted) -> Tensor:
        """What the discriminator is punished for: patches that it takes for the other kind."""
        timesteps = predicted.noised.timesteps
        real = functional.relu(1 - self.judge(predicted.latents, timesteps)).mean((1, 2, 3))
        drawn = functional.relu(1 + self.judge(predicted.estimate, timesteps)).mean((1, 2, 3))
        return (real + drawn) * (timesteps < self.end)
