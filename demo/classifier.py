"""The demo's classifier: detects the digit in an image, and whether both colours are those of the prompt.

It is trained only on the `judging` digits, which nothing else in the demo is trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from digits import PALETTE, RESOLUTION, Digits, Wish, enlarge, split_digits

INK_SIZE = 16
BORDER = 2
NUM_VARIANTS = 12
SURE = 0.8


class DigitNetwork(nn.Module):
    """A small convolutional network that maps ink [n, 1, 16, 16] in [0, 1] to logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(),
        )  # fmt: skip
        self.to_features = nn.Sequential(nn.Dropout(0.3), nn.Linear(48 * 16, 64), nn.ReLU())
        self.to_logits = nn.Linear(64, 10)

    def features(self, ink: Tensor) -> Tensor:
        """Returns features [n, 64], not negative."""
        return self.to_features(self.convolutions(ink))

    def forward(self, ink: Tensor) -> Tensor:
        return self.to_logits(self.features(ink))


@dataclass(frozen=True)
class Seen:
    """What the classifier detects in n images.

    Attributes:
        digits: int64 [n].
        sureness: float32 [n], the probability of each digit.
        inks, grounds: n palette names each.
    """

    digits: np.ndarray
    sureness: np.ndarray
    inks: list[str]
    grounds: list[str]


@dataclass(frozen=True)
class Verdict:
    """Whether the digit, and both colours, are those of the prompt: boolean arrays [n]."""

    digit_right: np.ndarray
    colours_right: np.ndarray


def pixels_of(pictures: Sequence[Image.Image]) -> np.ndarray:
    """Returns images as float32 [n, 64, 64, 3] in 0..255."""
    return np.stack([np.asarray(picture.convert("RGB"), np.float32) for picture in pictures])


def two_colours(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the RGB colours of ink and background of an image [h, w, 3].

    The background is the median of the border, the ink the median of the pixels that differ most from the background.
    """
    border = np.ones(pixels.shape[:2], bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    ground = np.median(pixels[border], axis=0)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    return np.median(pixels[distance >= 0.8 * distance.max()], axis=0), ground


def nearest_colour(colour: np.ndarray) -> str:
    """Returns the name of the nearest palette colour to an RGB colour [3] in 0..255."""
    return min(PALETTE, key=lambda name: float(np.linalg.norm(colour - np.asarray(PALETTE[name]))))


def ink_of(pixels: np.ndarray, ink: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Returns the ink [h, w] in [0, 1] of an image [h, w, 3] in two known colours."""
    axis = ink - ground
    return np.clip((pixels - ground) @ axis / max(float(axis @ axis), 1.0), 0.0, 1.0)


def to_network_size(fields: np.ndarray) -> Tensor:
    """Returns ink [n, 64, 64] as the network's input [n, 1, 16, 16]."""
    ink = torch.from_numpy(np.ascontiguousarray(fields, np.float32))[:, None]
    return functional.avg_pool2d(ink, RESOLUTION // INK_SIZE)


def ink_of_pictures(pictures: Sequence[Image.Image]) -> Tensor:
    """Returns the network's input [n, 1, 16, 16] for coloured images of 64 x 64 pixels."""
    pixels = pixels_of(pictures)
    return to_network_size(np.stack([ink_of(picture, *two_colours(picture)) for picture in pixels]))


def train_classifier(judging: Digits | None = None, seed: int = 0, num_epochs: int = 12) -> DigitNetwork:
    """Returns the network, trained in seconds on the judging digits with random shifts and rotations."""
    digits = split_digits()[1] if judging is None else judging
    generator = np.random.default_rng(seed)
    fields = np.stack([enlarge(ink, generator) for ink in digits.ink for _ in range(NUM_VARIANTS)])
    inputs, labels = to_network_size(fields), torch.from_numpy(np.repeat(digits.labels, NUM_VARIANTS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _fit(DigitNetwork(), inputs, labels, num_epochs)


@cache
def trained_classifier() -> DigitNetwork:
    """Returns the network trained with default arguments; cached."""
    return train_classifier()


def _fit(network: DigitNetwork, inputs: Tensor, labels: Tensor, num_epochs: int, batch_size: int = 128) -> DigitNetwork:
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    num_steps = num_epochs * (len(labels) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_epochs):
        order = torch.randperm(len(labels))
        for batch in order.split(batch_size)[: len(labels) // batch_size]:
            ink = (inputs[batch] + 0.05 * torch.randn_like(inputs[batch])).clamp(0, 1)
            loss = functional.cross_entropy(network(ink), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


@torch.no_grad()
def look_at(pictures: Sequence[Image.Image], network: DigitNetwork) -> Seen:
    """Returns the digit and the two palette colours of each image."""
    colours = [two_colours(pixels) for pixels in pixels_of(pictures)]
    sureness, digits = network(ink_of_pictures(pictures)).softmax(dim=1).max(dim=1)
    inks = [nearest_colour(ink) for ink, _ in colours]
    return Seen(digits.numpy(), sureness.numpy(), inks, [nearest_colour(ground) for _, ground in colours])


def judge(pictures: Sequence[Image.Image], wishes: Sequence[Wish], network: DigitNetwork) -> Verdict:
    """Returns which images show the digit of their prompt, with a probability above 0.8, and which show its colours."""
    seen = look_at(pictures, network)
    colours = zip(seen.inks, seen.grounds, wishes, strict=True)
    return Verdict(
        (np.array([wish.digit for wish in wishes]) == seen.digits) & (seen.sureness > SURE),
        np.array([(ink, ground) == (wish.ink, wish.ground) for ink, ground, wish in colours]),
    )
