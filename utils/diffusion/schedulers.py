"""Builds diffusers schedulers from a user's config, with errors that name the faulty value."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from utils.config.file_names import SCHEDULER_CONFIG
from utils.config.library_errors import CONFIG_ERRORS, LOADING_ERRORS, reason_of, short
from utils.config.options import UserError

SCHEDULER_ERRORS = (*LOADING_ERRORS, *CONFIG_ERRORS, ImportError, UserError)
"""Errors that diffusers' schedulers raise for invalid configs and numbers of steps."""


def explicit_config(config: Mapping) -> dict[str, object]:
    """Returns a scheduler's config with its class's defaults as explicit values, as after saving and loading.

    Otherwise `from_config` of another class would replace them by its own defaults: beta_start is 0.00085 for Heun and
    0.0001 for DDPM.
    """
    return {name: value for name, value in config.items() if name != "_use_default_values"}


def blamed(kind: type, config: Mapping, tried: Callable[[Any], object], settings: Sequence[str] | None = None) -> str:
    """Returns the value of a scheduler's config that causes an error, as "key value": with its default there is none.

    Args:
        kind: the scheduler's class.
        config: the config that causes the error.
        tried: raises one of `SCHEDULER_ERRORS` for a scheduler that can't be used.
        settings: the keys that may cause it, the likeliest first; None for all.

    Returns:
        "" if no single value causes the error.
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
    """Returns a scheduler of a class from a user's config with changes.

    Raises:
        UserError: naming the faulty value, if the class can't use the config.
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
