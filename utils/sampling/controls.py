"""Controls on the samples of a pipeline while it draws them: callbacks on each denoising step.

A control receives the clean sample that a step predicts, and may change it before the scheduler takes the step. It
works with any prediction type. `SamplingControls.attached(pipeline)` is a context manager for any call of any pipeline;
evaluation and the samples drawn during training both use it. Even without options it keeps the steps consistent: it
clips the predicted clean samples for schedulers that should clip them but can't.
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
    """A callback that may change the clean sample that a step predicts."""

    @abstractmethod
    def __call__(self, clean: Tensor, progress: float) -> Tensor:
        """Returns the clean sample [B, C, h, w] that the step uses.

        Args:
            clean: [B, C, h, w], the predicted clean sample.
            progress: from 0 at the first step to 1 at the last.
        """


class DynamicThresholding(Control):
    """Dynamic thresholding of Imagen (Saharia et al. 2022, section 2.3): x -> clip(x, -s, s) * limit / s.

    s is a percentile of |x|, for each image. Images whose s is within the limit do not change.
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
    """Applies another control to the decoded image of a latent; images that it does not change keep their latents."""

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
    """Clips to a bound that changes linearly from the first step to the last."""

    def __init__(self, start: float, end: float):
        self._start = start
        self._end = end

    def __call__(self, clean: Tensor, progress: float) -> Tensor:
        bound = self._start + (self._end - self._start) * progress
        return clean.clamp(-bound, bound)


class Clipping(Control):
    """Clips to the range of the clean samples that the model was trained on."""

    def __init__(self, limit: float):
        self._limit = limit

    def __call__(self, clean: Tensor, progress: float) -> Tensor:
        return clean.clamp(-self._limit, self._limit)


class SamplingControls:
    """The controls that the options ask for."""

    def __init__(self, options: SamplingControlOptions | None = None):
        self._options = options or SamplingControlOptions()

    @property
    def are_on(self) -> bool:
        """Whether any control is requested."""
        options = self._options
        asked = options.dynamic_thresholding is not None or options.clamp_start is not None
        return asked or options.initial_noise_scale != 1.0

    @property
    def noise_scale(self) -> float:
        """The factor by which the initial noise is multiplied."""
        return self._options.initial_noise_scale

    def facts(self) -> dict[str, object]:
        """The requested options as JSON; empty if none is requested."""
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
                    "--thresholding_space pixel decodes the latents at each step, and this VAE overflows in fp16; use "
                    "bf16, or --thresholding_space latent"
                )
            controls.append(control if vae is None or in_latents else InPixels(control, LatentSpace(vae)))
        if options.clamp_start is not None:
            controls.append(ProgressiveClamping(options.clamp_start, options.clamp_end))
        return controls

    def check(self, scheduler: Any) -> None:
        """Checks that the steps of a scheduler can be controlled.

        Raises:
            UserError: if they can't; it names the schedulers that can be controlled.
        """
        name = type(scheduler).__name__
        if self.are_on and name.removeprefix("Consistent") not in CONTROLLED:
            known = ", ".join(each.removesuffix("Scheduler") for each in CONTROLLED)
            raise UserError(f"--scheduler {name} does not support sampling controls; choose one of {known}")

    @contextmanager
    def attached(self, pipeline: "DiffusionPipeline", scheduler: Any = None, eta: float = 0.0) -> Iterator[None]:
        """Context manager: applies the controls to each step of the pipeline, or of its denoiser with `scheduler`.

        Steps are consistent even without controls: see `utils.diffusion.samplers`.

        Args:
            scheduler: the scheduler that draws; by default the pipeline's.
            eta: DDIM's eta, the share of DDPM's noise that is added at each step; it applies to DDIM only.
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
    """Returns the pipeline's scheduler, or a copy that takes consistent steps.

    A text-to-image pipeline keeps a DDIM scheduler that does not clip, so that its images equal those of diffusers.
    """
    scheduler = pipeline.scheduler
    draws_text = hasattr(pipeline, "tokenizer")
    return scheduler if draws_text and not eta and not clips_itself(scheduler) else consistent(scheduler, eta)


def draws_pixels(pipeline: "DiffusionPipeline") -> bool:
    """Whether a pipeline denoises pixels, not a VAE's latents."""
    return not any(hasattr(pipeline, name) for name in ("vae", "vqvae"))


