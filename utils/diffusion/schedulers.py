"""Schedulers of diffusers by a user's config."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from utils.config.file_names import SCHEDULER_CONFIG
from utils.config.library_errors import CONFIG_ERRORS, LOADING_ERRORS, reason_of, short
from utils.config.options import UserError

SCHEDULER_ERRORS = (*LOADING_ERRORS, *CONFIG_ERRORS, ImportError, UserError)
"""What diffusers' schedulers raise for configs and numbers of steps that make no sense to them."""


def explicit_config(config: Mapping) -> dict[str, object]:
    """A scheduler's config, in which values that are its class's defaults count as values of its own.

    `from_config` of another class would put its own defaults in their place: Heun's betas begin at 0.00085, DDPM's at
    0.0001. A config that was saved and loaded has all its values too.
    """
    return {name: value for name, value in config.items() if name != "_use_default_values"}


def blamed(kind: type, config: Mapping, tried: Callable[[Any], object], settings: Sequence[str] | None = None) -> str:
    """The one value of a scheduler's config that is to blame, as `key value`: with its default all is well; else "".

    Args:
        kind: the scheduler's class.
        tried: raises one of `SCHEDULER_ERRORS` for a scheduler that can't be used.
        settings: the names that may be to blame, the likeliest first; None for all.
    """
    known = inspect.signature(kind.__init__).parameters
    settings = list(known) if settings is None else settings
    for name in (name for name in settings if name in config and config[name] != known[name].default):
        try:
            tried(kind.from_config({**explicit_config(config), name: known[name].default}))
        except SCHEDULER_ERRORS:
            continue
        return f"{name} {short(config[name])}"
    return ""


def scheduler_of(kind: type, config: Mapping, changes: Mapping[str, object]) -> Any:
    """A scheduler of a class by a user's config, whose defaults are its own.

    Raises:
        UserError: naming the value that is to blame, if the class makes none of it.
    """
    config = {**explicit_config(config), **changes}
    try:
        return kind.from_config(config)
    except SCHEDULER_ERRORS as error:
        value = blamed(kind, config, lambda scheduler: scheduler)
        raise UserError(
            f"the pipeline's {SCHEDULER_CONFIG}: {value or 'its values'} can't be used by a {kind.__name__}: "
            f"{reason_of(error)}"
        ) from error
