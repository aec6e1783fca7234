"""Converts a pipeline between a folder and a single file, or an adapter between diffusers' and the UIs' names.

python -m utils.tools.convert IN OUT --to folder|single_file|diffusers|kohya
"""

from utils.config.first_checks import read_first, run_read
from utils.tools.convert_options import ADAPTERS, NAMES, Options, read_options

if __name__ == "__main__":
    # Answer --help and report invalid flags before torch is loaded.
    read_first(read_options, NAMES)

import logging
from collections.abc import Sequence
from pathlib import Path

from utils.config.options import UserError, leave
from utils.formats.adapter_files import LORA_FILE, PEFT_FILE, adapter_sources
from utils.formats.adapter_names import split_name
from utils.models.loading import loading, names_of
from utils.models.single_file import UNET_KEY
from utils.models.streamed_components import NAMED
from utils.models.streamed_pipeline import COMPONENT_CONFIG, read_streamed
from utils.models.weight_files import stored_in
from utils.runtime.hub_files import INDEX
from utils.tools.adapters import read_adapter_alone, write_adapter
from utils.tools.checkpoints import AVERAGE, Checkpoint
from utils.tools.results import source_name, write_pipeline

logger = logging.getLogger("utils.tools.convert")


def convert(options: Options) -> None:
    """Converts what --source names, and checks the result."""
    asked, checkpoint = options.conversion, Checkpoint.at(options.conversion.source)
    if asked.ema and checkpoint is None:
        raise UserError(f"--ema goes with a checkpoint of a run, which --source {asked.source} is not; leave it out")
    if checkpoint is None:
        _refuse_component(asked.source)
    has_adapter = checkpoint.has_adapter if checkpoint is not None else not is_pipeline(asked.source)
    if has_adapter and asked.to not in ADAPTERS:
        raise UserError(
            f"--to {asked.to} is for pipelines, and --source {asked.source} is an adapter; give --to kohya or "
            "diffusers, or merge it into its base with python -m utils.tools.merge"
        )
    if not has_adapter and asked.to in ADAPTERS:
        raise UserError(
            f"--to {asked.to} is for adapters, and --source {asked.source} is a pipeline; give --to folder or "
            "single_file, or make a LoRA of it with python -m utils.tools.extract"
        )
    if has_adapter:
        convert_adapter(options, checkpoint)
        return
    if checkpoint is None:
        if asked.pipeline is not None:
            logger.warning("--pipeline has no effect: IN is a pipeline itself")
        pipeline, trained_from = read_streamed(asked.source, "--source", asked.variant), ()
    else:
        pipeline = checkpoint.pipeline(asked.pipeline, asked.variant, asked.ema)
        trained_from = (source_name(pipeline),)
    write_pipeline(pipeline, Path(asked.out), options.output, asked.pipeline_config, trained_from)


def _refuse_component(source: str) -> None:
    """Refuses the folder of one component of a pipeline.

    Raises:
        UserError: naming the pipeline's folder, if the component lies in one.
    """
    folder = Path(source)
    if not (folder / COMPONENT_CONFIG).is_file() or (folder / INDEX).is_file():
        return
    if (folder / LORA_FILE).is_file() or (folder / PEFT_FILE).is_file():
        return
    whole = folder.resolve().parent
    cure = f"give its pipeline, {whole}" if (whole / INDEX).is_file() else "give the folder of a whole pipeline"
    raise UserError(f"--source {source} is one component, and no pipeline; {cure}")


def is_pipeline(source: str) -> bool:
    """Whether a path is a pipeline's folder or single file, rather than an adapter's."""
    path = Path(source)
    with loading(f"--source {source}"):
        if path.is_dir():
            return (path / INDEX).is_file() or not adapter_sources(path, NAMED)
        names = stored_in(path)
    if UNET_KEY not in names and not any(map(split_name, names)):
        raise UserError(
            f"--source {source} is neither a whole pipeline, which has {UNET_KEY}, nor an adapter: it has "
            f"{names_of(list(names)) or 'no tensors'}"
        )
    return UNET_KEY in names


def convert_adapter(options: Options, checkpoint: Checkpoint | None) -> None:
    """Converts an adapter."""
    asked, source, base = options.conversion, options.conversion.source, options.conversion.pipeline
    if checkpoint is not None:
        source = str(checkpoint.adapter_place(asked.ema))
    adapter = read_adapter_alone(source, base, "source", AVERAGE if asked.ema else "")
    write_adapter(adapter, Path(asked.out), asked.to or "", options.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns its exit status."""
    return run_read(convert, read_options, argv, NAMES)


if __name__ == "__main__":
    leave(main())
