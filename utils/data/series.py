"""Shards that say in their names how many there are, such as train-00000-of-00003.parquet: which are missing."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

logger = logging.getLogger(__name__)
NUMBERED = re.compile(
    r"(?P<head>.*?)(?P<number>\d{1,9})(?P<of>[-_.]?of[-_.]?)(?P<total>\d{1,9})(?P<tail>.*)", re.IGNORECASE
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
    """The series among some files that are not whole; numbers begin with 0, or with 1 where the last is the total."""
    series: dict[tuple[str, ...], dict[int, str]] = defaultdict(dict)
    for name in names:
        folder, _, base = name.rpartition("/")
        match = NUMBERED.fullmatch(base)
        if match is not None and 0 < int(match["total"]) <= MOST_SHARDS:
            head = f"{folder}/{match['head']}" if folder else match["head"]
            series[head, match["of"], match["total"], HASH.sub("", match["tail"])][int(match["number"])] = name
    found = []
    for (head, of, total, tail), there in series.items():
        count = int(total)
        first = 1 if count in there and 0 not in there else 0
        lost = [number for number in range(first, first + count) if number not in there]
        if lost:
            width = len(NUMBERED.fullmatch(next(iter(there.values())).rpartition("/")[2])["number"])
            shown = [f"{head}{number:0{width}d}{of}{total}{tail}" for number in lost[:NUM_SHOWN]]
            found.append(Gap(sorted(there.values()), count, shown, len(lost)))
    return found


def warn_of_gaps(where: str, names: Iterable[str]) -> None:
    """Names the shards that are missing from a series of which others are there."""
    for gap in gaps(names):
        more = ", ..." if gap.num_missing > len(gap.missing) else ""
        logger.warning(
            "%s: %d of the %d shards that the name of %s counts are there; missing: %s%s; fetch them, unless this part "
            "is all that is meant",
            *(where, len(gap.there), gap.total, gap.there[0], ", ".join(gap.missing), more),
        )
