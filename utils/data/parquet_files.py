"""Parquet files before they are read: what columns they have, and whether they are whole and alike."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from utils.config.options import UserError, first_line
from utils.config.user_files import open_regular, parse_json

logger = logging.getLogger(__name__)
NUM_SHOWN = 3


def parquet_columns(file: Path) -> dict[str, pa.DataType]:
    """The types of the columns of a Parquet file by their names; none if it can't be read."""
    from pyarrow import parquet

    try:
        return {column.name: column.type for column in parquet.read_schema(file)}
    except (OSError, pa.ArrowException):
        return {}


class Footer(NamedTuple):
    """What the end of a Parquet file says is in it.

    Attributes:
        num_rows: how many rows it has.
        schema: its columns.
    """

    num_rows: int
    schema: pa.Schema

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """The types of the columns by their names."""
        return {column.name: column.type for column in self.schema}


def read_footers(folder: Path, names: Iterable[str], flag: str) -> dict[str, Footer]:
    """The ends of Parquet files of a folder, by the files' names.

    Raises:
        UserError: naming a file whose end can't be read.
    """
    from pyarrow import parquet

    footers: dict[str, Footer] = {}
    for name in names:
        try:
            with open_regular(folder / name) as file:
                metadata = parquet.read_metadata(file)
                footers[name] = Footer(metadata.num_rows, metadata.schema.to_arrow_schema())
        except (OSError, pa.ArrowException) as error:
            cure = "fetch it again, or take it out of the folder"
            raise UserError(f"--{flag} {folder}: {name} can't be read: {first_line(error)}; {cure}") from error
    return footers


def is_binary(kind: pa.DataType) -> bool:
    """Whether a column holds bytes, such as images."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def check_shards(folder: Path, footers: Mapping[str, Footer], needed: Sequence[str], flag: str) -> list[str]:
    """The Parquet files among shards of one table that have rows; names those that have none.

    Args:
        footers: those of the shards, by the files' names.
        needed: columns that are used; where no file has one of them, that is not said here.

    Raises:
        UserError: if none has rows, or one has not the columns of the first.
    """
    filled = [name for name, footer in footers.items() if footer.num_rows]
    empty = [name for name, footer in footers.items() if not footer.num_rows]
    if not filled:
        has, them = ("have", "them") if len(empty) > 1 else ("has", "it")
        raise UserError(f"--{flag} {folder}: {', '.join(empty[:NUM_SHOWN])} {has} no rows; fetch {them} again")
    if empty:
        logger.warning("--%s %s: %d files have no rows, such as %s", flag, folder, len(empty), empty[0])
    first, *others = filled
    for name in others:
        difference = _difference(footers[first], footers[name], needed)
        if difference:
            raise UserError(
                f"--{flag} {folder}: {name} is no shard of the same table as {first}: {difference}; give both the same "
                "columns, or give them as two sources of a --dataset_file"
            )
    return filled


def _difference(first: Footer, other: Footer, needed: Sequence[str]) -> str:
    """How the columns of a shard differ from those of the first, as far as they can't be read together; "" if not."""
    columns, found = first.columns, other.columns
    new = [name for name in found if name not in columns]
    gone = [name for name in needed if name in columns and name not in found]
    if new or gone:
        here, there = (", ".join([*names][:20]) for names in (found, columns))
        return f"it has the columns {here}, the other {there}"
    image_columns, own = _image_columns(first.schema), _class_names(first.schema)
    classes = _class_names(other.schema)
    for name in (name for name in own if own[name] != classes.get(name, own[name])):
        here, there = (", ".join(map(str, names[:5])) for names in (classes[name], own[name]))
        return f"the numbers in its column {name} stand for {here}, in the other for {there}"
    for name, kind in columns.items():
        if name not in found or _fits(kind, found[name]):
            continue
        is_image = name in image_columns and (_is_text(found[name]) or is_binary(found[name]))
        is_parsed = name not in needed and _is_plain(kind) and _is_text(found[name])  # numbers written as texts
        if not is_image and not is_parsed:
            return f"its column {name} holds {found[name]}, that of the other {kind}"
    return ""


def _image_columns(schema: pa.Schema) -> set[str]:
    """The columns that `datasets` has noted as images, for which it takes bytes and paths too."""
    return {name for name, feature in _features(schema).items() if feature.get("_type") == "Image"}


def _class_names(schema: pa.Schema) -> dict[str, list]:
    """The names of classes by their numbers, of the columns that `datasets` has noted as classes."""
    named = {name: each.get("names") for name, each in _features(schema).items() if each.get("_type") == "ClassLabel"}
    return {name: names for name, names in named.items() if isinstance(names, list)}


def _features(schema: pa.Schema) -> dict[str, dict]:
    """What `datasets` has noted of the columns by their names; nothing where it wrote no file."""
    try:
        noted = (schema.metadata or {}).get(b"huggingface", b"{}").decode()
        features = parse_json(noted, "huggingface")["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _fits(first: pa.DataType, other: pa.DataType) -> bool:
    """Whether `datasets` reads all values of a shard as the type that the first shard has."""
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
    return _group(first) == _group(other) or (_is_text(first) and _is_plain(other))


def _group(kind: pa.DataType) -> int:
    """The number of the group of types that a type is of; -1 for numbers, booleans and times."""
    groups = (_is_text, is_binary, pa.types.is_struct, _is_list, pa.types.is_null)
    return next((number for number, holds in enumerate(groups) if holds(kind)), -1)


def _is_plain(kind: pa.DataType) -> bool:
    return _group(kind) == -1


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
