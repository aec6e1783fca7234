"""Reads metadata files that list a folder's images, captions and masks: metadata.jsonl, .csv, .tsv and .parquet."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow as pa

from utils.config.delimited import is_missing, may_be_name, read_rows
from utils.config.options import UserError, first_line, nearest
from utils.config.user_files import FileError, TextReader, parse_json_lines, plain_spelling, short
from utils.data.captions import refusal_of, say_the_same
from utils.data.file_listing import MASK, METADATA
from utils.data.folders import FolderContent, KnownNames, is_image, of_split, resolve_listed
from utils.data.parquet_files import is_binary, parquet_columns
from utils.data.tables import FileTable, captions_of

logger = logging.getLogger(__name__)
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet")
NAME_COLUMN = "file_name"
NAME_COLUMNS = ("filename", "file", "image", "path", "imagefile", "imagepath", "filepath", "imagefilename")
NUM_SHOWN = 3


class ListColumns(NamedTuple):
    """The columns to read from a metadata file beside the image names.

    Attributes:
        caption: the caption column; None to read no captions.
        mask: the column of mask file names; None without masks.
        read: converts a value of the caption column to captions.
        holds_names: whether the caption column holds names, where NA or None may be a name.
    """

    caption: str | None
    mask: str | None = None
    read: Callable[[object, str], tuple[str, ...]] = captions_of
    holds_names: bool = False

    @property
    def names(self) -> list[str]:
        """The columns to read."""
        return [column for column in (self.caption, self.mask) if column is not None]


def read_metadata_folder(
    folder: Path,
    names: list[str],
    columns: ListColumns,
    split: str,
    folder_is_class: bool = False,
    encoding: str | None = None,
) -> FolderContent:
    """Reads a folder whose images are listed in `metadata.jsonl`, `.csv`, `.tsv` or `.parquet`, at its top or below.

    If the folder has splits, a split's metadata lies in its folder, or else above it. Several rows of an image in one
    file give it several captions; several files must agree on an image.

    Args:
        folder: the folder of the images.
        names: paths of the folder's files, relative to it.
        columns: the columns to read.
        split: the split to read.
        folder_is_class: see `of_split`.
        encoding: encoding of the metadata, if the user gave one.

    Returns:
        The listed images with captions and masks, and what each metadata and mask file was used for.

    Raises:
        UserError: for metadata that can't be read, is empty, lacks a column, or contradicts itself.
    """
    # find the metadata files of the split
    texts = TextReader(encoding)
    every = names
    names, num_of_none = of_split(every, split, folder_is_class=folder_is_class)
    images = {name for name in names if is_image(name)}
    files, elsewhere = metadata_files(folder, names), set()
    if not files:
        elsewhere = set(every) - set(names)
        files = _metadata_above(images, metadata_files(folder, elsewhere))

    # read them, and refuse contradictions
    lists = _Lists(folder, columns, images, elsewhere, texts)
    for metadata in files:
        lists.read(metadata)
    lists.check(files)

    # build the table of listed images
    masks = lists.masks
    num_left_out = len(images - lists.captions.keys() - set(masks.values())) + num_of_none
    by_image = None if columns.mask is None else [masks.get(name) for name in lists.captions]
    found = list(lists.captions), list(lists.captions.values())
    table = FileTable(folder, *found, lists.refused, num_left_out, by_image)
    table.texts = texts
    return FolderContent(table, names, dict.fromkeys(masks.values(), MASK) | dict.fromkeys(files, METADATA))


class _Lists:
    """The merged rows of a folder's metadata files, read one after another.

    Attributes:
        captions: the captions of each image, by its path.
        masks: the path of each mask, by the path of its image.
        refused: (image or row, reason) of each row that can't be used.
    """

    def __init__(
        self, folder: Path, columns: ListColumns, images: Collection[str], elsewhere: Collection[str], texts: TextReader
    ):
        """`elsewhere` are files of other splits, whose rows are skipped."""
        self.captions: dict[str, tuple[str, ...]] = {}
        self.masks: dict[str, str] = {}
        self.refused: list[tuple[str, str]] = []
        self._folder, self._columns, self._texts = folder, columns, texts
        self._images, self._elsewhere = KnownNames(images), elsewhere
        self._first_list = ""
        self._list_of: dict[str, str] = {}  # the file of each image whose captions are not from the first file
        self._num_rows: Counter[str] = Counter()
        self._num_masks, self._lost_masks = 0, []
        self._two_masks: dict[str, tuple[str, str]] = {}
        self._differing: dict[str, tuple[str, str]] = {}

    def read(self, metadata: str) -> None:
        """Adds the rows of a metadata file."""
        here: dict[str, tuple[str, ...]] = {}
        repeated: set[str] = set()
        known: set[str] = set()
        file, columns = self._folder / metadata, self._columns
        rows = _parquet_rows(file) if metadata.endswith(".parquet") else _metadata_rows(file, columns, self._texts)

        # collect each row's image, captions and mask
        for place, row, reason in rows:
            self._num_rows[metadata] += 1
            name = row.get(NAME_COLUMN)
            if reason or not isinstance(name, str) or not name:
                self.refused.append((place, reason or "has no file_name"))
                continue
            known |= row.keys()
            if not metadata.endswith(".jsonl"):  # where rows may omit columns that other rows have
                self._check_columns(known, place)
            captions: tuple[str, ...] = ()
            if columns.caption is not None:
                captions = columns.read(row.get(columns.caption), f"--caption_column {columns.caption}: {place}")
                if refusal := refusal_of(captions):
                    self.refused.append((name, refusal))
                    continue
            path = self._path_of(PurePosixPath(metadata).parent, name, row)
            if path is None:
                continue
            if path in here:
                repeated.add(path)
            here[path] = here.get(path, ()) + captions

        # check the columns, report repeated images, and merge with the other files
        if known:
            self._check_columns(known, metadata)
        if repeated:
            use = ", with one of its captions drawn at each step" if columns.caption is not None else ""
            logger.warning(
                "%s: %d images have several rows, such as %s; each is used once per epoch%s",
                *(file, len(repeated), short(min(repeated)), use),
            )
        self._add(metadata, here)

    def _check_columns(self, known: set[str], place: str) -> None:
        """Refuses a metadata file that lacks a required column."""
        for flag, column in (("caption_column", self._columns.caption), ("mask_column", self._columns.mask)):
            if column is not None:
                _check_metadata_column(flag, column, known, place)

    def _path_of(self, parent: PurePosixPath, name: str, row: Mapping[str, object]) -> str | None:
        """Returns the path of a row's image and records its mask; None if it is refused or in another split."""
        path, reason = resolve_listed(parent, name, self._folder, self._images)
        mask, mask_reason, value = "", "", row.get(self._columns.mask) if self._columns.mask is not None else None
        if value:
            mask, mask_reason = resolve_listed(parent, str(value), self._folder, self._images)
        if path in self._elsewhere:
            return None
        self._num_masks += bool(value)
        if reason or mask_reason:
            if not reason:
                self._lost_masks.append(str(value))
            self.refused.append((name, reason or f"its mask {value}: {mask_reason}"))
            return None
        if mask and self.masks.setdefault(path, mask) != mask:
            self._two_masks[path] = self.masks[path], mask
        return path

    def _add(self, metadata: str, here: dict[str, tuple[str, ...]]) -> None:
        """Merges the captions of one metadata file with those of the others."""
        if not self.captions:
            self.captions, self._first_list = here, metadata
            return
        for path, captions in here.items():
            before = self.captions.get(path, ())
            if before and captions and not say_the_same(before, captions):
                self._differing[path] = self._list_of.get(path, self._first_list), metadata
            if not before:
                self.captions[path], self._list_of[path] = captions, metadata

    def check(self, files: Sequence[str]) -> None:
        """Refuses metadata files that list no images or contradict each other.

        Raises:
            UserError: naming the files and the first images.
        """
        # contradictions
        if self._differing:
            path, (first, second) = next(iter(self._differing.items()))
            raise UserError(
                f"{self._folder}: {first} and {second} give {len(self._differing):,} images different captions, such "
                f"as {short(path)}; remove one of the two, or put all captions of an image into one"
            )
        if self._two_masks:
            path, masks = next(iter(self._two_masks.items()))
            raise UserError(
                f"--mask_column {self._columns.mask}: {len(self._two_masks):,} images have two masks, such as "
                f"{short(path)}: {' and '.join(map(short, masks))}; keep one for each image"
            )

        # a mask column without file names
        if self._lost_masks and len(self._lost_masks) == self._num_masks:
            there = short(self._lost_masks[0])
            raise UserError(
                f"--mask_column {self._columns.mask}: none of its {self._num_masks:,} values in {', '.join(files[:3])} "
                f"is the name of a file, such as {there}; name the column of the masks' file names"
            )

        # files without rows
        empty = [name for name in files if not self._num_rows[name]]
        if empty and len(empty) == len(files):
            raise UserError(
                f"{self._folder / empty[0]}: lists no images; write a row for each, or remove it to train on the "
                "images with the captions beside them"
            )
        for name in empty:
            logger.warning("%s: lists no images", self._folder / name)


