"""The demo's images: scikit-learn's real handwritten digits, enlarged, coloured and captioned.

The 1,797 digits are split by image: `drawing` digits train the VAE, the UNet and the fine-tuned model, `judging` digits
are for evaluation: for the classifier, and for the validation loss of the comparison. Some wordings and some pairs of
colours appear in no training caption; the evaluation prompts use them.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Colour = tuple[int, int, int]
Item = TypeVar("Item")

RESOLUTION = 64
MARGIN = 1
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PRETRAINED_DIGITS = (0, 1, 2, 3, 4, 5, 6, 7)
NEW_DIGITS = (8, 9)

PALETTE = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (225, 30, 35),
    "green": (30, 150, 60),
    "blue": (35, 70, 225),
    "yellow": (250, 220, 40),
    "purple": (150, 40, 180),
    "cyan": (60, 210, 230),
}
MINIMUM_CONTRAST = 150.0
ONE_COLOUR_SHARE = 0.4
HELD_OUT_PAIRS = (
    ("white", "red"),
    ("red", "cyan"),
    ("blue", "white"),
    ("yellow", "purple"),
    ("green", "yellow"),
    ("black", "green"),
    ("cyan", "black"),
    ("purple", "white"),
    ("yellow", "blue"),
)

SUBJECTS = (
    "a {ink} handwritten {digit}",
    "a {ink} {digit}",
    "a handwritten {digit} in {ink}",
    "the digit {digit} in {ink} ink",
    "the {ink} number {digit}",
    "the number {digit} drawn in {ink}",
    "the handwritten digit {digit}, {ink}",
    "a picture of a {ink} digit {digit}",
    "{ink} {digit}",
    "number {digit}, {ink} ink",
)
GROUNDS = (
    "{subject} on a {ground} background",
    "{subject} on {ground} paper",
    "{subject} on {ground}",
    "{subject} with {ground} behind it",
    "{subject}, {ground} background",
    "{subject} and a {ground} background",
    "on a {ground} background, {subject}",
    "on {ground} paper, {subject}",
    "a {ground} background with {subject}",
    "{ground} paper and on it {subject}",
    "{ground} background, {subject}",
)
PLAIN_SUBJECTS = (
    "a handwritten {digit}",
    "the digit {digit}",
    "the number {digit}",
    "a picture of the handwritten digit {digit}",
)
HELD_OUT_WORDINGS = (
    "the number {digit} drawn in {ink} on {ground} paper",
    "on {ground} paper, a {ink} handwritten {digit}",
    "a handwritten {digit} in {ink} with {ground} behind it",
    "a {ground} background with the digit {digit} in {ink} ink",
    "the handwritten digit {digit}, {ink} on a {ground} background",
    "{ground} paper and on it a {ink} {digit}",
    "on a {ground} background, the {ink} number {digit}",
    "a picture of a {ink} digit {digit} and a {ground} background",
)


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: `ink` is float32 [n, 8, 8] in [0, 1] (1 is full ink), `labels` is int64 [n] in 0..9."""

    ink: np.ndarray
    labels: np.ndarray

    def only(self, labels: Sequence[int]) -> "Digits":
        """Returns the digits with one of `labels`."""
        chosen = np.isin(self.labels, labels)
        return Digits(self.ink[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Wish:
    """A prompt and what its image must show: the digit, and the names of both colours."""

    prompt: str
    digit: int
    ink: str
    ground: str


def split_digits(seed: int = 0, judging_share: float = 0.5) -> tuple[Digits, Digits]:
    """Returns the `drawing` and the `judging` digits: disjoint images, stratified by class."""
    data = load_digits()
    ink = (data.images / 16.0).astype(np.float32)
    drawing, judging = train_test_split(
        np.arange(len(ink)), test_size=judging_share, random_state=seed, stratify=data.target
    )
    return Digits(ink[drawing], data.target[drawing]), Digits(ink[judging], data.target[judging])


def contrast(ink: Colour, ground: Colour) -> float:
    """Returns the Euclidean distance of two colours in RGB, 0 to 441."""
    return float(np.linalg.norm(np.subtract(ink, ground)))


def any_colour(other: Colour, generator: np.random.Generator) -> Colour:
    """Returns a random colour with enough contrast to the other one."""
    while True:
        red, green, blue = generator.integers(0, 256, size=3).tolist()
        if contrast((red, green, blue), other) >= MINIMUM_CONTRAST:
            return red, green, blue


def training_pairs() -> list[tuple[str, str]]:
    """Returns the (ink, background) colour names for training captions: with enough contrast, and not held out."""
    pairs = [pair for pair in itertools.permutations(PALETTE, 2) if pair not in HELD_OUT_PAIRS]
    return [(ink, ground) for ink, ground in pairs if contrast(PALETTE[ink], PALETTE[ground]) >= MINIMUM_CONTRAST]


def training_wordings() -> list[str]:
    """Returns every combination of subject and background, without held-out wordings; they name both colours."""
    wordings = [ground.replace("{subject}", subject) for ground in GROUNDS for subject in SUBJECTS]
    return [wording for wording in wordings if wording not in HELD_OUT_WORDINGS]


def one_colour_wordings() -> list[str]:
    """Returns wordings that name only one colour, so that the model learns the colours independently."""
    return [*SUBJECTS, *(ground.replace("{subject}", subject) for ground in GROUNDS for subject in PLAIN_SUBJECTS)]


def enlarge(ink: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
    """Returns an [8, 8] digit enlarged to [64, 64], in [0, 1]; with a generator, also slightly shifted and rotated."""
    size = (RESOLUTION, RESOLUTION)
    field = Image.fromarray(np.pad(ink, MARGIN)).resize(size, Image.Resampling.BICUBIC)
    if generator is not None:
        shift = tuple(generator.uniform(-2.5, 2.5, size=2))
        field = field.rotate(generator.uniform(-7, 7), Image.Resampling.BICUBIC, translate=shift)
    return np.clip(1.5 * np.asarray(field) - 0.3, 0.0, 1.0)


def paint(field: np.ndarray, ink: Colour, ground: Colour) -> Image.Image:
    """Returns an RGB image of ink [h, w] in [0, 1] in two colours."""
    pixels = np.asarray(ground, np.float32) + field[..., None] * np.subtract(ink, ground, dtype=np.float32)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def caption(wording: str, digit: int, ink: str, ground: str) -> str:
    """Returns the wording with digit and colours filled in."""
    return wording.format(digit=DIGIT_WORDS[digit], ink=ink, ground=ground)


def write_imagefolder(folder: Path, parts: Sequence[tuple[Digits, int]], seed: int) -> None:
    """Writes PNG images and `metadata.jsonl` (`file_name`, `text`).

    Args:
        parts: (digits, number of images to write of them); each digit is used about equally often.
        seed: seed for random colours and wordings, from those of training captions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    rows = []
    for digits, num_pictures in parts:
        for index in _in_turn(len(digits.labels), num_pictures, generator):
            name = f"{len(rows):05d}.png"
            text, ink, ground = _described(int(digits.labels[index]), generator)
            paint(enlarge(digits.ink[index], generator), ink, ground).save(folder / name, compress_level=1)
            rows.append({"file_name": name, "text": text})
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def _described(digit: int, generator: np.random.Generator) -> tuple[str, Colour, Colour]:
    """(a random training caption for the digit, ink colour, background colour)."""
    names = _choose(training_pairs(), generator)
    ink, ground = (PALETTE[name] for name in names)
    if generator.random() >= ONE_COLOUR_SHARE:
        return caption(_choose(training_wordings(), generator), digit, *names), ink, ground
    ink_named = generator.random() < 0.5
    wording = _choose([wording for wording in one_colour_wordings() if ("{ink}" in wording) == ink_named], generator)
    if ink_named:
        return caption(wording, digit, *names), ink, any_colour(ink, generator)
    return caption(wording, digit, *names), any_colour(ground, generator), ground


def _choose(items: Sequence[Item], generator: np.random.Generator) -> Item:
    return items[generator.integers(len(items))]


def _in_turn(num_digits: int, num_pictures: int, generator: np.random.Generator) -> Iterator[int]:
    """Indices of digits: shuffled passes over all digits, until there are enough."""
    rounds = -(-num_pictures // num_digits)
    order = np.concatenate([generator.permutation(num_digits) for _ in range(rounds)])
    return iter(order[:num_pictures].tolist())


def write_pretraining_folder(folder: Path, num_pictures: int = 20000, seed: int = 1) -> None:
    """Writes the imagefolder for pretraining: only digits 0 to 7."""
    drawing, _ = split_digits()
    write_imagefolder(folder, [(drawing.only(PRETRAINED_DIGITS), num_pictures)], seed)


def write_fine_tuning_folder(folder: Path, num_new: int = 1600, num_rehearsed: int = 1400, seed: int = 2) -> None:
    """Writes the imagefolder for fine-tuning: 8 and 9, and enough of 0 to 7 that the model does not forget them."""
    drawing, _ = split_digits()
    parts = [(drawing.only(NEW_DIGITS), num_new), (drawing.only(PRETRAINED_DIGITS), num_rehearsed)]
    write_imagefolder(folder, parts, seed)


def write_validation_folder(folder: Path, num_pictures: int = 128, seed: int = 4) -> None:
    """Writes the imagefolder for the validation loss: 8 and 9 from the judging digits."""
    _, judging = split_digits()
    write_imagefolder(folder, [(judging.only(NEW_DIGITS), num_pictures)], seed)


def evaluation_wishes(num_per_digit: int = 50, digits: Sequence[int] = range(10)) -> list[Wish]:
    """Returns prompts with held-out wordings and colour pairs, `num_per_digit` for each digit, digit by digit."""
    settings = [(wording, pair) for pair in HELD_OUT_PAIRS for wording in HELD_OUT_WORDINGS]
    order = np.random.default_rng(3).permutation(len(settings))
    wishes = []
    for digit in digits:
        for number in range(num_per_digit):
            wording, (ink, ground) = settings[order[(number + 7 * digit) % len(settings)]]
            wishes.append(Wish(caption(wording, digit, ink, ground), digit, ink, ground))
    return wishes
