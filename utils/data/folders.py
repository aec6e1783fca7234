"""Folders of images, and the forms in which captions lie beside them."""

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
MAX_CAPTION_JSON = 1 << 20  # bytes of a JSON file beside an image, which holds other facts too
MOST_COMPARED = 100_000  # images whose further caption files are read to compare them
NUM_TOGETHER = 2000  # of them at a time
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
    """What was read of a folder.

    Attributes:
        table: its images; None before they are read.
        names: its files of the split that was read, or of none.
        used: what files beside the images were read or taken as, by their names.
        findings: what is to be said of the captions, a line each.
        reading: arguments by which `datasets` reads its shards.
    """

    table: ImageTable | None
    names: Sequence[str]
    used: Mapping[str, str]
    findings: Sequence[str] = ()
    reading: Mapping[str, object] = MappingProxyType({})


def list_files(folder: Path) -> list[str]:
    """Paths within the folder of all its files, links followed and hidden ones left out, in order.

    What is no regular file, such as a pipe, is refused when it is opened.
    """
    listing = list_folder(folder)
    listing.warn()
    return sorted([*listing.names, *listing.special])


def list_images(folder: Path, flag: str) -> list[str]:
    """Paths within a folder of its images, in order; pictures that nothing here reads are named, under the flag."""
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
    """Whether a file's name ends as an image's."""
    return os.path.splitext(name)[1].lower() in image_suffixes()


def is_caption_file(name: str) -> bool:
    """Whether a file's name ends as that of captions beside an image."""
    return name.lower().endswith(PAIR_SUFFIXES)


class KnownNames:
    """The names of a folder's images, to find those that a list means."""

    def __init__(self, names: Collection[str]):
        self.there = set(names)
        self._by_text: dict[str, list[str]] | None = None

    def find(self, name: str) -> str:
        """The name itself, or the one that is the same text in another Unicode normal form, as macOS writes it; ""."""
        if name in self.there:
            return name
        same = [each for each in self._alike(name) if _text(each) == _text(name)]
        return same[0] if len(same) == 1 else ""

    def missing(self, name: str) -> str:
        """Why a listed name is refused that is not there, with the one that may be meant."""
        alike = self._alike(name)
        return "is listed but not there" + (f"; {short(alike[0])} is" if alike else "")

    def _alike(self, name: str) -> list[str]:
        """Those that differ from a name in capitals or the normal form alone."""
        if self._by_text is None:
            self._by_text = defaultdict(list)
            for each in sorted(self.there):
                self._by_text[_text(each).casefold()].append(each)
        return self._by_text.get(_text(name).casefold(), [])


def _text(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def resolve_listed(base: PurePosixPath, name: str, folder: Path, images: KnownNames) -> tuple[str, str]:
    """(path within the folder, "") of a listed file name, or ("", why it is refused)."""
    plain = name.replace("\\", "/")
    inside = PurePosixPath(os.path.normpath(base / plain))
    if plain.startswith("/") or Path(name).is_absolute():
        return "", "its file_name must be relative to the list's folder; absolute ones are refused"
    if inside.parts[:1] == ("..",):
        return "", "its file_name leaves the folder, which is refused"
    if found := images.find(str(inside)):
        return found, ""
    try:
        is_there = (folder / inside).is_file()
    except (OSError, ValueError):  # a name that no file can have
        is_there = False
    return (str(inside), "") if is_there else ("", images.missing(str(inside)))  # named as no image: its bytes decide


def split_of(part: str) -> str | None:
    """The split that a folder's or a file's name says: `train`, `val-00000-of-00002.parquet`, `test_1`; else None."""
    match = re.match(r"([a-z]+)(?![a-z])", part.lower())
    word = match[1] if match else ""
    return next((split for split, words in SPLIT_WORDS.items() if word in words), None)


def of_split(
    names: Sequence[str], split: str, *, by_file_name: bool = False, folder_is_class: bool = False
) -> tuple[list[str], int]:
    """(the names of one split, how many are of none) where folders, or the files' own names, say splits; else all.

    What was taken for a split though it may be none, or for none though it may be one, is logged.

    Args:
        folder_is_class: whether an image's folder says its class: a folder of images beside such folders of other
            names, `test/` beside `cat/`, is a class then and no split.

    Raises:
        UserError: if there are splits, but not this one.
    """
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
            "taken for classes, as folders beside them are: %s; a split holds a folder for each class", listed
        )
    wanted = split_of(split) if split.lower() in ALL_SPLIT_WORDS else None
    if wanted in found and wanted is not None:
        num_of_none = sum(by_file_name or is_image(name) for name in found.get(None, ()))
        if num_of_none and by_file_name:
            others = [name for name in found if name not in (None, wanted)]
            some = ", ".join(found[None][:3])
            if others:
                raise UserError(
                    f"{some} of the data name no split, others are of {', '.join(sorted({wanted, *others}))}; rename "
                    f"them, such as {wanted}-{PurePosixPath(found[None][0]).name}, or take them out of the folder"
                )
            logger.warning("taken for the split %s too, though their names say no split: %s", split, some)
            return list(names), 0
        if num_of_none:
            logger.warning(
                "the folder %s is taken for the split %s, and %d images beside it are in none; if it is no split, "
                "rename it",
                *(words[wanted], split, num_of_none),
            )
        return found[wanted], num_of_none
    splits = [name for name in found if name is not None]
    if split == "train" and "train" not in splits:  # folders of classes may be called so
        if splits:
            listed, what = ", ".join(words.values()), "file" if by_file_name else "folder"
            logger.warning("trained on too, as there is no %s train: %s; if it is a split, take it out", what, listed)
        return list(names), 0
    there = ", ".join(splits) or "no splits"
    raise UserError(f"--dataset_split {split} is not in the data, which has {there}")


