"""What was found out about the images of a table, kept on the disk under their keys and the stamps of their files."""

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
    """The remembered values of one table's images, a Parquet file; each holds as long as its stamp is the same."""

    def __init__(self, path: Path, columns: Mapping[str, pa.DataType]):
        self._path = path
        self._schema = pa.schema({**NAMES, **columns})
        self._table: pa.Table | None = None
        try:
            self._table = read_table(path, self._schema)
        except (OSError, ValueError):
            return

    def find(self, keys: Sequence[str], stamps: Sequence[str]) -> np.ndarray:
        """[n] where each is remembered as it is now, else -1."""
        if self._table is None or not len(self._table) or not keys:
            return np.full(len(keys), -1)
        from pyarrow import compute

        at = compute.index_in(encoded(keys), value_set=self._table["key"].combine_chunks())
        at = at.fill_null(-1).to_numpy(zero_copy_only=False)
        remembered = self._table["stamp"].to_pandas().to_numpy()
        return np.where((at >= 0) & (remembered[at] == np.array(stamps, object)), at, -1)

    def column(self, name: str) -> np.ndarray:
        """The values of all remembered images; bytes as objects."""
        is_bytes = self._schema.field(name).type == pa.binary()
        return (
            np.array([*self._table[name].to_pylist(), None], object)[:-1] if is_bytes else self._table[name].to_numpy()
        )

    def add(self, keys: Sequence[str], stamps: Sequence[str], columns: Mapping[str, np.ndarray]) -> None:
        """Adds values, but not of files that were changed a moment ago: another change might leave the stamp alike."""
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
            logger.warning("%s can't be written, its images will be read again next time: %s", self._path, error)


def _is_settled(stamp: str, now: int) -> bool:
    """Whether the file was last changed long enough ago for its times to tell the next change."""
    times = stamp.split(":")[1:]
    return all(int(time_) + SETTLED_NANOSECONDS < now for time_ in times)


def stamps_of(table: ImageTable, rows: np.ndarray) -> list[str]:
    """The stamps of some rows of a table, read by several threads."""
    chunks = [rows[begin : begin + CHUNK] for begin in range(0, len(rows), CHUNK)]
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        return [stamp for found in pool.map(partial(_stamp_chunk, table), chunks) for stamp in found]


def _stamp_chunk(table: ImageTable, rows: np.ndarray) -> list[str]:
    return [table.stamp(int(row)) for row in rows]
