"""Tables of the images of one source, listed but not read; every kind of source returns one."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from utils.config.options import UserError
from utils.config.user_files import TextReader, is_blank
from utils.data.file_listing import Fates
from utils.data.images import Refused

if TYPE_CHECKING:
    from datasets import Dataset


class ImageTable(ABC):
    """The images of one source in a fixed order; each row is read on access. Tables are sent to loader workers.

    Attributes:
        name: the source's name between runs, under which facts about its images are cached.
        refused: (key, reason) of each listed image that can't be used.
        num_left_out: number of images in the folder that no metadata file or split lists.
        classes: class names in the source's own order, if it has one.
        in_shards: whether the images are members of tar shards, which are part of their keys.
        texts: the reader of its captions, if these are in text files.
        fates: how each other file of its folder was used; None if it has no folder.
        member_fates: how each other member of its tar shards was used; None if it has none.
    """

    name: str
    refused: Sequence[tuple[str, str]] = ()
    num_left_out: int = 0
    classes: tuple[str, ...] = ()
    in_shards: bool = False
    texts: TextReader | None = None
    fates: Fates | None = None
    member_fates: Fates | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def key(self, row: int) -> str:
        """Returns the name of an image within its source: a path or a number."""

    @abstractmethod
    def image(self, row: int) -> str | bytes:
        """Returns an image's path or bytes; b"" if the row has no image."""

    @abstractmethod
    def captions(self, row: int) -> tuple[str, ...]:
        """Returns an image's captions; () if it has none."""

    def all_captions(self) -> Iterator[tuple[str, ...]]:
        """Yields the captions of each image, in order, without reading images."""
        return (self.captions(row) for row in range(len(self)))

    def stamp(self, row: int) -> str:
        """Returns text that changes with an image's bytes, without reading them; "" if `name` changes with them."""
        return ""

    def mask(self, row: int) -> str | bytes | None:
        """Returns the path or bytes of an image's mask; None if the table has none."""
        return None


class FileTable(ImageTable):
    """Images that are files of a folder."""

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        captions: Sequence[Sequence[str]],
        refused: Sequence[tuple[str, str]] = (),
        num_left_out: int = 0,
        masks: Sequence[str | None] | None = None,
    ):
        """Creates the table.

        Args:
            root: the folder.
            names: the images' paths, relative to `root`.
            captions: the captions of each image.
            refused, num_left_out: see `ImageTable`.
            masks: the path of each image's mask, relative to `root`, or None if it has none.
        """
        self.root = root
        self.name = str(root.resolve())
        self.refused = list(refused)
        self.num_left_out = num_left_out
        # Arrow arrays instead of lists: they take no memory beyond their characters, and forked workers share them
        self._names = pa.array([os.fsencode(name) for name in names], pa.large_binary())  # may be invalid Unicode
        self._captions = pa.array(captions, pa.list_(pa.large_string()))
        encoded = [None if mask is None else os.fsencode(mask) for mask in masks or ()]
        self._masks = None if masks is None else pa.array(encoded, pa.large_binary())

    def __len__(self) -> int:
        return len(self._names)

    def names(self) -> list[str]:
        """Returns the paths of all images, relative to the folder."""
        return [os.fsdecode(name) for name in self._names.to_pylist()]

    def num_without_captions(self) -> int:
        """Returns the number of images without captions."""
        from pyarrow import compute

        return compute.sum(compute.equal(compute.list_value_length(self._captions), 0)).as_py() or 0

    def key(self, row: int) -> str:
        """Returns the path, relative to the folder."""
        return os.fsdecode(self._names[row].as_py())

    def image(self, row: int) -> str:
        """Returns the file's path."""
        return str(self.root / self.key(row))

    def captions(self, row: int) -> tuple[str, ...]:
        """Returns the captions found beside the image or in the folder's metadata."""
        return tuple(self._captions[row].as_py())

    def mask(self, row: int) -> str | None:
        """Returns the path of the mask that the folder's metadata names."""
        name = None if self._masks is None else self._masks[row].as_py()
        return None if name is None else str(self.root / os.fsdecode(name))

    def stamp(self, row: int) -> str:
        """Returns the size and times of the file, see `stamp_of`."""
        return stamp_of(self.image(row))


def stamp_of(path: str | Path) -> str:
    """Returns a file's size, modification time and change time; users can't set back the last one."""
    try:
        facts = os.stat(path)
    except OSError:
        return "missing"
    return f"{facts.st_size}:{facts.st_mtime_ns}:{facts.st_ctime_ns}"