def class_folders(names: Sequence[str]) -> frozenset[str]:
    """Folders of images that are called as splits are, beside folders of images that are not: by their paths."""
    return class_folders_among({name.rpartition("/")[0] for name in names if is_image(name)})


def class_folders_among(folders: Iterable[str]) -> frozenset[str]:
    """As `class_folders`, of the paths of the folders that hold images."""
    holding = {folder for folder in folders if folder}
    called = {folder for folder in holding if PurePosixPath(folder).name.lower() in ALL_SPLIT_WORDS}
    places = {PurePosixPath(folder).parent for folder in holding - called}
    return frozenset(folder for folder in called if PurePosixPath(folder).parent in places)


def read_caption_file_folder(folder: Path, names: list[str], split: str, encoding: str | None = None) -> FolderContent:
    """`captions.json`, which maps file names to a string or a list, beside images or their folder `images/`.

    Splits may be folders (`train/images/`, `images/train/`), have a `captions.json` each (`train/captions.json`), or be
    the keys of a single one.

    Args:
        names: the folder's files.

    Raises:
        UserError: if it can't be read or maps to something else, or has not the split.
    """
    own = [name for name in names if name.endswith(f"/{CAPTION_FILE}") and split_of(name.split("/")[0])]
    chosen = [name for name in own if split_of(name.split("/")[0]) == split_of(split)]
    if own and not chosen and CAPTION_FILE not in names:
        there = ", ".join(name.split("/")[0] for name in own)
        raise UserError(f"--dataset_split {split} is not in {folder}, which has {there}")
    file = folder / (chosen[0] if chosen else CAPTION_FILE)
    texts = TextReader(encoding)
    mapping, is_of_split = _read_caption_file(file, split, texts)
    is_of_split |= bool(chosen)
    every = images = [name for name in names if is_image(name)]
    if any(name.split("/")[0] == "images" or "/images/" in name for name in images):
        images = [name for name in images if "images" in name.split("/")[:-1]]
    has_split_folders = any(part.lower() in ALL_SPLIT_WORDS for name in images for part in name.split("/")[:-1])
    pool = of_split(images, split)[0] if has_split_folders else images
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
            refused.append((name, "its file_name leaves the folder, which is refused"))
        elif path is not None:
            if captions.get(path, found) != found:
                twice.append((entries[path], name))
            captions[path], entries[path] = found, name
        elif plain not in elsewhere:  # else it is of another split
            refused.append((name, known.missing(plain)))
    if twice:
        both = " and ".join(map(short, twice[0]))
        raise UserError(
            f"{file}: {len(twice):,} images have two entries with different captions, such as {both}; leave one of them"
        )
    if is_of_split and not has_split_folders:  # there the list says which images are of the split
        pool = [name for name in pool if name in captions]
    table = FileTable(folder, pool, [captions.get(name, ()) for name in pool], refused, len(every) - len(images))
    table.texts = texts
    used = chosen[0] if chosen else CAPTION_FILE
    of_others = {*images, *own} - {*pool, used}
    return FolderContent(table, [name for name in names if name not in of_others], {used: METADATA})


