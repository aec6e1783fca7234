"""Runs that are killed (kill -9) twice each, at random moments of chosen phases, must end as runs in peace do.

python tests/chaos.py [--rounds 100] [--seed 0]

Each round draws options and the phases of its two kills, and compares the last checkpoint, the exported result and the
logged losses with those of the same command left alone.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from safetensors.torch import load_file  # noqa: E402

from tests import tiny  # noqa: E402

STEPS = 8
PHASES = ("caching", "training", "saving", "exporting")  # in their order
OPTIONS = (
    ("--use_ema",),
    ("--gradient_accumulation_steps", "2"),
    ("--dataloader_num_workers", "1"),
    ("--cache_text_embeddings",),
    ("--use_aspect_ratio_buckets", "--bucket_step", "8", "--min_bucket_size", "16"),
    ("--caption_dropout", "0.3"),
    ("--random_flip", "--cache_variants", "2"),
    ("--async_checkpointing",),
    ("--ema_lengths", "0.1", "--ema_snapshot_steps", "2"),
    ("--noise_offset", "0.1", "--multires_noise_iterations", "3"),
)
KINDS = (
    ("--adaptation", "full", "--optimizer", "adamw"),
    ("--adaptation", "full", "--optimizer", "adamw8bit"),
    ("--adaptation", "full", "--optimizer", "muon"),
    ("--adaptation", "lora", "--lora_dropout", "0.2", "--optimizer", "prodigy"),
    ("--adaptation", "lora", "--train_text_encoder", "--optimizer", "schedule_free_adamw"),
    ("--adaptation", "lokr", "--rank", "2", "--optimizer", "lion"),
)


def draw_flags(drawn: random.Random) -> list[str]:
    """A kind of run with two of the options that go with it."""
    kind = drawn.choice(KINDS)
    fitting = [each for each in OPTIONS if not ("--train_text_encoder" in kind and "--cache_text_embeddings" in each)]
    chosen = drawn.sample(fitting, 2)
    if {"--use_ema", "--ema_lengths"} <= {each[0] for each in chosen}:
        chosen = chosen[:1]
    return [*kind, *(word for each in chosen for word in each)]


def command(pipeline: Path, images: Path, out: Path, cache: Path, flags: Sequence[str]) -> list[str]:
    """The run, which goes on if it was begun."""
    where = ["--pretrained_model", pipeline, "--train_data_dir", images, "--output_dir", out]
    where += [
        "--encoding_cache_dir",
        cache,
        "--cache_latents",
        "--cache_batch_size",
        1,
        "--resolution",
        tiny.RESOLUTION,
    ]
    where += ["--max_train_steps", STEPS, "--checkpointing_steps", 2, "--train_batch_size", 2, "--report_to", "none"]
    where += ["--resume_from_checkpoint", "latest", "--lr_warmup_steps", 0, "--learning_rate", 1e-3]
    return [sys.executable, str(ROOT / "train_text_to_image.py"), *map(str, where), *flags]


def sign_of(phase: str, out: Path, cache: Path) -> Callable[[], bool]:
    """Whether a phase is to be seen on the disk now."""
    begun = time.time()
    patterns = {
        "caching": (cache, "latents/*.safetensors"),
        "training": (out, "metrics.jsonl"),
        "saving": (out, ".tmp-checkpoint-*"),
        "exporting": (out, "unet/*"),
    }
    folder, pattern = patterns[phase]
    if phase == "exporting":
        return lambda: any(is_newer(path, begun) for each in (pattern, "*.safetensors") for path in folder.glob(each))
    return lambda: any(is_newer(path, begun) for path in folder.glob(pattern))


def is_newer(path: Path, begun: float) -> bool:
    """Whether a file is there and was written since then."""
    try:
        return path.stat().st_mtime > begun
    except OSError:
        return False


def run_until(words: Sequence[str], sign: Callable[[], bool], delay: float) -> bool:
    """Runs a command and kills it a moment after the sign; gives whether it was killed and had not ended before."""
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not sign():
        time.sleep(0.002)
    time.sleep(delay)
    was_alive = process.poll() is None
    if was_alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return was_alive


def end_of(out: Path) -> dict[str, object]:
    """What must be the same: all tensors of the last checkpoint and of the result, and the losses."""
    files = [*(out / f"checkpoint-{STEPS}").rglob("*.safetensors")]
    files += [path for path in out.rglob("*.safetensors") if "checkpoint" not in str(path.relative_to(out))]
    tensors = {
        f"{path.relative_to(out)}/{name}": tensor.numpy().tobytes() if tensor.dtype.itemsize > 2 else tensor.tolist()
        for path in sorted(files)
        if "abandoned" not in path.name
        for name, tensor in load_file(path).items()
    }
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return tensors | {"losses": [(line["step"], line["train_loss"], line["grad_norm"]) for line in lines]}


def round_of(number: int, seed: int, folder: Path, pipeline: Path, images: Path, kills: Counter) -> bool:
    """One round; counts its kills by phase and gives whether it ended alike."""
    drawn = random.Random(f"{seed} {number}")
    flags = draw_flags(drawn)
    peace, chaos = folder / f"{number}-peace", folder / f"{number}-chaos"
    for out in (peace, chaos):
        cache = out.with_name(f"{out.name}-cache")
        words = command(pipeline, images, out, cache, flags)
        if out is chaos:
            first = number % len(PHASES)
            for phase in (PHASES[first], drawn.choice(PHASES[max(1, first) :])):
                kills[phase] += run_until(words, sign_of(phase, out, cache), drawn.uniform(0, 0.2))
        subprocess.run(words, check=True, capture_output=True)
    is_same = end_of(peace) == end_of(chaos)
    print(f"round {number}: {'the same bits' if is_same else 'NOT THE SAME'}: {' '.join(flags)}", flush=True)
    return is_same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    kills: Counter = Counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pipeline, images = tiny.make_sd(folder / "pipeline"), tiny.make_images(folder / "images", 9)
        rounds = range(chosen.rounds)
        same = sum(round_of(number, chosen.seed, folder, pipeline, images, kills) for number in rounds)
    by_phase = ", ".join(f"{phase} {kills[phase]}" for phase in PHASES)
    print(f"{chosen.rounds} rounds, {sum(kills.values())} kills ({by_phase}), {same} ends bit-identical")
    return 0 if same == chosen.rounds else 1


if __name__ == "__main__":
    sys.exit(main())
