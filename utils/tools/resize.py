"""Writes a LoRA with a smaller rank, the nearest to its updates.

python -m utils.tools.resize IN OUT --rank R
"""

from utils.config.first_checks import options_of, read_first
from utils.tools.resize_options import NAMES, Options, read_options

if __name__ == "__main__":
    # Answer --help and report invalid flags before torch is loaded.
    read_first(read_options, NAMES)

from collections.abc import Sequence

from utils.config.options import leave, run_script
from utils.tools.resizing import resize


def run(argv: Sequence[str] | None) -> None:
    """Reads the options and resizes."""
    options: Options = options_of(read_options, argv)
    resize(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns its exit status."""
    return run_script(run, argv, NAMES)


if __name__ == "__main__":
    leave(main())
