"""A disk cache of facts about the images of a table, stored by image key and file stamp (size and times)."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from utils.data.disk_tables import encoded, read_table, write_table
from utils.data.tables import ImageTable
from utils.runtime.atomic_files import mark_as_own

SETTLED_NANOSECONDS = 2_000_000_000
CHUNK = 500
NAMES = {"key": pa.large_binary(), "stamp": pa.large_string()}
logger = logging.getLogger(__name__)


class Remembered:
    """Cached values for the images of one table, in a Parquet file. A value is valid while the stamp is unchanged."""

    def __init__(self, path: Path, columns: Mapping[str, pa.DataType]):
        self._path = path
        self._schema = pa.schema({**NAMES, **columns})
        self._table: pa.Table | None = None
        try:
            self._table = read_table(path, self._schema)
        except (OSError, ValueError):
            return

    def find(self, keys: Sequence[str], stamps: Sequence[str]) -> np.ndarray:
        """Returns [n] the row of each image in the cache; -1 if it is missing or its file has changed."""
        if self._table is None or not len(self._table) or not keys:
            return np.full(len(keys), -1)
        from pyarrow import compute

        at = compute.index_in(encoded(keys), value_set=self._table["key"].combine_chunks())
        at = at.fill_null(-1).to_numpy(zero_copy_only=False)
        remembered = self._table["stamp"].to_pandas().to_numpy()
        return np.where((at >= 0) & (remembered[at] == np.array(stamps, object)), at, -1)

    def column(self, name: str) -> np.ndarray:
        """Returns the values of all cached images; bytes as an object array."""
        is_bytes = self._schema.field(name).type == pa.binary()
        return (
            np.array([*self._table[name].to_pylist(), None], object)[:-1] if is_bytes else self._table[name].to_numpy()
        )

    def add(self, keys: Sequence[str], stamps: Sequence[str], columns: Mapping[str, np.ndarray]) -> None:
        """Adds values, except for files changed moments ago: a further change might not change their stamp."""
        from pyarrow import compute

        now = time.time_ns()
        chosen = [number for number, stamp in enumerate(stamps) if _is_settled(stamp, now)]
        named = [encoded([keys[number] for number in chosen]), pa.array([stamps[n] for n in chosen], pa.large_string())]
        others = self._schema.names[len(NAMES) :]
        values = [pa.array(columns[name][chosen], self._schema.field(name).type) for name in others]
        new = pa.table([*named, *values], schema=self._schema)
        if self._table is not None and len(self._table):
            renewed = compute.is_in(self._table["key"], value_set=new["key"].combine_chunks())
            new = pa.concat_tables([self._table.filter(compute.invert(renewed)), new])
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            mark_as_own(self._path.parent.parent)
            write_table(self._path, new)
        except OSError as error:
            logger.warning("can't write %s, so the next run will read its images again: %s", self._path, error)


def _is_settled(stamp: str, now: int) -> bool:
    """Returns whether a file was last changed long enough ago that another change would change its times."""
    times = stamp.split(":")[1:]
    return all(int(time_) + SETTLED_NANOSECONDS < now for time_ in times)


def stamps_of(table: ImageTable, rows: np.ndarray) -> list[str]:
    """Returns the stamps of rows of a table, read by several threads."""
    chunks = [rows[begin : begin + CHUNK] for begin in range(0, len(rows), CHUNK)]
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        return [stamp for found in pool.map(partial(_stamp_chunk, table), chunks) for stamp in found]


def _stamp_chunk(table: ImageTable, rows: np.ndarray) -> list[str]:
    return [table.stamp(int(row)) for row in rows]
