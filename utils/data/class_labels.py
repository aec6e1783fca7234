"""Class labels instead of captions: from a column, or from the names of the images' folders."""

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
    """Maps the numbers of a label column to class names.

    Attributes:
        names: class names, by number.
    """

    names: tuple[str, ...]

    def __call__(self, value: object, where: str) -> tuple[str, ...]:
        """Returns the name, or () for None and -1, by which `datasets` marks a missing label."""
        return () if value is None or value == -1 else (self.names[int(value)],)


def labels_of(value: object, where: str) -> tuple[str, ...]:
    """Returns the class name of a string, integer or boolean label.

    Args:
        where: name of the value in error messages.
    """
    return (str(value),) if isinstance(value, int) else captions_of(value, where)


def count_classes(records: Records) -> Counter[str]:
    """Returns the number of images of each class."""
    for source in records.sources:
        if isinstance(source.captions, ColumnLabels):
            names = {name for captions in source.table.all_captions() for name in captions}
            warn_of_spellings(source.name, names if not source.captions.are_twins_apart else ())
    counts = Counter(records.first_captions())
    del counts[""]
    return counts


def check_held_out_classes(trained: Records, held_out: Records, where: str) -> None:
    """Refuses validation images of classes that are not trained on: the model has no label for them.

    Args:
        where: the flag that selects the validation images, with its value.

    Raises:
        UserError: naming these classes.
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
            f"{where}: {count:,} images have classes that are not trained on: {_shown(sorted(others))} (such as "
            f"{held_out.key(first)}); the trained classes are {_shown(in_order(list(known)))}; remove these images, "
            "give them a trained class, or train on their classes too"
        )


def _shown(names: Sequence[str]) -> str:
    """Returns the first few class names, and how many more there are."""
    more = f" and {len(names) - NUM_SHOWN:,} more" if len(names) > NUM_SHOWN else ""
    return ", ".join(names[:NUM_SHOWN]) + more


def in_order(names: Sequence[str], orders: Sequence[tuple[str, ...]] = ()) -> list[str]:
    """Returns the distinct class names in the order of the data; else sorted as numbers, or alphabetically.

    Args:
        orders: the order of each source; used only if it is the same in all sources and has all names.
    """
    distinct = sorted(set(names))
    if len(set(orders)) == 1 and set(distinct) <= set(orders[0]):
        return [name for name in orders[0] if name in set(distinct)]
    return sorted(distinct, key=int) if all(name.isdecimal() for name in distinct) else distinct


def plain_name(name: str) -> str:
    """Returns a class name as diffusers pipelines can list it: commas, which separate names there, become semicolons.

    Surrounding spaces are stripped, and the name is normalized to Unicode form NFC.
    """
    return unicodedata.normalize("NFC", name).replace(",", ";").strip()


def listed_numbers(known: Mapping[int, str]) -> dict[str, int]:
    """Returns the number of each class name, from a list whose entries may hold several names separated by commas."""
    return {each.strip(): number for number, names in known.items() for each in (*names.split(","), names)}


def class_numbers(names: Sequence[str], known: Mapping[str, int], slots: int) -> dict[str, int]:
    """Returns the number of each class of the data, by name.

    Classes of the pretrained model keep their numbers. New classes take the lowest free numbers.

    Args:
        names: class names of the data.
        known: numbers of the pretrained model's classes by name; a class may have several names.
        slots: number of classes that the model can have.

    Raises:
        UserError: if the model has too few slots.
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
            f"the pretrained model has room for {slots} classes and keeps its own {len(set(known.values()))}; there "
            f"is no room for {', '.join(missing[:5])}; remove these classes from the data, or train from scratch"
        )
    if missing:
        raise UserError(f"the data has {len(names)} classes, but the model has room for only {slots}")
    by_number: dict[int, list[str]] = {}
    for name, number in numbers.items():
        by_number.setdefault(number, []).append(name)
    for number, same in by_number.items():
        if len(same) > 1:
            said = "the folders or labels %s are the same class, number %d, in the pretrained model"
            logger.warning(said, ", ".join(map(repr, same)), number)
    return numbers


class ClassNumbers:
    """Maps class names to the numbers of a model, as a tokenizer; used in the data-loader processes.

    Attributes:
        none: the number for "no class", also used for "".
    """

    max_tokens = 1

    def __init__(self, numbers: dict[str, int], none: int):
        self._numbers = numbers
        self.none = none

    def __call__(self, captions: list[str]) -> Tensor:
        """Returns [B, 1, 1] int64 class numbers.

        Raises:
            UserError: for an unknown class name.
        """
        unknown = next((name for name in captions if name and name not in self._numbers), None)
        if unknown is not None:
            raise UserError(f"unknown class {unknown}; the trained classes are {', '.join(self._numbers)}")
        return torch.tensor([self._numbers[name] if name else self.none for name in captions]).view(-1, 1, 1)

    def num_tokens(self, captions: Sequence[str]) -> np.ndarray:
        """Returns [B] int64: 1 for a class, 0 for no class."""
        return np.array([int(name != "") for name in captions], dtype=np.int64)
