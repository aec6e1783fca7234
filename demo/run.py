"""Fine-tunes the demo's base model, which draws the digits 0 to 7, on images of 8 and 9; shows images before and after.

python demo/run.py [--adaptation lora]
"""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from classifier import Verdict, judge, trained_classifier
from digits import (
    NEW_DIGITS,
    PRETRAINED_DIGITS,
    Wish,
    evaluation_wishes,
    split_digits,
    write_fine_tuning_folder,
    write_imagefolder,
)

DEMO = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO.parent))

from evaluate_pipeline import main as evaluate  # noqa: E402
from train_text_to_image import main as train  # noqa: E402
from utils.config.library_messages import hear_libraries  # noqa: E402

hear_libraries()

from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline  # noqa: E402

BASE = DEMO / "base"
NUM_PER_DIGIT = 50
DRAWING_BATCH = 100
SAMPLING_STEPS = 10
GUIDANCE = 2.0
SEED = 1000
NUM_REAL = 500
METRICS = ("kid", "fid", "prdc", "inception_score", "vendi", "memorisation", "clip_score", "lpips_diversity")

SHARED_ARGUMENTS = [
    "--resolution", "64",
    "--mixed_precision", "no",
    "--lr_scheduler", "cosine",
    "--lr_warmup_steps", "20",
    "--caption_dropout", "0.1",
    "--seed", "0",
]  # fmt: skip
LORA_TARGETS = "to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,conv_shortcut,time_emb_proj"
ARGUMENTS = {
    "full": ["--train_batch_size", "48", "--learning_rate", "1e-3", "--max_train_steps", "350"],
    "lora": [
        "--train_batch_size", "48", "--learning_rate", "4e-3", "--max_train_steps", "350",
        "--rank", "16", "--lora_target_modules", LORA_TARGETS,
    ],
}  # fmt: skip

PICTURE_SIZE = 128
PICTURE_GAP = 8
LABEL_HEIGHT = 84
TITLE_HEIGHT = 24


@dataclass(frozen=True)
class Drawn:
    """The images drawn for the prompts, one each, and the classifier's verdict."""

    pictures: list[Image.Image]
    verdict: Verdict


def draw(pipeline: StableDiffusionPipeline, wishes: Sequence[Wish]) -> list[Image.Image]:
    """Returns one image per prompt; image i starts from the same noise in every call."""
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for first in range(0, len(wishes), DRAWING_BATCH):
        batch = wishes[first : first + DRAWING_BATCH]
        pictures += pipeline(
            [wish.prompt for wish in batch],
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(SEED + first + number) for number in range(len(batch))],
        ).images
    return pictures


def load_pipeline(adaptation: str, folder: Path) -> StableDiffusionPipeline:
    """Returns the pipeline in `folder`, or the base pipeline with the LoRA in `folder`."""
    if adaptation == "full":
        return StableDiffusionPipeline.from_pretrained(folder)
    pipeline = StableDiffusionPipeline.from_pretrained(BASE)
    pipeline.load_lora_weights(folder)
    return pipeline


def fine_tune(adaptation: str, data: Path, folder: Path) -> None:
    """Fine-tunes the base on the imagefolder `data` with `train_text_to_image.py`; writes the result to `folder`.

    If training fails, the demo exits with its exit status.
    """
    where = ["--pretrained_model", str(BASE), "--train_data_dir", str(data), "--output_dir", str(folder)]
    status = train([*where, "--adaptation", adaptation, *SHARED_ARGUMENTS, *ARGUMENTS[adaptation]])
    if status:
        sys.exit(status)


def table(wishes: Sequence[Wish], before: Verdict, after: Verdict) -> str:
    """Returns the table of results before and after, in percent of the images."""
    digits = np.array([wish.digit for wish in wishes])
    rows = [
        ("new digits (8, 9) recognised", before.digit_right, after.digit_right, np.isin(digits, NEW_DIGITS)),
        ("old digits (0-7) recognised", before.digit_right, after.digit_right, np.isin(digits, PRETRAINED_DIGITS)),
        ("both colours right", before.colours_right, after.colours_right, digits >= 0),
    ]
    rows += [(f"  digit {digit}", before.digit_right, after.digit_right, digits == digit) for digit in range(10)]
    lines = [f"{'images of unseen captions and colours':<48}{'before':>8} |{'after':>8}", "-" * 66]
    lines += [f"{name:<48}{old[of].mean():>8.1%} |{new[of].mean():>8.1%}" for name, old, new, of in rows]
    return "\n".join(lines)


