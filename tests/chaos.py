"""Runs that are killed (kill -9) twice each, at random moments of chosen phases, must end as runs in peace do.

python tests/chaos.py [--rounds 100] [--seed 0]

Each round draws options and the phases of its two kills, and compares the last checkpoint, the exported result and the
logged losses with those of the same command left alone. Runs are forked from this process, which has imported all they
need: each is a process of its own, killed with what it has started.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import train_text_to_image  # noqa: E402
from tests import tiny  # noqa: E402

STEPS = 8
PHASES = ("caching", "training", "saving", "exporting")  # in their order
LONGEST = {"caching": 0.05, "training": 0.3, "saving": 0.03, "exporting": 0.05}  # seconds after its sign to the kill
OPTIONS = (
    ("--use_ema",),
    ("--gradient_accumulation_steps", "2"),
    ("--dataloader_num_workers", "1"),
    ("--cache_text_embeddings",),
    ("--use_aspect_ratio_buckets", "--bucket_step", "8", "--min_bucket_size", "16"),
    ("--caption_dropout", "0.3"),
    ("--random_flip", "--cache_variants", "2"),
    ("--async_checkpointing",),
    ("--checkpointing_minutes", "0.01", "--checkpointing_epochs", "1"),
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
    return [*map(str, where), *flags]


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


def start(argv: Sequence[str], log: Path) -> int:
    """Begins a run in a process group of its own; gives its id."""
    process = os.fork()
    if process:
        return process
    os.setsid()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = 1
    try:
        status = train_text_to_image.main(argv)
    finally:
        sys.stderr.flush()
        os._exit(status)


def has_ended(process: int) -> bool:
    """Whether it has, looked at without waiting and without forgetting its status."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def phase_at(out: Path, begun: float) -> str:
    """The phase in which a run was killed, by what it has left behind."""
    if any(is_newer(path, begun) for path in out.glob(".tmp-checkpoint-*")):
        return "saving"
    if not (out / "metrics.jsonl").exists():
        return "caching"
    results = [*out.glob("unet/*"), *out.glob("*.safetensors")]
    return "exporting" if any(is_newer(path, begun) for path in results) else "training"


def run_until(argv: Sequence[str], log: Path, sign: Callable[[], bool], delay: float) -> bool:
    """Begins a run and kills it a moment after the sign; gives whether it had not ended before."""
    process = start(argv, log)
    while not has_ended(process) and not sign():
        time.sleep(0.001)
    time.sleep(delay)
    was_alive = not has_ended(process)
    if was_alive:
        os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return was_alive


def run_in_peace(argv: Sequence[str], log: Path) -> None:
    """Runs to the end, which must be a good one."""
    _, status = os.waitpid(start(argv, log), 0)
    if status:
        raise SystemExit(f"a run ended with {os.waitstatus_to_exitcode(status)}:\n{log.read_text()[-4000:]}")


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
        argv, log = command(pipeline, images, out, cache, flags), out.with_name(f"{out.name}.log")
        if out is chaos:
            first = PHASES.index((*PHASES, "caching")[number % 5])  # which is over soon, and often missed
            for phase in (PHASES[first], drawn.choice(PHASES[max(1, first) :])):
                begun = time.time()
                if run_until(argv, log, sign_of(phase, out, cache), drawn.uniform(0, LONGEST[phase])):
                    kills[phase_at(out, begun)] += 1
        run_in_peace(argv, log)
    is_same = end_of(peace) == end_of(chaos)
    if is_same:
        for out in (peace, chaos):
            shutil.rmtree(out)
    print(f"round {number}: {'the same bits' if is_same else 'NOT THE SAME'}: {' '.join(flags)}", flush=True)
    return is_same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    kills: Counter = Counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pipeline, images = tiny.make_sd(folder / "pipeline"), tiny.make_images(folder / "images", 9)
        rounds = range(chosen.rounds)
        same = sum(round_of(number, chosen.seed, folder, pipeline, images, kills) for number in rounds)
    by_phase = ", ".join(f"{phase} {kills[phase]}" for phase in PHASES)
    print(f"{chosen.rounds} rounds, {sum(kills.values())} kills ({by_phase}), {same} ends bit-identical")
    has_all = all(kills[phase] >= sum(kills.values()) / 10 for phase in PHASES) or chosen.rounds < 20
    return 0 if same == chosen.rounds and has_all else 1


if __name__ == "__main__":
    sys.exit(main())
