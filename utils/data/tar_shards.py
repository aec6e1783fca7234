"""WebDataset tar shards on a disk, read in any order: the place of each image within its shard is listed once."""

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
MOST_PADDING = 1 << 16  # bytes behind the last member that are looked at
IMAGE_COLUMN, CAPTION_COLUMN, MASK_COLUMN, REASON_COLUMN = "__image__", "__caption__", "__mask__", "__reason__"
"""Columns of a streamed sample: its image, its captions, its mask, and why it is left out."""
OTHER_FILES = {
    b"\x1f\x8b": "compressed by gzip, of which gunzip makes a plain one",
    b"BZh": "compressed by bzip2, of which bunzip2 makes a plain one",
    b"\xfd7zXZ\x00": "compressed by xz, of which unxz makes a plain one",
    b"\x28\xb5\x2f\xfd": "compressed by zstd, of which unzstd makes a plain one",
    b"\x04\x22\x4d\x18": "compressed by lz4, of which unlz4 makes a plain one",
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
    b"RIFF": "an image, a sound or a video; rename it to what it is",
    b"ARROW1": "an Arrow file; give its dataset as --dataset_name",
    b"SQLite": "a database; export its images",
}
"""What is called .tar and is none, by its first bytes."""
ARCHIVES = (".zip", ".7z", ".rar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".cbz", ".cbr")
NO_FILES = "holds no files"
MAX_HEADER = 1 << 14  # bytes of a long name or other facts in front of a member; tarfile's time goes with their square


class TarTable(ImageTable):
    """Images that are members of tar files.

    Attributes:
        findings: what is to be said of the captions, a line each.
        doubled: names of members that are left out, as another image of their sample comes before them.
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


def read_tars(
    shards: Sequence[Path],
    mask_ending: str | None = None,
    encoding: str | None = None,
    reads: type[TextReader] = TextReader,
    label_ending: str | None = None,
) -> TarTable:
    """Lists tar shards, whose members of one name (up to the first dot) are a sample: `a.jpg` with `a.txt` or `a.json`.

    Args:
        mask_ending: what stands behind the first dot of a mask's name, such as mask.png.
        encoding: that of the captions, where the user says it.
        reads: how captions are read.
        label_ending: what stands behind the first dot of a label's name, such as cls, whose text is the caption then;
            as where it is None if no member has it.

    Raises:
        UserError: if none of them can be read or has the ending; they must not be compressed.
    """
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
    _tell_of_empty(empty, len(shards))
    if shards and not keys and refused:
        raise UserError(f"no image can be read from {len(shards)} tar shards; {': '.join(refused[0])}")
    if mask_ending is not None and not any(length for _, _, length in masks):
        raise UserError(f"--mask_column {mask_ending} is the ending of no member of the {len(shards)} tar shards")
    table = TarTable(shards, keys, _places(places), captions, refused, _places(masks))
    table.texts, table.member_fates, table.doubled = reader, fates, doubled
    table.findings = comparison.findings()
    return table


def _tell_of_empty(empty: Sequence[Path], num_shards: int) -> None:
    """Names shards without members, as of zeros alone.

    Raises:
        UserError: if all of them are.
    """
    if empty and len(empty) == num_shards:
        names = ", ".join(shard.name for shard in empty[:NUM_SHOWN])
        raise UserError(f"{names} {NO_FILES if len(empty) == 1 else 'hold no files'}; fetch them again")
    if empty:
        logger.warning("%d tar shards hold no files, such as %s", len(empty), empty[0])


class _Caption(NamedTuple):
    """A member that holds captions."""

    name: str
    content: bytes
    begin: int


class _Samples:
    """The members of a shard by their samples.

    Attributes:
        images: (member, begin, length) of each sample's image, the first.
        masks: (begin, length) of each sample's mask.
        doubled: members that are further images of their samples.
        num_labels: how many members have the ending of labels.
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
        """Adds a member, whose content is that of captions."""
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
        """The member that a sample's captions are of."""
        found = self._captions.get(sample)
        return min(found, key=_order) if found else None

    def read_captions(self, reader: TextReader) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        """(the captions of each sample, why those of others can't be read)."""
        files = {sample: self.first(sample) for sample in self._captions}
        reasons = {
            sample: f"has over {size_text(len(file.content) - 1)}; no more are read"
            for sample, file in files.items()
            if len(file.content) > caption_limit(file.name)
        }
        whole = {sample: file for sample, file in files.items() if sample not in reasons}
        texts, broken = captions_in({file.name: file.content for file in whole.values()}, reader)
        if (
            self._label_ending is not None and self._label_ending.lower().removeprefix(".") == "cls"
        ):  # a number, as WebDataset has it
            texts = {name: tuple(map(_plain_number, captions)) for name, captions in texts.items()}
        reasons |= {sample: broken[file.name] for sample, file in whole.items() if file.name in broken}
        return {sample: texts[file.name] for sample, file in whole.items() if file.name in texts}, reasons

    def compare_captions(
        self, place: str, texts: Mapping[str, tuple[str, ...]], comparison: CaptionComparison, reader: TextReader
    ) -> None:
        """Compares what the members of captions say of each sample that has several."""
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
        """Gives each member but the images that are had its fate.

        Args:
            reasons: why samples are left out.

        Returns:
            (name, reason) of pictures that are meant to be images but that nothing here reads.
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
    """A number without zeros in front of it, as 03 is 3; another text as it is."""
    return text.lstrip("0") or "0" if text.isascii() and text.isdecimal() else text


def is_mask(member: str, ending: str | None) -> bool:
    """Whether a member has a mask's ending, in small letters or capitals."""
    return ending is not None and has_ending(member, ending)


def has_ending(member: str, ending: str) -> bool:
    """Whether what stands behind the first dot of a member's name is this, in small letters or capitals."""
    return PurePosixPath(member).name.partition(".")[2].lower() == ending.lower().removeprefix(".")


def _fate_beside(member: str, is_read: bool, has_image: bool) -> Fate:
    """The fate of a member that is neither its sample's image nor a mask.

    Args:
        is_read: whether the sample's captions are of it.
    """
    if is_image(member):
        return Fate(DUPLICATE, "another image of its sample comes before it")
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
    """`members_of` a shard on a disk; of the contents, captions alone are read."""
    try:
        with open_regular(shard) as file:
            yield from members_of(file, shard.name, place, refused, fates, partial(_most_of_caption, label_ending))
    except FileError as error:
        refused.append((shard.name, error.reason))
    except OSError as error:
        reason = first_line(error) if shard.is_file() else what_is_at(shard)
        refused.append((shard.name, f"can't be read: {reason}"))


def why_no_tar(shard: Path) -> str:
    """Why a file holds no members of a tar, by its beginning, or ""."""
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
            f"is no tar file but {_other_kind(head)}" if _other_kind(head) else f"is no tar file: {first_line(error)}"
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
    """(sample, name, begin, length, content if it is read) of each file in a shard, which must not be compressed.

    What lies behind a broken place is refused, and images that are links.

    Args:
        shard: its name, by which it is reported.
        place: what stands before the names of members where they are reported.
        fates: of the members that are not given.
        most_read: the most bytes that are read of a member of some name; one more shows that there are more.
    """
    length, last, head = 0, -1, b""
    try:
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(tarfile.BLOCKSIZE)
        file.seek(0)
        with tarfile.open(fileobj=_BoundedReads(file), mode="r:") as archive:
            for member in archive:
                archive.members.clear()  # else all are kept
                if member.size < 0 or member.offset_data <= last:  # by which it would be read for ever
                    raise tarfile.ReadError(f"a header claims {member.size} bytes")
                last = member.offset_data
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
                is_cut = member.offset_data + member.size > length
                if is_cut or member.issparse():
                    why = "the shard ends before its end" if is_cut else "it is stored as a sparse file"
                    reason = f"{why}; its header claims {size_text(member.size)}"
                    refused.append((f"{shard}/{member.name}", reason))
                    fates.add(place + member.name, Fate(UNREADABLE, reason))
                    continue
                content, most = None, most_read(path.name)
                if most:
                    file.seek(member.offset_data)
                    content = file.read(min(member.size, most + 1))
                sample = str(path.parent / path.name.partition(".")[0])  # WebDataset's rule: up to the first dot
                yield sample, member.name, member.offset_data, member.size, content
            file.seek(archive.offset)
            rest = file.read(MOST_PADDING)
            if rest.strip(b"\0"):  # tarfile takes any block that is no header for the end
                is_end = not rest[: tarfile.BLOCKSIZE].strip(b"\0")
                what = "its end is followed by more, as of shards put together" if is_end else "no header stands there"
                raise tarfile.ReadError(what)
    except (OSError, tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        # beside its own errors the library raises these, of numbers that are none and of headers before headers
        kind = _other_kind(head) if last < 0 else ""
        broken = f"the shard is broken, what follows in it is left out: {first_line(error)}"
        refused.append((shard, f"is no tar file but {kind}" if kind else broken))


def _other_kind(head: bytes) -> str:
    """What a file is that is no tar shard, whatever its name says; "" if that is not known."""
    known = next((kind for magic, kind in OTHER_FILES.items() if head.startswith(magic)), "")
    if known or not head:
        return known
    try:
        text = decode(head[: head.rfind(b"\n") + 1] or head).text.lstrip()
    except ValueError:
        return ""
    return "JSON; fetch the file again" if text[:1] in ("{", "[") else "a text; fetch the file again"


class _BoundedReads:
    """A file for `tarfile`, which would read a header into memory whatever its length."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """The next bytes.

        Raises:
            tarfile.ReadError: if they are more than a header has.
        """
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size_text(size)}")
        return self._file.read(size)


def _order(file: _Caption) -> int:
    """The place of a caption file among those of its sample, of which the first is read."""
    suffix = PurePosixPath(file.name).suffix.lower()
    return PAIR_SUFFIXES.index(suffix) if suffix in PAIR_SUFFIXES else len(PAIR_SUFFIXES)
