"""Which scheduler draws in the place of a pipeline's own: by a short name, or by the name of a class of diffusers."""

import inspect
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from utils.config.options import UserError, first_line
from utils.diffusion.samplers import converted
from utils.diffusion.schedulers import SCHEDULER_ERRORS
from utils.sampling.options import SCHEDULERS, find_scheduler
from utils.sampling.scheduler_trials import CALLED, level_of, unfit

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)
FEW_STEPS = ("LCMScheduler", "TCDScheduler")
"""Schedulers of models distilled to draw in few steps."""


def scheduler_class(name: str) -> tuple[type, dict[str, Any]]:
    """(the class, changes of its config) of a name that `find_scheduler` knows.

    Raises:
        UserError: if there is none of this name.
    """
    import diffusers

    class_name, changes = find_scheduler(name)
    found = getattr(diffusers, class_name, None)
    if not inspect.isclass(found):
        raise UserError(f"--scheduler {name}: this version of diffusers does not have a {class_name}")
    return found, changes


def set_scheduler(pipeline: "DiffusionPipeline", name: str | None) -> None:
    """Gives the pipeline the scheduler of a name that `scheduler_class` knows, with its own settings.

    Raises:
        UserError: if the pipeline can't go with it.
    """
    if name is None:
        return
    kind, changes = scheduler_class(name)
    own, flag = pipeline.scheduler, f"--scheduler {name.strip()}"
    scheduler, reason = _converted(own, kind.__name__, changes)
    if reason:
        known = _compatible(own)
        fitting = [each for each in known if not _converted(own, each, {})[1]]
        shown = [each for each, (of, _) in SCHEDULERS.items() if of in fitting]
        shown += [each for each in fitting if each not in {of for of, _ in SCHEDULERS.values()}]
        raise UserError(
            f"{flag} does not go with this {type(pipeline).__name__}: {reason}; choose one of {', '.join(shown)}"
        )
    scales = abs(float(getattr(scheduler, "init_noise_sigma", 1.0)) - 1) > 1e-6
    if scales and "scale_model_input" not in inspect.getsource(type(pipeline).__call__):
        raise UserError(
            f"{flag} needs its input scaled, which {type(pipeline).__name__} does not do; try ddim or dpm++_2m"
        )
    if kind.__name__ in FEW_STEPS and not _is_distilled(pipeline):
        logger.warning(
            "%s is for models distilled to draw in few steps, which nothing in this pipeline says of it: if it is not "
            "distilled, its images are blurred",
            flag,
        )
    pipeline.scheduler = scheduler


def _is_distilled(pipeline: "DiffusionPipeline") -> bool:
    """Whether a pipeline may draw in few steps: by its scheduler, its embedding of the guidance, or a LoRA."""
    unet = getattr(pipeline, "unet", None)
    is_guided = unet is not None and unet.config.get("time_cond_proj_dim") is not None
    adapters = pipeline.get_list_adapters() if hasattr(pipeline, "get_list_adapters") else {}
    return type(pipeline.scheduler).__name__ in FEW_STEPS or is_guided or any(adapters.values())


def _compatible(scheduler: Any) -> list[str]:
    """The classes that diffusers takes for interchangeable with a scheduler's, whether they draw or not."""
    return sorted({each.__name__ for each in scheduler.compatibles} | {type(scheduler).__name__})


def _converted(own: Any, class_name: str, changes: Mapping[str, Any]) -> tuple[Any, str]:
    """(a scheduler of another class in the place of a pipeline's own, why it does not draw what that does or "").

    Where the noise levels are known, the trial says whether it does; else what diffusers takes for interchangeable.
    """
    import diffusers

    try:
        is_known = level_of(own) is not None
    except UserError:
        is_known = False
    if not is_known and class_name not in _compatible(own):
        return None, f"diffusers cannot use it instead of a {type(own).__name__}"
    try:
        scheduler = converted(own, getattr(diffusers, class_name), **changes)
        lacking = next((each for each in CALLED if hasattr(own, each) and not hasattr(scheduler, each)), None)
        return scheduler, f"it has no {lacking}" if lacking else unfit(scheduler, own)
    except SCHEDULER_ERRORS as error:
        return None, first_line(error)
