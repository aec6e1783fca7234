"""The options of utils.tools.resize."""

from collections.abc import Sequence
from dataclasses import dataclass

from utils.config.options import UserError, option, require, require_positive
from utils.tools.output_options import Job, OutputOptions, read_checked, require_input

PURPOSE = "Writes a LoRA with a smaller rank, the nearest to its updates."
NAMES = {"source": "IN", "out": "OUT"}
"""The names that users know the arguments by."""


@dataclass(frozen=True)
class ResizingOptions:
    source: str = option("", "LoRA file or folder of any format", place="IN")
    out: str = option("", "file to write, in the names of the input", place="OUT")
    rank: int | None = option(None, "largest rank of a layer; layers of a smaller one stay as they are")
    energy: float | None = option(
        None,
        "choose each layer's smallest rank that holds this share of its update, as the sum of squared singular values",
    )
    to_lora: bool = option(False, "turn LoHa and LoKr layers into LoRA of that rank")
    pipeline: str | None = option(
        None, "pipeline folder or single file that the adapter is for, where --to_lora needs the shapes of its layers"
    )

    def __post_init__(self) -> None:
        require_input("source", self.source)
        if self.pipeline is not None:
            require_input("pipeline", self.pipeline)
        if self.rank is None and self.energy is None:
            raise UserError("--rank is missing; give the new rank, such as --rank 16")
        require_positive(self, "rank")
        require(self.energy is None or 0 < self.energy <= 1, "energy", self.energy, "be above 0 and at most 1")


@dataclass(frozen=True)
class Options:
    """All options of utils.tools.resize, by group."""

    resizing: ResizingOptions
    output: OutputOptions


def read_options(argv: Sequence[str] | None) -> Options:
    """Returns the checked options; see `read_checked`."""
    return read_checked(Options, argv, PURPOSE, job_of)


def job_of(options: Options) -> Job:
    """Returns what is resized."""
    asked = options.resizing
    return Job(f"resizing {asked.source}", [asked.source, asked.pipeline], asked.out, is_file=True)
