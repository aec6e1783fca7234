"""Loads adapters of any format into a pipeline to draw with, each at a scale.

A scale is a factor on what an adapter adds to the weights. Plain LoRAs stay layers beside the weights, which are not
rounded to a low precision with them. Layers of other kinds can neither stand beside each other nor be scaled in this
sense (the norm of a DoRA contains its scale), so those are merged into the weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from utils.formats.adapter_files import AdapterLayer
from utils.formats.adapter_names import Component
from utils.models.adapter_components import components_of
from utils.models.adapter_layers import MergedAdapters, check_layers, refuse_same, why_not_injected
from utils.models.loading import loading
from utils.models.lora_files import load_lora, read_checked

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class AdapterToLoad(NamedTuple):
    """An adapter to load.

    Attributes:
        source: its file or folder.
        scale: the factor on its change of the weights.
        what: the flag and its value, for messages.
        must_be_finite: whether NaN and infinite values are refused; otherwise they are warned of.
    """

    source: str
    scale: float
    what: str
    must_be_finite: bool = True


def add_adapters(pipeline: "DiffusionPipeline", adapters: Sequence[AdapterToLoad]) -> None:
    """Loads adapters, each checked completely; those of scale 0 too, which leave every bit as it was.

    Raises:
        UserError: if one can't be loaded, does not fit this pipeline completely, or has no effect.
    """
    # Pipelines of other families have only plain LoRAs, which diffusers reads.
    try:
        components = components_of(pipeline)
    except ValueError:
        _add_layers(pipeline, adapters)
        return

    # All are read the same way at every scale, so that no scale of a sweep is refused after another has been drawn.
    layers = [_read(each, components) for each in adapters]
    given = [(each.what, own) for each, own in zip(adapters, layers, strict=True) if each.must_be_finite]
    refuse_same(given)
    is_whole = len(adapters) == 1 and adapters[0].scale == 1 and why_not_injected(layers[0]) is None
    if is_whole or all(map(_is_plain, layers)):
        _add_layers(pipeline, adapters)
    else:
        _merge(pipeline, adapters, layers)


def _read(adapter: AdapterToLoad, components: Sequence[Component]) -> list[AdapterLayer]:
    with loading(adapter.what):
        return read_checked(Path(adapter.source), components, adapter.what).layers


def _is_plain(layers: Sequence[AdapterLayer]) -> bool:
    """Whether an adapter is a LoRA without a magnitude."""
    return all(layer.kind == "lora" and "magnitude" not in layer.tensors for layer in layers)


def _add_layers(pipeline: "DiffusionPipeline", adapters: Sequence[AdapterToLoad]) -> None:
    """Adds adapters as layers of their own, and takes those of scale 0 out again."""
    names = [f"adapter_{number}" for number in range(len(adapters))]
    for name, each in zip(names, adapters, strict=True):
        load_lora(pipeline, each.source, name, each.what, each.must_be_finite)
    acting = {name: each.scale for name, each in zip(names, adapters, strict=True) if each.scale != 0}
    if not acting:
        if adapters:
            pipeline.unload_lora_weights()
        return
    if idle := [name for name in names if name not in acting]:
        pipeline.delete_adapters(idle)
    if len(adapters) > 1 or set(acting.values()) != {1.0}:
        pipeline.set_adapters(list(acting), list(acting.values()))


def _merge(
    pipeline: "DiffusionPipeline", adapters: Sequence[AdapterToLoad], layers: Sequence[Sequence[AdapterLayer]]
) -> None:
    """Adds adapters, whose layers have been read, to the weights, which are rounded to their dtype once."""
    merged = MergedAdapters(pipeline)
    for number, (each, own) in enumerate(zip(adapters, layers, strict=True)):
        check_layers(own, each.what, each.must_be_finite)
        merged.add(f"adapter_{number}", own)
    merged.set_strengths({f"adapter_{number}": each.scale for number, each in enumerate(adapters)})
