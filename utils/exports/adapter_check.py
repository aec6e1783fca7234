"""Checks that the files of an exported adapter are the run's, bit for bit, by readers that are not the writer.

The file for UIs is read by their rules (utils/formats/ui_reader.py) and by diffusers' key tables, and its updates are
applied by hand and compared with PEFT's. The files in diffusers' and PEFT's form are read by their own names.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from utils.config.file_names import LORA_FILE
from utils.config.library_errors import CONVERSION_ERRORS, LOADING_ERRORS
from utils.config.options import first_line
from utils.config.tensor_files import read_safetensors
from utils.exports.adapter_effect import (
    ROUNDING,
    UI_ROLES,
    allowed_difference,
    allowed_for_dora,
    has_same_rows,
    is_within,
)
from utils.exports.tensor_check import same_bits, same_tensors
from utils.formats.adapter_files import AdapterLayer, by_place, read_adapter
from utils.formats.adapter_names import Component, LayerNames, split_name
from utils.formats.ui_reader import Place, UiFile, UiUpdate, read_as_ui, ui_names
from utils.models.adapter_components import base_of, components_of
from utils.models.adapter_layers import modules_of
from utils.models.folder_form import NAMES_OF_DTYPES, num_overflowed, overflow_text
from utils.models.loading import names_of
from utils.models.lora_files import as_diffusers_names

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)
FLUSHED = 0.01  # share of the values that become 0 by rounding, from which on a warning says so
NAMES = {dtype: name for name, dtype in NAMES_OF_DTYPES.items()}


def check_adapter_files(
    layers: Sequence[AdapterLayer],
    pipeline: "DiffusionPipeline",
    own: Mapping[Path, torch.dtype],
    for_uis: Mapping[Path, torch.dtype],
    is_sharded: bool = False,
) -> list[str]:
    """Returns what is wrong with the files of an exported adapter, each fault in one line; empty if all is right.

    Args:
        layers: the run's layers.
        pipeline: the pipeline with the adapter in it as PEFT's layers; its weights are not changed.
        own: files or folders in diffusers' or PEFT's form, and the dtype of their tensors.
        for_uis: files in the names of UIs, and the dtype of their tensors.
        is_sharded: whether the pipeline's weights are spread over processes; then only the tensors are compared.
    """
    faults: list[str] = []
    components = components_of(pipeline)  # once for all files, since it builds an empty UNet
    for path, dtype in own.items():
        faults += _check_own(path, dtype, layers, pipeline, components)
    for path, dtype in for_uis.items():
        faults += _check_ui_file(path, dtype, layers, pipeline, components, is_sharded)
    return faults


def _check_own(
    path: Path,
    dtype: torch.dtype,
    layers: Sequence[AdapterLayer],
    pipeline: "DiffusionPipeline",
    components: Sequence[Component],
) -> list[str]:
    """Compares a file of diffusers, or folders of PEFT, with the run's layers."""
    try:
        found = by_place(read_adapter(path, components).layers)
    except LOADING_ERRORS as error:
        return [f"{path.name} can't be read back: {first_line(error)}"]
    wanted = by_place(layers)
    different = [
        _place_name(key)
        for key in wanted
        if key in found
        and (
            not same_tensors(found[key].tensors, _rounded(wanted[key].tensors, dtype))
            or abs(found[key].scale - wanted[key].scale) > ROUNDING * abs(wanted[key].scale)
        )
    ]
    faults = _faults(path.name, "are not the run's", different)
    faults += _faults(path.name, "are missing", [_place_name(key) for key in wanted if key not in found])
    faults += _faults(path.name, "are unknown", [_place_name(key) for key in found if key not in wanted])
    if layers[0].kind == "lora":
        faults += _check_by_diffusers(path / LORA_FILE if path.is_dir() else path, dtype, layers, pipeline, components)
    return faults


