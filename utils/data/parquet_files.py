"""Parquet files before they are read: what columns they have, and whether they are whole and alike."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from utils.options import UserError, first_line
from utils.user_files import open_regular


def parquet_columns(file: Path) -> dict[str, pa.DataType]:
    """The types of the columns of a Parquet file by their names; none if it can't be read."""
    from pyarrow import parquet

    try:
        return {column.name: column.type for column in parquet.read_schema(file)}
    except (OSError, pa.ArrowException):
        return {}


def check_parquet(folder: Path, names: Iterable[str], flag: str) -> None:
    """Refuses Parquet files of a folder whose ends can't be read, which say what is in them.

    Raises:
        UserError: naming the file.
    """
    from pyarrow import parquet

    for name in names:
        try:
            with open_regular(folder / name) as file:
                parquet.read_metadata(file)
        except (OSError, pa.ArrowException) as error:
            cure = "fetch it again, or take it out of the folder"
            raise UserError(f"--{flag} {folder}: {name} can't be read: {first_line(error)}; {cure}") from error


def is_binary(kind: pa.DataType) -> bool:
    """Whether a column holds bytes, such as images."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