def chosen_for_show(wishes: Sequence[Wish]) -> list[int]:
    """Returns indices of the prompts to show: three of each new digit, then every second old digit."""
    digits = [wish.digit for wish in wishes]
    new = [digits.index(digit) + number for digit in NEW_DIGITS for number in range(3)]
    return new + [digits.index(digit) for digit in PRETRAINED_DIGITS[1::2]]


def side_by_side(prompts: Sequence[str], before: Sequence[Image.Image], after: Sequence[Image.Image]) -> Image.Image:
    """Returns a sheet with two rows of images, before and after, and the prompt below each column."""
    # Images.
    step = PICTURE_SIZE + PICTURE_GAP
    size = (len(prompts) * step + PICTURE_GAP, 2 * (TITLE_HEIGHT + PICTURE_SIZE) + LABEL_HEIGHT)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for row, (title, pictures) in enumerate((("before", before), ("after", after))):
        top = row * (TITLE_HEIGHT + PICTURE_SIZE)
        pen.text((PICTURE_GAP, top + 4), title, "black", font)
        for column, picture in enumerate(pictures):
            large = picture.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BICUBIC)
            sheet.paste(large, (PICTURE_GAP + column * step, top + TITLE_HEIGHT))

    # Prompts.
    for column, prompt in enumerate(prompts):
        place = (PICTURE_GAP + column * step, size[1] - LABEL_HEIGHT + 4)
        pen.multiline_text(place, textwrap.fill(prompt, 20), "black", font, spacing=2)
    return sheet


def write_picture(path: Path, wishes: Sequence[Wish], before: Drawn, after: Drawn) -> None:
    """Saves a sheet of some images before and after."""
    shown = chosen_for_show(wishes)
    rows = ([drawn.pictures[index] for index in shown] for drawn in (before, after))
    side_by_side([wishes[index].prompt for index in shown], *rows).save(path)


def write_drawn(folder: Path, wishes: Sequence[Wish], pictures: Sequence[Image.Image]) -> None:
    """Saves images as PNGs, with prompt, seed and number of steps as PNG text."""
    folder.mkdir(parents=True)
    for number, (wish, picture) in enumerate(zip(wishes, pictures, strict=True)):
        text = PngInfo()
        facts = {"prompt": wish.prompt, "seed": SEED + number, "num_inference_steps": SAMPLING_STEPS}
        for name, value in facts.items():
            text.add_itxt(name, str(value))
        picture.save(folder / f"{number:05d}.png", pnginfo=text, compress_level=1)


def report(folder: Path, training: Path, wishes: Sequence[Wish], before: Drawn, after: Drawn) -> None:
    """Runs `evaluate_pipeline.py` on the images before and after, with real digits as the reference.

    Features are those of the digit classifier. It downloads no networks.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name, drawn in (("before", before), ("after", after)):
        write_drawn(folder / name, wishes, drawn.pictures)
    write_imagefolder(folder / "real", [(split_digits()[0], NUM_REAL)], seed=5)
    words = ["--images", folder / "after", "--baseline", folder / "before", "--labels", "before", "after"]
    words += ["--reference", folder / "real", "--training_images", training, "--output_dir", folder]
    words += ["--feature_module", DEMO / "digit_features.py", "--no_download", "--metrics", *METRICS]
    words += ["--title", "The demo before and after its fine-tuning", "--report_prompts", 40]
    status = evaluate([str(word) for word in words])
    if status:
        sys.exit(status)


def options() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adaptation", choices=tuple(ARGUMENTS), default="full", help="train all weights, or a LoRA")
    parser.add_argument("--output_dir", type=Path, default=DEMO / "output", help="output folder (default: demo/output)")
    return parser.parse_args()


def main() -> None:
    """Fine-tunes, draws images before and after, and prints and saves the comparison."""
    # Fine-tune.
    chosen = options()
    data, folder = chosen.output_dir / "digits", chosen.output_dir / chosen.adaptation
    for old in (data, folder):
        shutil.rmtree(old, ignore_errors=True)
    write_fine_tuning_folder(data)
    fine_tune(chosen.adaptation, data, folder)

    # Draw with the base and with the result, and classify the images.
    wishes, network = evaluation_wishes(NUM_PER_DIGIT), trained_classifier()
    drawn = []
    for pipeline in (StableDiffusionPipeline.from_pretrained(BASE), load_pipeline(chosen.adaptation, folder)):
        pictures = draw(pipeline, wishes)
        drawn.append(Drawn(pictures, judge(pictures, wishes, network)))
    before, after = drawn

    # Compare.
    picture = chosen.output_dir / "before_after.png"
    write_picture(picture, wishes, before, after)
    print(table(wishes, before.verdict, after.verdict))
    print(f"\nresult: {folder}\npicture: {picture}\n", flush=True)
    report(chosen.output_dir / "evaluation", data, wishes, before, after)


if __name__ == "__main__":
    main()