def captions_in_lists(
    folder: Path, files: Sequence[str], images: Collection[str], columns: ListColumns, encoding: str | None = None
) -> dict[str, tuple[str, ...]]:
    """Returns the captions in some metadata files of a folder, by the paths of the images.

    Raises:
        UserError: as `read_metadata_folder`.
    """
    lists = _Lists(folder, columns, images, (), TextReader(encoding))
    for metadata in files:
        lists.read(metadata)
    lists.check(files)
    return lists.captions


def metadata_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Returns the metadata files among a folder's files; a Parquet one only if there is no other in its folder."""
    found = [name for name in names if name.rpartition("/")[2] in METADATA_NAMES]
    places = {name.rpartition("/")[0] for name in found if not name.endswith(".parquet")}
    return [
        name
        for name in found
        if not name.endswith(".parquet")
        or (name.rpartition("/")[0] not in places and "file_name" in parquet_columns(folder / name))
    ]


def _metadata_above(images: Collection[str], metadata: Iterable[str]) -> list[str]:
    """Returns the metadata files in folders that contain some of the images, at any depth."""
    places = ((name, name.rpartition("/")[0]) for name in sorted(metadata))
    return [name for name, place in places if any(not place or image.startswith(f"{place}/") for image in images)]


def _check_metadata_column(flag: str, column: str, known: set[str], place: str) -> None:
    """Refuses metadata that lacks a column."""
    if column in known:
        return
    there = sorted(known - {NAME_COLUMN})
    hint = next((name for name in there if plain_spelling(name) == plain_spelling(column)), "") or nearest(
        column, there
    )
    shown = ", ".join(f"{name:.40}" for name in there[:20]) or f"none beside {NAME_COLUMN}"
    raise UserError(
        f"--{flag} {column} is not a column of the data: {place} has {shown}; "
        + (f"did you mean --{flag} {hint:.40}?" if hint else f"name one with --{flag}")
    )


