"""Tests whether a scheduler fits a model's training noise, with a simulated model of a single image.

The prediction of a model that knows a single image is exact: the noise in a noisy sample is known. A scheduler fits
if at each step the noise in the sample, for the timestep that the model receives, has a standard deviation of 1, and
if the last sample is the image. It must also cover the noise levels of training, from the highest to almost none.
"""

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.config.file_names import SCHEDULER_CONFIG
from utils.config.library_errors import reason_of
from utils.config.options import UserError
from utils.diffusion.noise import ForwardProcess
from utils.diffusion.process import is_flow, is_score
from utils.diffusion.samplers import NOISE, changed_scheduler, parameters_of, refuse_rounding
from utils.diffusion.schedulers import SCHEDULER_ERRORS, blamed, scheduler_of
from utils.models.loading import class_of

logger = logging.getLogger(__name__)
EDGE = 32  # edge of the image in pixels
MOST_STEPS = 50  # more steps than this are replaced by FEWER_STEPS
FEWER_STEPS = 10
SPREAD = 0.2  # tolerance of the noise's standard deviation
NEAR = 0.15  # tolerance of the first and last noise level, as angles: correct schedulers are within 0.11
COUNTS = (FEWER_STEPS, MOST_STEPS, 99, 1000)  # numbers of steps tried for the first and last noise level
DISTANCE = 0.2  # mean distance of the result to the image: some schedules end before all noise is gone
CALLED = ("init_noise_sigma", "scale_model_input", "step")  # what diffusers text-to-image pipelines use
SIGMAS = ("sigma_min", "sigma_max", "sigma_data")
Level = Callable[[float], tuple[float, float]]
"""Maps a timestep to (alpha, sigma): a noisy sample is alpha * image + sigma * noise."""


def level_of(scheduler: Any) -> Level | None:
    """Returns the noise levels by timestep of a model trained with this scheduler; None if the config has none."""
    if is_score(scheduler):
        return None
    if is_flow(scheduler):
        count = float(scheduler.config.num_train_timesteps)
        return lambda t: (1 - t / count, t / count)
    if "beta_start" not in scheduler.config and scheduler.config.get("trained_betas") is None:
        return None
    with _silent():
        bar = ForwardProcess(scheduler.config, {}).alphas_cumprod.numpy().astype(np.float64)
    with np.errstate(divide="ignore"):
        log_sigmas = np.minimum(np.log((1 - bar) / bar) / 2, 20.0)

    def level(t: float) -> tuple[float, float]:
        sigma = math.exp(np.interp(t, np.arange(len(bar)), log_sigmas))
        return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)

    return level


def misfit(scheduler: Any, level: Level, kind: str, steps: int, has_variance: bool = True) -> str:
    """Returns why a scheduler does not draw the image of a model with these noise levels, or "" if it does.

    Args:
        kind: the prediction type; "flow" for flow matching.
        steps: the number of denoising steps.
        has_variance: whether the model predicts a variance too, where the scheduler reads one.

    Raises:
        one of `SCHEDULER_ERRORS`: if the scheduler fails.
    """
    make = partial(type(scheduler).from_config, scheduler.config)
    with _silent():
        found = _misfit(make(), level, kind, steps, has_variance)
        return _out_of_range(make(), level, steps) or found


@contextmanager
def _silent() -> Iterator[None]:
    """Context manager: silences diffusers warnings, which are about the trial, not about the run."""
    from diffusers.utils import logging as diffusers_logging

    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)


def _misfit(scheduler: Any, level: Level, kind: str, steps: int, has_variance: bool) -> str:
    """Draws the image, and returns at which step the noise is wrong, or "" if the result is the image."""
    # The scheduler, the image, and what the scheduler's step takes.
    scheduler.set_timesteps(steps)
    refuse_rounding(scheduler, steps)
    if len(scheduler.timesteps) > 2 * MOST_STEPS:
        scheduler.set_timesteps(FEWER_STEPS)
    reads_variance = str(vars(scheduler).get("variance_type") or scheduler.config.get("variance_type") or "")
    known = inspect.signature(scheduler.step).parameters
    drawn = torch.Generator().manual_seed(0)
    extra = {"generator": drawn} if "generator" in known else {}
    image = torch.linspace(-0.9, 0.9, EDGE * EDGE).view(1, 1, EDGE, EDGE).flip(-1)
    pure = torch.randn(image.shape, generator=drawn)
    sample = None

    # Draw with exact predictions, and measure the noise at each step.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for t in scheduler.timesteps:
            alpha, sigma = level(float(t))
            if sample is None:  # as noisy as the model expects at the first timestep
                scale = _scaled(scheduler, torch.ones(1), t).reciprocal()
                start = float(getattr(scheduler, "init_noise_sigma", 1.0)) / float(scale)
                if not sigma - SPREAD < start < 1 + SPREAD:
                    return f"it starts with {start:.3g} times the noise that the model expects"
                sample = (alpha * image + sigma * pure) * scale
            noise = (_scaled(scheduler, sample, t) - alpha * image) / max(sigma, 1e-4)
            spread = float(noise.std())
            if sigma > 0.1 and not abs(spread - 1) < SPREAD:
                return f"at timestep {float(t):g} the sample has {spread:.3g} times the noise that the model expects"
            output = _predicted(kind, image, noise, alpha, sigma)
            if has_variance and reads_variance.startswith("learned"):
                output = torch.cat([output, torch.full_like(output, -float(reads_variance == "learned_range"))], 1)
            sample = scheduler.step(output, t, sample, **extra).prev_sample
    distance = float((sample - image).abs().mean())
    return "" if distance < DISTANCE else f"with exact predictions its result is {distance:.3g} away from the image"


