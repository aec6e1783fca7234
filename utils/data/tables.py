"""The images of one source, listed but not read: what every kind of source gives."""

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
    """The images of one source in a fixed order; a row is read when it is asked for. It goes to loader workers.

    Attributes:
        name: what the source is called between runs: what is known of its images is remembered under it.
        refused: (key, reason) of each image that the source lists but that can't be had.
        num_left_out: images that are there but that the source's list does not name.
        classes: names of classes in the source's own order, where it has one.
        in_shards: whether its images are members of tar shards, which are parts of their keys.
        texts: what read its captions, where they are text in files.
        fates: what became of the files of its folder that are no images of it; None where it has no folder.
        member_fates: what became of the members of its shards that are no images of it.
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
        """The name of an image within its source: a path or a number."""

    @abstractmethod
    def image(self, row: int) -> str | bytes:
        """An image's path, or its bytes; of one that is not there empty bytes."""

    @abstractmethod
    def captions(self, row: int) -> tuple[str, ...]:
        """An image's captions, none where it has none."""

    def all_captions(self) -> Iterator[tuple[str, ...]]:
        """The captions of each image, in order, without reading images."""
        return (self.captions(row) for row in range(len(self)))

    def stamp(self, row: int) -> str:
        """What is known, without reading it, to change with an image's bytes; "" where `name` says it already."""
        return ""

    def mask(self, row: int) -> str | bytes | None:
        """The path or bytes of the mask that the table has for an image."""
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
        """`names` and `masks` are paths within `root`."""
        self.root = root
        self.name = str(root.resolve())
        self.refused = list(refused)
        self.num_left_out = num_left_out
        # Arrow's arrays and not lists: a million of them cost what their letters cost, and forked workers share them
        self._names = pa.array([os.fsencode(name) for name in names], pa.large_binary())  # need not be Unicode
        self._captions = pa.array(captions, pa.list_(pa.large_string()))
        encoded = [None if mask is None else os.fsencode(mask) for mask in masks or ()]
        self._masks = None if masks is None else pa.array(encoded, pa.large_binary())

    def __len__(self) -> int:
        return len(self._names)

    def names(self) -> list[str]:
        """The paths of all images within the folder."""
        return [os.fsdecode(name) for name in self._names.to_pylist()]

    def num_without_captions(self) -> int:
        """How many images have none."""
        from pyarrow import compute

        return compute.sum(compute.equal(compute.list_value_length(self._captions), 0)).as_py() or 0

    def key(self, row: int) -> str:
        """The path within the folder."""
        return os.fsdecode(self._names[row].as_py())

    def image(self, row: int) -> str:
        """The file's path."""
        return str(self.root / self.key(row))

    def captions(self, row: int) -> tuple[str, ...]:
        """Those that were found beside the image or in the folder's list."""
        return tuple(self._captions[row].as_py())

    def mask(self, row: int) -> str | None:
        """The path of the file that the folder's list names."""
        name = None if self._masks is None else self._masks[row].as_py()
        return None if name is None else str(self.root / os.fsdecode(name))

    def stamp(self, row: int) -> str:
        """Size and times of the file; the second time can't be set back."""
        return stamp_of(self.image(row))


def stamp_of(path: str | Path) -> str:
    """A file's size and times, of which the last can't be set back."""
    try:
        facts = os.stat(path)
    except OSError:
        return "missing"
    return f"{facts.st_size}:{facts.st_mtime_ns}:{facts.st_ctime_ns}"


