"""Checks Parquet files before they are read: their columns, and whether shards can be read together."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from utils.config.options import UserError, first_line
from utils.config.user_files import open_regular, parse_json

logger = logging.getLogger(__name__)
NUM_SHOWN = 3


def parquet_columns(file: Path) -> dict[str, pa.DataType]:
    """Returns the column types of a Parquet file by column name; {} if it can't be read."""
    from pyarrow import parquet

    try:
        return {column.name: column.type for column in parquet.read_schema(file)}
    except (OSError, pa.ArrowException):
        return {}


class Footer(NamedTuple):
    """The contents of a Parquet file according to its footer.

    Attributes:
        num_rows: number of rows.
        schema: its columns.
    """

    num_rows: int
    schema: pa.Schema

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """The column types by column name."""
        return {column.name: column.type for column in self.schema}


def read_footers(folder: Path, names: Iterable[str], flag: str) -> dict[str, Footer]:
    """Reads the footers of Parquet files in a folder, by file name.

    Args:
        folder: the folder of the files.
        names: their paths, relative to it.
        flag: the flag that names the folder, without dashes, for errors.

    Raises:
        UserError: naming a file whose footer can't be read.
    """
    from pyarrow import parquet

    footers: dict[str, Footer] = {}
    for name in names:
        try:
            with open_regular(folder / name) as file:
                metadata = parquet.read_metadata(file)
                footers[name] = Footer(metadata.num_rows, metadata.schema.to_arrow_schema())
        except (OSError, pa.ArrowException) as error:
            cure = "fetch it again, or remove it from the folder"
            raise UserError(f"--{flag} {folder}: {name} can't be read: {first_line(error)}; {cure}") from error
    return footers


def is_binary(kind: pa.DataType) -> bool:
    """Whether a column holds bytes, such as images."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


class NeededColumns(NamedTuple):
    """The columns of a table that are used.

    Attributes:
        images: columns of images and masks, as bytes, paths, or both.
        texts: columns of captions or labels.
        sizes: columns of widths and heights, used only if all files have them.
    """

    images: tuple[str, ...]
    texts: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()


class Shards(NamedTuple):
    """Parquet files of one table.

    Attributes:
        names: files that have rows.
        reading: arguments with which `datasets` reads all files; {} if it can read them with the types of the first.
    """

    names: list[str]
    reading: dict[str, object]


def check_shards(folder: Path, footers: Mapping[str, Footer], needed: NeededColumns, flag: str) -> Shards:
    """Returns the shards of one table that have rows, and warns of empty ones.

    Unused columns may have any type, and may be missing from some shards.

    Args:
        folder: the folder of the shards.
        footers: footers of the shards, by file name.
        needed: the columns to compare; one that no file has is not an error here.
        flag: the flag that names the folder, without dashes, for errors.

    Raises:
        UserError: if no shard has rows, or if the columns of the shards differ.
    """
    filled = {name: footer for name, footer in footers.items() if footer.num_rows}
    empty = [name for name in footers if name not in filled]
    if not filled:
        has, them = ("have", "them") if len(empty) > 1 else ("has", "it")
        raise UserError(f"--{flag} {folder}: {', '.join(empty[:NUM_SHOWN])} {has} no rows; fetch {them} again")
    if empty:
        logger.warning("--%s %s: %d files have no rows, such as %s", flag, folder, len(empty), empty[0])
    decided = deciding_files(folder, filled, needed, flag)
    are_alike = are_read_alike(filled.values(), needed)
    return Shards(list(filled), {} if are_alike else _reading(filled, decided, needed))


def deciding_files(folder: Path, filled: Mapping[str, Footer], needed: NeededColumns, flag: str) -> dict[str, str]:
    """Returns, for each needed column, the first file in which it has a type, which then applies to all files.

    Raises:
        UserError: if the columns of the files differ.
    """
    decided = dict.fromkeys(needed.images + needed.texts, next(iter(filled)))
    for name, footer in filled.items():
        for column, other in decided.items():
            difference = _difference(filled[other], footer, column, column in needed.images)
            if difference:
                raise UserError(
                    f"--{flag} {folder}: {name} is not a shard of the same table as {other}: {difference}; give both "
                    "the same columns, or give them as two sources of a --dataset_file"
                )
            if _is_hollow(filled[other].columns.get(column)):
                decided[column] = name
    return decided


def _difference(first: Footer, other: Footer, column: str, is_image: bool) -> str:
    """Returns why a column of a shard can't be read together with an earlier shard's; "" if it can."""
    kind, found = first.columns.get(column), other.columns.get(column)
    if kind is None and found is None:
        return ""
    if kind is None or found is None:
        here, there = (", ".join([*footer.columns][:20]) for footer in (other, first))
        return f"it has the columns {here}, the other {there}"
    own = _class_names(first.schema).get(column)
    classes = _class_names(other.schema).get(column, own)
    if own is not None and classes != own:
        here, there = (", ".join(map(str, names[:5])) for names in (classes, own))
        return f"the numbers in its column {column} mean {here}, those in the other mean {there}"
    are_images = is_image and all(map(_may_be_image, (kind, found)))
    if are_images or _fits(kind, found) or _is_hollow(kind):
        return ""
    return f"its column {column} holds {found}, in the other it holds {kind}"


def are_read_alike(footers: Iterable[Footer], needed: NeededColumns) -> bool:
    """Whether `datasets` can read all columns of all non-empty files with the types of the first one."""
    first, *others = (footer.columns for footer in footers if footer.num_rows)
    used = {*needed.images, *needed.texts}
    return all(
        name in first and _fits(first[name], kind) and (name in used or _casts(first[name], kind))
        for other in others
        for name, kind in other.items()
    )


def _casts(first: pa.DataType, other: pa.DataType) -> bool:
    """Whether every value of a type can be cast to another that fits it; a number like 0.5 can't become an integer."""
    return first == other or pa.types.is_null(other) or _is_text(first) or is_binary(first)


