"""Reports the fate of every data file: counts, and data_report.jsonl with one line per file."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from utils.config.terminal import json_text
from utils.data.file_listing import HELD_OUT, HIDDEN, NOT_DRAWN, OTHER_SPLIT, SHARD, TRAINED, UNREADABLE, Fate
from utils.data.plan import PlannedImages
from utils.data.sources import Source
from utils.data.stream import StreamedImages
from utils.data.tables import FileTable, RowTable
from utils.runtime.atomic_files import replacing

FILE = "data_report.jsonl"
FEW = 100_000  # up to this many files, the report is rewritten each time


class Ledger:
    """The fates of all data files, and of the images in shards and datasets.

    Attributes:
        images: the training images; None before they are chosen.
        held_out: the validation images.
        is_portion: whether the validation images are a fraction of the same images.
    """

    def __init__(self) -> None:
        self.images: PlannedImages | StreamedImages | None = None
        self._bad: frozenset[str] = frozenset()
        self.held_out: PlannedImages | None = None
        self.is_portion = False

    def train_on(self, images: PlannedImages | StreamedImages) -> None:
        """Sets the training images."""
        self.images, self._bad = images, frozenset(images.bad)

    def counts(self) -> tuple[Counter[str], Counter[str]]:
        """Returns (number of files, number of images within shards and datasets), each by fate."""
        files, members = Counter(), Counter()
        # streams: only counts are known
        if isinstance(self.images, StreamedImages):
            members = Counter({"read": self.images.counts["read"], UNREADABLE: len(self.images.bad)})
            for fate, count in self.images.fates.by_fate().items() if self.images.fates else ():
                files[fate.word] += count
            return files, members

        # images, files and members of shards of each source
        held = self._held_out_files()
        for number, source in enumerate(self.images.records.sources):
            table, (codes, fates) = source.table, self._row_fates(number)
            counted = files if isinstance(table, FileTable) else members
            for code, count in zip(*np.unique(codes, return_counts=True), strict=True):
                counted[fates[code].word] += int(count)
            for fate, count in table.fates.by_fate().items() if table.fates else ():
                files[fate.word] += count
            for fate, count in table.member_fates.by_fate().items() if table.member_fates else ():
                members[fate.word] += count

            # images that turned out to be unreadable after they were chosen
            late = sum(self._is_late(source, number, row) for row in np.flatnonzero(codes == 0)) if self._late else 0
            counted[TRAINED] -= late
            counted[UNREADABLE] += late

            # files of a split that is held out for validation
            for name, fate in table.fates if held and table.fates else ():
                if fate.word == OTHER_SPLIT and (table.fates.root, name) in held:
                    files[OTHER_SPLIT] -= 1
                    files[held[table.fates.root, name].word] += 1
        return +files, +members

    def report(self) -> dict[str, object]:
        """Returns the counts in the form of `data_report.json`."""
        files, members = self.counts()
        return {
            "files": sum(files.values()),
            "fates": dict(files.most_common()),
            **({"fates_in_shards": dict(members.most_common())} if members else {}),
        }

    def lines(self) -> list[str]:
        """Returns the counts as lines of text."""
        files, members = self.counts()
        found = []
        for what, counts in (("files", files), ("in shards", members)):
            if counts:
                words = ", ".join(f"{count:,} {word}" for word, count in counts.most_common())
                found.append(f"{what:<14} {sum(counts.values()):,}: {words}")
        return found

    def write(self, folder: Path, is_last: bool) -> None:
        """Writes one line per file to data_report.jsonl. Skips very long reports unless `is_last`.

        Args:
            is_last: whether this is the last report for now.
        """
        if isinstance(self.images, PlannedImages) and len(self.images.outcome.codes) > FEW and not is_last:
            return
        with replacing(folder / FILE) as aside, open(aside, "wb") as file:
            for name, fate in self._fates():
                line = json_text({"file": name, "fate": fate.word, "reason": fate.reason})
                file.write(line.encode() + b"\n")

    def _fates(self) -> Iterator[tuple[str, Fate]]:
        """Yields (name, fate) of each file and shard member, and of the rows of datasets that are not trained on."""
        if isinstance(self.images, StreamedImages):
            yield from self.images.fates or ()
            yield from ((name, Fate(UNREADABLE, reason)) for name, reason in self.images.bad.items())
            return
        held = self._held_out_files()
        for number, source in enumerate(self.images.records.sources):
            table, (codes, fates) = source.table, self._row_fates(number)
            prefix = f"{source.name}/" if len(self.images.records.sources) > 1 else ""
            for name, fate in table.fates or ():
                is_held = fate.word == OTHER_SPLIT and (table.fates.root, name) in held
                yield prefix + name, held[table.fates.root, name] if is_held else fate
            for row, code in enumerate(codes.tolist()):
                if code == 0 and isinstance(table, RowTable) and not self._late:
                    continue
                name = prefix + table.key(row)
                fate = Fate(UNREADABLE, self._late[name]) if code == 0 and name in self._late else fates[code]
                if not (isinstance(table, RowTable) and fate.word == TRAINED):
                    yield name, fate
            for name, fate in table.member_fates or ():
                yield prefix + name, fate

    @property
    def _late(self) -> dict[str, str]:
        """Why images turned out to be unreadable after they were chosen, by name."""
        return {name: reason for name, reason in self.images.bad.items() if name not in self._bad}

    def _is_late(self, source: Source, number: int, row: int) -> bool:
        """Returns whether a row turned out to be unreadable after it was chosen."""
        several = len(self.images.records.sources) > 1
        return (f"{source.name}/" if several else "") + source.table.key(int(row)) in self._late

    def _row_fates(self, number: int) -> tuple[np.ndarray, list[Fate]]:
        """Returns ([N] index of each row's fate, the fates) of a source; index 0 means trained on."""
        fates = [*self.images.outcome.fates, Fate(NOT_DRAWN, "see --max_train_samples and --max_validation_samples")]
        codes = np.full(len(self.images.records.sources[number].table), len(fates) - 1, np.int32)
        _put(codes, self.images, number, 0)
        if self.held_out is not None and self.is_portion:
            begin = len(fates)
            fates += [Fate(HELD_OUT) if fate.word == TRAINED else fate for fate in self.held_out.outcome.fates]
            _put(codes, self.held_out, number, begin)
        return codes, fates

    def _held_out_files(self) -> dict[tuple[Path, str], Fate]:
        """Returns the fates of the files of a validation split, by (folder, name)."""
        found: dict[tuple[Path, str], Fate] = {}
        if self.held_out is None or self.is_portion:
            return found
        for number, source in enumerate(self.held_out.records.sources):
            table = source.table
            for name, fate in table.fates or ():
                if fate.word not in (OTHER_SPLIT, HIDDEN):
                    found[table.fates.root, name] = Fate(HELD_OUT) if fate.word == SHARD else fate
            if isinstance(table, FileTable):
                outcome = self.held_out.outcome
                rows = np.flatnonzero(outcome.records.source_numbers == number)
                for index in rows.tolist():
                    fate = outcome.fates[outcome.codes[index]]
                    key = table.root, table.key(int(outcome.records.rows[index]))
                    found[key] = Fate(HELD_OUT) if fate.word == TRAINED else fate
        return found


def _put(codes: np.ndarray, images: PlannedImages, number: int, begin: int) -> None:
    """Sets the fate indices of those rows of a source that were listed.

    Args:
        codes: [N] int32 the fate index of each row, changed in place.
        begin: added to the fate indices of `images`.
    """
    records, found, _ = images.outcome
    is_of_source = records.source_numbers == number
    codes[records.rows[is_of_source]] = found[is_of_source] + begin
