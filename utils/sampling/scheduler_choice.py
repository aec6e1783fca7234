"""Replaces a pipeline's scheduler by one with a short name, such as euler, or a diffusers class."""

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
"""Schedulers for models distilled to draw in few steps."""


def scheduler_class(name: str) -> tuple[type, dict[str, Any]]:
    """Returns (class, changes to its config) for a name that `find_scheduler` knows.

    Raises:
        UserError: if there is none with this name.
    """
    import diffusers

    class_name, changes = find_scheduler(name)
    found = getattr(diffusers, class_name, None)
    if not inspect.isclass(found):
        raise UserError(f"--scheduler {name}: this version of diffusers does not have a {class_name}")
    return found, changes


def set_scheduler(pipeline: "DiffusionPipeline", name: str | None) -> None:
    """Sets the pipeline's scheduler by a name that `scheduler_class` knows, with the settings of the previous one.

    Raises:
        UserError: if the scheduler does not fit the pipeline; it lists those that do.
    """
    if name is None:
        return

    # Convert the pipeline's scheduler, and try the result.
    kind, changes = scheduler_class(name)
    own, flag = pipeline.scheduler, f"--scheduler {name.strip()}"
    scheduler, reason = _converted(own, kind.__name__, changes)
    if reason:
        known = _compatible(own)
        fitting = [each for each in known if not _converted(own, each, {})[1]]
        shown = [each for each, (of, _) in SCHEDULERS.items() if of in fitting]
        shown += [each for each in fitting if each not in {of for of, _ in SCHEDULERS.values()}]
        raise UserError(
            f"{flag} does not work with this {type(pipeline).__name__}: {reason}; choose one of {', '.join(shown)}"
        )

    # Some schedulers need a call that scales their input, others a distilled model.
    scales = abs(float(getattr(scheduler, "init_noise_sigma", 1.0)) - 1) > 1e-6
    if scales and "scale_model_input" not in inspect.getsource(type(pipeline).__call__):
        raise UserError(
            f"{flag} needs scaled inputs, but {type(pipeline).__name__} does not scale them; try ddim or dpm++_2m"
        )
    if kind.__name__ in FEW_STEPS and not _is_distilled(pipeline):
        logger.warning(
            "%s is for models distilled to draw in few steps, and this pipeline does not seem to be one: if it is not "
            "distilled, its images will be blurred",
            flag,
        )
    pipeline.scheduler = scheduler


def _is_distilled(pipeline: "DiffusionPipeline") -> bool:
    """Whether a pipeline may be distilled: judged by its scheduler, guidance embedding or LoRA."""
    unet = getattr(pipeline, "unet", None)
    is_guided = unet is not None and unet.config.get("time_cond_proj_dim") is not None
    adapters = pipeline.get_list_adapters() if hasattr(pipeline, "get_list_adapters") else {}
    return type(pipeline.scheduler).__name__ in FEW_STEPS or is_guided or any(adapters.values())


def _compatible(scheduler: Any) -> list[str]:
    """The scheduler classes that diffusers declares compatible, whether they draw correctly or not."""
    return sorted({each.__name__ for each in scheduler.compatibles} | {type(scheduler).__name__})


def _converted(own: Any, class_name: str, changes: Mapping[str, Any]) -> tuple[Any, str]:
    """(the scheduler converted to another class, why it does not draw correctly or "").

    If the noise levels of the pipeline's scheduler are known, a trial decides; else diffusers' compatible classes do.
    """
    import diffusers

    try:
        is_known = level_of(own) is not None
    except UserError:
        is_known = False
    if not is_known and class_name not in _compatible(own):
        return None, f"diffusers can't use it instead of a {type(own).__name__}"
    try:
        scheduler = converted(own, getattr(diffusers, class_name), **changes)
        lacking = next((each for each in CALLED if hasattr(own, each) and not hasattr(scheduler, each)), None)
        return scheduler, f"it has no {lacking}" if lacking else unfit(scheduler, own)
    except SCHEDULER_ERRORS as error:
        return None, first_line(error)
