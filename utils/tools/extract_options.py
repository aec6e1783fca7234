"""The options of utils.tools.extract."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.config.options import UserError, option, require, require_positive
from utils.tools.output_options import FILE, LORA_FORMATS, Job, OutputOptions, read_checked, require_input

PURPOSE = "Extracts a LoRA from the difference between a tuned pipeline and its base."


@dataclass(frozen=True)
class ExtractionOptions:
    base: str | None = option(None, "pipeline folder or single file that the tuned one started from")
    tuned: str | None = option(None, "pipeline folder or single file with the tuned weights")
    out: str | None = option(None, "file or folder to write")
    rank: int | None = option(None, "rank of the LoRA; with --energy the largest one of a layer")
    energy: float | None = option(
        None,
        "choose each layer's smallest rank that holds this share of its difference, as the sum of squared singular "
        "values, such as 0.95",
    )
    to: str | None = option(
        None,
        "names in the LoRA: those of diffusers, of kohya (for UIs), or a folder with both; by default kohya for a "
        "file and both for a folder",
        choices=LORA_FORMATS,
    )
    text_encoder: bool = option(True, "extract the difference of text encoders too")
    base_variant: str | None = option(None, "variant of the base's weight files, such as fp16")
    variant: str | None = option(None, "variant of the tuned pipeline's weight files, such as fp16")

    def __post_init__(self) -> None:
        require_input("base", self.base)
        require_input("tuned", self.tuned)
        if self.out is None:
            raise UserError("--out is missing; give a file or folder to write")
        if self.rank is None and self.energy is None:
            raise UserError("--rank or --energy is missing; give --rank 32, or --energy 0.95")
        require_positive(self, "rank")
        require(self.energy is None or 0 < self.energy <= 1, "energy", self.energy, "be above 0 and at most 1")
        if self.to == "both":
            require(Path(self.out).suffix != FILE, "out", self.out, "be a folder for --to both", "it holds two files")


@dataclass(frozen=True)
class Options:
    """All options of utils.tools.extract, by group."""

    extraction: ExtractionOptions
    output: OutputOptions


def read_options(argv: Sequence[str] | None) -> Options:
    """Returns the checked options; see `read_checked`."""
    return read_checked(Options, argv, PURPOSE, job_of)


def job_of(options: Options) -> Job:
    """Returns what the LoRA is extracted from."""
    asked = options.extraction
    return Job(f"extracting a LoRA from {asked.tuned}", [asked.base, asked.tuned], asked.out or "")
