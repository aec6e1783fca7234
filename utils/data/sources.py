"""Reads the sources of images and captions, of any kind, and combines several sources in one run."""

import hashlib
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from utils.config.batch import MaskFile
from utils.config.options import (
    UserError,
    first_line,
    nearest,
    require,
)
from utils.config.seeding import Stream, generator
from utils.config.user_files import (
    short,
)
from utils.data.captions import FOLDER_REPEATS, CaptionOptions, say_the_same
from utils.data.dataset_files import PATTERN_MARKS, dataset_paths, plain_path, split_alone
from utils.data.file_listing import METADATA, SHARD, Fate, Listing, list_folder, warn_of_unread
from utils.data.folder_contents import (
    BESIDE_LIST,
    check_configurations,
    cure_of,
    describe_unread,
    detect_kind,
    image_tables,
    settle,
    unread_lists,
    unread_of_dataset,
)
from utils.data.folders import (
    FolderContent,
    compare_with_list,
    is_caption_file,
    is_image,
    of_split,
    read_caption_file_folder,
    read_pairs_folder,
    split_of,
)
from utils.data.masks import Masks
from utils.data.metadata import ListColumns, captions_in_lists, metadata_files, read_metadata_folder
from utils.data.parquet_files import NeededColumns, check_shards, read_footers
from utils.data.shard_series import tell_of_gaps
from utils.data.source_kinds import SOURCES
from utils.data.source_options import CAPTION_FILE, DataOptions, SourceEntry, SourceOptions, source_entries
from utils.data.tables import FileTable, ImageTable, RowTable, data_folders
from utils.data.tar_shards import NO_FILES, read_tars, why_no_tar

logger = logging.getLogger(__name__)
FOLDER_NUMBER = re.compile(r"(\d+)(?:_|$)")  # kohya's rule: the number before the first underscore
TABLES = (".parquet", ".json", ".jsonl", ".ndjson")
NUM_LISTS = 3  # caption files that a message names


@dataclass(frozen=True)
class Source:
    """A table of images and how they are used.

    Attributes:
        name: prefix of its images' names in messages if there are several sources.
        table: its images.
        captions: how its captions are used.
        repeats: how often each of its images is used per epoch.
        weight: its share of the samples relative to the other sources, regardless of its size; replaces `repeats`.
        loss_weight: factor on the loss of its samples.
        masks: its masks; None if the loss counts everywhere.
    """

    name: str
    table: ImageTable = field(repr=False)
    captions: CaptionOptions
    repeats: Fraction = Fraction(1)
    weight: Fraction | None = None
    loss_weight: float = 1.0
    masks: Masks | None = field(default=None, repr=False)

    @property
    def use(self) -> str:
        """How its images are used, except for how often."""
        masks = self.masks.name.partition(" ")[0] if self.masks else "no"
        return f"loss_weight {self.loss_weight:g}, {masks} masks, {self.captions}"


