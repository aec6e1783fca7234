"""LoRA files: loaded whole into a pipeline, or refused with the reason in one line."""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from utils.config.options import UserError
from utils.config.tensor_files import open_safetensors
from utils.config.user_files import require_regular
from utils.models.loading import loading, names_of
from utils.models.weight_files import check_finite, check_stored, stored_in, stored_tensors

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)
LORA_FILE = "pytorch_lora_weights.safetensors"
MODELS_BY_WIDTH = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
"""What a UNet is of, by the width of the text states that it reads."""
OTHER_KINDS = {
    **{"hada_": "LoHa", "lokr_": "LoKr", "b?oft_": "OFT", "dora_scale": "DoRA"},
    **{"lora_mid": "LoCon", "lora_t[12]": "LoCon", "(on_input|ia3)": "IA3", "bundle_emb": "LoRA and embedding"},
    **{"(w_norm|b_norm)$": "LoRA and norm", r"diff(_b)?$": "whole-difference"},
}
"""Kinds of files that diffusers does not read, or not whole, by how a word of a tensor's name begins."""

WRAPPED = "base_model.model."  # what PEFT puts in front of the names in its own files
HALVES = (
    *(
        (r"\blora_A\b", "lora_B"),
        (r"\blora_B\b", "lora_A"),
        (r"\blora_down\b", "lora_up"),
        (r"\blora_up\b", "lora_down"),
    ),
    *((r"lora\.down\b", "lora.up"), (r"lora\.up\b", "lora.down")),
)
"""How tools name the two matrices of an update, each as a pattern with the other's name."""


def load_lora(pipeline: "DiffusionPipeline", source: str, adapter: str, what: str, must_be_finite: bool = True) -> None:
    """Loads a LoRA file of any of the usual formats (diffusers', peft's, kohya's) as an adapter of a pipeline.

    Args:
        source: a file, a folder, or a Hub name.
        what: the flag and its value, as messages name them.
        must_be_finite: whether NaN and infinite numbers are refused; else a warning names them.

    Raises:
        UserError: if it can't be loaded, a part of it is not of this pipeline, or it has no effect.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"{what}: a {type(pipeline).__name__} takes no LoRA")
    path = Path(source)
    if path.exists() and not path.is_dir():
        require_regular(path)
        root, given = str(path.parent), {"weight_name": path.name}
    else:
        root, given = source, {"weight_name": LORA_FILE} if (path / LORA_FILE).is_file() else {}
    with loading(what):
        counts, alphas = _check(pipeline, root, given, what)
        pipeline.load_lora_weights(root, adapter_name=adapter, use_safetensors=True, **given)
        adapted = pipeline.get_list_adapters()
        if not any(adapter in names for names in adapted.values()):
            raise ValueError("it adapts no layer of the pipeline")
        for part, count in counts.items():
            found = _num_loaded(getattr(pipeline, part), adapter)
            if found != count:
                raise ValueError(f"of its {count} tensors for the {part} {found} were loaded")
    modules = {part: getattr(pipeline, part) for part, names in adapted.items() if adapter in names}
    for part, module in modules.items():
        _set_alphas(module, adapter, alphas.get(part, {}))
    _check_numbers(list(modules.values()), adapter, what, must_be_finite)


def _set_alphas(module: nn.Module, adapter: str, alphas: Mapping[str, float]) -> None:
    """Scales each layer by its own alpha, which diffusers loses where it renames layers of attention."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = module.peft_config[adapter]
    config.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}
    for name, layer in module.named_modules():
        if name in alphas and isinstance(layer, BaseTunerLayer) and adapter in layer.r:
            layer.lora_alpha[adapter] = alphas[name]
            layer.scaling[adapter] = alphas[name] / layer.r[adapter]


