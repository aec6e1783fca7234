"""Options for drawing images: prompts, schedulers and sampling controls, and samples during training."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config.flag_rules import IsNot, Resume
from utils.config.options import (
    UserError,
    nearest,
    option,
    require,
    require_not_negative,
    require_positive,
)
from utils.config.user_files import check_encoding
from utils.models.options import PROMPTS

if TYPE_CHECKING:
    pass

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++_2s": ("DPMSolverSinglestepScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
}
MOST_IMAGES = 10**7
MAX_PATH = 1024
PROMPT_FILES = (".txt", ".csv", ".tsv", ".jsonl", ".json")

DRAWING = ("pipeline", "checkpoints")
SAMPLES = (*PROMPTS, "eval_metrics", IsNot("num_samples", ("0",)))
"""The flags by which samples are drawn during training."""


def scheduler_names() -> list[str]:
    """The names of diffusers' scheduler classes, read from its index, which is not imported."""
    found = find_spec("diffusers")
    if found is None or found.origin is None:
        return []
    index = Path(found.origin).read_text(encoding="utf-8")
    return sorted(set(re.findall(r'"([A-Z]\w*Scheduler)"', index)))


def find_scheduler(name: str) -> tuple[str, dict[str, Any]]:
    """(class of diffusers, changes of its config) of a name in `SCHEDULERS` or of a class, in any case.

    Raises:
        UserError: if there is none of this name, with the nearest one.
    """
    asked = name.strip().casefold()
    short, names = ({each.casefold(): each for each in known} for known in (SCHEDULERS, scheduler_names()))
    if asked in short:
        return SCHEDULERS[short[asked]]
    if asked in names:
        return names[asked], {}
    whole = asked if asked.endswith("scheduler") else f"{asked}scheduler"
    near_short = "" if whole == asked else nearest(asked, short)
    hint = names.get(whole) or short.get(near_short) or names.get(nearest(whole, names))
    raise UserError(
        f"--scheduler must be one of {', '.join(SCHEDULERS)} or a diffusers class, got {name!r}; "
        + (f"did you mean {hint}?" if hint else "such as EulerDiscreteScheduler")
    )


def refuse_files(flag: str, texts: Sequence[str], cure: str) -> None:
    """Checks that no prompt is the name of an existing file of prompts.

    Raises:
        UserError: if one is; it names the file.
    """
    for text in texts:
        if len(text) < MAX_PATH and Path(text).suffix.lower() in PROMPT_FILES and Path(text).is_file():
            raise UserError(f"{flag} {text} is a file, but would be used as the text of a prompt; {cure}")


@dataclass(frozen=True)
class SamplingControlOptions:
    dynamic_thresholding: float | None = option(
        None,
        "Imagen's dynamic thresholding: clip each predicted clean sample at this percentile, such as 99.5, and rescale",
        resume=Resume.REPORTING,
        acts_with=(*DRAWING, *SAMPLES),
    )
    thresholding_space: str = option(
        "latent",
        "threshold the samples of a latent model as latents, or as decoded pixels",
        choices=("latent", "pixel"),
        resume=Resume.REPORTING,
    )
    thresholding_limit: float | None = option(
        None,
        "largest absolute value of thresholded samples; by default 1 for pixels, 4 for latents",
        resume=Resume.REPORTING,
    )
    clamp_start: float | None = option(
        None,
        "clamp the predicted clean sample to this absolute value at the first step",
        resume=Resume.REPORTING,
        acts_with=(*DRAWING, *SAMPLES),
    )
    clamp_end: float | None = option(
        None, "same at the last step; the bound changes linearly in between", resume=Resume.REPORTING
    )
    initial_noise_scale: float = option(
        1.0, "factor by which the initial noise is multiplied", resume=Resume.REPORTING, acts_with=(*DRAWING, *SAMPLES)
    )

    def __post_init__(self) -> None:
        require_positive(self, "thresholding_limit", "clamp_start", "clamp_end", "initial_noise_scale")
        share = self.dynamic_thresholding
        require(share is None or 50 <= share <= 100, "dynamic_thresholding", share, "be a percentile from 50 to 100")
        if (self.clamp_start is None) != (self.clamp_end is None):
            raise UserError("--clamp_start and --clamp_end require each other; give both or neither")
        if share is None and (self.thresholding_limit is not None or self.thresholding_space != "latent"):
            raise UserError("--thresholding_limit and --thresholding_space need --dynamic_thresholding; give it too")