def _clipping(pipeline: "DiffusionPipeline", scheduler: Any) -> list[Control]:
    """The control that clips for a scheduler of a pixel pipeline that should clip, but whose class can't."""
    limit = clip_range(scheduler.config) if draws_pixels(pipeline) and not clips_itself(scheduler) else None
    if limit is None:
        return []
    if type(scheduler).__name__ not in CLIPPABLE:
        said = "%s does not clip the predicted clean samples, which this pipeline needs: colours may be wrong"
        logger.warning(said, type(scheduler).__name__)
        return []
    return [Clipping(limit)]


@contextmanager
def controllable(controls: SamplingControls, pipeline: "DiffusionPipeline") -> Iterator[None]:
    """Context manager: the pipeline uses DDIM if controls are on and its own scheduler does not support them."""
    from diffusers import DDIMScheduler

    own = pipeline.scheduler
    if controls.are_on and type(own).__name__ not in CONTROLLED:
        pipeline.scheduler = converted(own, DDIMScheduler)
    try:
        yield
    finally:
        pipeline.scheduler = own


def _scale_input(step: "_ControlledStep", _: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook: multiplies the denoiser's input by the noise scale before the first step."""
    if step.scale == 1.0 or not step.is_first():
        return args, kwargs
    if args:
        return (args[0] * step.scale, *args[1:]), kwargs
    name = "sample" if "sample" in kwargs else "hidden_states"
    return args, kwargs | {name: kwargs[name] * step.scale}


class _ControlledStep:
    """Replaces a scheduler's `step`: applies the controls to the predicted clean sample first."""

    def __init__(self, scheduler: Any, controls: list[Control], scale: float):
        self.scale = scale
        self._scheduler = scheduler
        self._controls = controls
        self._step = scheduler.step
        self.__signature__ = inspect.signature(scheduler.step)  # pipelines inspect it for eta and generator
        self._names = list(self.__signature__.parameters)[:3]  # model_output, timestep, sample
        self._timesteps: Tensor | None = None
        self._done = 0

    def is_first(self) -> bool:
        """Whether the next step is the first of its schedule; setting new timesteps begins a new sample."""
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
        begun = getattr(self._scheduler, "begin_index", None) or 0  # image-to-image takes only the last steps
        progress = min(1.0, self._done / max(len(self._scheduler.timesteps) - begun - 1, 1))
        if self._controls:
            output = self._controlled(output, timestep, sample, progress)
        self._done += 1
        return self._step(output, timestep, sample, *rest, **given)

    def _controlled(self, output: Tensor, timestep: Any, sample: Tensor, progress: float) -> Tensor:
        """The model output that corresponds to the controlled clean sample; a learned variance stays as it is."""
        # The clean sample, from the model output and the noisy sample.
        channels = sample.shape[1]
        mean, variance = output[:, :channels].float(), output[:, channels:]
        alpha, sigma = self._level(timestep, sample)
        kind = self._scheduler.config.prediction_type
        noisy = sample.float()
        norm = (alpha**2 + sigma**2) ** 0.5  # 1, or sqrt(1 + sigma^2) for schedulers that do not scale the sample down
        if kind == "epsilon":
            clean = (noisy - sigma * mean) / alpha
        elif kind == "v_prediction":
            clean = (alpha / norm**2) * noisy - (sigma / norm) * mean
        else:
            clean = mean
        # The controls, then the model output that predicts their result.
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
            is_ancestral = hasattr(scheduler, "sigmas_up")  # their lists are shifted by one
            sigma = scheduler.sigmas_interpol[scheduler.step_index - is_ancestral]
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
            alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigma)
            return float(alpha), float(sigma)
        return 1.0, float(sigma)
