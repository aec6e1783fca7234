"""Trains a model of handwritten digits from scratch with `train_unconditional.py`, draws with it, and judges.

python demo/unconditional.py
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from classifier import INK_SIZE, DigitNetwork, to_network_size, train_classifier
from digits import Digits, enlarge, split_digits

DEMO = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO.parent))

from train_unconditional import main as train  # noqa: E402
from utils.grids import STRIP, grid_of  # noqa: E402
from utils.runtime import silence_libraries  # noqa: E402

silence_libraries()

from diffusers import DiffusionPipeline  # noqa: E402

NUM_DRAWN = 200
DRAWING_BATCH = 100
SAMPLING_STEPS = 50
SEED = 1000
SURE = 0.9
VARIANTS = 4
GRID_SIZE = 100

ARGUMENTS = [
    "--image_channels", "1", "--resolution", str(INK_SIZE), "--center_crop",
    "--model_size", "tiny", "--flow_matching",
    "--train_batch_size", "64", "--max_train_steps", "1000", "--learning_rate", "2e-3", "--lr_warmup_steps", "50",
    "--use_ema", "--ema_max_decay", "0.995",
    "--num_inference_steps", "25", "--save_images_steps", "50", "--eval_batch_size", "16",
    "--save_model_epochs", "1000", "--checkpointing_steps", "500", "--seed", "0",
]  # fmt: skip


def write_images(digits: Digits, folder: Path, seed: int = 5) -> None:
    """Writes each digit in several variants, slightly moved and turned, as grey pictures of 16 x 16 pixels."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for number, ink in enumerate(digits.ink):
        for variant in range(VARIANTS):
            field = to_network_size(enlarge(ink, generator)[None])[0, 0].numpy()
            Image.fromarray(np.round(field * 255).astype(np.uint8)).save(folder / f"{number:04d}_{variant}.png")


def read_images(folder: Path) -> Tensor:
    """The pictures of a folder as ink [n, 1, 16, 16] in [0, 1]."""
    return torch.stack([_ink_of(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def _ink_of(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture.convert("L"), np.float32) / 255)[None]


def draw(folder: Path, count: int = NUM_DRAWN) -> list[Image.Image]:
    """Pictures of the finished pipeline, by diffusers alone; picture i always starts from the same noise."""
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


def nearest(ink: Tensor, others: Tensor) -> Tensor:
    """[n] the root mean square distance of each picture to the nearest of others, in shares of full ink."""
    return torch.cdist(ink.flatten(1).double(), others.flatten(1).double()).min(dim=1).values / ink[0].numel() ** 0.5


@torch.no_grad()
def verdict(drawn: Tensor, network: DigitNetwork, trained: Tensor, held_out: Tensor) -> str:
    """What the classifier sees in drawn digits, and how far they are from those trained on; a fact a line."""
    sureness, digits = network(drawn).softmax(dim=1).max(dim=1)
    is_sure = sureness > SURE
    counts = torch.bincount(digits[is_sure], minlength=10).tolist()
    ours, theirs = nearest(drawn, trained), nearest(held_out, trained)
    real_sure = (network(trained).softmax(dim=1).max(dim=1).values > SURE).float().mean()
    return "\n".join(
        [
            f"drawn digits of which the classifier is sure     {float(is_sure.float().mean()):.1%} of {len(drawn)}"
            f" (of the real ones trained on: {float(real_sure):.1%})",
            f"digits among them                                {sum(count > 0 for count in counts)} of 10: "
            + ", ".join(f"{count} x {digit}" for digit, count in enumerate(counts)),
            f"distance to the nearest training image, median   {float(ours.median()):.3f} of drawn ones, "
            f"{float(theirs.median()):.3f} of held-out real ones",
            f"nearer than any held-out one                     {int((ours < theirs.min()).sum())} of {len(drawn)}",
        ]
    )


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=DEMO / "output")
    return parser.parse_args()


def main() -> None:
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
    pictures = draw(folder)
    held_out = to_network_size(np.stack([enlarge(ink) for ink in judging.ink]))
    drawn = torch.stack([_ink_of(picture) for picture in pictures])
    print(verdict(drawn, train_classifier(), read_images(data), held_out))
    grid, strip = output / "unconditional_grid.png", output / "unconditional_film_strip.png"
    grid_of(pictures[:GRID_SIZE], 20).save(grid)
    shutil.copyfile(folder / "samples" / STRIP, strip)
    print(f"\n{time.monotonic() - began:.0f} seconds\nresult: {folder}\npictures: {grid} {strip}")


if __name__ == "__main__":
    main()