class RowTable(ImageTable):
    """Images that are rows of a dataset of the `datasets` library, whose image column is not decoded."""

    def __init__(
        self,
        dataset: "Dataset",
        image_column: str,
        caption_column: str | None,
        mask_column: str | None = None,
        read: Callable[[object, str], tuple[str, ...]] | None = None,
        folders: Sequence[Path] = (),
    ):
        """`read` makes captions of what the caption column holds; without that column there are none.

        Of images that are paths only those within `folders` are read.
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
        """`row N`: paths in datasets need not be distinct."""
        return f"row {row}"

    def image(self, row: int) -> str | bytes:
        """The bytes, or the path where the row holds only that."""
        return image_of(self._dataset[row][self._image_column], self._folders)

    def mask(self, row: int) -> str | bytes | None:
        """That of the mask column."""
        return None if self._masks is None else image_of(self._masks[row][self._mask_column], self._folders) or None

    def captions(self, row: int) -> tuple[str, ...]:
        """Those of the caption column."""
        if self._captions is None:
            return ()
        return self._read(self._captions[row][self._caption_column], self._caption_column)

    def all_captions(self) -> Iterator[tuple[str, ...]]:
        """The captions of each image, in order, read a thousand at a time."""
        if self._captions is None:
            yield from (() for _ in range(len(self)))
            return
        for batch in self._captions.iter(1000):
            for value in batch[self._caption_column]:
                yield self._read(value, self._caption_column)

    def stamp(self, row: int) -> str:
        """That of the file where rows name files; bytes in the rows change with the dataset's own name."""
        image = self.image(row) if self._has_paths else b""
        return stamp_of(image) if isinstance(image, str) else ""


def declared(values: dict, size_columns: tuple[str, str]) -> tuple[int, int] | None:
    """Width and height from a row's two columns, if both hold a number above 0."""
    sizes = [values.get(column) for column in size_columns]
    is_size = all(isinstance(size, int | float) and size >= 1 for size in sizes)
    return (int(sizes[0]), int(sizes[1])) if is_size else None


NO_PATH = re.compile(  # what stands in a column of texts in place of images; base64 by how PNG, JPEG, WebP, GIF begin
    r"(?P<address>(?:https?|s3|gs|ftp|hf)://)|data:image/|(?:iVBORw0KGgo|/9j/|UklGR|R0lGOD)[A-Za-z0-9+/\s]{20,}={0,2}\s*$"
)
GENERATED = ("imagefolder", "videofolder", "audiofolder")  # builders that list files, and write their paths themselves


def data_folders(given: Sequence[str | None], builder: str | None, cache_files: Sequence[str] = ()) -> tuple[Path, ...]:
    """Where the images may lie that a dataset names by their paths.

    Args:
        given: what the user gave as data: local folders and files, and names of other things.
        builder: the builder of the `datasets` library; those that list files themselves may name files of its caches.
        cache_files: of a dataset, from which the builder's own cache follows.
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
    """The path or bytes of an undecoded image of the `datasets` library; `Refused` if it may not be read.

    Args:
        folders: resolved, as of `data_folders`. A row is not trusted: a path must lie within them, links followed.
    """
    if value is None:
        return b""
    if not isinstance(value, dict):
        return Refused(f"its row holds no image but a {type(value).__name__}")
    content, path = value.get("bytes"), value.get("path")
    if content is not None:
        return content
    if path and (match := NO_PATH.match(path)):
        what = "the address of an image; fetch it" if match["address"] else "an image as base64 text; decode it"
        return Refused(f"its row holds {what}, and store its bytes")
    for folder in folders if path else ():
        try:
            found = os.path.realpath(folder / path)
        except (OSError, ValueError):  # a name that no file can have
            continue
        if Path(found).is_relative_to(folder):
            return found
    shown = path if path is None or len(path) < 80 else f"{path[:77]}..."
    return Refused(f"its path leads out of the data folder, store its bytes instead: {shown!r}") if path else b""


def captions_of(value: object, where: str) -> tuple[str, ...]:
    """The captions in a string, a list of strings, or nothing, by the rule of `present`.

    Raises:
        UserError: for anything else, naming `where` it stands.
    """
    if value is None or value != value:  # pandas writes NaN for nothing
        return ()
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(caption, str | None) for caption in found):
        raise UserError(f"{where} must hold a string or a list of strings, got {value!r:.80}")
    return present(found)


def present(texts: Iterable[str | None]) -> tuple[str, ...]:
    """The captions among some texts, without white space around them: in every format, a blank text is no caption."""
    return tuple(_whole(text.strip()) for text in texts if text and not is_blank(text))


def _whole(text: str) -> str:
    """The text without halves of characters, which JSON can hold but no file."""
    return text.encode("utf-8", "replace").decode("utf-8")
