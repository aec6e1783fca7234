"""The facts that travel together: an image on disk, the crop that was made of it, a batch."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor


class MaskFile(NamedTuple):
    """What says where in an image the loss counts.

    Attributes:
        source: the path of an image file, or its bytes, white where it counts; b"" if the image says it itself.
        is_alpha: whether the image's alpha channel says it.
    """

    source: str | bytes
    is_alpha: bool


@dataclass(frozen=True)
class ImageRecord:
    """One image of the data, not yet decoded.

    Attributes:
        key: the name under which it is reported, a path or a row number.
        source: the path of the file, or its bytes.
        captions: of several one is drawn at each step.
        mask: where the loss counts; None for all of it.
    """

    key: str
    source: str | bytes
    captions: tuple[str, ...]
    mask: MaskFile | None = None


class RecordPass(NamedTuple):
    """What an image's crop, flip and tags are drawn by: its 64-bit identity, and how often it was used before.

    Where K variants are cached, the second number is taken modulo K.
    """

    identity: int
    variant: int


@dataclass(frozen=True)
class Crop:
    """What was cut from an image, in pixels.

    `top` and `left` count in the whole image, resized and, where that was drawn, turned and mirrored.
    """

    original_height: int
    original_width: int
    top: int
    left: int
    height: int
    width: int

    def row(self) -> list[float]:
        """The six numbers in the order of SDXL's size and crop conditioning (Podell et al. 2023, section 2.2)."""
        sizes = (self.original_height, self.original_width, self.top, self.left, self.height, self.width)
        return [float(value) for value in sizes]


@dataclass(frozen=True)
class Batch:
    """One micro-batch, with every random number its training needs. The first axis of each tensor is the sample.

    Attributes:
        step: optimizer step, from 0.
        slots: B positions in the global batch of that step.
        keys: B names of the images.
        pixels: [B, C, H, W] from 0 to 255, uint8 or finer in float32, or None where the moments come from the cache.
        moments: [B, 2, C, h, w] mean and standard deviation of the VAE's posterior, raw, or None.
        input_ids: [B, text encoders, tokens] int64, or None where the text states come from the cache.
        states: text states by the family's names for them, or None.
        caption_dropped: [B] bool, where the caption was replaced by none.
        crops: [B, 6] float32, the rows of `Crop`.
        loss_weights: [B] float32, factors on the samples' losses, by their sources.
        posterior_noise: [B, C, h, w] float32, standard normal, for the sample from the VAE's posterior; None in pixels.
        noise: [B, C, h, w] float32, standard normal, noise offset included.
        input_perturbation: [B, C, h, w] float32, standard normal, or None.
        timesteps: [B] int64.
        unreadable: names and reasons of the images that could not be read and were replaced.
        masks: [B, 1, h, w] uint8, 255 where the loss counts, or None where it counts everywhere.
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
        """All tensors by name, but for the text states."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in own.items() if isinstance(value, Tensor)}

    def cloned(self) -> Self:
        """The same batch in memory of its own."""
        return self._map(lambda tensor: tensor.clone())

    def part(self, begin: int, end: int) -> Self:
        """Some of the samples; what could not be read is said by the first part."""
        some = self._map(lambda tensor: tensor[begin:end])
        unreadable = () if begin else self.unreadable
        return dataclasses.replace(some, slots=self.slots[begin:end], keys=self.keys[begin:end], unreadable=unreadable)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory; a DataLoader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser reads beside noisy latents and their timesteps; the first axis of each tensor is the sample.

    Attributes:
        states: text states by name, or the numbers of classes.
        crops: [B, 6] float32, the rows of `Crop`.
    """

    states: dict[str, Tensor]
    crops: Tensor


@dataclass(frozen=True)
class Predicted:
    """What a model said of a batch, for what else is to be made of it; the first axis of each tensor is the sample.

    Attributes:
        estimate: [B, C, h, w] float32, the clean latents by the model's prediction; gradients flow through it.
        latents: [B, C, h, w] float32, the clean latents.
        prediction: [B, C, h, w] float32, of the target that `noised` holds.
        states: text states, as the model reads them.
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
        """The same, without gradients to the model."""
        states = {name: state.detach() for name, state in self.states.items()}
        estimate, prediction = self.estimate.detach(), self.prediction.detach()
        return dataclasses.replace(self, estimate=estimate, prediction=prediction, states=states)


@dataclass(frozen=True)
class Noised:
    """A noised latent and what the model should say of it; all but the timesteps float32.

    Attributes:
        noisy: [B, C, h, w] the model's input.
        target: [B, C, h, w] what it should predict.
        timesteps: [B] int64, in [0, num_timesteps).
        snr: [B] signal-to-noise ratio alpha_bar / (1 - alpha_bar) at those timesteps.
        num_timesteps: length of the noise schedule.
    """

    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    snr: Tensor
    num_timesteps: int
