"""Lists a folder recursively: files that may be data, and the fate of all others."""

import heapq
import logging
import os
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from utils.config.options import UserError, first_line
from utils.config.user_files import FileError, kind_of, read_json
from utils.runtime.atomic_files import MARKER

logger = logging.getLogger(__name__)
TRAINED = "trained"
HELD_OUT = "held out"
CAPTION = "caption"
MASK = "mask"
METADATA = "metadata"
SHARD = "shard"
UNREADABLE = "unreadable"
NO_READER = "no reader"
OTHER_SPLIT = "other split"
HIDDEN = "hidden"
FILTERED = "filtered"
NOT_DRAWN = "not drawn"
UNLISTED = "not listed"
DUPLICATE = "duplicate"
LONE_CAPTION = "caption without image"
OWN = "output of a run"
OWN_PREFIXES, OWN_FOLDERS = ("checkpoint-", "export-"), ("samples", "best")  # of a run's output
OTHER = "other"
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
SYSTEM_FOLDERS = {"__macosx", "$recycle.bin", "system volume information", "@eadir", "#recycle", "lost+found"}
RUN_RECORD = "run.json"
DRY_RUN = {"contact_sheet.png", "dry_run_report.json"}


class Fate(NamedTuple):
    """What happened to a file, and why."""

    word: str
    reason: str = ""


class Fates:
    """The fates of the files of a folder, stored compactly for millions of files."""

    def __init__(self, root: Path):
        self.root = root
        self._names = bytearray()
        self._ends = array("q")
        self._codes = array("i")
        self._known: dict[Fate, int] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, name: str, fate: Fate) -> None:
        """Adds a file and its fate."""
        self._names += os.fsencode(name)
        self._ends.append(len(self._names))
        self._codes.append(self._known.setdefault(fate, len(self._known)))

    def __iter__(self) -> Iterator[tuple[str, Fate]]:
        """Yields (name, fate) in the order in which files were added."""
        fates, begin = list(self._known), 0
        for end, code in zip(self._ends, self._codes, strict=True):
            yield os.fsdecode(bytes(self._names[begin:end])), fates[code]
            begin = end

    def without(self, names: Collection[str]) -> "Fates":
        """Returns a copy without some files."""
        others = Fates(self.root)
        for name, fate in self:
            if name not in names:
                others.add(name, fate)
        return others

    def by_fate(self) -> Counter[Fate]:
        """Returns the number of files with each fate."""
        fates = list(self._known)
        return Counter({fates[code]: count for code, count in Counter(self._codes).items()})


@dataclass
class Listing:
    """The files of a folder.

    Attributes:
        root: the folder.
        names: relative paths of the files that may be data, sorted.
        special: why special files, such as pipes, can't be read, by relative path.
        unlisted: (folder, reason) of each subfolder that can't be listed.
        own: (folder, reason) of each subfolder that was skipped, such as the output of a run.
        fates: fates of the other files.
    """

    root: Path
    names: list[str] = field(default_factory=list)
    special: dict[str, str] = field(default_factory=dict)
    unlisted: list[tuple[str, str]] = field(default_factory=list)
    own: list[tuple[str, str]] = field(default_factory=list)
    fates: Fates = field(init=False)

    def __post_init__(self) -> None:
        self.fates = Fates(self.root)

    def warn(self) -> None:
        """Warns about special files and about skipped or unreadable subfolders."""
        for name, reason in list(self.special.items())[:5]:
            logger.warning("skipped %s: it %s", self.root / name, reason)
        for name, reason in self.unlisted:
            logger.warning("skipped the files in %s, which can't be listed: %s", self.root / name, reason)
        for name, reason in self.own:
            logger.warning("skipped the folder %s: %s", self.root / name, reason)


def list_folder(folder: Path, left_out: Mapping[Path, Fate] = MappingProxyType({})) -> Listing:
    """Lists a folder recursively, following links and visiting each folder once.

    Hidden and system files, and the outputs of runs in subfolders, do not count as data.

    Args:
        left_out: further folders whose files do not count as data, with the fate of these files.

    Raises:
        UserError: if the folder itself can't be listed.
    """
    listing, walk = Listing(folder), _Walk(left_out)
    while (place := walk.next()) is not None:
        prefix, fate = place
        path = folder / prefix
        try:
            facts = os.stat(path)
            if not walk.is_new(facts):  # a link to a parent folder, or to a folder already listed
                continue
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if prefix == "":
                raise UserError(f"--train_data_dir {folder} can't be read: {first_line(error)}") from error
            listing.unlisted.append((prefix, error.strerror or first_line(error)))
            continue

        # subfolders that are the output of a run are skipped as a whole
        if fate is None and prefix != "":
            fate = walk.fate_of(facts) or _fate_of_output(path, {entry.name for entry in entries})
            if fate is not None:
                listing.own.append((prefix, fate.reason))
        is_run = prefix == "" and _is_run_record(path)
        for entry in entries:
            _place(entry, prefix, fate, is_run, listing, walk)
    listing.names.sort()
    return listing


