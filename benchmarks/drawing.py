"""Scores images that plain diffusers draws from exported folders, by number of steps and by guidance scale.

    python benchmarks/drawing.py --out FOLDER [--sampler ddim] [--steps 25 100 400] [--guidance 1 2 3]

It trains two models of scikit-learn's digits (8x8 pixels) from scratch, an unconditional and a class-conditional one,
and draws 400 digits from each exported folder with plain diffusers, without arguments that change how a step is taken.
The score is the kernel distance (KID's polynomial kernel) between the pixels of drawn digits and of 400 real digits.
Existing folders are not trained again, so that exports of another version can be compared.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.printing import print_machine, print_table
from train_unconditional import main as train
from utils.config.library_messages import hear_libraries
from utils.evaluation.metrics.distances import kernel_distance, polynomial_kernel

hear_libraries()

from diffusers import DiffusionPipeline  # noqa: E402

NUM_DRAWN = 400
BATCH = 100
CLASS_STEPS = 50
TRAINING = (
    *("--image_channels", "1", "--resolution", "8", "--center_crop", "--model_size", "tiny"),
    *("--attention_resolutions", "8", "4", "--train_batch_size", "64", "--max_train_steps", "450"),
    *("--learning_rate", "2e-3", "--lr_warmup_steps", "50", "--use_ema", "--ema_max_decay", "0.995"),
    *("--num_samples", "0", "--save_model_epochs", "1000", "--report_to", "none", "--seed", "0"),
)


def write_digits(folder: Path) -> None:
    """Writes each digit as a grey image of 8 x 8 pixels, in one folder per class."""
    found = load_digits()
    for number, (ink, digit) in enumerate(zip(found.images, found.target, strict=True)):
        path = folder / str(digit) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(ink * (255 / 16)).astype(np.uint8)).save(path)


def real_digits() -> np.ndarray:
    """Returns the pixels [400, 64] of every fourth digit, in [0, 1]."""
    return load_digits().images.reshape(-1, 64)[::4][:NUM_DRAWN] / 16


def trained(out: Path, sampler: str, extra: list[str]) -> dict[str, Path]:
    """Returns the exported folders by kind; trains those that do not exist."""
    folders = {"unconditional": out / "plain", "class-conditional": out / "classes"}
    for name, folder in folders.items():
        if (folder / "model_index.json").exists():
            continue
        if not (out / "digits").exists():
            write_digits(out / "digits")
        flags = ["--class_conditional"] if name == "class-conditional" else []
        argv = ["--train_data_dir", str(out / "digits"), "--output_dir", str(folder), "--sampler", sampler]
        if train([*argv, *TRAINING, *flags, *extra]):
            raise SystemExit(f"training {name} failed")
    return folders


def load(folder: Path) -> Any:
    """Loads the pipeline with plain diffusers."""
    code = {"custom_pipeline": str(folder), "trust_remote_code": True} if (folder / "pipeline.py").exists() else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **code)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: Any, **arguments: Any) -> np.ndarray:
    """Draws digits; returns their pixels [400, 64] in [0, 1]. Digit i always starts from the same noise."""
    found = []
    for first in range(0, NUM_DRAWN, BATCH):
        generators = [torch.Generator().manual_seed(seed) for seed in range(first, first + BATCH)]
        shown = {"class_labels": [seed % 10 for seed in range(first, first + BATCH)]}
        shown = shown if hasattr(pipeline, "labels") else {"batch_size": BATCH}
        images = pipeline(generator=generators, output_type="np", **shown, **arguments).images
        found.append(np.asarray(images).reshape(BATCH, -1))
    return np.concatenate(found)


def scored(pipeline: Any, real: np.ndarray, **arguments: Any) -> tuple[str, str]:
    """Draws; returns (kernel distance with its standard error, mean of the pixels) as text."""
    pixels = drawn(pipeline, **arguments)
    found = kernel_distance(pixels, real, polynomial_kernel)
    return f"{found.unbiased:.4f} ± {found.error:.4f}", f"{pixels.mean():.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--steps", type=int, nargs="*", default=[25, 100, 400])
    parser.add_argument("--guidance", type=float, nargs="*", default=[1, 2, 3])
    arguments, extra = parser.parse_known_args()
    folders, real = trained(arguments.out, arguments.sampler, extra), real_digits()
    print_machine(["torch", "diffusers"])
    plain, classes = load(folders["unconditional"]), load(folders["class-conditional"])
    for pipeline in (plain, classes):
        print(f"{type(pipeline).__name__} with {type(pipeline.scheduler).__name__}")
    print(f"mean of the pixels of real digits: {real.mean():.3f}")
    rows = [(str(steps), *scored(plain, real, num_inference_steps=steps)) for steps in arguments.steps]
    print_table("Unconditional", ("steps", "kernel distance", "mean"), rows)
    rows = [
        (f"{guidance:g}", *scored(classes, real, num_inference_steps=CLASS_STEPS, guidance_scale=guidance))
        for guidance in arguments.guidance
    ]
    print_table(f"Class-conditional, {CLASS_STEPS} steps", ("guidance", "kernel distance", "mean"), rows)


if __name__ == "__main__":
    main()
