"""Reads the original layout's names without any config: which tensors of diffusers and transformers a file holds.

The inverse of `original_layout`. The blocks of a UNet and the levels of a VAE are counted in the names.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial

from utils.formats.original_layout import (
    OPEN_CLIP_ENDS,
    OPEN_CLIP_LAYER,
    POSITION_IDS,
    PROJECTION,
    TEXT_MODEL,
    UNET_RESNET,
    VAE_MATRICES,
    Change,
    Layout,
    OriginalTensor,
    clip_layout,
    open_clip_layout,
    unet_layout,
    unet_places,
    vae_layout,
)

Names = Callable[[Collection[str]], list[OriginalTensor]]
"""Maps the names of a part of a file, without its prefix, to what they are made of; names that hold no weights of
diffusers' or transformers' are left out. Raises ValueError for names that the original layout does not have."""
BLOCK = re.compile(r"(in|out)put_blocks\.(\d{1,3})\.")
ATTENTION = re.compile(r"(in|out)put_blocks\.(\d+)\.1\.(norm|proj_in|transformer_blocks)\b")
VAE_PARTS = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
THREE = ("q_proj", "k_proj", "v_proj")


def unet_tensors(names: Collection[str]) -> list[OriginalTensor]:
    """Returns the tensors of a UNet; see `Names`."""
    places = {original: own for own, original in unet_places(blocks_of(names)).items()}
    return [OriginalTensor(name, (unet_layer(name, places),)) for name in names]


def blocks_of(names: Iterable[str]) -> dict[str, object]:
    """Returns the entries of a UNet's config that say which blocks it has, from its original names.

    Raises:
        ValueError: if the names are not those of a UNet.
    """
    names = list(names)
    blocks = [(found[1], int(found[2])) for name in names if (found := BLOCK.match(name))]
    ins, outs = (sorted({number for half, number in blocks if half == wanted}) for wanted in ("in", "out"))
    downs = sorted({int(name.split(".")[1]) for name in names if re.match(r"input_blocks\.\d{1,3}\.0\.op\.", name)})
    layers = (downs[0] if downs else (ins[-1] if ins else 0) + 1) - 1
    levels = len(downs) + 1
    if layers < 1 or len(ins) != 1 + levels * layers + len(downs) or len(outs) != levels * (layers + 1):
        raise ValueError(f"its UNet has {len(ins)} input blocks and {len(outs)} output blocks, which do not fit")
    attends = {(found[1], int(found[2])) for name in names if (found := ATTENTION.match(name))}
    return {
        "layers_per_block": layers,
        "down_block_types": [
            "CrossAttnDownBlock2D" if ("in", 1 + level * (layers + 1)) in attends else "DownBlock2D"
            for level in range(levels)
        ],
        "up_block_types": [
            "CrossAttnUpBlock2D" if ("out", level * (layers + 1)) in attends else "UpBlock2D" for level in range(levels)
        ],
    }


def unet_layer(name: str, places: Mapping[str, str]) -> str:
    """Returns diffusers' name of a UNet's layer or tensor.

    Args:
        name: its original name.
        places: diffusers' names of blocks, by their original names.

    Raises:
        ValueError: if there is no such block.
    """
    words = name.split(".")
    count = next((count for count in range(len(words), 0, -1) if ".".join(words[:count]) in places), 0)
    if not count:
        raise ValueError(f"its UNet has {name}")
    place, rest = places[".".join(words[:count])], ".".join(words[count:])
    if "resnets" in place:
        layer, kind = re.fullmatch(r"(.+?)(\.(?:weight|bias))?", rest).groups(default="")
        own = next((ours for ours, theirs in UNET_RESNET.items() if theirs == layer), None)
        if own is None:
            raise ValueError(f"its UNet has {name}")
        rest = own + kind
    return f"{place}.{rest}" if rest else place


def vae_tensors(names: Collection[str]) -> list[OriginalTensor]:
    """Returns the tensors of a VAE; see `Names`."""
    levels = 1 + max(
        (int(found[1]) for name in names if (found := re.match(r"decoder\.up\.(\d{1,3})\.", name))), default=0
    )
    found = []
    for name in names:
        is_matrix = ".attn_1." in name and name.endswith(VAE_MATRICES)
        own = _vae_name(name, levels)
        if own is not None:
            found.append(OriginalTensor(name, (own,), Change.CONVOLUTION if is_matrix else Change.NONE))
    return found


def _vae_name(name: str, levels: int) -> str | None:
    """Returns diffusers' name of a VAE's tensor; None for one that diffusers has no place for, such as a loss's."""
    if re.fullmatch(r"(post_)?quant_conv\.(weight|bias)", name):
        return name
    half, _, rest = name.partition(".")
    if half not in ("encoder", "decoder"):
        return None
    if match := re.fullmatch(r"(down|up)\.(\d+)\.(block\.\d+\.|(?:down|up)sample\.)(.+)", rest):
        level = int(match[2]) if match[1] == "down" else levels - 1 - int(match[2])
        layer = match[3].replace("block.", "resnets.") if "block" in match[3] else f"{match[1]}samplers.0."
        return f"{half}.{match[1]}_blocks.{level}.{layer}{match[4].replace('nin_shortcut', 'conv_shortcut')}"
    if match := re.fullmatch(r"mid\.block_([12])\.(.+)", rest):
        return f"{half}.mid_block.resnets.{int(match[1]) - 1}.{match[2].replace('nin_shortcut', 'conv_shortcut')}"
    if (match := re.fullmatch(r"mid\.attn_1\.(\w+)\.(weight|bias)", rest)) and match[1] in VAE_PARTS:
        return f"{half}.mid_block.attentions.0.{VAE_PARTS[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"(conv_in|conv_out|norm_out)\.(weight|bias)", rest):
        return f"{half}.{match[1].replace('norm_out', 'conv_norm_out')}.{match[2]}"
    raise ValueError(f"its VAE has {name}")


def clip_tensors(names: Collection[str]) -> list[OriginalTensor]:
    """Returns the tensors of a CLIP text encoder, which have transformers' names already; see `Names`."""
    return [OriginalTensor(name, (name,)) for name in names if not name.endswith(POSITION_IDS)]


def open_clip_tensors(names: Collection[str]) -> list[OriginalTensor]:
    """Returns the tensors of an open_clip text encoder; see `Names`."""
    ends = {theirs: TEXT_MODEL + own for own, theirs in OPEN_CLIP_ENDS.items()}
    layers = {theirs: own for own, theirs in OPEN_CLIP_LAYER.items()}
    found = []
    for name in names:
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
        if name in ends:
            found.append(OriginalTensor(name, (ends[name],)))
        elif name == "text_projection":
            found.append(OriginalTensor(name, (PROJECTION,), Change.TRANSPOSED))
        elif match and match[2] == "attn.in_proj":
            layer = partial(f"{TEXT_MODEL}encoder.layers.{match[1]}.self_attn.{{}}.{match[3]}".format)
            found.append(OriginalTensor(name, tuple(map(layer, THREE))))
        elif match and match[2] in layers:
            own = f"{TEXT_MODEL}encoder.layers.{match[1]}.{layers[match[2]]}.{match[3]}"
            found.append(OriginalTensor(name, (own,)))
        elif name not in ("logit_scale", "attn_mask"):
            raise ValueError(f"its text encoder has {name}")
    return found


TENSORS_OF: dict[Layout, Names] = {
    unet_layout: unet_tensors,
    vae_layout: vae_tensors,
    clip_layout: clip_tensors,
    open_clip_layout: open_clip_tensors,
}
"""Reads the names that a layout writes."""
