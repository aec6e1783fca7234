"""What a folder holds: which of its files are the data, where that can be told, and what the others are."""

import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow as pa

from utils.config.options import UserError
from utils.config.user_files import FileError, open_regular
from utils.data.file_listing import (
    LONE_CAPTION,
    NO_READER,
    OTHER,
    OTHER_SPLIT,
    UNLISTED,
    UNREADABLE,
    Fate,
    Fates,
    Listing,
)
from utils.data.folders import PAIR_SUFFIXES, PHOTO_SUFFIXES, FolderContent, is_caption_file, is_image, split_of
from utils.data.images import unread_reason
from utils.data.metadata import METADATA_NAMES, metadata_files
from utils.data.parquet_files import Footer, is_binary, parquet_columns
from utils.data.source_options import CAPTION_FILE
from utils.data.tables import FileTable
from utils.data.tar_shards import ARCHIVES, why_no_tar

logger = logging.getLogger(__name__)
LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".xlsx", ".xls", ".ods", ".parquet")
LIST_WORDS = re.compile(r"meta_?data|captions?|labels?|prompts?|annotations?", re.IGNORECASE)
DECORATION_WORDS = re.compile(
    r"banner|cover|logo|teaser|thumb|preview|icon|header|overview|example|figure|poster|social|screenshot|sample|grid",
    re.IGNORECASE,
)
DECORATION_FOLDERS = {"assets", "docs", "doc", "figures", "media", "static"}
MOST_DECORATIONS = 20
README_LIMIT = 1 << 20  # bytes
NOTES = {"readme", "license", "licence", "changelog", "notice", "requirements", "classes", "todo", "notes", "info"}
BESIDE_LIST = "a caption beside its image, of which the list of captions is read"
KINDS_OF_IMAGES = ("pairs", "imagefolder", "captions_json")
RENAMED = "rename it to metadata.csv or metadata.jsonl, with the images' names in a column file_name"


class _Kinds(NamedTuple):
    """The files of a folder that may each be the data.

    Attributes:
        images: image files.
        shards: parquet files that hold images, by `parquet`, and tar shards, by `webdataset`.
        saved: folders that `save_to_disk` of the `datasets` library wrote.
    """

    images: list[str]
    shards: dict[str, list[str]]
    saved: list[str]


def detect_kind(folder: Path, names: Sequence[str], image_column: str) -> str:
    """Which kind of data a folder holds, by its files.

    Raises:
        UserError: if they are of several kinds and it is unclear which are the data.
    """
    kinds = _kinds(folder, names, image_column)
    listed = _kind_of_images(folder, names)
    shards = {kind: files for kind, files in kinds.shards.items() if files}
    if kinds.saved:
        there = f" beside {_described(kinds.images, 'image')}" if kinds.images else ""
        cure = f"; or train on the images: --data_format {listed}" if kinds.images else ""
        raise UserError(
            f"--train_data_dir {folder} holds a saved dataset in {kinds.saved[0]}{there}; "
            f"give it as --dataset_name {folder / kinds.saved[0]}{cure}"
        )
    if not shards:
        return listed
    if len(shards) == 1:
        (kind, files), *_ = shards.items()
        if not kinds.images:
            return kind
        if listed == "pairs" and _are_decoration(folder, kinds.images, names):
            logger.warning(
                "trains on %s in %s; left out as decoration: %s; to train on images instead, give --data_format %s",
                *(_described(files, _KIND_WORDS[kind]), folder, _described(kinds.images, "image"), listed),
            )
            return kind
    found = [(kind, _described(files, _KIND_WORDS[kind])) for kind, files in shards.items()]
    found += [(listed, _described(kinds.images, "image"))] if kinds.images else []
    choices = " or ".join(f"--data_format {kind}" for kind, _ in found)
    raise UserError(
        f"--train_data_dir {folder} holds {' and '.join(words for _, words in found)}, and it is unclear which are the "
        f"data; give {choices}, or take the others out of the folder"
    )


