"""What the libraries raise for files and configs that make no sense, in one line."""

import json
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    pass


LOADING_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError)


CONFIG_ERRORS = (
    *(TypeError, AttributeError, KeyError, IndexError, ZeroDivisionError, NotImplementedError),
    *(RecursionError, OverflowError, AssertionError),
)
"""What the constructors of the libraries raise for configs that make no sense: they check nothing themselves."""


def reason_of(error: BaseException) -> str:
    """An error's message in one line: its first, and the next one where the first only announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    text = text.partition(" If you want to instead overwrite")[0]  # diffusers' advice for programmers
    return f"{type(error).__name__}: {text}" if isinstance(error, CONFIG_ERRORS) else text or type(error).__name__


def short(value: Any) -> str:
    """A value of a config as it is shown in a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "…"