def _check_numbers(modules: Sequence[nn.Module], adapter: str, what: str, must_be_finite: bool) -> None:
    """Refuses a LoRA that is not finite, or of which each layer is scaled to nothing; names some that are."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import get_peft_model_state_dict

    scalings: list[float] = []
    ups = [
        tensor
        for module in modules
        for name, tensor in get_peft_model_state_dict(module, adapter_name=adapter).items()
        if "lora_B" in name
    ]
    if ups and not any(bool(tensor.any()) for tensor in ups):
        logger.warning("%s: the up matrices of all its %d updates are 0, so that it changes nothing", what, len(ups))
    for module in modules:
        check_finite(get_peft_model_state_dict(module, adapter_name=adapter).items(), what, must_be_finite)
        layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
        scalings += [float(layer.scaling[adapter]) for layer in layers if adapter in getattr(layer, "scaling", {})]
    not_finite = sum(not math.isfinite(scaling) for scaling in scalings)
    num_off = sum(scaling == 0 for scaling in scalings)
    if not_finite and must_be_finite:
        raise UserError(
            f"{what}: the alpha of {not_finite} of its {len(scalings)} layers is NaN or infinite; the file is damaged: "
            "give another"
        )
    if scalings and num_off == len(scalings):
        raise UserError(f"{what}: the alpha of all its {num_off} layers is 0, so that it changes nothing; give another")
    if num_off:
        said = "%s: the alpha of %d of its %d layers is 0: they change nothing"
        logger.warning(said, what, num_off, len(scalings))


def _check(
    pipeline: "DiffusionPipeline", root: str, given: Mapping[str, str], what: str
) -> tuple[dict[str, int], dict[str, dict[str, float]]]:
    """Refuses what would be loaded in part; (number of tensors, alphas of layers that have their own) of each part."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    if "weight_name" in given:
        stored = stored_in(Path(root, given["weight_name"]))
        _refuse_other_kinds(stored)
        check_stored(what, stored)
        _refuse_halves(stored)
    arguments = dict(given)
    if isinstance(pipeline, StableDiffusionXLLoraLoaderMixin):
        arguments["unet_config"] = pipeline.unet.config
    elif not isinstance(pipeline, StableDiffusionLoraLoaderMixin):
        return {}, {}
    read = _num_read(Path(root, given["weight_name"])) if "weight_name" in given else None
    tensors, listed = pipeline.lora_state_dict(root, use_safetensors=True, **arguments)
    if read is None:  # from the Hub
        check_stored(what, stored_tensors(tensors))
    if read is not None and len(tensors) != read:
        raise ValueError(f"of its {read} tensors only {len(tensors)} are understood")
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
            f"it has {len(homeless)} tensors for parts that this {type(pipeline).__name__} does not have: "
            f"{names_of(sorted(homeless))}"
        )
    counts = {name: sum(map(len, layers.values())) for name, layers in found.items()}
    return counts, {name: _alphas(name, listed or {}, modules[name], found[name]) for name in found}


def _alphas(
    part: str, listed: Mapping[str, float], module: nn.Module, found: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, float]:
    """The alphas of a part's layers, of those that diffusers lists by the names of their down matrices.

    Where some layers have one, the alpha of another is its rank: it is not scaled.
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


def _refuse_other_kinds(names: Iterable[str]) -> None:
    for name in names:
        kind = next((kind for mark, kind in OTHER_KINDS.items() if re.search(rf"(?<![A-Za-z]){mark}", name)), None)
        if kind is not None:
            raise ValueError(
                f"it holds {names_of([name])}: it is a {kind} file of other tools, which is not read here; merge it "
                "into its base by the tool that made it, and start from the result"
            )


def _refuse_halves(names: Iterable[str]) -> None:
    """Refuses names that PEFT gives in its own files, and halves of updates, before diffusers looks for the others."""
    names = set(names)
    wrapped = sorted(name for name in names if name.startswith(WRAPPED))
    if wrapped:
        raise ValueError(
            f"{len(wrapped)} of its {len(names)} tensors have the names of PEFT's own files, such as "
            f"{names_of(wrapped[:1])}, which do not say their part of the pipeline; save it by the pipeline's "
            "save_lora_weights"
        )
    lone = sorted(name for name in names if (other := _other_half(name)) and other not in names)
    if lone:
        raise ValueError(f"it has one half of {len(lone)} updates alone: {names_of(lone)} without its other half")


def _other_half(name: str) -> str:
    """The name of the tensor that goes with one of an update's two; "" for other tensors."""
    for one, other in HALVES:
        if (found := re.sub(one, other, name)) != name:
            return found
    return ""