class Records:
    """The images of all sources in a fixed order, each read on access.

    Attributes:
        sources: the sources.
        source_numbers: [N] the source of each image.
        rows: [N] the row of each image in its source's table.
        copies: [N] repeats of each image by its folder's name (--folder_repeats); None if all are 1.
        refused: (key, reason) of each image that a source lists but that can't be used.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        source_numbers: np.ndarray,
        rows: np.ndarray,
        copies: np.ndarray | None = None,
    ):
        self.sources = list(sources)
        self.source_numbers = source_numbers
        self.rows = rows
        self.copies = copies
        self.refused = [
            (self._name(number, key), reason)
            for number, source in enumerate(self.sources)
            for key, reason in source.table.refused
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        """Returns an image's name for messages."""
        number = int(self.source_numbers[index])
        return self._name(number, self.sources[number].table.key(int(self.rows[index])))

    def image(self, index: int) -> str | bytes:
        """Returns an image's path or bytes."""
        return self.source(index).table.image(int(self.rows[index]))

    @property
    def has_masks(self) -> bool:
        """Whether some images may have masks."""
        return any(source.masks is not None for source in self.sources)

    def mask(self, index: int) -> MaskFile | None:
        """Returns an image's mask; None if the loss counts everywhere."""
        source = self.source(index)
        return None if source.masks is None else source.masks.of(source.table, int(self.rows[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns an image's captions, at least one."""
        number, row = int(self.source_numbers[index]), int(self.rows[index])
        return self._present(self.sources[number].table.captions(row), number, row)

    def source(self, index: int) -> Source:
        """Returns the source of an image."""
        return self.sources[int(self.source_numbers[index])]

    def caption_options(self, index: int) -> CaptionOptions:
        """Returns how an image's captions are used."""
        return self.source(index).captions

    def loss_weight(self, index: int) -> float:
        """Returns the factor on an image's loss."""
        return self.source(index).loss_weight

    def identity(self, index: int) -> int:
        """Returns 64 bits that seed the image's random draws.

        They depend on its path within the folder, or on the row number in a dataset, so that the draws stay the same
        when images are added or the folder moves.
        """
        key = self.source(index).table.key(int(self.rows[index]))
        return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")

    def all_captions(self) -> Iterator[tuple[str, ...]]:
        """Yields the captions of each image, in order; () if it has none."""
        return self._each_captions(lambda options: options.of)

    def recorded_captions(self) -> Iterator[tuple[str, ...]]:
        """Yields the captions that a checkpoint records, from which a resumed run sees whether they changed."""
        return self._each_captions(lambda options: options.recorded)

    def first_captions(self) -> Iterator[str]:
        """Yields the first of the `captions` of each image, in order, faster than one by one."""
        for index, captions in enumerate(self.all_captions()):
            yield captions[0] if captions else self._instead(int(self.source_numbers[index]), int(self.rows[index]))

    def _each_captions(
        self, use: Callable[[CaptionOptions], Callable[[tuple[str, ...]], tuple[str, ...]]]
    ) -> Iterator[tuple[str, ...]]:
        for number, source in enumerate(self.sources):  # the images of a source are consecutive and in order
            rows = self.rows[self.source_numbers == number]
            if len(rows) * 2 < len(source.table):
                yield from (use(source.captions)(source.table.captions(int(row))) for row in rows)
                continue
            is_taken = np.zeros(len(source.table), bool)
            is_taken[rows] = True
            yield from map(use(source.captions), itertools.compress(source.table.all_captions(), is_taken))

    def take(self, indices: np.ndarray) -> "Records":
        """Returns the records at some indices, in that order."""
        copies = None if self.copies is None else self.copies[indices]
        return Records(self.sources, self.source_numbers[indices], self.rows[indices], copies)

    def repeats(self) -> list[Fraction]:
        """Returns how often each source's images are used per epoch.

        With weights, an epoch has as many samples as there are images.
        """
        counts = [int((self.source_numbers == number).sum()) for number in range(len(self.sources))]
        weights = [source.weight for source in self.sources]
        if weights[0] is None:
            return [source.repeats for source in self.sources]
        total = sum(weight for weight, count in zip(weights, counts, strict=True) if count)
        return [
            weight * len(self) / (total * count) if count else Fraction(0)
            for weight, count in zip(weights, counts, strict=True)
        ]

    def groups(self) -> tuple[np.ndarray, list[Fraction]]:
        """Returns ([N] the group of each image, how often the images of each group are used per epoch).

        A group is a source, or with --folder_repeats the folders of a source that have the same number.
        """
        repeats = self.repeats()
        if self.copies is None:
            return self.source_numbers, repeats
        found, group_of = np.unique(np.stack([self.source_numbers, self.copies]), axis=1, return_inverse=True)
        group_of = group_of.reshape(-1)
        shares = []
        for source, copies in found.T.tolist():
            share = repeats[source] * copies
            if self.sources[source].weight is not None:  # the weight applies to all folders of the source together
                of_source = self.copies[self.source_numbers == source]
                share = share * len(of_source) / int(of_source.sum())
            shares.append(share)
        return group_of, shares

    def numbered_folders(self) -> dict[str, int]:
        """Returns the number in each folder name of kohya's style, such as 10_cat, by the folder's name."""
        folders: dict[str, int] = {}
        for number, source in enumerate(self.sources):
            if isinstance(source.table, RowTable) or source.captions.folder_is_class:
                continue
            for row in self.rows[self.source_numbers == number].tolist():
                name = folder_of(source.table.key(row))
                if name not in folders and (match := FOLDER_REPEATS.match(name)):
                    folders[name] = int(match[1][:10])
        return folders

    def _name(self, number: int, key: str) -> str:
        return f"{self.sources[number].name}/{key}" if len(self.sources) > 1 else key

    def _present(self, captions: tuple[str, ...], number: int, row: int) -> tuple[str, ...]:
        return self.sources[number].captions.of(captions) or (self._instead(number, row),)

    def _instead(self, number: int, row: int) -> str:
        """Returns the caption of an image without one: its folder's name or an empty caption."""
        source, table = self.sources[number], self.sources[number].table
        by_folder = source.captions.on_missing_caption == "folder"
        return source.captions.of_folder(table.key(row), table.name, table.in_shards) if by_folder else ""


def read_records(
    data: DataOptions,
    source: SourceOptions,
    captions: CaptionOptions,
    seed: int,
    left_out: Mapping[Path, Fate] = MappingProxyType({}),
) -> Records:
    """Lists the images of all sources.

    Args:
        data: the options of all sources.
        source, captions: options that each source may override.
        seed: the run's seed, for --max_train_samples.
        left_out: see `list_folder`.

    Raises:
        UserError: for a source that can't be read, is empty, or lacks a column.
    """
    sources, rows, copies = [], [], []
    for entry in source_entries(data, source, captions):
        table = read_table(entry.source, data.cache_dir, entry.captions, left_out)
        entry = entry._replace(captions=_settled(entry, table))
        sources.append(Source(entry.name, table, *entry[2:], entry.source.masks()))
        rows.append(_subset(table, entry.source, seed))
        copies.append(_copies(table, rows[-1], entry))
        rows[-1], copies[-1] = rows[-1][copies[-1] > 0], copies[-1][copies[-1] > 0]
    numbers = [np.full(len(each), number, np.uint16) for number, each in enumerate(rows)]
    together = np.concatenate(copies)
    return Records(sources, np.concatenate(numbers), np.concatenate(rows), None if (together == 1).all() else together)


def _settled(entry: "SourceEntry", table: ImageTable) -> CaptionOptions:
    """Returns how a source's captions are used, now that its images are known."""
    source = entry.source
    if entry.captions.folder_is_class and isinstance(table, RowTable):
        raise UserError(
            f"--class_conditional: {source.given_as} holds rows, which have no folders; name the class column with "
            "--label_column"
        )
    path = Path(source.train_data_dir or source.dataset_name).resolve()
    keys = (table.key(row) for row in range(len(table)))
    name = path.stem if path.is_file() else path.name
    return entry.captions.settled(keys, source.given_as, name, table.in_shards)


def folder_of(key: str) -> str:
    """Returns the name of an image's folder, "" at the top."""
    return key.rpartition("/")[0].rpartition("/")[2]


def _copies(table: ImageTable, rows: np.ndarray, entry: "SourceEntry") -> np.ndarray:
    """Returns [rows]: the number in each image's folder name, its repeats per epoch; 1 if there is no number."""
    if not entry.source.folder_repeats:
        return np.ones(len(rows), np.int64)
    numbers: dict[str, int] = {}
    found = np.ones(len(rows), np.int64)
    for place, row in enumerate(rows.tolist()):
        name = folder_of(table.key(row))
        if name not in numbers:
            match = FOLDER_NUMBER.match(name)
            numbers[name] = int(match[1][:10]) if match else 1
            require(numbers[name] <= 10**6, "folder_repeats", name, "find no folder name with a number over 1000000")
        found[place] = numbers[name]
    told = ", ".join(f"{short(name)} {count}" for name, count in sorted(numbers.items())[:20])
    logger.info("%s: repeats per epoch of the images, by folder: %s", entry.name, told)
    require(bool((found > 0).any()), "folder_repeats", entry.name, "find a folder whose number is above 0")
    return found


def _subset(table: ImageTable, options: SourceOptions, seed: int) -> np.ndarray:
    """Returns the rows of a table that are used, in order."""
    rows = np.arange(len(table))
    if options.max_train_samples is not None and options.max_train_samples < len(rows):
        order = generator(seed, 0, 0, Stream.SUBSET).permutation(len(rows))
        rows = np.sort(order[: options.max_train_samples])
    return rows


def read_table(
    options: SourceOptions, cache_dir: str | None, captions: CaptionOptions, left_out: Mapping[Path, Fate]
) -> ImageTable:
    """Lists the images of one source, and warns of files that are not used.

    Args:
        options: the options of the source.
        cache_dir: --cache_dir.
        captions: how its captions are used.
        left_out: see `list_folder`.

    Raises:
        UserError: if it can't be read, is empty, or lacks a column.
    """
    # a dataset of the `datasets` library
    if options.dataset_name is not None:
        table = _read_dataset(options, cache_dir)
        if len(table) == 0:
            raise UserError(f"there are no images in --dataset_name {options.dataset_name}")
        return table

    # a folder: detect its kind and list its images
    listing = options.listing(left_out)
    kind = detect(options, listing)
    content = SOURCES[kind](options, cache_dir, listing, captions.folder_is_class)
    settle(listing, content, kind)
    for finding in content.table.texts.findings() if content.table.texts else ():
        logger.warning("%s: %s", content.table.name, finding)

    # report what is missing or not read
    table, lists = content.table, unread_lists(listing.names, content)
    where = f"--train_data_dir {options.train_data_dir}"
    if len(table) == 0:
        raise UserError(_nothing_there(where, content, lists))
    if table.num_left_out:
        told = "skipped %d images in %s that are not listed in any metadata file or split"
        logger.warning(told, table.num_left_out, table.name)
    if captions.are_expected:
        _say_which_captions_are_read(where, content, options)
    is_bare = isinstance(table, FileTable) and captions.are_expected and table.num_without_captions() > 0
    for name in lists[:5] if table.num_left_out or is_bare else ():
        logger.warning("%s: %s is not read; if it lists captions, %s", where, name, cure_of(name))
    for fates in filter(None, (table.fates, table.member_fates)):
        warn_of_unread(where, fates)
    return table


def _say_which_captions_are_read(where: str, content: FolderContent, options: SourceOptions) -> None:
    """Warns if images have captions in several places, of which only one is read; labels are not compared."""
    table, fates = content.table, content.table.fates
    is_beside = fates is not None and any(fate.reason == BESIDE_LIST for fate in fates.by_fate())
    beside = [name for name, fate in fates if fate.reason == BESIDE_LIST] if is_beside else []
    read = [name for name, word in content.used.items() if word == METADATA]
    shown = ", ".join(read[:NUM_LISTS])
    findings = list(content.findings)
    if read and not options.holds_names:
        captions = dict(zip(table.names(), table.all_captions(), strict=True))
        findings += compare_with_list(table.root, captions, beside, shown, options.text_encoding)
        findings += _compare_with_metadata(table.root, captions, content.names, options)
    for finding in findings:
        logger.warning("%s: %s", where, finding)
    if beside and not findings:
        told = "%s: captions are read from %s; %d text files beside images are not, such as %s"
        logger.info(told, where, shown, len(beside), beside[0])


def _compare_with_metadata(
    root: Path, captions: Mapping[str, Sequence[str]], names: Sequence[str], options: SourceOptions
) -> list[str]:
    """Returns a warning if a folder has both `captions.json` and metadata, and their captions differ."""
    others = metadata_files(root, names) if any(name.rpartition("/")[2] == CAPTION_FILE for name in names) else []
    if not others or options.data_format == "imagefolder":
        return []
    shown, columns = ", ".join(others[:NUM_LISTS]), ListColumns(options.caption_column)
    try:
        said = captions_in_lists(root, others, captions, columns, options.text_encoding)
    except UserError as error:
        return [f"captions are read from {CAPTION_FILE}; {shown} can't be compared with it: {first_line(error)}"]
    differing = [name for name, own in captions.items() if said.get(name) and not say_the_same(own, said[name])]
    if not differing:
        return []
    return [
        f"{len(differing):,} images have other captions in {shown} than in {CAPTION_FILE}, such as "
        f"{short(differing[0])}; {CAPTION_FILE} is used: remove the other, or give --data_format imagefolder to use it"
    ]


def _nothing_there(where: str, content: FolderContent, lists: Sequence[str]) -> str:
    """Returns why a folder has no image to train on."""
    table = content.table
    if table.refused:
        listed = [name for name, word in content.used.items() if word == METADATA]
        there = f" in {', '.join(listed[:3])}" if listed else ""
        first = ": ".join(table.refused[0])
        return f"{where}: none of the {len(table.refused):,} images{there} can be read; the first: {first}"
    reasons = describe_unread(table.fates, lists)
    reasons += describe_unread(table.member_fates, ()) if table.member_fates is not None else []
    return "; ".join([f"there are no images in {where}, such as .png, .jpg or .webp files", *reasons])


def detect(options: SourceOptions, listing: Listing) -> str:
    """Returns the kind of source that a folder or file is, by the options or its files.

    Raises:
        UserError: if neither tells.
    """
    path = Path(options.train_data_dir)
    if is_saved_dataset(path):
        raise UserError(f"--train_data_dir {path} is a saved dataset; give it as --dataset_name")
    if path.is_file():
        kind = {".tar": "webdataset", ".parquet": "parquet"}.get(path.suffix.lower())
        require(kind is not None, "train_data_dir", path, "be a folder, a .tar or a .parquet file")
        return options.data_format or kind
    return options.data_format or detect_kind(path, listing.names, options.image_column)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    if (folder / "dataset_dict.json").is_file():
        return True
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def _read_dataset(options: SourceOptions, cache_dir: str | None) -> RowTable:
    """Loads a dataset with `datasets`: from the Hub, a local path, or a folder that `save_to_disk` wrote."""
    import datasets

    # a folder that `save_to_disk` wrote
    name = options.dataset_name
    if is_saved_dataset(Path(name)):
        return _rows(options, lambda: datasets.load_from_disk(plain_path(name, cache_dir)))

    # any other folder, or a dataset on the Hub
    if Path(name).is_dir():
        check_dataset_folder(options)
    arguments = (name, options.dataset_config_name)

    def load() -> Any:
        alone = read_alone(options, cache_dir)
        if alone is None:
            loaded = datasets.load_dataset(*arguments, cache_dir=cache_dir, data_dir=options.train_data_dir)
        else:
            loaded = datasets.load_dataset(alone[0], cache_dir=cache_dir, **alone[1])
        if Path(name).is_dir() and options.train_data_dir is None:
            builder = next(iter(loaded.values())).builder_name
            others = unread_of_dataset(list_folder(Path(name)).names, builder)
            for other in others[:1]:
                message = "--dataset_name %s is read as %s; %d other files that may be data are not read, such as %s"
                logger.warning(message, options.dataset_name, builder, len(others), other)
        return loaded

    return _rows(options, load)


def check_dataset_folder(options: SourceOptions) -> None:
    """Refuses local folders that `datasets` misreads: captions beside images, and paths that look like patterns.

    Raises:
        UserError: naming the flag to use instead.
    """
    # paths that look like patterns
    folder = Path(options.dataset_name)
    mark = next((mark for mark in PATTERN_MARKS if mark in str(folder.resolve())), None)
    if mark is not None:
        raise UserError(
            f"--dataset_name {folder}: the datasets library reads {mark} in the path of a folder as a pattern; give "
            f"it as --train_data_dir, or rename the folder"
        )

    # broken and missing shards
    names = list_folder(folder).names
    read_footers(folder, [name for name in names if name.lower().endswith(".parquet")], "dataset_name")
    _warn_of_gaps_of_split(options, names)
    _check_tars(options, names)

    # captions that are not read
    images, lists = [name for name in names if is_image(name)], metadata_files(folder, names)
    if images and lists and options.caption_column is not None and not options.holds_names:
        _compare_captions_of_dataset(options, names, lists)
    if not images or options.train_data_dir is not None or lists:
        return
    stems = {os.path.splitext(name)[0] for name in images}
    pair = next((name for name in names if is_caption_file(name) and os.path.splitext(name)[0] in stems), None)
    if pair is not None:
        raise UserError(
            f"--dataset_name {folder} is a folder of images with captions beside them, such as {pair}; give it as "
            f"--train_data_dir {folder}"
        )


def read_alone(options: SourceOptions, cache_dir: str | None) -> tuple[str, dict[str, object]] | None:
    """Returns `split_alone` for a dataset in a local folder of files; None for any other dataset.

    Raises:
        UserError: if the files of the split can't be read together.
    """
    import datasets

    folder = Path(options.dataset_name)
    if not folder.is_dir() or is_saved_dataset(folder):
        return None
    names = list_folder(folder).names
    if sum(map(is_image, names)) > sum(name.lower().endswith(TABLES) for name in names):  # read as an image folder
        return None
    builder = datasets.load_dataset_builder(
        options.dataset_name, options.dataset_config_name, cache_dir=cache_dir, data_dir=options.train_data_dir
    )
    return split_alone(builder, folder, options.dataset_split, _needed(options), cache_dir)


def _check_tars(options: SourceOptions, names: Sequence[str]) -> None:
    """Refuses invalid .tar files in a folder of shards; `datasets` would fail without naming the file.

    Raises:
        UserError: naming the file.
    """
    tars = [name for name in names if name.lower().endswith(".tar")]
    if 2 * len(tars) <= len(names):  # `datasets` reads the format of most files
        return
    for name in tars:
        file = Path(options.dataset_name) / name
        reason = why_no_tar(file)
        if reason and file.is_file() and (file.stat().st_size == 0 or reason != NO_FILES):
            cure = f"remove it from the folder, or give --train_data_dir {options.dataset_name}, which skips it"
            raise UserError(f"{options.given_as}: {name} {reason}; {cure}")
        if reason:
            logger.warning("%s: %s %s", options.given_as, name, reason)


def _compare_captions_of_dataset(options: SourceOptions, names: Sequence[str], lists: Sequence[str]) -> None:
    """Warns if the metadata that `datasets` reads differs from captions beside images."""
    folder, columns = Path(options.dataset_name), ListColumns(options.caption_column)
    try:
        captions = captions_in_lists(folder, lists, list(filter(is_image, names)), columns, options.text_encoding)
    except UserError:  # `datasets` has its own rules for metadata
        return
    shown = ", ".join(lists[:NUM_LISTS])
    for finding in compare_with_list(folder, captions, names, shown, options.text_encoding):
        logger.warning("%s: %s", options.given_as, finding)


def _warn_of_gaps_of_split(options: SourceOptions, names: Sequence[str]) -> None:
    """Warns of missing shards of the split that is read; shards without a split in their name belong to it."""
    wanted = split_of(options.dataset_split) or options.dataset_split
    said = {name: next(filter(None, map(split_of, name.split("/"))), None) for name in names}
    shards = [name for name in names if said[name] in (None, wanted) and not is_image(name)]
    tell_of_gaps(options.given_as, [name for name in shards if not is_caption_file(name)])


def read_parquet(
    options: SourceOptions, cache_dir: str | None, listing: Listing, folder_is_class: bool
) -> FolderContent:
    """Reads Parquet files with an image column, through `datasets`."""
    import datasets

    content = shards_of(options, listing, ".parquet")
    files = {options.dataset_split: dataset_paths(listing.root, content.used, cache_dir)}
    arguments = {"data_files": files, "cache_dir": cache_dir, **content.reading}
    table = _rows(options, lambda: datasets.load_dataset("parquet", **arguments))
    return content._replace(table=table)


def read_image_folder(
    options: SourceOptions, cache_dir: str | None, listing: Listing, folder_is_class: bool
) -> FolderContent:
    """Reads a folder of images with metadata files, laid out as for `datasets`."""
    if options.image_column != "image":
        raise UserError(f"--image_column {options.image_column} is not a column of a folder of images; leave it out")
    columns = ListColumns(options.caption_column, options.mask_column, options.reader(), options.holds_names)
    found = listing.root, listing.names, columns, options.dataset_split
    return read_metadata_folder(*found, folder_is_class, options.text_encoding)


def read_pairs(options: SourceOptions, cache_dir: str | None, listing: Listing, folder_is_class: bool) -> FolderContent:
    """Reads a folder of images with a text file beside each."""
    _refuse_mask_column(options)
    found = listing.root, listing.names, options.dataset_split
    return read_pairs_folder(*found, folder_is_class, options.text_encoding)


def read_captions_json(
    options: SourceOptions, cache_dir: str | None, listing: Listing, folder_is_class: bool
) -> FolderContent:
    """Reads a folder of images with a `captions.json`."""
    _refuse_mask_column(options)
    found = listing.root, listing.names, options.dataset_split
    return read_caption_file_folder(*found, options.text_encoding)


def _refuse_mask_column(options: SourceOptions) -> None:
    if options.mask_column is not None:
        raise UserError(
            f"--mask_column {options.mask_column} is not in {options.train_data_dir}, which has no columns; "
            "give --mask_dir or --alpha_mask"
        )


def read_webdataset(
    options: SourceOptions, cache_dir: str | None, listing: Listing, folder_is_class: bool
) -> FolderContent:
    """Reads tar shards in WebDataset's format."""
    content = shards_of(options, listing, ".tar")
    files = [listing.root / name for name in content.used]
    label = options.caption_column if options.holds_names else None
    table = read_tars(files, options.mask_column, options.text_encoding, label_ending=label)
    if table.doubled:
        logger.warning(
            "%s: skipped %d images because another image of their sample comes first, such as %s; members with the "
            "same name up to the first dot are one sample, so give each image its own name",
            *(options.given_as, len(table.doubled), table.doubled[0]),
        )
    return content._replace(table=table, findings=table.findings)


def shards_of(options: SourceOptions, listing: Listing, suffix: str) -> FolderContent:
    """Returns the shards of the split, in order, without reading their images.

    Args:
        options: the options of the source.
        listing: the files of its folder.
        suffix: .parquet or .tar.

    Raises:
        UserError: if there is none, or if some shards have no split while others have several.
    """
    # a single shard
    path, split = options.train_data_dir, options.dataset_split
    names, reading = [name for name in listing.names if name.lower().endswith(suffix)], {}
    if Path(path).is_file():
        require(bool(names), "train_data_dir", path, f"be a {suffix} file")
        if suffix == ".parquet":
            footers = read_footers(listing.root, names, "train_data_dir")
            reading = check_shards(listing.root, footers, _needed(options), "train_data_dir").reading
        tell_of_gaps(options.given_as, names, logging.INFO)  # one shard was asked for
        return FolderContent(None, listing.names, dict.fromkeys(names, SHARD), reading=reading)

    # the shards of the split in a folder
    require(bool(names), "train_data_dir", path, f"hold {suffix} files")
    if suffix == ".parquet":
        footers = read_footers(listing.root, names, "train_data_dir")
        names = image_tables(footers, options.image_column)
        check_configurations(listing.root, names)
    chosen = set(of_split(names, split, by_file_name=True)[0])
    tell_of_gaps(options.given_as, sorted(chosen))
    if suffix == ".parquet":
        of_split_alone = {name: footers[name] for name in sorted(chosen)}
        filled, reading = check_shards(listing.root, of_split_alone, _needed(options), "train_data_dir")
        names = [name for name in names if name in filled or name not in chosen]
        chosen = set(filled)

    # shards of other splits are not unread files
    of_others = set(names) - chosen
    used = {name: SHARD for name in names if name in chosen}
    return FolderContent(None, [name for name in listing.names if name not in of_others], used, reading=reading)


def _needed(options: SourceOptions) -> NeededColumns:
    """Returns the columns of a table that a source uses."""
    images = tuple(filter(None, (options.image_column, options.mask_column)))
    texts = () if options.caption_column is None else (options.caption_column,)
    return NeededColumns(images, texts, (options.width_column, options.height_column))


def _rows(options: SourceOptions, load) -> RowTable:
    """Returns the table of a dataset's split after checking its columns."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    # load the split
    try:
        loaded = load()
    except DatasetGenerationError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{options.given_as} can't be read: {reason:.300}") from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{options.given_as} can't be loaded: {first_line(error)}") from error
    if not isinstance(loaded, datasets.Dataset):
        split = options.dataset_split
        if split not in loaded:
            raise UserError(
                f"the dataset has no split {split}, only {', '.join(loaded)}; name one of them with --dataset_split"
            )
        loaded = loaded[split]
    elif options.dataset_split not in ("train", str(loaded.split)):
        raise UserError(f"--dataset_split {options.dataset_split} is not in the data, which has one split")

    # check and select the columns
    check_columns(loaded.column_names, options)
    column = options.caption_column
    read = None if column is None else options.reader(loaded.features[column])
    columns = {"image_column": options.image_column, "mask_column": options.mask_column}
    images = {flag: column for flag, column in columns.items() if column is not None}
    loaded = loaded.select_columns([*images.values(), *([] if column is None else [column])])
    for flag, name in images.items():
        check_image_feature(loaded.features[name], flag, name)
        try:
            loaded = loaded.cast_column(name, datasets.Image(decode=False))
        except (DatasetGenerationError, TypeError, ValueError) as error:
            raise UserError(f"--{flag} {name} does not hold images: {first_line(error)}") from error

    # find out where images named by path may lie
    files = [each["filename"] for each in loaded.cache_files]
    folders = data_folders((options.dataset_name, options.train_data_dir), loaded.builder_name, files)
    return RowTable(loaded, options.image_column, column, options.mask_column, read, folders)


def check_columns(columns: Sequence[str], options: SourceOptions) -> None:
    """Refuses data without the image, caption or mask column.

    Raises:
        UserError: naming the columns that there are.
    """
    for flag in ("image_column", "caption_column", "mask_column"):
        column = getattr(options, flag)
        if column is None or column in columns:
            continue
        hint = nearest(column, columns)
        is_folder = flag == "image_column" and options.dataset_name is not None and Path(options.dataset_name).is_dir()
        raise UserError(
            f"--{flag} {column} is not a column of the data, which has {', '.join(columns)}"
            + (f"; did you mean --{flag} {hint}?" if hint else f"; name one with --{flag}")
            + (f"; give a folder of images as --train_data_dir {options.dataset_name}" if is_folder else "")
        )


def check_image_feature(feature: Any, flag: str, column: str) -> None:
    """Refuses an image or mask column that holds neither images, bytes nor paths.

    Raises:
        UserError: naming the column and its type.
    """
    from datasets import LargeList, List, Value

    kinds = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
    is_other = isinstance(feature, Value) and feature.dtype not in kinds
    inner = feature
    while isinstance(inner, List | LargeList):
        inner = inner.feature
    if inner is not feature and not (isinstance(inner, Value) and inner.dtype.startswith(("int", "uint", "float"))):
        raise UserError(
            f"--{flag} {column} must hold one image in each row, got a list; write a row for each of its images"
        )
    if is_other or (isinstance(feature, dict) and not feature.keys() & {"bytes", "path"}):
        raise UserError(f"--{flag} {column} must hold images, their bytes or their paths, got {feature}")


def check_caption_feature(feature: Any, column: str) -> None:
    """Refuses a caption column that holds neither strings nor lists of strings.

    Raises:
        UserError: naming the column and its type.
    """
    from datasets import List, Value

    inner = feature.feature if isinstance(feature, List) else feature
    if not (isinstance(inner, Value) and inner.dtype in ("string", "large_string", "string_view", "null")):
        raise UserError(f"--caption_column {column} must hold strings or lists of strings, got {inner}")
