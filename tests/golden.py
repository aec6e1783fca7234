"""Golden runs: losses and exported weights of small runs, compared bit for bit with those of an earlier commit.

python tests/golden.py [--base c0d6448] [--only NAME ...]   compares this tree with the base; exits with 1 if it differs
python tests/golden.py --record COMMIT                      writes that commit's record into tests/golden/

Bits depend on the processor and on torch, so a record names both. Where the base's record is from another machine, the
base is checked out into a temporary folder and run here. Pipelines and images are made once and shared by both.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "tests" / "golden"
BASE = "c0d6448"  # before the first change that was compared
WORKER = "--worker"
EXPLAINED = {  # differences that were meant, and what was compared to know it
    "pure bf16: unet/diffusion_pytorch_model.safetensors differs": (
        "since 7cf1160 the result is written in float32; its values are those of the base in bfloat16"
    ),
}
PLAIN_LOOP = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

TEXT, UNCONDITIONAL = "train_text_to_image", "train_unconditional"
LORA = ("--adaptation", "lora", "--rank", 2)
BUCKETS = ("--use_aspect_ratio_buckets", "--bucket_step", 8, "--min_bucket_size", 16)
CACHE = ("--cache_latents", "--cache_text_embeddings", "--cache_variants", 2, "--random_flip")
UNET = ("--model_size", "tiny", "--model_channels", 8, "--channel_mult", 1, 2, "--attention_resolutions", 16)
CLASSES = (*UNET, "--class_conditional", "--guidance_scale", 2, "--train_data_dir", "classes")

# name: (script, flags); a word that names an asset (sd, sdxl, images, ...) stands for its path
RUNS: dict[str, tuple[str, tuple[object, ...]]] = {
    "full with EMA": (TEXT, ("--pretrained_model", "sd", "--use_ema", "--snr_gamma", 5)),
    "full with text encoder, workers": (
        *(TEXT, ("--pretrained_model", "sd", "--train_text_encoder", "--dataloader_num_workers", 2)),
    ),
    "LoRA with text encoders": (
        TEXT,
        ("--pretrained_model", "sd", *LORA, "--train_text_encoder", "--lora_dropout", 0.2),
    ),
    "SDXL": (TEXT, ("--pretrained_model", "sdxl", "--gradient_accumulation_steps", 2, "--caption_dropout", 0.4)),
    "SDXL LoRA, cached": (TEXT, ("--pretrained_model", "sdxl", *LORA, *CACHE)),
    "DoRA": (TEXT, ("--pretrained_model", "sd", *LORA, "--use_dora")),
    "cached buckets": (TEXT, ("--pretrained_model", "sd", *CACHE, *BUCKETS)),
    "EMA lengths": (TEXT, ("--pretrained_model", "sd", "--ema_lengths", 0.1, "--ema_snapshot_steps", 2)),
    "pure bf16": (TEXT, ("--pretrained_model", "sd", "--pure_bf16", "--mixed_precision", "bf16")),
    "two processes": (TEXT, ("--pretrained_model", "sd", *LORA)),
    "resumed": (TEXT, ("--pretrained_model", "sd", "--use_ema", *LORA)),
    "masks with a loss term": (
        TEXT,
        (
            *("--pretrained_model", "sd", "--train_data_dir", "masked", "--alpha_mask", "--unmasked_weight", 0.1),
            *("--loss_module", "adversarial_loss.py"),
        ),
    ),
    "v-prediction, cut at random, tags": (
        TEXT,
        (
            *("--pretrained_model", "sd2", "--random_rotation", 10, "--color_jitter", 0.2, "--random_flip"),
            *("--shuffle_tags", "--tag_separator", " ", "--noise_offset", 0.1, "--input_perturbation", 0.1),
        ),
    ),
    "pixels": (UNCONDITIONAL, (*UNET, "--use_ema")),
    "pixels of classes": (UNCONDITIONAL, CLASSES),
    "flow in latents": (UNCONDITIONAL, (*UNET, "--vae", "vae", "--flow_matching")),
    "fine-tuned DDPM": (UNCONDITIONAL, ("--pretrained_model", "ddpm", "--resolution", 16)),
}
STEPS = 4


def make_assets(folder: Path) -> dict[str, Path]:
    """Tiny pipelines and folders of images, by the names that stand for them in `RUNS`."""
    import numpy as np
    from PIL import Image

    from tests import tiny

    images = tiny.make_images(folder / "images")
    masked = folder / "masked"
    masked.mkdir()
    for number, path in enumerate(sorted(images.glob("*.png"))):
        image = Image.open(path).convert("RGBA")
        alpha = np.zeros(image.size[::-1], np.uint8)
        alpha[8 : 24 + number, 4:30] = 255
        image.putalpha(Image.fromarray(alpha))
        image.save(masked / path.name)
        (masked / f"{path.stem}.txt").write_text(f"picture {number}", encoding="utf-8")
    return {
        "sd": tiny.make_sd(folder / "sd"),
        "sd2": tiny.make_sd(folder / "sd2", "v_prediction"),
        "sdxl": tiny.make_sdxl(folder / "sdxl"),
        "vae": tiny.make_vae(folder / "vae"),
        "ddpm": tiny.unconditional(folder / "ddpm"),
        "images": images,
        "masked": masked,
        "classes": tiny.make_classes(images, folder / "classes"),
    }


def flags_of(name: str, assets: dict[str, str], root: Path, out: Path) -> list[str]:
    """The command line of a run, but for how long it trains."""
    script, flags = RUNS[name]
    known = assets | {"adversarial_loss.py": str(root / "examples" / "adversarial_loss.py")}
    shared = {"--train_data_dir": "images", "--resolution": 32}
    before = [word for flag, value in shared.items() if flag not in flags for word in (flag, value)]
    after = ["--output_dir", out, "--lr_warmup_steps", 0, "--report_to", "none", "--checkpointing_steps", 2]
    after += ["--train_batch_size", 2, "--learning_rate", "1e-3", "--logging_steps", 1]
    if script == UNCONDITIONAL:
        after += ["--eval_batch_size", 2, "--num_inference_steps", 2]
    return [known.get(str(word), str(word)) for word in (*before, *flags, *after)]


def run(name: str, assets: dict[str, str], root: Path, out: Path) -> None:
    """Trains one run by the scripts of `root`, in this process or in two.

    Raises:
        RuntimeError: if it fails.
    """
    script, command = RUNS[name][0], flags_of(name, assets, root, out)
    command += ["--max_train_steps", str(STEPS)]
    if name == "two processes":
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(root / f"{script}.py")]
        statuses = [subprocess.run([*launch, *command], cwd=root, check=False).returncode]
    elif name == "resumed":
        first = main_of(script)([*command, "--max_train_steps", str(STEPS // 2)])
        statuses = [first, main_of(script)([*command, "--resume_from_checkpoint", "latest"])]
        if any(out.glob("abandoned-*")):
            raise RuntimeError(f"{name} started anew")
    else:
        statuses = [main_of(script)(command)]
    if any(statuses):
        raise RuntimeError(f"{name} ended with {statuses}")


def main_of(script: str) -> Callable[[Sequence[str]], int]:
    """A script's main, with what an earlier run in this process left behind forgotten."""
    from tests.conftest import reset_accelerate

    reset_accelerate()
    return importlib.import_module(script).main


