"""Parquet files before they are read: what columns they have, and whether they are whole and alike."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from utils.options import UserError, first_line
from utils.user_files import open_regular

logger = logging.getLogger(__name__)
NUM_SHOWN = 3


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


def check_shards(folder: Path, names: Sequence[str], needed: Sequence[str], flag: str) -> list[str]:
    """The Parquet files among shards of one table that have rows; names those that have none.

    Args:
        needed: columns that are used; where no file has one of them, that is not said here.

    Raises:
        UserError: if none has rows, or one has not the columns of the first.
    """
    from pyarrow import parquet

    counts = {name: parquet.read_metadata(folder / name).num_rows for name in names}
    filled = [name for name in names if counts[name]]
    if not filled:
        has, them = ("have", "them") if len(names) > 1 else ("has", "it")
        raise UserError(f"--{flag} {folder}: {', '.join(names[:NUM_SHOWN])} {has} no rows; fetch {them} again")
    empty = [name for name in names if not counts[name]]
    if empty:
        logger.warning("--%s %s: %d files have no rows, such as %s", flag, folder, len(empty), empty[0])
    first, *others = filled
    columns = parquet_columns(folder / first)
    for name in others:
        difference = _difference(columns, parquet_columns(folder / name), needed)
        if difference:
            raise UserError(
                f"--{flag} {folder}: {name} is no shard of the same table as {first}: {difference}; give both the same "
                "columns, or give them as two sources of a --dataset_file"
            )
    return filled


def _difference(first: Mapping[str, pa.DataType], other: Mapping[str, pa.DataType], needed: Sequence[str]) -> str:
    """How the columns of a shard differ from those of the first, as far as they can't be read together; "" if not."""
    new = [name for name in other if name not in first]
    gone = [name for name in needed if name in first and name not in other]
    if new or gone:
        here, there = (", ".join([*columns][:20]) for columns in (other, first))
        return f"it has the columns {here}, the other {there}"
    for name, kind in first.items():
        if name in other and not _fits(kind, other[name]):
            return f"its column {name} holds {other[name]}, that of the other {kind}"
    return ""


def _fits(first: pa.DataType, other: pa.DataType) -> bool:
    """Whether `datasets` reads values of a shard as the type that the first shard has."""
    first, other = (kind.value_type if pa.types.is_dictionary(kind) else kind for kind in (first, other))
    if pa.types.is_null(other):
        return True
    if pa.types.is_struct(first) and pa.types.is_struct(other):
        fields = {field.name: field.type for field in other}
        return fields.keys() <= {field.name for field in first} and all(
            field.name not in fields or _fits(field.type, fields[field.name]) for field in first
        )
    if _is_list(first) and _is_list(other):
        return _fits(first.value_type, other.value_type)
    groups = (_is_text, is_binary, pa.types.is_struct, _is_list, pa.types.is_null)
    plain = [next((number for number, holds in enumerate(groups) if holds(kind)), -1) for kind in (first, other)]
    return plain[0] == plain[1] or (_is_text(first) and plain[1] == -1)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