def _read_caption_file(file: Path, split: str, texts: TextReader) -> tuple[dict, bool]:
    """(the mapping, whether it is of one split alone)."""
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
        raise UserError(f"--dataset_split {split} is not in {file}, which has {', '.join(mapping)}")
    return mapping[key], True


def _by_ending(names: Sequence[str]) -> dict[str, str]:
    """Names by themselves, and by what of them stands behind `images/`, a split's folder, or both."""
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
    """Images with captions in files of the same name: `a.txt`, `a.caption` or `a.json` beside `a.jpg`.

    Each line of a text is a caption; of JSON a string, a list, or an object's field such as "caption" is. Of several
    files beside an image the first in the order of `PAIR_SUFFIXES` is read.

    Args:
        folder_is_class: as of `of_split`.
        encoding: that of the captions, where the user says it.
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
    """Compares the caption files of images that have several, some at a time; of very many images a sample."""
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
    """A line that counts the images whose caption files don't say what the list that is read says, or none.

    Args:
        captions: those of the list, by the images' paths within `root`.
        names: the folder's files but for the list itself.
        lists: the list, as it is named in messages.
        encoding: that of the caption files, where the user says it.
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
    """The caption files of each image that has some; the first is the one that is read."""
    there: dict[str, list[str]] = defaultdict(list)
    for name in filter(is_caption_file, names):
        there[os.path.splitext(name)[0] + os.path.splitext(name)[1].lower()].append(name)
    return {name: found for name in images if (found := _pairs_of(name, there))}


def _pairs_of(name: str, there: Mapping[str, Sequence[str]]) -> list[str]:
    """The caption files of an image, of which the first is read."""
    stem = os.path.splitext(name)[0]
    pairs = (pair for suffix in PAIR_SUFFIXES for pair in (stem + suffix, name + suffix))
    return [found for pair in pairs for found in there.get(pair, ())]


def _read_caption_files(folder: Path, names: Iterable[str]) -> tuple[dict[str, bytes], dict[str, str]]:
    """(the bytes of caption files by their names, why others can't be read)."""
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
    """Counts the images whose captions in several places are not the same."""

    def __init__(self, num_images: int | None = None, lists: str = ""):
        """`num_images` are those with captions in several places; None if all of them are compared.

        `lists` is the list of captions that is read, as messages name it; "" where caption files alone are compared.
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
            images: the names of each one's files, of which the first is read; the image's own in place of a list.
            read: the captions that are read, by the first names; nothing of a file that can't be read.
            others: the bytes of the other files.
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
        """A line that counts them, or none."""
        if not self._num_differing:
            return []
        is_sample = self._num_images is not None and self._num_compared < self._num_images
        of = f" of {self._num_compared:,} compared" if is_sample else ""
        if self._lists:
            image, *further = self._first
            return [
                f"{self._num_differing:,} images{of} have other captions in {self._lists} than in a file beside them; "
                f"{self._lists} is used, such as for {image} and not {', '.join(further)}"
            ]
        return [
            f"{self._num_differing:,} images{of} have several caption files with different captions; the first is read "
            f"({' before '.join(PAIR_SUFFIXES)}), such as {self._first[0]} and not {', '.join(self._first[1:])}"
        ]


def caption_limit(name: str) -> int:
    """The most bytes that a caption file may have."""
    return MAX_CAPTION_JSON if name.lower().endswith(".json") else MAX_CAPTION


def captions_in(contents: Mapping[str, bytes], texts: TextReader) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """(the captions in text and JSON files, by their names; why others can't be read)."""
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
    """The captions in a text or JSON file that comes alone: too little to guess its encoding by.

    Raises:
        FileError: if it is too long, not UTF-8 while no encoding is given, or damaged.
    """
    limit = caption_limit(name)
    if len(content) > limit:
        raise FileError(name, f"has over {size_text(limit)}; no more are read")
    captions, broken = captions_in({name: content}, CertainTexts(encoding))
    if name in broken:
        raise FileError(name, broken[name])
    return captions[name]


def _captions_of_file(name: str, text: str) -> tuple[str, ...]:
    if not name.lower().endswith(".json"):
        return present(text.splitlines())
    return captions_of(_caption_field(parse_json(text, name)), "the caption")


def _caption_field(value: object) -> object:
    """What a JSON object says of the caption; anything else as it is."""
    if not isinstance(value, dict):
        return value
    found = next((field for field in CAPTION_FIELDS if value.get(field)), None)
    if found == "tags" and isinstance(value[found], list):  # one caption of all of them
        return ", ".join(str(tag) for tag in value[found])
    return value[found] if found else None
