"""Perceptual loss between decoded images, on features of a pretrained network."""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.config.batch import Predicted
from utils.config.options import UserError, first_line, require
from utils.models.loading import frozen, load_module
from utils.models.loss_terms import LossTerm, TermFacts
from utils.models.options import PerceptualOptions

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROBE_SIZE = 64


class Features(nn.Module):
    """Hidden states of a pretrained image network, normalized to unit length over the channels."""

    def __init__(self, name: str):
        """Raises:
        UserError: if the network can't be loaded or has no hidden states.
        """
        super().__init__()
        from transformers import AutoModel
        from transformers.image_processing_base import ImageProcessingMixin

        # Network and the normalization of its inputs.
        flag = f"--perceptual_network {name}"
        model = load_module(
            AutoModel, name, flag, "perceptual_network", torch.float32, reads=_hidden_states, use_safetensors=True
        )
        try:
            config, _ = ImageProcessingMixin.get_image_processor_dict(name)
        except OSError:
            config = {}
        self.network = frozen(_trunk(model))
        self.size: int | None = _image_size(self.network)
        for buffer, default in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
            values = torch.tensor(config.get(buffer) or default).view(1, 3, 1, 1)
            self.register_buffer(buffer, values, persistent=False)

        # Probe: which hidden states it has, and whether it needs a fixed image size.
        try:
            with torch.no_grad():
                probed = self(torch.zeros(1, 3, self.size or PROBE_SIZE, self.size or PROBE_SIZE))
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{flag} returns no hidden states for images: {first_line(error)}") from error
        if all(state.ndim == 4 for state in probed):
            self.size = None  # a convolutional network accepts any size

    def forward(self, images: Tensor) -> list[Tensor]:
        """Returns the features of [B, 3, H, W] images in [-1, 1], per layer: [B, C, h, w], or [B, C, tokens]."""
        if self.size is not None and images.shape[2:] != (self.size, self.size):
            images = _resized(images, self.size)
        pixels = (images / 2 + 0.5 - self.image_mean) / self.image_std
        states = self.network(pixel_values=pixels, output_hidden_states=True).hidden_states
        by_channel = (state if state.ndim == 4 else state.transpose(1, 2) for state in states)
        return [functional.normalize(state.float(), dim=1) for state in by_channel]


def _resized(images: Tensor, size: int) -> Tensor:
    """Resizes images to [B, 3, size, size] by antialiased bicubic interpolation.

    Its backward pass has no deterministic GPU kernel; if one is required, matrix products are used instead.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return functional.interpolate(images, (size, size), mode="bicubic", antialias=True)
    rows, columns = (_resizing(length, size).to(images) for length in images.shape[2:])
    return rows @ images @ columns.T


@lru_cache(maxsize=64)
def _resizing(length: int, size: int) -> Tensor:
    """Returns the [size, length] matrix that resizes a row of `length` pixels."""
    identity = torch.eye(length).view(1, 1, length, length)
    return functional.interpolate(identity, (size, length), mode="bicubic", antialias=True)[0, 0]


def _trunk(model: nn.Module) -> nn.Module:
    """Returns the image branch of a model."""
    return getattr(model, "vision_model", model)


def _image_size(network: nn.Module) -> int | None:
    size = getattr(network.config, "image_size", None)
    return size[0] if isinstance(size, list | tuple) else size


def _noise(size: int) -> Tensor:
    """Returns [1, 3, size, size] values in [-1, 1] that exercise every weight."""
    return torch.linspace(0, 100, 3 * size * size).sin().view(1, 3, size, size)


def _hidden_states(model: nn.Module) -> Tensor:
    """Returns all hidden states for a noise image, flattened into one tensor, to check that weights matter."""
    network = _trunk(model)
    size = _image_size(network) or PROBE_SIZE
    states = network(pixel_values=_noise(size), output_hidden_states=True).hidden_states
    return torch.cat([state.flatten() for state in states])


class PerceptualLoss(LossTerm):
    """Distance between decoded estimate and decoded latents: LPIPS (Zhang et al. 2018, eq. 1) with all weights 1.

    Squared feature differences, summed over channels and averaged over positions and layers.
    """

    def __init__(self, facts: TermFacts, options: PerceptualOptions):
        super().__init__(facts)
        self._options = options
        self._decode = facts.decode
        self._end = options.perceptual_max_timestep or facts.num_timesteps
        begin = options.perceptual_min_timestep
        require(begin < facts.num_timesteps, "perceptual_min_timestep", begin, f"be below {facts.num_timesteps}")
        self.features = Features(options.perceptual_network)

    def forward(self, predicted: Predicted) -> Tensor:
        """Returns [B] weighted distances; 0 where the timestep is out of range or the mask covers nothing."""
        # Samples within the range of timesteps.
        timesteps = predicted.noised.timesteps
        chosen = ((timesteps >= self._options.perceptual_min_timestep) & (timesteps < self._end)).nonzero()[:, 0]
        losses = predicted.estimate.new_zeros(len(timesteps))
        if not len(chosen):
            return losses

        # Decode latents and estimate; outside of the mask both show the target.
        with torch.no_grad():
            wanted = self._decode(predicted.latents[chosen])
        shown = self._decode(predicted.estimate[chosen])
        if predicted.masks is not None:
            mask = functional.interpolate(predicted.masks[chosen].float() / 255, shown.shape[2:], mode="nearest")
            shown = torch.lerp(wanted, shown, mask)

        # Distance of their features.
        with torch.no_grad():
            goals = self.features(wanted)
        layers = [
            (found - goal).square().sum(1).flatten(1).mean(1)
            for found, goal in zip(self.features(shown), goals, strict=True)
        ]
        weighted = self._options.perceptual_weight * torch.stack(layers).mean(0)
        return losses.index_put((chosen,), weighted.to(losses.dtype))
