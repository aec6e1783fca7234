"""Classes in place of captions: from a column, or from the names of the images' folders."""

import logging
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.config.options import UserError
from utils.data.class_folders import NUM_SHOWN, warn_of_spellings
from utils.data.source_options import ColumnLabels
from utils.data.sources import Records
from utils.data.tables import captions_of

logger = logging.getLogger(__name__)


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


def check_held_out_classes(trained: Records, held_out: Records, where: str) -> None:
    """Refuses held-out images of classes that none of those trained on has: the model has no number for them.

    Args:
        where: the flag that names the held-out images, with its value.

    Raises:
        UserError: which names the classes.
    """
    known = set(trained.first_captions())
    others: dict[str, list[int]] = {}
    for index, name in enumerate(held_out.first_captions()):
        if name and name not in known:
            others.setdefault(name, []).append(index)
    if others:
        known.discard("")
        count, first = sum(map(len, others.values())), next(iter(others.values()))[0]
        raise UserError(
            f"{where}: {count:,} images are of classes that are not trained on: {_shown(sorted(others))} (such as "
            f"{held_out.key(first)}); trained on are {_shown(in_order(list(known)))}: take them out, give them a class "
            "that is trained on, or train on theirs too"
        )


def _shown(names: Sequence[str]) -> str:
    """The first names of classes, and how many more there are."""
    more = f" and {len(names) - NUM_SHOWN:,} more" if len(names) > NUM_SHOWN else ""
    return ", ".join(names[:NUM_SHOWN]) + more


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
