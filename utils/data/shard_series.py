"""Shards that say in their names how many there are, such as train-00000-of-00003.parquet: which are missing."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

logger = logging.getLogger(__name__)
NUMBERED = re.compile(
    r"(?P<head>.*?)(?P<number>\d{1,9})(?P<of>(?P<mark>[-_.]?)of(?P=mark))(?P<total>\d{1,9})(?P<tail>.*)", re.IGNORECASE
)
HASH = re.compile(r"^-[0-9a-f]{16}(?=\.)")  # which older versions of `datasets` put behind the numbers
MOST_SHARDS = 10**6
NUM_SHOWN = 3


class Gap(NamedTuple):
    """A series that is not whole.

    Attributes:
        there: the names of its shards that are there.
        total: how many there should be.
        missing: the names of the first that are not there, and how many they are in all.
    """

    there: list[str]
    total: int
    missing: list[str]
    num_missing: int


def gaps(names: Iterable[str]) -> list[Gap]:
    """The series among some files that are not whole; numbers begin with 0 or 1.

    A name is of a series if marks part its two numbers, `3-of-10` or `3_of_10`, or if both have as many digits and are
    filled up with zeros, `03of10`.
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
    """What a series lacks.

    Args:
        parts: of its names: what stands before the number, between the two, the total, and what stands behind.
        there: the names by their numbers.
    """
    head, of, total, tail = parts
    is_padded = any(name.rpartition("/")[2].removeprefix(head.rpartition("/")[2])[0] == "0" for name in there.values())
    if of.lower() == "of" and not is_padded:
        return None
    count = int(total)
    width = len(NUMBERED.fullmatch(next(iter(there.values())).rpartition("/")[2])["number"])

    def named(number: int) -> str:
        return f"{head}{number:0{width}d}{of}{total}{tail}"

    lost = [number for number in range(1, count) if number not in there]
    shown = [named(number) for number in lost[:NUM_SHOWN]]
    if 0 in there and count in there:  # numbers of two series
        return None if not lost else Gap(sorted(there.values()), count, shown, len(lost))
    if 0 not in there and count not in there:  # the numbers may begin with either
        shown, num_lost = [*shown, f"{named(0)} or {named(count)}"][:NUM_SHOWN], len(lost) + 1
    else:
        num_lost = len(lost)
    return Gap(sorted(there.values()), count, shown, num_lost) if num_lost else None


def tell_of_gaps(where: str, names: Iterable[str], level: int = logging.WARNING) -> None:
    """Names the shards that are missing from a series of which others are there."""
    for gap in gaps(names):
        more = ", ..." if gap.num_missing > len(gap.missing) else ""
        logger.log(
            level,
            "%s: %d of the %d shards that the name of %s counts are there; missing: %s%s; fetch them, unless this part "
            "is all that is meant",
            *(where, len(gap.there), gap.total, gap.there[0], ", ".join(gap.missing), more),
        )
