"""Detects which files of a folder are the data, and settles the fate of all other files."""

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
BESIDE_LIST = "a caption file beside its image; the caption is read from the list instead"
KINDS_OF_IMAGES = ("pairs", "imagefolder", "captions_json")
RENAMED = "rename it to metadata.csv or metadata.jsonl, with the image names in the column file_name"


class _Kinds(NamedTuple):
    """The files of a folder that may be the data, by kind.

    Attributes:
        images: image files.
        shards: Parquet files that contain images, under `parquet`, and tar shards, under `webdataset`.
        saved: folders written by `save_to_disk` of the `datasets` library.
    """

    images: list[str]
    shards: dict[str, list[str]]
    saved: list[str]


def detect_kind(folder: Path, names: Sequence[str], image_column: str) -> str:
    """Returns the value of --data_format that fits the files of a folder.

    Args:
        names: relative paths of the files.
        image_column: column of the images in Parquet files.

    Raises:
        UserError: if the folder contains several kinds of data and it is unclear which to use.
    """
    kinds = _kinds(folder, names, image_column)
    listed = _kind_of_images(folder, names)
    shards = {kind: files for kind, files in kinds.shards.items() if files}

    # a dataset saved to disk must be given as --dataset_name
    if kinds.saved:
        there = f" beside {_described(kinds.images, 'image')}" if kinds.images else ""
        cure = f"; or train on the images: --data_format {listed}" if kinds.images else ""
        raise UserError(
            f"--train_data_dir {folder} contains a saved dataset in {kinds.saved[0]}{there}; "
            f"pass it as --dataset_name {folder / kinds.saved[0]}{cure}"
        )

    # one kind of data, apart from images that only illustrate the dataset
    if not shards:
        return listed
    if len(shards) == 1:
        (kind, files), *_ = shards.items()
        if not kinds.images:
            return kind
        if listed == "pairs" and _are_decoration(folder, kinds.images, names):
            logger.warning(
                "training on %s in %s; skipped as decoration: %s; to train on images instead, add --data_format %s",
                *(_described(files, _KIND_WORDS[kind]), folder, _described(kinds.images, "image"), listed),
            )
            return kind

    # several kinds: the user has to choose
    found = [(kind, _described(files, _KIND_WORDS[kind])) for kind, files in shards.items()]
    found += [(listed, _described(kinds.images, "image"))] if kinds.images else []
    choices = " or ".join(f"--data_format {kind}" for kind, _ in found)
    raise UserError(
        f"--train_data_dir {folder} contains {' and '.join(words for _, words in found)}, and it is unclear which are "
        f"the data; add {choices}, or move the others out of the folder"
    )


_KIND_WORDS = {"parquet": "parquet file", "webdataset": "tar shard"}


def _kinds(folder: Path, names: Sequence[str], image_column: str) -> _Kinds:
    """Returns the files that may be the data, by kind."""
    metadata = set(metadata_files(folder, names))
    images = [name for name in names if is_image(name)]
    tars = [name for name in names if name.lower().endswith(".tar")]
    parquet = [name for name in names if name.lower().endswith(".parquet") and name not in metadata]
    if parquet and (images or tars) and not any(holds_images(folder / name, image_column) for name in parquet):
        parquet = []  # tables without images, beside the data
    if images or parquet:
        tars = [name for name in tars if not why_no_tar(folder / name)]
    return _Kinds(images, {"parquet": parquet, "webdataset": tars}, _saved_datasets(names))


def _saved_datasets(names: Sequence[str]) -> list[str]:
    """Returns the folders written by `save_to_disk`, recognized by the files it always writes."""
    ends = ("/dataset_dict.json", "/state.json")
    places = {name.rpartition("/")[0]: name.endswith(ends[0]) for name in names if name.endswith(ends)}
    info = {name.rpartition("/")[0] for name in names if name.endswith("/dataset_info.json")} if places else set()
    return sorted(place for place, is_dict in places.items() if is_dict or place in info)


def _kind_of_images(folder: Path, names: Sequence[str]) -> str:
    """Returns how captions are stored with image files, judging by the lists of captions among the files."""
    if any(name.split("/")[-1] == CAPTION_FILE and name.count("/") < 2 for name in names):
        return "captions_json"
    return "imagefolder" if metadata_files(folder, names) else "pairs"


def holds_images(file: Path, image_column: str) -> bool:
    """Returns whether a Parquet file may contain images: it has a binary column, or a column `image_column`.

    Returns True for a file that can't be read.
    """
    return _may_hold_images(parquet_columns(file), image_column)


def _may_hold_images(columns: Mapping[str, pa.DataType], image_column: str) -> bool:
    """Returns whether columns may contain images; True if they are unknown."""
    kinds = [each for kind in columns.values() for each in (list(kind) if pa.types.is_struct(kind) else [kind])]
    return not columns or image_column in columns or any(is_binary(getattr(kind, "type", kind)) for kind in kinds)


def image_tables(footers: Mapping[str, Footer], image_column: str) -> list[str]:
    """Returns the Parquet files without those that have neither images nor the name of a split; warns about these.

    Returns all files if that would leave none.

    Args:
        footers: footers by relative path.
        image_column: column of the images.
    """
    names = list(footers)
    unsaid = [name for name in names if not any(split_of(part) for part in name.split("/"))]
    beginnings = {name.rpartition("/")[2].partition("-")[0] for name in names}
    if not unsaid or len(beginnings) == 1:
        return names
    others = {name for name in unsaid if not _may_hold_images(footers[name].columns, image_column)}
    if not others or len(others) == len(names):
        return names
    logger.warning("skipped because they contain no images: %s", _described(sorted(others), _KIND_WORDS["parquet"]))
    return [name for name in names if name not in others]


