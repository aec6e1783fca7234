"""Writes the report of one running run, in a process of its own: python -m utils.reports.refresh FOLDER.

A run starts it in the background; as the least important process of its machine, it takes no time from the training.
"""

import os
import sys
from pathlib import Path

from utils.reports.page import FILE, write_page
from utils.reports.records import read_run


def refresh(folder: Path) -> None:
    """Writes the report of a run's folder."""
    write_page([read_run(folder)], folder / FILE)


if __name__ == "__main__":
    if hasattr(os, "nice"):  # Windows has none
        os.nice(19)
    refresh(Path(sys.argv[1]))
