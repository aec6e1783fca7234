"""Measures what flags cost, and whether they change the trained weights.

python benchmarks/with_and_without.py --pretrained_model PIPELINE [--steps 200] [--repeats 5] --flags "--deterministic"
python benchmarks/with_and_without.py --pretrained_model PIPELINE --watching

Runs without and with the flags alternate. --watching compares a run with report, verdict, TensorBoard and Prometheus
with one that has none of them. It prints the ratio of the median time of a step (after the first five), and of the time
from then to the last step, with the smallest and the largest of the pairs; and how many different weights the runs
gave. Other flags go to all runs.
"""

import argparse
import hashlib
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WARM_UP_STEPS = 5
WATCHED = "--report_to tensorboard --prometheus_port 9178"
UNWATCHED = "--no_report --no_verdict --report_to none"


class Measured(NamedTuple):
    """A run: median seconds of a step, seconds from the first step that counts to the last, and its weights' hash."""

    step: float
    whole: float
    weights: str


def write_images(folder: Path, count: int, edge: int) -> None:
    """Writes images of noise with captions."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (edge, edge, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"noise {number}")


def run(out: Path, words: list[str]) -> Measured:
    """Trains and measures."""
    subprocess.run([sys.executable, str(ROOT / "train_text_to_image.py"), *words, "--output_dir", str(out)], check=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    counted = lines[WARM_UP_STEPS:]
    speed = statistics.median(line["images_per_second"] for line in counted)
    weights = sorted((out / "unet").glob("*.safetensors")) or sorted(out.glob("*.safetensors"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in weights)).hexdigest()
    return Measured(1 / speed, counted[-1]["time"] - counted[0]["time"], digest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model", required=True)
    parser.add_argument("--flags", default="--deterministic", help="what the second run of each pair has besides")
    parser.add_argument("--watching", action="store_true", help="compare everything that shows a run with nothing")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    chosen, more = parser.parse_known_args()
    without, flags = (
        (UNWATCHED, WATCHED) if chosen.watching else ("--report_to none", f"--report_to none {chosen.flags}")
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_images(folder / "images", 16, chosen.resolution)
        words = ["--pretrained_model", chosen.pretrained_model, "--train_data_dir", str(folder / "images")]
        words += ["--resolution", str(chosen.resolution), "--max_train_steps", str(chosen.steps)]
        words += ["--no_final_checkpoint", "--no_export_check", *more]
        pairs = [
            (
                run(folder / f"without-{number}", [*words, *shlex.split(without)]),
                run(folder / f"with-{number}", [*words, *shlex.split(flags)]),
            )
            for number in range(chosen.repeats)
        ]
    print(f"with {flags}\nagainst {without}")
    for name in ("step", "whole"):
        ratios = [getattr(slow, name) / getattr(fast, name) for fast, slow in pairs]
        print(f"{name}: {statistics.median(ratios):.3f} times as long ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"{2 * len(pairs)} runs gave {len({each.weights for pair in pairs for each in pair})} different results")


if __name__ == "__main__":
    main()
