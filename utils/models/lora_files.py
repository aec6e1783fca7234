"""Loads adapters completely into a pipeline, or refuses them with the reason in one line.

LoRA files in diffusers' own names are read by diffusers; all other formats by utils/formats/adapter_files.py.
"""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from utils.config.file_names import LORA_FILE
from utils.config.options import UserError
from utils.config.tensor_files import open_safetensors
from utils.config.user_files import require_regular
from utils.formats.adapter_files import (
    PEFT_CONFIG,
    AdapterFile,
    adapter_sources,
    other_width,
    read_adapter,
)
from utils.formats.adapter_names import WRAPPED, Component, is_loaded_by_transformers, split_name
from utils.models.adapter_components import adapted_names, components_of, layer_shape
from utils.models.adapter_layers import check_alphas, check_layers, inject, keep_modes
from utils.models.loading import loading, names_of
from utils.models.text_to_image import TextFamily
from utils.models.weight_files import check_finite, check_stored, stored_in, stored_tensors

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)
LORA_PARTS = ("down", "up", "magnitude", "alpha")  # of an update in the LoRA files that diffusers reads completely
HALVES = (
    *(
        (r"\blora_A\b", "lora_B"),
        (r"\blora_B\b", "lora_A"),
        (r"\blora_down\b", "lora_up"),
        (r"\blora_up\b", "lora_down"),
    ),
    *((r"lora\.down\b", "lora.up"), (r"lora\.up\b", "lora.down")),
)
"""How tools name the two matrices of a LoRA update: a pattern for one, and the name of the other."""


def load_lora(pipeline: "DiffusionPipeline", source: str, adapter: str, what: str, must_be_finite: bool = True) -> None:
    """Loads an adapter in any common format (diffusers, PEFT, kohya, LyCORIS) as PEFT's layers of a pipeline.

    Args:
        pipeline: the pipeline that it is for.
        source: a file, a folder or a Hub name.
        adapter: name for the adapter.
        what: the flag and its value, for messages.
        must_be_finite: whether to refuse NaN and infinite values; otherwise a warning is logged.

    Raises:
        UserError: if it can't be loaded, does not fit this pipeline completely, or has no effect.
    """
    with loading(what):
        file = _read_other_formats(pipeline, source, what)
    if file is None:
        _load_diffusers_lora(pipeline, source, adapter, what, must_be_finite)
    else:
        check_layers(file.layers, what, must_be_finite)
        with loading(what):
            inject(pipeline, file.layers, adapter)
    keep_modes(pipeline)


def kinds_of(source: str, family: type[TextFamily], what: str) -> set[str]:
    """Returns the kinds of updates in a file or folder, judged by its tensors' names: lora, loha, lokr.

    Raises:
        UserError: if it can't be read.
    """
    with loading(what):
        path = Path(source)
        if not path.is_dir():
            require_regular(path)
        components = [Component(name, {}) for name in adapted_names(family)]
        names = [name for each in adapter_sources(path, components) for name in stored_in(each.path)]
    roles = {parts[1] for name in names if (parts := split_name(name))}
    marks = {"hada_": "loha", "lokr_": "lokr", "down": "lora"}
    return {kind for mark, kind in marks.items() if any(role.startswith(mark) for role in roles)}


def read_checked(path: Path, components: Sequence[Component], what: str, ending: str = "") -> AdapterFile:
    """Reads an adapter of any format, after checks of its tensors' dtypes and names; see `read_adapter`.

    Raises:
        UserError, ValueError, OSError, SafetensorError: if it can't be read, or does not fit.
    """
    if not path.is_dir():
        require_regular(path)
    sources = adapter_sources(path, components, ending)
    for each in sources:
        stored = stored_in(each.path)
        check_stored(what, stored)
        if not each.config:
            _refuse_wrapped(stored)
        _refuse_halves(stored)
    return read_adapter(path, components, ending)