def digest(file: Path) -> str:
    """SHA-256 of a file's tensors: of their types, shapes and bytes, whatever they are called."""
    import torch
    from safetensors.torch import load_file

    each = []
    for tensor in load_file(file).values():
        content = tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)
        each.append(
            hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + content.numpy().tobytes()).digest()
        )
    return hashlib.sha256(b"".join(sorted(each))).hexdigest()


def outcome(out: Path) -> dict[str, object]:
    """The losses of a finished run, as written, and the digest of each exported file of tensors."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    files = [file for file in sorted(out.rglob("*.safetensors")) if "checkpoint" not in file.relative_to(out).parts[0]]
    losses = {str(line["step"]): line["train_loss"] for line in lines if "train_loss" in line}
    return {"losses": losses, "weights": {str(file.relative_to(out)): digest(file) for file in files}}


def work(root: Path, folder: Path, assets: dict[str, str], names: Sequence[str]) -> dict[str, object]:
    """The outcome of each run by the scripts in `root`."""
    found = {}
    for name in names:
        out = folder / name.replace(" ", "-").replace(",", "")
        run(name, assets, root, out)
        found[name] = outcome(out)
    return found


def facts() -> dict[str, str]:
    """What bits depend on besides the code."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    packages = ("torch", "diffusers", "transformers", "peft", "numpy", "pillow")
    return {name: version(name) for name in packages} | {"processor": processor or platform.processor()}