class _Walk:
    """The queue of folders to list. Real folders come before links, so that files get their real paths."""

    def __init__(self, left_out: Mapping[Path, Fate]):
        self._real: list[tuple[str, Fate | None]] = [("", None)]
        self._linked: list[str] = []
        self._seen: set[tuple[int, int]] = set()
        self._left_out: dict[tuple[int, int], Fate] = {}
        for path, fate in left_out.items():
            try:
                facts = os.stat(path)
            except OSError:  # it does not exist yet
                continue
            self._left_out[facts.st_dev, facts.st_ino] = fate

    def next(self) -> tuple[str, Fate | None] | None:
        """Returns (the next folder, the common fate of its files or None); None if all folders are listed."""
        if self._real:
            return self._real.pop()
        return (heapq.heappop(self._linked), None) if self._linked else None

    def add(self, prefix: str, fate: Fate | None, is_link: bool) -> None:
        """Adds a folder. A link is not followed if all its files would have the same fate."""
        if not is_link:
            self._real.append((prefix, fate))
        elif fate is None:
            heapq.heappush(self._linked, prefix)

    def is_new(self, facts: os.stat_result) -> bool:
        """Returns whether a folder has not been listed yet, and marks it as listed."""
        count = len(self._seen)
        self._seen.add((facts.st_dev, facts.st_ino))
        return len(self._seen) > count

    def fate_of(self, facts: os.stat_result) -> Fate | None:
        """Returns the fate of the files of a skipped folder; None for other folders."""
        return self._left_out.get((facts.st_dev, facts.st_ino))


def _place(entry: os.DirEntry, prefix: str, fate: Fate | None, is_run: bool, listing: Listing, walk: _Walk) -> None:
    """Adds a directory entry to the files that may be data, to the other files, or to the folders to list.

    Args:
        prefix: relative path of the folder, with a trailing slash.
        fate: common fate of all files of the folder, or None.
        is_run: whether the folder is the listed folder itself and the output of a run, whose subfolders are not data.
    """
    name, is_link = prefix + entry.name, entry.is_symlink()
    try:
        is_folder, is_file = entry.is_dir(), entry.is_file()
    except OSError:  # a circular or forbidden link: opening it will report the error
        is_folder = is_file = False
    if is_folder:
        if fate is None and (entry.name.startswith(".") or entry.name.lower() in SYSTEM_FOLDERS):
            fate = Fate(HIDDEN, "in a hidden or system folder")
        if fate is None and is_run and (entry.name.startswith(OWN_PREFIXES) or entry.name in OWN_FOLDERS):
            fate = Fate(OWN, f"written by the run with output folder {listing.root}")
            listing.own.append((name + "/", f"{fate.reason}; to train on it, pass this folder itself"))
        walk.add(name + "/", fate, is_link)
    elif fate is not None:
        listing.fates.add(name, fate)
    elif entry.name.startswith(".") or entry.name.lower() in SYSTEM_FILES:
        listing.fates.add(name, Fate(HIDDEN, "a hidden or system file"))
    elif is_file or (is_link and not os.path.exists(entry.path)):
        listing.names.append(name)
    else:
        listing.special[name] = _kind_of(entry.path)


def _kind_of(path: str) -> str:
    """Returns why a special file can't be read, such as "is a pipe, not a file"."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return error.strerror or first_line(error)
    return f"is a {kind_of(mode)}, not a file"


def _fate_of_output(folder: Path, names: set[str]) -> Fate | None:
    """Returns the fate of the files of a folder written by a run, an evaluation or a cache; None for other folders."""
    if MARKER in names:
        return Fate(OWN, f"this toolkit wrote it (it contains {MARKER})")
    if names >= DRY_RUN:
        return Fate(OWN, f"it is the output of a dry run (it contains {', '.join(sorted(DRY_RUN))})")
    if RUN_RECORD in names and _is_run_record(folder):
        return Fate(OWN, f"it is the output of a run (it contains {RUN_RECORD})")
    return None


def _is_run_record(folder: Path) -> bool:
    """Returns whether a folder contains the record of a training run."""
    try:
        record = read_json(folder / RUN_RECORD)
    except (OSError, FileError):
        return False
    return isinstance(record, dict) and {"options", "versions", "command"} <= record.keys()


def warn_of_unread(where: str, fates: Fates) -> None:
    """Warns about files that may be meant as data but are not read, one line per reason.

    Args:
        where: name of the data in the message.
    """
    counts = {fate: count for fate, count in fates.by_fate().items() if fate.word in (NO_READER, LONE_CAPTION)}
    firsts: dict[Fate, str] = {}
    for name, fate in fates if counts else ():
        if fate in counts:
            firsts.setdefault(fate, name)
        if len(firsts) == len(counts):
            break
    for fate, count in counts.items():
        what = "captions have no image" if fate.word == LONE_CAPTION else "files are not read"
        logger.warning("%s: %d %s, such as %s: %s", where, count, what, firsts[fate], fate.reason)
