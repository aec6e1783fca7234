"""What names in an adapter's file stand for: by the base's tensors, or without a base by what the file says itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from utils.config.options import UserError
from utils.formats.adapter_files import adapter_sources
from utils.formats.adapter_names import ATTENTION, WRAPPED, Component, split_name
from utils.formats.flat_names import dotted
from utils.formats.original_layout import unet_name, unet_places
from utils.formats.original_names import unet_layer
from utils.formats.tensor_files import TensorFile
from utils.models.adapter_components import adapted_names, layer_name
from utils.models.registry import FAMILIES_OF_TEXT
from utils.models.streamed_pipeline import StreamedPipeline
from utils.models.text_to_image import TextFamily

ORIGINAL = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
READS_TEXT = "attn2.to_k"
Owners = Mapping[tuple[str | None, str], tuple[int, ...]]
"""Shapes of the weights that an adapter changes, by (component if the file's place says it, layer's name)."""
NAMED = [
    Component(name, {}) for name in dict.fromkeys(each for family in FAMILIES_OF_TEXT for each in adapted_names(family))
]
"""All components that adapters can change, without their layers."""
EMBEDDINGS = ("token_embedding", "position_embedding")
VERSIONS = ("ss_base_model_version", "modelspec.architecture")
CURE = "give the pipeline that it is for with --pipeline"


@dataclass(frozen=True)
class AdapterBase:
    """What is known of the pipeline that an adapter is for.

    Attributes:
        components: its components that adapters can change; without a pipeline, the layers that the adapter has.
        architecture: its name in ModelSpec; None if it is not known.
        blocks: names of the UNet's blocks, where the components have only some of its layers.
        is_sure: whether it is known which family's names UIs want.
        prediction_type: its prediction type, as diffusers names it; None if it is not known.
        zero_snr: whether its noise schedule has zero terminal SNR.
    """

    components: list[Component]
    architecture: str | None = None
    blocks: tuple[str, ...] = ()
    is_sure: bool = True
    prediction_type: str | None = None
    zero_snr: bool = False


def base_of_streamed(pipeline: StreamedPipeline) -> AdapterBase:
    """Returns what adapters for a pipeline can be for."""
    schedule = {**pipeline.configs["scheduler"], "prediction_type": prediction_of(pipeline)}
    architecture = pipeline.family.original_model({**pipeline.configs, "scheduler": schedule}).architecture
    is_zero = bool(schedule.get("rescale_betas_zero_snr"))
    return AdapterBase(
        _components_of(pipeline), architecture, prediction_type=schedule["prediction_type"], zero_snr=is_zero
    )


def prediction_of(pipeline: StreamedPipeline) -> str:
    """Returns a pipeline's prediction type: what its scheduler or its file says, or what the weights of a file show."""
    said = pipeline.configs["scheduler"].get("prediction_type")
    guessed = None if said or pipeline.file is None else pipeline.file.looks_like_v2()
    return str(said or guessed or "epsilon")


def _components_of(pipeline: StreamedPipeline) -> list[Component]:
    found = []
    for name in adapted_names(pipeline.family):
        shapes = {
            weight.removesuffix(".weight"): each.shape
            for weight, each in pipeline.parts[name].items()
            if weight.endswith(".weight") and len(each.shape) > 1 and not weight.split(".")[-2].endswith(EMBEDDINGS)
        }
        is_denoiser = name == pipeline.family.denoiser_name
        original = _original_names(pipeline, name) if is_denoiser else {}
        follows = is_denoiser and pipeline.family.ui_names_are_original
        found.append(Component(name, shapes, pipeline.family.ui_prefixes.get(name, ()), original, follows))
    return found


def _original_names(pipeline: StreamedPipeline, part: str) -> dict[str, str]:
    try:
        tensors = pipeline.original_tensors(part)
    except UserError:  # a UNet that the original code can't have
        return {}
    names = {each.sources[0]: each.name for each in tensors if each.sources}
    return {own.removesuffix(".weight"): name.removesuffix(".weight") for own, name in names.items()}


