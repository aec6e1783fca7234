"""Short runs of every script, which need nothing but what requirements.txt names: do these versions train?"""

import importlib
import os
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TEXT, UNCONDITIONAL, EVALUATE = "train_text_to_image.py", "train_unconditional.py", "evaluate_pipeline.py"
SHORT = ("--train_batch_size", 2, "--resolution", 32, "--max_train_steps", 2)
LONGER = (*SHORT[:-1], 3, "--resume_from_checkpoint", "latest")
SAMPLES = ("--validation_prompt", "a square", "--validation_num_inference_steps", 2, "--report_to", "tensorboard")
SCORES = ("--num_inference_steps", 2, "--metrics", "kid", "vendi", "--kid_subset_size", 2)
SCORES = (*SCORES, "--feature_module", "network", "--reference", "images")
DIGITS = ("--model_size", "tiny", "--model_channels", 8, "--channel_mult", 1, 2, "--attention_resolutions", 16)
DIGITS = (*DIGITS, "--num_inference_steps", 2, "--eval_batch_size", 2)

RUNS: dict[str, tuple[object, ...]] = {
    "full": (TEXT, "--pretrained_model", "sd", *SHORT, *SAMPLES, "--use_ema", "--train_text_encoder"),
    "full resumed": (TEXT, "--pretrained_model", "sd", *LONGER, *SAMPLES, "--use_ema", "--train_text_encoder"),
    "LoRA": (TEXT, "--pretrained_model", "sd", *SHORT, "--adaptation", "lora", "--export_fused"),
    "LoRA resumed": (TEXT, "--pretrained_model", "sd", *LONGER, "--adaptation", "lora", "--export_fused"),
    "LoKr of SDXL": (TEXT, "--pretrained_model", "sdxl", *SHORT, "--adaptation", "lokr"),
    "8-bit optimizer": (TEXT, "--pretrained_model", "sd", *SHORT, "--optimizer", "adamw8bit"),
    "Prodigy": (TEXT, "--pretrained_model", "sd", *SHORT, "--optimizer", "prodigy"),
    "schedule-free": (TEXT, "--pretrained_model", "sd", *SHORT, "--optimizer", "schedule_free_adamw"),
    "pixels": (UNCONDITIONAL, *SHORT, *DIGITS),
    "pixels resumed": (UNCONDITIONAL, *LONGER, *DIGITS),
    "dataset": (UNCONDITIONAL, "--dataset_name", "images", *SHORT, *DIGITS),
    "dataset that names a file outside of it": (UNCONDITIONAL, "--dataset_name", "traversal", *SHORT, *DIGITS),
    "evaluation": (EVALUATE, "--pipeline", "full", "--prompts", "a square", "--images_per_prompt", 2, *SCORES),
    "evaluation of a LoRA": (EVALUATE, "--pipeline", "sd", "--lora", "LoRA", "--prompts", "a", *SCORES),
    "evaluation of pixels": (EVALUATE, "--pipeline", "pixels", "--num_images", 2, *SCORES),
}
"""Flags by a run's name; a word that names a run, a pipeline or a file of `main` stands for its path."""
REFUSED = ("dataset that names a file outside of it",)


def import_everything() -> None:
    """Imports each module, which shows a package that requirements.txt lacks."""
    import utils

    for module in pkgutil.walk_packages(utils.__path__, "utils."):
        importlib.import_module(module.name)


def words_of(name: str, folders: dict[str, Path]) -> list[str]:
    """The command of a run."""
    script, *flags = RUNS[name]
    own = folders[name.removesuffix(" resumed")]
    words = [sys.executable, ROOT / script, "--output_dir", own, *(folders.get(str(word), word) for word in flags)]
    if script != EVALUATE and "--dataset_name" not in flags:
        words += ["--train_data_dir", folders["images"]]
    return [str(word) for word in words]


def main() -> int:
    """Runs them all; names those that fail, and exits with 1 then."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    from tests import networks, tiny

    import_everything()
    failed = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["HF_HOME"] = str(root / "hf")
        folders = {run: root / run.replace(" ", "-") for run in RUNS}
        folders["sd"], folders["sdxl"] = tiny.make_sd(root / "sd"), tiny.make_sdxl(root / "sdxl")
        folders["network"] = networks.make_own(root / "network.py")
        folders["images"] = tiny.make_images(root / "images")
        folders["traversal"] = tiny.make_images(root / "traversal")
        with (folders["traversal"] / "metadata.jsonl").open("a", encoding="utf-8") as metadata:
            metadata.write('{"file_name": "../images/000.png", "text": "of another folder"}\n')
        for run in RUNS:
            done = subprocess.run(words_of(run, folders), capture_output=True, text=True, cwd=root, check=False)
            is_right = done.returncode == (2 if run in REFUSED else 0)
            print(f"{'ok' if is_right else 'failed':8}{run}", flush=True)
            if not is_right:
                failed.append(run)
                print(done.stderr[-3000:], flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
