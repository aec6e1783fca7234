"""What was written stays written."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Has the disk keep the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