def base_of_adapter(source: Path, what: str, ending: str = "") -> AdapterBase:
    """Returns what is known of an adapter's base, by the names, shapes and metadata of its file alone.

    Args:
        source: a file or folder.
        what: its flag and value, for messages.
        ending: see `adapter_sources`.

    Raises:
        UserError: if its names don't say which layers it is for.
        ValueError, OSError: if it can't be read.
    """
    owners: dict[tuple[str | None, str], tuple[int, ...]] = {}
    metadata: dict[str, str] = {}
    for each in adapter_sources(source, NAMED, ending):
        with TensorFile(each.path) as opened:
            metadata |= opened.metadata
            found = tensors_by_layer(opened)
        owners |= {(each.component, owner): layer_shape_of(group) for owner, group in found.items()}
    return _base(owners, metadata, what)


def tensors_by_layer(opened: TensorFile) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns the shapes of an adapter's tensors, by their layer's name in the file and their role there."""
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in opened.names:
        split = split_name(name)
        if split is not None:
            groups.setdefault(split[0], {})[split[1]] = opened.shape(name)
    return groups


def _base(owners: Owners, metadata: Mapping[str, str], what: str) -> AdapterBase:
    # The family, and the layer of each name.
    family, is_sure = _family(owners, metadata)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in adapted_names(family)}
    for (component, owner), shape in owners.items():
        found = _place(family, component, owner)
        if found is None:
            raise UserError(f"{what}: {owner} is the name of no layer that is known without its base; {CURE}")
        shapes[found[0]][found[1]] = shape

    # The UNet's layers in both layouts.
    denoiser = family.denoiser_name
    original: dict[str, str] = {}
    is_original = any(layer.startswith(ORIGINAL) for layer in shapes[denoiser])
    if is_original or (family.ui_names_are_original and shapes[denoiser]):
        if not _is_published(family, shapes, metadata):
            raise UserError(f"{what}: the file does not say which model it is for; {CURE}")
        try:
            shapes[denoiser], original = _in_both_layouts(shapes[denoiser], family.published_blocks)
        except ValueError as error:
            raise UserError(f"{what}: {error}, which the published models lack; {CURE}") from error
    components = [
        Component(
            name,
            layers,
            family.ui_prefixes.get(name, ()),
            original if name == denoiser else {},
            name == denoiser and family.ui_names_are_original,
        )
        for name, layers in shapes.items()
    ]
    blocks = tuple(unet_places(family.published_blocks)) if original else ()
    architecture = _architecture(family, shapes[denoiser], _is_published(family, shapes, metadata))
    return AdapterBase(components, architecture, blocks, is_sure)


def _is_published(
    family: type[TextFamily], shapes: Mapping[str, Mapping[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bool:
    """Whether an adapter is for a published model, as its widths say, or else its metadata."""
    widths = _widths(shapes[family.denoiser_name])
    if widths:
        return bool(widths & set(family.published_widths))
    return _has_its_inputs(family, shapes) or _is_named(family, metadata)


def _has_its_inputs(family: type[TextFamily], shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> bool:
    """Whether a layer has an input width that only the family's published models have."""
    return any(
        layer.endswith(end) and shape[1] == width
        for (component, end), width in family.published_inputs.items()
        for layer, shape in shapes.get(component, {}).items()
    )


def _is_named(family: type[TextFamily], metadata: Mapping[str, str]) -> bool:
    said = " ".join(metadata.get(key, "") for key in VERSIONS).lower()
    return any(word in said for word in family.words_in_metadata)


def _architecture(family: type[TextFamily], unet: Mapping[str, tuple[int, ...]], is_published: bool) -> str | None:
    """Returns the name of the published model that an adapter is for; None for another one."""
    widths = _widths(unet) & set(family.published_widths)
    if not widths and is_published and len(family.published_widths) == 1:
        widths = set(family.published_widths)
    if not widths:
        return None
    return family.original_model(
        {"text_encoder": {"hidden_size": min(widths)}, "unet": {}, "scheduler": {}}
    ).architecture


