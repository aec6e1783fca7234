"""Loads classes from Python files that a user names."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.config.options import UserError, first_line

# modules that user code written for earlier releases imports from
EARLIER_NAMES = {"utils.terms": "utils.models.loss_terms", "utils.records": "utils.config.batch"}


@contextmanager
def running(flag: str, file: str) -> Iterator[None]:
    """Context manager: turns an error in the user's code into a `UserError` that names the flag and its file."""
    try:
        yield
    except (SyntaxError, ImportError, NameError, AttributeError, TypeError, ValueError, OSError, RuntimeError) as error:
        raise UserError(f"--{flag} {file} can't be run: {type(error).__name__}: {first_line(error)}") from error


def load_class(flag: str, file: str, base: type) -> type[Any]:
    """Returns the class defined in a user's Python file.

    Args:
        flag: the flag that names the file.
        file: path of the file.
        base: the class that it must subclass.

    Raises:
        UserError: if the file can't be run, or does not define exactly one subclass of `base`.
    """
    spec = importlib.util.spec_from_file_location(f"{flag}_{Path(file).stem}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for their module there
    for earlier, name in EARLIER_NAMES.items():
        sys.modules.setdefault(earlier, importlib.import_module(name))
    with running(flag, file):
        spec.loader.exec_module(module)
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(each.__name__ for each in found) or "none"
        wanted = f"{base.__module__}.{base.__name__}"
        raise UserError(f"--{flag} {file} must define one subclass of {wanted}, it defines {names}")
    return found[0]