def _read_other_formats(pipeline: "DiffusionPipeline", source: str, what: str) -> AdapterFile | None:
    """Returns an adapter that diffusers does not read completely; None for a LoRA file of its own."""
    path = Path(source)
    if not path.exists():  # a Hub name
        return None
    if not path.is_dir():
        require_regular(path)
    try:
        components = components_of(pipeline)
    except ValueError:  # a pipeline of another kind, whose LoRA only diffusers knows
        return None
    sources = adapter_sources(path, components)
    if len(sources) == 1 and not sources[0].config and is_diffusers_lora(stored_in(sources[0].path), components):
        return None
    return read_checked(path, components, what)


def is_diffusers_lora(names: Collection[str], components: Sequence[Component]) -> bool:
    """Whether all tensors have names that diffusers gives to a LoRA, and are loaded by it."""
    others = (WRAPPED, *(prefix for each in components for prefix in each.prefixes))
    split = [split_name(name) for name in names]
    is_lora = all(parts is not None and parts[1] in LORA_PARTS for parts in split)
    return is_lora and not any(name.startswith(others) or not is_loaded_by_transformers(name) for name in names)


def _load_diffusers_lora(
    pipeline: "DiffusionPipeline", source: str, adapter: str, what: str, must_be_finite: bool
) -> None:
    """Loads a LoRA file in diffusers' own names; arguments and errors as `load_lora`."""
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"{what}: a {type(pipeline).__name__} does not support LoRA")

    # Where the file is.
    path = Path(source)
    if path.exists() and not path.is_dir():
        require_regular(path)
        root, given = str(path.parent), {"weight_name": path.name}
    else:
        root, given = source, {"weight_name": LORA_FILE} if (path / LORA_FILE).is_file() else {}

    # Check its tensors, load it, and count what was loaded.
    with loading(what):
        counts, alphas = _check(pipeline, root, given, what)
        pipeline.load_lora_weights(root, adapter_name=adapter, use_safetensors=True, **given)
        adapted = pipeline.get_list_adapters()
        if not any(adapter in names for names in adapted.values()):
            raise ValueError("it adapts no layer of the pipeline")
        for part, count in counts.items():
            found = _num_loaded(getattr(pipeline, part), adapter)
            if found != count:
                raise ValueError(f"of its {count} tensors for the {part} only {found} were loaded")

    # Restore per-layer alphas, and check the values.
    modules = {part: getattr(pipeline, part) for part, names in adapted.items() if adapter in names}
    for part, module in modules.items():
        _set_alphas(module, adapter, alphas.get(part, {}))
    _check_numbers(list(modules.values()), adapter, what, must_be_finite)


def _set_alphas(module: nn.Module, adapter: str, alphas: Mapping[str, float]) -> None:
    """Scales each layer by its own alpha, which diffusers loses when it renames attention layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not alphas:  # the metadata's, if there are any, hold
        return

    config = module.peft_config[adapter]
    config.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}
    for name, layer in module.named_modules():
        if name in alphas and isinstance(layer, BaseTunerLayer) and adapter in layer.r:
            layer.lora_alpha[adapter] = alphas[name]
            layer.scaling[adapter] = alphas[name] / layer.r[adapter]


def _check_numbers(modules: Sequence[nn.Module], adapter: str, what: str, must_be_finite: bool) -> None:
    """Refuses a LoRA with non-finite values, or whose layers all have alpha 0; warns if only some have."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import get_peft_model_state_dict

    # Up matrices of zeros change nothing.
    scalings: list[float] = []
    ups = [
        tensor
        for module in modules
        for name, tensor in get_peft_model_state_dict(module, adapter_name=adapter).items()
        if "lora_B" in name
    ]
    if ups and not any(bool(tensor.any()) for tensor in ups):
        logger.warning("%s: the up matrices of all its %d updates are 0, so it has no effect", what, len(ups))

    # Weights and alphas.
    for module in modules:
        check_finite(get_peft_model_state_dict(module, adapter_name=adapter).items(), what, must_be_finite)
        layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
        scalings += [float(layer.scaling[adapter]) for layer in layers if adapter in getattr(layer, "scaling", {})]
    check_alphas(scalings, what, must_be_finite)