def _in_both_layouts(
    shapes: Mapping[str, tuple[int, ...]], blocks: Mapping[str, object]
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Returns the shapes of a UNet's layers by diffusers' names, and their original names.

    Raises:
        ValueError: if a UNet of these blocks does not have one.
    """
    places = unet_places(blocks)
    ours = {original: own for own, original in places.items()}
    own = {(unet_layer(name, ours) if name.startswith(ORIGINAL) else name): shape for name, shape in shapes.items()}
    return own, {name: unet_name(name, places) for name in own}


def _family(owners: Owners, metadata: Mapping[str, str]) -> tuple[type[TextFamily], bool]:
    """Returns the family that a file is for, and whether it says so: by its metadata, its names or its widths."""

    def evidence(family: type[TextFamily]) -> tuple[int, ...]:
        layers: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in adapted_names(family)}
        for key, shape in owners.items():
            if (place := _place(family, *key)) is not None:
                layers[place[0]][place[1]] = shape
        written = tuple(prefixes[0] for prefixes in family.ui_prefixes.values())
        unet = layers[family.denoiser_name]
        is_original = any(layer.startswith(ORIGINAL) for layer in unet)
        return (
            sum(map(len, layers.values())),
            _is_named(family, metadata),
            bool(_widths(unet) & set(family.published_widths)) or _has_its_inputs(family, layers),
            sum(owner.startswith(written) for _, owner in owners),
            is_original == family.ui_names_are_original,
        )

    found = {family: evidence(family) for family in FAMILIES_OF_TEXT}
    best = max(FAMILIES_OF_TEXT, key=found.__getitem__)
    is_tie = sum(each[:-1] == found[best][:-1] for each in found.values()) > 1
    has_hint = any(owner.endswith(READS_TEXT) or "." not in owner for _, owner in owners)
    return best, has_hint or not is_tie


def _widths(layers: Mapping[str, tuple[int, ...]]) -> set[int]:
    """Returns the widths of the text embeddings that the layers read."""
    return {shape[1] for layer, shape in layers.items() if layer.endswith(READS_TEXT)}


def _place(family: type[TextFamily], component: str | None, owner: str) -> tuple[str, str] | None:
    """Returns (component, layer) of a name, the layer in whichever layout it is named; None for an unknown name."""
    names = adapted_names(family)
    for name in names:
        for prefix in family.ui_prefixes.get(name, ()):
            if owner.startswith(prefix) and component is None:
                layer = dotted(owner.removeprefix(prefix))
                return None if layer is None else (name, layer)
    plain = owner.removeprefix(WRAPPED).replace(".processor.", ".")
    if component is None:
        component, _, plain = plain.partition(".")
    if component not in names or not plain:
        return None
    if component == family.denoiser_name:
        return component, f"{plain}.0" if plain.endswith(".to_out") else plain
    head, _, last = plain.rpartition(".")
    plain = f"{head}.{ATTENTION.get(last, last)}" if head else plain
    return component, layer_name(family, component, plain)


def layer_shape_of(group: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the shape of the weight that an update's tensors are for, flattened where they don't say it."""
    shape, magnitude = _product_shape(group), group.get("dora_scale", ())
    if len(shape) > 2 or len(magnitude) <= 2:
        return shape
    # The magnitudes of a convolution say that it is one; those of inputs also how large its kernel is.
    (out, inner), sides = shape, len(magnitude) - 2
    inputs = magnitude[1] if magnitude[0] != out else inner
    side = round((inner / max(inputs, 1)) ** (1 / sides))
    return (out, inputs, *[side] * sides) if inputs * side**sides == inner else (out, inner, *[1] * sides)


def _product_shape(group: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the shape of an update's product as its factors are stored."""
    if {"down", "up"} <= group.keys():
        return (group["up"][0], *group["down"][1:])
    if "hada_w1_a" in group and "hada_w1_b" in group:
        core = group.get("hada_t1")
        out = group["hada_w1_a"][0 if core is None else 1]
        return (out, group["hada_w1_b"][1], *(core[2:] if core else ()))
    halves = [_factor_shape(group, name) for name in ("lokr_w1", "lokr_w2")]
    if None in halves:
        return (0, 0)
    (first, second), rest = halves[0][:2], halves[1]
    return (first * rest[0], second * rest[1], *rest[2:])


def _factor_shape(group: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...] | None:
    """Returns the shape of a factor of LoKr, whole or a product; None if it is incomplete."""
    if name in group:
        return group[name]
    one, other = group.get(f"{name}_a"), group.get(f"{name}_b")
    core = group.get(name.replace("_w", "_t"))
    if one is None or other is None:
        return None
    return (one[0], *other[1:]) if core is None else (one[1], other[1], *core[2:])