_KIND_WORDS = {"parquet": "parquet file", "webdataset": "tar shard"}


def _kinds(folder: Path, names: Sequence[str], image_column: str) -> _Kinds:
    metadata = set(metadata_files(folder, names))
    images = [name for name in names if is_image(name)]
    tars = [name for name in names if name.lower().endswith(".tar")]
    parquet = [name for name in names if name.lower().endswith(".parquet") and name not in metadata]
    if parquet and (images or tars) and not any(holds_images(folder / name, image_column) for name in parquet):
        parquet = []  # tables of something else, which lie beside the data
    if images or parquet:
        tars = [name for name in tars if not why_no_tar(folder / name)]
    return _Kinds(images, {"parquet": parquet, "webdataset": tars}, _saved_datasets(names))


def _saved_datasets(names: Sequence[str]) -> list[str]:
    """The folders that `save_to_disk` wrote, by what it always writes."""
    ends = ("/dataset_dict.json", "/state.json")
    places = {name.rpartition("/")[0]: name.endswith(ends[0]) for name in names if name.endswith(ends)}
    info = {name.rpartition("/")[0] for name in names if name.endswith("/dataset_info.json")} if places else set()
    return sorted(place for place, is_dict in places.items() if is_dict or place in info)


def _kind_of_images(folder: Path, names: Sequence[str]) -> str:
    """How images have captions, by the lists among the files."""
    if any(name.split("/")[-1] == CAPTION_FILE and name.count("/") < 2 for name in names):
        return "captions_json"
    return "imagefolder" if metadata_files(folder, names) else "pairs"


def holds_images(file: Path, image_column: str) -> bool:
    """Whether a Parquet file holds images: bytes, or a column of that name. One that can't be read may do so."""
    return _may_hold_images(parquet_columns(file), image_column)


def _may_hold_images(columns: Mapping[str, pa.DataType], image_column: str) -> bool:
    kinds = [each for kind in columns.values() for each in (list(kind) if pa.types.is_struct(kind) else [kind])]
    return not columns or image_column in columns or any(is_binary(getattr(kind, "type", kind)) for kind in kinds)


def image_tables(footers: Mapping[str, Footer], image_column: str) -> list[str]:
    """Some Parquet files without those that hold no images and say no split, or all if none does; names the others."""
    names = list(footers)
    unsaid = [name for name in names if not any(split_of(part) for part in name.split("/"))]
    beginnings = {name.rpartition("/")[2].partition("-")[0] for name in names}
    if not unsaid or len(beginnings) == 1:
        return names
    others = {name for name in unsaid if not _may_hold_images(footers[name].columns, image_column)}
    if not others or len(others) == len(names):
        return names
    logger.warning("left out, as they hold no images: %s", _described(sorted(others), _KIND_WORDS["parquet"]))
    return [name for name in names if name not in others]


def check_configurations(folder: Path, shards: Sequence[str]) -> None:
    """Refuses Parquet files of several configurations of a dataset, as its README says them.

    Raises:
        UserError: naming the flags that take one.
    """
    header = re.match(r"\ufeff?---\n(.*?)\n---", _notes(folder, ["README.md"]), re.DOTALL)
    found = re.findall(r"^\s*-?\s*config_name:\s*[\"']?([^\"'\n]+)", header[1], re.MULTILINE) if header else []
    names = list(dict.fromkeys(name.strip() for name in found))
    if len(names) > 1 and len({name.rpartition("/")[0] for name in shards}) > 1:
        raise UserError(
            f"--train_data_dir {folder} holds the configurations {', '.join(names[:10])}; give one: --dataset_name "
            f"{folder} --dataset_config_name {names[0]}"
        )


