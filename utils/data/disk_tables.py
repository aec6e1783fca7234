"""Tables on disk: Parquet followed by a digest of all bytes, which is verified when a table is read."""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from utils.config.user_files import read_bytes

DIGEST_SIZE = 16
LIMIT = 8 << 30  # bytes of a file


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a table atomically: the file is always either the old or the new one.

    Raises:
        OSError: if it can't be written.
    """
    from pyarrow import parquet

    content = io.BytesIO()
    parquet.write_table(table, content, compression="zstd")
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.write(_digest(content.getbuffer()))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Reads the table from a file.

    Raises:
        OSError, ValueError: if it can't be read, has changed since it was written, or has another schema.
    """
    from pyarrow import parquet

    content = memoryview(read_bytes(path, LIMIT))
    if _digest(content[:-DIGEST_SIZE]) != content[-DIGEST_SIZE:]:
        raise ValueError(f"{path} has changed since it was written")
    try:
        table = parquet.read_table(pa.BufferReader(content[:-DIGEST_SIZE]))
    except pa.ArrowException as error:
        raise ValueError(f"{path} does not contain a table: {error}") from error
    if not table.schema.equals(schema):
        raise ValueError(f"{path} has different columns from those this version writes")
    return table


def encoded(keys: Sequence[str]) -> pa.Array:
    """Returns names as bytes, because file names need not be Unicode."""
    return pa.array([os.fsencode(key) for key in keys], pa.large_binary())


def _digest(content: memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_SIZE).digest()
