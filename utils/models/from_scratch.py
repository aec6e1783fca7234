"""Denoisers trained from scratch: built-in sizes, sizes from flags or config files, and weight initialization."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from utils.config.library_errors import CONFIG_ERRORS
from utils.config.options import UserError, first_line, require
from utils.models.options import ShapeOptions
from utils.runtime.hub_files import hub_file, is_path, read_json

SMALLEST_LEVEL = 4
CLASS_SLOTS = 1000  # as DiTPipeline expects, which uses label 1000 for no class


class UNetSize(NamedTuple):
    """Size of a UNet: channels of its first level, their multiple per level, and the resolutions with attention."""

    channels: int
    multiples: tuple[int, ...]
    layers: int
    attention: tuple[int, ...]
    head_dim: int


class TransformerSize(NamedTuple):
    """Size of a diffusion transformer."""

    layers: int
    heads: int
    head_dim: int


UNET_SIZES = {
    "tiny": UNetSize(32, (1, 2, 2), 1, (8,), 8),
    "small": UNetSize(64, (1, 2, 3, 4), 2, (8,), 32),
    "base": UNetSize(128, (1, 1, 2, 2, 4, 4), 2, (16, 8), 64),
    "large": UNetSize(192, (1, 2, 3, 4), 3, (32, 16, 8), 64),
}
TRANSFORMER_SIZES = {
    "tiny": TransformerSize(4, 4, 16),
    "small": TransformerSize(12, 6, 64),  # DiT-S
    "base": TransformerSize(12, 12, 64),  # DiT-B
    "large": TransformerSize(24, 16, 64),  # DiT-L
}


def unet_config(options: ShapeOptions, edge: int, channels: int, num_classes: int | None) -> dict[str, Any]:
    """Returns the config of a `UNet2DModel` for images or latents of this edge and number of channels.

    No level is smaller than 4x4: built-in sizes get fewer levels if needed.

    Args:
        options: options of the model's size.
        edge: height and width of the images or latents.
        channels: their number of channels.
        num_classes: number of classes; None for an unconditional model.

    Raises:
        UserError: for levels smaller than 4x4, or a size that makes no valid model.
    """
    if options.model_config_name_or_path is not None:
        config = read_config(options.model_config_name_or_path, "UNet2DModel")
        levels = len(config.get("block_out_channels") or (224, 448, 672, 896))
        check_levels(edge, levels, "--model_config_name_or_path")
        config |= {"sample_size": edge, "in_channels": channels, "out_channels": channels}
    else:
        config = _by_flags(options, edge, channels)
    return config | {"num_class_embeds": None if num_classes is None else num_classes + 1, "class_embed_type": None}


def _by_flags(options: ShapeOptions, edge: int, channels: int) -> dict[str, Any]:
    # Levels.
    size = UNET_SIZES[options.model_size or "base"]
    width = options.model_channels or size.channels
    if options.channel_mult is not None:
        multiples = tuple(options.channel_mult)
        num_fitting = sum(edge // 2**level >= SMALLEST_LEVEL for level in range(len(multiples)))
        if num_fitting < len(multiples):
            least = edge // 2**num_fitting
            listed, extra = " ".join(map(str, multiples)), f"number {num_fitting + 1}, {multiples[num_fitting]}"
            raise UserError(
                f"--channel_mult {listed} has one multiple too many: for an edge of {edge} pixels or latents {extra}, "
                f"gives a level of {least}x{least}, under {SMALLEST_LEVEL}x{SMALLEST_LEVEL}; leave out the rest"
            )
    else:
        fitting = [level for level in range(len(size.multiples)) if _fits(edge, level)]
        multiples = size.multiples[: max(1, len(fitting))]
    check_levels(edge, len(multiples), "--channel_mult" if options.channel_mult else "--model_size")

    # Attention.
    wanted = size.attention if options.attention_resolutions is None else tuple(options.attention_resolutions)
    edges = [edge // 2**level for level in range(len(multiples))]
    if options.attention_resolutions is not None:
        missing = [each for each in wanted if each and each not in edges]
        if missing:
            raise UserError(f"--attention_resolutions {missing[0]} is not the edge of a level; the levels have {edges}")
    attends = [each in wanted for each in edges]
    head_dim = options.attention_head_dim or math.gcd(size.head_dim, width)
    widest = [width * multiple for multiple in multiples]
    for each, attending in zip(widest, attends, strict=True):
        if attending and each % head_dim:
            raise UserError(f"--attention_head_dim {head_dim} does not divide the {each} channels of a level")
    return {
        "sample_size": edge,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widest,
        "layers_per_block": options.layers_per_block or size.layers,
        "down_block_types": ["AttnDownBlock2D" if attending else "DownBlock2D" for attending in attends],
        "up_block_types": ["AttnUpBlock2D" if attending else "UpBlock2D" for attending in reversed(attends)],
        "attention_head_dim": head_dim,
        "norm_num_groups": max(count for count in range(1, 33) if width % count == 0),
        "dropout": options.dropout,
        "add_attention": any(attends),
    }


def _fits(edge: int, level: int) -> bool:
    return edge % 2**level == 0 and edge // 2**level >= SMALLEST_LEVEL


def check_levels(edge: int, levels: int, flag: str) -> None:
    """Refuses an edge that can't be halved from level to level, or whose last level would be smaller than 4x4."""
    factor = 2 ** (levels - 1)
    below, said = edge - edge % factor, f"{flag} has {levels} level{'s' * (levels > 1)}"
    near = sorted({max(each, SMALLEST_LEVEL * factor) for each in (below, below + factor)})
    cure = f"{said}; try an edge of {' or '.join(map(str, near))}"
    require(edge % factor == 0, "resolution", edge, f"be divisible by {factor} in pixels or latents", cure)
    least = edge // factor
    if least < SMALLEST_LEVEL:
        raise UserError(
            f"{said}, the last of which would be {least}x{least} for {edge} pixels or latents, "
            f"under {SMALLEST_LEVEL}x{SMALLEST_LEVEL}; they need an edge of at least {SMALLEST_LEVEL * factor}"
        )


