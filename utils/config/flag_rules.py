"""Rules declared with a flag: whether a resumed run may change it, and which other flags it needs."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatch

SECRET_OPTIONS = ("hub_token",)


class Resume(Enum):
    """Whether a resumed run may change the flag, and why. A flag without a rule is FIXED."""

    FIXED = "it changes what is trained; --allow_changed_options allows resuming anyway"
    STRUCTURE = "the checkpoint's weights and optimizer state fit no other value"
    COMPARED = "its effects are compared directly: the data, the global batch, the precision, the seed"
    LENGTH = "length of the run"
    SAVING = "where and when results and state are written"
    REPORTING = "what is measured, sampled and logged during training"
    AVERAGING = "averages of the weights do not affect training"
    COST = "memory, speed and how work is distributed; changes results by rounding at most"

    @property
    def is_free(self) -> bool:
        """Whether a resumed run may change the value."""
        return self not in (Resume.FIXED, Resume.STRUCTURE)


class Partner(ABC):
    """A condition on another flag that must hold for a flag to have an effect."""

    name: str

    @abstractmethod
    def holds(self, values: Mapping[str, object], defaults: Mapping[str, object]) -> bool:
        """Whether the condition holds for a script's flag values, by name."""

    @property
    @abstractmethod
    def words(self) -> str:
        """Text for messages: what the user must give."""


@dataclass(frozen=True)
class Given(Partner):
    """The flag is given."""

    name: str

    def holds(self, values: Mapping[str, object], defaults: Mapping[str, object]) -> bool:
        """Whether the value differs from the default."""
        return values[self.name] != defaults[self.name]

    @property
    def words(self) -> str:
        """Text for messages: the flag."""
        return f"--{self.name}"


@dataclass(frozen=True)
class Absent(Given):
    """The flag is not given."""

    def holds(self, values: Mapping[str, object], defaults: Mapping[str, object]) -> bool:
        """Whether the value is the default."""
        return not super().holds(values, defaults)

    @property
    def words(self) -> str:
        """Text for messages: the flag must be left out."""
        return f"no --{self.name}"


@dataclass(frozen=True)
class Is(Partner):
    """The flag has a value, or one that matches an `fnmatch` pattern."""

    name: str
    pattern: str

    def holds(self, values: Mapping[str, object], defaults: Mapping[str, object]) -> bool:
        """Whether the value matches the pattern."""
        return fnmatch(str(values[self.name]), self.pattern)

    @property
    def words(self) -> str:
        """Text for messages: the flag and its value, or just "a file" for a pattern of file extensions."""
        return f"a file as --{self.name}" if self.pattern.startswith("*") else f"--{self.name} {self.pattern}"


@dataclass(frozen=True)
class IsNot(Partner):
    """The flag has none of the listed values."""

    name: str
    values: tuple[str, ...]

    def holds(self, values: Mapping[str, object], defaults: Mapping[str, object]) -> bool:
        """Whether the value is not listed."""
        return str(values[self.name]) not in self.values

    @property
    def words(self) -> str:
        """Text for messages: the flag and the values it must not have."""
        return f"--{self.name} other than {' and '.join(self.values)}"


@dataclass(frozen=True)
class Lists(Partner):
    """The flag's list contains at least one of some words.

    Attributes:
        by_default: the list used if the flag is not given.
    """

    name: str
    any_of: tuple[str, ...]
    by_default: tuple[str, ...] = ()

    def holds(self, values: Mapping[str, object], defaults: Mapping[str, object]) -> bool:
        """Whether the list contains one of the words."""
        value = values[self.name]
        return any(word in self.any_of for word in (value if isinstance(value, list) else self.by_default))

    @property
    def words(self) -> str:
        """Text for messages: the flag and up to four of the words."""
        shown = self.any_of[:4]
        return f"--{self.name} with {', '.join(shown)}" + (" or others" if len(shown) < len(self.any_of) else "")


@dataclass(frozen=True)
class OnHub(Partner):
    """The flag names a repository on the Hub rather than a local path."""

    name: str

    def holds(self, values: Mapping[str, object], defaults: Mapping[str, object]) -> bool:
        """Whether there is no such local file or folder."""
        value = values[self.name]
        return isinstance(value, str) and not os.path.exists(value)

    @property
    def words(self) -> str:
        """Text for messages: the flag, and that it must be a Hub name."""
        return f"a Hub name as --{self.name}"


def partner_of(said: str | Partner) -> Partner:
    """Expands a condition: `flag` is short for `Given`, `flag=pattern` for `Is`."""
    if isinstance(said, Partner):
        return said
    name, has_pattern, pattern = said.partition("=")
    return Is(name, pattern) if has_pattern else Given(name)


@dataclass(frozen=True)
class FlagRules:
    """The rules declared for a flag.

    Attributes:
        resume: whether a resumed run may change it.
        engines: for engines that do not support it, by engine name: why, or what to do instead.
        acts_with: conditions of which one must hold for the flag to have an effect; empty if it needs none.
    """

    resume: Resume
    engines: Mapping[str, str]
    acts_with: tuple[Partner, ...]

    @classmethod
    def of(cls, resume: Resume, engines: Mapping[str, str], acts_with: Sequence[str | Partner]) -> "FlagRules":
        """Builds the rules from the arguments of `option`."""
        return cls(resume, dict(engines), tuple(map(partner_of, acts_with)))
