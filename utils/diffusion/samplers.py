"""Chooses the scheduler for sampling, by name, for the model's noise schedule, prediction type and clipping.

Pixel-space models are sampled with the clean estimate clipped to [-1, 1]. A step is consistent if it removes exactly
the noise that the clipped estimate implies. If a scheduler's config can express this, it does, so that diffusers alone
samples correctly from an exported pipeline. Otherwise `utils.sampling.controls` clips at each step.
"""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from utils.config.options import UserError
from utils.diffusion.options import SAMPLERS
from utils.diffusion.process import is_flow, is_score, shift_of
from utils.diffusion.schedulers import explicit_config

logger = logging.getLogger(__name__)
FLOW_SAMPLERS = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}
CLIPS = {"thresholding": True, "dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0}
"""Settings that make a scheduler which only supports dynamic thresholding clip to [-1, 1]."""
NOISE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("prediction_type", "clip_sample_range"),
)
"""Config keys that describe the model and so carry over to a scheduler of another class, despite its defaults."""
CLIPPING = ("clip_sample", "thresholding")
KNOW_SAMPLE = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
"""Scheduler classes that support prediction type `sample`."""


def parameters_of(scheduler_class: type) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a scheduler's class, which are its config keys."""
    return inspect.signature(scheduler_class.__init__).parameters


def clip_range(config: Mapping[str, Any]) -> float | None:
    """Returns the fixed limit that a scheduler's config clips clean estimates to; None if it has none."""
    if config.get("thresholding"):
        return 1.0 if config.get("sample_max_value", 1.0) <= 1.0 else None  # otherwise it depends on the estimate
    return float(config.get("clip_sample_range") or 1.0) if config.get("clip_sample") else None


def clips_itself(scheduler: Any) -> bool:
    """Whether a scheduler clips clean estimates: its config asks for it, and its class supports it."""
    known = parameters_of(type(scheduler))
    return any(scheduler.config.get(name) for name in CLIPPING if name in known)


def converted(scheduler: Any, scheduler_class: type, keeps_defaults: bool = False, **changes: Any) -> Any:
    """Converts a scheduler to another class with the same noise schedule, prediction type and clipping.

    Args:
        scheduler: the scheduler to convert.
        scheduler_class: the class of the result.
        keeps_defaults: whether to keep values that are defaults of the old class, as after saving and loading.
            Otherwise settings such as the timestep spacing take the defaults of the new class.
        changes: config values that override the others.
    """
    config, known = dict(scheduler.config), parameters_of(scheduler_class)
    if keeps_defaults:
        config = explicit_config(config)
    limit = clip_range(config) if clips_itself(scheduler) else None
    settings: dict[str, Any] = {name: config[name] for name in NOISE if name in config and name in known}
    if "clip_sample" in known:  # always set it, as DDIM and DDPM clip by default
        reads = set(CLIPPING) & set(parameters_of(type(scheduler)))
        settings["clip_sample"] = limit is not None if reads else bool(config.get("clip_sample"))
        if "variance_type" in known and config.get("variance_type") is None:
            settings["variance_type"] = "fixed_small"
    elif "thresholding" in known and limit == 1.0 and not config.get("thresholding"):
        settings |= CLIPS
    return scheduler_class.from_config(config, **settings | changes)


def changed_scheduler(scheduler: Any, changes: Mapping[str, object]) -> Any:
    """Returns the scheduler with config changes, or a DDIM scheduler if its class does not support them.

    The sigmoid noise schedule, which only DDPM supports by name, is passed to other classes as betas.
    """
    from diffusers import DDIMScheduler, DDPMScheduler

    # choose the class
    if not changes:
        return scheduler
    changes = dict(changes)
    known = parameters_of(type(scheduler))
    expresses = all(name in known for name in changes) and (
        changes.get("prediction_type") != "sample" or type(scheduler).__name__ in KNOW_SAMPLE
    )
    target = type(scheduler) if expresses else DDIMScheduler

    # replace the name of the sigmoid schedule by its betas
    if changes.get("beta_schedule") == "sigmoid" and target is not DDPMScheduler:
        plain = {name: changes[name] for name in ("beta_schedule", "trained_betas")} | {"rescale_betas_zero_snr": False}
        changes["trained_betas"] = converted(scheduler, DDPMScheduler, True, **plain).betas.tolist()
        del changes["beta_schedule"]
    if expresses:
        return target.from_config(explicit_config(scheduler.config), **changes)
    return converted(scheduler, target, True, **changes)


