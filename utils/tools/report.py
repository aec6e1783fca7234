"""Makes report.html from the records of a run; of several runs, with their curves laid over each other.

python -m utils.tools.report DIR... [--out FILE]
"""

from utils.config.first_checks import read_first, run_read
from utils.tools.report_options import NAMES, Options, read_options

if __name__ == "__main__":
    # Answer --help and report invalid flags before numpy is loaded.
    read_first(read_options, NAMES)

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from utils.config.options import UserError, leave
from utils.config.terminal import print_line
from utils.reports.page import write_page
from utils.reports.records import read_run


def report(options: Options) -> None:
    """Writes the report."""
    asked = options.report
    folders = [Path(folder) for folder in asked.folders or []]
    records = [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    try:
        write_page(records, asked.file)
    except OSError as error:
        raise UserError(f"--out {asked.file} can't be written: {error.strerror or error}") from error
    print_line(f"the report is {asked.file}")


def names_of(folders: Sequence[Path]) -> list[str]:
    """Returns a name for each run: that of its folder, with its parent's where these are equal, or a number."""
    names = [folder.resolve().name for folder in folders]
    if max(Counter(names).values()) > 1:
        names = ["/".join(folder.resolve().parts[-2:]) for folder in folders]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{place}: {name}" for place, name in enumerate(names, start=1)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns its exit status."""
    return run_read(report, read_options, argv, NAMES)


if __name__ == "__main__":
    leave(main())
