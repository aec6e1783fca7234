"""Latent spaces: scaling of a VAE's latents, as its config sets it, or pixels in place of latents."""

import logging
import math
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
_SAID: WeakSet = WeakSet()  # objects whose NaN samples were already reported


def warn_of_nan(
    latents: Tensor, images: Tensor, vae: torch.nn.Module | None, of: object, blame: Callable[[], str] | None = None
) -> None:
    """Warns once that samples are not finite, whether because of the denoiser or the VAE, and how to fix it.

    Args:
        latents: the denoiser's samples.
        images: the decoded samples.
        vae: the VAE that decoded them; None for pixels.
        of: the object for which the warning is given only once.
        blame: explains where NaN in the latents comes from.
    """
    if bool(images.isfinite().all()) or of in _SAID:
        return
    _SAID.add(of)
    if not bool(latents.isfinite().all()):
        said = "the denoiser's samples are NaN or infinite: they are black; its weights have diverged"
        logger.warning("%s", said if blame is None else blame())
    elif vae is not None and vae.dtype == torch.float16:
        logger.warning(
            "the VAE overflows in fp16: samples are black; use --mixed_precision bf16, or for SDXL a VAE made for fp16 "
            "(madebyollin/sdxl-vae-fp16-fix)"
        )
    else:
        logger.warning("the VAE decodes to NaN or infinite values: samples are black; give another VAE")


class LatentSpace:
    """Converts images to the latents that a denoiser sees, and back.

    Latents are (z - shift) * scaling, where z is a sample from the encoder's posterior. A VAE whose config has
    `latents_mean` and `latents_std` instead is normalized per channel, as in its pipeline.

    Attributes:
        has_posterior: whether latents are sampled, which needs noise.
    """

    has_posterior = True

    def __init__(self, vae: torch.nn.Module):
        self.vae = vae
        config = vae.config
        self.channels = config.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self._scaling = config.scaling_factor
        self._shift = getattr(config, "shift_factor", None)
        self._mean = getattr(config, "latents_mean", None)
        self._std = getattr(config, "latents_std", None)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"vae": None}  # spawned workers only need the shapes

    def shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Returns [C, h, w] of the latents for an image of (width, height) pixels."""
        width, height = size
        return self.channels, height // self.factor, width // self.factor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which moments are computed."""
        return self.vae.dtype

    def num_cached(self, size: tuple[int, int]) -> int:
        """Number of values in the moments of an image of (width, height), or 0 if they can't be cached."""
        return 2 * math.prod(self.shape(size))

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of the posterior, each [B, C, h, w] float32, unscaled.

        Args:
            pixels: [B, 3, H, W] from 0 to 255.
        """
        images = pixels.to(self.vae.device).float() / 127.5 - 1
        with torch.autocast(self.vae.device.type, enabled=False):
            encoded = self.vae.encode(images.to(self.vae.dtype))
        if "latents" in encoded:  # a VQ model: its latents before quantization
            return _planes(encoded.latents), torch.zeros_like(encoded.latents, dtype=torch.float32)
        mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        return _planes(mean), _planes(std)

    def latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Returns the scaled latents [B, C, h, w] float32 of the posterior sample mean + std * noise."""
        sample = mean + std * noise
        if self._mean is not None and self._std is not None:
            sample = (sample - self._channels_like(self._mean, sample)) / self._channels_like(self._std, sample)
        elif self._shift is not None:
            sample = sample - self._shift
        return sample * self._scaling

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes scaled latents [B, C, h, w] to [B, 3, H, W] float32 images, roughly in [-1, 1]; differentiable."""
        sample = self._unscaled(latents.to(self.vae.dtype))
        if self._mean is not None and self._std is not None:
            sample = sample * self._channels_like(self._std, sample) + self._channels_like(self._mean, sample)
        elif self._shift is not None:
            sample = sample + self._shift
        with torch.autocast(self.vae.device.type, enabled=False):
            return self.vae.decode(sample, return_dict=False)[0].float()

    @torch.no_grad()
    def pictures(self, latents: Tensor, blame: Callable[[], str] | None = None) -> Tensor:
        """Same as `decode`, for viewing: values that are not finite become black, with a warning the first time.

        Args:
            blame: explains where NaN in the latents comes from.
        """
        images = self.decode(latents)
        warn_of_nan(latents, images, self.vae, self, blame)
        return images.nan_to_num(nan=-1.0, posinf=-1.0, neginf=-1.0)

    def _unscaled(self, latents: Tensor) -> Tensor:
        return latents / self._scaling

    def describe(self) -> str:
        """Describes the latents, for the log."""
        return f"latents with {self.channels} channels, 1/{self.factor} of the image size, scaled by {self._scaling:g}"

    @staticmethod
    def _channels_like(values: list[float], latents: Tensor) -> Tensor:
        return torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)


class ScaledSpace(LatentSpace):
    """Latents of `LDMPipeline` and `DiTPipeline`: only scaled, whatever else the VAE's config says."""

    def __init__(self, vae: torch.nn.Module):
        super().__init__(vae)
        self._shift = self._mean = self._std = None

    def rescale(self, factor: float) -> None:
        """Sets another scaling factor, also in the VAE's config."""
        self.vae.register_to_config(scaling_factor=factor)
        self._scaling = factor


class ReciprocalSpace(ScaledSpace):
    """Unscales latents as `DiTPipeline` does, bit for bit."""

    def _unscaled(self, latents: Tensor) -> Tensor:
        return 1 / self._scaling * latents


class PixelSpace(LatentSpace):
    """Pixels in [low, 1] in place of latents."""

    has_posterior = False

    def __init__(self, channels: int, low: float = -1.0):
        self.vae = None
        self.channels = channels
        self.factor = 1
        self._low = low

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of images."""
        return torch.float32

    def num_cached(self, size: tuple[int, int]) -> int:
        """Returns 0: pixels are not cached."""
        return 0

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (images [B, C, H, W] float32, zeros) for pixels from 0 to 255."""
        images = pixels.float() / 255 * (1 - self._low) + self._low if self._low else pixels.float() / 255
        return images, torch.zeros_like(images)

    def latents(self, mean: Tensor, std: Tensor, noise: Tensor | None) -> Tensor:
        """Returns the images."""
        return mean

    def decode(self, latents: Tensor) -> Tensor:
        """Returns [B, C, H, W] float32 images, roughly in [-1, 1]."""
        return latents.float() if self._low else latents.float() * 2 - 1

    def describe(self) -> str:
        """Describes the pixels, for the log."""
        return f"pixels with {self.channels} channels"


def _planes(latents: Tensor) -> Tensor:
    """Converts to contiguous float32: a VAE's attention returns channels-last, which the denoiser would inherit."""
    return latents.to(torch.float32, memory_format=torch.contiguous_format)
