"""The options of utils.tools.convert."""

from collections.abc import Sequence
from dataclasses import dataclass

from utils.config.options import UserError, option
from utils.runtime.hub_files import require_model
from utils.tools.output_options import Job, OutputOptions, read_checked, require_input

PURPOSE = "Converts a pipeline between a folder and a single file, or an adapter between diffusers' and the UIs' names."
NAMES = {"source": "IN", "out": "OUT"}
"""The names that users know the arguments by."""
MODELS, ADAPTERS = ("folder", "single_file"), ("diffusers", "kohya")


@dataclass(frozen=True)
class ConversionOptions:
    source: str = option(
        "",
        "what to convert: a pipeline folder or single file, a checkpoint-N of a run, or a LoRA, DoRA, LoHa or LoKr "
        "file or folder in any format",
        place="IN",
    )
    out: str = option("", "file or folder to write", place="OUT")
    to: str | None = option(
        None,
        "form of the result: a folder of diffusers or a single file in the original layout for pipelines; names of "
        "diffusers or of kohya, which UIs read, for adapters",
        choices=(*MODELS, *ADAPTERS),
    )
    pipeline_config: str | None = option(
        None,
        "pipeline folder or Hub name with configs, tokenizers for a single file (default: beside it or from the Hub)",
        acts_with=("to=folder",),
    )
    pipeline: str | None = option(
        None,
        "pipeline folder or single file that an adapter or a checkpoint is for, where it does not say so itself",
    )
    ema: bool = option(False, "take the average (EMA) weights of a checkpoint")
    variant: str | None = option(None, "variant of the input's weight files, such as fp16")

    def __post_init__(self) -> None:
        if self.to is None:
            raise UserError(f"--to is missing; give one of {', '.join((*MODELS, *ADAPTERS))}")
        require_input("source", self.source)
        if self.pipeline is not None:
            require_input("pipeline", self.pipeline)
        require_model("pipeline_config", self.pipeline_config, "give a pipeline folder or a Hub name")


@dataclass(frozen=True)
class Options:
    """All options of utils.tools.convert, by group."""

    conversion: ConversionOptions
    output: OutputOptions


def read_options(argv: Sequence[str] | None) -> Options:
    """Returns the checked options; see `read_checked`."""
    return read_checked(Options, argv, PURPOSE, job_of)


def job_of(options: Options) -> Job:
    """Returns what is converted, and to what."""
    asked = options.conversion
    is_file = {"single_file": True, "folder": False}.get(asked.to)
    read = [asked.source, asked.pipeline, asked.pipeline_config]
    return Job(f"converting {asked.source}", read, asked.out, is_file)
