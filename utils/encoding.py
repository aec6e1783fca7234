"""What the frozen encoders make of a batch: posterior moments and text states."""

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.families.base import Family, TextStates
from utils.records import Batch


@dataclass(frozen=True)
class EncodedBatch:
    """A batch with its encodings, on the device.

    Attributes:
        batch: the draws, crops and input ids.
        mean, std: [B, C, h, w] float32, the raw moments of the VAE's posterior.
        states: the text states, or None where the text encoders train.
    """

    batch: Batch
    mean: Tensor
    std: Tensor
    states: TextStates | None


class Encoder:
    """Runs the frozen encoders live."""

    def __init__(self, family: Family, text_encoders_train: bool):
        self._family = family
        self._text_encoders_train = text_encoders_train

    @torch.no_grad()
    def encode(self, batch: Batch) -> EncodedBatch:
        """The encodings of a batch that is on the device."""
        mean, std = self._family.latent_space.moments(batch.pixels)
        states = None if self._text_encoders_train else self._family.encode_text(batch.input_ids, batch.caption_dropped)
        return EncodedBatch(batch, mean, std, states)