def _out_of_range(scheduler: Any, level: Level, steps: int) -> str:
    """Returns why a scheduler misses noise levels of training at every number of steps, or "" if it covers them.

    A low number of steps may start late or end early; so several numbers are tried, and the widest range counts.
    Schedulers for distilled models may end early: their last step removes all noise.
    """
    # First and last timestep over several numbers of steps.
    count = int(scheduler.config.num_train_timesteps)
    scheduler.set_timesteps(steps)
    lowest = float(scheduler.timesteps.min())
    if lowest <= -1:
        return f"its timesteps go down to {lowest:g}, but the model was trained on 0 to {count - 1}"
    firsts, lasts = [], []
    for each in {steps, *(each for each in (*COUNTS, count - 1, count) if 0 < each <= min(count, max(COUNTS)))}:
        try:
            scheduler.set_timesteps(each)
        except SCHEDULER_ERRORS:
            continue
        firsts.append(float(scheduler.timesteps[0]))
        lasts.append(float(scheduler.timesteps[-1]))
    if min(firsts) > count:
        return f"it starts at timestep {min(firsts):g}, but the model was trained on 0 to {count - 1}"

    def angle(t: float) -> float:
        alpha, sigma = level(t)
        return math.atan2(sigma, alpha)

    # Their noise levels, as angles: 0 for the image, pi / 2 for pure noise.
    first, last = max((t for t in firsts if t <= count), key=angle), min(lasts, key=angle)
    if angle(first) < angle(count - 1) - NEAR:
        return (
            f"it starts from pure noise at timestep {first:g}, where the model expects a sample that is still "
            f"{level(first)[0]:.0%} image ({level(count - 1)[0]:.0%} at the last timestep of training)"
        )
    if angle(last) > angle(0) + NEAR and "original_inference_steps" not in scheduler.config:
        return f"it ends at timestep {last:g}, where {level(last)[1]:.0%} of a sample is noise"
    return ""


def _scaled(scheduler: Any, sample: Tensor, t: Tensor) -> Tensor:
    """The sample as the model receives it."""
    return scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample


def _predicted(kind: str, image: Tensor, noise: Tensor, alpha: float, sigma: float) -> Tensor:
    """The exact prediction of this kind for a noisy sample."""
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return alpha * noise - sigma * image
    return noise - image if kind == "flow" else image


def unfit(scheduler: Any, own: Any) -> str:
    """Returns why a scheduler can't replace a pipeline's own, or "" if it can."""
    try:
        level = level_of(own)
    except UserError:  # a noise schedule that this package does not train with
        level = None
    try:
        if level is not None:
            return misfit(scheduler, level, kind_of(own), FEWER_STEPS)
        scheduler.set_timesteps(FEWER_STEPS)
    except SCHEDULER_ERRORS as error:
        return reason_of(error)
    ours, theirs = (inspect.signature(type(each).__init__).parameters for each in (own, scheduler))
    missing = [name for name in SIGMAS if name in ours and name not in theirs]
    return f"it has no {missing[0]}, which sets the noise levels of the pipeline's scheduler" if missing else ""


def kind_of(scheduler: Any) -> str:
    """Returns the prediction type of a model with this scheduler; "flow" for flow matching."""
    return "flow" if is_flow(scheduler) else str(scheduler.config.get("prediction_type", "epsilon"))


