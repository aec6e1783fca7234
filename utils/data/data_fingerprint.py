"""A record of the training data, kept in the output folder, by which a resumed run detects edited data.

The file is named by a digest of its content without file times: the same data have the same record, wherever they are
stored. It is Parquet followed by a digest, but without the extension .parquet, because an output folder may be inside
a folder of Parquet data.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from utils.config.delimited import MISSING
from utils.data.disk_tables import encoded, read_table, write_table

NAME = re.compile(r"data_record-[0-9a-f]{16}\.bin")
DIGESTED_BYTES = 2 << 30  # total size of the images up to which all are read to compute digests
NUM_SHOWN = 3
CAPTION_SIZE = 8
SCHEMA = pa.schema(
    {
        "key": pa.large_binary(),
        "bytes": pa.int64(),
        "time": pa.int64(),
        "digest": pa.large_binary(),
        "mask_bytes": pa.int64(),
        "mask_time": pa.int64(),
        "mask_digest": pa.large_binary(),
        "captions": pa.large_binary(),
    }
)
TIMES = ("time", "mask_time")


class FileFacts(NamedTuple):
    """Facts about N files.

    Attributes:
        num_bytes: [N] int64 sizes in bytes; -1 for missing files.
        times: [N] int64 modification times, or another number that changes with the file.
        digests: [N] digests of their bytes; b"" if unknown.
    """

    num_bytes: np.ndarray
    times: np.ndarray
    digests: np.ndarray


class Comparison(NamedTuple):
    """How data differ from an earlier record.

    Attributes:
        words: description of the changes; "" if there are none.
        num_unknown: number of images with the same size but another time, and no digest to compare.
    """

    words: str
    num_unknown: int


def content_table(
    keys: Iterable[str], images: FileFacts, masks: FileFacts | None, captions: Iterable[Sequence[str]] | None
) -> pa.Table:
    """Returns the record of the images.

    Args:
        keys: name of each image.
        images: facts about the image files.
        masks: facts about the mask files, or None without masks.
        captions: captions of each image, or None to leave them out.
    """
    keys = list(keys)
    if masks is None:
        masks = FileFacts(np.full(len(keys), -1), np.zeros(len(keys), np.int64), np.full(len(keys), b"", object))
    texts = [b""] * len(keys) if captions is None else [_caption_digest(each) for each in captions]
    columns = [encoded(keys)]
    for facts in (images, masks):
        columns += [pa.array(facts.num_bytes, pa.int64()), pa.array(facts.times, pa.int64())]
        columns.append(pa.array(list(facts.digests), pa.large_binary()))
    return pa.table([*columns, pa.array(texts, pa.large_binary())], schema=SCHEMA)


def _caption_digest(captions: Sequence[str]) -> bytes:
    text = "\0".join([str(len(captions)), *captions])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=CAPTION_SIZE).digest()


def content_name(table: pa.Table) -> str:
    """Returns the file name of a record: a digest of its content without file times."""
    digest = hashlib.blake2b(digest_size=8)
    for name in SCHEMA.names:
        if name in TIMES:
            continue
        if SCHEMA.field(name).type == pa.int64():
            digest.update(np.ascontiguousarray(table[name].to_numpy()).tobytes())
            continue
        lengths, content = _buffers(table[name])
        digest.update(lengths.tobytes())
        digest.update(content)
    return f"data_record-{digest.hexdigest()}.bin"


def _buffers(column: pa.ChunkedArray) -> tuple[np.ndarray, memoryview]:
    """Returns ([n] int64 lengths of a column's values, the concatenated values)."""
    array = column.combine_chunks()
    _, offsets, content = array.buffers()
    if not len(array):
        return np.zeros(0, np.int64), memoryview(b"")
    places = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    return np.diff(places), memoryview(b"" if content is None else content)[places[0] : places[-1]]


def is_content_name(name: str) -> bool:
    """Returns whether a file name is that of a record."""
    return NAME.fullmatch(name) is not None


def write_content(folder: Path, table: pa.Table) -> str:
    """Writes a record to a folder and returns the name of its file.

    Raises:
        OSError: if it can't be written.
    """
    name = content_name(table)
    write_table(folder / name, table)
    return name


def read_content(folder: Path, name: str) -> pa.Table:
    """Reads the record of this name from a folder.

    Raises:
        OSError, ValueError: if it can't be read or has changed since it was written.
    """
    table = read_table(folder / name, SCHEMA)
    if content_name(table) != name:
        raise ValueError(f"{folder / name} has changed since it was written")
    return table


def compare(then: pa.Table, now: pa.Table) -> Comparison:
    """Returns how the images of a record differ from those of an earlier one."""
    from pyarrow import compute

    # match images by name
    places = compute.index_in(now["key"], value_set=then["key"].combine_chunks())
    places = np.asarray(places.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)
    common = np.flatnonzero(places >= 0)
    is_there = np.zeros(len(then), bool)
    is_there[places[common]] = True

    # compare files, masks and captions of the images in both records
    before, after = then.take(places[common]), now.take(common)
    images, unknown = _changed(before, after, "")
    masks, unknown_masks = _changed(before, after, "mask_")
    captions = _objects(before, "captions") != _objects(after, "captions")
    emptied = _are_marks(before) & (_objects(after, "captions") == _caption_digest(()))
    kinds = {
        "changed": after.filter(images),
        "with other captions": after.filter(captions & ~emptied),
        "with captions such as NULL or None, which are now read as empty": after.filter(emptied),
        "with other masks": after.filter(masks),
        "added": now.filter(places < 0),
        "missing": then.filter(~is_there),
    }
    words = ", ".join(f"{len(some)} {kind} ({_names(some)})" for kind, some in kinds.items() if len(some))
    return Comparison(words, int((unknown | unknown_masks).sum()))


def _changed(before: pa.Table, after: pa.Table, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns ([n] bool whether each file has changed, [n] bool whether that is unknown)."""
    one, other = (_objects(table, f"{prefix}digest") for table in (before, after))
    is_known = (one != b"") & (other != b"")
    sizes, times = (
        before[f"{prefix}{name}"].to_numpy() != after[f"{prefix}{name}"].to_numpy() for name in ("bytes", "time")
    )
    changed = np.where(is_known, one != other, sizes)
    return changed, ~is_known & ~changed & times


def _are_marks(table: pa.Table) -> np.ndarray:
    """Returns [n] bool whether the caption of each image is a marker for a missing value, such as NULL."""
    marks = {_caption_digest((mark,)) for mark in MISSING}
    return np.fromiter((digest in marks for digest in table["captions"].to_pylist()), bool, len(table))


def _objects(table: pa.Table, name: str) -> np.ndarray:
    return np.array([*table[name].to_pylist(), None], object)[:-1]


def _names(table: pa.Table) -> str:
    names = [os.fsdecode(name) for name in table["key"].slice(0, NUM_SHOWN).to_pylist()]
    return ", ".join(names) + (", ..." if len(table) > NUM_SHOWN else "")


def file_facts(paths: Sequence[Path]) -> FileFacts:
    """Returns facts about files, with digests if their total size is at most `DIGESTED_BYTES`.

    Raises:
        OSError: if a file can't be read.
    """
    facts = [os.stat(path) for path in paths]
    sizes = np.array([each.st_size for each in facts], np.int64)
    digests = np.full(len(paths), b"", object)
    if sizes.sum() <= DIGESTED_BYTES:
        for number, path in enumerate(paths):
            with open(path, "rb") as file:
                digests[number] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    return FileFacts(sizes, np.array([each.st_mtime_ns for each in facts], np.int64), digests)
