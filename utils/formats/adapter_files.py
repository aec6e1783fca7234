"""Reads files of adapters into one record, whatever tool wrote them.

Read are LoRA, DoRA, LoHa and LoKr in the names of kohya's sd-scripts, LyCORIS, diffusers and PEFT. The updates:
LoRA (Hu et al. 2021) W + s B A; DoRA (Liu et al. 2024) m (W + s B A) / |W + s B A|; LoHa (Hyeon-Woo et al. 2022)
W + s (A1 B1) * (A2 B2); LoKr (Edalati et al. 2022) W + s kron(W1, W2), with s = alpha / rank.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from utils.config.file_names import LORA_FILE
from utils.config.tensor_files import open_safetensors
from utils.config.terminal import one_line
from utils.config.user_files import FileError, parse_json, read_json
from utils.formats.adapter_names import (
    OF_PIPELINES,
    WRAPPED,
    Component,
    LayerNames,
    component_of_names,
    kind_not_read,
    split_name,
)

PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"  # of diffusers, in the header of its LoRA files
UI_FOLDER = "ui"
MODELS_BY_WIDTH = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
"""The model that a UNet belongs to, by the width of its text embeddings."""
KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}
WHOLE_PIPELINE = "it is a whole pipeline; give the file or folder of an adapter"
SAME = 0.002  # relative difference of updates that only differ in the rounding to float16
SHOWN, LONGEST_NAME = 3, 120  # names in a message, and characters of each
NEEDED = {"lora": ({"down"}, {"up"}), "loha": ({"hada_w1_a"}, {"hada_w1_b"}, {"hada_w2_a"}, {"hada_w2_b"})}
"""Tensors without which an update of a kind is not complete; those of LoKr depend on which factors are whole."""


@dataclass(frozen=True)
class AdapterLayer:
    """The update of one layer.

    Attributes:
        component: the component's name in the pipeline.
        name: the layer's name in the component's file, with `text_model.` in text encoders.
        kind: lora, loha or lokr.
        tensors: of a LoRA `down` [rank, in, ...] and `up` [out, rank, ...], of others by LyCORIS' names; with
            `magnitude`, of shape [out] or [1, in], of a weight-decomposed update (DoRA).
        rank: the rank, by which alpha is divided.
        alpha: alpha; with rank-stabilized scaling it is alpha times the root of the rank.
        shape: shape of the layer's weight.
    """

    component: str
    name: str
    kind: str
    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float
    shape: tuple[int, ...]

    @property
    def scale(self) -> float:
        """The factor on the product of the tensors."""
        return self.alpha / self.rank

    @property
    def has_whole_factors(self) -> bool:
        """Whether both factors of a LoKr update are whole; tools other than PEFT apply no alpha to such layers."""
        return self.kind == "lokr" and {"lokr_w1", "lokr_w2"} <= set(self.tensors)

    def delta(self) -> Tensor:
        """Returns the scaled product in float32, in the shape of the layer's weight; without a magnitude."""
        values = {role: tensor.float() for role, tensor in self.tensors.items()}
        product = {"lora": _lora_product, "loha": _loha_product, "lokr": _lokr_product}[self.kind](values)
        return product.mul_(self.scale).reshape(self.shape)

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """Returns a weight with this update, computed in float32.

        Args:
            weight: the layer's weight.
            strength: factor on the update; with a magnitude, the part of the way from `weight` to the full update.
        """
        weight = weight.float()
        magnitude = self.tensors.get("magnitude")
        if magnitude is None:
            return weight + strength * self.delta().to(weight.device)
        summed = weight + self.delta().to(weight.device)
        others = [1] * (weight.dim() - 2)
        if magnitude.dim() == 1:  # one number for each output
            lengths = torch.linalg.vector_norm(summed.flatten(1), dim=1).reshape(-1, 1, *others)
            magnitude = magnitude.reshape(-1, 1, *others)
        else:  # one for each input
            lengths = torch.linalg.vector_norm(summed.transpose(0, 1).flatten(1), dim=1).reshape(1, -1, *others)
            magnitude = magnitude.reshape(1, -1, *others)
        full = summed * (magnitude.float().to(weight.device) / lengths)
        return full if strength == 1.0 else weight + strength * (full - weight)

    def change(self, weight: Tensor | None) -> Tensor:
        """Returns what this update adds to a weight, in float32; only one with a magnitude needs the weight."""
        if "magnitude" not in self.tensors:
            return self.delta()
        return self.merged(weight) - weight.float()


