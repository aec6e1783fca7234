"""What holds a pipeline's samples in bounds while they are drawn: callbacks on each step.

A control sees the clean sample that a step predicts, and may change it before the scheduler takes the step, whatever
the scheduler and the prediction type. `SamplingControls.attached(pipeline)` is around any call of any pipeline;
evaluation and the training scripts' samples use the same. Without any option it still sees to it that steps are
consistent: that a scheduler which should clip clean samples, and can't, does.
"""

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from utils.config.options import UserError
from utils.diffusion.samplers import clip_range, clips_itself, consistent, converted
from utils.models.latent_space import LatentSpace
from utils.sampling.options import SamplingControlOptions

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)
CONTROLLED = (
    *("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler"),
)
CLIPPABLE = (
    *CONTROLLED,
    *("PNDMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
)
PIXEL_LIMIT, LATENT_LIMIT = 1.0, 4.0
SMALLEST_SIGMA = 1e-6


class Control(ABC):
    """A callback on the clean sample that a step predicts."""

    @abstractmethod
    def __call__(self, clean: Tensor, progress: float) -> Tensor:
        """[B, C, h, w] what the step takes for the clean sample; progress goes from 0 at the first step to 1."""


class DynamicThresholding(Control):
    """Imagen's (Saharia et al. 2022, section 2.3): x -> clip(x, -s, s) limit / s, s an image's percentile of |x|.

    Where s is within the limit nothing changes.
    """

    def __init__(self, percentile: float, limit: float):
        self._share = percentile / 100
        self._limit = limit

    def __call__(self, clean: Tensor, progress: float) -> Tensor:
        values = clean.float()
        bound = torch.quantile(values.abs().flatten(1), self._share, dim=1).clamp(min=self._limit)
        bound = bound.view(-1, *[1] * (clean.ndim - 1))
        return (torch.minimum(torch.maximum(values, -bound), bound) * (self._limit / bound)).to(clean.dtype)


class InPixels(Control):
    """Another control on the decoded image of a latent; what it leaves alone is not encoded again."""

    def __init__(self, control: Control, space: LatentSpace):
        self._control = control
        self._space = space

    def __call__(self, clean: Tensor, progress: float) -> Tensor:
        with torch.no_grad():
            pixels = self._space.decode(clean)
            held = self._control(pixels, progress)
            changed = (held != pixels).flatten(1).any(1)
            if not changed.any():
                return clean
            vae = self._space.vae
            with torch.autocast(vae.device.type, enabled=False):
                mean = vae.encode(held[changed].to(vae.dtype)).latent_dist.mean.float()
            latents = self._space.latents(mean, torch.zeros_like(mean), torch.zeros_like(mean))
        result = clean.clone()
        result[changed] = latents.to(clean.dtype)
        return result


class ProgressiveClamping(Control):
    """Clips to a bound that goes in a straight line from the first step to the last."""

    def __init__(self, start: float, end: float):
        self._start = start
        self._end = end

    def __call__(self, clean: Tensor, progress: float) -> Tensor:
        bound = self._start + (self._end - self._start) * progress
        return clean.clamp(-bound, bound)


class Clipping(Control):
    """Clips to the range that the model's clean samples have."""

    def __init__(self, limit: float):
        self._limit = limit

    def __call__(self, clean: Tensor, progress: float) -> Tensor:
        return clean.clamp(-self._limit, self._limit)


class SamplingControls:
    """The controls that options ask for."""

    def __init__(self, options: SamplingControlOptions | None = None):
        self._options = options or SamplingControlOptions()

    @property
    def are_on(self) -> bool:
        """Whether anything is asked for."""
        options = self._options
        asked = options.dynamic_thresholding is not None or options.clamp_start is not None
        return asked or options.initial_noise_scale != 1.0

    @property
    def noise_scale(self) -> float:
        """The factor on the noise that sampling starts from."""
        return self._options.initial_noise_scale

    def facts(self) -> dict[str, object]:
        """What is asked for, as JSON."""
        return asdict(self._options) if self.are_on else {}

    def _controls(self, pipeline: "DiffusionPipeline") -> list[Control]:
        options, controls = self._options, []
        vae = getattr(pipeline, "vae", None)
        in_latents = vae is not None and options.thresholding_space == "latent"
        if options.dynamic_thresholding is not None:
            limit = options.thresholding_limit or (LATENT_LIMIT if in_latents else PIXEL_LIMIT)
            control = DynamicThresholding(options.dynamic_thresholding, limit)
            overflows = vae is not None and vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
            if overflows and not in_latents:
                raise UserError(
                    "--thresholding_space pixel decodes at each step, in which this VAE overflows in fp16; use bf16, "
                    "or --thresholding_space latent"
                )
            controls.append(control if vae is None or in_latents else InPixels(control, LatentSpace(vae)))
        if options.clamp_start is not None:
            controls.append(ProgressiveClamping(options.clamp_start, options.clamp_end))
        return controls

    def check(self, scheduler: Any) -> None:
        """Refuses a scheduler whose steps can't be controlled.

        Raises:
            UserError: naming those that can.
        """
        name = type(scheduler).__name__
        if self.are_on and name.removeprefix("Consistent") not in CONTROLLED:
            known = ", ".join(each.removesuffix("Scheduler") for each in CONTROLLED)
            raise UserError(f"--scheduler {name} can't be controlled while it samples; choose one of {known}")

    @contextmanager
    def attached(self, pipeline: "DiffusionPipeline", scheduler: Any = None, eta: float = 0.0) -> Iterator[None]:
        """Within it each call of the pipeline, or of its denoiser with another scheduler, takes controlled steps.

        Without controls too they are consistent: see `utils.diffusion.samplers`.

        Args:
            eta: share of DDPM's noise that the pipeline's scheduler draws at each step, if it is DDIM.
        """
        own, scale = pipeline.scheduler, self._options.initial_noise_scale
        used = scheduler or drawing_scheduler(pipeline, eta)
        if self.are_on:
            self.check(used)
        controls = [*self._controls(pipeline), *_clipping(pipeline, used)]
        handle = None
        if scheduler is None and used is not own:
            pipeline.scheduler = used
        if controls or scale != 1.0:
            step = _ControlledStep(used, controls, scale)
            used.step = step
            denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
            handle = denoiser.register_forward_pre_hook(partial(_scale_input, step), with_kwargs=True)
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()
                del used.step  # the class's own is found again
            if pipeline.scheduler is not own:
                pipeline.scheduler = own


def drawing_scheduler(pipeline: "DiffusionPipeline", eta: float = 0.0) -> Any:
    """The pipeline's scheduler, or one that takes its steps consistently.

    DDIM that clips nothing is left to a text pipeline as it is: so diffusers alone draws the same.
    """
    scheduler = pipeline.scheduler
    draws_text = hasattr(pipeline, "tokenizer")
    return scheduler if draws_text and not eta and not clips_itself(scheduler) else consistent(scheduler, eta)


def draws_pixels(pipeline: "DiffusionPipeline") -> bool:
    """Whether a pipeline denoises pixels, not a VAE's latents."""
    return not any(hasattr(pipeline, name) for name in ("vae", "vqvae"))


def _clipping(pipeline: "DiffusionPipeline", scheduler: Any) -> list[Control]:
    """What clips for a scheduler of pixels that should, and whose class can't."""
    limit = clip_range(scheduler.config) if draws_pixels(pipeline) and not clips_itself(scheduler) else None
    if limit is None:
        return []
    if type(scheduler).__name__ not in CLIPPABLE:
        said = "%s can't clip its estimates, as this pipeline should: what it draws may be washed out or glaring"
        logger.warning(said, type(scheduler).__name__)
        return []
    return [Clipping(limit)]


@contextmanager
def controllable(controls: SamplingControls, pipeline: "DiffusionPipeline") -> Iterator[None]:
    """Within it the pipeline samples by DDIM if controls are on and its own scheduler can't be controlled."""
    from diffusers import DDIMScheduler

    own = pipeline.scheduler
    if controls.are_on and type(own).__name__ not in CONTROLLED:
        pipeline.scheduler = converted(own, DDIMScheduler)
    try:
        yield
    finally:
        pipeline.scheduler = own


def _scale_input(step: "_ControlledStep", _: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The denoiser's input times the noise's scale, before the first step."""
    if step.scale == 1.0 or not step.is_first():
        return args, kwargs
    if args:
        return (args[0] * step.scale, *args[1:]), kwargs
    name = "sample" if "sample" in kwargs else "hidden_states"
    return args, kwargs | {name: kwargs[name] * step.scale}


class _ControlledStep:
    """A scheduler's `step` that sees the controlled clean sample."""

    def __init__(self, scheduler: Any, controls: list[Control], scale: float):
        self.scale = scale
        self._scheduler = scheduler
        self._controls = controls
        self._step = scheduler.step
        self.__signature__ = inspect.signature(scheduler.step)  # pipelines look there for eta and generator
        self._names = list(self.__signature__.parameters)[:3]  # model_output, timestep, sample
        self._timesteps: Tensor | None = None
        self._done = 0

    def is_first(self) -> bool:
        """Whether no step was taken yet of the schedule that is set; another one begins a new sample."""
        timesteps = self._scheduler.timesteps
        if self._timesteps is not timesteps or self._done >= len(timesteps):
            self._timesteps, self._done = timesteps, 0
        return self._done == 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        output, timestep, sample = (given.pop(name) for name in self._names)
        rest = args[3:]
        if self.is_first() and self.scale != 1.0:
            sample = sample * self.scale
        begun = getattr(self._scheduler, "begin_index", None) or 0  # of variations, which take the last steps alone
        progress = min(1.0, self._done / max(len(self._scheduler.timesteps) - begun - 1, 1))
        if self._controls:
            output = self._controlled(output, timestep, sample, progress)
        self._done += 1
        return self._step(output, timestep, sample, *rest, **given)

    def _controlled(self, output: Tensor, timestep: Any, sample: Tensor, progress: float) -> Tensor:
        """The model's output of which the clean sample is the controlled one; a learned variance stays."""
        channels = sample.shape[1]
        mean, variance = output[:, :channels].float(), output[:, channels:]
        alpha, sigma = self._level(timestep, sample)
        kind = self._scheduler.config.prediction_type
        noisy = sample.float()
        norm = (alpha**2 + sigma**2) ** 0.5  # 1, or of schedulers that add noise without scaling down sqrt(1 + sigma^2)
        if kind == "epsilon":
            clean = (noisy - sigma * mean) / alpha
        elif kind == "v_prediction":
            clean = (alpha / norm**2) * noisy - (sigma / norm) * mean
        else:
            clean = mean
        held = clean
        for control in self._controls:
            held = control(held, progress)
        if kind == "epsilon":
            mean = (noisy - alpha * held) / max(sigma, SMALLEST_SIGMA)
        elif kind == "v_prediction":
            mean = ((alpha / norm**2) * noisy - held) * norm / max(sigma, SMALLEST_SIGMA)
        else:
            mean = held
        return torch.cat([mean.to(output.dtype), variance], 1)

    def _level(self, timestep: Any, sample: Tensor) -> tuple[float, float]:
        """(alpha, sigma) at which sample = alpha * clean + sigma * noise."""
        scheduler = self._scheduler
        if not hasattr(scheduler, "sigmas"):
            level = scheduler.alphas_cumprod[int(timestep)]
            return float(level**0.5), float((1 - level) ** 0.5)
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        sigma = scheduler.sigmas[scheduler.step_index]
        if hasattr(scheduler, "sigmas_interpol") and not scheduler.state_in_first_order:
            is_ancestral = hasattr(scheduler, "sigmas_up")  # whose lists are shifted by one
            sigma = scheduler.sigmas_interpol[scheduler.step_index - is_ancestral]
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
            alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigma)
            return float(alpha), float(sigma)
        return 1.0, float(sigma)
