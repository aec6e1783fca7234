"""Trains the same model with our script and a peer's, in alternating turns, and prints both speeds.

    python benchmarks/train.py --case sd|sdxl|lora|sdxl-lora|unconditional [--peer_script FILE] [--size tiny|small|true]

The peer is an unchanged example script of diffusers, which you download and which is recognised by its name:
train_text_to_image.py, _sdxl.py, _lora.py, _lora_sdxl.py, train_unconditional.py. Both sides train the same seeded
random weights (benchmarks/assets.py) on the same images with the same batch size, resolution, precision, learning rate
and steps. Each turn runs in its own process, timed from outside by benchmarks/launch.py. The peer runs twice: with
default flags, and tuned (loader workers, `--foreach_ema` if it has that, no gradient checkpointing if it fits; on a GPU
both in bf16). The main result is the ratio to the tuned peer; its interval is a bootstrap over rounds and steps.

It prints no speed unless the fast path learns the same (benchmarks/gates.py): it compares the gradients of the first
step, the losses of 50 steps and the weight update after them with our script with all optimisations off, and the export
must load in plain diffusers. If a gate fails, it is named, and the exit status is 1. The plain path's own spread comes
from a second run that splits each batch in two. With the speeds it prints the loss of all results after equal steps, on
fixed images and noise, measured by benchmarks/evaluate.py without our code.

Both sides keep an EMA, except in LoRA runs, where the peer has none. Images are centre-cropped and not flipped, because
the peer's SDXL script would otherwise pass the UNet another crop than it encoded. diffusers' train_unconditional.py has
no options for weights and seed, so the launcher sets both.

`--clock cpu` times steps by the CPU time of the training process, for machines with other load. Loader workers and
waiting threads then do not count, in the peer's favour. With one thread (`--threads 1`) and no workers it is the time
that an idle machine would take.

The part for GPUs (CUDA events, torch's synchronisation warnings, true sizes) has not been run yet.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.assets import SIZES, Size, make_images, make_pipeline  # noqa: E402
from benchmarks.printing import print_machine, print_table  # noqa: E402
from benchmarks.turns import PHASES, STARTING, Turns, ratio, steps_to_pay  # noqa: E402

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets")
VALIDATION_IMAGES = 16
CHECK_STEPS = 50
GPU_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "A10G": 125}
"""Peak TFLOP/s of dense bf16 with fp32 accumulation, from data sheets, by a part of the GPU's name."""


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        kind: kind of pipeline.
        script, peer: our script and that of diffusers.
        ours, theirs: flags of each side.
        is_adapter: whether the result is a LoRA file.
        averages: whether both sides keep an EMA.
        rate: the learning rate.
    """

    kind: str
    script: str
    peer: str
    ours: str = ""
    theirs: str = ""
    is_adapter: bool = False
    averages: bool = True
    rate: float = 1e-4


LORA = {
    "ours": "--adaptation lora --rank 16",
    "theirs": "--rank 16",
    "is_adapter": True,
    "averages": False,
    "rate": 1e-3,
}
CASES = {
    "sd": Case("sd", "train_text_to_image.py", "train_text_to_image.py"),
    "sdxl": Case("sdxl", "train_text_to_image.py", "train_text_to_image_sdxl.py"),
    "lora": Case("sd", "train_text_to_image.py", "train_text_to_image_lora.py", **LORA),
    "sdxl-lora": Case("sdxl", "train_text_to_image.py", "train_text_to_image_lora_sdxl.py", **LORA),
    "unconditional": Case(
        "unconditional",
        "train_unconditional.py",
        "train_unconditional.py",
        "--eval_batch_size 1 --num_inference_steps 2 --save_images_epochs 1000000",
        "--eval_batch_size 1 --ddpm_num_inference_steps 2 --num_epochs 1",
    ),
}


@dataclass(frozen=True)
class Optimisation:
    """An optimisation of our side: flags that switch it on and off; skipped if the script lacks the first flag.

    Attributes:
        devices: devices on which it is part of the fast path by default.
        needs: what the case needs: "text" for pipelines with text, "average" for an EMA, "adapter" for LoRA, "bf16".
    """

    on: str
    off: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: str = ""

    def is_for(self, case: Case, precision: str, offered: str) -> bool:
        """Whether a case can use it, and the script's --help lists it."""
        has = {"": True, "text": case.kind != "unconditional", "average": case.averages, "adapter": case.is_adapter}
        has["bf16"] = precision == "bf16"
        return has[self.needs] and f"{self.on.split()[0]} " in offered.replace(",", " ").replace("\n", " ")


