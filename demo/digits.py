"""The demo's pictures: scikit-learn's real handwritten digits, enlarged, coloured and captioned.

The 1,797 digits are split by image: `drawing` digits are for the VAE, the UNet and fine-tuning, `judging` digits to
judge by: for the classifier, and the validation loss of the comparison. Some wordings and some pairs of colours are
held out of every training caption, to judge by.
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
        """The digits that have one of `labels`."""
        chosen = np.isin(self.labels, labels)
        return Digits(self.ink[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Wish:
    """A prompt and what a picture drawn for it must show: the digit and the names of both colours."""

    prompt: str
    digit: int
    ink: str
    ground: str


def split_digits(seed: int = 0, judging_share: float = 0.5) -> tuple[Digits, Digits]:
    """The `drawing` and the `judging` digits: disjoint images, every class split alike."""
    data = load_digits()
    ink = (data.images / 16.0).astype(np.float32)
    drawing, judging = train_test_split(
        np.arange(len(ink)), test_size=judging_share, random_state=seed, stratify=data.target
    )
    return Digits(ink[drawing], data.target[drawing]), Digits(ink[judging], data.target[judging])


def contrast(ink: Colour, ground: Colour) -> float:
    """Euclidean distance of two colours in RGB, 0 to 441."""
    return float(np.linalg.norm(np.subtract(ink, ground)))


def any_colour(other: Colour, generator: np.random.Generator) -> Colour:
    """A random colour with enough contrast to the other one."""
    while True:
        red, green, blue = generator.integers(0, 256, size=3).tolist()
        if contrast((red, green, blue), other) >= MINIMUM_CONTRAST:
            return red, green, blue


def training_pairs() -> list[tuple[str, str]]:
    """(ink, ground) colour names that training captions may use: distinct enough, and not held out."""
    pairs = [pair for pair in itertools.permutations(PALETTE, 2) if pair not in HELD_OUT_PAIRS]
    return [(ink, ground) for ink, ground in pairs if contrast(PALETTE[ink], PALETTE[ground]) >= MINIMUM_CONTRAST]


def training_wordings() -> list[str]:
    """Every subject with every ground, but the held-out wordings: both colours are named."""
    wordings = [ground.replace("{subject}", subject) for ground in GROUNDS for subject in SUBJECTS]
    return [wording for wording in wordings if wording not in HELD_OUT_WORDINGS]


def one_colour_wordings() -> list[str]:
    """Wordings that leave one colour open, so that each is learnt apart from the other."""
    return [*SUBJECTS, *(ground.replace("{subject}", subject) for ground in GROUNDS for subject in PLAIN_SUBJECTS)]


def enlarge(ink: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
    """An [8, 8] digit as a [64, 64] field of ink in [0, 1]; with a generator also slightly moved and turned."""
    size = (RESOLUTION, RESOLUTION)
    field = Image.fromarray(np.pad(ink, MARGIN)).resize(size, Image.Resampling.BICUBIC)
    if generator is not None:
        shift = tuple(generator.uniform(-2.5, 2.5, size=2))
        field = field.rotate(generator.uniform(-7, 7), Image.Resampling.BICUBIC, translate=shift)
    return np.clip(1.5 * np.asarray(field) - 0.3, 0.0, 1.0)


def paint(field: np.ndarray, ink: Colour, ground: Colour) -> Image.Image:
    """An RGB picture of a field of ink [h, w] in [0, 1], in two colours."""
    pixels = np.asarray(ground, np.float32) + field[..., None] * np.subtract(ink, ground, dtype=np.float32)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def caption(wording: str, digit: int, ink: str, ground: str) -> str:
    """The wording with its digit and its colours filled in."""
    return wording.format(digit=DIGIT_WORDS[digit], ink=ink, ground=ground)


def write_imagefolder(folder: Path, parts: Sequence[tuple[Digits, int]], seed: int) -> None:
    """Writes PNG pictures and `metadata.jsonl` (`file_name`, `text`): so many pictures of each part.

    Each digit of a part is used about equally often; colours and wordings are those of training captions, at random.
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
    """A random training caption for the digit, and an ink and a ground that it fits."""
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
    """Indices of digits, each once a round, the rounds shuffled, until there are enough."""
    rounds = -(-num_pictures // num_digits)
    order = np.concatenate([generator.permutation(num_digits) for _ in range(rounds)])
    return iter(order[:num_pictures].tolist())


def write_pretraining_folder(folder: Path, num_pictures: int = 20000, seed: int = 1) -> None:
    """The imagefolder of the base: digits 0 to 7 only."""
    drawing, _ = split_digits()
    write_imagefolder(folder, [(drawing.only(PRETRAINED_DIGITS), num_pictures)], seed)


def write_fine_tuning_folder(folder: Path, num_new: int = 1600, num_rehearsed: int = 1400, seed: int = 2) -> None:
    """The imagefolder of the fine-tuning: 8 and 9, and enough of 0 to 7 (a rehearsal) not to forget them."""
    drawing, _ = split_digits()
    parts = [(drawing.only(NEW_DIGITS), num_new), (drawing.only(PRETRAINED_DIGITS), num_rehearsed)]
    write_imagefolder(folder, parts, seed)


def write_validation_folder(folder: Path, num_pictures: int = 128, seed: int = 4) -> None:
    """The imagefolder to measure the validation loss on: 8 and 9 of the judging digits, which nothing is drawn from."""
    _, judging = split_digits()
    write_imagefolder(folder, [(judging.only(NEW_DIGITS), num_pictures)], seed)


def evaluation_wishes(num_per_digit: int = 50, digits: Sequence[int] = range(10)) -> list[Wish]:
    """Prompts in held-out wordings and held-out colour pairs only, `num_per_digit` of each digit, digit by digit."""
    settings = [(wording, pair) for pair in HELD_OUT_PAIRS for wording in HELD_OUT_WORDINGS]
    order = np.random.default_rng(3).permutation(len(settings))
    wishes = []
    for digit in digits:
        for number in range(num_per_digit):
            wording, (ink, ground) = settings[order[(number + 7 * digit) % len(settings)]]
            wishes.append(Wish(caption(wording, digit, ink, ground), digit, ink, ground))
    return wishes
