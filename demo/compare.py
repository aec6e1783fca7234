"""Fine-tunes the demo's base with each loss, weighting, adaptation and optimizer, for equal steps, and compares them.

python demo/compare.py

It prints the table and writes it into demo/README.md. Finished runs stay in --output_dir: run it again to continue.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from classifier import judge, train_classifier
from digits import NEW_DIGITS, PRETRAINED_DIGITS, evaluation_wishes, write_fine_tuning_folder, write_validation_folder
from run import BASE, DEMO, LORA_TARGETS, NUM_PER_DIGIT, SHARED_ARGUMENTS, StableDiffusionPipeline, draw, load_pipeline
from utils.diffusion.losses import LOSSES, WEIGHTINGS
from utils.training.adapters import ADAPTATIONS
from utils.training.optimizer_table import OPTIMIZERS

README = DEMO / "README.md"
BEGIN, END = "<!-- compare: begin -->", "<!-- compare: end -->"
NUM_STEPS = 250
DEFAULTS = {"loss": "l2", "weighting": "uniform", "adaptation": "full", "optimizer": "adamw"}
TABLES = {"loss": LOSSES, "weighting": WEIGHTINGS, "adaptation": ADAPTATIONS, "optimizer": OPTIMIZERS}

COMMON = [
    *SHARED_ARGUMENTS,
    "--train_batch_size", "48",
    "--max_train_steps", str(NUM_STEPS),
    "--cache_latents", "--cache_text_embeddings",
    "--validation_steps", "50",
    "--checkpointing_steps", str(NUM_STEPS),
    "--report_to", "none", "--no_report", "--no_verdict",
]  # fmt: skip
ADAPTED = ["--rank", "16", "--lora_target_modules", LORA_TARGETS]
RATE = "--learning_rate"
OWN_FLAGS = {
    ("adaptation", "lora"): [*ADAPTED, RATE, "4e-3"],
    ("adaptation", "loha"): [*ADAPTED, RATE, "1e-2"],
    ("adaptation", "lokr"): [*ADAPTED, RATE, "2e-2"],
    ("optimizer", "adafactor"): [RATE, "1e-2"],
    ("optimizer", "lion"): [RATE, "1e-4"],
    ("optimizer", "prodigy"): [RATE, "1"],
    ("optimizer", "schedule_free_adamw"): [RATE, "1e-3", "--lr_scheduler", "constant_with_warmup"],
}


@dataclass(frozen=True)
class Entry:
    """One run of the comparison.

    Attributes:
        table: the option that it sets: loss, weighting, adaptation or optimizer.
        name: the value of that option.
    """

    table: str
    name: str

    @property
    def is_default(self) -> bool:
        """Whether it is the default of the option."""
        return DEFAULTS[self.table] == self.name

    @property
    def flags(self) -> list[str]:
        """The flags of its run besides the common ones."""
        return [f"--{self.table}", self.name, *(OWN_FLAGS.get((self.table, self.name)) or [RATE, "1e-3"])]


@dataclass(frozen=True)
class Reached:
    """Results of a run: shares of recognised digits, and the validation loss on unseen digits before and after."""

    new_digits: float
    old_digits: float
    loss_before: float
    loss_after: float


def entries() -> list[Entry]:
    """Returns the runs: first the defaults, then every other value of each option."""
    found = [Entry(table, name) for table, names in TABLES.items() for name in names]
    return [Entry("loss", DEFAULTS["loss"]), *(entry for entry in found if not entry.is_default)]


def train(entry: Entry, output_dir: Path) -> Path:
    """Runs the training script for an entry in its own process; returns the output folder."""
    folder = output_dir / f"{entry.table}-{entry.name}"
    where = {
        "--pretrained_model": BASE,
        "--train_data_dir": output_dir / "digits",
        "--validation_data_dir": output_dir / "unseen",
        "--encoding_cache_dir": output_dir / "cache",
        "--output_dir": folder,
    }
    command = [sys.executable, DEMO.parent / "train_text_to_image.py", "--overwrite_output_dir", *COMMON, *entry.flags]
    command += [word for pair in where.items() for word in pair]
    subprocess.run([str(word) for word in command], check=True)
    return folder


def measure(entry: Entry, folder: Path) -> Reached:
    """Draws with the result, classifies its images, and reads its losses."""
    is_fused = entry.table == "adaptation" and entry.name in ("loha", "lokr")
    kind = "lora" if entry.name == "lora" else "full"
    pipeline: StableDiffusionPipeline = load_pipeline(kind, folder / "fused" if is_fused else folder)
    wishes = evaluation_wishes(NUM_PER_DIGIT)
    right = judge(draw(pipeline, wishes), wishes, train_classifier()).digit_right
    digits = np.array([wish.digit for wish in wishes])
    lines = [json.loads(line) for line in (folder / "validation.jsonl").read_text(encoding="utf-8").splitlines()]
    shares = (float(right[np.isin(digits, which)].mean()) for which in (NEW_DIGITS, PRETRAINED_DIGITS))
    return Reached(*shares, lines[0]["loss"], lines[-1]["loss"])


def table(reached: dict[Entry, Reached]) -> str:
    """Returns the comparison as a Markdown table."""
    lines = [
        "| | new digits | old digits | validation loss | flags |",
        "|---|---|---|---|---|",
    ]
    first = next(iter(reached.values()))
    lines.append(f"| before | | | {first.loss_before:.4f} | |")
    for entry, values in reached.items():
        name = "defaults: " + ", ".join(DEFAULTS.values()) if entry.is_default else f"{entry.table} {entry.name}"
        digits = f"{values.new_digits:.1%} | {values.old_digits:.1%}".replace("%", " %")
        own = " ".join(entry.flags[2:]).replace(LORA_TARGETS, "...")
        flags = (
            ""
            if entry.is_default
            else f"`--{entry.table} {entry.name}" + (f" {own}`" if own != f"{RATE} 1e-3" else "`")
        )
        lines.append(f"| {name} | {digits} | {values.loss_after:.4f} | {flags} |")
    return "\n".join(lines)


def write_into_readme(text: str) -> None:
    """Replaces the table between its marks in the README."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=DEMO / "output" / "compare",
        help="folder of runs (default: demo/output/compare)",
    )
    output_dir = parser.parse_args(argv).output_dir
    if not (output_dir / "unseen" / "metadata.jsonl").exists():
        write_fine_tuning_folder(output_dir / "digits")
        write_validation_folder(output_dir / "unseen")
    reached = {}
    for entry in tqdm(entries(), desc="comparing"):
        kept = output_dir / f"{entry.table}-{entry.name}.json"
        if not kept.exists():
            found = measure(entry, train(entry, output_dir))
            kept.write_text(json.dumps(asdict(found)) + "\n", encoding="utf-8")
        reached[entry] = Reached(**json.loads(kept.read_text(encoding="utf-8")))
    text = table(reached)
    write_into_readme(text)
    print(text)


if __name__ == "__main__":
    main()