OPTIMISATIONS = {
    "cache": Optimisation("--cache_latents --cache_text_embeddings", needs="text"),
    "workers": Optimisation("--dataloader_num_workers 8", "--dataloader_num_workers 0", ("cuda",)),
    "fused_adamw": Optimisation("--fused_adamw true", "--fused_adamw false"),
    "foreach_ema": Optimisation("--foreach_ema", "--no_foreach_ema", needs="average"),
    "fused_lora": Optimisation("--fused_lora", "--no_fused_lora", needs="adapter"),
    "logging_steps": Optimisation("--logging_steps 10", "--logging_steps 1"),
    "tf32": Optimisation("--allow_tf32 true", "--allow_tf32 false", ("cuda",)),
    "kept_memory": Optimisation("--keep_freed_memory true", "--keep_freed_memory false", ("cpu",)),
    "bf16_weights": Optimisation("--bf16_weights", devices=("cuda",), needs="bf16"),
    "channels_last": Optimisation("--channels_last", devices=("cuda",)),
    "compile": Optimisation("--compile denoiser", devices=("cuda",)),
    "cuda_graphs": Optimisation("--cuda_graphs", devices=()),  # with compile, by name: for small batches
}
"""Optimisations in the order in which --ablate adds them; add a line here for a new one."""


@dataclass(frozen=True)
class Contest:
    """One call of this benchmark.

    Attributes:
        case_name, case, size: what it trains.
        precision: fp32 or bf16.
        steps: steps of a timed turn; the first `warm_up` don't count.
        peer_path: folder with packages that only the peer needs.
    """

    case_name: str
    case: Case
    size: Size
    size_name: str
    precision: str
    steps: int
    warm_up: int
    check_steps: int
    rounds: int
    folder: Path
    threads: int | None
    clock: str
    peer_script: Path | None
    peer_path: Path | None

    @property
    def pipeline(self) -> Path:
        """Returns the folder of the initial weights."""
        return self.folder / f"{self.case.kind}-{self.size_name}"

    @property
    def images(self) -> Path:
        """Returns the folder of training images; a timed turn is one epoch."""
        return self.folder / f"images-{self.size.resolution}-{self.steps * self.size.batch}"

    @property
    def validation(self) -> Path:
        """Returns the folder of images that no side trains on."""
        return self.folder / f"validation-{self.size.resolution}"

    def make_assets(self) -> None:
        """Writes the weights and images that do not exist yet."""
        make_pipeline(self.case.kind, self.size_name, self.pipeline)
        make_images(self.images, self.steps * self.size.batch, self.size.resolution)
        make_images(self.validation, VALIDATION_IMAGES, self.size.resolution, seed=1)

    @property
    def shared_flags(self) -> list[str]:
        """Returns the flags of both sides."""
        flags = ["--train_data_dir", self.images, "--resolution", self.size.resolution, "--center_crop"]
        flags += ["--learning_rate", self.case.rate, "--lr_scheduler", "constant", "--lr_warmup_steps", 0]
        flags += ["--checkpointing_steps", 10**6, "--mixed_precision", "no" if self.precision == "fp32" else "bf16"]
        return [str(flag) for flag in flags] + ["--use_ema"] * self.case.averages


@dataclass(frozen=True)
class Side:
    """A contestant: a script and its flags; `changes` are those in which it differs from others."""

    name: str
    script: Path
    flags: Sequence[str]
    changes: Sequence[str]
    is_peer: bool = False


