"""Reads folders of images with captions in files beside the images or in captions.json, and detects splits."""

import logging
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import NamedTuple

from utils.config.options import UserError, first_line
from utils.config.user_files import (
    CertainTexts,
    FileError,
    TextReader,
    parse_json,
    read_bytes,
    short,
    size_text,
)
from utils.data.captions import MAX_CAPTION, refusal_of, say_the_same
from utils.data.file_listing import CAPTION, METADATA, NO_READER, Fate, Fates, list_folder, warn_of_unread
from utils.data.images import OPTIONAL_FORMATS, UNREAD_SUFFIXES, image_suffixes, unread_reason
from utils.data.source_options import CAPTION_FILE
from utils.data.tables import FileTable, ImageTable, captions_of, present

logger = logging.getLogger(__name__)
MAX_CAPTION_JSON = 1 << 20  # bytes of a JSON file beside an image, which may contain other metadata
MOST_COMPARED = 100_000  # up to this many images, all caption files of an image are compared; above, a sample
NUM_TOGETHER = 2000  # images compared at a time
PAIR_SUFFIXES = (".txt", ".caption", ".json")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
ALL_SPLIT_WORDS = frozenset(word for words in SPLIT_WORDS.values() for word in words)
PHOTO_SUFFIXES = frozenset(
    [*UNREAD_SUFFIXES["camera raw"], *(suffix for _, _, suffixes in OPTIONAL_FORMATS.values() for suffix in suffixes)]
)
CAPTION_FIELDS = ("caption", "captions", "text", "prompt", "tags")


class FolderContent(NamedTuple):
    """The content of a folder of training data.

    Attributes:
        table: its images; None before they are read.
        names: files of the split that was read, or of no split.
        used: how files other than images were used (the word of a `Fate`), by name.
        findings: messages about the captions, one line each.
        reading: arguments by which `datasets` reads its shards.
    """

    table: ImageTable | None
    names: Sequence[str]
    used: Mapping[str, str]
    findings: Sequence[str] = ()
    reading: Mapping[str, object] = MappingProxyType({})


def list_files(folder: Path) -> list[str]:
    """Returns the sorted relative paths of all files in a folder, following links and skipping hidden files.

    Special files, such as pipes, are included; opening them raises an error.
    """
    listing = list_folder(folder)
    listing.warn()
    return sorted([*listing.names, *listing.special])


def list_images(folder: Path, flag: str) -> list[str]:
    """Returns the sorted relative paths of the images in a folder; warns about images in unsupported formats.

    Args:
        flag: name of the flag that gives the folder, for the warning.
    """
    fates = Fates(folder)
    images = []
    for name in list_files(folder):
        reason = unread_reason(os.path.splitext(name)[1])
        if is_image(name):
            images.append(name)
        elif reason is not None:
            fates.add(name, Fate(NO_READER, reason))
    warn_of_unread(f"--{flag} {folder}", fates)
    return images


def is_image(name: str) -> bool:
    """Returns whether a file has the extension of an image format that can be read."""
    return os.path.splitext(name)[1].lower() in image_suffixes()


def is_caption_file(name: str) -> bool:
    """Returns whether a file has the extension of a caption file."""
    return name.lower().endswith(PAIR_SUFFIXES)


class KnownNames:
    """The image names of a folder, to look up the names in a list of captions."""

    def __init__(self, names: Collection[str]):
        self.there = set(names)
        self._by_text: dict[str, list[str]] | None = None

    def find(self, name: str) -> str:
        """Returns the image with this name, also in another Unicode normal form, as macOS writes names; "" if none."""
        if name in self.there:
            return name
        same = [each for each in self._alike(name) if _text(each) == _text(name)]
        return same[0] if len(same) == 1 else ""

    def missing(self, name: str) -> str:
        """Returns why a listed name that does not exist is refused, and a similar name that exists."""
        alike = self._alike(name)
        return "is listed but does not exist" + (f"; {short(alike[0])} does" if alike else "")

    def _alike(self, name: str) -> list[str]:
        """Returns the names that differ from a name only in capitals or Unicode normal form."""
        if self._by_text is None:
            self._by_text = defaultdict(list)
            for each in sorted(self.there):
                self._by_text[_text(each).casefold()].append(each)
        return self._by_text.get(_text(name).casefold(), [])


