"""Lazy imports for tables of choices, so that a table loads nothing heavy."""

from importlib import import_module
from typing import Any, NamedTuple


class Late(NamedTuple):
    """A function or class that is imported on first use.

    Attributes:
        module: its module, as a dotted name.
        name: its name in the module.
    """

    module: str
    name: str

    @property
    def value(self) -> Any:
        """The function or class itself."""
        return getattr(import_module(self.module), self.name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Calls the function or class."""
        return self.value(*arguments, **named)
