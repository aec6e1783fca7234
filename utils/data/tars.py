"""WebDataset tar shards on a disk, read in any order: the place of each image within its shard is listed once."""

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa

from utils.data.folders import PAIR_SUFFIXES, captions_in, is_image
from utils.data.images import MOST_BYTES
from utils.data.tables import ImageTable, stamp_of
from utils.options import UserError, first_line
from utils.user_files import open_regular


class TarTable(ImageTable):
    """Images that are members of tar files."""

    def __init__(
        self,
        shards: Sequence[Path],
        keys: Sequence[str],
        places: np.ndarray,
        captions: Sequence[Sequence[str]],
        refused: Sequence[tuple[str, str]],
        masks: np.ndarray,
    ):
        """`places` is [N, 3] int64: the number of the shard, and where in it the bytes begin and how many they are.

        `masks` is alike, with no bytes where an image has none.
        """
        self.name = f"tar {shards[0].resolve()}"
        self.refused = refused
        self._shards = [str(shard) for shard in shards]
        self._stamps = [stamp_of(shard) for shard in shards]
        self._keys = pa.array([os.fsencode(key) for key in keys], pa.large_binary())
        self._places = places
        self._masks = masks
        self._captions = pa.array(captions, pa.list_(pa.large_string()))

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, row: int) -> str:
        """`shard.tar/member`."""
        return os.fsdecode(self._keys[row].as_py())

    def image(self, row: int) -> bytes:
        """The member's bytes.

        Raises:
            OSError: if the shard has gone.
        """
        return self._read(self._places[row])

    def mask(self, row: int) -> bytes | None:
        """The bytes of the member of the same sample that is its mask."""
        return self._read(self._masks[row]) or None

    def _read(self, place: np.ndarray) -> bytes:
        shard, begin, length = (int(value) for value in place)
        if length > MOST_BYTES:
            raise OSError(f"it has over {MOST_BYTES >> 20} MiB, the most that is read")
        with open_regular(self._shards[shard]) as file:
            file.seek(begin)
            return file.read(length)

    def captions(self, row: int) -> tuple[str, ...]:
        """Those of the member's sample."""
        return tuple(self._captions[row].as_py())

    def stamp(self, row: int) -> str:
        """The shard's size and times."""
        return self._stamps[int(self._places[row, 0])]


def read_tars(shards: Sequence[Path], mask_ending: str | None = None) -> TarTable:
    """Lists tar shards, whose members of one name (up to the first dot) are a sample: `a.jpg` with `a.txt` or `a.json`.

    Args:
        mask_ending: what stands behind the first dot of a mask's name, such as mask.png.

    Raises:
        UserError: if none of them can be read or has the ending; they must not be compressed.
    """
    keys, places, masks, captions, refused = [], [], [], [], []
    num_left_out = 0
    root = Path(os.path.commonpath([shard.parent for shard in shards]))
    for number, shard in enumerate(shards):
        images: dict[str, tuple[str, int, int]] = {}
        texts: dict[str, tuple[str, tuple[str, ...]]] = {}
        broken: dict[str, str] = {}
        masked: dict[str, tuple[int, int]] = {}
        for sample, member, begin, length, content in _members(shard, refused):
            if mask_ending is not None and PurePosixPath(member).name.partition(".")[2] == mask_ending:
                masked[sample] = (begin, length)
            elif is_image(member):
                num_left_out += sample in images
                images.setdefault(sample, (member, begin, length))
            elif content is not None and _comes_first(member, texts.get(sample)):
                try:
                    texts[sample] = (member, captions_in(member, content))
                except ValueError as error:
                    broken[sample] = str(error)
        for sample, (member, begin, length) in images.items():
            key = f"{shard.relative_to(root)}/{member}"
            if sample in broken:
                refused.append((key, broken[sample]))
                continue
            keys.append(key)
            places.append((number, begin, length))
            masks.append((number, *masked.get(sample, (0, 0))))
            captions.append(texts.get(sample, ("", ()))[1])
    if shards and not keys and refused:
        raise UserError(f"no image can be read from {len(shards)} tar shards; {': '.join(refused[0])}")
    if mask_ending is not None and not any(length for _, _, length in masks):
        raise UserError(f"--mask_column {mask_ending} is the ending of no member of the {len(shards)} tar shards")
    table = TarTable(shards, keys, _places(places), captions, refused, _places(masks))
    table.num_left_out = num_left_out
    return table


def _places(rows: list[tuple[int, int, int]]) -> np.ndarray:
    return np.array(rows, np.int64).reshape(-1, 3)


def _members(shard: Path, refused: list[tuple[str, str]]) -> Iterator[tuple[str, str, int, int, bytes | None]]:
    """(sample, name, begin, length, content if it is a caption's) of each file in a shard; images are not read.

    What lies behind a broken place is refused.
    """
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if not member.isfile() or path.name.startswith("."):
                    continue
                content = None
                if path.suffix in PAIR_SUFFIXES:
                    content = archive.extractfile(member).read()
                sample = str(path.parent / path.name.partition(".")[0])  # WebDataset's rule: up to the first dot
                yield sample, member.name, member.offset_data, member.size, content
    except (OSError, tarfile.TarError) as error:
        refused.append((shard.name, f"the shard is broken, what follows in it is left out: {first_line(error)}"))


def _comes_first(name: str, held: tuple[str, tuple[str, ...]] | None) -> bool:
    """Whether a caption file goes before the one that is held."""
    order = [PurePosixPath(each).suffix for each in (name, held[0])] if held else []
    return not held or PAIR_SUFFIXES.index(order[0]) < PAIR_SUFFIXES.index(order[1])
