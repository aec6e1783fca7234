"""Checks results that were written tensor by tensor: reads them back, and compares bit for bit.

Single files are read by diffusers' own key tables, which share no code with what wrote them.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from utils.config.library_errors import CONVERSION_ERRORS
from utils.config.options import UserError, first_line
from utils.config.user_files import FileError, read_json
from utils.exports.tensor_check import Findings, Read, by_diffusers, compare, compare_names, names_in, readers
from utils.formats.tensor_files import TensorFile, widened
from utils.models.single_file_writer import plain_name
from utils.models.streamed_pipeline import StreamedPipeline
from utils.models.streamed_writing import meta_module, newer_name, tensors_of_file
from utils.models.weight_files import weight_files
from utils.runtime.hub_files import INDEX


def check_written(pipeline: StreamedPipeline, written: Path, dtype: torch.dtype | None) -> Findings:
    """Compares a written pipeline with what it should hold.

    Args:
        pipeline: what it should hold.
        written: the folder, or the single file.
        dtype: dtype that the weights were rounded to; None for their own.
    """
    found = Findings()
    try:
        if written.is_dir():
            _check_folder(found, pipeline, written, dtype)
        elif pipeline.file is not None:
            _check_copy(found, pipeline, written, dtype)
        else:
            _check_file(found, pipeline, written, dtype)
    except (OSError, FileError, UserError) as error:
        found.faults.append(f"{written.name} can't be read back: {first_line(error)}")
    except CONVERSION_ERRORS as error:
        found.faults.append(f"{written.name} can't be converted by diffusers: {first_line(error)}")
    return found


def _check_folder(found: Findings, pipeline: StreamedPipeline, folder: Path, dtype: torch.dtype | None) -> None:
    """Compares a folder; of a single file, diffusers' key tables say what its components should hold."""
    index = read_json(folder / INDEX)
    with ExitStack() as stack:
        for part in pipeline.parts:
            expected: Mapping[str, Read] = _expected(pipeline, part)
            if pipeline.file is not None and part not in pipeline.changed:
                opened = stack.enter_context(TensorFile(pipeline.file.path))
                module = meta_module(index[part], folder / part)
                found_by, _ = by_diffusers(opened, part, module, names_in(opened, part))
                expected = {name: partial(_widened, each) for name, each in found_by.items()}
            read = readers(stack, weight_files(folder / part, None, with_pickles=False))
            if pipeline.file is not None:  # it may have more than the pipeline reads
                expected = {name: each for name, each in expected.items() if name in read or part in pipeline.changed}
            compare(found, part, expected, read, dtype)
            compare_names(found, part, expected, read)


def _check_file(found: Findings, pipeline: StreamedPipeline, file: Path, dtype: torch.dtype | None) -> None:
    """Compares a single file that was made of a folder, as diffusers' key tables read it."""
    index = read_json(pipeline.folder / INDEX)
    with TensorFile(file) as opened:
        unknown = set(opened.names)
        for part in pipeline.original_parts:
            own = names_in(opened, part)
            unknown -= set(own)
            read, unread = by_diffusers(opened, part, meta_module(index[part], pipeline.folder / part), own)
            where = f"{file.name}: {part}"
            expected = {newer_name(name): each for name, each in _expected(pipeline, part).items()}
            compare(found, where, expected, read, dtype)
            compare_names(found, where, expected, read)
            found.add(where, "are read by nothing", unread)
        marks = {each.name for each in tensors_of_file(pipeline) if not each.shape or each.shape == (0,)}
        found.add(file.name, "are unknown", sorted(unknown - marks))


def _check_copy(found: Findings, pipeline: StreamedPipeline, file: Path, dtype: torch.dtype | None) -> None:
    """Compares a single file that was made of another, whose names it keeps."""
    expected = {each.name: each.read for each in tensors_of_file(pipeline)}
    with TensorFile(file) as opened:
        read = {name: lambda name=name: opened.read(name) for name in opened.names}
        compare(found, file.name, expected, read, dtype)
        compare_names(found, file.name, expected, read)


def _expected(pipeline: StreamedPipeline, part: str) -> dict[str, Read]:
    """Returns functions that read what a component should hold, by plain name."""
    return {plain_name(name): each.read for name, each in pipeline.parts[part].items()}


def _widened(read: Read) -> Tensor:
    """Returns what is read, as it is written."""
    return widened(read())