def _check(
    pipeline: "DiffusionPipeline", root: str, given: Mapping[str, str], what: str
) -> tuple[dict[str, int], dict[str, dict[str, float]]]:
    """Refuses a file that would be loaded only in part.

    Returns:
        For each component the number of its tensors, and the alphas of layers that have their own.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    # Tensors as stored in the file.
    if "weight_name" in given:
        stored = stored_in(Path(root, given["weight_name"]))
        check_stored(what, stored)
        _refuse_halves(stored)

    # Tensors as diffusers converts them.
    if not isinstance(pipeline, StableDiffusionLoraLoaderMixin | StableDiffusionXLLoraLoaderMixin):
        return {}, {}
    read = _num_read(Path(root, given["weight_name"])) if "weight_name" in given else None
    tensors, listed = as_diffusers_names(pipeline, root, use_safetensors=True, **given)
    if read is None:  # from the Hub
        check_stored(what, stored_tensors(tensors))
    if read is not None and len(tensors) != read:
        raise ValueError(f"of its {read} tensors only {len(tensors)} are recognized")

    # Components that they belong to, and the layers of each.
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    parts = {name: {} for name in modules}
    homeless = []
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        if part in parts:
            parts[part][name] = tensor
        else:
            homeless.append(key)
    found = {name: _layers(name, own, modules[name]) for name, own in parts.items() if own}
    for name, layers in found.items():
        _check_layers(layers, dict(modules[name].named_modules()), name)
    if homeless:
        raise ValueError(
            f"it has {len(homeless)} tensors for components that this {type(pipeline).__name__} does not have: "
            f"{names_of(sorted(homeless))}"
        )
    counts = {name: sum(map(len, layers.values())) for name, layers in found.items()}
    return counts, {name: _alphas(name, listed or {}, modules[name], found[name]) for name in found}


def as_diffusers_names(
    pipeline: "DiffusionPipeline", source: str | dict[str, Tensor], **given: object
) -> tuple[dict[str, Tensor], dict[str, float] | None]:
    """Returns the tensors and alphas of a LoRA by diffusers' own names, as its `load_lora_weights` converts them.

    Args:
        pipeline: a pipeline of Stable Diffusion, whose class says how.
        source: folder or Hub name, or the tensors of a file.
        given: further arguments of its `lora_state_dict`.
    """
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    if isinstance(pipeline, StableDiffusionXLLoraLoaderMixin):  # whose files may follow the original layout
        given["unet_config"] = pipeline.unet.config
    return pipeline.lora_state_dict(source, **given)


def _alphas(
    part: str, listed: Mapping[str, float], module: nn.Module, found: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, float]:
    """Returns the alphas of a component's layers, from those that diffusers lists by their down matrices' names.

    If any layer has an alpha, the alpha of a layer without one is its rank, which means no scaling.
    """
    own = {
        name.removeprefix(f"{part}.").removesuffix(".alpha"): torch.tensor(
            float(alpha), dtype=torch.float64, device="cpu"
        )
        for name, alpha in listed.items()
        if name.startswith(f"{part}.")
    }
    if not own:
        return {}
    layers = _layers(part, own, module)
    ranks = {name: float(tensors["A.weight"].shape[0]) for name, tensors in found.items() if "A.weight" in tensors}
    return ranks | {name: float(tensors["A.weight"]) for name, tensors in layers.items() if "A.weight" in tensors}


def _refuse_wrapped(names: Iterable[str]) -> None:
    """Refuses a file with the names of PEFT's own files, without the config that has its scale."""
    names = set(names)
    wrapped = sorted(name for name in names if name.startswith(WRAPPED))
    if wrapped:
        raise ValueError(
            f"{len(wrapped)} of its {len(names)} tensors have the names of PEFT's own files, such as "
            f"{names_of(wrapped[:1])}, but {PEFT_CONFIG}, which has their scale, is not beside it; give the folder "
            "with both, or save it with the pipeline's save_lora_weights"
        )


