"""Checks that the weights of exported pipelines are the run's, bit for bit, as a second reader finds them.

Single files are read by diffusers' own key tables, which share no code with the writer.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.config.library_errors import CONVERSION_ERRORS
from utils.config.options import UserError, first_line
from utils.config.user_files import FileError, read_json
from utils.formats.modelspec import V_MARK, ZERO_SNR_MARK, schedule_marks
from utils.formats.tensor_files import TensorFile
from utils.models.folder_form import FLOAT32, FolderForm, num_overflowed, overflow_text, rounded
from utils.models.loading import names_of
from utils.models.single_file import converted, prefixes
from utils.models.single_file_writer import PipelineFolder, plain_name
from utils.models.streamed_writing import meta_module, newer_name
from utils.models.weight_files import weight_files
from utils.runtime.hub_files import INDEX

Read = Callable[[], Tensor]
NOT_WEIGHTS = ("position_ids", "logit_scale")  # constants that files have and no module


@dataclass
class Findings:
    """What a check found.

    Attributes:
        num_tensors: tensors compared.
        faults: what is wrong, each in one line; empty if all is right.
    """

    num_tensors: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, where: str, what: str, names: Iterable[str]) -> None:
        """Adds a fault that names share, if there are any names."""
        if found := list(names):
            self.faults.append(f"{where}: {len(found)} tensors {what}: {names_of(found)}")

    def __iadd__(self, other: "Findings") -> "Findings":
        self.num_tensors += other.num_tensors
        self.faults += other.faults
        return self


def check_folder(folder: Path, modules: Mapping[str, nn.Module], form: FolderForm = FLOAT32) -> Findings:
    """Compares the weights in a pipeline's folder with modules in memory, rounded to the folder's dtype.

    Args:
        folder: folder of the pipeline.
        modules: modules that were written, by name in the pipeline.
        form: dtype and names of the folder's weights.
    """
    found = Findings()
    for name, module in modules.items():
        expected = {plain_name(key): partial(_on_cpu, tensor) for key, tensor in module.state_dict().items()}
        with ExitStack() as stack:
            try:
                read = readers(stack, weight_files(folder / name, form.variant, with_pickles=False))
            except (OSError, FileError) as error:
                found.faults.append(f"{name} can't be read back: {first_line(error)}")
                continue
            compare(found, name, expected, read, form.dtype)
            compare_names(found, name, expected, read)
    return found


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def readers(stack: ExitStack, files: Iterable[Path]) -> dict[str, Read]:
    """Returns functions that read the tensors of some files, by plain name; the files stay open with the stack."""
    opened = [stack.enter_context(TensorFile(path)) for path in files]
    return {plain_name(name): partial(each.read, name) for each in opened for name in each.names}


def compare(
    found: Findings,
    where: str,
    expected: Mapping[str, Read],
    read: Mapping[str, Read],
    dtype: torch.dtype | None,
) -> None:
    """Compares the tensors of common names, rounded to a dtype; None for their own."""
    different, overflowed = [], {}
    for name in (name for name in expected if name in read and not is_constant(name)):
        before = expected[name]()
        after = rounded(before, dtype)
        found.num_tensors += 1
        if not same_bits(after, read[name]()):
            different.append(name)
        elif count := num_overflowed(before, after):
            overflowed[name] = count
    found.add(where, "are not the run's", different)
    if overflowed:
        found.faults.append(f"{where}: {overflow_text(overflowed)}")


def compare_names(found: Findings, where: str, expected: Iterable[str], read: Iterable[str]) -> None:
    """Notes tensors that are missing or unknown; constants may be both."""
    names, known = set(read), set(expected)
    found.add(where, "are missing", sorted(name for name in known - names if not is_constant(name)))
    found.add(where, "are unknown", sorted(name for name in names - known if not is_constant(name)))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits, which NaN has too."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (each.contiguous().flatten().view(torch.uint8) for each in (one, other))
    return torch.equal(first, second)


def same_tensors(ones: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the same names, dtypes, shapes and bits."""
    return ones.keys() == others.keys() and all(same_bits(one, others[name]) for name, one in ones.items())


