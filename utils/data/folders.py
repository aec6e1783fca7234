"""Folders of images, and the forms in which captions lie beside them."""

import csv
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

import PIL.Image

from utils.data.tables import FileTable, captions_of
from utils.options import UserError, first_line, nearest

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
CAPTION_FILE = "captions.json"
PAIR_SUFFIXES = (".txt", ".caption", ".json")
CAPTION_FIELDS = ("caption", "captions", "text", "prompt", "tags")
UNREADABLE_FORMATS = {"PDF", "MPEG", "HDF5", "GRIB", "BUFR", "WMF", "EPS", "PSD", "FITS"}


@cache
def image_suffixes() -> frozenset[str]:
    """The endings, in small letters, of files that PIL can open."""
    known = PIL.Image.registered_extensions()
    return frozenset(end for end, kind in known.items() if kind in PIL.Image.OPEN and kind not in UNREADABLE_FORMATS)


def list_files(folder: Path) -> list[str]:
    """Paths within the folder of all its files, links followed and hidden ones left out, in order."""
    found: list[str] = []
    seen: set[tuple[int, int]] = set()

    def walk(path: Path, prefix: str) -> None:
        facts = os.stat(path)
        if (facts.st_dev, facts.st_ino) in seen:  # a link to a folder above it
            return
        seen.add((facts.st_dev, facts.st_ino))
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    walk(Path(entry.path), f"{prefix}{entry.name}/")
                else:
                    found.append(prefix + entry.name)

    try:
        walk(folder, "")
    except OSError as error:
        raise UserError(f"--train_data_dir {folder} can't be read: {first_line(error)}") from error
    return sorted(found)


def is_image(name: str) -> bool:
    """Whether a file's name ends as an image's."""
    return os.path.splitext(name)[1].lower() in image_suffixes()


def read_metadata_folder(folder: Path, names: list[str], caption_column: str) -> FileTable:
    """A folder with `metadata.jsonl` or `metadata.csv`, at its top or below, whose rows are the images to take.

    Args:
        names: the folder's files.

    Raises:
        UserError: for metadata that can't be read, or without the columns `file_name` and `caption_column`.
    """
    images = {name for name in names if is_image(name)}
    listed: dict[str, tuple[str, ...]] = {}
    refused: list[tuple[str, str]] = []
    for metadata in (name for name in names if PurePosixPath(name).name in METADATA_NAMES):
        for place, row in _metadata_rows(folder / metadata):
            name = row.get("file_name")
            if not isinstance(name, str) or not name:
                raise UserError(f"{place} has no file_name")
            if caption_column not in row:
                there = [key for key in row if key != "file_name"]
                hint = nearest(caption_column, there)
                raise UserError(
                    f"--caption_column {caption_column} is not a column of the data: {place} has "
                    f"{', '.join(there) or 'none beside file_name'}; "
                    + (f"did you mean --caption_column {hint}?" if hint else "name one with --caption_column")
                )
            captions = captions_of(row[caption_column], f"--caption_column {caption_column}: {place}")
            path, reason = _resolve(PurePosixPath(metadata).parent, name, folder, images)
            if reason:
                refused.append((name, reason))
            else:
                listed[path] = listed.get(path, ()) + captions
    return FileTable(folder, list(listed), list(listed.values()), refused, len(images - listed.keys()))