def _parquet_rows(file: Path) -> Iterator[tuple[str, dict, str]]:
    """Yields rows as `_metadata_rows`, from a Parquet file, without its columns of bytes."""
    from pyarrow import parquet

    columns = [name for name, kind in parquet_columns(file).items() if not is_binary(kind)]
    number = 0
    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(1000, columns=columns):
                for number, row in enumerate(batch.to_pylist(), start=number + 1):  # noqa: B020  it keeps counting
                    yield f"{file.name}, row {number}", row, ""
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} can't be read: {first_line(error)}") from error


def _metadata_rows(file: Path, columns: ListColumns, texts: TextReader) -> Iterator[tuple[str, dict, str]]:
    """Yields (file and line, row, why it can't be read) for each row of a metadata file, its name under `file_name`.

    Args:
        columns: the columns to read beside the name.
    """
    try:
        text = texts.read(file)
    except OSError as error:
        raise UserError(f"{file} can't be read: {first_line(error)}") from error
    said: set[str] = set()
    is_table = file.suffix != ".jsonl"
    for place, row, reason in _table_rows(text, file, columns) if is_table else _json_rows(text, file.name):
        name = NAME_COLUMN if NAME_COLUMN in row else _name_column(row)
        if is_table and not name:
            is_row = any(map(is_image, row))
            named = f"rename the column of the images' names to {NAME_COLUMN}"
            cure = "write a header above its first row" if is_row else named
            raise FileError(file, f"has no column {NAME_COLUMN}; its columns are {short(list(row))}; {cure}")
        if name not in ("", NAME_COLUMN):
            if name not in said:
                logger.info("%s: the column %s is read as %s, the images' names", file, short(name), NAME_COLUMN)
            said.add(name)
            row = row | {NAME_COLUMN: row[name]}
        yield place, row, reason


def _name_column(row: Mapping[str, object]) -> str:
    """Returns the column that holds the images' names though it is not called `file_name`; "" if there is none."""
    plain = {plain_spelling(name): name for name in row}
    return next((plain[each] for each in (plain_spelling(NAME_COLUMN), *NAME_COLUMNS) if each in plain), "")


def _table_rows(text: str, file: Path, columns: ListColumns) -> Iterator[tuple[str, dict, str]]:
    def names_an_image(column: str, cell: str) -> bool:
        return is_image(cell) and bool(_name_column({column: cell}))

    missing, names = _Marks(), _Marks()
    known = (NAME_COLUMN, *NAME_COLUMNS, *columns.names)
    for line, values, reason in read_rows(text, file, known, names_an_image):
        found = {name: None if is_missing(value) else value for name, value in values.items()}
        for column in columns.names:
            cell = values.get(column)
            if not cell or found[column] is not None:
                continue
            is_name = columns.holds_names and column == columns.caption and may_be_name(cell)
            (names if is_name else missing).add(cell, line)
            if is_name:
                found[column] = cell
        yield f"{file.name}, line {line}", found, reason
    if missing.counts:
        told = "and are read as empty; metadata.jsonl can hold such texts"
        logger.warning("%s: %s, %s", file, missing.describe(), told)
    if names.counts:
        told = "and are read as names; leave a cell empty where there is none"
        logger.warning("%s: %s, %s", file, names.describe(), told)


class _Marks:
    """Counts cells that hold a mark for a missing value, such as NA."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first = 0

    def add(self, cell: str, line: int) -> None:
        """Adds a cell of a row that starts at `line`."""
        self._first = self._first or line
        self.counts[cell] += 1

    def describe(self) -> str:
        """Returns how many there are, the most frequent ones, and the line of the first."""
        shown = ", ".join(mark for mark, _ in self.counts.most_common(NUM_SHOWN))
        return f"{self.counts.total():,} cells hold {shown}, the first on line {self._first}"


def _json_rows(text: str, name: str) -> Iterator[tuple[str, dict, str]]:
    for number, row, reason in parse_json_lines(text):
        is_object = isinstance(row, dict)
        told = "" if is_object else f"is not a JSON object but a {type(row).__name__}; write an object for each image"
        yield f"{name}, line {number}", row if is_object else {}, reason or told
