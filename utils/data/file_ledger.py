"""What became of every file of the data: counted, and written down a line each."""

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
FEW = 100_000  # files, of which all can be written down again and again


class Ledger:
    """The fates of all files of the data, and of the images within shards and datasets.

    Attributes:
        images: those that are trained on; None before they are chosen.
        held_out: those that are not, and on which the validation loss is measured.
        is_portion: whether these are a portion of the same images.
    """

    def __init__(self) -> None:
        self.images: PlannedImages | StreamedImages | None = None
        self._bad: frozenset[str] = frozenset()
        self.held_out: PlannedImages | None = None
        self.is_portion = False

    def train_on(self, images: PlannedImages | StreamedImages) -> None:
        """Takes the images, as they were chosen."""
        self.images, self._bad = images, frozenset(images.bad)

    def counts(self) -> tuple[Counter[str], Counter[str]]:
        """How many files have each fate, and how many images that are no files of their own."""
        files, members = Counter(), Counter()
        if isinstance(self.images, StreamedImages):
            members = Counter({"read": self.images.counts["read"], UNREADABLE: len(self.images.bad)})
            for fate, count in self.images.fates.by_fate().items() if self.images.fates else ():
                files[fate.word] += count
            return files, members
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
            late = sum(self._is_late(source, number, row) for row in np.flatnonzero(codes == 0)) if self._late else 0
            counted[TRAINED] -= late
            counted[UNREADABLE] += late
            for name, fate in table.fates if held and table.fates else ():
                if fate.word == OTHER_SPLIT and (table.fates.root, name) in held:
                    files[OTHER_SPLIT] -= 1
                    files[held[table.fates.root, name].word] += 1
        return +files, +members

    def report(self) -> dict[str, object]:
        """The counts as `data_report.json` has them."""
        files, members = self.counts()
        return {
            "files": sum(files.values()),
            "fates": dict(files.most_common()),
            **({"fates_in_shards": dict(members.most_common())} if members else {}),
        }

    def lines(self) -> list[str]:
        """The counts in words."""
        files, members = self.counts()
        found = []
        for what, counts in (("files", files), ("in shards", members)):
            if counts:
                words = ", ".join(f"{count:,} {word}" for word, count in counts.most_common())
                found.append(f"{what:<14} {sum(counts.values()):,}: {words}")
        return found

    def write(self, folder: Path, is_last: bool) -> None:
        """Writes a line for each file; where there are very many only once or at the last.

        Args:
            is_last: whether this is not to be written again soon.
        """
        if isinstance(self.images, PlannedImages) and len(self.images.outcome.codes) > FEW and not is_last:
            return
        with replacing(folder / FILE) as aside, open(aside, "wb") as file:
            for name, fate in self._fates():
                line = json_text({"file": name, "fate": fate.word, "reason": fate.reason})
                file.write(line.encode() + b"\n")

    def _fates(self) -> Iterator[tuple[str, Fate]]:
        """Each file and its fate, then those of members of shards; of rows of a dataset only those not trained on."""
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
        """Why images can't be trained on of which that was found out after they were chosen."""
        return {name: reason for name, reason in self.images.bad.items() if name not in self._bad}

    def _is_late(self, source: Source, number: int, row: int) -> bool:
        several = len(self.images.records.sources) > 1
        return (f"{source.name}/" if several else "") + source.table.key(int(row)) in self._late

    def _row_fates(self, number: int) -> tuple[np.ndarray, list[Fate]]:
        """([N] the number of each row's fate, the fates) of a source; 0 is that of an image that is trained on."""
        fates = [*self.images.outcome.fates, Fate(NOT_DRAWN, "see --max_train_samples and --max_validation_samples")]
        codes = np.full(len(self.images.records.sources[number].table), len(fates) - 1, np.int32)
        _put(codes, self.images, number, 0)
        if self.held_out is not None and self.is_portion:
            begin = len(fates)
            fates += [Fate(HELD_OUT) if fate.word == TRAINED else fate for fate in self.held_out.outcome.fates]
            _put(codes, self.held_out, number, begin)
        return codes, fates

    def _held_out_files(self) -> dict[tuple[Path, str], Fate]:
        """The fates of the files of a split that is held out, by the folder and their names."""
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
    """Sets the fates of a source's rows that were listed to what became of them."""
    records, found, _ = images.outcome
    is_of_source = records.source_numbers == number
    codes[records.rows[is_of_source]] = found[is_of_source] + begin
