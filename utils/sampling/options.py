"""The options of drawing: pipelines, prompts, schedulers and bounds, and the samples of a training."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from utils.config.flag_rules import IsNot, OnHub, Resume
from utils.config.options import (
    UserError,
    first_line,
    nearest,
    option,
    require,
    require_not_negative,
    require_positive,
)
from utils.config.progress import Progress
from utils.config.user_files import check_encoding
from utils.data.options import HELD_OUT
from utils.diffusion.options import SAMPLERS
from utils.models.options import PROMPTS, weight_files
from utils.runtime.hub_files import require_model

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

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
MODEL_CURE = "give a folder, a Hub name or a .safetensors file"
MOST_IMAGES = 10**7
MAX_PATH = 1024
PROMPT_FILES = (".txt", ".csv", ".tsv", ".jsonl", ".json")

DRAWING = ("pipeline", "checkpoints")
SAMPLES = (*PROMPTS, "eval_metrics", IsNot("num_samples", ("0",)))
"""What has samples drawn while a model is trained."""


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
        f"--scheduler must be one of {', '.join(SCHEDULERS)} or a class of diffusers, got {name!r}; "
        + (f"did you mean {hint}?" if hint else "such as EulerDiscreteScheduler")
    )


def refuse_files(flag: str, texts: Sequence[str], cure: str) -> None:
    """Refuses a prompt that is the name of a file of prompts.

    Raises:
        UserError: naming it.
    """
    for text in texts:
        if len(text) < MAX_PATH and Path(text).suffix.lower() in PROMPT_FILES and Path(text).is_file():
            raise UserError(f"{flag} {text} is a file, and would be drawn as words; {cure}")


@dataclass(frozen=True)
class SamplingControlOptions:
    dynamic_thresholding: float | None = option(
        None,
        "percentile, such as 99.5, of each predicted clean sample beyond which it is clipped and scaled, as in Imagen",
        resume=Resume.REPORTING,
        acts_with=(*DRAWING, *SAMPLES),
    )
    thresholding_space: str = option(
        "latent",
        "where a latent model's samples are thresholded: latents, or decoded pixels",
        choices=("latent", "pixel"),
        resume=Resume.REPORTING,
    )
    thresholding_limit: float | None = option(
        None,
        "range that thresholded samples are scaled into; by default 1 for pixels, 4 for latents",
        resume=Resume.REPORTING,
    )
    clamp_start: float | None = option(
        None,
        "bound on the predicted clean sample at the first step",
        resume=Resume.REPORTING,
        acts_with=(*DRAWING, *SAMPLES),
    )
    clamp_end: float | None = option(
        None, "that bound at the last step; between them it goes in a straight line", resume=Resume.REPORTING
    )
    initial_noise_scale: float = option(
        1.0, "factor on the noise that sampling starts from", resume=Resume.REPORTING, acts_with=(*DRAWING, *SAMPLES)
    )

    def __post_init__(self) -> None:
        require_positive(self, "thresholding_limit", "clamp_start", "clamp_end", "initial_noise_scale")
        share = self.dynamic_thresholding
        require(share is None or 50 <= share <= 100, "dynamic_thresholding", share, "be a percentile from 50 to 100")
        if (self.clamp_start is None) != (self.clamp_end is None):
            raise UserError("--clamp_start and --clamp_end go together; give both or neither")
        if share is None and (self.thresholding_limit is not None or self.thresholding_space != "latent"):
            raise UserError("--thresholding_limit and --thresholding_space go with --dynamic_thresholding")


@dataclass(frozen=True)
class GenerationOptions:
    scheduler: str | None = option(
        None, f"{', '.join(SCHEDULERS)}, or a class of diffusers; by default the pipeline's", acts_with=DRAWING
    )
    num_inference_steps: int | None = option(
        None,
        "denoising steps; by default the pipeline's, or all of a shorter schedule",
        acts_with=DRAWING,
    )
    guidance_scale: float | None = option(
        None, "classifier-free guidance; by default the pipeline's", acts_with=DRAWING
    )
    guidance_rescale: float | None = option(
        None, "rescaling of the guided prediction, for zero terminal SNR", acts_with=DRAWING
    )
    negative_prompt: str | None = option(None, "what images should not show", is_text=True, acts_with=DRAWING)
    eta: float | None = option(None, "noise of DDIM's steps, from 0 to 1", acts_with=DRAWING)
    height: int | None = option(None, "pixels; by default the pipeline's", acts_with=DRAWING)
    width: int | None = option(None, "pixels; by default the pipeline's", acts_with=DRAWING)
    strength: float | None = option(
        None, "how far --init_images are changed, above 0 up to 1; by default the pipeline's"
    )
    batch_size: int | None = option(None, "images at once; by default it grows until memory is full", acts_with=DRAWING)
    fail_on_invalid: bool = option(False, "end with an error if an image is NaN, black or of one colour")

    def __post_init__(self) -> None:
        require_positive(self, "num_inference_steps", "height", "width", "batch_size")
        require_not_negative(self, "guidance_scale", "guidance_rescale", "eta")
        strength = self.strength
        fits = strength is None or 0 < strength <= 1
        require(fits, "strength", strength, "be above 0 and at most 1", "at 0 none changes")
        for name in ("guidance_rescale", "eta"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, name, value, "be between 0 and 1")
        for name in ("height", "width"):
            value = getattr(self, name)
            require(value is None or value % 8 == 0, name, value, "be divisible by 8")
        if self.scheduler is not None:
            find_scheduler(self.scheduler)


@dataclass(frozen=True)
class SamplingOptions:
    help_title: ClassVar[str] = "sampling"

    sampler: str | None = option(
        None,
        "what samples are drawn by; by default as the exported pipeline draws: DDPM in pixels, DDIM in latents, Euler "
        "in flow matching",
        choices=SAMPLERS,
        resume=Resume.REPORTING,
    )
    ddpm_num_inference_steps: int | None = option(
        None,
        "denoising steps of a sample; by default 1000, or all that a shorter noise schedule has",
        aliases=["--num_inference_steps"],
        resume=Resume.REPORTING,
        acts_with=(IsNot("num_samples", ("0",)), "eval_metrics"),
    )
    eta: float = option(0.0, "share of DDPM's noise that DDIM draws anew at each step", resume=Resume.REPORTING)
    guidance_scale: float = option(
        1.0, "classifier-free guidance of samples of classes; over 1 it is on", resume=Resume.REPORTING
    )
    num_samples: int | None = option(
        None, "samples drawn each time, or 0; by default --eval_batch_size", resume=Resume.REPORTING
    )
    eval_batch_size: int = option(
        16, "samples that a process draws at once", resume=Resume.REPORTING, acts_with=(IsNot("num_samples", ("0",)),)
    )
    save_images_epochs: int = option(10, "epochs between samples", resume=Resume.REPORTING)
    save_images_steps: int | None = option(
        None, "optimizer steps between samples, instead of --save_images_epochs", resume=Resume.REPORTING
    )
    save_model_epochs: int = option(
        10, "epochs between saves of the pipeline as it is then, in output_dir", resume=Resume.SAVING
    )

    def __post_init__(self) -> None:
        require_positive(self, "ddpm_num_inference_steps", "eval_batch_size", "save_images_epochs", "save_images_steps")
        require_positive(self, "save_model_epochs")
        require_not_negative(self, "num_samples", "guidance_scale")
        require(0 <= self.eta <= 1, "eta", self.eta, "be from 0 to 1")
        require(self.eta == 0 or self.sampler == "ddim", "eta", self.eta, "be 0 without --sampler ddim")

    @property
    def count(self) -> int:
        """Samples drawn each time."""
        return self.eval_batch_size if self.num_samples is None else self.num_samples

    def steps_of(self, scheduler: "SchedulerMixin") -> int:
        """Denoising steps of a sample that a pipeline with this scheduler draws.

        Raises:
            UserError: if the sampler does not take so many or so few.
        """
        from utils.diffusion.process import is_flow, is_score
        from utils.diffusion.samplers import check_steps, sampler_of
        from utils.sampling.scheduler_trials import check_trial

        longest = scheduler.config.num_train_timesteps
        steps = self.ddpm_num_inference_steps or min(1000, longest)
        if not is_flow(scheduler) and not is_score(scheduler):
            must = f"be at most {longest}, the length of the noise schedule"
            require(steps <= longest, "num_inference_steps", steps, must)
        drawn_by = sampler_of(scheduler, self.sampler, self.eta)
        check_trial(drawn_by, steps, "the pipeline", "num_inference_steps")
        try:
            check_steps(drawn_by, steps)
        except ValueError as error:
            name = self.sampler or type(scheduler).__name__
            raise UserError(f"--num_inference_steps {steps} can't be taken by {name}: {first_line(error)}") from error
        return steps

    def is_due(self, progress: Progress) -> bool:
        """Whether samples are drawn after a step.

        As in the diffusers examples, the first epoch is always followed by samples.
        """
        if self.save_images_steps is not None:
            return progress.is_multiple_of(self.save_images_steps)
        return any(epoch % self.save_images_epochs == 0 for epoch in progress.ended_epochs)

    def is_model_due(self, progress: Progress) -> bool:
        """Whether the pipeline is saved after a step."""
        return any((epoch + 1) % self.save_model_epochs == 0 for epoch in progress.ended_epochs)


@dataclass(frozen=True)
class PipelineOptions:
    pipeline: str | None = option(None, "pipeline to draw from: a folder, a Hub name or a single .safetensors file")
    pipeline_config: str | None = option(
        None,
        "pipeline folder or Hub name that describes a single-file --pipeline; by default found on the Hub",
        acts_with=(*weight_files("pipeline", "baseline"), "checkpoints"),
    )
    lora: str | None = option(None, "LoRA on top of it: a folder, .safetensors file or Hub name")
    lora_scale: float = option(1.0, "factor on the LoRA", acts_with=("lora", "checkpoints"))
    revision: str | None = option(
        None, "revision of the pipeline on the Hub", acts_with=(OnHub("pipeline"), "checkpoints")
    )
    variant: str | None = option(None, "variant of the weight files, such as fp16")
    images: str | None = option(None, "score a folder of images already drawn, instead of drawing any")

    def __post_init__(self) -> None:
        if self.images is not None:
            require(Path(self.images).is_dir(), "images", self.images, "be a folder that exists")
        if self.lora is not None and self.pipeline is None:
            raise UserError("--lora goes on top of a --pipeline")
        require(math.isfinite(self.lora_scale), "lora_scale", self.lora_scale, "be a finite number")
        for name in ("pipeline", "lora"):
            require_model(name, getattr(self, name), MODEL_CURE, (".safetensors",))
        require_model("pipeline_config", self.pipeline_config, "give a pipeline folder or a Hub name")


@dataclass(frozen=True)
class ValidationOptions:
    help_title: ClassVar[str] = "validation"

    validation_prompts: list[str] | None = option(
        None, "prompts of which samples are drawn", is_text=True, resume=Resume.REPORTING
    )
    validation_prompt: str | None = option(
        None,
        "a single prompt, of which --num_validation_images samples are drawn",
        is_text=True,
        resume=Resume.REPORTING,
    )
    num_validation_images: int | None = option(
        None,
        "samples a prompt; by default 4 of a --validation_prompt, else 1",
        resume=Resume.REPORTING,
        acts_with=(*PROMPTS, "eval_metrics"),
    )
    validation_epochs: int | None = option(
        None,
        "epochs between samples; 5 by default, for LoRA and SDXL 1",
        resume=Resume.REPORTING,
        acts_with=(*PROMPTS, *HELD_OUT),
    )
    validation_steps: int | None = option(
        None,
        "optimizer steps between samples, instead of --validation_epochs",
        resume=Resume.REPORTING,
        acts_with=(*PROMPTS, *HELD_OUT),
    )
    validation_num_inference_steps: int = option(
        25, "denoising steps of a sample", resume=Resume.REPORTING, acts_with=(*PROMPTS, "eval_metrics")
    )
    validation_guidance_scale: float | None = option(
        None,
        "classifier-free guidance; by default the pipeline's",
        resume=Resume.REPORTING,
        acts_with=(*PROMPTS, "eval_metrics"),
    )
    validation_negative_prompt: str | None = option(
        None,
        "what the samples should not show",
        is_text=True,
        resume=Resume.REPORTING,
        acts_with=(*PROMPTS, "eval_metrics"),
    )

    def __post_init__(self) -> None:
        require_positive(self, "validation_epochs", "validation_steps", "validation_num_inference_steps")
        require_not_negative(self, "num_validation_images", "validation_guidance_scale")
        if self.validation_prompts is not None and self.validation_prompt is not None:
            raise UserError("--validation_prompt and --validation_prompts are two ways to say the same; give one")
        refuse_files(self.prompts_flag, self.prompts, "give its prompts themselves")

    @property
    def prompts_flag(self) -> str:
        """The flag that names them."""
        return "--validation_prompts" if self.validation_prompts else "--validation_prompt"

    @property
    def prompts(self) -> list[str]:
        """All that samples are drawn of."""
        return self.validation_prompts or ([self.validation_prompt] if self.validation_prompt else [])

    def requests(self, seed: int) -> list["SampleRequest"]:
        """The samples of one validation; number n has the seed `seed + n`, at every validation."""
        prompts = self.prompts
        each = self.num_validation_images
        if each is None:
            each = 4 if self.validation_prompt else 1
        wanted = [(prompt, f"{row:02d}_{column}") for row, prompt in enumerate(prompts) for column in range(each)]
        return [SampleRequest(prompt, name, (seed + index) % 2**63) for index, (prompt, name) in enumerate(wanted)]

    def is_due(self, progress: Progress, default_epochs: int) -> bool:
        """Whether samples are drawn after a step.

        As in the diffusers examples, the first epoch is always followed by samples.
        """
        if self.validation_steps is not None:
            return progress.is_multiple_of(self.validation_steps)
        interval = self.validation_epochs or default_epochs
        return any(epoch % interval == 0 for epoch in progress.ended_epochs)


class SampleRequest(NamedTuple):
    """One sample to draw: its prompt, the stem of its file, and the seed of its CPU generator."""

    prompt: str
    name: str
    seed: int


@dataclass(frozen=True)
class PromptOptions:
    prompts: list[str] | None = option(None, "prompts to draw", aliases=["--prompt"], is_text=True)
    prompts_file: str | None = option(
        None, "prompts of a file: .txt one a line; .jsonl, .json (a list) or .csv with a column prompt, text or caption"
    )
    text_encoding: str | None = option(
        None,
        "encoding of --prompts_file, such as gb18030 or cp1252; by default UTF-8, and else a guess, which is logged",
        acts_with=("prompts_file", "captions_dir"),
    )
    prompts_dataset: str | None = option(None, "prompts of a dataset: a Hub name or a local path")
    prompts_split: str = option(
        "train", "split of that dataset", is_text=True, acts_with=("prompts_dataset", "captions_dir")
    )
    prompts_column: str | None = option(
        None,
        "column of the prompts, in the file, the dataset or the folder's metadata",
        is_text=True,
        acts_with=("prompts_file", "prompts_dataset", "captions_dir"),
    )
    captions_dir: str | None = option(None, "prompts are the captions of a folder of images, the first of each")
    max_prompts: int | None = option(
        None, "take the first so many prompts", acts_with=("prompts", "prompts_file", "prompts_dataset", "captions_dir")
    )
    class_labels: list[str] | None = option(
        None, "classes that a class-conditional pipeline draws, by name or else by number; by default all", is_text=True
    )
    num_images: int | None = option(
        None, "images in total, one after the other of each prompt or class", acts_with=DRAWING
    )
    images_per_prompt: int | None = option(None, "images of each prompt or class; by default 4", acts_with=DRAWING)
    init_images: str | None = option(None, "image or folder of images that drawing starts from: variations of them")

    def __post_init__(self) -> None:
        require_positive(self, "max_prompts", "num_images", "images_per_prompt")
        for name in ("num_images", "images_per_prompt"):
            value = getattr(self, name)
            require(value is None or value <= MOST_IMAGES, name, value, f"be at most {MOST_IMAGES}")
        if self.text_encoding is not None:
            check_encoding(self.text_encoding, "text_encoding")
        given = [name for name in ("prompts", "prompts_file", "prompts_dataset", "captions_dir") if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"--{given[0]} and --{given[1]} both say which prompts to draw; give one")
        if given and self.class_labels is not None:
            raise UserError(f"--{given[0]} are texts and --class_labels classes; a pipeline takes one or the other")
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
            raise UserError("--num_images and --images_per_prompt both say how many images; give one")
