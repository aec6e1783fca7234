"""The latent space of a pretrained VAE: its scaling is that of its own config, at encoding and at decoding."""

import torch
from torch import Tensor


class LatentSpace:
    """Moves images into the latents that a denoiser sees, and back.

    Latents are (z - shift) * scaling, where z is a sample of the encoder's posterior; a VAE whose config holds
    `latents_mean` and `latents_std` instead is normalised by channel, as its pipeline does.
    """

    def __init__(self, vae: torch.nn.Module):
        self.vae = vae
        config = vae.config
        self.channels = config.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self._scaling = config.scaling_factor
        self._shift = getattr(config, "shift_factor", None)
        self._mean = getattr(config, "latents_mean", None)
        self._std = getattr(config, "latents_std", None)

    def shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """[C, h, w] of the latents of an image of this width and height in pixels."""
        width, height = size
        return self.channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, each [B, C, h, w] float32, raw.

        Args:
            pixels: [B, 3, H, W] uint8.
        """
        images = pixels.to(self.vae.device).float() / 127.5 - 1
        with torch.autocast(self.vae.device.type, enabled=False):
            posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """[B, C, h, w] float32 the scaled latents of a sample mean + std * noise of the posterior."""
        sample = mean + std * noise
        if self._mean is not None and self._std is not None:
            sample = (sample - self._channels_like(self._mean, sample)) / self._channels_like(self._std, sample)
        elif self._shift is not None:
            sample = sample - self._shift
        return sample * self._scaling

    def decode(self, latents: Tensor) -> Tensor:
        """[B, 3, H, W] float32 images, about [-1, 1], of scaled latents [B, C, h, w]; gradients flow through it."""
        sample = latents.to(self.vae.dtype) / self._scaling
        if self._mean is not None and self._std is not None:
            sample = sample * self._channels_like(self._std, sample) + self._channels_like(self._mean, sample)
        elif self._shift is not None:
            sample = sample + self._shift
        with torch.autocast(self.vae.device.type, enabled=False):
            return self.vae.decode(sample, return_dict=False)[0].float()

    @staticmethod
    def _channels_like(values: list[float], latents: Tensor) -> Tensor:
        return torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
