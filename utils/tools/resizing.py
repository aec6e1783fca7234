"""Shortens the updates of adapters to a smaller rank."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from utils.config.options import UserError
from utils.config.terminal import progress_bar
from utils.formats.adapter_files import AdapterLayer, adapter_sources
from utils.formats.adapter_names import Component
from utils.formats.tensor_files import TensorFile
from utils.models.loading import loading
from utils.models.streamed_components import NAMED, AdapterBase, layer_shape_of, tensors_by_layer
from utils.tools.adapters import Adapter, read_adapter_alone, read_for, write_adapter
from utils.tools.low_rank import Factors, factorize, shortened
from utils.tools.merging import lora_layer, say_losses
from utils.tools.resize_options import Options, ResizingOptions

logger = logging.getLogger(__name__)
FILE_ITSELF = "file"  # the component of all layers of a file whose names are kept


def resize(options: Options) -> None:
    """Writes the adapter of --source with smaller ranks, in its own names, and checks it.

    Raises:
        UserError: if it can't be read, or has layers that are not LoRA.
    """
    asked = options.resizing
    adapter, form = read_in_its_names(asked.source)
    others = sorted({layer.kind for layer in adapter.layers} - {"lora"})
    if others and not asked.to_lora:
        shown = " and ".join({"loha": "LoHa", "lokr": "LoKr"}[kind] for kind in others)
        raise UserError(
            f"{adapter.what} has {shown} layers, whose ranks mean something else; give --to_lora to make them LoRA"
        )
    if any("magnitude" in layer.tensors for layer in adapter.layers):
        logger.info("%s is a DoRA: its magnitudes stay as they are", adapter.what)
    layers = resized(adapter.layers, asked)
    title = Path(asked.source).resolve().stem
    write_adapter(replace(adapter, layers=layers, sources=(title,)), Path(asked.out), form, options.output)


def read_in_its_names(source: str) -> tuple[Adapter, str]:
    """Returns an adapter and the format to write it in, which is its own: kohya or diffusers.

    Names for UIs are kept as they are, so that the base need not be known.
    """
    what, path = f"--source {source}", Path(source)
    with loading(what):
        sources = adapter_sources(path, NAMED)
    if len(sources) == 1 and not sources[0].config:
        with loading(what), TensorFile(sources[0].path) as opened:
            groups = tensors_by_layer(opened)
        if groups and not any("." in owner for owner in groups):
            shapes = {owner: layer_shape_of(group) for owner, group in groups.items()}
            return read_for(sources[0].path, AdapterBase([Component(FILE_ITSELF, shapes, ("",))]), what), "kohya"
    return read_adapter_alone(source, None, "source"), "diffusers"


def resized(layers: Sequence[AdapterLayer], asked: ResizingOptions) -> list[AdapterLayer]:
    """Returns the layers with smaller ranks; those that are small enough stay bit for bit."""
    found, losses, kept = [], [], 0
    for layer in progress_bar(layers, desc="resizing", unit="layer", leave=False):
        if layer.kind == "lora":
            factors = shortened(layer.tensors["up"], layer.tensors["down"], asked.rank, asked.energy)
        else:
            factors = factorize(layer.delta(), asked.rank, asked.energy)
        losses.append((factors.kept * layer.scale**2, factors.total * layer.scale**2))
        if layer.kind == "lora" and factors.rank >= layer.rank:
            found.append(layer)
            kept += 1
        else:
            found.append(_with_factors(layer, factors))
    ranks = [layer.rank for layer in found]
    logger.info("%d layers have ranks %d to %d now; %d stay as they were", len(found), min(ranks), max(ranks), kept)
    say_losses(losses, [layer.name for layer in found])
    return found


def _with_factors(layer: AdapterLayer, factors: Factors) -> AdapterLayer:
    """Returns a LoRA layer of new factors; the ratio of a LoRA's alpha and rank stays."""
    found = lora_layer(layer.component, layer.name, factors, layer.shape)
    others = {role: tensor for role, tensor in layer.tensors.items() if role == "magnitude"}
    alpha = layer.scale * factors.rank if layer.kind == "lora" else found.alpha
    return replace(found, tensors={**found.tensors, **others}, alpha=alpha)
