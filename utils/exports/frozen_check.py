"""Checks that what an exported pipeline has beside the trained weights is the base's, bit for bit.

The base's files are read again, tensor by tensor. Without such files (a single file, pickles, a model from the Hub
that is not in a folder), the weights in memory are what the export is compared with.
"""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.config.options import first_line
from utils.config.user_files import FileError, read_json
from utils.exports.tensor_check import Findings, Read, compare, compare_names, is_constant, readers
from utils.models.base import Family
from utils.models.folder_form import FLOAT32, FolderForm, overflow_text
from utils.models.pipeline_files import is_part
from utils.models.single_file_writer import plain_name
from utils.models.streamed_writing import newer_name
from utils.models.weight_files import weight_files
from utils.runtime.hub_files import INDEX
from utils.runtime.sharding import sharded_parts


@dataclass
class Frozen:
    """What the check of a pipeline's components that are not trained found.

    Attributes:
        findings: tensors compared, and what is wrong.
        by_files: components that were compared with the base's files.
        by_memory: components that were compared with the weights in memory.
        to_precision: components that were compared with weights in memory of lower precision, to that precision.
        left_out: components that were not compared.
    """

    findings: Findings = field(default_factory=Findings)
    by_files: list[str] = field(default_factory=list)
    by_memory: list[str] = field(default_factory=list)
    to_precision: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Returns what was compared with what, in words; empty if the pipeline has no such components."""
        ways = [
            (self.by_files, "with the base's files"),
            (self.by_memory, "with the weights in memory"),
            (self.to_precision, "with the weights in memory, to their lower precision"),
        ]
        compared = ", ".join(f"{' and '.join(names)} {way}" for names, way in ways if names)
        return f"{self.findings.num_tensors} of what is not trained ({compared})" if compared else ""


def check_frozen(folder: Path, family: Family, trained: Collection[str], form: FolderForm = FLOAT32) -> Frozen:
    """Compares the components of a pipeline's folder that are not trained with the base, rounded to the folder's dtype.

    Args:
        folder: folder of the pipeline.
        family: the run's pipeline, and where it came from.
        trained: names of the components that others check.
        form: dtype and names of the folder's weights.
    """
    found = Frozen()
    try:
        index = read_json(folder / INDEX)
    except (OSError, FileError) as error:
        found.findings.faults.append(f"{INDEX} can't be read back: {first_line(error)}")
        return found
    for name in (name for name, entry in index.items() if is_part(entry) and name not in trained):
        module = family.pipeline.components.get(name)
        module = module if isinstance(module, nn.Module) else None
        files = weight_files(folder / name, form.variant, with_pickles=False)
        base = family.base_files(name)
        if not (files or base or module is not None):  # a scheduler, a tokenizer
            continue
        with ExitStack() as stack:
            try:
                read = _newer(readers(stack, files))
                source = _newer(readers(stack, base))
                _compare(found, name, read, source, module, form.dtype)
            except (OSError, FileError) as error:
                found.findings.faults.append(f"{name} can't be read back: {first_line(error)}")
    return found


def _newer(read: Mapping[str, Read]) -> dict[str, Read]:
    return {newer_name(name): function for name, function in read.items()}


def _compare(
    found: Frozen,
    name: str,
    read: Mapping[str, Read],
    source: Mapping[str, Read],
    module: nn.Module | None,
    dtype: torch.dtype,
) -> None:
    """Compares one component with the base's files, else with the module in memory if its precision allows that."""
    # Names, by the module where there is one: a base's files may have more than is used.
    held = _held(module)
    if held:
        compare_names(found.findings, name, held, [each for each in read if each in held or each not in source])
    else:
        compare_names(found.findings, name, source or read, read)

    # Values.
    if source:
        found.by_files.append(name)
        compare(found.findings, name, {key: partial(_widened, each) for key, each in source.items()}, read, dtype)
        return
    dtypes = {tensor.dtype for key, tensor in held.items() if tensor.is_floating_point() and not is_constant(key)}
    if dtypes and dtypes <= {torch.float32, dtype}:
        found.by_memory.append(name)
        compare(found.findings, name, _functions(held), read, dtype)
    elif dtypes and dtype == torch.float32:
        found.to_precision.append(name)
        compare(found.findings, name, _functions(held), _rounded_like(read, held), None)
    else:
        found.left_out.append(name)
        _find_infinite(found.findings, name, read)


def _held(module: nn.Module | None) -> dict[str, Tensor]:
    """Returns the tensors of a module in memory, by plain name; none if it does not hold them as they were loaded."""
    if module is None or sharded_parts([module]):
        return {}
    state = {
        newer_name(plain_name(name.replace("_orig_mod.", ""))): tensor.detach()
        for name, tensor in module.state_dict().items()
    }
    return {} if any(_is_changed(name, tensor) for name, tensor in state.items()) else state


def _is_changed(name: str, tensor: Tensor) -> bool:
    """Whether a tensor in memory is not as it was loaded: freed, quantized, or part of a layer with an adapter."""
    is_packed = not tensor.is_floating_point() and not is_constant(name)
    return tensor.is_meta or is_packed or ".base_layer." in name


def _functions(held: Mapping[str, Tensor]) -> dict[str, Read]:
    return {name: tensor.cpu for name, tensor in held.items()}


def _rounded_like(read: Mapping[str, Read], held: Mapping[str, Tensor]) -> dict[str, Read]:
    """Returns functions that read tensors in the dtypes that they have in memory."""
    return {name: partial(_in_dtype, each, held[name].dtype) for name, each in read.items() if name in held}


def _in_dtype(read: Read, dtype: torch.dtype) -> Tensor:
    return read().to(dtype)


def _widened(read: Read) -> Tensor:
    """Returns what is read in float32, as components are loaded for an export."""
    values = read()
    return values.float() if values.is_floating_point() else values


def _find_infinite(found: Findings, where: str, read: Mapping[str, Read]) -> None:
    """Notes the infinite values of a component in fp16 that there is nothing to compare with; bases have none."""
    counts = {}
    for name, function in read.items():
        tensor = function()
        if tensor.dtype == torch.float16 and (count := int(tensor.isinf().sum())):
            counts[name] = count
    if counts:
        found.faults.append(f"{where}: {overflow_text(counts)}")