def is_ddim(scheduler: Any) -> bool:
    """Whether a scheduler takes DDIM's steps, as DDIM or as first-order DPM-Solver++."""
    from diffusers import DDIMScheduler

    return isinstance(scheduler, DDIMScheduler) or is_first_order(scheduler)


def is_first_order(scheduler: Any) -> bool:
    """Whether a scheduler is first-order DPM-Solver++ with a beta schedule, which equals deterministic DDIM."""
    config = scheduler.config
    is_solver = type(scheduler).__name__ == "DPMSolverMultistepScheduler" and not config.get("use_flow_sigmas")
    return is_solver and config.solver_order == 1 and config.algorithm_type == "dpmsolver++"


def is_exact(scheduler: Any) -> bool:
    """Whether diffusers' DDIM takes consistent steps: it does not clip, and its spacing suits any number of steps."""
    return not any(scheduler.config.get(name) for name in CLIPPING) and scheduler.config.timestep_spacing == "leading"


def first_order(scheduler: Any) -> Any:
    """Converts a scheduler to first-order DPM-Solver++: DDIM's equation (Lu et al. 2022, section 4), consistent steps.

    Its timesteps start at the noisiest one and are evenly spaced for any number of steps. Its clipping is set in its
    config, so it also works in pipelines that pass no arguments to `step`. It only clips to [-1, 1]; for another range
    the result is DDIM.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if clip_range(scheduler.config) not in (None, 1.0):
        return converted(scheduler, DDIMScheduler, True, **plain_betas(scheduler))
    settings = {
        "solver_order": 1,
        "algorithm_type": "dpmsolver++",
        "timestep_spacing": "linspace",
        "variance_type": None,  # DDIM does not use a learned variance
        "final_sigmas_type": "zero" if scheduler.config.get("set_alpha_to_one", True) else "sigma_min",
    }
    return converted(scheduler, DPMSolverMultistepScheduler, True, **settings, **plain_betas(scheduler))


def plain_betas(scheduler: Any) -> dict[str, Any]:
    """Returns config changes that give the sigmoid noise schedule as betas, as only DDPM knows its name; else {}."""
    from diffusers import DDPMScheduler

    if scheduler.config.get("beta_schedule") != "sigmoid":
        return {}
    plain = {"rescale_betas_zero_snr": False} if scheduler.config.get("rescale_betas_zero_snr") else {}
    betas = converted(scheduler, DDPMScheduler, True, **plain).betas
    return {"trained_betas": betas.tolist(), "beta_schedule": "linear"}


def exported(scheduler: Any) -> Any:
    """Returns the scheduler to export a pipeline with: DPM-Solver++ in place of DDIM with inconsistent steps."""
    from diffusers import DDIMScheduler

    if type(scheduler) is not DDIMScheduler or is_exact(scheduler):
        return scheduler
    found = first_order(scheduler)
    if type(found) is DDIMScheduler:
        told = "the pipeline clips to %g, which diffusers' DDIM does inconsistently: its samples will look washed out"
        logger.warning(told, clip_range(scheduler.config))
    return found


def consistent(scheduler: Any, eta: float = 0.0) -> Any:
    """Returns the scheduler itself, or an equivalent one with consistent steps.

    Args:
        scheduler: the scheduler to sample with.
        eta: portion of DDPM's noise that DDIM adds at each step; other samplers ignore it.
    """
    from diffusers import DDIMScheduler

    if not (eta > 0 and is_ddim(scheduler)) and (type(scheduler) is not DDIMScheduler or is_exact(scheduler)):
        return scheduler
    from utils.diffusion.ddim import ConsistentDDIMScheduler

    spacing = {"timestep_spacing": "trailing"} if is_first_order(scheduler) else {}  # DDIM's linspace differs
    found = converted(scheduler, ConsistentDDIMScheduler, True, **spacing, **plain_betas(scheduler))
    found.eta = eta
    return found


def sampler_of(scheduler: Any, name: str | None, eta: float = 0.0) -> Any:
    """Returns a new scheduler to sample with, for the noise schedule and prediction type of the given one.

    Args:
        scheduler: the pipeline's scheduler.
        name: a choice of --sampler, or None for the pipeline's own.
        eta: portion of DDPM's noise that DDIM adds at each step.

    Raises:
        UserError: for a sampler that does not support the model.
    """
    import diffusers

    # the pipeline's own sampler
    config = explicit_config(scheduler.config)
    if name is None:
        return consistent(type(scheduler).from_config(config), eta)

    # refuse samplers that do not support the model
    flows = is_flow(scheduler)
    table = FLOW_SAMPLERS if flows else SAMPLERS
    if name not in table or is_score(scheduler):
        cure = f"one of {', '.join(FLOW_SAMPLERS)}" if flows else "left out: a score pipeline has its own"
        raise UserError(f"--sampler must be {cure} here, got {name}")
    sampler_class = getattr(diffusers, table[name])
    if flows:
        return sampler_class(num_train_timesteps=config["num_train_timesteps"], shift=shift_of(config))
    if name == "heun" and config.get("prediction_type") == "sample":
        raise UserError("--sampler heun does not support --prediction_type sample; try ddim or euler")
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in parameters_of(sampler_class):
        raise UserError(
            f"--sampler {name} can't start at zero SNR, where --rescale_betas_zero_snr ends; try ddim or euler"
        )

    # convert the pipeline's scheduler
    if name == "ddim":
        is_own = type(scheduler) is diffusers.DDIMScheduler and is_exact(scheduler)
        found = scheduler if is_own or is_first_order(scheduler) else first_order(scheduler)
        return consistent(type(found).from_config(found.config), eta)
    changes = {} if name == "ddpm" else plain_betas(scheduler)
    if name == "dpmsolver++":
        changes["variance_type"] = None  # the caller drops a learned variance
        if is_first_order(scheduler):
            changes["solver_order"] = 2
    return converted(scheduler, sampler_class, True, **changes)


def check_steps(scheduler: Any, steps: int) -> None:
    """Refuses a number of steps that a scheduler can't take, and warns if its first timestep is not noisy enough.

    Raises:
        ValueError: saying what is wrong.
    """
    scheduler.set_timesteps(steps)
    refuse_rounding(scheduler, steps)
    count, timesteps = scheduler.config.get("num_train_timesteps"), scheduler.timesteps
    if "timestep_spacing" not in parameters_of(type(scheduler)) or not isinstance(count, int):
        return
    left_out = count - 1 - float(timesteps.max())
    if left_out > min(2 * count / steps, 0.75 * count):
        logger.warning(
            "%d steps of %s start at timestep %d of %d, where the model no longer expects pure noise; a number of "
            "steps that divides %d starts at a noisier timestep",
            *(steps, type(scheduler).__name__, float(timesteps.max()), count, count),
        )


def refuse_rounding(scheduler: Any, steps: int) -> None:
    """Refuses a timestep below 0 among those that were set; schedulers with sigmas repeat the last one instead.

    Raises:
        ValueError: with numbers of steps to try.
    """
    if float(scheduler.timesteps.min()) < 0 and not hasattr(scheduler, "sigmas"):
        raise ValueError(f"rounding would give a last timestep of -1; try {steps - 1} or {steps + 1}")


def same_steps(one: Any, other: Any) -> bool:
    """Whether two schedulers have the same class and the same settings."""
    names = parameters_of(type(one))
    return type(one) is type(other) and all(one.config.get(name) == other.config.get(name) for name in names)


def warn_of_own_sampler(scheduler: Any, sampler: str | None) -> None:
    """Warns if the run's samples use another sampler than the exported pipeline."""
    if sampler is None:
        return
    drawn_by = sampler_of(scheduler, sampler)
    if same_steps(scheduler, drawn_by):
        return
    logger.warning(
        "--sampler %s: the run samples with %s, but the exported pipeline has %s, so its images will differ",
        *(sampler, type(drawn_by).__name__, type(scheduler).__name__),
    )
