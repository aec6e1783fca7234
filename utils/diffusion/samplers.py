"""Which schedulers draw: by a sampler's name, for the same noise and prediction, with the clean estimate in its range.

A model of pixels is drawn with its clean estimate clipped to [-1, 1]. A step is consistent if the noise that it takes
out is what the clipped estimate leaves of the noisy sample. Where a scheduler's config can say so, it does, and then an
exported folder is drawn right by diffusers alone. Where it can't, `utils.sampling.controls` clips at each step.
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
"""How a scheduler that knows dynamic thresholding, and no other clipping, is told to clip to [-1, 1]."""
NOISE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("prediction_type", "clip_sample_range"),
)
"""What of a scheduler's config is a fact of the model, whatever the default of another class."""
CLIPPING = ("clip_sample", "thresholding")
KNOW_SAMPLE = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
"""Classes that draw by a model which predicts the clean sample."""


def parameters_of(scheduler_class: type) -> Mapping[str, inspect.Parameter]:
    """What a scheduler's class takes in its config."""
    return inspect.signature(scheduler_class.__init__).parameters


def clip_range(config: Mapping[str, Any]) -> float | None:
    """The fixed range that a scheduler's config clips clean estimates to; None if it says none."""
    if config.get("thresholding"):
        return 1.0 if config.get("sample_max_value", 1.0) <= 1.0 else None  # a larger one depends on the estimate
    return float(config.get("clip_sample_range") or 1.0) if config.get("clip_sample") else None


def clips_itself(scheduler: Any) -> bool:
    """Whether a scheduler keeps clean estimates in a range: its config says so, and its class reads that."""
    known = parameters_of(type(scheduler))
    return any(scheduler.config.get(name) for name in CLIPPING if name in known)


def converted(scheduler: Any, scheduler_class: type, keeps_defaults: bool = False, **changes: Any) -> Any:
    """A scheduler of another class for the same noise and prediction, which clips if the first one does.

    Args:
        keeps_defaults: whether all values that the first one has by default are kept; they are its config's own after
            saving and loading. Otherwise spacing and the like are as the other class has them by default.
    """
    config, known = dict(scheduler.config), parameters_of(scheduler_class)
    if keeps_defaults:
        config = explicit_config(config)
    limit = clip_range(config) if clips_itself(scheduler) else None
    settings: dict[str, Any] = {name: config[name] for name in NOISE if name in config and name in known}
    if "clip_sample" in known:  # set in any case: DDIM and DDPM clip unless they are told not to
        reads = set(CLIPPING) & set(parameters_of(type(scheduler)))
        settings["clip_sample"] = limit is not None if reads else bool(config.get("clip_sample"))
        if "variance_type" in known and config.get("variance_type") is None:
            settings["variance_type"] = "fixed_small"
    elif "thresholding" in known and limit == 1.0 and not config.get("thresholding"):
        settings |= CLIPS
    return scheduler_class.from_config(config, **settings | changes)


def changed_scheduler(scheduler: Any, changes: Mapping[str, object]) -> Any:
    """The scheduler with some of its config changed, or DDIM where its class can't express what was changed.

    A noise schedule whose name only DDPM knows is given by its betas.
    """
    from diffusers import DDIMScheduler, DDPMScheduler

    if not changes:
        return scheduler
    changes = dict(changes)
    known = parameters_of(type(scheduler))
    expresses = all(name in known for name in changes) and (
        changes.get("prediction_type") != "sample" or type(scheduler).__name__ in KNOW_SAMPLE
    )
    target = type(scheduler) if expresses else DDIMScheduler
    if changes.get("beta_schedule") == "sigmoid" and target is not DDPMScheduler:
        plain = {name: changes[name] for name in ("beta_schedule", "trained_betas")} | {"rescale_betas_zero_snr": False}
        changes["trained_betas"] = converted(scheduler, DDPMScheduler, True, **plain).betas.tolist()
        del changes["beta_schedule"]
    if expresses:
        return target.from_config(explicit_config(scheduler.config), **changes)
    return converted(scheduler, target, True, **changes)


