"""`--help` without torch, whose import takes nearly all of its time: placeholders stand in for what is not asked."""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HELP = {"-h", "--help"}


def without_torch(words: Sequence[str]) -> None:
    """Has a process whose arguments ask for its help, after which it ends, do without torch."""
    if HELP & set(words) and "--" not in words:
        sys.meta_path.insert(0, _Finder())


class _Placeholder(ModuleType):
    """A module of torch, or what is in one: modules that take it for a class, a type or a decorator can be imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Placeholder(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[()]:
        return ()


class _Finder(MetaPathFinder, Loader):
    """Finds placeholders for torch and all that is in it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torch" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leaves it empty."""
