"""Extracts a LoRA from the difference between a tuned pipeline and its base.

python -m utils.tools.extract --base A --tuned B --out OUT --rank R
"""

from utils.config.first_checks import read_first, run_read
from utils.tools.extract_options import Options, read_options

if __name__ == "__main__":
    # Answer --help and report invalid flags before torch is loaded.
    read_first(read_options)

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from utils.config.options import leave
from utils.models.streamed_components import base_of_streamed
from utils.models.streamed_pipeline import read_streamed
from utils.tools.adapters import Adapter, form_of, write_adapter
from utils.tools.extraction import check_alike, extract_layers, kept_metadata
from utils.tools.results import source_name


def extract(options: Options) -> None:
    """Writes a LoRA of the difference, and checks it."""
    asked, out = options.extraction, Path(options.extraction.out or "")
    base = read_streamed(asked.base or "", "--base", asked.base_variant)
    tuned = read_streamed(asked.tuned or "", "--tuned", asked.variant)
    check_alike(base, tuned)
    known = replace(base_of_streamed(tuned), components=base_of_streamed(base).components)
    layers = extract_layers(base, tuned, known.components, asked)
    sources = (source_name(tuned), f"-{source_name(base)}")
    result = Adapter(f"--out {out}", layers, known, kept_metadata(tuned), sources)
    write_adapter(result, out, form_of(asked.to, out), options.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns its exit status."""
    return run_read(extract, read_options, argv)


if __name__ == "__main__":
    leave(main())
