"""Tables kept on the disk as Parquet, with a digest of all bytes at the end: what is read is what was written."""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from utils.config.user_files import read_bytes

DIGEST_SIZE = 16
LIMIT = 8 << 30


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a table so that the file is at any moment either the old or the new one.

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
    """The table in a file.

    Raises:
        OSError, ValueError: if it can't be read, is not what was written, or has another schema.
    """
    from pyarrow import parquet

    content = memoryview(read_bytes(path, LIMIT))
    if _digest(content[:-DIGEST_SIZE]) != content[-DIGEST_SIZE:]:
        raise ValueError(f"{path} is not what was written")
    try:
        table = parquet.read_table(pa.BufferReader(content[:-DIGEST_SIZE]))
    except pa.ArrowException as error:
        raise ValueError(f"{path} holds no table: {error}") from error
    if not table.schema.equals(schema):
        raise ValueError(f"{path} has other columns than this version writes")
    return table


def encoded(keys: Sequence[str]) -> pa.Array:
    """Names as bytes: those of files need not be Unicode."""
    return pa.array([os.fsencode(key) for key in keys], pa.large_binary())


def _digest(content: memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_SIZE).digest()