def check_configurations(folder: Path, shards: Sequence[str]) -> None:
    """Refuses Parquet files that belong to several configurations of a dataset, according to its README.

    Raises:
        UserError: naming the flags that select one.
    """
    header = re.match(r"\ufeff?---\n(.*?)\n---", _notes(folder, ["README.md"]), re.DOTALL)
    found = re.findall(r"^\s*-?\s*config_name:\s*[\"']?([^\"'\n]+)", header[1], re.MULTILINE) if header else []
    names = list(dict.fromkeys(name.strip() for name in found))
    if len(names) > 1 and len({name.rpartition("/")[0] for name in shards}) > 1:
        raise UserError(
            f"--train_data_dir {folder} contains the configurations {', '.join(names[:10])}; choose one: "
            f"--dataset_name {folder} --dataset_config_name {names[0]}"
        )


def unread_of_dataset(names: Sequence[str], builder: str | None) -> list[str]:
    """Returns the files of a folder that may be data but that `datasets` does not read with this builder."""
    shards = [name for name in names if name.endswith((".parquet", ".tar"))]
    if builder == "imagefolder":
        return [name for name in shards if name.rpartition("/")[2] not in METADATA_NAMES]
    if builder not in ("parquet", "webdataset", "arrow"):
        return []  # tables whose rows may refer to these images
    own = {"parquet": ".parquet", "webdataset": ".tar"}.get(builder, ".arrow")
    return [name for name in names if is_image(name)] + [name for name in shards if not name.endswith(own)]


def _are_decoration(folder: Path, images: Sequence[str], names: Collection[str]) -> bool:
    """Returns whether images beside shards only illustrate the dataset.

    They must have no captions, and be mentioned in a README or have a typical name or folder. A single image without a
    caption always counts as an illustration.
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
    """Returns the text of the READMEs in a folder."""
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
    """Describes files: their number, and the first few names."""
    some = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    return f"{len(files):,} {word}{'s' * (len(files) != 1)} ({some})"


def unread_lists(names: Iterable[str], content: FolderContent) -> list[str]:
    """Returns the files that look like lists of captions but were not read."""
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
    """Describes the files of a folder without images, one line per reason why they are not read."""
    reasons = Counter()
    for fate, count in fates.by_fate().items():
        if fate.word == NO_READER:
            reasons[fate.reason] += count
    found = [f"{count:,} files: {reason}" for reason, count in reasons.most_common(3)]
    cure = "with the images beside it, or pass the folder as --dataset_name if the file itself is a dataset"
    return found + [f"{name} is not read: {cure_of(name)}, {cure}" for name in lists[:1]]


def cure_of(name: str) -> str:
    """Returns what the user must do to have a list of captions read."""
    base = name.rpartition("/")[2]
    if base == "metadata.parquet":
        return "it needs a column file_name with the image names, and no other metadata file beside it"
    if base in METADATA_NAMES:
        return "add --data_format imagefolder"
    return "add --data_format captions_json" if base == CAPTION_FILE else RENAMED


def settle(listing: Listing, content: FolderContent, kind: str) -> None:
    """Sets the fate of each file that is not an image of the table, and counts images in unsupported formats as bad.

    An image in an unsupported format counts as a bad image if it has a caption file, or is a photo without a readable
    image of the same name.

    Args:
        listing: all files of the folder; fates are added to it.
        content: what was read from the folder; its table is None for a stream.
        kind: the value of --data_format.
    """
    table = content.table
    rows = set(table.names()) if isinstance(table, FileTable) else set()
    refused, considered = dict(() if table is None else table.refused), set(content.names)
    leftovers = []

    # files whose fate is already known
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

    # files that no reader has taken
    meant = _settle_leftovers(leftovers, listing, kind, {*rows, *refused}) if leftovers else []
    strangers = rows - set(listing.names)
    if strangers:  # a list may refer to a hidden image, or to one through a link
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
    """Sets the fate of files that no reader has taken.

    Args:
        images: names of the images that were read or refused.

    Returns:
        (name, reason) of images that are meant as data but can't be read.
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
    """Returns the extension in lower case."""
    return "." + name.rpartition(".")[2].lower()


def _leftover(name: str, kind: str, stems: Collection[str], pictures: dict[str, str]) -> Fate:
    """Returns the fate of a file that no reader has taken.

    Args:
        stems: names of the images without extension.
        pictures: images in unsupported formats, by name without extension.
    """
    stem, suffix = os.path.splitext(name)
    suffix = suffix.lower()
    if is_image(name):
        return Fate(OTHER, f"an image beside {_KIND_WORDS[kind]}s") if kind in _KIND_WORDS else Fate(UNLISTED)
    reason = unread_reason(suffix)
    if reason is not None:
        return Fate(NO_READER, reason)
    if suffix in ARCHIVES:
        return Fate(NO_READER, f"{suffix} archives are not read; unpack it")
    if kind in KINDS_OF_IMAGES and suffix in PAIR_SUFFIXES:
        if stem in stems or os.path.splitext(stem)[0] in stems:
            is_pair = kind == "pairs"
            return Fate(
                OTHER,
                "a caption file beside its image; another caption file is read instead" if is_pair else BESIDE_LIST,
            )
        if stem in pictures:
            return Fate(LONE_CAPTION, f"its image can't be read: {unread_reason(_suffix(pictures[stem]))}")
        is_note = PurePosixPath(stem).name.lower() in NOTES or LIST_WORDS.search(PurePosixPath(stem).name)
        if suffix != ".json" and not is_note:
            return Fate(LONE_CAPTION, "there is no image with the same name")
    return Fate(OTHER)
