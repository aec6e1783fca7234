"""Trains a model of handwritten digits from scratch with `train_unconditional.py` and scores its images.

python demo/unconditional.py
"""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from classifier import DigitNetwork, to_network_size, train_classifier
from digits import Digits, enlarge, split_digits

DEMO = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO.parent))

from train_unconditional import main as train  # noqa: E402
from utils.config.library_messages import hear_libraries  # noqa: E402
from utils.sampling.grid_samples import film, grid_of  # noqa: E402

hear_libraries()

from diffusers import DiffusionPipeline  # noqa: E402

NUM_DRAWN = 200
DRAWING_BATCH = 100
SAMPLING_STEPS = 50
SEED = 1000
SURE = 0.9
EDGE = 8  # edge of scikit-learn's digits in pixels
NUM_SHOWN = 100

ARGUMENTS = [
    "--image_channels", "1", "--resolution", str(EDGE), "--center_crop",
    "--model_size", "tiny", "--attention_resolutions", "8", "4", "--dropout", "0.1", "--flow_matching",
    "--train_batch_size", "64", "--max_train_steps", "800", "--learning_rate", "2e-3", "--lr_warmup_steps", "50",
    "--use_ema", "--ema_max_decay", "0.995",
    "--num_inference_steps", "25", "--save_images_steps", "20", "--eval_batch_size", "4",
    "--save_model_epochs", "1000", "--checkpointing_steps", "500", "--seed", "0",
]  # fmt: skip


def write_images(digits: Digits, folder: Path) -> None:
    """Writes each digit as a grey image of 8 x 8 pixels."""
    folder.mkdir(parents=True)
    for number, ink in enumerate(digits.ink):
        Image.fromarray(np.round(ink * 255).astype(np.uint8)).save(folder / f"{number:04d}.png")


def read_images(folder: Path) -> Tensor:
    """Returns the images of a folder as ink [n, 8, 8] in [0, 1]."""
    return ink_of([Image.open(path) for path in sorted(folder.glob("*.png"))])


def ink_of(pictures: Sequence[Image.Image]) -> Tensor:
    """Returns grey images as ink [n, 8, 8] in [0, 1]."""
    return torch.stack([torch.from_numpy(np.asarray(picture.convert("L"), np.float32) / 255) for picture in pictures])


def enlarged(ink: Tensor) -> np.ndarray:
    """Returns ink [n, 8, 8] enlarged to [n, 64, 64], as for the classifier's training."""
    return np.stack([enlarge(each) for each in ink.numpy()])


def draw(folder: Path, count: int) -> list[Image.Image]:
    """Draws images with the exported pipeline and plain diffusers; image i always starts from the same noise."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for first in range(0, count, DRAWING_BATCH):
        seeds = range(SEED + first, SEED + min(count, first + DRAWING_BATCH))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        pictures += pipeline(
            batch_size=len(generators), generator=generators, num_inference_steps=SAMPLING_STEPS
        ).images
    return pictures


def pictures_of(ink: Tensor) -> list[Image.Image]:
    """Returns ink [n, 8, 8] as images of 64 x 64 pixels."""
    return [Image.fromarray(np.round(field * 255).astype(np.uint8)) for field in enlarged(ink)]


def nearest(ink: Tensor, others: Tensor) -> Tensor:
    """Returns the root mean square distance [n] of each image to the nearest of `others`, where full ink is 1."""
    return torch.cdist(ink.flatten(1).double(), others.flatten(1).double()).min(dim=1).values / EDGE


@torch.no_grad()
def sureness(ink: Tensor, network: DigitNetwork) -> tuple[Tensor, Tensor]:
    """Returns (probability [n] of the most likely digit, that digit [n]) for ink [n, 8, 8]."""
    return network(to_network_size(enlarged(ink))).softmax(dim=1).max(dim=1)


def verdict(drawn: Tensor, network: DigitNetwork, trained: Tensor, held_out: Tensor) -> str:
    """Returns a text with what the classifier sees in drawn digits, and their distance to the training images."""
    sure, digits = sureness(drawn, network)
    share = float((sure > SURE).float().mean())
    real_sure, _ = sureness(trained, network)
    counts = torch.bincount(digits[sure > SURE], minlength=10).tolist()
    ours, theirs = nearest(drawn, trained), nearest(held_out, trained)
    return "\n".join(
        [
            f"drawn digits of which the classifier is sure     {share:.1%} of {len(drawn)}"
            f" (training images: {float((real_sure > SURE).float().mean()):.1%})",
            f"different digits among them                      {sum(count > 0 for count in counts)} of 10: "
            + ", ".join(f"{count} x {digit}" for digit, count in enumerate(counts)),
            f"distance to the nearest training image, median   {float(ours.median()):.3f} for drawn digits, "
            f"{float(theirs.median()):.3f} for held-out digits",
            f"nearer than any held-out digit                   {int((ours < theirs.min()).sum())} of {len(drawn)}",
        ]
    )


def options() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=DEMO / "output", help="output folder (default: demo/output)")
    return parser.parse_args()


def main() -> None:
    """Trains, draws, and prints and saves the results."""
    # Train on one half of the digits.
    began = time.monotonic()
    output = options().output_dir
    data, folder = output / "unconditional_digits", output / "unconditional"
    for old in (data, folder):
        shutil.rmtree(old, ignore_errors=True)
    drawing, judging = split_digits()
    write_images(drawing, data)
    status = train(["--train_data_dir", str(data), "--output_dir", str(folder), *ARGUMENTS])
    if status:
        sys.exit(status)

    # Draw, and score the images with a classifier of the other half.
    pictures = draw(folder, NUM_DRAWN)
    drawn = ink_of(pictures)
    print(verdict(drawn, train_classifier(), read_images(data), torch.from_numpy(judging.ink)))

    # Save a grid of images, and a film strip of the samples during training.
    grid, strip = output / "unconditional_grid.png", output / "unconditional_film_strip.png"
    grid_of(pictures_of(drawn[:NUM_SHOWN]), 20).save(grid)
    frames = pictures_of(ink_of(film(folder / "samples")))
    grid_of(frames, len(frames)).save(strip)
    print(f"\n{time.monotonic() - began:.0f} seconds\nresult: {folder}\npictures: {grid} {strip}")


if __name__ == "__main__":
    main()