def _check_ui_file(
    file: Path,
    dtype: torch.dtype,
    layers: Sequence[AdapterLayer],
    pipeline: "DiffusionPipeline",
    components: Sequence[Component],
    is_sharded: bool,
) -> list[str]:
    """Reads a file as UIs do, and compares its tensors and its effect with the run's."""
    # By the UIs' rules: no key unknown, none unread, none missing.
    unet, *encoders = components
    order = [unet.name, *(each.name for each in encoders)]
    try:
        found = read_as_ui(file, ui_names(unet.shapes, [each.shapes for each in encoders]))
    except LOADING_ERRORS as error:
        return [f"{file.name} can't be read back: {first_line(error)}"]
    places = {(order.index(layer.component), layer.name): layer for layer in layers}
    faults = _faults(file.name, "are unknown to UIs", found.unknown)
    faults += _faults(file.name, "are read by no UI", found.unread)
    faults += _faults(
        file.name, "are missing", [f"{order[key[0]]}.{key[1]}" for key in places if key not in found.updates]
    )

    # Bits of the tensors, then the weights that they make.
    common = {key: layer for key, layer in places.items() if key in found.updates}
    faults += _check_values(file.name, found, common, dtype)
    if not faults and not is_sharded:
        modules = dict(zip(common, modules_of(pipeline, list(common.values())), strict=True))
        faults += _check_effects(file.name, found, common, modules, dtype)
    if layers[0].kind == "lora":
        faults += _check_by_diffusers(file, dtype, layers, pipeline, components)
    return faults


def _check_values(where: str, found: UiFile, places: Mapping[Place, AdapterLayer], dtype: torch.dtype) -> list[str]:
    """Compares the tensors of a file for UIs with the run's, rounded once, bit for bit."""
    different: list[str] = []
    overflowed: dict[str, int] = {}
    num_flushed = num_values = 0
    for key, layer in places.items():
        update = found.updates[key]
        values = {role: tensor.float() for role, tensor in layer.tensors.items()}
        is_whole = layer.has_whole_factors
        if is_whole:  # UIs do not scale such updates
            values["lokr_w1"] = values["lokr_w1"] * layer.scale
        rounded = _rounded(values, dtype)
        if count := sum(num_overflowed(values[role].cpu(), each) for role, each in rounded.items()):
            overflowed[layer.name] = count
        num_values += sum(each.numel() for each in rounded.values())
        num_flushed += sum(int(((values[role].cpu() != 0) & (each == 0)).sum()) for role, each in rounded.items())
        wanted = {UI_ROLES.get(role, role): each for role, each in rounded.items()}
        alpha_is_right = is_whole or update.alpha == torch.tensor(layer.alpha, dtype=torch.float32).item()
        if not alpha_is_right or not same_tensors(_flat(update.values), _flat(wanted)):
            different.append(layer.name)
    if num_flushed > FLUSHED * num_values:
        cure = "; give --export_dtype bf16" if dtype == torch.float16 else ""
        logger.warning(
            "%s: %s values of %s are 0 in %s, because they are too small for it%s",
            *(where, f"{num_flushed:,}", f"{num_values:,}", NAMES.get(dtype, dtype), cure),
        )
    faults = _faults(where, "are not the run's", different)
    return faults + ([f"{where}: {overflow_text(overflowed)}"] if overflowed else [])


def _check_effects(
    where: str,
    found: UiFile,
    places: Mapping[Place, AdapterLayer],
    modules: Mapping[Place, nn.Module],
    dtype: torch.dtype,
) -> list[str]:
    """Applies a file for UIs by hand, and compares with what PEFT makes of the run's adapter.

    The tensors and alphas of all layers were compared bit for bit before; this is about how they are multiplied, which
    is the same for all layers of one form. Therefore all outputs are computed, by PEFT itself, for one layer of each
    form (kind, tensors, and their shapes), and a few outputs, from PEFT's tensors and scale, for the others.
    """
    different: list[str] = []
    forms: set[tuple[object, ...]] = set()
    for key, layer in places.items():
        form = (layer.kind, layer.shape, *sorted((role, each.shape) for role, each in layer.tensors.items()))
        is_same = _has_same_outputs if form in forms else _has_same_effect
        forms.add(form)
        if hasattr(modules[key], "get_delta_weight") and not is_same(
            found.updates[key], _held(layer, modules[key]), modules[key], dtype
        ):
            different.append(layer.name)
    return _faults(where, "change the weights in another way than the run", different)


