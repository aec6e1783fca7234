"""The records that pass between modules: an image on disk, its crop, a batch."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor


class MaskFile(NamedTuple):
    """The source of an image's loss mask.

    Attributes:
        source: path or bytes of an image file, white where the loss counts; b"" if the image's alpha is the mask.
        is_alpha: whether the mask is the image's alpha channel.
    """

    source: str | bytes
    is_alpha: bool


@dataclass(frozen=True)
class ImageRecord:
    """One image of the data, not yet decoded.

    Attributes:
        key: name used in reports: a path or a row number.
        source: the path of the file, or its bytes.
        captions: one of them is drawn at each step.
        mask: where the loss counts; None for the whole image.
    """

    key: str
    source: str | bytes
    captions: tuple[str, ...]
    mask: MaskFile | None = None


class RecordPass(NamedTuple):
    """Key of an image's random crop, flip and tags: its 64-bit identity and the number of earlier uses.

    If K variants are cached, the second number is taken modulo K.
    """

    identity: int
    variant: int


@dataclass(frozen=True)
class Crop:
    """The crop of an image, in pixels.

    `top` and `left` refer to the whole image after resizing and any rotation and flip.
    """

    original_height: int
    original_width: int
    top: int
    left: int
    height: int
    width: int

    def row(self) -> list[float]:
        """Returns the six numbers in the order of SDXL's size and crop conditioning (Podell et al. 2023, sec. 2.2)."""
        sizes = (self.original_height, self.original_width, self.top, self.left, self.height, self.width)
        return [float(value) for value in sizes]


@dataclass(frozen=True)
class Batch:
    """One micro-batch, with every random number its training needs. The first axis of each tensor is the sample.

    Attributes:
        step: optimizer step, from 0.
        slots: B positions in the global batch of that step.
        keys: B names of the images.
        pixels: [B, C, H, W] from 0 to 255, uint8 or float32, or None if the moments come from the cache.
        moments: [B, 2, C, h, w] mean and standard deviation of the VAE's posterior, unscaled, or None.
        input_ids: [B, text encoders, tokens] int64, or None if the text embeddings come from the cache.
        states: text embeddings by the family's names for them, or None.
        caption_dropped: [B] bool, True where the caption was replaced by the empty one.
        crops: [B, 6] float32, the rows of `Crop`.
        loss_weights: [B] float32, factors on the samples' losses, set per data source.
        posterior_noise: [B, C, h, w] float32, standard normal, to sample the VAE's posterior; None in pixel space.
        noise: [B, C, h, w] float32, standard normal, plus the noise offset.
        input_perturbation: [B, C, h, w] float32, standard normal, or None.
        timesteps: [B] int64.
        unreadable: names of the images that could not be read and were replaced, with the reasons.
        masks: [B, 1, h, w] uint8, 255 where the loss counts; None if it counts everywhere.
    """

    step: int
    slots: tuple[int, ...]
    keys: tuple[str, ...]
    pixels: Tensor | None
    moments: Tensor | None
    input_ids: Tensor | None
    states: dict[str, Tensor] | None
    caption_dropped: Tensor
    crops: Tensor
    loss_weights: Tensor
    posterior_noise: Tensor | None
    noise: Tensor
    input_perturbation: Tensor | None
    timesteps: Tensor
    unreadable: tuple[tuple[str, str], ...] = ()
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def _map(self, change) -> Self:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        if self.states is not None:
            changed["states"] = {name: change(state) for name, state in self.states.items()}
        return dataclasses.replace(self, **changed)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, except the text embeddings."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in own.items() if isinstance(value, Tensor)}

    def cloned(self) -> Self:
        """Returns a copy with its own memory."""
        return self._map(lambda tensor: tensor.clone())

    def part(self, begin: int, end: int) -> Self:
        """Returns samples `begin` to `end`; only the first part keeps the list of unreadable images."""
        some = self._map(lambda tensor: tensor[begin:end])
        unreadable = () if begin else self.unreadable
        return dataclasses.replace(some, slots=self.slots[begin:end], keys=self.keys[begin:end], unreadable=unreadable)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """Returns the batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Returns the batch in page-locked memory; called by DataLoader."""
        return self._map(lambda tensor: tensor.pin_memory())


@dataclass(frozen=True)
class Conditioning:
    """Inputs of a denoiser besides the noisy latents and timesteps; the first axis of each tensor is the sample.

    Attributes:
        states: text embeddings by name, or class labels.
        crops: [B, 6] float32, the rows of `Crop`.
    """

    states: dict[str, Tensor]
    crops: Tensor


@dataclass(frozen=True)
class Predicted:
    """A model's prediction for a batch, as input of additional loss terms; the first axis is the sample.

    Attributes:
        estimate: [B, C, h, w] float32, clean latents estimated from the prediction; gradients flow through it.
        latents: [B, C, h, w] float32, the clean latents.
        prediction: [B, C, h, w] float32, prediction of `noised.target`.
        noised: the noisy latents, their target and timesteps.
        states: text embeddings, as the model reads them.
        crops: [B, 6] float32, the rows of `Crop`.
        masks: [B, 1, h, w] uint8, 255 where the loss counts, or None.
    """

    estimate: Tensor
    latents: Tensor
    prediction: Tensor
    noised: "Noised"
    states: dict[str, Tensor]
    crops: Tensor
    masks: Tensor | None

    def detached(self) -> Self:
        """Returns the same values, detached from the model's graph."""
        states = {name: state.detach() for name, state in self.states.items()}
        estimate, prediction = self.estimate.detach(), self.prediction.detach()
        return dataclasses.replace(self, estimate=estimate, prediction=prediction, states=states)


@dataclass(frozen=True)
class Noised:
    """Noisy latents and the model's target; all float32 except the timesteps.

    Attributes:
        noisy: [B, C, h, w] the model's input.
        target: [B, C, h, w] what the model should predict.
        timesteps: [B] int64, in [0, num_timesteps).
        snr: [B] signal-to-noise ratio alpha_bar / (1 - alpha_bar) at those timesteps.
        num_timesteps: length of the noise schedule.
    """

    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    snr: Tensor
    num_timesteps: int