def by_place(layers: Iterable[AdapterLayer]) -> dict[tuple[str, str], AdapterLayer]:
    """Returns layers by component and name."""
    return {(layer.component, layer.name): layer for layer in layers}


def by_component(layers: Iterable[AdapterLayer]) -> dict[str, list[AdapterLayer]]:
    """Returns layers by component."""
    found: dict[str, list[AdapterLayer]] = {}
    for layer in layers:
        found.setdefault(layer.component, []).append(layer)
    return found


def updated(weight: Tensor, updates: Sequence[tuple[AdapterLayer, float]]) -> Tensor:
    """Returns a weight with updates: W + sum of strength * (update(W) - W), each relative to the weight itself.

    Args:
        weight: the layer's weight, without any update.
        updates: pairs (update, strength); their order does not matter, since they are added in float64.

    Returns:
        The weight, to be rounded once: as it is without updates of a strength, float32 with one, float64 on the
        CPU with more.
    """
    acting = [(layer, strength) for layer, strength in updates if strength]
    if not acting:
        return weight
    if len(acting) == 1:
        return acting[0][0].merged(weight, acting[0][1])
    changes = (strength * layer.change(weight).cpu().double() for layer, strength in acting)
    return weight.cpu().double() + sum(changes)


def is_same_adapter(layers: Sequence[AdapterLayer], others: Sequence[AdapterLayer]) -> bool:
    """Whether two adapters change the same layers alike, up to the rounding of a file in half precision."""
    own, other = by_place(layers), by_place(others)
    return bool(own) and own.keys() == other.keys() and all(_is_same(layer, other[key]) for key, layer in own.items())


def _is_same(layer: AdapterLayer, other: AdapterLayer) -> bool:
    pairs = [(layer.delta(), other.delta())]
    magnitudes = [each.tensors.get("magnitude") for each in (layer, other)]
    if (magnitudes[0] is None) != (magnitudes[1] is None):
        return False
    if magnitudes[0] is not None and magnitudes[1] is not None:
        pairs.append((magnitudes[0].float().flatten(), magnitudes[1].float().flatten()))
    return all(a.shape == b.shape and float((a - b).norm()) <= SAME * float(a.norm()) for a, b in pairs)


def _lora_product(values: Mapping[str, Tensor]) -> Tensor:
    return values["up"].flatten(1) @ values["down"].flatten(1)


def _loha_product(values: Mapping[str, Tensor]) -> Tensor:
    halves = [_factor(values, f"hada_w{number}", values.get(f"hada_t{number}")) for number in (1, 2)]
    return halves[0] * halves[1]


def _lokr_product(values: Mapping[str, Tensor]) -> Tensor:
    first, second = _factor(values, "lokr_w1", None), _factor(values, "lokr_w2", values.get("lokr_t2"))
    return torch.kron(first.reshape(*first.shape, *[1] * (second.dim() - 2)), second.contiguous())


def _factor(values: Mapping[str, Tensor], name: str, core: Tensor | None) -> Tensor:
    """Returns a factor: whole, a product of two matrices, or of a core and two matrices (Tucker)."""
    if name in values:
        return values[name]
    one, other = values[f"{name}_a"], values[f"{name}_b"]
    if core is None:
        return one @ other
    return torch.einsum("i j k l, i p, j r -> p r k l", core, one, other)


