"""What the results of tools say about themselves, how they are written, and what a check found."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from utils.config.options import Diverged
from utils.config.terminal import one_line
from utils.config.user_files import FileError, read_text
from utils.exports.streamed_check import check_written
from utils.exports.tensor_check import Findings
from utils.formats.modelspec import PREDICTIONS, modelspec, written_at
from utils.formats.streaming import HASH_KEY, NO_HASH
from utils.models.base_card import BaseModel
from utils.models.configs_of_files import configs_folder
from utils.models.folder_form import NAMES_OF_DTYPES
from utils.models.single_file_writer import FileFacts, PipelineFolder, facts_of, unread_marks, unsaid
from utils.models.streamed_pipeline import StreamedPipeline
from utils.models.streamed_writing import Rounding, check_complete, write_file, write_folder
from utils.runtime.atomic_files import write_text
from utils.tools.output_options import FILE, OutputOptions
from utils.tools.places import staged

logger = logging.getLogger(__name__)
PREDICTION, ARCHITECTURE = "modelspec.prediction_type", "modelspec.architecture"
MERGED_FROM, DATE, TITLE = (f"modelspec.{name}" for name in ("merged_from", "date", "title"))
CARD, CARD_END = "README.md", ", whose licence it has.\n"
OVERFLOW_CURE = "give --dtype bf16 or fp32"


def dtype_of(options: OutputOptions) -> torch.dtype | None:
    """Returns the dtype of --dtype; None to keep that of the input."""
    return None if options.dtype is None else NAMES_OF_DTYPES[options.dtype]


def write_pipeline(
    pipeline: StreamedPipeline, out: Path, options: OutputOptions, config: str | None, merged: Sequence[str] = ()
) -> None:
    """Writes a pipeline to a file or a folder, as the ending of `out` says, and checks it.

    Args:
        pipeline: the pipeline.
        out: the place, which is free or may be replaced.
        options: dtype and check.
        config: value of --pipeline_config, for a folder that is made of a single file.
        merged: names of what was merged into it, or of the pipeline that it was trained from.

    Raises:
        UserError: if its weights are incomplete, it can't be written, or values do not fit the dtype.
        Diverged: if the check finds a fault; the result stays.
    """
    check_complete(pipeline)
    rounding = Rounding(dtype_of(options))
    if options.dtype == "fp16" and any(config.get("force_upcast") for config in pipeline.configs.values()):
        logger.info(
            "--dtype fp16: the VAE overflows when it draws in fp16 (force_upcast); diffusers and most tools therefore "
            "run it in float32 or bf16"
        )
    with staged(out) as aside:
        if out.suffix == FILE:
            write_file(pipeline, aside, rounding, file_metadata(pipeline, out, merged))
        else:
            configs = pipeline.folder or configs_folder(pipeline.file, config)
            write_folder(pipeline, aside, rounding, configs)
        rounding.check(OVERFLOW_CURE)
        if aside.is_dir():
            write_licence(pipeline, aside, out, merged)
    report(out, options, lambda: check_written(pipeline, out, rounding.dtype))


def file_metadata(pipeline: StreamedPipeline, out: Path, merged: Sequence[str]) -> dict[str, str]:
    """Returns the metadata of a single file: what the input says, with a date and a noise schedule of its own."""
    sources, model = ", ".join(merged), pipeline.family.original_model(pipeline.configs)
    if pipeline.file is not None:
        own = {TITLE: out.stem, MERGED_FROM: sources} if merged else {}
        if pipeline.has_new_schedule:
            schedule = pipeline.configs["scheduler"]
            own |= {PREDICTION: PREDICTIONS.get(str(schedule.get("prediction_type")), "epsilon")}
            own |= {ARCHITECTURE: model.architecture} if ARCHITECTURE in pipeline.file.metadata else {}
            for line in unread_marks(schedule, model, out):
                logger.warning("%s", line)
        return {**pipeline.file.metadata, **own, DATE: written_at(), HASH_KEY: NO_HASH}
    read = PipelineFolder.read(pipeline.folder, pipeline.what.partition(" ")[0])
    source = replace(read, configs={**read.configs, **pipeline.configs}, model=model)
    for line in unsaid(source, out):
        logger.warning("%s", line)
    return {"format": "pt", **modelspec(facts_of(source, FileFacts(merged_from=sources or None), out))}


def write_licence(pipeline: StreamedPipeline, folder: Path, out: Path, merged: Sequence[str]) -> None:
    """Writes a card that states the licence of the input, if that states one.

    A card at the final place that no tool wrote stays; one that a tool wrote is replaced, and deleted where the input
    states no licence.

    Args:
        pipeline: the pipeline.
        folder: folder to write to.
        out: its final place.
        merged: names of what was merged into it.
    """
    there = out / CARD
    if os.path.lexists(there) and not _is_tools_card(there):
        logger.info("%s stays as it is", there)
        return
    licence = BaseModel.read(str(pipeline.folder or pipeline.file.path)).licence
    if licence is None:
        there.unlink(missing_ok=True)
        return
    made = f"merged from {', '.join(merged)}" if len(merged) > 1 else f"made from {source_name(pipeline)}"
    entries = yaml.safe_dump(licence.front_matter, sort_keys=False, allow_unicode=True)
    text = f"---\n{entries}---\n\nThis pipeline is {one_line(made)}{CARD_END}"
    write_text(folder / CARD, text)


def _is_tools_card(file: Path) -> bool:
    """Whether a file is a card that a tool wrote."""
    try:
        return read_text(file).text.endswith(CARD_END)
    except (OSError, FileError):
        return False


def source_name(pipeline: StreamedPipeline) -> str:
    """Returns the name of a pipeline's folder or file, without its path."""
    return (pipeline.file.path if pipeline.folder is None else pipeline.folder.resolve()).name


def report(out: Path, options: OutputOptions, check: Callable[[], Findings]) -> None:
    """Checks a result, and logs what was checked.

    Raises:
        Diverged: if the check finds a fault.
    """
    if not options.check:
        logger.info("wrote %s; it was not checked", out)
        return
    found = check()
    if found.faults:
        for fault in found.faults:
            logger.error("%s", fault)
        raise Diverged(f"{out} was written, but its check failed: {found.faults[0]}")
    logger.info("wrote %s, and read it back: all %d tensors are as they should be", out, found.num_tensors)
