"""Options of the samples that a run draws while it trains: their prompts, and when they are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from utils.config.flag_rules import IsNot, Resume
from utils.config.options import UserError, first_line, option, require, require_not_negative, require_positive
from utils.config.progress import Progress
from utils.config.user_files import require_file
from utils.data.options import HELD_OUT
from utils.diffusion.options import SAMPLERS
from utils.models.options import PROMPTS
from utils.sampling.options import refuse_files
from utils.sampling.prompt_rows import PromptRow, read_rows_of

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

DEFAULT_SAMPLE_EPOCHS = 10  # epochs between the samples of a model without text


class DrawingWork(NamedTuple):
    """What drawing samples takes: the number of images, their denoising steps, and passes of the denoiser in total."""

    count: int
    num_steps: int
    num_passes: int


def _are_samples_due(progress: Progress, epochs: int | None, steps: int | None) -> bool:
    """Whether samples are due after a step, by any of the intervals that count. None: the interval does not.

    The first epoch counts as a multiple of `epochs`.
    """
    is_epoch = epochs is not None and any(epoch % epochs == 0 for epoch in progress.ended_epochs)
    return progress.is_sample_time or progress.is_multiple_of(steps) or is_epoch


@dataclass(frozen=True)
class SamplingOptions:
    help_title: ClassVar[str] = "sampling"

    sampler: str | None = option(
        None,
        "sampler for samples; by default that of the exported pipeline: DDPM for pixels, DDIM for latents, Euler for "
        "flow matching",
        choices=SAMPLERS,
        resume=Resume.REPORTING,
    )
    ddpm_num_inference_steps: int | None = option(
        None,
        "denoising steps per sample; by default 1000, or the length of a shorter noise schedule",
        aliases=["--num_inference_steps"],
        resume=Resume.REPORTING,
        acts_with=(IsNot("num_samples", ("0",)), "eval_metrics"),
    )
    eta: float = option(0.0, "eta of DDIM: noise added at each step, from 0 to 1", resume=Resume.REPORTING)
    guidance_scale: float = option(
        1.0, "classifier-free guidance scale of class-conditional samples; 1 is off", resume=Resume.REPORTING
    )
    num_samples: int | None = option(
        None, "samples to draw each time; 0 draws none; by default --eval_batch_size", resume=Resume.REPORTING
    )
    eval_batch_size: int = option(
        16, "samples per batch and process", resume=Resume.REPORTING, acts_with=(IsNot("num_samples", ("0",)),)
    )
    save_images_epochs: int | None = option(
        None,
        "draw samples every N epochs; by default 10, if neither --save_images_steps nor --save_images_minutes is "
        "given. Of several intervals, each counts",
        resume=Resume.REPORTING,
    )
    save_images_steps: int | None = option(None, "draw samples every N optimizer steps", resume=Resume.REPORTING)
    save_images_minutes: float | None = option(
        None,
        "draw samples once N minutes have passed since the last ones; fractions are allowed",
        resume=Resume.REPORTING,
    )
    sample_at_start: bool = option(
        True,
        "also draw samples of the base model, before the first step, into samples/step-0",
        resume=Resume.REPORTING,
        acts_with=(IsNot("num_samples", ("0",)),),
    )
    save_model_epochs: int = option(
        10, "save the current pipeline in --output_dir every N epochs", resume=Resume.SAVING
    )

    def __post_init__(self) -> None:
        require_positive(self, "ddpm_num_inference_steps", "eval_batch_size", "save_images_epochs", "save_images_steps")
        require_positive(self, "save_images_minutes", "save_model_epochs")
        require_not_negative(self, "num_samples", "guidance_scale")
        require(0 <= self.eta <= 1, "eta", self.eta, "be from 0 to 1")
        require(self.eta == 0 or self.sampler == "ddim", "eta", self.eta, "be 0 without --sampler ddim")

    def work(self, scheduler: "SchedulerMixin") -> "DrawingWork":
        """Returns what drawing the samples once takes; `scheduler` is the pipeline's."""
        num_steps = self.count * self.steps_of(scheduler) if self.count else 0
        return DrawingWork(self.count, num_steps, num_steps * (2 if self.guidance_scale > 1 else 1))

    @property
    def count(self) -> int:
        """The number of samples drawn each time."""
        return self.eval_batch_size if self.num_samples is None else self.num_samples

    def steps_of(self, scheduler: "SchedulerMixin") -> int:
        """Returns the number of denoising steps per sample for a pipeline with this scheduler.

        Raises:
            UserError: if the sampler can't take that many.
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
            raise UserError(f"--num_inference_steps {steps} does not work with {name}: {first_line(error)}") from error
        return steps

    def is_due(self, progress: Progress) -> bool:
        """Whether samples are drawn after a step.

        As in the diffusers examples, the first epoch is always followed by samples.
        """
        intervals = (self.save_images_epochs, self.save_images_steps, self.minutes)
        epochs = DEFAULT_SAMPLE_EPOCHS if intervals == (None, None, None) else self.save_images_epochs
        return _are_samples_due(progress, epochs, self.save_images_steps)

    @property
    def minutes(self) -> float | None:
        """Minutes between samples, if they count."""
        return self.save_images_minutes

    @property
    def minutes_flag(self) -> str:
        """The flag that sets the minutes between samples."""
        return "--save_images_minutes"

    def is_model_due(self, progress: Progress) -> bool:
        """Whether the pipeline is due to be saved after a step."""
        return any((epoch + 1) % self.save_model_epochs == 0 for epoch in progress.ended_epochs)


@dataclass(frozen=True)
class ValidationOptions:
    help_title: ClassVar[str] = "validation"

    validation_prompts: list[str] | None = option(
        None, "prompts for samples during training", is_text=True, resume=Resume.REPORTING
    )
    validation_prompt: str | None = option(
        None,
        "a single prompt, for --num_validation_images samples",
        is_text=True,
        resume=Resume.REPORTING,
    )
    validation_prompts_file: str | None = option(
        None,
        "file of prompts with settings of their own; those that a prompt does not set are those of the other flags. "
        ".txt: one per line, with kohya's flags (a red fox --n blurry --w 512 --h 768 --d 7 --s 20 --l 7.5 --am 0.8: "
        "negative prompt, width, height, seed, steps, guidance scale, LoRA scale; # begins a comment line). .jsonl, "
        ".json, .yaml, .csv, .tsv: prompt, negative_prompt, width, height, seed, steps, guidance_scale, lora_scale",
        resume=Resume.REPORTING,
    )
    num_validation_images: int | None = option(
        None,
        "samples per prompt, the nth with seed + n; by default 4 for --validation_prompt, 1 for several prompts",
        resume=Resume.REPORTING,
        acts_with=(*PROMPTS, "eval_metrics"),
    )
    validation_epochs: int | None = option(
        None,
        "draw samples every N epochs; by default 5, or 1 for LoRA and SDXL, if neither --validation_steps nor "
        "--validation_minutes is given. Of several intervals, each counts",
        resume=Resume.REPORTING,
        acts_with=(*PROMPTS, *HELD_OUT),
    )
    validation_steps: int | None = option(
        None,
        "draw samples every N optimizer steps",
        resume=Resume.REPORTING,
        acts_with=(*PROMPTS, *HELD_OUT),
    )
    validation_minutes: float | None = option(
        None,
        "draw samples once N minutes have passed since the last ones; fractions are allowed",
        resume=Resume.REPORTING,
        acts_with=(*PROMPTS, *HELD_OUT),
    )
    sample_at_start: bool = option(
        True,
        "also draw samples of the base model, before the first step, into samples/step-0",
        resume=Resume.REPORTING,
        acts_with=PROMPTS,
    )
    validation_num_inference_steps: int = option(
        25, "denoising steps per sample", resume=Resume.REPORTING, acts_with=(*PROMPTS, "eval_metrics")
    )
    validation_guidance_scale: float | None = option(
        None,
        "classifier-free guidance scale of samples; by default the pipeline's",
        resume=Resume.REPORTING,
        acts_with=(*PROMPTS, "eval_metrics"),
    )
    validation_negative_prompt: str | None = option(
        None,
        "negative prompt of samples",
        is_text=True,
        resume=Resume.REPORTING,
        acts_with=(*PROMPTS, "eval_metrics"),
    )

    def __post_init__(self) -> None:
        require_positive(self, "validation_epochs", "validation_steps", "validation_minutes")
        require_positive(self, "validation_num_inference_steps")
        require_not_negative(self, "num_validation_images", "validation_guidance_scale")
        given = [name for name in reversed(PROMPTS) if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"--{given[1]} and --{given[0]} both set the prompts; give one")
        if self.validation_prompts_file is None:
            refuse_files(self.prompts_flag, self.prompts, "give it as --validation_prompts_file")
        self.rows  # noqa: B018 - errors in the file are reported before torch is loaded

    @property
    def prompts_flag(self) -> str:
        """The flag by which the prompts are given."""
        return next((f"--{name}" for name in PROMPTS if getattr(self, name) is not None), "--validation_prompt")

    @property
    def prompts(self) -> list[str]:
        """The prompts to draw samples for."""
        return [row.prompt for row in self.rows]

    @cached_property
    def rows(self) -> list[PromptRow]:
        """The prompts to draw samples for, with their own settings.

        Raises:
            UserError: if they are in a file that can't be used.
        """
        if self.validation_prompts_file is not None:
            require_file(self.validation_prompts_file, "validation_prompts_file")
            return read_rows_of("--validation_prompts_file", self.validation_prompts_file)
        texts = self.validation_prompts or ([self.validation_prompt] if self.validation_prompt else [])
        return [PromptRow(f"prompt {number}", text) for number, text in enumerate(texts, start=1)]

    @property
    def shared_negative_prompt(self) -> str:
        """The negative prompt of all samples; empty if they have none, or different ones."""
        found = {request.negative_prompt for request in self.requests(0)} or {self.validation_negative_prompt}
        return (found.pop() or "") if len(found) == 1 else ""

    def requests(self, seed: int, sizes: Sequence[tuple[int, int]] = ((512, 512),)) -> list["SampleRequest"]:
        """Returns the samples of one validation.

        Sample n has the seed `seed + n`, unless its prompt sets one: then copy n of the prompt has that seed + n.

        Args:
            sizes: (width, height) in pixels that samples take in turn if their prompt sets no size. If it sets one
                edge, the other is that of the first size.
        """
        each = self.num_validation_images
        if each is None:
            each = 4 if self.validation_prompt else 1
        wanted = [(row, number, copy) for number, row in enumerate(self.rows) for copy in range(each)]
        found = []
        for index, (row, number, copy) in enumerate(wanted):
            width, height = sizes[0] if row.width or row.height else sizes[index % len(sizes)]
            drawn = seed + index if row.seed is None else row.seed + copy
            request = SampleRequest(
                row.prompt,
                f"{number:02d}_{copy}",
                drawn % 2**63,
                (row.width or width, row.height or height),
                self.validation_negative_prompt if row.negative_prompt is None else row.negative_prompt,
                row.steps or self.validation_num_inference_steps,
                self.validation_guidance_scale if row.guidance_scale is None else row.guidance_scale,
                row.lora_scale,
            )
            found.append(request)
        return found

    def work(self, scheduler: "SchedulerMixin") -> "DrawingWork":
        """Returns what drawing the samples once takes; `scheduler` is the pipeline's."""
        requests = self.requests(0)
        passes = sum(
            request.steps * (1 if request.guidance_scale is not None and request.guidance_scale <= 1 else 2)
            for request in requests
        )
        return DrawingWork(len(requests), sum(request.steps for request in requests), passes)

    def is_due(self, progress: Progress, default_epochs: int) -> bool:
        """Whether samples are drawn after a step.

        As in the diffusers examples, the first epoch is always followed by samples.
        """
        intervals = (self.validation_epochs, self.validation_steps, self.minutes)
        epochs = default_epochs if intervals == (None, None, None) else self.validation_epochs
        return _are_samples_due(progress, epochs, self.validation_steps)

    @property
    def minutes(self) -> float | None:
        """Minutes between samples, if they count."""
        return self.validation_minutes

    @property
    def minutes_flag(self) -> str:
        """The flag that sets the minutes between samples."""
        return "--validation_minutes"


class SampleRequest(NamedTuple):
    """One sample to draw.

    Attributes:
        prompt: the text.
        name: the stem of its file.
        seed: the seed of its CPU generator.
        size: width and height in pixels.
        negative_prompt: None for none.
        steps: denoising steps.
        guidance_scale: None for the pipeline's default.
        lora_scale: factor on what the trained adapter adds to the weights; None for 1, or without an adapter.
    """

    prompt: str
    name: str
    seed: int
    size: tuple[int, int]
    negative_prompt: str | None
    steps: int
    guidance_scale: float | None
    lora_scale: float | None
