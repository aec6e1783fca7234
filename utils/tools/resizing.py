"""Shortens the updates of adapters to a smaller rank."""

import logging
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from utils.config.options import UserError
from utils.config.terminal import progress_bar
from utils.formats.adapter_files import KINDS, AdapterLayer, adapter_sources
from utils.formats.adapter_names import Component, LayerNames
from utils.formats.tensor_files import TensorFile
from utils.models.loading import loading, names_of
from utils.models.streamed_components import NAMED, AdapterBase, base_of_streamed, layer_shape_of, tensors_by_layer
from utils.models.streamed_pipeline import read_streamed
from utils.tools.adapters import Adapter, read_adapter_alone, read_for, write_adapter
from utils.tools.low_rank import Factors, factorize, shortened
from utils.tools.merging import lora_layer, say_losses
from utils.tools.resize_options import Options, ResizingOptions

logger = logging.getLogger(__name__)
FILE_ITSELF = "file"  # the component of all layers of a file whose names are kept
LARGE_KERNEL = re.compile(
    r"(.*[_.])?(conv1|conv2|conv_in|conv_out|samplers[_.]\d+[_.]conv|in_layers_2|out_layers_3|input_blocks_\d+_0_op"
    r"|output_blocks_\d+_\d_conv|input_blocks_0_0|unet_out_2)"
)
"""Names of the layers of UNets that are convolutions of more than one place."""


def resize(options: Options) -> None:
    """Writes the adapter of --source with smaller ranks, in its own names, and checks it.

    Raises:
        UserError: if it can't be read, or has layers that are not LoRA.
    """
    asked = options.resizing
    adapter, form = read_in_its_names(asked.source, asked.pipeline)
    others = sorted({layer.kind for layer in adapter.layers} - {"lora"})
    if others and not asked.to_lora:
        shown = " and ".join(KINDS[kind] for kind in others)
        raise UserError(
            f"{adapter.what} has {shown} layers, whose ranks mean something else; give --to_lora to make them LoRA"
        )
    _refuse_flattened(adapter, [layer for layer in adapter.layers if layer.kind != "lora"])
    if any("magnitude" in layer.tensors for layer in adapter.layers):
        logger.info("%s is a DoRA: its magnitudes stay as they are", adapter.what)
    layers = resized(adapter.layers, asked)
    title = Path(asked.source).resolve().stem
    write_adapter(replace(adapter, layers=layers, sources=(title,)), Path(asked.out), form, options.output)


def _refuse_flattened(adapter: Adapter, layers: Sequence[AdapterLayer]) -> None:
    """Refuses convolutions whose kernel is not known: a LoRA of them needs it."""
    names = [layer.name for layer in layers if LARGE_KERNEL.fullmatch(layer.name) and math.prod(layer.shape[2:]) == 1]
    if names:
        raise UserError(
            f"{adapter.what} does not say the kernel of {len(names)} convolutions, which a LoRA of them needs: "
            f"{names_of(names)}; give the pipeline that it is for with --pipeline"
        )


def read_in_its_names(source: str, base: str | None = None) -> tuple[Adapter, str]:
    """Returns an adapter and the format to write it in, which is its own: kohya or diffusers.

    Names for UIs are kept as they are, so that the base need not be known; if it is, it decides the layers' shapes.
    """
    what, path = f"--source {source}", Path(source)
    with loading(what):
        sources = adapter_sources(path, NAMED)
    if len(sources) == 1 and not sources[0].config:
        with loading(what), TensorFile(sources[0].path) as opened:
            groups = tensors_by_layer(opened)
        if groups and not any("." in owner for owner in groups):
            shapes = {owner: layer_shape_of(group) for owner, group in groups.items()}
            shapes |= {} if base is None else _shapes_in(base, groups, what)
            return read_for(sources[0].path, AdapterBase([Component(FILE_ITSELF, shapes, ("",))]), what), "kohya"
    return read_adapter_alone(source, base, "source"), "diffusers"


def _shapes_in(base: str, owners: Collection[str], what: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the layers that names for UIs stand for in a pipeline."""
    with loading(what):
        components = base_of_streamed(read_streamed(base, "--pipeline")).components
    names, by_name = LayerNames(components), {each.name: each.shapes for each in components}
    places = {owner: names.find(owner, None) for owner in owners}
    unknown = [owner for owner, place in places.items() if place is None]
    if unknown:
        raise UserError(f"{what} has layers that --pipeline {base} lacks: {names_of(unknown)}; give its own pipeline")
    return {owner: by_name[place[0]][place[1]] for owner, place in places.items() if place is not None}


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
