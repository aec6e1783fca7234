"""What names in files of adapters can stand for in a pipeline: its layers, by the rules of the pipeline's family."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from utils.formats.adapter_names import TEXT_PREFIX, Component
from utils.formats.original_layout import original_modules
from utils.models.registry import FAMILIES, FAMILIES_OF_TEXT
from utils.models.text_to_image import TextFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OF_ADAPTERS = ("lora_", "hada_", "lokr_")  # in the names of modules that PEFT adds
UNPREFIXED = ("text_projection",)  # layers of text encoders outside of their text model


def components_of(pipeline: "DiffusionPipeline") -> list[Component]:
    """Returns the components of a pipeline that adapters can change.

    Raises:
        ValueError: if the pipeline is of no family whose adapters have names.
    """
    family = family_of_parts(type(pipeline).__name__, pipeline.components)
    return components_of_modules(family, {name: getattr(pipeline, name) for name in adapted_names(family)})


def family_of_parts(class_name: str, parts: Mapping[str, object]) -> type[TextFamily]:
    """Returns the family of a pipeline: by its class, or for other pipelines of the same models by their components.

    Raises:
        ValueError: if it is of none.
    """
    if class_name in FAMILIES:
        return FAMILIES[class_name]
    encoders = {name for name, part in parts.items() if name.startswith("text_encoder") and part is not None}
    for family in FAMILIES_OF_TEXT:
        if encoders == set(family.text_encoder_names) and parts.get(family.denoiser_name) is not None:
            return family
    raise ValueError(f"adapters of a {class_name} have no names that are known")


def adapted_names(family: type[TextFamily]) -> tuple[str, ...]:
    """Returns the names of the components that adapters can change."""
    return (family.denoiser_name, *family.text_encoder_names)


def components_of_modules(family: type[TextFamily], modules: Mapping[str, nn.Module | None]) -> list[Component]:
    """Returns the components of a family's pipeline, of modules on any device, also with adapters in them."""
    found = []
    for name, module in modules.items():
        if module is None:
            continue
        shapes = {own: layer_shape(base_of(each)) for own, each in layers_by_name(family, name, module).items()}
        original = _original(module, shapes) if name == family.denoiser_name else {}
        prefixes = family.ui_prefixes.get(name, ())
        follows = name == family.denoiser_name and family.ui_names_are_original
        found.append(Component(name, shapes, prefixes, original, follows))
    return found


def layer_name(family: type[TextFamily], component: str, name: str) -> str:
    """Returns the name that a layer has in its component's file, whatever release of transformers made the module."""
    is_plain = name.startswith((TEXT_PREFIX, *UNPREFIXED)) or component not in family.text_encoder_names
    return name if is_plain else TEXT_PREFIX + name


def layers_by_name(family: type[TextFamily], component: str, module: nn.Module) -> dict[str, nn.Module]:
    """Returns a component's layers (with adapters, if they have some) by their names in the component's file."""
    return {layer_name(family, component, name): each for name, each in _layers(module).items()}


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """Returns the linear layers and convolutions of a module, or the adapter's layers in their places."""
    found: dict[str, nn.Module] = {}
    for name, each in module.named_modules():
        parts = name.split(".")
        if "base_layer" in parts or any(part.startswith(OF_ADAPTERS) for part in parts):
            continue
        if isinstance(base_of(each), nn.Linear | nn.Conv2d):
            found[name] = each
    return found


def base_of(module: nn.Module) -> nn.Module:
    """Returns the layer itself, or the layer that PEFT's layer wraps."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def layer_shape(module: nn.Module) -> tuple[int, ...]:
    """Returns the shape of a layer's weight; quantized linear layers store it in another shape."""
    is_linear = isinstance(module, nn.Linear)
    return (module.out_features, module.in_features) if is_linear else tuple(module.weight.shape)


def _original(unet: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Returns the names of a UNet's layers in the original layout; none for UNets that the original code can't have."""
    try:
        found = original_modules(unet.config)
    except ValueError:
        return {}
    return {name: found[name] for name in shapes if name in found}
