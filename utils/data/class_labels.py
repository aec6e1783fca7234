"""Classes in place of captions: from a column, or from the names of the images' folders."""

import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from utils.config.options import UserError, option, require_fraction
from utils.data.captions import CaptionOptions
from utils.data.class_folders import (
    INNER,
    RULES,
    count_folders,
    has_twins,
    names_of_folders,
    recorded_folders,
    same_text,
    warn_of_spellings,
)
from utils.data.sources import Records, SourceOptions
from utils.data.tables import captions_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelOptions:
    class_conditional: bool = option(
        False, "train a model of classes: those of --label_column, or else the names of the images' folders"
    )
    class_folders: str | None = option(
        None,
        "which of nested folders names the class: the inner one, which holds the images, or the outer one, the first "
        "in which their paths differ; by default the inner one, unless folders of one name lie in several places",
        choices=RULES,
    )
    label_dropout: float = option(
        0.1, "portion of the samples that train without their class, for classifier-free guidance"
    )

    def __post_init__(self) -> None:
        require_fraction(self, "label_dropout")

    def captions(self, source: SourceOptions, recorded: Sequence[str] = ()) -> CaptionOptions:
        """How the labels of the data are used in the place of captions.

        Args:
            recorded: the classes of the checkpoint that the run resumes from.
        """
        recorded = tuple(recorded)
        by_folder = self.class_conditional and source.caption_column is None
        if self.class_folders is not None and not by_folder:
            given = "--label_column names them" if self.class_conditional else "give --class_conditional too"
            raise UserError(f"--class_folders {self.class_folders} is for classes by folders; {given}, or leave it out")
        if not self.class_conditional:
            return NoLabels()
        if source.dataset_name is not None and source.caption_column is None:
            raise UserError(
                "--class_conditional: a dataset has no folders; name the column of its classes: --label_column"
            )
        if by_folder:
            policy = {"caption_dropout": self.label_dropout, "on_missing_caption": "folder"}
            return FolderLabels(**policy, rule=self.class_folders, recorded_names=recorded)
        policy = {"caption_dropout": self.label_dropout, "on_missing_caption": "error"}
        return ColumnLabels(**policy, are_twins_apart=has_twins(recorded))


@dataclass(frozen=True)
class ColumnLabels(CaptionOptions):
    """Each image has the class that its column says.

    Attributes:
        are_twins_apart: whether names that are the same text are classes of their own, as in earlier releases.
    """

    word: ClassVar[str] = "label"
    refusal: ClassVar[str] = "--label_column: label them, or take them out of the data"
    takes_one: ClassVar[bool] = True

    are_twins_apart: bool = field(default=False, repr=False, compare=False)

    def of(self, captions: tuple[str, ...]) -> tuple[str, ...]:
        """Each class once, in one Unicode normal form."""
        return tuple(dict.fromkeys(captions if self.are_twins_apart else map(same_text, captions)))

    def recorded(self, captions: tuple[str, ...]) -> tuple[str, ...]:
        """As they stand in the data."""
        return captions


@dataclass(frozen=True)
class NoLabels(CaptionOptions):
    """Whatever stands beside the images is left alone."""

    are_expected: ClassVar[bool] = False

    def of(self, captions: tuple[str, ...]) -> tuple[str, ...]:
        """None."""
        return ()


@dataclass(frozen=True)
class FolderLabels(NoLabels):
    """Each image has the name of its folder for its class.

    Attributes:
        rule: as of `names_of_folders`.
        names: the class of each folder, by its path; None before the images are known.
        recorded_names: the classes of the checkpoint that the run resumes from; they decide where an earlier release's
            rule gives them, and today's does not.
    """

    folder_is_class: ClassVar[bool] = True

    rule: str | None = field(default=None, repr=False, compare=False)
    names: Mapping[str, str] | None = field(default=None, repr=False, compare=False)
    recorded_names: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def settled(self, keys: Iterable[str], where: str, source: str, in_shards: bool = False) -> CaptionOptions:
        """The same, which knows the class of each folder."""
        counts, known = count_folders(keys), (where, source, in_shards)
        names = recorded_folders(counts, self.recorded_names, *known) if self.rule in (None, INNER) else None
        return replace(self, names=names or names_of_folders(counts, self.rule, *known))

    def of_folder(self, key: str, source: str, in_shards: bool = True) -> str:
        """The whole name: 5_1 and 6_1 are two classes."""
        return (self.names or {})[key.rpartition("/")[0]]


@dataclass(frozen=True)
class LabelledSource(SourceOptions):
    """One source of images that may have labels."""

    holds_names: ClassVar[bool] = True

    caption_column: str | None = option(
        None,
        "column of the classes, of names or numbers, for --class_conditional; by default the folders' names are",
        aliases=["--label_column"],
        is_text=True,
    )

    def reader(self, feature: Any = None) -> Callable[[object, str], tuple[str, ...]]:
        """What makes the name of a class of what the column holds: a name, or a number with or without one."""
        from datasets import ClassLabel, Value

        if isinstance(feature, ClassLabel):
            return NamedLabels(tuple(feature.names))
        if isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "bool")):
            return labels_of
        try:
            return super().reader(feature) if feature is not None else labels_of
        except UserError as error:
            must = "must hold names, whole numbers, booleans or a ClassLabel"
            raise UserError(f"--label_column {self.caption_column} {must}, got {feature}") from error


