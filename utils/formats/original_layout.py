"""Names and shapes of Stable Diffusion's weights in the original code, for those of diffusers and transformers.

The originals: https://github.com/CompVis/stable-diffusion (SD 1),
https://github.com/Stability-AI/stablediffusion (SD 2), https://github.com/Stability-AI/generative-models (SDXL),
https://github.com/mlfoundations/open_clip. All of it is computed from configs and names, so it holds at any size.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    # names of diffusers before 0.12, which the files of Stable Diffusion 1 on the Hub have
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
VAE_MATRICES = ("q.weight", "k.weight", "v.weight", "proj_out.weight")
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
POSITION_IDS = "embeddings.position_ids"
POSITIONS = "embeddings.position_embedding.weight"
PROJECTION = "text_projection.weight"
LARGEST_LOGIT_SCALE = math.log(100)  # open_clip's bound, which the published models have reached
TEXT_MODEL = "text_model."
CROSS = "CrossAttn"


class Change(Enum):
    """How the sources of a tensor become the tensor."""

    NONE = "as it is"
    CONVOLUTION = "a matrix becomes a 1x1 convolution"
    TRANSPOSED = "a matrix is transposed"


@dataclass(frozen=True)
class OriginalTensor:
    """A tensor of the original layout.

    Attributes:
        name: its name, with the prefix of its part.
        sources: names of the tensors it is made of, concatenated along the first axis; none if it is constant.
        change: what happens to them.
        constant: its values if it is not made of weights.
    """

    name: str
    sources: tuple[str, ...] = ()
    change: Change = Change.NONE
    constant: Tensor | None = None

    def shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Returns its shape, given those of its sources."""
        if self.constant is not None:
            return tuple(self.constant.shape)
        whole = (sum(each[0] for each in shapes), *shapes[0][1:])
        if self.change is Change.CONVOLUTION and len(whole) == 2:
            return (*whole, 1, 1)
        return whole[::-1] if self.change is Change.TRANSPOSED else whole

    def made_of(self, values: Sequence[Tensor]) -> Tensor:
        """Returns the tensor, given its sources."""
        if self.constant is not None:
            return self.constant
        whole = values[0] if len(values) == 1 else torch.cat(list(values))
        if self.change is Change.CONVOLUTION and whole.ndim == 2:
            return whole[:, :, None, None]
        return whole.T if self.change is Change.TRANSPOSED else whole

    def taken_apart(self, value: Tensor) -> dict[str, Tensor]:
        """Returns the sources by name, given the tensor: the inverse of `made_of`."""
        if self.constant is not None:
            return {}
        if self.change is Change.CONVOLUTION and value.ndim == 4:
            value = value[:, :, 0, 0]
        if self.change is Change.TRANSPOSED:
            value = value.T
        return dict(zip(self.sources, value.chunk(len(self.sources)), strict=True))


Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a part's tensors by their names in diffusers and transformers."""
Layout = Callable[[Shapes, Mapping[str, object]], list[OriginalTensor]]
"""Maps a part's shapes and its config to its tensors in the original layout, without the prefix of the part.

Raises ValueError for a tensor that the original layout has no place for.
"""


@dataclass(frozen=True)
class OriginalPart:
    """Where the original layout keeps a component of a pipeline.

    Attributes:
        prefix: prefix of its tensors.
        layout: its tensors behind that prefix.
    """

    prefix: str
    layout: Layout


@dataclass(frozen=True)
class OriginalModel:
    """The original layout of a whole pipeline.

    Attributes:
        architecture: its name in ModelSpec.
        parts: its components, by their names in the pipeline.
        activations: activation of each text encoder that tools assume, since a file can't say it.
        scaling_factor: scaling factor of the latents that tools assume.
        marks: marks of a noise schedule that tools look for in this architecture, or find out by its weights.
    """

    architecture: str
    parts: Mapping[str, OriginalPart]
    activations: Mapping[str, str]
    scaling_factor: float
    marks: tuple[str, ...]


UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."


# UNet


def unet_layout(shapes: Shapes, config: Mapping[str, object]) -> list[OriginalTensor]:
    """Returns a UNet's tensors in the original layout; see `Layout`."""
    places = unet_places(config)
    return [OriginalTensor(unet_name(name, places), (name,)) for name in shapes]


def original_modules(unet_config: Mapping[str, object]) -> dict[str, str]:
    """Returns the original names of all modules of a UNet that have weights, without `model.diffusion_model.`.

    Args:
        unet_config: config of a `UNet2DConditionModel`.

    Raises:
        ValueError: if the UNet has modules that the original code lacks.
    """
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(unet_config))
    places = unet_places(unet.config)
    modules = dict.fromkeys(name.rpartition(".")[0] for name, _ in unet.named_parameters())
    return {name: unet_name(name, places) for name in modules}


def unet_places(config: Mapping[str, object]) -> dict[str, str]:
    """Returns the original names of a UNet's blocks, by their names in diffusers."""
    downs, ups = list(config["down_block_types"]), list(config["up_block_types"])
    layers = config["layers_per_block"]
    counts = [layers] * len(downs) if isinstance(layers, int) else list(layers)
    _check_blocks(downs, ("CrossAttnDownBlock2D", "DownBlock2D"))
    _check_blocks(ups, ("CrossAttnUpBlock2D", "UpBlock2D"))
    _check_blocks([config.get("mid_block_type", "UNetMidBlock2DCrossAttn")], ("UNetMidBlock2DCrossAttn",))
    if len(set(counts)) > 1:
        raise ValueError(f"layers_per_block {counts} differs between blocks")
    places = dict(UNET_ENDS)

    # Down: each level has its layers, then a downsampling of its own; number 0 is conv_in.
    number = 1
    for level, count in enumerate(counts):
        for layer in range(count):
            places[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if level < len(counts) - 1:
            places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1

    # Up: each level has one layer more, and the upsampling follows in its last one.
    number = 0
    for level, (count, kind) in enumerate(zip(reversed(counts), ups, strict=True)):
        for layer in range(count + 1):
            places[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            places[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        after = 2 if kind.startswith(CROSS) else 1
        places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{after}.conv"
    return places


def _check_blocks(found: Iterable[object], known: Sequence[str]) -> None:
    for each in found:
        if each not in known:
            raise ValueError(f"its UNet has a block of type {each}")


def unet_name(name: str, places: Mapping[str, str]) -> str:
    """Returns the original name of a module or tensor of a UNet."""
    words = name.split(".")
    for count in range(len(words), 0, -1):
        place = places.get(".".join(words[:count]))
        if place is None:
            continue
        rest = words[count:]
        if rest and words[count - 2] == "resnets":
            if rest[0] not in UNET_RESNET:
                break
            rest[0] = UNET_RESNET[rest[0]]
        return ".".join([place, *rest])
    raise ValueError(f"its UNet has {name}")


# VAE


def vae_layout(shapes: Shapes, config: Mapping[str, object]) -> list[OriginalTensor]:
    """Returns a VAE's tensors in the original layout, the matrices of its attention as convolutions; see `Layout`."""
    levels = len(list(config["up_block_types"]))
    found = []
    for name in shapes:
        original = _vae_name(name, levels)
        is_matrix = ".attn_1." in original and original.endswith(VAE_MATRICES)
        found.append(OriginalTensor(original, (name,), Change.CONVOLUTION if is_matrix else Change.NONE))
    return found


def _vae_name(name: str, levels: int) -> str:
    """Returns the original name of a VAE's tensor."""
    if re.fullmatch(r"(post_)?quant_conv\.(weight|bias)", name):
        return name
    half, _, rest = name.partition(".")
    if half not in ("encoder", "decoder"):
        raise ValueError(f"its VAE has {name}")
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(.+)", rest):
        way, level = match[1], int(match[2])
        original = f"{way}.{level if way == 'down' else levels - 1 - level}.{_vae_layer(match[3], name)}"
    elif match := re.fullmatch(r"mid_block\.resnets\.([01])\.(.+)", rest):
        original = f"mid.block_{int(match[1]) + 1}.{match[2].replace('conv_shortcut', 'nin_shortcut')}"
    elif match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)\.(weight|bias)", rest):
        if match[1] not in VAE_ATTENTION:
            raise ValueError(f"its VAE has {name}")
        original = f"mid.attn_1.{VAE_ATTENTION[match[1]]}.{match[2]}"
    elif match := re.fullmatch(r"(conv_in|conv_out|conv_norm_out)\.(weight|bias)", rest):
        original = f"{match[1].replace('conv_norm_out', 'norm_out')}.{match[2]}"
    else:
        raise ValueError(f"its VAE has {name}")
    return f"{half}.{original}"


def _vae_layer(rest: str, name: str) -> str:
    """Returns the original name of a layer inside a level of a VAE."""
    if match := re.fullmatch(r"resnets\.(\d+)\.(.+)", rest):
        return f"block.{match[1]}.{match[2].replace('conv_shortcut', 'nin_shortcut')}"
    if match := re.fullmatch(r"(down|up)samplers\.0\.(conv\..+)", rest):
        return f"{match[1]}sample.{match[2]}"
    raise ValueError(f"its VAE has {name}")


# Text encoders


def clip_layout(shapes: Shapes, config: Mapping[str, object]) -> list[OriginalTensor]:
    """Returns the tensors of a CLIP text encoder as transformers 4 named them, with its position ids; see `Layout`."""
    plain = {name.removeprefix(TEXT_MODEL): name for name in shapes}
    if POSITIONS not in plain:
        raise ValueError(f"its text encoder has no {POSITIONS}")
    found = [OriginalTensor(TEXT_MODEL + own, (name,)) for own, name in plain.items() if own != POSITION_IDS]
    ids = torch.arange(shapes[plain[POSITIONS]][0])[None]
    return [OriginalTensor(TEXT_MODEL + POSITION_IDS, constant=ids), *found]


def open_clip_layout(shapes: Shapes, config: Mapping[str, object]) -> list[OriginalTensor]:
    """Returns the tensors of a CLIP text encoder as open_clip names them; see `Layout`.

    The three matrices of attention are one there, and the text projection is transposed. A text encoder with a
    projection also gets a `logit_scale`, which the original has and nothing reads.
    """
    plain = {name.removeprefix(TEXT_MODEL): name for name in shapes}
    found = []
    for own, name in plain.items():
        if own in OPEN_CLIP_ENDS:
            found.append(OriginalTensor(OPEN_CLIP_ENDS[own], (name,)))
        elif own == PROJECTION:
            found.append(OriginalTensor("text_projection", (name,), Change.TRANSPOSED))
            found.append(OriginalTensor("logit_scale", constant=torch.tensor(LARGEST_LOGIT_SCALE)))
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", own):
            layer = f"transformer.resblocks.{match[1]}"
            if match[2] == "self_attn.q_proj":
                three = [plain.get(own.replace("q_proj", each)) for each in ("q_proj", "k_proj", "v_proj")]
                if None in three:
                    raise ValueError(f"its text encoder has {own} without the matrices beside it")
                found.append(OriginalTensor(f"{layer}.attn.in_proj_{match[3]}", tuple(filter(None, three))))
            elif match[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
                if match[2] not in OPEN_CLIP_LAYER:
                    raise ValueError(f"its text encoder has {name}")
                found.append(OriginalTensor(f"{layer}.{OPEN_CLIP_LAYER[match[2]]}.{match[3]}", (name,)))
        elif own != POSITION_IDS:
            raise ValueError(f"its text encoder has {name}")
    return found
