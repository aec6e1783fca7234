"""Finds missing and copied files in numbered series of shards, such as train-00000-of-00003.parquet or data_3.tar."""

import itertools
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

logger = logging.getLogger(__name__)
NUMBERED = re.compile(
    r"(?P<head>.*?)(?P<number>\d{1,9})(?P<of>(?P<mark>[-_.]?)of(?P=mark))(?P<total>\d{1,9})(?P<tail>.*)", re.IGNORECASE
)
HASH = re.compile(r"^-[0-9a-f]{16}(?=\.)")  # older versions of `datasets` append it to the numbers
COPY = re.compile(  # names that browsers and file managers give copies
    r"(?P<stem>.+?)(?: ?\(\d{1,3}\)| - copy(?: \(\d+\))?| copy(?: \d+)?| \((?:another )?copy(?: \d+)?\))"
    r"(?P<suffix>\.[^./ ]+)",
    re.IGNORECASE,
)
LAST_NUMBER = re.compile(r"(?P<head>.*?)(?P<number>\d{1,9})(?P<tail>\D*)", re.DOTALL)
SHARD_SUFFIXES = (".parquet", ".tar", ".arrow", ".jsonl", ".ndjson", ".json", ".csv")
MOST_SHARDS = 10**6
NUM_SHOWN = 3


class Gap(NamedTuple):
    """An incomplete series of shards.

    Attributes:
        there: names of the shards that exist.
        total: how many there should be.
        missing: names of the first missing shards.
        num_missing: number of all missing shards.
    """

    there: list[str]
    total: int
    missing: list[str]
    num_missing: int


def gaps(names: Iterable[str]) -> list[Gap]:
    """Returns the incomplete series among some files whose names contain a total; numbers start with 0 or 1.

    A name belongs to a series if its two numbers are separated as in `3-of-10` or `3_of_10`, or if both are padded with
    zeros to the same length, as in `03of10`.
    """
    series: dict[tuple[str, ...], dict[int, str]] = defaultdict(dict)
    for name in names:
        folder, _, base = name.rpartition("/")
        match = NUMBERED.fullmatch(base)
        if match is None or not 0 < int(match["total"]) <= MOST_SHARDS or int(match["number"]) > int(match["total"]):
            continue
        if not match["mark"] and len(match["number"]) != len(match["total"]):
            continue
        head = f"{folder}/{match['head']}" if folder else match["head"]
        series[head, match["of"], match["total"], HASH.sub("", match["tail"])][int(match["number"])] = name
    return [gap for parts, there in series.items() if (gap := _gap(parts, there)) is not None]


def _gap(parts: tuple[str, ...], there: Mapping[int, str]) -> Gap | None:
    """Returns the gap in a series; None if it is complete.

    Args:
        parts: the common parts of its names: before the number, between number and total, the total, and after it.
        there: the existing names, by number.
    """
    # skip names without zero padding where the numbers are not separated
    head, of, total, tail = parts
    is_padded = any(name.rpartition("/")[2].removeprefix(head.rpartition("/")[2])[0] == "0" for name in there.values())
    if of.lower() == "of" and not is_padded:
        return None
    count = int(total)
    width = len(NUMBERED.fullmatch(next(iter(there.values())).rpartition("/")[2])["number"])

    def named(number: int) -> str:
        return f"{head}{number:0{width}d}{of}{total}{tail}"

    # list the missing numbers, which run from 0 to total - 1 or from 1 to total
    lost = [number for number in range(1, count) if number not in there]
    shown = [named(number) for number in lost[:NUM_SHOWN]]
    if 0 in there and count in there:  # numbers of two series
        return None if not lost else Gap(sorted(there.values()), count, shown, len(lost))
    if 0 not in there and count not in there:  # the series may start with either
        shown, num_lost = [*shown, f"{named(0)} or {named(count)}"][:NUM_SHOWN], len(lost) + 1
    else:
        num_lost = len(lost)
    return Gap(sorted(there.values()), count, shown, num_lost) if num_lost else None


def copies(names: Iterable[str]) -> dict[str, str]:
    """Returns (copy, original) for names that look like copies of others, such as `a (1).tar` of `a.tar`."""
    there = {name: COPY.fullmatch(name) for name in names}
    originals = {name: f"{match['stem']}{match['suffix']}" for name, match in there.items() if match is not None}
    return {name: original for name, original in originals.items() if original in there}


def holes(names: Iterable[str]) -> list[Gap]:
    """Returns the series of shards without a total in their names in which some numbers are missing.

    If most numbers of a series are missing, it counts as a deliberate selection of shards.
    """
    # group the names by their text around the last number
    series: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for name in names:
        folder, _, base = name.rpartition("/")
        match = LAST_NUMBER.fullmatch(base)
        if match is None or not base.lower().endswith(SHARD_SUFFIXES) or NUMBERED.fullmatch(base) is not None:
            continue
        head = f"{folder}/{match['head']}" if folder else match["head"]
        series[head, match["tail"]][int(match["number"])] = match["number"]

    # find the missing numbers of each group
    found = []
    for (head, tail), numbers in series.items():
        span = max(numbers) - min(numbers) + 1
        num_missing = span - len(numbers)
        if 0 < num_missing < len(numbers):
            width = min(map(len, numbers.values()))
            lost = (number for number in range(min(numbers), max(numbers)) if number not in numbers)
            shown = [f"{head}{number:0{width}d}{tail}" for number in itertools.islice(lost, NUM_SHOWN)]
            there = [f"{head}{written}{tail}" for _, written in sorted(numbers.items())]
            found.append(Gap(there, span, shown, num_missing))
    return found


def tell_of_gaps(where: str, names: Iterable[str], level: int = logging.WARNING) -> None:
    """Reports shards that are missing from a series, and those that may be copies.

    Args:
        where: the flag that names the data, with its value.
        names: the files.
        level: the log level.
    """
    # copies
    there = [name for name in names if name.lower().endswith(SHARD_SUFFIXES)]
    doubled = copies(there)
    if doubled:
        first, original = next(iter(doubled.items()))
        logger.log(
            level,
            "%s: %d files are named like copies of others, such as %s of %s; remove them, unless they hold other data",
            *(where, len(doubled), first, original),
        )

    # gaps in series with and without a total in their names
    singles = [name for name in there if name not in doubled]
    for gap in gaps(singles):
        more = ", ..." if gap.num_missing > len(gap.missing) else ""
        logger.log(
            level,
            "%s: %d of the %d shards in the series of %s exist; missing: %s%s; fetch them, unless you mean to use only "
            "this part",
            *(where, len(gap.there), gap.total, gap.there[0], ", ".join(gap.missing), more),
        )
    for gap in holes(singles):
        more = ", ..." if gap.num_missing > len(gap.missing) else ""
        logger.log(
            level,
            "%s: %d of the %d shards from %s to %s are missing: %s%s; fetch them, unless they do not exist",
            *(where, gap.num_missing, gap.total, gap.there[0], gap.there[-1], ", ".join(gap.missing), more),
        )