def is_ddim(scheduler: Any) -> bool:
    """Whether a scheduler takes DDIM's steps, under its own name or as DPM-Solver++ of order 1."""
    from diffusers import DDIMScheduler

    return isinstance(scheduler, DDIMScheduler) or is_first_order(scheduler)


def is_first_order(scheduler: Any) -> bool:
    """Whether a scheduler is DPM-Solver++ of order 1 for noise by betas, which is DDIM without noise."""
    config = scheduler.config
    is_solver = type(scheduler).__name__ == "DPMSolverMultistepScheduler" and not config.get("use_flow_sigmas")
    return is_solver and config.solver_order == 1 and config.algorithm_type == "dpmsolver++"


def is_exact(scheduler: Any) -> bool:
    """Whether diffusers' DDIM takes consistent steps by a config: it clips nothing, and any n divides its spacing."""
    return not any(scheduler.config.get(name) for name in CLIPPING) and scheduler.config.timestep_spacing == "leading"


def first_order(scheduler: Any) -> Any:
    """DPM-Solver++ of order 1: DDIM's equation (Lu et al. 2022, section 4) in a class whose steps are consistent.

    It begins at the noisiest timestep and is evenly spaced, whatever the number of steps. It clips by its config alone,
    so that a pipeline which can't say how a step is taken draws right too. A range other than [-1, 1] it can't clip to:
    then the result is DDIM.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if clip_range(scheduler.config) not in (None, 1.0):
        return converted(scheduler, DDIMScheduler, True, **plain_betas(scheduler))
    settings = {
        "solver_order": 1,
        "algorithm_type": "dpmsolver++",
        "timestep_spacing": "linspace",
        "variance_type": None,  # DDIM makes no use of a learned one
        "final_sigmas_type": "zero" if scheduler.config.get("set_alpha_to_one", True) else "sigma_min",
    }
    return converted(scheduler, DPMSolverMultistepScheduler, True, **settings, **plain_betas(scheduler))


def plain_betas(scheduler: Any) -> dict[str, Any]:
    """The betas of a noise schedule whose name DDPM alone knows, as changes of a config; {} of any other."""
    from diffusers import DDPMScheduler

    if scheduler.config.get("beta_schedule") != "sigmoid":
        return {}
    plain = {"rescale_betas_zero_snr": False} if scheduler.config.get("rescale_betas_zero_snr") else {}
    betas = converted(scheduler, DDPMScheduler, True, **plain).betas
    return {"trained_betas": betas.tolist(), "beta_schedule": "linear"}


def exported(scheduler: Any) -> Any:
    """The scheduler that a pipeline is exported with: DDIM, where its steps are not consistent, as DPM-Solver++."""
    from diffusers import DDIMScheduler

    if type(scheduler) is not DDIMScheduler or is_exact(scheduler):
        return scheduler
    found = first_order(scheduler)
    if type(found) is DDIMScheduler:
        said = "the pipeline clips to %g, which diffusers' DDIM does inconsistently: what it draws alone is washed out"
        logger.warning(said, clip_range(scheduler.config))
    return found


def consistent(scheduler: Any, eta: float = 0.0) -> Any:
    """The same scheduler, or one that takes its steps consistently.

    Args:
        eta: share of DDPM's noise that DDIM draws at each step.
    """
    from diffusers import DDIMScheduler

    if not (eta > 0 and is_ddim(scheduler)) and (type(scheduler) is not DDIMScheduler or is_exact(scheduler)):
        return scheduler
    from utils.diffusion.ddim import ConsistentDDIMScheduler

    spacing = {"timestep_spacing": "trailing"} if is_first_order(scheduler) else {}  # DDIM's linspace is another
    found = converted(scheduler, ConsistentDDIMScheduler, True, **spacing, **plain_betas(scheduler))
    found.eta = eta
    return found


def sampler_of(scheduler: Any, name: str | None, eta: float = 0.0) -> Any:
    """A fresh scheduler to draw with, by a sampler's name or like the given one, for the same noise and prediction.

    What its class can't express goes as betas.

    Args:
        eta: share of DDPM's noise that DDIM draws at each step.

    Raises:
        UserError: for a sampler that does not go with them.
    """
    import diffusers

    config = explicit_config(scheduler.config)
    if name is None:
        return consistent(type(scheduler).from_config(config), eta)
    flows = is_flow(scheduler)
    table = FLOW_SAMPLERS if flows else SAMPLERS
    if name not in table or is_score(scheduler):
        cure = f"one of {', '.join(FLOW_SAMPLERS)}" if flows else "left out: a score pipeline has its own"
        raise UserError(f"--sampler must be {cure} here, got {name}")
    sampler_class = getattr(diffusers, table[name])
    if flows:
        return sampler_class(num_train_timesteps=config["num_train_timesteps"], shift=shift_of(config))
    if name == "heun" and config.get("prediction_type") == "sample":
        raise UserError("--sampler heun knows no --prediction_type sample; try ddim or euler")
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in parameters_of(sampler_class):
        raise UserError(f"--sampler {name} can't begin at the noise alone that --rescale_betas_zero_snr ends with")
    if name == "ddim":
        is_own = type(scheduler) is diffusers.DDIMScheduler and is_exact(scheduler)
        found = scheduler if is_own or is_first_order(scheduler) else first_order(scheduler)
        return consistent(type(found).from_config(found.config), eta)
    changes = {} if name == "ddpm" else plain_betas(scheduler)
    if name == "dpmsolver++":
        changes["variance_type"] = None  # who draws takes a learned variance away
        if is_first_order(scheduler):
            changes["solver_order"] = 2
    return converted(scheduler, sampler_class, True, **changes)


def check_steps(scheduler: Any, steps: int) -> None:
    """Refuses a number of steps that a scheduler would not take as such, and warns of one that it begins too late.

    Raises:
        ValueError: naming what is wrong.
    """
    scheduler.set_timesteps(steps)
    refuse_rounding(scheduler, steps)
    count, timesteps = scheduler.config.get("num_train_timesteps"), scheduler.timesteps
    if "timestep_spacing" not in parameters_of(type(scheduler)) or not isinstance(count, int):
        return
    left_out = count - 1 - float(timesteps.max())
    if left_out > min(2 * count / steps, 0.75 * count):
        logger.warning(
            "%d steps of %s begin at timestep %d of %d, where samples are noise alone to the model no longer; a number "
            "that divides %d begins later",
            *(steps, type(scheduler).__name__, float(timesteps.max()), count, count),
        )


def refuse_rounding(scheduler: Any, steps: int) -> None:
    """Refuses timesteps that were set and of which one is below 0; schedulers with sigmas repeat the last one there.

    Raises:
        ValueError: with numbers of steps to try.
    """
    if float(scheduler.timesteps.min()) < 0 and not hasattr(scheduler, "sigmas"):
        raise ValueError(f"by rounding it would end with a timestep of -1; try {steps - 1} or {steps + 1}")


def same_steps(one: Any, other: Any) -> bool:
    """Whether two schedulers are of one class and take the same steps."""
    names = parameters_of(type(one))
    return type(one) is type(other) and all(one.config.get(name) == other.config.get(name) for name in names)


def warn_of_own_sampler(scheduler: Any, sampler: str | None) -> None:
    """Says so where samples are drawn by another sampler than the exported pipeline's."""
    if sampler is None:
        return
    drawn_by = sampler_of(scheduler, sampler)
    if same_steps(scheduler, drawn_by):
        return
    logger.warning(
        "--sampler %s: the run's samples are drawn by %s, but the exported pipeline has %s, and draws others by itself",
        *(sampler, type(drawn_by).__name__, type(scheduler).__name__),
    )
