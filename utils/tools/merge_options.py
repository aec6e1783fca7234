"""The options of utils.tools.merge."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.config.options import UserError, option, require, require_positive
from utils.models.scaled_adapters import ScaledAdapter, parse_adapters
from utils.tools.output_options import FILE, LORA_FORMATS, Job, OutputOptions, read_checked, require_input

PURPOSE = "Merges adapters into a pipeline's weights, or into one LoRA."


@dataclass(frozen=True)
class MergeOptions:
    pipeline: str | None = option(None, "pipeline folder or single file that the adapters are for")
    lora: list[str] | None = option(
        None,
        "adapters to merge (LoRA, DoRA, LoHa, LoKr, of any format), each a file or folder; NAME=0.8 sets its scale, "
        "which is 1 by default",
        is_repeatable=True,
    )
    out: str | None = option(None, "file or folder to write")
    to: str | None = option(
        None,
        "result: a pipeline folder, a single file, or one LoRA; by default a single file if --out ends in "
        ".safetensors, else a pipeline folder",
        choices=("pipeline", "single_file", "lora"),
    )
    rank: int | None = option(
        None, "rank of the LoRA; by default the sum of all ranks, which is exact", acts_with=("to=lora",)
    )
    lora_format: str | None = option(
        None,
        "names in the LoRA: those of diffusers, of kohya (for UIs), or a folder with both; by default kohya for a "
        "file and both for a folder",
        choices=LORA_FORMATS,
        acts_with=("to=lora",),
    )
    pipeline_config: str | None = option(
        None,
        "pipeline folder or Hub name with the configs and tokenizers of a single-file --pipeline, to write a folder",
    )
    variant: str | None = option(None, "variant of the pipeline's weight files, such as fp16")

    def __post_init__(self) -> None:
        require_input("pipeline", self.pipeline)
        if not self.lora:
            raise UserError(
                "--lora is missing; give the adapters to merge, such as --lora a.safetensors=0.8 b.safetensors"
            )
        for each in self.adapters:
            require_input("lora", each.source)
        if self.out is None:
            raise UserError("--out is missing; give a file or folder to write")
        require_positive(self, "rank")
        is_file = Path(self.out).suffix == FILE
        if self.lora_format == "both":
            require(not is_file, "out", self.out, "be a folder for --lora_format both", "it holds a file of each kind")

    @property
    def adapters(self) -> tuple[ScaledAdapter, ...]:
        """The adapters with their scales."""
        return parse_adapters("lora", self.lora)

    @property
    def result(self) -> str:
        """What is written: pipeline, single_file or lora."""
        return self.to or ("single_file" if Path(self.out or "").suffix == FILE else "pipeline")


@dataclass(frozen=True)
class Options:
    """All options of utils.tools.merge, by group."""

    merge: MergeOptions
    output: OutputOptions


def read_options(argv: Sequence[str] | None) -> Options:
    """Returns the checked options; see `read_checked`."""
    return read_checked(Options, argv, PURPOSE, job_of)


def job_of(options: Options) -> Job:
    """Returns what is merged, and to what."""
    asked = options.merge
    read = [asked.pipeline, asked.pipeline_config, *(each.source for each in asked.adapters)]
    is_file = {"pipeline": False, "single_file": True}.get(asked.result)
    return Job(f"merging {len(asked.adapters)} adapters with {asked.pipeline}", read, asked.out or "", is_file)