def _text(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def resolve_listed(base: PurePosixPath, name: str, folder: Path, images: KnownNames) -> tuple[str, str]:
    """Resolves the file name of a list entry.

    Args:
        base: relative path of the list's folder.
        name: the file name in the list.
        folder: the folder of the data.
        images: its images.

    Returns:
        (relative path, "") or ("", why it is refused).
    """
    plain = name.replace("\\", "/")
    inside = PurePosixPath(os.path.normpath(base / plain))
    if plain.startswith("/") or Path(name).is_absolute():
        return "", "its file_name must be relative to the folder of the list; absolute paths are refused"
    if inside.parts[:1] == ("..",):
        return "", "its file_name points outside the folder, which is refused"
    if found := images.find(str(inside)):
        return found, ""
    try:
        is_there = (folder / inside).is_file()
    except (OSError, ValueError):  # a name that no file can have
        is_there = False
    # a file without an image extension is accepted: its bytes decide
    return (str(inside), "") if is_there else ("", images.missing(str(inside)))


def split_of(part: str) -> str | None:
    """Returns the split in a folder or file name such as `train`, `val-00000-of-00002.parquet`, `test_1`; else None."""
    match = re.match(r"([a-z]+)(?![a-z])", part.lower())
    word = match[1] if match else ""
    return next((split for split, words in SPLIT_WORDS.items() if word in words), None)


def of_split(
    names: Sequence[str], split: str, *, by_file_name: bool = False, folder_is_class: bool = False
) -> tuple[list[str], int]:
    """Selects the files of a split, if the names of folders or files contain splits; else all files.

    Warns where it is doubtful whether a name means a split.

    Args:
        names: relative paths of the files.
        split: the value of --dataset_split.
        by_file_name: whether the names of files, not only of folders, can contain splits.
        folder_is_class: whether the folder of an image is its class; then `test/` beside `cat/` is a class.

    Returns:
        (names of the split, number of images that are in no split).

    Raises:
        UserError: if there are splits, but not this one.
    """
    # group the files by the split in their path
    classes = class_folders(names) if folder_is_class else frozenset()
    found: dict[str | None, list[str]] = defaultdict(list)
    words: dict[str, str] = {}
    for name in names:
        *folders, last = name.split("/")
        parts = [
            part
            for depth, part in enumerate(folders, start=1)
            if part.lower() in ALL_SPLIT_WORDS and "/".join(folders[:depth]) not in classes
        ]
        parts += [last] if by_file_name else []
        word = next((part for part in parts if split_of(part)), None)
        said = None if word is None else split_of(word)
        found[said].append(name)
        if said is not None:
            words.setdefault(said, word)
    if classes:
        listed = ", ".join(sorted(classes))
        logger.warning(
            "read as classes, like the folders beside them: %s; a split would contain one folder per class", listed
        )

    # the split exists: take its files, and those of no split if the split is in file names
    wanted = split_of(split) if split.lower() in ALL_SPLIT_WORDS else None
    if wanted in found and wanted is not None:
        num_of_none = sum(by_file_name or is_image(name) for name in found.get(None, ()))
        if num_of_none and by_file_name:
            others = [name for name in found if name not in (None, wanted)]
            some = ", ".join(found[None][:3])
            if others:
                raise UserError(
                    f"the names of {some} contain no split, those of other files contain "
                    f"{', '.join(sorted({wanted, *others}))}; rename them, for example to "
                    f"{wanted}-{PurePosixPath(found[None][0]).name}, or move them out of the folder"
                )
            logger.warning("read as part of the split %s, although their names contain no split: %s", split, some)
            return list(names), 0
        if num_of_none:
            logger.warning(
                "the folder %s is read as the split %s, and %d images beside it are in no split; if it is not a "
                "split, rename it",
                *(words[wanted], split, num_of_none),
            )
        return found[wanted], num_of_none

    # the split does not exist: train on all files, unless another split is requested
    splits = [name for name in found if name is not None]
    if split == "train" and "train" not in splits:  # folders of classes may have the names of splits
        if splits:
            listed, what = ", ".join(words.values()), "file" if by_file_name else "folder"
            logger.warning(
                "also training on %s, because there is no %s named train; if these are splits, move them elsewhere",
                *(listed, what),
            )
        return list(names), 0
    there = ", ".join(splits) or "no splits"
    raise UserError(f"--dataset_split {split} does not exist in the data, which has {there}")


def class_folders(names: Sequence[str]) -> frozenset[str]:
    """Returns the image folders with the name of a split that have image folders with other names beside them."""
    return class_folders_among({name.rpartition("/")[0] for name in names if is_image(name)})


def class_folders_among(folders: Iterable[str]) -> frozenset[str]:
    """Does the same as `class_folders`, given the paths of the folders that contain images."""
    holding = {folder for folder in folders if folder}
    called = {folder for folder in holding if PurePosixPath(folder).name.lower() in ALL_SPLIT_WORDS}
    places = {PurePosixPath(folder).parent for folder in holding - called}
    return frozenset(folder for folder in called if PurePosixPath(folder).parent in places)


def read_caption_file_folder(folder: Path, names: list[str], split: str, encoding: str | None = None) -> FolderContent:
    """Reads images and `captions.json`, which maps file names to a caption or a list of captions.

    The images are beside it or in `images/`. Splits may be folders (`train/images/`, `images/train/`), have one
    `captions.json` each (`train/captions.json`), or be the top-level keys of a single one.

    Args:
        names: relative paths of the files.
        split: the value of --dataset_split.
        encoding: text encoding given by the user, or None to detect it.

    Raises:
        UserError: if the file can't be read, has another structure, or does not contain the split.
    """
    # the list: that of the split, or the one of all splits
    own = [name for name in names if name.endswith(f"/{CAPTION_FILE}") and split_of(name.split("/")[0])]
    chosen = [name for name in own if split_of(name.split("/")[0]) == split_of(split)]
    if own and not chosen and CAPTION_FILE not in names:
        there = ", ".join(name.split("/")[0] for name in own)
        raise UserError(f"--dataset_split {split} does not exist in {folder}, which has {there}")
    file = folder / (chosen[0] if chosen else CAPTION_FILE)
    texts = TextReader(encoding)
    mapping, is_of_split = _read_caption_file(file, split, texts)
    is_of_split |= bool(chosen)

    # the images of the split
    every = images = [name for name in names if is_image(name)]
    if any(name.split("/")[0] == "images" or "/images/" in name for name in images):
        images = [name for name in images if "images" in name.split("/")[:-1]]
    has_split_folders = any(part.lower() in ALL_SPLIT_WORDS for name in images for part in name.split("/")[:-1])
    pool = of_split(images, split)[0] if has_split_folders else images

    # match list entries with images
    by_ending = _by_ending(pool)
    known, elsewhere = KnownNames(by_ending), _by_ending(images)
    captions: dict[str, tuple[str, ...]] = {}
    entries: dict[str, str] = {}
    twice: list[tuple[str, str]] = []
    refused = []
    for name, value in mapping.items():
        found = captions_of(_caption_field(value), f"{file}: {short(name)}")
        if refusal := refusal_of(found):
            refused.append((name, refusal))
            continue
        plain = name.replace("\\", "/").removeprefix("./")
        path = by_ending.get(known.find(plain))
        if plain.startswith("/") or ".." in PurePosixPath(plain).parts:
            refused.append((name, "its file_name points outside the folder, which is refused"))
        elif path is not None:
            if captions.get(path, found) != found:
                twice.append((entries[path], name))
            captions[path], entries[path] = found, name
        elif plain not in elsewhere:  # entries of other splits are not errors
            refused.append((name, known.missing(plain)))
    if twice:
        both = " and ".join(map(short, twice[0]))
        raise UserError(
            f"{file}: {len(twice):,} images have two entries with different captions, such as {both}; keep one of them"
        )

    # only the list tells which images belong to the split
    if is_of_split and not has_split_folders:
        pool = [name for name in pool if name in captions]
    table = FileTable(folder, pool, [captions.get(name, ()) for name in pool], refused, len(every) - len(images))
    table.texts = texts
    used = chosen[0] if chosen else CAPTION_FILE
    of_others = {*images, *own} - {*pool, used}
    return FolderContent(table, [name for name in names if name not in of_others], {used: METADATA})


def _read_caption_file(file: Path, split: str, texts: TextReader) -> tuple[dict, bool]:
    """Returns (the mapping of file names to captions, whether it contains only this split)."""
    try:
        mapping = parse_json(texts.read(file), file)
    except OSError as error:
        raise UserError(f"{file} can't be read: {first_line(error)}") from error
    if not isinstance(mapping, dict):
        raise UserError(f"{file} must map file names to captions, got a {type(mapping).__name__}")
    is_by_split = mapping and all(
        name in ALL_SPLIT_WORDS and isinstance(value, dict) for name, value in mapping.items()
    )
    if not is_by_split:
        return mapping, False
    key = next((name for name in mapping if split_of(name) == split_of(split)), None)
    if key is None:
        raise UserError(f"--dataset_split {split} does not exist in {file}, which has {', '.join(mapping)}")
    return mapping[key], True


def _by_ending(names: Sequence[str]) -> dict[str, str]:
    """Returns names by themselves, and by their part after `images/`, a split's folder, or both."""
    found: dict[str, str] = {}
    for name in names:
        parts = name.split("/")
        begin = 0
        while begin < len(parts) - 1 and (parts[begin] == "images" or parts[begin].lower() in ALL_SPLIT_WORDS):
            begin += 1
        for start in range(begin + 1):
            found.setdefault("/".join(parts[start:]), name)
    return found


def read_pairs_folder(
    folder: Path, names: list[str], split: str, folder_is_class: bool = False, encoding: str | None = None
) -> FolderContent:
    """Reads images with captions in files of the same name: `a.txt`, `a.caption` or `a.json` beside `a.jpg`.

    Each line of a text file is a caption. A JSON file contains a string, a list, or an object with a field such as
    "caption". If an image has several caption files, the first in the order of `PAIR_SUFFIXES` is read.

    Args:
        names: relative paths of the files.
        split: the value of --dataset_split.
        folder_is_class: as in `of_split`.
        encoding: text encoding given by the user, or None to detect it.
    """
    names, num_of_none = of_split(names, split, folder_is_class=folder_is_class)
    images = list(filter(is_image, names))
    beside = _files_beside(images, names)
    pairs = {name: found[0] for name, found in beside.items()}
    contents, broken = _read_caption_files(folder, pairs.values())
    texts = TextReader(encoding)
    captions, more_broken = captions_in(contents, texts)
    broken |= more_broken
    refused = [
        (name, f"its caption file {pair} can't be read: {broken[pair]}")
        for name, pair in pairs.items()
        if pair in broken
    ]
    kept = [name for name in images if pairs.get(name) not in broken]
    table = FileTable(folder, kept, [captions.get(pairs.get(name), ()) for name in kept], refused, num_of_none)
    table.texts = texts
    differing = _compare_files(folder, beside, captions, encoding).findings()
    return FolderContent(table, names, dict.fromkeys(pairs.values(), CAPTION), differing)


def _compare_files(
    folder: Path, beside: Mapping[str, Sequence[str]], captions: Mapping[str, Sequence[str]], encoding: str | None
) -> "CaptionComparison":
    """Compares the caption files of images that have several, in chunks; only a sample of very many images."""
    several = [found for found in beside.values() if len(found) > 1]
    step = -(-len(several) // MOST_COMPARED) if several else 1
    compared, comparison = several[::step], CaptionComparison(len(several))
    for begin in range(0, len(compared), NUM_TOGETHER):
        some = compared[begin : begin + NUM_TOGETHER]
        others, _ = _read_caption_files(folder, [other for found in some for other in found[1:]])
        comparison.add(some, {found[0]: captions.get(found[0]) for found in some}, others, TextReader(encoding))
    return comparison


def compare_with_list(
    root: Path, captions: Mapping[str, Sequence[str]], names: Iterable[str], lists: str, encoding: str | None
) -> list[str]:
    """Returns a line that counts the images whose caption files differ from the list of captions; [] if none do.

    Args:
        captions: captions from the list, by image path within `root`.
        names: the files of the folder, without the list itself.
        lists: name of the list in the message.
        encoding: text encoding of the caption files given by the user, or None to detect it.
    """
    beside = list(_files_beside(captions, names).items())
    step = -(-len(beside) // MOST_COMPARED) if beside else 1
    compared, comparison = beside[::step], CaptionComparison(len(beside), lists)
    for begin in range(0, len(compared), NUM_TOGETHER):
        some = [(image, found[0]) for image, found in compared[begin : begin + NUM_TOGETHER]]
        contents, _ = _read_caption_files(root, [found for _, found in some])
        comparison.add(some, captions, contents, TextReader(encoding))
    return comparison.findings()


def _files_beside(images: Iterable[str], names: Iterable[str]) -> dict[str, list[str]]:
    """Returns the caption files of each image that has any; the first one is read."""
    there: dict[str, list[str]] = defaultdict(list)
    for name in filter(is_caption_file, names):
        there[os.path.splitext(name)[0] + os.path.splitext(name)[1].lower()].append(name)
    return {name: found for name in images if (found := _pairs_of(name, there))}


def _pairs_of(name: str, there: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns the caption files of an image; the first one is read."""
    stem = os.path.splitext(name)[0]
    pairs = (pair for suffix in PAIR_SUFFIXES for pair in (stem + suffix, name + suffix))
    return [found for pair in pairs for found in there.get(pair, ())]


def _read_caption_files(folder: Path, names: Iterable[str]) -> tuple[dict[str, bytes], dict[str, str]]:
    """Returns (the bytes of caption files, why others can't be read), both by name."""
    contents: dict[str, bytes] = {}
    broken: dict[str, str] = {}
    for name in dict.fromkeys(names):
        try:
            contents[name] = read_bytes(folder / name, caption_limit(name))
        except FileError as error:
            broken[name] = error.reason
        except OSError as error:
            broken[name] = error.strerror or first_line(error)
    return contents, broken


class CaptionComparison:
    """Counts the images whose captions differ between several files."""

    def __init__(self, num_images: int | None = None, lists: str = ""):
        """Starts with no images compared.

        Args:
            num_images: number of images with several captions, if only a sample is compared; None if all are.
            lists: name of the list of captions in messages; "" if only caption files are compared.
        """
        self._num_images = num_images
        self._lists = lists
        self._num_compared = self._num_differing = 0
        self._first: Sequence[str] = ()

    def add(
        self,
        images: Iterable[Sequence[str]],
        read: Mapping[str, Sequence[str] | None],
        others: Mapping[str, bytes],
        texts: TextReader,
    ) -> None:
        """Compares the caption files of some images.

        Args:
            images: the caption files of each image; the first is read. With a list, the first is the image itself.
            read: the captions that are used, by the first name; None for a file that can't be read.
            others: the bytes of the other files, by name.
            texts: decodes them.
        """
        captions = captions_in(others, texts)[0]
        for first, *further in images:
            self._num_compared += 1
            used = read.get(first) or ()
            if any(captions.get(name) and not say_the_same(captions[name], used) for name in further):
                self._first = self._first or (first, *further)
                self._num_differing += 1

    def findings(self) -> list[str]:
        """Returns a line that counts the images whose captions differ; [] if none do."""
        if not self._num_differing:
            return []
        is_sample = self._num_images is not None and self._num_compared < self._num_images
        of = f" of {self._num_compared:,} compared" if is_sample else ""
        if self._lists:
            image, *further = self._first
            return [
                f"{self._num_differing:,} images{of} have different captions in {self._lists} and in a file beside "
                f"them: {self._lists} is used, such as for {image} instead of {', '.join(further)}"
            ]
        return [
            f"{self._num_differing:,} images{of} have several caption files with different captions; the first is read "
            f"({' before '.join(PAIR_SUFFIXES)}), such as {self._first[0]} instead of {', '.join(self._first[1:])}"
        ]


def caption_limit(name: str) -> int:
    """Returns the maximum size of a caption file in bytes."""
    return MAX_CAPTION_JSON if name.lower().endswith(".json") else MAX_CAPTION


def captions_in(contents: Mapping[str, bytes], texts: TextReader) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Returns (the captions in text and JSON files, why others can't be read), both by name.

    Args:
        contents: bytes of the files, by name.
        texts: decodes them.
    """
    captions: dict[str, tuple[str, ...]] = {}
    broken: dict[str, str] = {}
    for name, text in texts.decode_together(contents).items():
        if isinstance(text, FileError):
            broken[name] = text.reason
            continue
        try:
            captions[name] = _captions_of_file(name, text)
        except FileError as error:
            broken[name] = error.reason
        except UserError as error:
            broken[name] = first_line(error)
        else:
            if refusal := refusal_of(captions[name]):
                broken[name] = refusal
    return captions, broken


def member_captions(name: str, content: bytes, encoding: str | None) -> tuple[str, ...]:
    """Returns the captions in a single text or JSON file, which is too short to guess its encoding.

    Raises:
        FileError: if it is too long, damaged, or not UTF-8 although no encoding is given.
    """
    limit = caption_limit(name)
    if len(content) > limit:
        raise FileError(name, f"has over {size_text(limit)}, the maximum")
    captions, broken = captions_in({name: content}, CertainTexts(encoding))
    if name in broken:
        raise FileError(name, broken[name])
    return captions[name]


def _captions_of_file(name: str, text: str) -> tuple[str, ...]:
    """Returns the captions in the text of a caption file."""
    if not name.lower().endswith(".json"):
        return present(text.splitlines())
    return captions_of(_caption_field(parse_json(text, name)), "the caption")


def _caption_field(value: object) -> object:
    """Returns the caption field of a JSON object; any other value unchanged."""
    if not isinstance(value, dict):
        return value
    found = next((field for field in CAPTION_FIELDS if value.get(field)), None)
    if found == "tags" and isinstance(value[found], list):  # all tags form one caption
        return ", ".join(str(tag) for tag in value[found])
    return value[found] if found else None
