"""The latent space of a pretrained VAE: its scaling is that of its own config, at encoding and at decoding."""

import logging
import math
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
_SAID: WeakSet = WeakSet()  # of which it was said that they draw NaN


def warn_of_nan(
    latents: Tensor, images: Tensor, vae: torch.nn.Module | None, of: object, blame: Callable[[], str] | None = None
) -> None:
    """Says that samples are not finite, whether by the denoiser or by the VAE, and what to do.

    Args:
        of: what it is said of once.
        blame: says whose NaN it is that the latents hold.
    """
    if bool(images.isfinite().all()) or of in _SAID:
        return
    _SAID.add(of)
    if not bool(latents.isfinite().all()):
        said = "the denoiser's samples are NaN or infinite: they are black; its weights have diverged"
        logger.warning("%s", said if blame is None else blame())
    elif vae is not None and vae.dtype == torch.float16:
        logger.warning(
            "the VAE overflows in fp16: samples are black; use --mixed_precision bf16, or of SDXL a VAE for fp16 "
            "(madebyollin/sdxl-vae-fp16-fix)"
        )
    else:
        logger.warning("the VAE decodes to NaN or infinite numbers: samples are black; give another VAE")


class LatentSpace:
    """Moves images into the latents that a denoiser sees, and back.

    Latents are (z - shift) * scaling, where z is a sample of the encoder's posterior; a VAE whose config holds
    `latents_mean` and `latents_std` instead is normalised by channel, as its pipeline does.

    Attributes:
        has_posterior: whether latents are drawn, and need noise.
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
        return self.__dict__ | {"vae": None}  # a worker that is not forked needs the shapes alone

    def shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """[C, h, w] of the latents of an image of this width and height in pixels."""
        width, height = size
        return self.channels, height // self.factor, width // self.factor

    @property
    def dtype(self) -> torch.dtype:
        """What its moments are computed in."""
        return self.vae.dtype

    def num_cached(self, size: tuple[int, int]) -> int:
        """How many numbers the moments of an image of this width and height are, where they can be cached."""
        return 2 * math.prod(self.shape(size))

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, each [B, C, h, w] float32, raw.

        Args:
            pixels: [B, 3, H, W] from 0 to 255.
        """
        images = pixels.to(self.vae.device).float() / 127.5 - 1
        with torch.autocast(self.vae.device.type, enabled=False):
            encoded = self.vae.encode(images.to(self.vae.dtype))
        if "latents" in encoded:  # of a VQ model, before they are quantised
            return _planes(encoded.latents), torch.zeros_like(encoded.latents, dtype=torch.float32)
        mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        return _planes(mean), _planes(std)

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
        sample = self._unscaled(latents.to(self.vae.dtype))
        if self._mean is not None and self._std is not None:
            sample = sample * self._channels_like(self._std, sample) + self._channels_like(self._mean, sample)
        elif self._shift is not None:
            sample = sample + self._shift
        with torch.autocast(self.vae.device.type, enabled=False):
            return self.vae.decode(sample, return_dict=False)[0].float()

    @torch.no_grad()
    def pictures(self, latents: Tensor, blame: Callable[[], str] | None = None) -> Tensor:
        """As `decode`, to be looked at: black where it is not finite, which a warning names the first time.

        Args:
            blame: says whose NaN it is that the latents hold.
        """
        images = self.decode(latents)
        warn_of_nan(latents, images, self.vae, self, blame)
        return images.nan_to_num(nan=-1.0, posinf=-1.0, neginf=-1.0)

    def _unscaled(self, latents: Tensor) -> Tensor:
        return latents / self._scaling

    def describe(self) -> str:
        """What it is, in words."""
        return f"latents of {self.channels} channels, a {self.factor}th of the edges, times {self._scaling:g}"

    @staticmethod
    def _channels_like(values: list[float], latents: Tensor) -> Tensor:
        return torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)


class ScaledSpace(LatentSpace):
    """Latents as `LDMPipeline` and `DiTPipeline` have them: scaled alone, whatever else the VAE's config says."""

    def __init__(self, vae: torch.nn.Module):
        super().__init__(vae)
        self._shift = self._mean = self._std = None

    def rescale(self, factor: float) -> None:
        """Scales by another factor, which the VAE's config says from now on."""
        self.vae.register_to_config(scaling_factor=factor)
        self._scaling = factor


class ReciprocalSpace(ScaledSpace):
    """As `DiTPipeline` unscales latents, to the last bit."""

    def _unscaled(self, latents: Tensor) -> Tensor:
        return 1 / self._scaling * latents


class PixelSpace(LatentSpace):
    """Pixels themselves, from `low` to 1, in the place of latents."""

    has_posterior = False

    def __init__(self, channels: int, low: float = -1.0):
        self.vae = None
        self.channels = channels
        self.factor = 1
        self._low = low

    @property
    def dtype(self) -> torch.dtype:
        """That of images."""
        return torch.float32

    def num_cached(self, size: tuple[int, int]) -> int:
        """None: pixels are not cached."""
        return 0

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(the images [B, C, H, W] float32, zeros) of pixels from 0 to 255."""
        images = pixels.float() / 255 * (1 - self._low) + self._low if self._low else pixels.float() / 255
        return images, torch.zeros_like(images)

    def latents(self, mean: Tensor, std: Tensor, noise: Tensor | None) -> Tensor:
        """The images."""
        return mean

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, H, W] float32 images, about [-1, 1]."""
        return latents.float() if self._low else latents.float() * 2 - 1

    def describe(self) -> str:
        """What it is, in words."""
        return f"pixels of {self.channels} channels"


def _planes(latents: Tensor) -> Tensor:
    """Float32, one channel after the other: a VAE's attention leaves them together, and the denoiser would follow."""
    return latents.to(torch.float32, memory_format=torch.contiguous_format)