@dataclass(frozen=True)
class NamedLabels:
    """Makes the name of a class of its number in a column that knows the names.

    Attributes:
        names: by the numbers.
    """

    names: tuple[str, ...]

    def __call__(self, value: object, where: str) -> tuple[str, ...]:
        """The name; none of -1, by which `datasets` says that there is no class."""
        return () if value is None or value == -1 else (self.names[int(value)],)


def labels_of(value: object, where: str) -> tuple[str, ...]:
    """The name of a class that stands as a string, as a whole number or as a boolean."""
    return (str(value),) if isinstance(value, int) else captions_of(value, where)


def count_classes(records: Records) -> Counter[str]:
    """How many images have each class."""
    for source in records.sources:
        if isinstance(source.captions, ColumnLabels):
            names = {name for captions in source.table.all_captions() for name in captions}
            warn_of_spellings(source.name, names if not source.captions.are_twins_apart else ())
    counts = Counter(records.first_captions())
    del counts[""]
    return counts


def in_order(names: Sequence[str], orders: Sequence[tuple[str, ...]] = ()) -> list[str]:
    """Distinct names of classes: as the data orders them, else numbers by their size, else by the alphabet.

    Args:
        orders: that of each source, which counts if all have the same.
    """
    distinct = sorted(set(names))
    if len(set(orders)) == 1 and set(distinct) <= set(orders[0]):
        return [name for name in orders[0] if name in set(distinct)]
    return sorted(distinct, key=int) if all(name.isdecimal() for name in distinct) else distinct


def plain_name(name: str) -> str:
    """A class's name as the lists of names in diffusers' pipelines can hold it: they end a name at a comma.

    Spaces around it are taken away, and letters have one spelling whatever the file system.
    """
    return unicodedata.normalize("NFC", name).replace(",", ";").strip()


def listed_numbers(known: Mapping[int, str]) -> dict[str, int]:
    """The numbers of classes by their names in a list that gives several for one, with commas between them."""
    return {each.strip(): number for number, names in known.items() for each in (*names.split(","), names)}


def class_numbers(names: Sequence[str], known: Mapping[str, int], slots: int) -> dict[str, int]:
    """The numbers of the data's classes by their names.

    Those that a pretrained model knows keep their numbers, by which it has learnt them. The others take the lowest
    numbers that are free.

    Args:
        known: the numbers of the pretrained model's classes by their names, of which a class may have several.
        slots: how many classes the model can tell apart.

    Raises:
        UserError: if it has no room for all of them.
    """
    spellings = {plain_name(name): number for name, number in known.items()} | dict(known)
    numbers = {name: spellings.get(name, spellings.get(plain_name(name))) for name in names}
    free = iter(sorted(set(range(slots)) - set(known.values())))
    for name in names:
        if numbers[name] is None:
            numbers[name] = next(free, None)
    missing = [name for name, number in numbers.items() if number is None]
    if missing and known:
        raise UserError(
            f"the pretrained model has room for {slots} classes, and keeps the {len(set(known.values()))} that it "
            f"knows; of the data's there is none for {', '.join(missing[:5])}: take them out, or train from scratch"
        )
    if missing:
        raise UserError(f"the data has {len(names)} classes, the model has room for {slots}")
    by_number: dict[int, list[str]] = {}
    for name, number in numbers.items():
        by_number.setdefault(number, []).append(name)
    for number, same in by_number.items():
        if len(same) > 1:
            said = "the folders or labels %s are one class to the pretrained model, number %d"
            logger.warning(said, ", ".join(map(repr, same)), number)
    return numbers


class ClassNumbers:
    """Maps names of classes to the numbers that a model knows them by; for the loader's workers.

    Attributes:
        none: the number that stands for no class, also that of "".
    """

    max_tokens = 1

    def __init__(self, numbers: dict[str, int], none: int):
        self._numbers = numbers
        self.none = none

    def __call__(self, captions: list[str]) -> Tensor:
        """[B, 1, 1] int64.

        Raises:
            UserError: for a name that is none of the classes'.
        """
        unknown = next((name for name in captions if name and name not in self._numbers), None)
        if unknown is not None:
            raise UserError(f"the class {unknown} is none of those trained on: {', '.join(self._numbers)}")
        return torch.tensor([self._numbers[name] if name else self.none for name in captions]).view(-1, 1, 1)

    def num_tokens(self, captions: Sequence[str]) -> np.ndarray:
        """[B] int64, one for a class and none without."""
        return np.array([int(name != "") for name in captions], dtype=np.int64)
