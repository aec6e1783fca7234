"""Puts the layers of an adapter, read from any format, into a pipeline: as PEFT's layers, or into its weights."""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from utils.config.options import UserError
from utils.formats.adapter_files import (
    KINDS,
    AdapterLayer,
    adapter_layers,
    by_component,
    by_place,
    is_same_adapter,
    updated,
)
from utils.models.adapter_components import base_of, components_of_modules, family_of_parts, layers_by_name
from utils.models.text_to_image import TextFamily
from utils.models.weight_files import check_finite

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from peft import PeftConfig

logger = logging.getLogger(__name__)


def modules_of(pipeline: "DiffusionPipeline", layers: Sequence[AdapterLayer]) -> list[nn.Module]:
    """Returns the module of each layer: a linear layer or convolution, or PEFT's layer in its place."""
    family = family_of_parts(type(pipeline).__name__, pipeline.components)
    names = {layer.component for layer in layers}
    found = {name: layers_by_name(family, name, getattr(pipeline, name)) for name in names}
    return [found[layer.component][layer.name] for layer in layers]


def inject(pipeline: "DiffusionPipeline", layers: Sequence[AdapterLayer], adapter: str) -> None:
    """Adds an adapter to a pipeline as PEFT's layers, with each layer's own rank and alpha.

    Args:
        layers: its layers, all of one kind.
        adapter: a name that is free.

    Raises:
        ValueError: if PEFT has no such layers.
    """
    if (reason := why_not_injected(layers)) is not None:
        raise ValueError(reason)
    for component, own in by_component(layers).items():
        root = getattr(pipeline, component)
        names = {id(module): name for name, module in root.named_modules()}
        targets = [names[id(module)] for module in modules_of(pipeline, own)]
        root.add_adapter(_config(own, targets), adapter_name=adapter)
        for layer, target in zip(own, targets, strict=True):
            _fill(root.get_submodule(target), adapter, layer)


def why_not_injected(layers: Sequence[AdapterLayer]) -> str | None:
    """Returns why PEFT has no layers for an adapter, which can then only be merged; None if it has."""
    kinds = {layer.kind for layer in layers}
    if len(kinds) > 1:
        return f"it has layers of several kinds, {', '.join(KINDS[kind] for kind in sorted(kinds))}"
    if any(each.dim() != 1 for layer in layers for role, each in layer.tensors.items() if role == "magnitude"):
        return "its magnitudes are of the layers' inputs; merge it into its base model, and start from that"
    return None


def keep_modes(pipeline: "DiffusionPipeline") -> None:
    """Puts PEFT's layers into the mode of their component: it creates them in training mode, with random dropout."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for root in pipeline.components.values():
        for module in root.modules() if isinstance(root, nn.Module) else ():
            if isinstance(module, BaseTunerLayer):
                module.train(root.training)


def _config(layers: Sequence[AdapterLayer], targets: Sequence[str]) -> "PeftConfig":
    """Returns PEFT's config of a component's layers: the most frequent rank and alpha, and patterns of the others."""
    import peft

    ranks = dict(zip(targets, (layer.rank for layer in layers), strict=True))
    alphas = dict(zip(targets, (layer.alpha for layer in layers), strict=True))
    rank = max(sorted(ranks.values()), key=list(ranks.values()).count)
    alpha = max(sorted(alphas.values()), key=list(alphas.values()).count)
    patterns = {
        "rank_pattern": {name: each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {name: each for name, each in alphas.items() if each != alpha},
    }
    targets = list(targets)
    kind = layers[0].kind
    if kind == "lora":
        is_dora = any("magnitude" in layer.tensors for layer in layers)
        return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, use_dora=is_dora, **patterns)
    config_class = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[kind]
    return config_class(r=rank, alpha=alpha, target_modules=targets, **patterns)


def _fill(module: nn.Module, adapter: str, layer: AdapterLayer) -> None:
    """Replaces the tensors of PEFT's layer with an adapter's, whose factors may have other shapes than PEFT's own."""
    device = base_of(module).weight.device
    values = {role: tensor.float().to(device).contiguous() for role, tensor in layer.tensors.items()}
    if layer.kind == "lora":
        module.lora_A[adapter].weight.data = values["down"]
        module.lora_B[adapter].weight.data = values["up"]
        held = getattr(module, "lora_magnitude_vector", {})
        if adapter in held and "magnitude" in values:
            held[adapter].weight.data = values["magnitude"].reshape(held[adapter].weight.shape)
        elif adapter in held:  # a plain LoRA among DoRA: the magnitude that changes nothing
            own = held[adapter].weight
            merged = layer.merged(base_of(module).weight.detach().to(device))
            own.data = torch.linalg.vector_norm(merged.flatten(1), dim=1).reshape(own.shape).to(own.dtype)
        module.lora_alpha[adapter] = layer.alpha
    else:
        for role in module.adapter_layer_names:
            held = getattr(module, role)
            if adapter in held:
                del held[adapter]
            if role in values:
                held[adapter] = nn.Parameter(values[role])
        module.alpha[adapter] = layer.alpha
    module.r[adapter] = layer.rank
    module.scaling[adapter] = layer.scale


