"""Checks the adapters that tools write: reads them back, and compares bit for bit.

Files for UIs are read by the UIs' rules (`ui_reader`), which share no code with the writer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.config.library_errors import LOADING_ERRORS
from utils.config.options import first_line
from utils.exports.adapter_effect import UI_ROLES, allowed_difference, is_within
from utils.exports.tensor_check import Findings, same_bits, same_tensors
from utils.formats.adapter_files import AdapterLayer, by_place, read_adapter
from utils.formats.adapter_names import Component
from utils.formats.ui_reader import Place, UiUpdate, read_as_ui, ui_names

ROUNDED = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Relative to the largest value, for factors of lower precision that were scaled before they were rounded."""


@dataclass(frozen=True)
class Expected:
    """What an adapter's file should hold.

    Attributes:
        layers: the layers.
        components: the components of their base.
        dtype: dtype that the tensors were rounded to.
        blocks: names of the UNet's blocks, where the components have only some of its layers.
    """

    layers: Sequence[AdapterLayer]
    components: Sequence[Component]
    dtype: torch.dtype
    blocks: Sequence[str] = ()


def check_adapter(expected: Expected, file: Path, form: str) -> Findings:
    """Compares an adapter's file with what it should hold; `form` is kohya or diffusers."""
    found = Findings()
    try:
        check = _check_as_ui if form == "kohya" else _check_as_diffusers
        check(found, expected, file)
    except (*LOADING_ERRORS, KeyError) as error:
        found.faults.append(f"{file.name} can't be read back: {first_line(error)}")
    return found


def _check_as_ui(found: Findings, expected: Expected, file: Path) -> None:
    places = {component.name: number for number, component in enumerate(expected.components)}
    read = read_as_ui(file, _table(expected))
    wanted: dict[Place, AdapterLayer] = {(places[layer.component], layer.name): layer for layer in expected.layers}
    found.add(file.name, "are of no layer that UIs know", read.unknown)
    found.add(file.name, "are read by no UI", read.unread)
    found.add(file.name, "are missing", sorted(name for _, name in wanted.keys() - read.updates.keys()))
    found.add(file.name, "are of other layers", sorted(name for _, name in read.updates.keys() - wanted.keys()))
    common = wanted.keys() & read.updates.keys()
    different = [key[1] for key in common if not _is_same(wanted[key], read.updates[key], expected.dtype)]
    found.add(file.name, "are not the adapter's", sorted(different))
    found.num_tensors += sum(len(read.updates[key].values) for key in common)


def _table(expected: Expected) -> dict[str, Place]:
    """Returns the UIs' names of the layers; of a file whose names were kept, these are its own."""
    components = expected.components
    if len(components) == 1 and components[0].prefixes == ("",):
        return {layer: (0, layer) for layer in components[0].shapes}
    unet, *encoders = [component.shapes for component in components]
    return ui_names([*unet, *(f"{block}.0" for block in expected.blocks)], encoders)


def _is_same(layer: AdapterLayer, update: UiUpdate, dtype: torch.dtype) -> bool:
    """Whether a UI reads a layer's tensors, and computes its update."""
    for role, tensor in layer.tensors.items():
        name = UI_ROLES.get(role, role)
        if layer.has_whole_factors and name == "lokr_w1":
            continue  # UIs don't scale such an update, so its scale is in this factor
        wanted = _broadcast(tensor, len(layer.shape)) if role == "magnitude" else tensor
        if name not in update.values or not same_bits(wanted.to(dtype), update.values[name]):
            return False
    allowed = allowed_difference(layer, dtype)
    expected, computed = layer.delta(), update.delta(layer.shape)
    if expected.numel():
        allowed += ROUNDED.get(layer_dtype(layer), 0.0) * torch.linalg.vector_norm(expected, torch.inf)
    return is_within(computed, expected, allowed)


def _broadcast(magnitude: Tensor, dimensions: int) -> Tensor:
    """Returns a magnitude in the shape in which UIs can multiply a weight of so many dimensions by it."""
    shape = [1] * dimensions
    shape[magnitude.dim() - 1] = magnitude.numel()
    return magnitude.reshape(shape)


def layer_dtype(layer: AdapterLayer) -> torch.dtype:
    """Returns the dtype of a layer's tensors."""
    return next(iter(layer.tensors.values())).dtype


def _check_as_diffusers(found: Findings, expected: Expected, file: Path) -> None:
    read = by_place(read_adapter(file, expected.components).layers)
    wanted = by_place(expected.layers)
    found.add(file.name, "are missing", sorted(name for _, name in wanted.keys() - read.keys()))
    found.add(file.name, "are of other layers", sorted(name for _, name in read.keys() - wanted.keys()))
    common = wanted.keys() & read.keys()
    different = [key[1] for key in common if not _is_equal(wanted[key], read[key], expected.dtype)]
    found.add(file.name, "are not the adapter's", sorted(different))
    found.num_tensors += sum(len(read[key].tensors) for key in common)


def _is_equal(wanted: AdapterLayer, read: AdapterLayer, dtype: torch.dtype) -> bool:
    """Whether a layer was read with its scale, and its tensors bit for bit."""
    rounded = {role: each.to(dtype) for role, each in wanted.tensors.items()}
    return wanted.scale == read.scale and same_tensors(rounded, read.tensors)
