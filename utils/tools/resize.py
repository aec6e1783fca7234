"""Writes a LoRA with a smaller rank, the nearest to its updates.

python -m utils.tools.resize IN OUT --rank R
"""

from utils.config.first_checks import read_first, run_read
from utils.tools.resize_options import NAMES, read_options

if __name__ == "__main__":
    # Answer --help and report invalid flags before torch is loaded.
    read_first(read_options, NAMES)

from collections.abc import Sequence

from utils.config.options import leave
from utils.tools.resizing import resize


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns its exit status."""
    return run_read(resize, read_options, argv, NAMES)


if __name__ == "__main__":
    leave(main())
