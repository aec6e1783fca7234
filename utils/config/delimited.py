"""Reads delimited tables as people and spreadsheets write them, and checks each row against the header."""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from utils.config.user_files import FileError, short

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
SAID_DELIMITER = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)  # Excel's line that names the delimiter

MISSING = {  # what pandas, and therefore `datasets`, read as an empty cell
    *("NULL", "null", "NaN", "nan", "-NaN", "-nan", "None", "NA", "<NA>", "N/A", "n/a", "#NA", "#N/A", "#N/A N/A"),
    *("1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"),
}
MAY_BE_NAMES = {"NULL", "null", "None", "NA", "N/A", "n/a"}  # such as the label "None", or NA for Namibia


class Row(NamedTuple):
    """A row below the header.

    Attributes:
        line: line number where it begins.
        values: cells by column name; "" for an empty cell.
        reason: why the row can't be used; "" if it can.
    """

    line: int
    values: dict[str, str]
    reason: str = ""


def read_rows(
    text: str, where: object, names: Sequence[str], begins_row: Callable[[str, str], bool] = lambda column, cell: False
) -> Iterator[Row]:
    """Yields the rows of a table with a header, skipping blank ones. Detects the delimiter from the header.

    Args:
        names: expected column names, of which the header should contain some.
        begins_row: whether a cell of a column shows that a quoted line is in fact a new row.

    Raises:
        FileError: naming `where` and the line, if the header repeats a column or a quote is not closed.
    """

    lines = list(io.StringIO(text, newline=""))
    # Delimiter: from Excel's sep= line, or guessed from the header.
    said = SAID_DELIMITER.fullmatch(lines[0]) if lines else None
    if said:
        lines[0] = "\n"
    first = next((line for line in lines if line.strip()), "")

    delimiter = said[1] if said else _delimiter(first, names)
    lines = [_without_spaces(line, delimiter) if '" ' in line else line for line in lines]
    pads = any(f'{delimiter} "' in line for line in lines) or any(cell[:1] == " " for cell in first.split(delimiter))
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=pads)
    columns: list[str] | None = None

    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise FileError(where, f"line {begin} can't be read: {_quoting(error)}") from error
        if cells is None:
            return
        if not any(map(str.strip, cells)):
            continue
        if columns is None:
            columns = _columns(cells, where)
            continue
        # An unclosed quote swallows the lines after it: find a line within this row that is a row of its own.
        within = range(begin, reader.line_num)
        inner = next((number for number in within if _is_row(lines[number], delimiter, columns, begins_row)), None)
        if inner is not None:
            cure = "close the quote, or double it inside quoted text"
            raise FileError(
                where, f"line {begin} can't be read: the quote that opens there runs on into line {inner + 1}; {cure}"
            )
        yield Row(
            begin,
            dict(zip(filter(None, columns), _named(columns, cells), strict=False)),
            _ragged(columns, cells, delimiter),
        )


def is_missing(cell: str) -> bool:
    """Whether a cell is empty or holds a placeholder for a missing value, such as NULL or NaN."""
    return not cell or cell.strip() in MISSING


def may_be_name(cell: str) -> bool:
    """Whether a placeholder for a missing value could also be a real name, such as NA."""
    return cell.strip() in MAY_BE_NAMES


def _delimiter(header: str, names: Sequence[str]) -> str:
    """Returns the delimiter that yields the most known names in the header, or else the most cells."""
    known = {name.casefold() for name in names}

    def score(delimiter: str) -> tuple[int, int]:
        cells = [cell.strip().strip('"').casefold() for cell in header.split(delimiter)]
        return len(known.intersection(cells)), len(cells)

    return max(DELIMITERS, key=score)


def _without_spaces(line: str, delimiter: str) -> str:
    """Removes spaces between a closing quote and the next delimiter, which the csv module rejects."""
    return re.sub(rf'(?<=[^"\s{re.escape(delimiter)}])" +(?={re.escape(delimiter)}|\r?\n?$)', '"', line)


def _columns(cells: Sequence[str], where: object) -> list[str]:
    columns = [cell.strip() for cell in cells]
    twice = next((name for name, count in Counter(filter(None, columns)).items() if count > 1), None)
    if twice is not None:
        raise FileError(where, f"has the column {short(twice)} twice; rename one")
    return columns


def _named(columns: Sequence[str], cells: Sequence[str]) -> list[str]:
    """Returns the cells of the columns that have a name."""
    return [cell for name, cell in zip(columns, cells, strict=False) if name]


def _ragged(columns: Sequence[str], cells: Sequence[str], delimiter: str) -> str:
    """Returns why a row does not fit the header, or ""; trailing empty cells, as spreadsheets write, are accepted."""
    beyond = cells[len(columns) :]
    unnamed = [cell for name, cell in list(zip(columns, cells, strict=False))[1:] if not name]  # the first is an index
    columns_text = f"the {len(list(filter(None, columns)))} columns"
    if any(map(str.strip, [*beyond, *unnamed])):
        return f"more cells than {columns_text}; quote text with a {DELIMITERS.get(delimiter, delimiter)}"
    return f"fewer cells than {columns_text}; write an empty cell for each" if len(cells) < len(columns) else ""


def _is_row(line: str, delimiter: str, columns: Sequence[str], begins_row: Callable[[str, str], bool]) -> bool:
    cells = line.split(delimiter)
    return len(cells) > 1 and any(
        begins_row(name, cell.strip(' "')) for name, cell in zip(columns, cells, strict=False)
    )


def _quoting(error: csv.Error) -> str:
    reason = str(error)
    if "unexpected end" in reason:
        return "a quote opens there and is never closed; close it, or double it inside quoted text"
    if "field larger" in reason:
        return f"a cell has over {csv.field_size_limit()} characters; a quote may be unclosed"
    if "expected after" in reason:
        return 'text follows a closing quote; inside quoted text, double each quote ("")'
    return reason