class RowTable(ImageTable):
    """Images that are rows of a dataset of the `datasets` library, with an undecoded image column."""

    def __init__(
        self,
        dataset: "Dataset",
        image_column: str,
        caption_column: str | None,
        mask_column: str | None = None,
        read: Callable[[object, str], tuple[str, ...]] | None = None,
        folders: Sequence[Path] = (),
    ):
        """Creates the table.

        Args:
            dataset: the rows.
            image_column, caption_column, mask_column: their columns; None without captions or masks.
            read: converts a value of the caption column to captions.
            folders: images that are paths must lie within these folders.
        """
        self._read = read or captions_of
        self._folders = tuple(folders)
        self.classes = getattr(read, "names", ())
        self.name = f"dataset {dataset._fingerprint}"
        self._dataset = dataset
        self._image_column = image_column
        self._captions = None if caption_column is None else dataset.select_columns([caption_column])
        self._caption_column = caption_column
        self._masks = None if mask_column is None else dataset.select_columns([mask_column])
        self._mask_column = mask_column
        first = dataset[0][image_column] if len(dataset) else None
        self._has_paths = isinstance(image_of(first, self._folders), str)

    def __len__(self) -> int:
        return len(self._dataset)

    def key(self, row: int) -> str:
        """Returns `row N`, as paths in datasets may repeat."""
        return f"row {row}"

    def image(self, row: int) -> str | bytes:
        """Returns the bytes, or the path if the row holds only a path."""
        return image_of(self._dataset[row][self._image_column], self._folders)

    def mask(self, row: int) -> str | bytes | None:
        """Returns the value of the mask column."""
        return None if self._masks is None else image_of(self._masks[row][self._mask_column], self._folders) or None

    def captions(self, row: int) -> tuple[str, ...]:
        """Returns the captions in the caption column."""
        if self._captions is None:
            return ()
        return self._read(self._captions[row][self._caption_column], self._caption_column)

    def all_captions(self) -> Iterator[tuple[str, ...]]:
        """Yields the captions of each image, in order, reading a thousand rows at a time."""
        if self._captions is None:
            yield from (() for _ in range(len(self)))
            return
        for batch in self._captions.iter(1000):
            for value in batch[self._caption_column]:
                yield self._read(value, self._caption_column)

    def stamp(self, row: int) -> str:
        """Returns the stamp of the image file if rows hold paths; bytes in rows change the dataset's name."""
        image = self.image(row) if self._has_paths else b""
        return stamp_of(image) if isinstance(image, str) else ""


def declared(values: dict, size_columns: tuple[str, str]) -> tuple[int, int] | None:
    """Returns width and height from a row's two size columns, or None unless both hold a number of at least 1."""
    sizes = [values.get(column) for column in size_columns]
    is_size = all(isinstance(size, int | float) and size >= 1 for size in sizes)
    return (int(sizes[0]), int(sizes[1])) if is_size else None


NO_PATH = re.compile(  # text in an image column that is not a path; base64 of PNG, JPEG, WebP and GIF by its beginning
    r"(?P<address>(?:https?|s3|gs|ftp|hf)://)|data:image/|(?:iVBORw0KGgo|/9j/|UklGR|R0lGOD)[A-Za-z0-9+/\s]{20,}={0,2}\s*$"
)
GENERATED = ("imagefolder", "videofolder", "audiofolder")  # builders that list files and write the paths themselves


def data_folders(given: Sequence[str | None], builder: str | None, cache_files: Sequence[str] = ()) -> tuple[Path, ...]:
    """Returns the folders that images named by path in a dataset may lie in.

    Args:
        given: the values of the data flags; local folders and files among them count.
        builder: name of the `datasets` builder; one that lists files itself may also name files in caches.
        cache_files: the dataset's cache files, which tell where the builder's cache is.
    """
    local = [Path(name) for name in given if name is not None and Path(name).exists()]
    folders = [path if path.is_dir() else path.parent for path in local]
    if builder in GENERATED:
        import datasets
        from huggingface_hub import constants

        folders += [Path(datasets.config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE)]
        folders += [Path(file).parents[4] / "downloads" for file in cache_files if len(Path(file).parents) > 5]
    return tuple(dict.fromkeys(folder.resolve() for folder in folders))


def image_of(value: object, folders: Sequence[Path]) -> str | bytes:
    """Returns the path or bytes of an undecoded image of the `datasets` library; `Refused` if it can't be read.

    Args:
        value: the value of the image column.
        folders: resolved folders from `data_folders`. Rows are not trusted: a path must lie in one of them after
            following links.
    """
    # bytes
    if value is None:
        return b""
    if not isinstance(value, dict):
        return Refused(f"its row holds a {type(value).__name__}, not an image")
    content, path = value.get("bytes"), value.get("path")
    if content is not None:
        return content

    # text that is not a path
    if path and (match := NO_PATH.match(path)):
        what = "the address of an image; fetch it" if match["address"] else "an image as base64 text; decode it"
        return Refused(f"its row holds {what}, and store its bytes")

    # a path, relative to one of the folders
    for folder in folders if path else ():
        try:
            found = os.path.realpath(folder / path)
        except (OSError, ValueError):  # an invalid file name
            continue
        if Path(found).is_relative_to(folder):
            return found
    shown = path if path is None or len(path) < 80 else f"{path[:77]}..."
    return Refused(f"its path is outside the data folder; store its bytes instead: {shown!r}") if path else b""


def captions_of(value: object, where: str) -> tuple[str, ...]:
    """Returns the captions in a string, a list of strings or an empty value, cleaned by `present`.

    Args:
        value: the value of a caption column.
        where: the column, for errors.

    Raises:
        UserError: for a value of another type.
    """
    if value is None or value != value:  # pandas writes NaN for missing values
        return ()
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(caption, str | None) for caption in found):
        raise UserError(f"{where} must hold a string or a list of strings, got {value!r:.80}")
    return present(found)


def present(texts: Iterable[str | None]) -> tuple[str, ...]:
    """Strips white space from texts and drops blank ones; in every format, a blank text is not a caption."""
    return tuple(_whole(text.strip()) for text in texts if text and not is_blank(text))


def _whole(text: str) -> str:
    """Replaces lone surrogates, which JSON can hold but no text file."""
    return text.encode("utf-8", "replace").decode("utf-8")
