"""Exceptions that libraries raise for invalid files and configs, and their messages in one line."""

import json
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

LOADING_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError)
CONVERSION_ERRORS = (KeyError, IndexError, ValueError, RuntimeError)
"""Exceptions that diffusers' key tables raise for names and shapes that they have no place for."""
CONFIG_ERRORS = (
    *(TypeError, AttributeError, KeyError, IndexError, ZeroDivisionError, NotImplementedError),
    *(RecursionError, OverflowError, AssertionError),
)
"""Exceptions that library constructors raise for invalid configs, which they do not validate."""


def reason_of(error: BaseException) -> str:
    """Returns an error's message in one line: the first, plus the second if the first only announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    text = text.partition(" If you want to instead overwrite")[0]  # diffusers' advice for developers
    return f"{type(error).__name__}: {text}" if isinstance(error, CONFIG_ERRORS) else text or type(error).__name__


def short(value: Any) -> str:
    """Returns a config value as shown in a message, cut to 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "…"
