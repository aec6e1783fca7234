"""The options of utils.tools.report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.config.options import UserError, option, parse
from utils.config.output_folder import check_writable
from utils.config.terminal import one_line, set_up_logging

PURPOSE = "Makes report.html from the records of a run; of several runs, with their curves laid over each other."
NAMES = {"folders": "DIR"}
"""The names that users know the arguments by."""
ENDINGS = (".html", ".htm")
MOST_RUNS = 8  # as many as there are colours
FILE = "report.html"


@dataclass(frozen=True)
class ReportOptions:
    folders: list[str] | None = option(None, "output folders of runs, at most 8", place="DIR")
    out: str | None = option(
        None, "HTML file to write; by default report.html, in the folder of a single run, else in the current one"
    )

    def __post_init__(self) -> None:
        folders = self.folders or []
        if len(folders) > MOST_RUNS:
            raise UserError(f"--folders: {len(folders)} are given; a report shows at most {MOST_RUNS} runs")
        for folder in folders:
            if not Path(folder).is_dir():
                raise UserError(f"--folders {one_line(folder)}: there is no such folder; give the output_dir of a run")
        if self.out is not None and Path(self.out).suffix.lower() not in ENDINGS:
            raise UserError(f"--out {one_line(self.out)} must end in .html")
        if self.file.is_dir():
            raise UserError(f"--out {one_line(self.file)} is a folder; give the name of a file")
        check_writable("out", self.file.absolute().parent, is_folder=True)

    @property
    def file(self) -> Path:
        """The file to write."""
        if self.out is not None:
            return Path(self.out)
        folders = self.folders or []
        return Path(folders[0], FILE) if len(folders) == 1 else Path(FILE)


@dataclass(frozen=True)
class Options:
    """All options of utils.tools.report, by group."""

    report: ReportOptions


def read_options(argv: Sequence[str] | None) -> Options:
    """Returns the checked options."""
    set_up_logging()
    return parse(Options, argv, PURPOSE)
