"""Measures the cost of --deterministic, and whether runs are reproducible with and without it.

python benchmarks/deterministic.py --pretrained_model PIPELINE --resolution 512 [--steps 40] [--repeats 3] [more flags]

Runs with and without it alternate. It prints images per second (median over the steps after the first five), the ratio
with minimum and maximum, and whether repeated runs gave identical weights. It has not been run on a GPU yet, where the
pipeline should have true size; on a CPU both kinds are the same.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WARM_UP_STEPS = 5


def write_images(folder: Path, count: int, edge: int) -> None:
    """Writes images of noise with captions."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (edge, edge, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"noise {number}")


def run(out: Path, words: list[str]) -> tuple[float, str]:
    """Trains; returns (images per second, hash of the trained weights)."""
    subprocess.run([sys.executable, str(ROOT / "train_text_to_image.py"), *words, "--output_dir", str(out)], check=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speed = statistics.median(line["images_per_second"] for line in lines[WARM_UP_STEPS:])
    weights = sorted((out / "unet").glob("*.safetensors")) or sorted(out.glob("*.safetensors"))
    return speed, hashlib.sha256(b"".join(file.read_bytes() for file in weights)).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model", required=True)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    chosen, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_images(folder / "images", 16, chosen.resolution)
        words = ["--pretrained_model", chosen.pretrained_model, "--train_data_dir", str(folder / "images")]
        words += ["--resolution", str(chosen.resolution), "--max_train_steps", str(chosen.steps)]
        words += ["--report_to", "none", "--no_final_checkpoint", *more]
        plain, exact = [], []
        for number in range(chosen.repeats):
            plain.append(run(folder / f"plain-{number}", words))
            exact.append(run(folder / f"exact-{number}", [*words, "--deterministic"]))
    ratios = [fast / slow for (fast, _), (slow, _) in zip(plain, exact, strict=True)]
    print(
        f"images per second: {statistics.median(s for s, _ in plain):.2f}; {statistics.median(s for s, _ in exact):.2f}"
    )
    print(
        f"--deterministic takes {statistics.median(ratios):.3f} times as long ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    for name, runs in (("without", plain), ("with", exact)):
        print(f"{name} it, {len(runs)} runs gave {len({weights for _, weights in runs})} different results")


if __name__ == "__main__":
    main()
