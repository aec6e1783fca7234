"""Makes the `datasets` library read local files: paths without patterns, and files whose schemas differ."""

import glob
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from utils.config.options import UserError
from utils.data.parquet_files import (
    Footer,
    NeededColumns,
    Shards,
    are_read_alike,
    check_shards,
    deciding_files,
    holds_null,
    read_footers,
)

if TYPE_CHECKING:
    from datasets import DatasetBuilder, Features

BEGINNING = 1 << 20  # bytes of a JSON file from which its columns are inferred
MOST_BEGINNINGS = 200  # number of files that are inspected
PATTERN_MARKS = ("[", "*", "?", "::")  # in paths, `datasets` reads these as patterns or chained URLs


def plain_path(path: str, cache_dir: str | None) -> str:
    """Returns a path that `datasets` reads literally: a link to it, if it contains pattern characters.

    Args:
        cache_dir: folder for the link; None for the cache of `datasets`.

    Raises:
        UserError: if the link can't be made.
    """
    if not any(mark in path for mark in PATTERN_MARKS):
        return path
    import datasets

    resolved = Path(path).resolve()
    digest = hashlib.blake2b(os.fsencode(resolved), digest_size=12).hexdigest()
    link = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "plain_names" / digest
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(resolved, target_is_directory=True)
    except FileExistsError:  # another process created it
        pass
    except OSError as error:
        cure = f"rename it (creating a link to it failed: {error.strerror or error})"
        raise UserError(f"{path} contains characters that the datasets library reads as a pattern; {cure}") from error
    return str(link)


def dataset_paths(root: Path, names: Iterable[str], cache_dir: str | None) -> list[str]:
    """Returns the paths of files in a form that `datasets` reads literally."""
    folder = plain_path(str(root), cache_dir) if "::" in str(root) else str(root)
    return [glob.escape(str(Path(folder, name))) for name in names]


def split_alone(
    builder: "DatasetBuilder", folder: Path, split: str, needed: NeededColumns, cache_dir: str | None
) -> tuple[str, dict[str, object]] | None:
    """Returns (builder name, its arguments) to read a split of a local folder that `datasets` cannot read by itself.

    Returns None if it can. It cannot read Parquet files without rows, or a column whose type differs from that at the
    beginning of the first file of any split, even if the column is not used.

    Args:
        builder: the builder that `datasets` chooses for the folder.
        needed: the columns that are used.
        cache_dir: as in `plain_path`.

    Raises:
        UserError: if the files of the split can't be read together.
    """
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet

    if (
        not isinstance(builder, Json | Parquet) or builder.config.features or builder.info.features
    ):  # its README declares the types
        return None
    root, given = folder.resolve(), builder.config.data_files or {}
    files = {name: [os.path.relpath(file, root) for file in found] for name, found in given.items()}
    if split not in files:
        return None
    if isinstance(builder, Parquet):
        name, found = "parquet", _parquet_alone(folder, files, split, needed)
    else:
        name, found = "json", _json_alone(folder, files[split], needed)
    if found is None:
        return None
    names, reading = found
    return name, {"data_files": {split: dataset_paths(root, names, cache_dir)}, **reading}


def _parquet_alone(folder: Path, files: Mapping[str, list[str]], split: str, needed: NeededColumns) -> Shards | None:
    """Does the part of `split_alone` for Parquet files."""
    footers = read_footers(folder, [name for given in files.values() for name in given], "dataset_name")
    if all(footer.num_rows for footer in footers.values()) and are_read_alike(footers.values(), needed):
        return None
    return check_shards(folder, {name: footers[name] for name in files[split]}, needed, "dataset_name")


def _json_alone(folder: Path, names: Sequence[str], needed: NeededColumns) -> Shards | None:
    """Does the part of `split_alone` for JSON files, whose types are inferred from the beginning of each file.

    If there are very many files, only a sample is inspected.
    """
    from datasets import Features, Image, Json, Value

    # infer the schema of each file
    schemas: dict[str, pa.Schema] = {}
    for name in names[:: -(-len(names) // MOST_BEGINNINGS)]:
        features = _features_at_beginning(folder / name)
        if features is None:  # reading the whole file will report the error
            return None
        if features:
            schemas[name] = features.arrow_schema

    # stop if datasets reads them correctly by itself
    columns = list(dict.fromkeys(column for schema in schemas.values() for column in schema.names))
    used = [name for name in (*needed.images, *needed.texts) if name in columns]
    beginnings = {name: Footer(1, _with_columns(schema, used)) for name, schema in schemas.items()}
    are_whole = not any(holds_null(footer.columns.get(name)) for footer in beginnings.values() for name in used)
    if not beginnings or (are_whole and are_read_alike(beginnings.values(), needed)):
        return None

    # choose a type for each column; unused columns with several types are read as JSON
    decided = deciding_files(folder, beginnings, needed, "dataset_name")
    found: dict[str, object] = {}
    for column in columns:
        kinds = {footer.columns[column] for footer in beginnings.values() if column in footer.columns}
        file = decided.get(column) or next(name for name, footer in beginnings.items() if column in footer.columns)
        if column in needed.images:
            found[column] = Image(decode=False)
        elif column in used and pa.types.is_null(beginnings[file].columns[column]):
            found[column] = Value("string")
        elif column in used or (len(kinds) == 1 and not any(map(holds_null, kinds))):
            found[column] = Features.from_arrow_schema(beginnings[file].schema)[column]
        else:
            found[column] = Json()
    return Shards(list(names), {"features": Features(found)})


def _with_columns(schema: pa.Schema, names: Iterable[str]) -> pa.Schema:
    """Returns the schema with missing columns added as null, because rows of a JSON file may omit them."""
    return pa.schema([*schema, *(pa.field(name, pa.null()) for name in names if name not in schema.names)])


def _features_at_beginning(file: Path) -> "Features | None":
    """Returns the columns of a JSON file inferred from its beginning: none for an empty file, None if unreadable."""
    import datasets

    if file.stat().st_size == 0:
        return datasets.Features()
    try:
        files = {"train": glob.escape(str(file))}
        return datasets.load_dataset("json", data_files=files, streaming=True, chunksize=BEGINNING)["train"].features
    except (OSError, ValueError, TypeError, RuntimeError, pa.ArrowException, datasets.exceptions.DatasetsError):
        return None
