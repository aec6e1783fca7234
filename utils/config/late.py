"""What a table names and only its use imports, so that tables of choices load nothing heavy."""

from importlib import import_module
from typing import Any, NamedTuple


class Late(NamedTuple):
    """A function or class that is imported when it is first needed.

    Attributes:
        module: its module, in dots.
        name: its name there.
    """

    module: str
    name: str

    @property
    def value(self) -> Any:
        """The function or class itself."""
        return getattr(import_module(self.module), self.name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Calls it."""
        return self.value(*arguments, **named)