def is_constant(name: str) -> bool:
    """Whether a tensor is a constant that files have and no module."""
    return name.rpartition(".")[2] in NOT_WEIGHTS


def check_single_file(
    file: Path, folder: Path, dtype: torch.dtype | None = None, variant: str | None = None
) -> Findings:
    """Reads a single file by diffusers' key tables, and compares it with the pipeline's folder.

    Args:
        file: the file.
        folder: folder of the same pipeline.
        dtype: dtype that the file's weights were rounded to; None for the folder's own.
        variant: variant of the folder's weights.
    """
    found = Findings()
    try:
        source = PipelineFolder.read(folder, "the folder", variant)
        with TensorFile(file) as opened:
            unknown = set(opened.names) - {V_MARK, ZERO_SNR_MARK}
            for name in source.parts:
                own = names_in(opened, name)
                unknown -= set(own)
                _check_part(found, opened, source, name, own, dtype)
            given = {V_MARK, ZERO_SNR_MARK} & set(opened.names)
            marks = set(schedule_marks(source.configs["scheduler"]))
            found.add(file.name, "are missing", sorted(marks - given))
            found.add(file.name, "mark another schedule", sorted(given - marks))
            found.add(file.name, "are unknown", sorted(unknown))
    except (OSError, FileError, UserError) as error:
        found.faults.append(f"{file.name} can't be read back: {first_line(error)}")
    return found


def names_in(opened: TensorFile, name: str) -> list[str]:
    """Returns the names of a component's tensors in a single file."""
    return [key for key in opened.names if key.startswith(prefixes(name))]


def _check_part(
    found: Findings,
    opened: TensorFile,
    source: PipelineFolder,
    name: str,
    own: Iterable[str],
    dtype: torch.dtype | None,
) -> None:
    """Compares one component of a single file, converted by diffusers, with the folder's."""
    where = f"{opened.path.name}: {name}"
    try:
        module = meta_module(read_json(source.path / INDEX)[name], source.path / name)
        read, unread = by_diffusers(opened, name, module, own)
        with ExitStack() as stack:
            files = sorted(set(source.parts[name].files.values()))
            expected = {newer_name(key): function for key, function in readers(stack, files).items()}
            compare(found, where, expected, read, dtype)  # some tensors are converted only here
            compare_names(found, where, expected, read)
    except CONVERSION_ERRORS as error:
        found.faults.append(f"{where} can't be converted by diffusers: {first_line(error)}")
        return
    found.add(where, "are read by nothing", unread)


def by_diffusers(
    opened: TensorFile, name: str, module: nn.Module, own: Iterable[str]
) -> tuple[dict[str, Read], list[str]]:
    """Returns a component's tensors by their names in diffusers, and the names of those that it does not read."""
    # Names, from tensors without values. Most tensors stay the same object.
    shapes = {key: torch.empty(opened.shape(key), device="meta") for key in own if not is_constant(key)}
    keys = {id(tensor): key for key, tensor in shapes.items()}
    named = {plain_name(new): tensor for new, tensor in converted(name, module, shapes).items()}
    read: dict[str, Read] = {
        new: partial(opened.read, keys[id(tensor)]) for new, tensor in named.items() if id(tensor) in keys
    }

    # The others change their shape, each by itself.
    unread, kept = [], {keys[id(tensor)] for tensor in named.values() if id(tensor) in keys}
    for key in (key for key in shapes if key not in kept):
        try:
            parts = [plain_name(new) for new in converted(name, module, {key: shapes[key]})]
        except KeyError:  # a UNet's tensors never change: what was not kept is not read
            parts = []
        read |= {new: partial(_converted_alone, opened, name, module, key, new) for new in parts}
        unread += [] if parts else [key]
    return read, unread


def _converted_alone(opened: TensorFile, name: str, module: nn.Module, key: str, new: str) -> Tensor:
    """Returns what diffusers makes of one tensor."""
    parts = converted(name, module, {key: opened.read(key)})
    return next(tensor for each, tensor in parts.items() if plain_name(each) == new)