def transformer_config(options: ShapeOptions, edge: int, channels: int) -> dict[str, Any]:
    """Returns the config of a `DiTTransformer2DModel` for latents of this edge, with DiTPipeline's class slots."""
    if options.model_config_name_or_path is not None:
        config = read_config(options.model_config_name_or_path, "DiTTransformer2DModel")
        patch = config.get("patch_size", 2)
    else:
        for name in ("channel_mult", "attention_resolutions"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} is for UNets; class-conditional latents are trained with a transformer")
        size = TRANSFORMER_SIZES[options.model_size or "base"]
        head_dim, patch = options.attention_head_dim or size.head_dim, options.patch_size or 2
        width = options.model_channels or size.heads * size.head_dim
        require(width % head_dim == 0, "model_channels", width, f"be divisible by --attention_head_dim {head_dim}")
        config = {
            "num_attention_heads": width // head_dim,
            "attention_head_dim": head_dim,
            "num_layers": options.layers_per_block or size.layers,
            "patch_size": patch,
            "dropout": options.dropout,
            "attention_bias": True,
        }
    require(edge % patch == 0, "patch_size", patch, f"divide the latents' edge of {edge}")
    slots = {"num_embeds_ada_norm": CLASS_SLOTS, "norm_type": "ada_norm_zero"}
    return config | {"sample_size": edge, "in_channels": channels, "out_channels": channels} | slots


def read_config(name: str, class_name: str) -> dict[str, Any]:
    """Reads a model's config from a JSON file, a model or pipeline folder, or the Hub.

    Raises:
        UserError: if there is none, or it is for another class.
    """
    flag, path = "--model_config_name_or_path", Path(name)
    places = [path, path / "config.json", path / "unet" / "config.json", path / "transformer" / "config.json"]
    file = next((place for place in places if place.is_file()), None)
    if file is None and (path.exists() or is_path(name) or name.endswith(".json")):
        raise UserError(f"{flag} {name} must be a JSON file, or a folder with a config.json")
    if file is None:
        file = hub_file(name, "config.json", None, f"{flag} {name} can't be read")
    config = read_json(file, f"{flag} {name}")
    if not isinstance(config, dict) or config.get("_class_name", class_name) != class_name:
        found = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{flag} {name} is the config of a {found}, but must be of a {class_name}")
    return {key: value for key, value in config.items() if not key.startswith("_")}


def make_denoiser(class_name: str, config: Mapping[str, Any], weight_init: str) -> nn.Module:
    """Creates a denoiser with initialized weights.

    Args:
        class_name: diffusers' class of the denoiser.
        config: its config.
        weight_init: a key of `WEIGHTS`.

    Raises:
        UserError: if the config is invalid, or the model can't be run.
    """
    import diffusers

    model_class = getattr(diffusers, class_name)
    try:
        model = model_class.from_config(dict(config))
        with torch.device("meta"):
            probe = model_class.from_config(dict(config))
        _run_once(probe)
    # diffusers' constructors validate nothing: an invalid config fails wherever it is first used
    except (ValueError, RuntimeError, *CONFIG_ERRORS) as error:
        raise UserError(f"the denoiser can't be created from its config: {first_line(error)}") from error
    WEIGHTS[weight_init](model)
    return model


def _run_once(model: nn.Module) -> None:
    """Runs a model on the meta device, which needs neither memory nor compute."""
    config = model.config
    size = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    noisy, step = torch.zeros(1, config.in_channels, size, size, device="meta"), torch.zeros(1, device="meta")
    has_classes = getattr(config, "num_class_embeds", None) or getattr(config, "num_embeds_ada_norm", None)
    classes = {"class_labels": torch.zeros(1, dtype=torch.int64, device="meta")} if has_classes else {}
    output = model(noisy, step, **classes).sample
    if output.shape[2:] != noisy.shape[2:]:
        raise ValueError(f"for {size}x{size} it returns {output.shape[3]}x{output.shape[2]}")


@torch.no_grad()
def zero_last_layers(model: nn.Module) -> None:
    """Zeros the last layer of each residual branch and of the model (Dhariwal & Nichol 2021; Peebles & Xie 2023).

    Each block then starts as the identity, and the model predicts zero.
    """
    from diffusers.models.attention_processor import Attention
    from diffusers.models.normalization import AdaLayerNormZero
    from diffusers.models.resnet import ResnetBlock2D

    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            _zero(module.conv2)
        elif isinstance(module, Attention) and module.residual_connection:
            _zero(module.to_out[0])
        elif isinstance(module, AdaLayerNormZero):
            _zero(module.linear)  # includes the gates of both branches
    for name in ("conv_out", "proj_out_1", "proj_out_2"):
        if hasattr(model, name):
            _zero(getattr(model, name))


@torch.no_grad()
def xavier_kaiming(model: nn.Module) -> None:
    """Initializes matrices by Glorot and Bengio (2010), convolutions by He et al. (2015), and biases with zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        else:
            continue
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


WEIGHTS = {"default": zero_last_layers, "xavier_kaiming": xavier_kaiming}


def _zero(layer: nn.Module) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