def check_layers(layers: Sequence[AdapterLayer], what: str, must_be_finite: bool = True) -> None:
    """Refuses layers with values that are not finite, or without any effect; warns of single layers without effect.

    Args:
        what: the flag and its value, for messages.
        must_be_finite: whether to refuse NaN and infinite values; otherwise a warning is logged.

    Raises:
        UserError: for damaged values, or if no layer has an effect.
    """
    tensors = {f"{layer.name}.{role}": each for layer in layers for role, each in layer.tensors.items()}
    check_finite(tensors.items(), what, must_be_finite)
    check_alphas([layer.alpha for layer in layers], what, must_be_finite)
    if layers and not any(_changes(layer) for layer in layers):
        words = "the up matrices" if layers[0].kind == "lora" else "some factors"
        logger.warning("%s: %s of all its %d updates are 0, so it has no effect", what, words, len(layers))


def check_alphas(alphas: Sequence[float], what: str, must_be_finite: bool) -> None:
    """Refuses alphas, or the scales that follow from them, that are not finite or all 0; warns if only some are 0.

    Raises:
        UserError: as `check_layers`.
    """
    count, off = len(alphas), sum(alpha == 0 for alpha in alphas)
    odd = sum(not math.isfinite(alpha) for alpha in alphas)
    if odd and must_be_finite:
        raise UserError(
            f"{what}: the alpha of {odd} of its {count} layers is NaN or infinite; the file is damaged: give another"
        )
    if count and off == count:
        raise UserError(f"{what}: the alpha of all its {off} layers is 0, so it has no effect; give another file")
    if off:
        logger.warning("%s: the alpha of %d of its %d layers is 0, so they have no effect", what, off, count)


def _changes(layer: AdapterLayer) -> bool:
    """Whether a layer's update can be other than zero: it has a magnitude, or none of its factors is zero."""
    return "magnitude" in layer.tensors or all(bool(each.any()) for each in layer.tensors.values())


def refuse_same(adapters: Sequence[tuple[str, Sequence[AdapterLayer]]]) -> None:
    """Refuses one adapter in two files, such as in two formats: it would count twice.

    Args:
        adapters: of each adapter the flag and its value, and its layers.

    Raises:
        UserError: naming the first two that are the same.
    """
    for (what, layers), (other, others) in itertools.combinations(adapters, 2):
        if is_same_adapter(layers, others):
            raise UserError(f"{other} is the same adapter as {what}, in another file; give one, with the sum of scales")


def merge_layers(pipeline: "DiffusionPipeline", layers: Sequence[AdapterLayer]) -> None:
    """Adds an adapter to a pipeline's weights, in place, computed in float32."""
    with torch.no_grad():
        for module, layer in zip(modules_of(pipeline, layers), layers, strict=True):
            weight = base_of(module).weight
            weight.data.copy_(layer.merged(weight.data))


class MergedAdapters:
    """Adapters merged into a pipeline's weights, in any order; their strengths can be changed.

    The weights that they change are kept in host memory.
    """

    def __init__(self, pipeline: "DiffusionPipeline"):
        self._pipeline = pipeline
        self._strengths: dict[str, float] = {}
        self._layers: dict[str, dict[tuple[str, str], AdapterLayer]] = {}  # by adapter, then by component and layer
        self._kept: dict[tuple[str, str], tuple[nn.Module, Tensor]] = {}

    def add(self, adapter: str, layers: Sequence[AdapterLayer]) -> None:
        """Adds an adapter, without any strength yet."""
        for layer, module in zip(layers, modules_of(self._pipeline, layers), strict=True):
            base = base_of(module)
            self._kept.setdefault((layer.component, layer.name), (base, base.weight.detach().cpu().clone()))
        self._layers[adapter] = by_place(layers)
        self._strengths[adapter] = 0.0

    def set_strengths(self, strengths: Mapping[str, float]) -> None:
        """Sets the strengths of adapters by name; those of others stay."""
        wanted = self._strengths | {name: each for name, each in strengths.items() if name in self._layers}
        if wanted != self._strengths:
            self._strengths = wanted
            self._merge()

    def remove(self) -> None:
        """Restores the pipeline's weights, and forgets the adapters."""
        self._layers.clear()
        self._merge()
        self._strengths.clear()
        self._kept.clear()

    def _merge(self) -> None:
        """Sets each weight to the kept one with all updates, rounded once."""
        with torch.no_grad():
            for key, (module, kept) in self._kept.items():
                updates = [(own[key], self._strengths[name]) for name, own in self._layers.items() if key in own]
                module.weight.data.copy_(updated(kept.to(module.weight.device), updates))


def layers_of_run(
    family: type[TextFamily], modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], adapter: str
) -> list[AdapterLayer]:
    """Returns the layers of an adapter in training.

    Args:
        family: the family of the pipeline.
        modules: the adapted modules by component, with PEFT's layers.
        tensors: the adapter's tensors by their names in a file, gathered from all processes if they are sharded.
        adapter: its name.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    configs: dict[str, dict[str, object]] = {}
    for component, module in modules.items():
        config = module.peft_config[adapter]
        held = {
            name: each
            for name, each in layers_by_name(family, component, module).items()
            if isinstance(each, BaseTunerLayer) and adapter in each.r
        }
        alphas = {name: (each.lora_alpha if hasattr(each, "lora_alpha") else each.alpha) for name, each in held.items()}
        configs[component] = {
            "r": config.r,
            "alpha": getattr(config, "lora_alpha", getattr(config, "alpha", config.r)),
            "rank_pattern": {name: each.r[adapter] for name, each in held.items()},
            "alpha_pattern": {name: each[adapter] for name, each in alphas.items()},
            "use_rslora": getattr(config, "use_rslora", False),
        }
    return adapter_layers(tensors, components_of_modules(family, modules), configs)