def _metadata_rows(file: Path) -> Iterator[tuple[str, dict]]:
    """(where it stands, the row) of each row of a metadata file."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            if file.suffix == ".csv":
                for number, row in enumerate(csv.DictReader(lines), start=2):
                    yield f"{file}, line {number}", {name: value or None for name, value in row.items() if name}
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"line {number} is no JSON object")
                    yield f"{file}, line {number}", row
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file} can't be read: {first_line(error)}") from error


def _resolve(base: PurePosixPath, name: str, folder: Path, images: set[str]) -> tuple[str, str]:
    """(path within the folder, "") of a listed file name, or ("", why it is refused)."""
    plain = name.replace("\\", "/")
    inside = PurePosixPath(os.path.normpath(base / plain))
    if plain.startswith("/") or Path(name).is_absolute() or inside.parts[:1] == ("..",):
        return "", "its file_name leaves the folder, which is refused"
    if str(inside) in images:
        return str(inside), ""
    if (folder / inside).is_file():
        return str(inside), ""  # hidden, or named as no image is: its bytes decide
    return "", "is listed but not there"


def read_caption_file_folder(folder: Path, split: str) -> FileTable:
    """`captions.json`, which maps file names to a string or a list, beside `images/`; with splits in one of three ways.

    `{split}/captions.json` and `{split}/images/`; `images/{split}/`; or the split's name as a key of `captions.json`.

    Raises:
        UserError: if it can't be read or maps to something else.
    """
    root = folder / split if (folder / split / CAPTION_FILE).is_file() else folder
    file = root / CAPTION_FILE
    try:
        mapping = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read: {first_line(error)}") from error
    if not isinstance(mapping, dict):
        raise UserError(f"{file} must map file names to captions, got a {type(mapping).__name__}")
    splits = ("train", "validation", "test", "val")
    if mapping and all(name in splits and isinstance(value, dict) for name, value in mapping.items()):
        if split not in mapping:
            raise UserError(f"--dataset_split {split} is not in {file}, which has {', '.join(mapping)}")
        mapping, is_split = mapping[split], True
    else:
        is_split = False
    images_dir = root / "images" if (root / "images").is_dir() else root
    prefix = f"{images_dir.relative_to(root)}/" if images_dir != root else ""
    names = [name for name in list_files(root) if is_image(name) and name.startswith(prefix)]
    within = [name for name in names if name.startswith(f"{prefix}{split}/")]
    has_split_folders = any(name.startswith(f"{prefix}{other}/") for name in names for other in splits)
    if has_split_folders:
        names = within
    captions: dict[str, tuple[str, ...]] = {}
    refused = []
    known = set(names)
    for name, value in mapping.items():
        found = captions_of(_caption_field(value), f"{file}: {name}")
        tried = (f"{prefix}{name}", f"{prefix}{split}/{name}", name)
        path = next((path for path in tried if path in known), None)
        if path is not None:
            captions[path] = found
        elif name.startswith("/") or ".." in PurePosixPath(name.replace("\\", "/")).parts:
            refused.append((name, "its file_name leaves the folder, which is refused"))
        elif not any((root / path).is_file() for path in tried):  # else it is of another split
            refused.append((name, "is listed but not there"))
    if is_split and not has_split_folders:  # there the list says which images are of the split
        names = [name for name in names if name in captions]
    return FileTable(root, names, [captions.get(name, ()) for name in names], refused)


def read_pairs_folder(folder: Path, names: list[str]) -> FileTable:
    """Images with captions in files of the same name: `a.txt`, `a.caption` or `a.json` beside `a.jpg`.

    Each line of a text is a caption; of JSON a string, a list, or an object's field such as "caption" is.
    """
    there = set(names)
    images, captions, refused = [], [], []
    for name in filter(is_image, names):
        try:
            captions.append(_paired_captions(folder, name, there))
            images.append(name)
        except ValueError as error:
            refused.append((name, str(error)))
    return FileTable(folder, images, captions, refused)


def _paired_captions(folder: Path, name: str, there: set[str]) -> tuple[str, ...]:
    stem = os.path.splitext(name)[0]
    for pair in (beside + suffix for suffix in PAIR_SUFFIXES for beside in (stem, name)):
        if pair in there:
            try:
                return captions_in(pair, (folder / pair).read_bytes())
            except OSError as error:
                raise ValueError(f"its caption file {pair} can't be read: {first_line(error)}") from error
    return ()


def captions_in(name: str, content: bytes) -> tuple[str, ...]:
    """The captions in a text or JSON file.

    Raises:
        ValueError: if it is no such file.
    """
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
        if not name.endswith(".json"):
            return tuple(line.strip() for line in text.splitlines() if line.strip())
        return captions_of(_caption_field(json.loads(text)), "the caption")
    except (ValueError, UserError) as error:
        raise ValueError(f"its caption file {name} can't be read: {first_line(error)}") from error


def _caption_field(value: object) -> object:
    """What a JSON object says of the caption; anything else as it is."""
    if not isinstance(value, dict):
        return value
    return next((value[field] for field in CAPTION_FIELDS if value.get(field)), None)
