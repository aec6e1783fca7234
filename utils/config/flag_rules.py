"""What is declared of a flag beside its value: whether a resumed run may change it, and what it acts with."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatch

SECRET_OPTIONS = ("hub_token",)


class Resume(Enum):
    """Whether a resumed run may have another value than its checkpoint, and why. A flag without a rule is fixed."""

    FIXED = "it changes what is trained; --allow_changed_options lets a run resume all the same"
    STRUCTURE = "the checkpoint's weights and optimizer state fit no other value"
    COMPARED = "what follows from it is compared itself: the data, the global batch, the precision, the seed"
    LENGTH = "how long the run is"
    SAVING = "where and when results and state are written"
    REPORTING = "what is measured, drawn and logged beside the training"
    AVERAGING = "averages of the weights stand beside the training"
    COST = "memory, time and how work is spread, which change numbers by rounding at most"

    @property
    def is_free(self) -> bool:
        """Whether the value may be another one."""
        return self not in (Resume.FIXED, Resume.STRUCTURE)


class Partner(ABC):
    """A condition on another flag, under which a flag changes something."""

    name: str

    @abstractmethod
    def holds(self, values: Mapping[str, object], defaults: Mapping[str, object]) -> bool:
        """Whether the flags of a script, by their names, fulfil it."""

    @property
    @abstractmethod
    def words(self) -> str:
        """What a user must give, in words."""


@dataclass(frozen=True)
class Given(Partner):
    """The flag is given."""

    name: str

    def holds(self, values: Mapping[str, object], defaults: Mapping[str, object]) -> bool:
        """Whether it has another value than its default."""
        return values[self.name] != defaults[self.name]

    @property
    def words(self) -> str:
        """The flag."""
        return f"--{self.name}"


@dataclass(frozen=True)
class Absent(Given):
    """The flag is left out."""

    def holds(self, values: Mapping[str, object], defaults: Mapping[str, object]) -> bool:
        """Whether it has its default."""
        return not super().holds(values, defaults)

    @property
    def words(self) -> str:
        """That it is left out."""
        return f"no --{self.name}"


@dataclass(frozen=True)
class Is(Partner):
    """The flag has a value, or one that a pattern of `fnmatch` describes."""

    name: str
    pattern: str

    def holds(self, values: Mapping[str, object], defaults: Mapping[str, object]) -> bool:
        """Whether the pattern fits the value."""
        return fnmatch(str(values[self.name]), self.pattern)

    @property
    def words(self) -> str:
        """The flag and the value; of files' endings none in particular."""
        return f"a file as --{self.name}" if self.pattern.startswith("*") else f"--{self.name} {self.pattern}"


@dataclass(frozen=True)
class IsNot(Partner):
    """The flag has none of some values."""

    name: str
    values: tuple[str, ...]

    def holds(self, values: Mapping[str, object], defaults: Mapping[str, object]) -> bool:
        """Whether the value is another one."""
        return str(values[self.name]) not in self.values

    @property
    def words(self) -> str:
        """The flag and the values that it must not have."""
        return f"--{self.name} other than {' and '.join(self.values)}"


@dataclass(frozen=True)
class Lists(Partner):
    """The flag's list holds one of some words.

    Attributes:
        by_default: what the list is where it is not given.
    """

    name: str
    any_of: tuple[str, ...]
    by_default: tuple[str, ...] = ()

    def holds(self, values: Mapping[str, object], defaults: Mapping[str, object]) -> bool:
        """Whether one of the words is in it."""
        value = values[self.name]
        return any(word in self.any_of for word in (value if isinstance(value, list) else self.by_default))

    @property
    def words(self) -> str:
        """The flag and the words, of many the first."""
        shown = self.any_of[:4]
        return f"--{self.name} with {', '.join(shown)}" + (" or others" if len(shown) < len(self.any_of) else "")


@dataclass(frozen=True)
class OnHub(Partner):
    """The flag names a repository on the Hub, no file or folder."""

    name: str

    def holds(self, values: Mapping[str, object], defaults: Mapping[str, object]) -> bool:
        """Whether there is no such file or folder."""
        value = values[self.name]
        return isinstance(value, str) and not os.path.exists(value)

    @property
    def words(self) -> str:
        """The flag and what it must be."""
        return f"a Hub name as --{self.name}"


def partner_of(said: str | Partner) -> Partner:
    """A condition in full: `flag` is short for `Given`, `flag=pattern` for `Is`."""
    if isinstance(said, Partner):
        return said
    name, has_pattern, pattern = said.partition("=")
    return Is(name, pattern) if has_pattern else Given(name)


@dataclass(frozen=True)
class FlagRules:
    """What is declared of a flag.

    Attributes:
        resume: whether a resumed run may change it.
        engines: why an engine can't do it or what to do instead, by the engine's name.
        acts_with: conditions of which one must hold for it to change anything; none for a flag that acts alone.
    """

    resume: Resume
    engines: Mapping[str, str]
    acts_with: tuple[Partner, ...]

    @classmethod
    def of(cls, resume: Resume, engines: Mapping[str, str], acts_with: Sequence[str | Partner]) -> "FlagRules":
        """The rules as `option` takes them."""
        return cls(resume, dict(engines), tuple(map(partner_of, acts_with)))