@dataclass(frozen=True)
class _Source:
    """A file of an adapter.

    Attributes:
        path: the file.
        config: PEFT's config of all its layers; empty if it has none.
        component: the component that its layers are of, if their names do not say it.
    """

    path: Path
    config: Mapping[str, object] = field(default_factory=dict)
    component: str | None = None


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as stored: its layers, and the metadata of its file.

    Attributes:
        layers: the layers, in the order of components and names.
        metadata: the metadata of the header.
        files: the files that were read.
    """

    layers: list[AdapterLayer]
    metadata: Mapping[str, str]
    files: tuple[Path, ...] = ()

    @property
    def kinds(self) -> set[str]:
        """The kinds of its layers: lora, loha, lokr."""
        return {layer.kind for layer in self.layers}

    @cached_property
    def by_component(self) -> dict[str, list[AdapterLayer]]:
        """Its layers by component."""
        return by_component(self.layers)


def read_adapter(source: Path, components: Sequence[Component], ending: str = "") -> AdapterFile:
    """Reads an adapter in any of the formats: a file, or a folder that contains one.

    Args:
        source: a safetensors file; or a folder with a LoRA file of diffusers, a PEFT folder, a folder with PEFT folders
            named by component, or a folder with only one safetensors file.
        components: what its names can stand for.
        ending: see `adapter_sources`.

    Raises:
        ValueError, OSError, SafetensorError: if it can't be read, or not completely, with the reason.
    """
    layers: list[AdapterLayer] = []
    metadata: dict[str, str] = {}
    sources = adapter_sources(source, components, ending)
    for each in sources:
        with open_safetensors(each.path) as opened:
            metadata |= opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        layers += adapter_layers(tensors, components, _configs(each, metadata), each.component)
    order = [component.name for component in components]
    layers.sort(key=lambda layer: (order.index(layer.component), layer.name))
    return AdapterFile(layers, metadata, tuple(each.path for each in sources))


def adapter_sources(source: Path, components: Sequence[Component], ending: str = "") -> list[_Source]:
    """Finds the files of an adapter.

    Args:
        source: see `read_adapter`.
        components: see `read_adapter`.
        ending: what the names of PEFT folders have behind the component's, such as _ema.

    Raises:
        ValueError: if there is none, or more than one.
    """
    # A file, with PEFT's config beside it.
    if not source.is_dir():
        has_config = source.name == PEFT_FILE or (source.parent / PEFT_CONFIG).is_file()
        return [_Source(source, _peft_config(source.parent) if has_config and _is_wrapped(source) else {})]

    # A folder of a known layout.
    if (source / LORA_FILE).is_file():
        return [_Source(source / LORA_FILE)]
    if (source / PEFT_FILE).is_file():
        return [_Source(source / PEFT_FILE, _peft_config(source))]
    folders = {each.name: source / (each.name + ending) for each in components}
    folders = {name: folder for name, folder in folders.items() if (folder / PEFT_FILE).is_file()}
    if folders:
        return [_Source(folder / PEFT_FILE, _peft_config(folder), name) for name, folder in folders.items()]

    # Any other folder.
    if (source / "model_index.json").is_file():
        raise ValueError(WHOLE_PIPELINE)
    found = sorted(source.glob("*.safetensors")) or sorted((source / UI_FOLDER).glob("*.safetensors"))
    if not found:
        raise ValueError("the folder has no file of an adapter; give the file")
    if len(found) > 1:
        raise ValueError(
            f"the folder has {len(found)} safetensors files, {shown(each.name for each in found)}; give one"
        )
    return [_Source(found[0])]


def _is_wrapped(file: Path) -> bool:
    """Whether a file has the names of PEFT's own files."""
    with open_safetensors(file) as opened:
        return all(name.startswith(WRAPPED) for name in opened.keys())  # noqa: SIM118


def _peft_config(folder: Path) -> Mapping[str, object]:
    file = folder / PEFT_CONFIG
    if not file.is_file():
        raise ValueError(f"{PEFT_CONFIG} is missing beside {PEFT_FILE}; without it the scale of its layers is unknown")
    config = read_json(file)
    if not isinstance(config, dict):
        raise FileError(file, "is not a JSON object")
    return config


def _configs(source: _Source, metadata: Mapping[str, str]) -> dict[str, Mapping[str, object]]:
    """Returns the adapters' configs by component; "" for all that have none of their own."""
    if source.config:
        return {"": source.config}
    stored = metadata.get(METADATA_KEY)
    held = None if stored is None else parse_json(stored, METADATA_KEY)
    found: dict[str, dict[str, object]] = {}
    for name, value in held.items() if isinstance(held, dict) else ():
        component, _, key = name.partition(".")
        found.setdefault(component, {})[key] = value
    return dict(found)


def adapter_layers(
    tensors: Mapping[str, Tensor],
    components: Sequence[Component],
    configs: Mapping[str, Mapping[str, object]],
    component: str | None = None,
) -> list[AdapterLayer]:
    """Groups the tensors of a file by layer.

    Args:
        tensors: tensors by their names in the file.
        components: what the names can stand for.
        configs: PEFT's configs by component, of files without alphas; "" for any component.
        component: the component that all names are of, if they do not say it.

    Raises:
        ValueError: if a tensor is of an unknown kind, is for no layer, has another shape, or is missing.
    """
    split = _split_names(tensors)
    owners = sorted({owner for owner, _ in split.values()})
    names = LayerNames(components)
    if component is None and not any(names.find(owner, None) for owner in owners):
        component = component_of_names(owners, components)
    found = {owner: names.find(owner, component) for owner in owners}

    # Group them by layer; two spellings of one layer are two updates.
    grouped: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, (owner, role) in split.items():
        if found[owner] is None:
            continue
        group = grouped.setdefault(found[owner], {})
        if role in group:
            raise ValueError(f"it has two updates of the layer {found[owner][1]} of the {found[owner][0]}")
        group[role] = tensors[name]

    # Build the layers, which must be complete and fit.
    by_name = {each.name: each for each in components}
    layers = [
        _layer(key, group, by_name[key[0]].shapes[key[1]], configs.get(key[0], configs.get("", {})))
        for key, group in grouped.items()
    ]
    _check_fit(layers, [owner for owner in owners if found[owner] is None])
    return [_as_the_layer(layer) for layer in layers]