def check_trial_of(
    entry: object, config: Mapping[str, Any], changes: Mapping[str, object], steps: int, where: str, flag: str
) -> bool:
    """Runs `check_text_trial` on a scheduler's config, before the pipeline is loaded.

    Args:
        entry: [library, class] of the scheduler in the pipeline's index.
        config: its config.
        changes: values that replace those of the config.
        steps: the number of denoising steps.
        where: the flag that names the pipeline, and its value.
        flag: the name of the flag that sets the number of steps.

    Returns:
        Whether the class is known and the trial was run.
    """
    from diffusers import SchedulerMixin

    kind = class_of(*[*entry, None, None][:2]) if isinstance(entry, list) else None
    if kind is None or not issubclass(kind, SchedulerMixin):
        return False
    with _silent():
        scheduler = changed_scheduler(scheduler_of(kind, config, {}), changes)
    check_text_trial(scheduler, steps, where, flag)
    return True


def check_text_trial(scheduler: Any, steps: int, where: str, flag: str) -> None:
    """Runs `check_trial` on the scheduler of a text-to-image pipeline, whose UNet predicts no variance.

    Raises:
        UserError: as `check_trial`, or if the scheduler lacks what these diffusers pipelines call.
    """
    lacking = next((f"it has no {name}" for name in CALLED if not hasattr(scheduler, name)), "")
    if not lacking and not {"timestep", "sample"} <= inspect.signature(scheduler.step).parameters.keys():
        lacking = "its steps take other arguments"
    if lacking:
        raise UserError(
            f"{where}: a {type(scheduler).__name__} can't draw with this pipeline: {lacking}; set the scheduler "
            "that the model was trained with, such as a DDIMScheduler"
        )
    check_trial(scheduler, steps, where, flag, has_variance=False)


def check_trial(scheduler: Any, steps: int, where: str, flag: str, has_variance: bool = True) -> None:
    """Refuses a scheduler that fails, and warns of one that does not fit the noise that the model is trained on.

    Args:
        where: the flag that names the pipeline, and its value.
        flag: the name of the flag that sets the number of steps.
        has_variance: whether the model predicts a variance too, where the scheduler reads one.

    Raises:
        UserError: naming the config value that causes the failure, if a single one does, or the number of steps.
    """
    level, name = level_of(scheduler), type(scheduler).__name__
    if level is None:
        return

    tried = partial(_misfit_with_itself, has_variance=has_variance)
    try:
        found = tried(scheduler, steps)
    except SCHEDULER_ERRORS as error:
        fewer = min(FEWER_STEPS, steps - 1, int(scheduler.config.num_train_timesteps))
        if fewer and _takes(partial(tried, scheduler, fewer)):
            raise UserError(f"--{flag} {steps} does not work with the pipeline's {name}: {reason_of(error)}") from error
        value = blamed(type(scheduler), scheduler.config, partial(tried, steps=steps))
        raise UserError(
            f"{where}: its {SCHEDULER_CONFIG}: a {name} can't draw with {value or 'these values'}: {reason_of(error)}"
        ) from error
    _warn_of_misfit(scheduler, found, where, partial(tried, steps=steps))


def warn_of_own(scheduler: Any, steps: int | None, where: str) -> None:
    """Only warns, as `check_trial` does; a scheduler that fails is ignored, because the pipeline may prepare it.

    Args:
        steps: the number of denoising steps; None for one that any scheduler can take.
        where: the flag that names the pipeline, and its value.
    """
    tried = partial(_misfit_with_itself, steps=steps or FEWER_STEPS)
    try:
        found = tried(scheduler)
    except SCHEDULER_ERRORS:
        return
    _warn_of_misfit(scheduler, found, where, tried)


def _misfit_with_itself(scheduler: Any, steps: int, has_variance: bool = True) -> str:
    """`misfit` of a scheduler for a model trained with the scheduler's own config."""
    level = level_of(scheduler)
    return "" if level is None else misfit(scheduler, level, kind_of(scheduler), steps, has_variance)


def _warn_of_misfit(scheduler: Any, found: str, where: str, tried: Callable[[Any], str]) -> None:
    """Warns why a scheduler does not fit, and names the config value that causes it."""
    if not found:
        return

    def fits(each: Any) -> None:
        if reason := tried(each):
            raise UserError(reason)

    config = scheduler.config
    settings = [name for name in parameters_of(type(scheduler)) if name not in NOISE]
    settings.sort(key=lambda name: type(config.get(name)) not in (int, float))  # numbers before switches
    value = blamed(type(scheduler), config, fits, settings)
    cure = f"change {value} in its {SCHEDULER_CONFIG}" if value else "give the pipeline another scheduler"
    logger.warning(
        "%s: its %s does not fit the noise that the model is trained on: %s; %s",
        *(where, type(scheduler).__name__, found, cure),
    )


def _takes(tried: Callable[[], object]) -> bool:
    try:
        tried()
    except SCHEDULER_ERRORS:
        return False
    return True