def unread_of_dataset(names: Sequence[str], builder: str | None) -> list[str]:
    """The files of a folder that may be data too, of those that `datasets` did not take as what it has read."""
    shards = [name for name in names if name.endswith((".parquet", ".tar"))]
    if builder == "imagefolder":
        return [name for name in shards if name.rpartition("/")[2] not in METADATA_NAMES]
    if builder not in ("parquet", "webdataset", "arrow"):
        return []  # tables that may name images
    own = {"parquet": ".parquet", "webdataset": ".tar"}.get(builder, ".arrow")
    return [name for name in names if is_image(name)] + [name for name in shards if not name.endswith(own)]


def _are_decoration(folder: Path, images: Sequence[str], names: Collection[str]) -> bool:
    """Whether images beside shards only adorn them: without captions, and of a README, or called or placed so.

    A single image is one in any case.
    """
    stems = {os.path.splitext(name)[0] for name in names if is_caption_file(name)}
    if any(os.path.splitext(name)[0] in stems or name in stems for name in images):
        return False
    if len(images) == 1:
        return True
    notes = _notes(folder, names)
    return len(images) <= MOST_DECORATIONS and all(
        PurePosixPath(name).name in notes
        or DECORATION_WORDS.search(PurePosixPath(name).stem) is not None
        or not DECORATION_FOLDERS.isdisjoint(name.lower().split("/")[:-1])
        for name in images
    )


def _notes(folder: Path, names: Iterable[str]) -> str:
    """The text of the READMEs at a folder's top."""
    texts = []
    for name in names:
        if "/" not in name and name.lower().startswith("readme"):
            try:
                with open_regular(folder / name) as file:
                    texts.append(file.read(README_LIMIT).decode("utf-8", "replace"))
            except (OSError, FileError):
                continue
    return "\n".join(texts)


def _described(files: Sequence[str], word: str) -> str:
    """Some files in words: how many, and the first."""
    some = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    return f"{len(files):,} {word}{'s' * (len(files) != 1)} ({some})"


def unread_lists(names: Iterable[str], content: FolderContent) -> list[str]:
    """Files that look like lists of captions but are none that are read."""
    found = []
    for name in names:
        base = name.rpartition("/")[2].lower()
        suffix = os.path.splitext(base)[1]
        is_table = suffix in LIST_SUFFIXES
        may_be_one = suffix in (".json", ".txt", ".yaml", ".yml", "") or ".json" in base
        if (is_table or (may_be_one and LIST_WORDS.search(base))) and name not in content.used:
            found.append(name)
    return found


def describe_unread(fates: Fates, lists: Sequence[str]) -> list[str]:
    """What lies in a folder without images, in words."""
    reasons = Counter()
    for fate, count in fates.by_fate().items():
        if fate.word == NO_READER:
            reasons[fate.reason] += count
    found = [f"{count:,} files: {reason}" for reason, count in reasons.most_common(3)]
    cure = "with the images beside it, or give the folder as --dataset_name if the file is a dataset of its own"
    return found + [f"{name} is not read: {cure_of(name)}, {cure}" for name in lists[:1]]


def cure_of(name: str) -> str:
    """How a file that looks like a list of captions comes to be read."""
    base = name.rpartition("/")[2]
    if base == "metadata.parquet":
        return "it needs a column file_name with the images' names, and no other metadata beside it"
    if base in METADATA_NAMES:
        return "give --data_format imagefolder"
    return "give --data_format captions_json" if base == CAPTION_FILE else RENAMED