def _split_names(names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Splits the tensors' names into layer and role.

    Raises:
        ValueError: for tensors of kinds that are not read.
    """
    if any(name.startswith(OF_PIPELINES) for name in names):
        raise ValueError(WHOLE_PIPELINE)
    split = {name: split_name(name) for name in names}
    for name, parts in split.items():
        kind = kind_not_read(name) if parts is None else None
        if kind is not None:
            raise ValueError(
                f"it contains {shown([name])}: it is a {kind} file of another tool, which is not supported; merge it "
                "into its base model with the tool that made it, and start from the result"
            )
    unknown = sorted(name for name, parts in split.items() if parts is None)
    if unknown:
        raise ValueError(f"{len(unknown)} of its {len(split)} tensors are not of an adapter: {shown(unknown)}")
    if not split:
        raise ValueError("it has no tensors")
    return {name: parts for name, parts in split.items() if parts is not None}


def _layer(
    key: tuple[str, str], group: Mapping[str, Tensor], shape: tuple[int, ...], config: Mapping[str, object]
) -> AdapterLayer:
    """Builds a layer's update of its tensors, with the rank and alpha that its tool gives it."""
    tensors = {role: tensor for role, tensor in group.items() if role not in ("alpha", "dora_scale", "magnitude")}
    marks = {"hada_": "loha", "lokr_": "lokr"}
    kind = next((kind for mark, kind in marks.items() if any(role.startswith(mark) for role in group)), "lora")
    _check_complete(f"{key[0]}: {{}} of the update of {key[1]}", kind, tensors)
    tensors |= _magnitude(group, shape)
    stored = None if "alpha" not in group else float(group["alpha"].flatten()[0])
    rank = _rank(key[1], tensors, config)
    if config:  # PEFT's
        return AdapterLayer(*key, kind, tensors, rank, _alpha(key[1], config, rank), shape)
    if {"lokr_w1", "lokr_w2"} <= set(tensors):  # without a scale; LyCORIS stores the rank as alpha
        rank = max(1, round(stored)) if stored is not None and math.isfinite(stored) else 1
        return AdapterLayer(*key, kind, tensors, rank, float(rank), shape)
    return AdapterLayer(*key, kind, tensors, rank, float(rank) if stored is None else stored, shape)


def _magnitude(group: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Returns the magnitude of a weight-decomposed update as [out] or [1, in]; LyCORIS has both."""
    if "magnitude" in group:
        return {"magnitude": group["magnitude"].flatten()}
    if "dora_scale" not in group:
        return {}
    given = group["dora_scale"]
    is_by_input = given.dim() > 1 and given.shape[0] == 1 and shape[0] != 1 and given.numel() == shape[1]
    return {"magnitude": given.reshape(1, -1) if is_by_input else given.flatten()}


def _check_complete(said: str, kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuses an update of which a tensor is missing, or that has tensors of two kinds."""
    pairs = {name: (f"{name}_a", f"{name}_b") for name in ("lokr_w1", "lokr_w2")}
    needed = [{name} for each in NEEDED.get(kind, ()) for name in each]
    if kind == "lokr":
        needed = [{name} if name in tensors else {*pair} for name, pair in pairs.items()]
    wanted = set().union(*needed)
    if {"hada_t1", "hada_t2"} & set(tensors):
        wanted |= {"hada_t1", "hada_t2"}
    known = wanted | ({"lokr_t2"} if "lokr_w2_a" in tensors else set())
    if kind == "lora" and len({"down", "up"} & set(tensors)) == 1:
        raise ValueError(said.format("it has only one half"))
    if missing := sorted(wanted - set(tensors)):
        raise ValueError(said.format(f"it lacks {', '.join(missing)}"))
    if odd := sorted(set(tensors) - known):
        raise ValueError(said.format(f"it has tensors of another kind, {', '.join(odd)},"))


def _rank(name: str, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> int:
    """Returns the number by which a layer's alpha is divided: the inner dimension of the factors."""
    if "down" in tensors:
        return int(tensors["down"].shape[0])
    for role in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if role in tensors:
            return int(tensors[role].shape[0])
    return int(_patterned(config.get("rank_pattern"), name, config.get("r", 1)))


def _alpha(name: str, config: Mapping[str, object], rank: int) -> float:
    """Returns a layer's alpha from PEFT's config."""
    given = _patterned(config.get("alpha_pattern"), name, config.get("lora_alpha", config.get("alpha", rank)))
    return float(given) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _patterned(patterns: object, name: str, default: object) -> float:
    """Returns the value for a layer from PEFT's table of patterns, which match ends of names."""
    if isinstance(patterns, Mapping) and name in patterns:
        return float(patterns[name])
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        if any(re.match(rf"(.*\.)?({pattern})$", each) for each in (name, name.removeprefix("text_model."))):
            return float(value)
    if not isinstance(default, int | float):
        raise ValueError(f"its {PEFT_CONFIG} has no number as rank or alpha")
    return float(default)


def _check_fit(layers: Sequence[AdapterLayer], homeless: Sequence[str]) -> None:
    """Refuses updates whose products have another size than the layer's weight, or that are for no layer."""
    wrong = [layer for layer in layers if not _fits(layer)]
    if not wrong and not homeless:
        return
    total = len(layers) + len(homeless)
    said = []
    if wrong:
        said.append(f"{len(wrong)} of its {total} layers have other shapes: {shown([each.name for each in wrong])}")
    if homeless:
        said.append(f"{len(homeless)} of its {total} layers are not in this model: {shown(homeless)}")
    kinds = {layer.kind for layer in layers}
    kind = KINDS[kinds.pop()] if len(kinds) == 1 else "adapter"
    raise ValueError(f"it is a {kind} for another model: {' and '.join(said)}{_widths(layers)}")


def _widths(layers: Sequence[AdapterLayer]) -> str:
    """Says which widths of text embeddings the file and the model have, if they differ."""
    reading = [layer for layer in layers if layer.name.endswith("attn2.to_k") and "down" in layer.tensors]
    theirs, ours = {layer.tensors["down"].shape[1] for layer in reading}, {layer.shape[1] for layer in reading}
    return other_width(theirs, ours)


def other_width(theirs: set[int], ours: set[int]) -> str:
    """Says which widths of text embeddings a file and the model have; nothing unless each has one, and they differ."""
    if len(theirs) == len(ours) == 1 and theirs != ours:
        return f"; it reads text embeddings of width {_named(*theirs)}, this model's have width {_named(*ours)}"
    return ""


def _named(width: int) -> str:
    return f"{width} ({MODELS_BY_WIDTH[width]})" if width in MODELS_BY_WIDTH else str(width)


def _fits(layer: AdapterLayer) -> bool:
    """Whether an update can be added to its layer's weight, judged by the shapes alone."""
    meta = {role: torch.empty(tensor.shape, device="meta") for role, tensor in layer.tensors.items()}
    magnitude = meta.pop("magnitude", None)
    if magnitude is not None and magnitude.numel() != layer.shape[magnitude.dim() - 1]:
        return False
    try:
        product = {"lora": _lora_product, "loha": _loha_product, "lokr": _lokr_product}[layer.kind](meta)
    except (RuntimeError, IndexError):
        return False
    inner = math.prod(layer.shape[1:])
    is_same = tuple(product.flatten(1).shape) == (layer.shape[0], inner)
    if layer.kind == "lora":  # the down matrix has the kernel's shape, or is flattened
        kernel, own = tuple(meta["down"].shape[1:]), layer.shape[1:]
        return is_same and (kernel == own or len(kernel) == 1 or math.prod(layer.shape[2:]) == 1)
    return is_same


def _as_the_layer(layer: AdapterLayer) -> AdapterLayer:
    """Returns a LoRA update whose matrices have the layer's number of dimensions: tools differ for 1x1 convolutions."""
    if layer.kind != "lora":
        return layer
    down, up = layer.tensors["down"], layer.tensors["up"]
    shaped = {
        "down": down.reshape(down.shape[0], *layer.shape[1:]),
        "up": up.reshape(*up.shape[:2], *[1] * (len(layer.shape) - 2)),
    }
    return replace(layer, tensors={**layer.tensors, **shaped})


def shown(names: Iterable[str]) -> str:
    """Formats the first few names and the number of the others."""
    every = list(names)
    rest = len(every) - SHOWN
    return ", ".join(one_line(name, LONGEST_NAME) for name in every[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