def our_side(contest: Contest, name: str, changes: Sequence[str], steps: int, micro_batches: int = 1) -> Side:
    """Our script."""
    flags = [*contest.shared_flags, "--pretrained_model_name_or_path", str(contest.pipeline), "--seed", "0"]
    flags += ["--train_batch_size", str(contest.size.batch // micro_batches)]
    flags += ["--gradient_accumulation_steps", str(micro_batches), "--max_train_steps", str(steps)]
    flags += ["--no_final_checkpoint", "--no_report", "--no_verdict", *contest.case.ours.split()]
    return Side(name, ROOT / contest.case.script, [*flags, *changes], changes)


def peer_side(contest: Contest, name: str, changes: Sequence[str]) -> Side:
    """Returns the peer's side."""
    flags = [*contest.shared_flags, "--train_batch_size", str(contest.size.batch), *contest.case.theirs.split()]
    if contest.case.kind == "unconditional":
        flags += ["--model_config_name_or_path", str(contest.pipeline / "unet")]
    else:
        flags += ["--pretrained_model_name_or_path", str(contest.pipeline), "--seed", "0"]
        flags += ["--max_train_steps", str(contest.steps)]
    return Side(name, contest.peer_script, [*flags, *changes], changes, is_peer=True)


def tuned_flags(script: str, cores: int) -> list[str]:
    """Returns the flags that make the peer faster, as far as its script has them."""
    flags = ["--dataloader_num_workers", str(min(8, cores))]
    return flags + ["--foreach_ema"] * ('"--foreach_ema"' in script and '"--use_ema"' in script)


# Turns


class ChildError(Exception):
    """A child process failed; the message is the end of its output."""


def run_child(command: Sequence[object], log: Path, home: Path, threads: int | None) -> None:
    """Runs a process and writes its output to a file.

    Raises:
        ChildError: if its exit status is not 0.
    """
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(home / "inductor")
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with log.open("w", encoding="utf-8") as output:
        words = [str(word) for word in command]
        done = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise ChildError(f"exit status {done.returncode}, see {log}: {lines[-1] if lines else 'it said nothing'}")


def take_turn(contest: Contest, side: Side, place: Path, *launcher_flags: str) -> dict[str, Any]:
    """Runs a side in a new process with empty caches; returns its record. The result is in `place`/out."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    command = [sys.executable, Path(__file__).with_name("launch.py"), "--record", place, "--clock", contest.clock]
    command += ["--began", time.time(), *launcher_flags]
    if side.is_peer and contest.peer_path is not None:
        command += ["--peer_path", contest.peer_path]
    if side.is_peer and contest.case.kind == "unconditional":
        command += ["--weights", contest.pipeline / "unet"]
    command += [side.script, *side.flags, "--output_dir", place / "out"]
    run_child(command, place / "log", place / "home", contest.threads)
    shutil.rmtree(place / "home", ignore_errors=True)
    return json.loads((place / "record.json").read_text(encoding="utf-8"))


def take_turns(contest: Contest, sides: Sequence[Side]) -> dict[str, Turns]:
    """Runs the turns of each side, round by round, in changing order; keeps only the last round's results."""
    records: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for number in range(contest.rounds):
        first = number % len(sides)
        for side in [*sides[first:], *sides[:first]]:
            place = contest.folder / "turns" / side.name.replace(" ", "_")
            say(f"round {number + 1} of {contest.rounds}: {side.name}")
            record = take_turn(contest, side, place)
            if len(record["steps"]) != contest.steps:
                refuse(f"{side.name} took {len(record['steps'])} optimizer steps, not {contest.steps}")
            records[side.name].append(record)
    return {name: Turns(each, contest.warm_up, contest.size.batch) for name, each in records.items()}


def that_fits(contest: Contest, side: Side) -> Side:
    """Returns the side, with gradient checkpointing if the GPU is too small without it."""
    if not has_gpu():
        return side
    place, has_length = contest.folder / "turns" / "fits", contest.case.kind != "unconditional"
    trial = replace(side, flags=[*side.flags, *(["--max_train_steps", "3"] if has_length else [])])
    try:
        take_turn(contest, trial, place)
    except ChildError as error:
        if "out of memory" not in (place / "log").read_text(encoding="utf-8", errors="replace"):
            raise error
        more = "--gradient_checkpointing"
        return replace(side, flags=[*side.flags, more], changes=[*side.changes, more])
    return side


# Gates


def check(contest: Contest, plain: Sequence[str], fast: Sequence[str]) -> list[Any]:
    """Returns the gates' verdicts on a fast path, from four runs, and one more each for LoRA and bfloat16."""
    from safetensors.torch import load_file

    from benchmarks.gates import export_loads, gradients_agree, losses_agree, tensors_of, updates_agree

    folder, steps = contest.folder / "checks", contest.check_steps
    sides = {
        "plain": our_side(contest, "plain", plain, steps),
        "varied": our_side(contest, "varied", plain, steps, micro_batches=2),
        "fast": our_side(contest, "fast", fast, steps),
    }
    if contest.precision == "bf16":
        sides["exact"] = our_side(contest, "exact", [*plain, "--mixed_precision", "no", "--allow_tf32", "false"], 1)
    if contest.case.is_adapter:  # the script initialises the adapter's weights
        sides["start"] = our_side(contest, "start", [*plain, "--learning_rate", "1e-30"], 1)
    records = {}
    for name, side in sides.items():
        say(f"gates: {name}")
        records[name] = take_turn(contest, side, folder / name, "--keep_gradients")
    gradients = {
        name: load_file(folder / name / "gradients.safetensors") for name in ("fast", "plain", "exact") if name in sides
    }
    results = {name: tensors_of(str(folder / name / "out"), contest.case.is_adapter) for name in sides}
    start = results.get("start") or tensors_of(str(contest.pipeline), is_adapter=False)
    losses = [records[name]["losses"] for name in ("fast", "plain", "varied")]
    found = evaluate(contest, [folder / "fast" / "out"])
    return [
        gradients_agree(gradients["fast"], gradients["plain"], contest.precision, gradients.get("exact")),
        losses_agree(*losses, contest.precision),
        updates_agree(start, results["fast"], results["plain"], results["varied"]),
        export_loads(found["exports"][str(folder / "fast" / "out")], found["alone"]),
    ]


def evaluate(contest: Contest, exports: Sequence[Path]) -> dict[str, Any]:
    """Runs benchmarks/evaluate.py on some results, in a process without our code; returns its findings."""
    out = contest.folder / "evaluated.json"
    command = [sys.executable, "-I", Path(__file__).with_name("evaluate.py"), "--base", contest.pipeline, "--out", out]
    command += ["--images", contest.validation, "--resolution", contest.size.resolution, *exports]
    run_child(command, contest.folder / "evaluate.log", contest.folder / "home", contest.threads)
    return json.loads(out.read_text(encoding="utf-8"))


def gates_hold(contest: Contest, plain: Sequence[str], fast: Sequence[str]) -> bool:
    """Prints the verdicts on a fast path and which gates failed; returns whether all hold."""
    verdicts = check(contest, plain, fast)
    title = f"Gates: `{' '.join(fast) or 'no flags'}` against `{' '.join(plain) or 'no flags'}`"
    print_table(title, ["gate", "holds", "found"], [[each.name, yes(each.holds), each.says] for each in verdicts])
    failed = [each.name for each in verdicts if not each.holds]
    if failed:
        print(f"\nno speed is printed: {'; '.join(failed)}", flush=True)
    return not failed


def yes(holds: bool) -> str:
    """A cell."""
    return "yes" if holds else "NO"


# Printing


def print_speeds(contest: Contest, sides: Sequence[Side], turns: Mapping[str, Turns], peak: float | None) -> None:
    """Prints the main table and its notes."""
    flops = evaluate(contest, [result_of(contest, sides[0])])["flops"]
    unit = "MB" if not has_gpu() else "GB"
    head = ["", "images/s: median (p10 to p90)", "ours is faster by (95 % of resamplings)", f"memory, {unit}"]
    head += [
        "waiting for data",
        "host ms per step",
        "synchronising calls per step",
        "outside forward, backward, optimizer, EMA",
    ]
    head += ["model FLOP utilisation"] if peak else []
    rows = []
    for side in sides:
        each = turns[side.name]
        median, low, high = each.images_per_second
        faster = "" if side is sides[0] else str(ratio(turns[sides[0].name].seconds_by_turn, each.seconds_by_turn))
        memory = each.memory / (1e6 if unit == "MB" else 1e9)
        cells = [
            f"{side.name}: `{' '.join(side.changes) or 'no more flags'}`",
            f"{median:.4g} ({low:.4g} to {high:.4g})",
        ]
        cells += [faster, f"{memory:.4g}", f"{each.share(each.phase_seconds('data')):.1%}"]
        cells += [f"{each.host_seconds * 1e3:.3g}", f"{each.synchronising:.3g}"]
        cells += [f"{each.share(each.outside_seconds):.1%}"]
        cells += [f"{median * flops / (peak * 1e12):.1%}"] if peak else []
        rows.append(cells)
    size = contest.size
    print_table(
        f"{contest.case_name}, {contest.size_name}: {size.resolution} px, batch {size.batch}, {contest.precision}; "
        f"{contest.rounds} rounds of {contest.steps} steps, {contest.warm_up} don't count; {contest.clock} clock",
        head,
        rows,
    )
    print(f"\nThe denoiser's forward and backward pass take {flops / 1e9:.4g} GFLOPs per image.", end=" ")
    print(
        ""
        if peak
        else "Utilisation is not computed: the peak rate of this device and precision is unknown (--peak_tflops)."
    )
    for side in sides:
        sites = {name: count for record in turns[side.name].records for name, count in record["sites"].items()}
        print(f"Synchronising calls of {side.name}: {', '.join(sites) or 'none'}.")


def print_phases(sides: Sequence[Side], turns: Mapping[str, Turns]) -> None:
    """Prints the milliseconds of a step by phase."""
    rows = []
    for side in sides:
        each = turns[side.name]
        spent = [each.phase_seconds(phase) for phase in PHASES]
        rest = each.outside_seconds - spent[0] - spent[1]
        rows.append([side.name, *(f"{1e3 * seconds:.3g}" for seconds in (*spent, rest))])
    print_table("Mean milliseconds per step, by the host's clock", ["", *PHASES, "the rest"], rows)


def print_starts(sides: Sequence[Side], turns: Mapping[str, Turns]) -> None:
    """Prints the seconds from the command to the end of the first step, by part, and when ours has caught up."""
    rows = []
    for side in sides:
        each = turns[side.name]
        parts = [each.start_seconds("main"), *(each.start_seconds(part) for part in STARTING)]
        total = each.start_seconds()
        paid = "" if side is sides[0] else f"{steps_to_pay(turns[sides[0].name], each):.0f}"
        rows.append([side.name, f"{total:.3g}", *(f"{part:.3g}" for part in (*parts, total - sum(parts))), paid])
    head = [
        "",
        "to the end of the first step",
        "of it to main's begin",
        "importing after it",
        "loading weights",
        "listing data",
    ]
    head += ["filling caches", "compiling", "the rest, with the first step", "ours has caught up at step"]
    print_table("Start: median seconds by the wall clock", head, rows)


def print_losses(contest: Contest, sides: Sequence[Side]) -> None:
    """Prints the loss of each result on the same images and noise."""
    results = {"before": contest.pipeline} | {side.name: result_of(contest, side) for side in sides}
    found = evaluate(contest, list(results.values()))["exports"]
    rows = []
    for name, export in results.items():
        each = found[str(export)]
        rows.append([name, each.get("why") or f"{each['loss']:.4f} ± {each['error']:.4f}", yes(each["draws"])])
    title = (
        f"Loss after {contest.steps} steps on {VALIDATION_IMAGES} other images, by plain diffusers (± standard error)"
    )
    print_table(title, ["", "loss", "draws"], rows)


def result_of(contest: Contest, side: Side) -> Path:
    """Returns the folder of a side's last result."""
    return contest.folder / "turns" / side.name.replace(" ", "_") / "out"


def print_ablation(contest: Contest, sides: Sequence[Side], turns: Mapping[str, Turns]) -> None:
    """Prints what each optimisation adds to those before it."""
    rows, before = [], sides[0]
    for side in sides:
        each = turns[side.name]
        median, low, high = each.images_per_second
        cells = [side.name, f"{median:.4g} ({low:.4g} to {high:.4g})"]
        for other in (before, sides[0]):
            cells.append(
                "" if side is sides[0] else str(ratio(each.seconds_by_turn, turns[other.name].seconds_by_turn))
            )
        rows.append([*cells, f"{each.memory / 1e6:.5g}", f"{each.start_seconds():.3g}"])
        before = side
    head = ["", "images/s: median (p10 to p90)", "times as fast as the row before", "as the first row"]
    print_table("One by one", [*head, "memory, MB", "seconds to the first step's end"], rows)


def print_profile(contest: Contest, fast: Sequence[str]) -> None:
    """Prints the functions that take most of the time of our steps."""
    import pstats

    side = our_side(contest, "profile", fast, contest.steps)
    take_turn(contest, side, contest.folder / "profile", "--profile_steps", str(contest.steps))
    print(f"\nProfile of {contest.steps - 1} steps of ours, which slows Python's part\n", flush=True)
    pstats.Stats(str(contest.folder / "profile" / "profile")).strip_dirs().sort_stats("tottime").print_stats(30)


# The command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--case", choices=CASES, required=True)
    add(
        "--size",
        choices=("tiny", "small", "true"),
        default="small",
        help="size of the models; true needs a GPU (default: small)",
    )
    add("--peer_script", type=Path, help="diffusers' script for the case; without it only ours runs")
    add("--peer_path", type=Path, help="folder of packages that only the peer needs, such as torchvision")
    add("--peer_commit", default="not given", help="version of the peer to print, besides the git id of its file")
    add(
        "--folder",
        type=Path,
        default=Path("train-benchmark"),
        help="folder for weights, images and results (default: train-benchmark)",
    )
    add("--batch", type=int, help="samples per step, an even number; by default that of the size")
    add("--rounds", type=int, default=3, help="turns per side (default: 3)")
    add("--steps", type=int, default=60, help="steps per turn (default: 60)")
    add("--warm_up", type=int, default=10, help="first steps of a turn that don't count (default: 10)")
    add(
        "--check_steps", type=int, default=CHECK_STEPS, help=f"steps of the runs for the gates (default: {CHECK_STEPS})"
    )
    add("--precision", choices=("fp32", "bf16"), help="precision of both sides; by default bf16 on a GPU, else fp32")
    add("--threads", type=int, help="torch threads per process; by default torch's choice")
    add("--clock", choices=("wall", "cpu"), default="wall", help="clock for timing steps (default: wall)")
    add(
        "--optimisations",
        nargs="*",
        choices=OPTIMISATIONS,
        help="optimisations of the fast path; by default those for the device",
    )
    add("--ablate", action="store_true", help="compare our optimisations one by one, instead of the peer")
    add("--profile", action="store_true", help="also print a profile of our steps")
    add("--peak_tflops", type=float, help="peak TFLOP/s of the device in this precision, for the utilisation")
    return parser.parse_args(argv)


def refuse(message: str) -> NoReturn:
    """Exits with an error message and status 2."""
    from utils.config.options import UserError

    raise UserError(message)


def say(text: str) -> None:
    """Prints progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def has_gpu() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def contest_of(args: argparse.Namespace) -> Contest:
    """Returns the contest that the options describe.

    Raises:
        SystemExit: if the options are invalid.
    """
    case, size = CASES[args.case], SIZES[CASES[args.case].kind][args.size]
    if not size.on_cpu and not has_gpu():
        refuse(f"--size must be tiny or small without a GPU, got {args.size}; run it on a machine with CUDA")
    if args.clock == "cpu" and has_gpu():
        refuse("--clock must be wall on a GPU, got cpu; remove it")
    batch = size.batch if args.batch is None else args.batch
    if batch < 2 or batch % 2:
        refuse(f"--batch must be even because a gate halves it, got {batch}; try {max(2, batch + 1)}")
    for name, least in (("rounds", 1), ("warm_up", 1), ("check_steps", 2), ("steps", args.warm_up + 2)):
        if getattr(args, name) < least:
            refuse(f"--{name} must be at least {least}, got {getattr(args, name)}; try {least}")
    if args.peer_script is not None:
        check_peer(args.peer_script, args.case)
    return Contest(
        case_name=args.case,
        case=case,
        size=replace(size, batch=batch),
        size_name=args.size,
        precision=args.precision or ("bf16" if has_gpu() else "fp32"),
        steps=args.steps,
        warm_up=args.warm_up,
        check_steps=args.check_steps,
        rounds=args.rounds,
        folder=args.folder.resolve(),
        threads=args.threads,
        clock=args.clock,
        peer_script=args.peer_script,
        peer_path=args.peer_path,
    )


def check_peer(script: Path, case: str) -> None:
    """Checks that the script is the one of the case."""
    if not script.is_file():
        refuse(f"--peer_script must be a file, got {script}; download it from diffusers' examples")
    if script.name != CASES[case].peer:
        fitting = next((name for name, each in CASES.items() if each.peer == script.name), None)
        cure = f"try --case {fitting}" if fitting else f"it is recognised by its name: {CASES[case].peer}"
        refuse(f"--peer_script must be {CASES[case].peer} for --case {case}, got {script.name}; {cure}")


def possible_optimisations(contest: Contest) -> dict[str, Optimisation]:
    """Returns the optimisations that the script has and the case can use."""
    words = [sys.executable, str(ROOT / contest.case.script), "--help"]
    offered = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return {name: each for name, each in OPTIMISATIONS.items() if each.is_for(contest.case, contest.precision, offered)}


def chosen_optimisations(
    contest: Contest, possible: Mapping[str, Optimisation], names: Sequence[str] | None
) -> list[str]:
    """Returns the optimisations of the fast path, by device or by name."""
    if names is None:
        device = "cuda" if has_gpu() else "cpu"
        return [name for name, each in possible.items() if device in each.devices]
    missing = next((name for name in names if name not in possible), None)
    if missing is not None:
        refuse(f"--optimisations {missing} does not fit --case {contest.case_name}; choose from {', '.join(possible)}")
    return [name for name in possible if name in names]


def flags_with(possible: Mapping[str, Optimisation], on: Container[str]) -> list[str]:
    """Returns the flags that switch some optimisations on and the others off."""
    return [flag for name, each in possible.items() for flag in (each.on if name in on else each.off).split()]


def sides_of(contest: Contest, fast: Sequence[str]) -> Iterator[Side]:
    """Yields our side, and the peer's twice."""
    yield our_side(contest, "ours", fast, contest.steps)
    if contest.peer_script is not None:
        text = contest.peer_script.read_text(encoding="utf-8")
        tuned = tuned_flags(text, os.cpu_count() or 1)
        yield that_fits(contest, peer_side(contest, "peer, tuned", tuned))
        yield that_fits(contest, peer_side(contest, "peer, default flags", []))


def describe(contest: Contest, args: argparse.Namespace) -> None:
    """Prints machine, versions, peer and command."""
    print_machine(PACKAGES)
    if has_gpu():
        import torch

        print(torch.cuda.get_device_name())
    if contest.peer_script is not None:
        content = contest.peer_script.read_bytes()
        identity = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        print(
            f"Peer: {contest.peer_script.name} of diffusers, commit {args.peer_commit}, git's id of the file {identity}"
        )


def run(args: argparse.Namespace) -> int:
    """Runs gates and turns, and prints the results; returns the exit status."""
    contest = contest_of(args)
    contest.make_assets()
    describe(contest, args)
    possible = possible_optimisations(contest)
    chosen = chosen_optimisations(contest, possible, args.optimisations)
    plain, fast = flags_with(possible, ()), flags_with(possible, chosen)
    if not gates_hold(contest, plain, fast):
        return 1
    if args.ablate:
        ablated = [our_side(contest, "all off", plain, contest.steps)]
        for number, name in enumerate(chosen, start=1):
            flags = flags_with(possible, chosen[:number])
            ablated.append(our_side(contest, f"and {name}", flags, contest.steps))
        print_ablation(contest, ablated, take_turns(contest, ablated))
        return 0
    sides = list(sides_of(contest, fast))
    turns = take_turns(contest, sides)
    print_speeds(contest, sides, turns, args.peak_tflops or known_peak(contest.precision))
    print_phases(sides, turns)
    print_starts(sides, turns)
    print_losses(contest, sides)
    if args.profile:
        print_profile(contest, fast)
    return 0


def known_peak(precision: str) -> float | None:
    """Returns the peak TFLOP/s of the GPU in bf16; None if unknown."""
    import torch

    if precision != "bf16" or not has_gpu():
        return None
    name = torch.cuda.get_device_name()
    return next((rate for part, rate in GPU_TFLOPS.items() if part in name), None)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status: 1 if a gate fails, 2 if it can't run."""
    args = parse_arguments(argv)
    from utils.config.options import UserError

    try:
        return run(args)
    except (UserError, ChildError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