def _reading(filled: Mapping[str, Footer], decided: Mapping[str, str], needed: NeededColumns) -> dict[str, object]:
    """Returns arguments with which `datasets` reads only the needed columns, with types that suit all files.

    Args:
        decided: for each column, the file whose type applies.
    """
    from datasets import Features, Image

    sizes = [name for name in needed.sizes if all(_is_plain_in(footer, name) for footer in filled.values())]
    decided = {name: file for name, file in decided.items() if name in filled[file].columns}
    decided |= dict.fromkeys(sizes, next(iter(filled)))
    schemas = {file: filled[file].schema for file in set(decided.values())}
    features = {
        name: Image(decode=False)
        if name in needed.images and _may_be_image(filled[file].columns[name])
        else Features.from_arrow_schema(schemas[file])[name]
        for name, file in decided.items()
    }
    return {"columns": list(features), "features": Features(features)}


def _is_plain_in(footer: Footer, column: str) -> bool:
    return column in footer.columns and _is_plain(footer.columns[column])


def _is_hollow(kind: pa.DataType | None) -> bool:
    """Whether a column is empty in a file, so that other files decide its type."""
    if kind is None:
        return False
    return pa.types.is_null(kind) or (_is_list(kind) and _is_hollow(kind.value_type))


def holds_null(kind: pa.DataType | None) -> bool:
    """Whether the type of a column, or of a part of it, is unknown because it holds no values."""
    if kind is None:
        return False
    if pa.types.is_struct(kind):
        return any(holds_null(field.type) for field in kind)
    return pa.types.is_null(kind) or (_is_list(kind) and holds_null(kind.value_type))


def _may_be_image(kind: pa.DataType) -> bool:
    """Whether `datasets` can read a column as images: bytes, paths, or both in a struct."""
    if pa.types.is_struct(kind):
        return bool({field.name for field in kind} & {"bytes", "path"})
    return pa.types.is_null(kind) or _is_text(kind) or is_binary(kind)


def _class_names(schema: pa.Schema) -> dict[str, list]:
    """Returns the class names, in order of their numbers, of each column that `datasets` marks as a ClassLabel."""
    named = {name: each.get("names") for name, each in _features(schema).items() if each.get("_type") == "ClassLabel"}
    return {name: names for name, names in named.items() if isinstance(names, list)}


def _features(schema: pa.Schema) -> dict[str, dict]:
    """Returns the features that `datasets` stored for the columns, by name; {} for files from other software."""
    try:
        noted = (schema.metadata or {}).get(b"huggingface", b"{}").decode()
        features = parse_json(noted, "huggingface")["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _fits(first: pa.DataType, other: pa.DataType) -> bool:
    """Whether `datasets` can read the values of a shard with the type in the first shard."""
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
    """Returns the number of a type's group (text, bytes, struct, list, null); -1 for numbers, booleans and times."""
    groups = (_is_text, is_binary, pa.types.is_struct, _is_list, pa.types.is_null)
    return next((number for number, holds in enumerate(groups) if holds(kind)), -1)


def _is_plain(kind: pa.DataType) -> bool:
    return _group(kind) == -1


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