@dataclass(frozen=True)
class GenerationOptions:
    scheduler: str | None = option(
        None, f"{', '.join(SCHEDULERS)}, or a diffusers class; by default the pipeline's", acts_with=DRAWING
    )
    num_inference_steps: int | None = option(
        None,
        "denoising steps; by default the pipeline's, at most the length of the noise schedule",
        acts_with=DRAWING,
    )
    guidance_scale: float | None = option(
        None, "classifier-free guidance scale; by default the pipeline's", acts_with=DRAWING
    )
    guidance_rescale: float | None = option(
        None, "rescale of the guided prediction, 0 to 1, for zero terminal SNR", acts_with=DRAWING
    )
    negative_prompt: str | None = option(None, "what images should not show", is_text=True, acts_with=DRAWING)
    eta: float | None = option(
        None, "eta of DDIM: noise added at each step, from 0 to 1; by default 0", acts_with=DRAWING
    )
    height: int | None = option(None, "image height in pixels; by default the pipeline's", acts_with=DRAWING)
    width: int | None = option(None, "image width in pixels; by default the pipeline's", acts_with=DRAWING)
    strength: float | None = option(
        None, "how much to change --init_images, above 0 up to 1; by default the pipeline's"
    )
    batch_size: int | None = option(
        None, "images per batch and process; by default it doubles until memory is full", acts_with=DRAWING
    )
    fail_on_invalid: bool = option(False, "exit with an error if an image is unreadable, NaN, black or of one colour")

    def __post_init__(self) -> None:
        require_positive(self, "num_inference_steps", "height", "width", "batch_size")
        require_not_negative(self, "guidance_scale", "guidance_rescale", "eta")
        strength = self.strength
        fits = strength is None or 0 < strength <= 1
        require(fits, "strength", strength, "be above 0 and at most 1", "0 would change nothing")
        for name in ("guidance_rescale", "eta"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, name, value, "be between 0 and 1")
        for name in ("height", "width"):
            value = getattr(self, name)
            require(value is None or value % 8 == 0, name, value, "be divisible by 8")
        if self.scheduler is not None:
            find_scheduler(self.scheduler)


@dataclass(frozen=True)
class PromptOptions:
    prompts: list[str] | None = option(None, "prompts to draw images for", aliases=["--prompt"], is_text=True)
    prompts_file: str | None = option(
        None,
        "file of prompts: .txt with one per line; .jsonl, .json (a list), .csv or .tsv with a column prompt, text or "
        "caption",
    )
    text_encoding: str | None = option(
        None,
        "encoding of --prompts_file or captions, such as gb18030 or cp1252; by default UTF-8, else a guess, which is "
        "logged",
        acts_with=("prompts_file", "captions_dir"),
    )
    prompts_dataset: str | None = option(None, "dataset of prompts: a Hub name or a local path")
    prompts_split: str = option(
        "train", "split of --prompts_dataset", is_text=True, acts_with=("prompts_dataset", "captions_dir")
    )
    prompts_column: str | None = option(
        None,
        "column of the prompts in the file, dataset or metadata of the folder; by default prompt, text or caption",
        is_text=True,
        acts_with=("prompts_file", "prompts_dataset", "captions_dir"),
    )
    captions_dir: str | None = option(None, "image folder whose captions are the prompts; the first caption per image")
    max_prompts: int | None = option(
        None, "use only the first N prompts", acts_with=("prompts", "prompts_file", "prompts_dataset", "captions_dir")
    )
    class_labels: list[str] | None = option(
        None, "classes to draw with a class-conditional pipeline, by name or number; by default all", is_text=True
    )
    num_images: int | None = option(
        None, "number of images in total, spread evenly over prompts or classes", acts_with=DRAWING
    )
    images_per_prompt: int | None = option(
        None, "images per prompt or class; by default 4, or 64 without prompts and classes", acts_with=DRAWING
    )
    init_images: str | None = option(None, "image or folder of images for image-to-image")

    def __post_init__(self) -> None:
        require_positive(self, "max_prompts", "num_images", "images_per_prompt")
        for name in ("num_images", "images_per_prompt"):
            value = getattr(self, name)
            require(value is None or value <= MOST_IMAGES, name, value, f"be at most {MOST_IMAGES}")
        if self.text_encoding is not None:
            check_encoding(self.text_encoding, "text_encoding")
        given = [name for name in ("prompts", "prompts_file", "prompts_dataset", "captions_dir") if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"--{given[0]} and --{given[1]} both set the prompts; give one")
        if given and self.class_labels is not None:
            raise UserError(f"--{given[0]} and --class_labels exclude each other: a pipeline takes one; give one")
        for name in ("prompts_file",):
            file = getattr(self, name)
            require(file is None or Path(file).is_file(), name, file, "be a file that exists")
        folder = self.captions_dir
        require(folder is None or Path(folder).is_dir(), "captions_dir", folder, "be a folder that exists")
        start = self.init_images
        require(start is None or Path(start).exists(), "init_images", start, "be an image or a folder that exists")
        below = next((label for label in self.class_labels or () if re.fullmatch(r"-\d+", label)), None)
        require(below is None, "class_labels", below, "be names, or numbers from 0")
        if self.num_images is not None and self.images_per_prompt is not None:
            raise UserError("--num_images and --images_per_prompt both set the number of images; give one")