def _refuse_halves(names: Iterable[str]) -> None:
    """Refuses single halves of updates, before anything looks for the rest."""
    names = set(names)
    lone = sorted(name for name in names if (other := _other_half(name)) and other not in names)
    if lone:
        raise ValueError(f"it has only one half of {len(lone)} updates: {names_of(lone)} without its other half")


def _other_half(name: str) -> str:
    """Returns the name of the other matrix of an update; "" for other tensors."""
    for one, other in HALVES:
        if (found := re.sub(one, other, name)) != name:
            return found
    return ""


def _num_read(file: Path) -> int:
    """Returns the number of tensors in a LoRA file, not counting alphas."""
    with open_safetensors(file) as opened:
        return sum(not name.endswith(".alpha") for name in opened.keys())  # noqa: SIM118


def _layers(part: str, tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Groups a component's tensors by the layers that they adapt, under peft's names (lora_A.weight, ...)."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    # Rename the tensors to peft's names.
    tensors = dict(tensors)
    if part.startswith("text_encoder"):
        tensors = convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors))
        if not hasattr(module, "text_model"):
            tensors = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
    elif "lora_A" not in next(iter(tensors)):
        tensors = convert_unet_state_dict_to_peft(tensors)

    # Group them by layer.
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, kind = key.partition(".lora_")
        layers.setdefault(layer, {})[kind] = tensor
    return layers


def _check_layers(layers: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, nn.Module], part: str) -> None:
    """Refuses layers that are missing from the module or have other shapes, and single halves of updates."""
    known = {name: layer for name, layer in layers.items() if getattr(modules.get(name), "weight", None) is not None}
    unknown = sorted(set(layers) - set(known))
    for name, tensors in known.items():
        down, up = tensors.get("A.weight"), tensors.get("B.weight")
        if down is None or up is None:
            raise ValueError(f"{part}: it has only one half of the update of {name}")
        if len(up.shape) < 2 or up.shape[1] != down.shape[0]:
            raise ValueError(f"{part}: the two halves of the update of {name} do not fit together")
    wrong = [
        name
        for name, tensors in known.items()
        if tensors["A.weight"].shape[1:] != layer_shape(modules[name])[1:]
        or tensors["B.weight"].shape[0] != layer_shape(modules[name])[0]
    ]
    if wrong or unknown:
        raise ValueError(f"{part}: " + _of_another_model(layers, modules, wrong, unknown))


def _of_another_model(
    layers: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, nn.Module], wrong: list[str], unknown: list[str]
) -> str:
    """Explains why layers do not fit; the width of the text embeddings tells which model they are for."""
    reading = [name for name in layers if name.endswith("attn2.to_k") and "A.weight" in layers[name]]
    given = {layers[name]["A.weight"].shape[1] for name in reading}
    own = {layer_shape(module)[1] for name, module in modules.items() if name.endswith("attn2.to_k")}
    counted = f"{len(wrong)} of its {len(layers)} layers have other shapes" if wrong else ""
    missing = (
        f"{len(unknown)} of its {len(layers)} layers are not in this model: {names_of(unknown)}" if unknown else ""
    )
    text = " and ".join(filter(None, [counted, missing]))
    return f"it is a LoRA for another model: {text}{other_width(given, own)}"


def _num_loaded(module: nn.Module, adapter: str) -> int:
    from peft.utils import get_peft_model_state_dict

    return len(get_peft_model_state_dict(module, adapter_name=adapter))