def outcomes(root: Path, assets: Path, names: Sequence[str]) -> dict[str, object]:
    """Runs all in a process whose modules are those of `root`."""
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(ROOT / "tests" / "golden.py"), WORKER, str(root), str(assets), folder, *names]
        environment = os.environ | PLAIN_LOOP | {"HF_HOME": folder, "HF_DATASETS_CACHE": str(Path(folder) / "datasets")}
        log = Path(folder) / "log"
        with log.open("w", encoding="utf-8") as output:
            ended = subprocess.run(command, env=environment, stdout=output, stderr=output, check=False, cwd=folder)
        if ended.returncode:
            raise SystemExit(
                f"the golden runs of {root} failed:\n" + log.read_text(encoding="utf-8", errors="replace")[-5000:]
            )
        return json.loads(result.read_text(encoding="utf-8"))


def worker(root: Path, assets: Path, folder: Path, names: Sequence[str]) -> None:
    """What the process of `outcomes` does. Only here is `root` imported from."""
    sys.path.insert(0, str(root))
    import torch

    torch.set_num_threads(1)
    paths = {path.name: str(path) for path in assets.iterdir()}
    found = work(root, folder, paths, names)
    (folder / "result.json").write_text(json.dumps(found), encoding="utf-8")


@contextlib.contextmanager
def checked_out(commit: str):
    """A commit's files in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="golden-base-") as folder:
        tree = subprocess.run(["git", "-C", ROOT, "archive", commit], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=tree, check=True)
        yield Path(folder)


def recorded(commit: str, assets: Path, names: Sequence[str]) -> dict[str, object]:
    """The outcomes of a commit: its record's, if that is from a machine like this one, else run anew."""
    file = RECORDS / f"{commit}.json"
    if file.exists():
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["facts"] == facts() and all(name in record["runs"] for name in names):
            print(f"compared with the record of {commit}")
            return record["runs"]
    print(f"no record of {commit} is from a machine and packages like these: it is run here")
    with checked_out(commit) as root:
        return outcomes(root, assets, names)


def differences(name: str, before: dict, after: dict) -> list[str]:
    """What differs between two outcomes of a run, a line each."""
    lines = []
    if before["losses"] != after["losses"]:
        steps = [step for step in before["losses"] if before["losses"][step] != after["losses"].get(step)]
        lines.append(f"{name}: losses differ at steps {', '.join(steps) or 'beyond those of the base'}")
    for file in sorted(before["weights"].keys() | after["weights"].keys()):
        if before["weights"].get(file) != after["weights"].get(file):
            there = [label for label, side in (("base", before), ("here", after)) if file in side["weights"]]
            lines.append(f"{name}: {file} " + ("differs" if len(there) == 2 else f"is only in the {there[0]}"))
    return lines


def main() -> int:
    """Compares or records; returns 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=BASE, help="commit to compare with (default: %(default)s)")
    parser.add_argument(
        "--record", metavar="COMMIT", help="write the outcomes of this commit to tests/golden/COMMIT.json"
    )
    parser.add_argument(
        "--only", nargs="+", default=list(RUNS), choices=list(RUNS), metavar="NAME", help="run only these"
    )
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(prefix="golden-assets-") as folder:
        make_assets(Path(folder))
        if options.record:
            with checked_out(options.record) as root:
                runs = outcomes(root, Path(folder), options.only)
            RECORDS.mkdir(exist_ok=True)
            content = json.dumps({"facts": facts(), "runs": runs}, indent=1) + "\n"
            (RECORDS / f"{options.record}.json").write_text(content, encoding="utf-8")
            return 0
        before = recorded(options.base, Path(folder), options.only)
        after = outcomes(ROOT, Path(folder), options.only)
    found = [line for name in options.only for line in differences(name, before[name], after[name])]
    meant = EXPLAINED if options.base == BASE else {}
    for line in found:
        print(f"{line}: {meant[line]}" if line in meant else line)
    wrong = [line for line in found if line not in meant]
    if not wrong:
        print(f"{len(options.only)} golden runs: bit for bit those of {options.base}")
    return bool(wrong)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        worker(*(Path(word) for word in sys.argv[2:5]), sys.argv[5:])
    else:
        sys.exit(main())