def _num_read(file: Path) -> int:
    """How many tensors a LoRA file has, scales aside."""
    with open_safetensors(file) as opened:
        return sum(not name.endswith(".alpha") for name in opened.keys())  # noqa: SIM118


def _layers(part: str, tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """A part's tensors by the layers that they adapt, and by peft's names (lora_A.weight, ...)."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    tensors = dict(tensors)
    if part.startswith("text_encoder"):
        tensors = convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors))
        if not hasattr(module, "text_model"):
            tensors = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
    elif "lora_A" not in next(iter(tensors)):
        tensors = convert_unet_state_dict_to_peft(tensors)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, kind = key.partition(".lora_")
        layers.setdefault(layer, {})[kind] = tensor
    return layers


def _check_layers(layers: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, nn.Module], part: str) -> None:
    """Refuses layers that the module does not have, or has in other shapes, and halves of updates."""
    known = {name: layer for name, layer in layers.items() if getattr(modules.get(name), "weight", None) is not None}
    unknown = sorted(set(layers) - set(known))
    for name, tensors in known.items():
        down, up = tensors.get("A.weight"), tensors.get("B.weight")
        if down is None or up is None:
            raise ValueError(f"{part}: it has one half of the update of {name} alone")
        if len(up.shape) < 2 or up.shape[1] != down.shape[0]:
            raise ValueError(f"{part}: the halves of the update of {name} do not fit each other")
    wrong = [
        name
        for name, tensors in known.items()
        if tensors["A.weight"].shape[1:] != layer_shape(modules[name])[1:]
        or tensors["B.weight"].shape[0] != layer_shape(modules[name])[0]
    ]
    if wrong or unknown:
        raise ValueError(f"{part}: " + _of_another_model(layers, modules, wrong, unknown))


def layer_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight; a quantised one of a linear layer keeps it in another."""
    is_linear = isinstance(module, nn.Linear)
    return (module.out_features, module.in_features) if is_linear else tuple(module.weight.shape)


def _of_another_model(
    layers: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, nn.Module], wrong: list[str], unknown: list[str]
) -> str:
    """Why layers do not fit: by the width of the text states where they are another model's."""
    reading = [name for name in layers if name.endswith("attn2.to_k") and "A.weight" in layers[name]]
    given = {layers[name]["A.weight"].shape[1] for name in reading}
    own = {layer_shape(module)[1] for name, module in modules.items() if name.endswith("attn2.to_k")}
    counted = f"{len(wrong)} of its {len(layers)} layers have other shapes" if wrong else ""
    missing = (
        f"{len(unknown)} of its {len(layers)} layers are not in this model: {names_of(unknown)}" if unknown else ""
    )
    text = " and ".join(filter(None, [counted, missing]))
    if len(given) == 1 and len(own) == 1 and given != own:
        (theirs,), (ours,) = given, own
        text += f"; it reads text states of width {_named(theirs)}, this model's are {_named(ours)}"
    return f"it is the LoRA of another model: {text}"


def _named(width: int) -> str:
    return f"{width} ({MODELS_BY_WIDTH[width]})" if width in MODELS_BY_WIDTH else str(width)


def _num_loaded(module: nn.Module, adapter: str) -> int:
    from peft.utils import get_peft_model_state_dict

    return len(get_peft_model_state_dict(module, adapter_name=adapter))


PEFT_FILE = "adapter_model.safetensors"
