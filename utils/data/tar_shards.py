"""Reads WebDataset tar shards from disk in any order, after listing the offset of each image in its shard."""

import logging
import os
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from utils.config.options import UserError, first_line
from utils.config.user_files import FileError, TextReader, decode, open_regular, size_text, what_is_at
from utils.data.file_listing import (
    CAPTION,
    DUPLICATE,
    HIDDEN,
    LONE_CAPTION,
    MASK,
    NO_READER,
    OTHER,
    UNREADABLE,
    Fate,
    Fates,
)
from utils.data.folders import (
    PAIR_SUFFIXES,
    PHOTO_SUFFIXES,
    CaptionComparison,
    caption_limit,
    captions_in,
    is_caption_file,
    is_image,
)
from utils.data.images import MOST_BYTES, unread_reason
from utils.data.tables import ImageTable, stamp_of

logger = logging.getLogger(__name__)
NUM_SHOWN = 3
MOST_PADDING = 1 << 16  # bytes after the last member that are checked
IMAGE_COLUMN, CAPTION_COLUMN, MASK_COLUMN, REASON_COLUMN = "__image__", "__caption__", "__mask__", "__reason__"
"""Columns of a streamed sample: its image, its captions, its mask, and why it is skipped."""
OTHER_FILES = {
    b"\x1f\x8b": "compressed with gzip; decompress it with gunzip",
    b"BZh": "compressed with bzip2; decompress it with bunzip2",
    b"\xfd7zXZ\x00": "compressed with xz; decompress it with unxz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; decompress it with unzstd",
    b"\x04\x22\x4d\x18": "compressed with lz4; decompress it with unlz4",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!": "a rar archive; unpack it",
    b"PAR1": "a Parquet file; rename it to .parquet",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself with git lfs pull",
    b"<!DOCTYPE": "a web page; fetch the file again",
    b"<html": "a web page; fetch the file again",
    b"\x89PNG": "an image; rename it to .png",
    b"\xff\xd8\xff": "an image; rename it to .jpg",
    b"GIF8": "an image; rename it to .gif",
    b"RIFF": "an image, a sound or a video; give it the right file extension",
    b"ARROW1": "an Arrow file; give its dataset as --dataset_name",
    b"SQLite": "a database; export its images",
}
"""What a .tar file that is not a tar archive may be, by its first bytes."""
ARCHIVES = (".zip", ".7z", ".rar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".cbz", ".cbr")
NO_FILES = "holds no files"
MAX_HEADER = 1 << 14  # bytes of an extended header, such as a long name; tarfile takes quadratic time to read it


class TarTable(ImageTable):
    """Images that are members of tar files.

    Attributes:
        findings: warnings about the captions, one line each.
        doubled: names of members that are skipped because another image of their sample comes first.
    """

    in_shards = True
    findings: Sequence[str] = ()
    doubled: Sequence[str] = ()

    def __init__(
        self,
        shards: Sequence[Path],
        keys: Sequence[str],
        places: np.ndarray,
        captions: Sequence[Sequence[str]],
        refused: Sequence[tuple[str, str]],
        masks: np.ndarray,
    ):
        """Creates the table.

        Args:
            shards: paths of the shards.
            keys: the images' names, which start with the shard's.
            places: [N, 3] int64: shard number, offset and length in bytes of each image.
            captions: the captions of each image.
            refused: see `ImageTable`.
            masks: as `places`, of the masks; length 0 if an image has none.
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
        """Returns `shard.tar/member`."""
        return os.fsdecode(self._keys[row].as_py())

    def image(self, row: int) -> bytes:
        """Returns the member's bytes.

        Raises:
            OSError: if the shard is gone or the member is too large.
        """
        return self._read(self._places[row])

    def mask(self, row: int) -> bytes | None:
        """Returns the bytes of the sample's mask; None if it has none."""
        return self._read(self._masks[row]) or None

    def _read(self, place: np.ndarray) -> bytes:
        shard, begin, length = (int(value) for value in place)
        if length > MOST_BYTES:
            raise OSError(f"it has over {MOST_BYTES >> 20} MiB, the most that is read")
        with open_regular(self._shards[shard]) as file:
            file.seek(begin)
            return file.read(length)

    def captions(self, row: int) -> tuple[str, ...]:
        """Returns the captions of the image's sample."""
        return tuple(self._captions[row].as_py())

    def stamp(self, row: int) -> str:
        """Returns the shard's size and times, see `stamp_of`."""
        return self._stamps[int(self._places[row, 0])]


def read_tars(
    shards: Sequence[Path],
    mask_ending: str | None = None,
    encoding: str | None = None,
    reads: type[TextReader] = TextReader,
    label_ending: str | None = None,
) -> TarTable:
    """Lists the samples in uncompressed tar shards: members with the same name up to the first dot, as a.jpg and a.txt.

    Args:
        shards: paths of the shards.
        mask_ending: extension of masks, from the first dot of their names, such as mask.png; None without masks.
        encoding: encoding of the captions, if the user gave one.
        reads: class that reads the captions.
        label_ending: extension of labels, such as cls, whose text is read as caption; ignored if no member has it.

    Returns:
        The table of the images.

    Raises:
        UserError: if no image can be read, or no member has the extension of masks.
    """
    # list the members and read the captions of each shard
    keys, places, masks, captions, refused = [], [], [], [], []
    reader = reads(encoding)
    root = Path(os.path.commonpath([shard.parent for shard in shards]))
    fates = Fates(root)
    comparison = CaptionComparison()
    doubled: list[str] = []
    empty: list[Path] = []
    num_labels = 0
    for number, shard in enumerate(shards):
        place = f"{shard.relative_to(root)}/"
        samples, before = _Samples(mask_ending, label_ending), len(refused) + len(fates)
        for found in _members(shard, place, refused, fates, label_ending):
            samples.add(*found)
        num_labels += samples.num_labels
        if not samples.are_any and len(refused) + len(fates) == before:
            empty.append(shard)
        texts, reasons = samples.read_captions(reader)
        samples.compare_captions(place, texts, comparison, reads(encoding))
        doubled += [place + member for member in samples.doubled]
        refused += samples.settle(place, reasons, fates)
        for sample, (member, begin, length) in samples.images.items():
            key = place + member
            if sample in reasons:
                refused.append((key, f"its caption file {samples.first(sample).name} can't be read: {reasons[sample]}"))
                continue
            keys.append(key)
            places.append((number, begin, length))
            masks.append((number, *samples.masks.get(sample, (0, 0))))
            captions.append(texts.get(sample, ()))
    if label_ending is not None and not num_labels:
        return read_tars(shards, mask_ending, encoding, reads)

    # refuse shards that hold nothing to train on
    _tell_of_empty(empty, len(shards))
    if shards and not keys and refused:
        raise UserError(f"no image can be read from {len(shards)} tar shards; {': '.join(refused[0])}")
    if mask_ending is not None and not any(length for _, _, length in masks):
        raise UserError(
            f"--mask_column {mask_ending}: no member of the {len(shards)} tar shards has this extension; give theirs"
        )

    # build the table
    table = TarTable(shards, keys, _places(places), captions, refused, _places(masks))
    table.texts, table.member_fates, table.doubled = reader, fates, doubled
    table.findings = comparison.findings()
    return table


def _tell_of_empty(empty: Sequence[Path], num_shards: int) -> None:
    """Warns of shards without members, which may consist of zeros.

    Raises:
        UserError: if all shards are empty.
    """
    if empty and len(empty) == num_shards:
        names = ", ".join(shard.name for shard in empty[:NUM_SHOWN])
        raise UserError(f"{names} {NO_FILES if len(empty) == 1 else 'hold no files'}; fetch them again")
    if empty:
        logger.warning("%d tar shards hold no files, such as %s", len(empty), empty[0])


class _Caption(NamedTuple):
    """A member with captions."""

    name: str
    content: bytes
    begin: int


class _Samples:
    """The members of a shard, grouped by sample.

    Attributes:
        images: (member, offset, length) of the first image of each sample.
        masks: (offset, length) of the mask of each sample.
        doubled: members that are further images of their samples.
        num_labels: number of members with the extension of labels.
    """

    def __init__(self, mask_ending: str | None, label_ending: str | None = None):
        self.num_labels = 0
        self._label_ending = label_ending
        self.images: dict[str, tuple[str, int, int]] = {}
        self.masks: dict[str, tuple[int, int]] = {}
        self.doubled: list[str] = []
        self._mask_ending = mask_ending
        self._captions: dict[str, list[_Caption]] = defaultdict(list)
        self._seen: list[tuple[str, str, int]] = []

    def add(self, sample: str, member: str, begin: int, length: int, content: bytes | None) -> None:
        """Adds a member; `content` is not None for captions only."""
        self._seen.append((sample, member, begin))
        if is_mask(member, self._mask_ending):
            self.masks[sample] = (begin, length)
        elif is_image(member):
            if self.images.setdefault(sample, (member, begin, length))[1] != begin:
                self.doubled.append(member)
        elif content is not None and (self._label_ending is None or has_ending(member, self._label_ending)):
            self.num_labels += self._label_ending is not None
            self._captions[sample].append(_Caption(member, content, begin))

    @property
    def are_any(self) -> bool:
        """Whether a member was added."""
        return bool(self._seen)

    def first(self, sample: str) -> _Caption | None:
        """Returns the member that a sample's captions are read from; None if it has none."""
        found = self._captions.get(sample)
        return min(found, key=_order) if found else None

    def read_captions(self, reader: TextReader) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        """Returns (captions by sample, the reason why they can't be read by sample)."""
        # refuse files that are too large
        files = {sample: self.first(sample) for sample in self._captions}
        reasons = {
            sample: f"has over {size_text(len(file.content) - 1)}; no more are read"
            for sample, file in files.items()
            if len(file.content) > caption_limit(file.name)
        }

        # read the others
        whole = {sample: file for sample, file in files.items() if sample not in reasons}
        texts, broken = captions_in({file.name: file.content for file in whole.values()}, reader)
        # WebDataset's extension for class numbers
        if self._label_ending is not None and self._label_ending.lower().removeprefix(".") == "cls":
            texts = {name: tuple(map(_plain_number, captions)) for name, captions in texts.items()}
        reasons |= {sample: broken[file.name] for sample, file in whole.items() if file.name in broken}
        return {sample: texts[file.name] for sample, file in whole.items() if file.name in texts}, reasons

    def compare_captions(
        self, place: str, texts: Mapping[str, tuple[str, ...]], comparison: CaptionComparison, reader: TextReader
    ) -> None:
        """Compares the captions of each sample that has several caption members."""
        beside: list[list[str]] = []
        contents: dict[str, bytes] = {}
        read: dict[str, tuple[str, ...]] = {}
        for sample, found in self._captions.items():
            if len(found) < 2 or sample not in self.images:
                continue
            first, *others = sorted(found, key=_order)
            names = [place + first.name]
            for other in others:
                same = sum(name.endswith(other.name) for name in names)
                names.append(f"{place}{'another ' * same}{other.name}")
                contents[names[-1]] = other.content
            read[names[0]] = texts.get(sample, ())
            beside.append(names)
        comparison.add(beside, read, contents, reader)

    def settle(self, place: str, reasons: Mapping[str, str], fates: Fates) -> list[tuple[str, str]]:
        """Records how each member was used, except for images that are trained on.

        Args:
            place: prefix of the members' names.
            reasons: the reason why a sample is skipped, by sample.
            fates: receives the members' fates.

        Returns:
            (name, reason) of members that look like images of their samples but have an unsupported format.
        """
        refused = []
        for sample, member, begin in self._seen:
            image, caption = self.images.get(sample), self.first(sample)
            if image is not None and image[1] == begin:
                if sample in reasons:
                    fates.add(place + member, Fate(UNREADABLE, reasons[sample]))
                continue
            is_read = caption is not None and caption.begin == begin
            is_of_mask = is_mask(member, self._mask_ending)
            fate = Fate(MASK) if is_of_mask else _fate_beside(member, is_read, image is not None)
            fates.add(place + member, fate)
            is_photo = PurePosixPath(member).suffix.lower() in PHOTO_SUFFIXES
            if fate.word == NO_READER and image is None and (is_photo or caption is not None):
                refused.append((place + member, fate.reason))
        return refused


def _plain_number(text: str) -> str:
    """Removes leading zeros from a number (03 becomes 3); returns other text as it is."""
    return text.lstrip("0") or "0" if text.isascii() and text.isdecimal() else text


def is_mask(member: str, ending: str | None) -> bool:
    """Whether a member has the extension of masks, ignoring case."""
    return ending is not None and has_ending(member, ending)


def has_ending(member: str, ending: str) -> bool:
    """Whether the extension of a member, from the first dot of its name, is this one, ignoring case."""
    return PurePosixPath(member).name.partition(".")[2].lower() == ending.lower().removeprefix(".")


def _fate_beside(member: str, is_read: bool, has_image: bool) -> Fate:
    """Returns the fate of a member that is neither its sample's image nor a mask.

    Args:
        is_read: whether the sample's captions are read from it.
        has_image: whether the sample has an image.
    """
    if is_image(member):
        return Fate(DUPLICATE, "another image of its sample comes first")
    reason = unread_reason(PurePosixPath(member).suffix)
    if reason is not None:
        return Fate(NO_READER, reason)
    if member.lower().endswith((".tar", *ARCHIVES)):
        return Fate(NO_READER, "an archive within a shard is not read; unpack it into the folder")
    if is_read and has_image:
        return Fate(CAPTION)
    if not is_caption_file(member):
        return Fate(OTHER)
    if not has_image:
        return Fate(LONE_CAPTION, "its sample has no image that can be read")
    return Fate(OTHER, "another caption of its sample is read")


def _places(rows: list[tuple[int, int, int]]) -> np.ndarray:
    return np.array(rows, np.int64).reshape(-1, 3)


def _members(
    shard: Path, place: str, refused: list[tuple[str, str]], fates: Fates, label_ending: str | None = None
) -> Iterator[tuple[str, str, int, int, bytes | None]]:
    """Yields `members_of` a shard on disk; only captions are read into memory."""
    try:
        with open_regular(shard) as file:
            yield from members_of(file, shard.name, place, refused, fates, partial(_most_of_caption, label_ending))
    except FileError as error:
        refused.append((shard.name, error.reason))
    except OSError as error:
        reason = first_line(error) if shard.is_file() else what_is_at(shard)
        refused.append((shard.name, f"can't be read: {reason}"))


def why_no_tar(shard: Path) -> str:
    """Returns why a file is not a tar archive with members, judging by its beginning; "" if it is one."""
    try:
        with open_regular(shard) as file:
            head = file.read(tarfile.BLOCKSIZE)
    except FileError as error:
        return error.reason
    except OSError as error:
        return f"can't be read: {first_line(error) if os.path.isfile(shard) else what_is_at(shard)}"
    if not head.strip(b"\0"):
        return NO_FILES
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        return (
            f"is not a tar file but {_other_kind(head)}"
            if _other_kind(head)
            else f"is not a tar file: {first_line(error)}"
        )
    return ""


def _most_of_caption(label_ending: str | None, name: str) -> int:
    is_read = is_caption_file(name) if label_ending is None else has_ending(name, label_ending)
    return caption_limit(name) if is_read else 0


def members_of(
    file: BinaryIO,
    shard: str,
    place: str,
    refused: list[tuple[str, str]],
    fates: Fates,
    most_read: Callable[[str], int],
) -> Iterator[tuple[str, str, int, int, bytes | None]]:
    """Yields (sample, name, offset, length, content or None) of each file in an uncompressed shard.

    Links and everything after a broken place are refused.

    Args:
        file: the shard, opened.
        shard: the shard's name, for messages.
        place: prefix of the members' names in messages.
        refused: receives (name, reason) of members that can't be used.
        fates: receives the fates of members that are not yielded.
        most_read: returns how many bytes of a member to read, by its name; one more is read to detect longer ones.
    """
    length, last, head = 0, -1, b""
    try:
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(tarfile.BLOCKSIZE)
        file.seek(0)
        with tarfile.open(fileobj=_BoundedReads(file), mode="r:") as archive:
            for member in archive:
                archive.members.clear()  # otherwise tarfile keeps all of them in memory
                if member.size < 0 or member.offset_data <= last:  # would loop forever
                    raise tarfile.ReadError(f"a header claims {member.size} bytes")
                last = member.offset_data

                # skip folders, hidden files and links
                path = PurePosixPath(member.name)
                if member.isdir():
                    continue
                if path.name.startswith("."):
                    fates.add(place + member.name, Fate(HIDDEN, "a hidden file"))
                    continue
                if not member.isfile():
                    reason = "is a link or a device within its shard, not a file"
                    fates.add(place + member.name, Fate(UNREADABLE, reason))
                    if is_image(member.name):
                        refused.append((place + member.name, reason))
                    continue

                # refuse members that are cut off or sparse
                is_cut = member.offset_data + member.size > length
                if is_cut or member.issparse():
                    why = "the shard ends in the middle of it" if is_cut else "it is stored as a sparse file"
                    reason = f"{why}; its header claims {size_text(member.size)}"
                    refused.append((f"{shard}/{member.name}", reason))
                    fates.add(place + member.name, Fate(UNREADABLE, reason))
                    continue

                # read captions
                content, most = None, most_read(path.name)
                if most:
                    file.seek(member.offset_data)
                    content = file.read(min(member.size, most + 1))
                sample = str(path.parent / path.name.partition(".")[0])  # WebDataset's rule: up to the first dot
                yield sample, member.name, member.offset_data, member.size, content

            # check that nothing follows: tarfile stops at any block that is not a header
            file.seek(archive.offset)
            rest = file.read(MOST_PADDING)
            if rest.strip(b"\0"):
                is_end = not rest[: tarfile.BLOCKSIZE].strip(b"\0")
                what = "data follows its end, as in concatenated shards" if is_end else "invalid header"
                raise tarfile.ReadError(what)
    except (OSError, tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        # tarfile raises the latter for invalid numbers and nested headers
        kind = _other_kind(head) if last < 0 else ""
        broken = f"the shard is broken, its remaining members are skipped: {first_line(error)}"
        refused.append((shard, f"is not a tar file but {kind}" if kind else broken))


def _other_kind(head: bytes) -> str:
    """Returns what a file that is not a tar shard is, by its first bytes, with a cure; "" if unknown."""
    known = next((kind for magic, kind in OTHER_FILES.items() if head.startswith(magic)), "")
    if known or not head:
        return known
    try:
        text = decode(head[: head.rfind(b"\n") + 1] or head).text.lstrip()
    except ValueError:
        return ""
    return "JSON; fetch the file again" if text[:1] in ("{", "[") else "text; fetch the file again"


class _BoundedReads:
    """Wraps a file for `tarfile`, which would otherwise read headers of any length into memory."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Returns the next bytes.

        Raises:
            tarfile.ReadError: if these are more than a header may have.
        """
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size_text(size)}")
        return self._file.read(size)


def _order(file: _Caption) -> int:
    """Returns the rank of a caption file among those of its sample, of which the first is read."""
    suffix = PurePosixPath(file.name).suffix.lower()
    return PAIR_SUFFIXES.index(suffix) if suffix in PAIR_SUFFIXES else len(PAIR_SUFFIXES)