def _held(layer: AdapterLayer, module: nn.Module) -> AdapterLayer:
    """Returns a layer with the tensors and the scale that PEFT's module has."""
    adapter = next(iter(module.r))
    if layer.kind == "lora":
        tensors = {"down": module.lora_A[adapter].weight, "up": module.lora_B[adapter].weight}
        if "magnitude" in layer.tensors:
            tensors["magnitude"] = module.lora_magnitude_vector[adapter].weight.flatten()
    else:
        tensors = {role: getattr(module, role)[adapter] for role in layer.tensors}
    return replace(
        layer,
        tensors={role: tensor.detach() for role, tensor in tensors.items()},
        alpha=module.scaling[adapter] * layer.rank,
    )


def _base_weight(layer: AdapterLayer, module: nn.Module) -> Tensor | None:
    """Returns the weight that the layer's magnitude is for; None without a magnitude, or if it is quantized."""
    weight = base_of(module).weight
    is_plain = weight.shape == torch.Size(layer.shape) and weight.is_floating_point()
    return weight.detach() if is_plain and "magnitude" in layer.tensors else None


def _has_same_outputs(update: UiUpdate, layer: AdapterLayer, module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether an update changes a few outputs of a layer as PEFT's tensors do, up to rounding."""
    return has_same_rows(update, layer, _base_weight(layer, module), dtype)


@torch.no_grad()
def _has_same_effect(update: UiUpdate, layer: AdapterLayer, module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether an update changes a layer's weight as PEFT does, up to rounding: of float32, or of the file's dtype."""
    adapter = next(iter(module.r))
    wanted = module.get_delta_weight(adapter).detach().float().cpu()
    weight = _base_weight(layer, module)
    if weight is None:
        return is_within(update.delta(layer.shape), wanted, allowed_difference(layer, dtype))
    weight = weight.float().cpu()
    held = module.lora_magnitude_vector[adapter]
    length = held.get_weight_norm(weight, wanted, scaling=1)
    magnitude = held.weight.detach().float().cpu()
    others = [1] * (weight.dim() - 1)
    wanted = (magnitude.flatten() / length.flatten()).reshape(-1, *others) * (weight + wanted)
    return is_within(update.merged(weight), wanted, allowed_for_dora(layer, weight, dtype))


def _check_by_diffusers(
    file: Path,
    dtype: torch.dtype,
    layers: Sequence[AdapterLayer],
    pipeline: "DiffusionPipeline",
    components: Sequence[Component],
) -> list[str]:
    """Reads a LoRA file by diffusers' key tables, and compares the matrices that it finds for each layer."""
    try:
        tensors, _ = as_diffusers_names(pipeline, dict(read_safetensors(file)))
    except (*LOADING_ERRORS, *CONVERSION_ERRORS) as error:
        return [f"{file.name} can't be converted by diffusers: {first_line(error)}"]
    names = LayerNames(components)
    wanted = by_place(layers)
    found: set[tuple[tuple[str, str], str]] = set()
    different, unknown = [], []
    for name, tensor in tensors.items():
        owner, role = split_name(name) or (name, "")
        key = names.find(owner, None)
        if key not in wanted or role not in ("down", "up", "magnitude"):
            unknown.append(name)
            continue
        found.add((key, role))
        if not same_bits(tensor.flatten(), wanted[key].tensors[role].to(dtype).cpu().flatten()):
            different.append(name)
    missing = [_place_name(key) for key in wanted if not {(key, "down"), (key, "up")} <= found]
    where = f"{file.name} as diffusers reads it"
    return [
        *_faults(where, "are unknown", unknown),
        *_faults(where, "are not the run's", different),
        *_faults(where, "are missing", missing),
    ]


def _rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {role: tensor.detach().cpu().to(dtype) for role, tensor in tensors.items()}


def _flat(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors without dimensions of size 1, which tools write differently, and do not read."""
    return {name: tensor.squeeze() for name, tensor in tensors.items()}


def _place_name(key: tuple[str, str]) -> str:
    return f"{key[0]}.{key[1]}"


def _faults(where: str, what: str, names: Iterable[str]) -> list[str]:
    """Returns a fault that names share, in one line; none without names."""
    every = list(names)
    return [f"{where}: {len(every)} layers or tensors {what}: {names_of(every)}"] if every else []