def settle(listing: Listing, content: FolderContent, kind: str) -> None:
    """Gives each file that is no image of the table its fate, and refuses pictures that nothing here reads.

    A picture with a caption beside it, or a photograph that no image of the same name stands for, is meant to be data:
    it counts as an image that can't be read.

    Args:
        content: what was read; its table is None where that is a stream.
    """
    table = content.table
    rows = set(table.names()) if isinstance(table, FileTable) else set()
    refused, considered = dict(() if table is None else table.refused), set(content.names)
    leftovers = []
    for name in sorted({*listing.names, *listing.special}) if listing.special else listing.names:
        if name in rows:
            continue
        if name in listing.special:
            fate = Fate(UNREADABLE, listing.special[name])
        elif name in content.used:
            fate = Fate(content.used[name])
        elif name in refused:
            fate = Fate(UNREADABLE, refused[name])
        elif name not in considered:
            fate = Fate(OTHER_SPLIT)
        else:
            leftovers.append(name)
            continue
        listing.fates.add(name, fate)
    meant = _settle_leftovers(leftovers, listing, kind, {*rows, *refused}) if leftovers else []
    strangers = rows - set(listing.names)
    if strangers:  # a list may name a hidden image, or one by a link to its folder
        root = os.path.realpath(listing.root)
        same = {os.path.relpath(os.path.realpath(listing.root / name), root) for name in strangers}
        listing.fates = listing.fates.without(strangers | (same - rows))
    if kind in KINDS_OF_IMAGES:
        special = [(name, reason) for name, reason in listing.special.items() if is_image(name)]
        table.refused = [*table.refused, *meant, *special]
    if table is not None:
        table.fates = listing.fates


def _settle_leftovers(
    leftovers: Sequence[str], listing: Listing, kind: str, images: Collection[str]
) -> list[tuple[str, str]]:
    """Gives files that no reader has taken their fates.

    Returns:
        (name, reason) of pictures that are meant to be data but can't be read.
    """
    stems = {os.path.splitext(name)[0] for name in images}
    unread = {suffix for suffix in set(map(_suffix, leftovers)) if unread_reason(suffix) is not None}
    pictures = {os.path.splitext(name)[0]: name for name in leftovers if _suffix(name) in unread}
    captioned = {os.path.splitext(name)[0] for name in leftovers if is_caption_file(name)}
    meant = []
    for name in leftovers:
        fate = _leftover(name, kind, stems, pictures)
        if fate.word == OTHER and name.lower().endswith(".tar") and (reason := why_no_tar(listing.root / name)):
            fate = Fate(NO_READER, reason)
        listing.fates.add(name, fate)
        stem, suffix = os.path.splitext(name)[0], _suffix(name)
        is_lone = kind in ("pairs", "captions_json") and suffix in unread and stem not in stems
        if is_lone and (stem in captioned or suffix in PHOTO_SUFFIXES):
            meant.append((name, fate.reason))
    return meant


def _suffix(name: str) -> str:
    return "." + name.rpartition(".")[2].lower()


def _leftover(name: str, kind: str, stems: Collection[str], pictures: dict[str, str]) -> Fate:
    """The fate of a file that no reader has taken."""
    stem, suffix = os.path.splitext(name)
    suffix = suffix.lower()
    if is_image(name):
        return Fate(OTHER, f"an image beside {_KIND_WORDS[kind]}s") if kind in _KIND_WORDS else Fate(UNLISTED)
    reason = unread_reason(suffix)
    if reason is not None:
        return Fate(NO_READER, reason)
    if suffix in ARCHIVES:
        return Fate(NO_READER, f"{suffix} (archive) is not read; unpack it")
    if kind in KINDS_OF_IMAGES and suffix in PAIR_SUFFIXES:
        if stem in stems or os.path.splitext(stem)[0] in stems:
            is_pair = kind == "pairs"
            return Fate(OTHER, "a caption beside its image, which has another that is read" if is_pair else BESIDE_LIST)
        if stem in pictures:
            return Fate(LONE_CAPTION, f"its picture can't be read: {unread_reason(_suffix(pictures[stem]))}")
        is_note = PurePosixPath(stem).name.lower() in NOTES or LIST_WORDS.search(PurePosixPath(stem).name)
        if suffix != ".json" and not is_note:
            return Fate(LONE_CAPTION, "there is no image of its name")
    return Fate(OTHER)
