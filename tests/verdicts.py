"""Studies the verdict by planted faults on the demo: make verdict. Finished runs are kept, so it can be continued."""

import argparse
import contextlib
import io
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from digits import NEW_DIGITS, PRETRAINED_DIGITS, split_digits, write_imagefolder  # noqa: E402
from run import BASE, LORA_TARGETS  # noqa: E402
from train_text_to_image import main as train  # noqa: E402

STEPS, BATCH = 64, 12
RATES = {"full": 5e-4, "lora": 2e-3}
NUM_IMAGES, NUM_HELD_OUT = 600, 48


class Fault(NamedTuple):
    """A planted fault: which verdicts name it, and how it changes data and flags."""

    accepted: tuple[str, ...]
    data: str = "mixed"
    rate: float = 1.0
    flags: Sequence[object] = ()
    steps: int = STEPS


WRONG = ("data or target wrong", "not learning")
FAULTS = {
    "healthy": Fault(("learning",)),
    "rate x 100": Fault(("diverging",), rate=100),
    "rate x 0.003": Fault(("not learning",), rate=0.003),
    "frozen weights": Fault(("not learning",), rate=1e-12),
    "eight images": Fault(("overfitting", "copying"), data="eight", steps=160),
    "harsh rate without the old digits": Fault(("forgetting",), data="new", rate=10),
    "shuffled captions": Fault(WRONG, data="shuffled"),
    "black images": Fault(WRONG, data="black"),
    "wrong prediction type": Fault(WRONG, flags=("--prediction_type", "sample")),
}


def write_data(folder: Path, kind: str, seed: int) -> Path:
    """Writes the training images of a kind, and returns their folder."""
    place = folder / f"{kind}-{seed}"
    if (place / "metadata.jsonl").is_file():
        return place
    shutil.rmtree(place, ignore_errors=True)
    drawing, judging = split_digits()
    new, old = drawing.only(NEW_DIGITS), drawing.only(PRETRAINED_DIGITS)
    if kind == "held-out":
        parts = [(judging.only(NEW_DIGITS), NUM_HELD_OUT)]
    elif kind == "new":
        parts = [(new, NUM_IMAGES)]
    elif kind == "eight":
        parts = [(new, 8)]
    else:
        parts = [(new, NUM_IMAGES // 2), (old, NUM_IMAGES // 2)]
    write_imagefolder(place, parts, seed=1000 + seed)
    if kind == "shuffled":
        lines = (place / "metadata.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        texts = [rows[number]["text"] for number in np.random.default_rng(seed).permutation(len(rows))]
        rows = [row | {"text": text} for row, text in zip(rows, texts, strict=True)]
        (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if kind == "black":
        for path in place.glob("*.png"):
            Image.new("RGB", (64, 64)).save(path)
    return place


def flags_of(fault: Fault, adaptation: str, seed: int, data: Path) -> list[str]:
    """The command line of a run, without its output folder."""
    words = ["--pretrained_model", BASE, "--train_data_dir", write_data(data, fault.data, seed)]
    words += ["--validation_data_dir", write_data(data, "held-out", 0), "--num_validation_timesteps", 4]
    words += ["--resolution", 64, "--mixed_precision", "no", "--lr_scheduler", "cosine", "--lr_warmup_steps", 10]
    words += ["--caption_dropout", 0.1, "--seed", seed, "--report_to", "none", "--dataloader_num_workers", 0]
    words += ["--adaptation", adaptation, "--train_batch_size", BATCH if fault.data != "eight" else 8]
    words += ["--max_train_steps", fault.steps, "--learning_rate", RATES[adaptation] * fault.rate]
    words += ["--rank", 16, "--lora_target_modules", LORA_TARGETS] if adaptation == "lora" else []
    return [str(word) for word in [*words, *fault.flags]]


def run(name: str, fault: Fault, adaptation: str, seed: int, folder: Path) -> dict[str, object]:
    """Trains with the fault, and returns what its verdict said."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()) as log:
        status = train([*flags_of(fault, adaptation, seed, folder / "data"), "--output_dir", str(out)])
    found = {"fault": name, "adaptation": adaptation, "seed": seed, "status": status, "steps": fault.steps}
    found["seconds"] = round(time.monotonic() - began, 1)
    if (out / "verdict.json").is_file():
        found["verdict"] = json.loads((out / "verdict.json").read_text())
    else:
        found["error"] = log.getvalue()[-500:]
    kept = folder / "readings" / f"{name.replace(' ', '_')}-{adaptation}-{seed}.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    if (out / "verdict.jsonl").is_file():
        shutil.copy(out / "verdict.jsonl", kept)
    return found


def table(done: Sequence[dict]) -> str:
    """Counts, for each fault, how often an accepted verdict came before half of the steps, and other verdicts."""
    lines = [f"{'fault':<36}{'runs':>5}{'named':>7}{'before half':>13}{'step / steps':>14}  other verdicts"]
    for name, fault in FAULTS.items():
        runs = [each for each in done if each["fault"] == name]
        if not runs:
            continue
        verdicts = [each.get("verdict") or {} for each in runs]
        right = [each.get("verdict") in fault.accepted for each in verdicts]
        shares = [each.get("since_step", 0) / run["steps"] for each, run in zip(verdicts, runs, strict=True)]
        early = sum(is_right and share < 0.5 for is_right, share in zip(right, shares, strict=True))
        others = [str(each.get("verdict")) for each, is_right in zip(verdicts, right, strict=True) if not is_right]
        usual = f"{np.median(shares):.2f}"
        lines.append(f"{name:<36}{len(runs):>5}{sum(right):>7}{early:>13}{usual:>14}  {', '.join(others)}")
    faulty = [each for each in done if each["fault"] != "healthy"]
    healthy = [each for each in done if each["fault"] == "healthy"]
    alarms = sum((each.get("verdict") or {}).get("verdict") != "learning" for each in healthy)
    return "\n".join([*lines, f"{len(faulty)} runs with a fault; {alarms} false alarms in {len(healthy)} healthy runs"])


def options() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    folder = ROOT / "demo" / "output" / "verdicts"
    parser.add_argument("--output_dir", type=Path, default=folder, help="where finished runs are kept")
    parser.add_argument("--faults", nargs="+", choices=tuple(FAULTS), default=list(FAULTS), help="faults to plant")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each fault, full and LoRA each")
    parser.add_argument("--healthy", type=int, default=20, help="healthy runs, half of them LoRA")
    parser.add_argument("--first_seed", type=int, default=0, help="the first of the seeds")
    return parser.parse_args()


def main() -> None:
    """Runs what is not done yet, and prints the table."""
    chosen = options()
    torch.set_num_threads(1)
    record = chosen.output_dir / "runs.jsonl"
    record.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.is_file() else []
    for name in chosen.faults:
        for number in range(chosen.healthy // 2 if name == "healthy" else chosen.seeds):
            seed = chosen.first_seed + number
            for adaptation in ("full", "lora"):
                key = (name, adaptation, seed)
                if any((each["fault"], each["adaptation"], each["seed"]) == key for each in done):
                    continue
                done.append(run(name, FAULTS[name], adaptation, seed, chosen.output_dir))
                with record.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
                word = done[-1].get("verdict", {}).get("verdict", done[-1].get("error"))
                print(f"{name}, {adaptation}, seed {seed}: {word} ({done[-1]['seconds']} s)", flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
