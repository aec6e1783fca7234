"""Creates the inputs of benchmarks/train.py: pipelines with seeded random weights, and images with captions.

`true` is the published architecture. `small` has the same graph with all widths divided by 8, at a resolution at which
a CPU step takes a fraction of a second, so that VAE and denoiser keep about their shares of a step. It has an eighth of
the attention heads, with about their true width, because the overhead of attention grows with the number of heads. Text
encoders, whose share does not shrink with the resolution, have a quarter of their layers (bigG an eighth). The
unconditional model has the peer's default graph at 64 px, with widths divided by 4. `tiny` is the size of the tests.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SEED = 0
WIDTH_DIVISOR = 8
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "yellow": (230, 220, 40)}


@dataclass(frozen=True)
class Size:
    """The size of a case.

    Attributes:
        resolution: edge of the images in pixels.
        batch: samples per optimizer step.
        on_cpu: whether a CPU trains it in minutes.
    """

    resolution: int
    batch: int
    on_cpu: bool = True


SIZES: dict[str, dict[str, Size]] = {
    "sd": {"tiny": Size(32, 2), "small": Size(128, 4), "true": Size(512, 16, on_cpu=False)},
    "sdxl": {"tiny": Size(32, 2), "small": Size(256, 2), "true": Size(1024, 4, on_cpu=False)},
    "unconditional": {"tiny": Size(32, 2), "small": Size(64, 4), "true": Size(64, 16, on_cpu=False)},
}
UNCONDITIONAL_UNET = {
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
    "layers_per_block": 2,
    "in_channels": 3,
    "out_channels": 3,
}


def narrow(widths: tuple[int, ...], divisor: int = WIDTH_DIVISOR) -> tuple[int, ...]:
    """Returns the widths divided by `divisor`."""
    return tuple(width // divisor for width in widths)


def few(heads: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """Returns an eighth of the attention heads, for each level if they differ."""
    return max(1, heads // WIDTH_DIVISOR) if isinstance(heads, int) else tuple(few(each) for each in heads)


def small_architecture(kind: str) -> Any:
    """Returns Stable Diffusion's architecture with its widths divided by 8."""
    from benchmarks.made import MODELS

    true = MODELS[kind]
    unet = dict(true.unet) | {"norm_num_groups": 8, "sample_size": 16 if kind == "sd" else 32}
    unet["block_out_channels"] = narrow(unet.get("block_out_channels", (320, 640, 1280, 1280)))
    unet["cross_attention_dim"] //= WIDTH_DIVISOR
    unet["attention_head_dim"] = few(unet.get("attention_head_dim", 8))  # the number of heads, despite its name
    if kind == "sdxl":
        pooled = true.text_encoders[-1][1]["projection_dim"] // WIDTH_DIVISOR
        unet["addition_time_embed_dim"] //= WIDTH_DIVISOR
        unet["projection_class_embeddings_input_dim"] = pooled + 6 * unet["addition_time_embed_dim"]
    vae = dict(true.vae) | {"block_out_channels": narrow(true.vae["block_out_channels"]), "norm_num_groups": 8}
    texts = [(name, small_text_encoder(config)) for name, config in true.text_encoders]
    return replace(true, unet=unet, vae=vae, text_encoders=texts)


def small_text_encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of a text encoder with smaller widths and fewer layers."""
    widths = ("hidden_size", "intermediate_size", "projection_dim")
    smaller = {name: config[name] // WIDTH_DIVISOR for name in widths if name in config}
    heads = few(config["num_attention_heads"])
    layers = config["num_hidden_layers"] // (4 if config["num_hidden_layers"] <= 12 else 8)
    return dict(config) | smaller | {"num_hidden_layers": layers, "num_attention_heads": heads}


def make_pipeline(kind: str, size: str, folder: Path) -> Path:
    """Creates a pipeline with float32 weights if it does not exist; returns its folder."""
    if (folder / "model_index.json").exists():
        return folder
    import torch

    torch.manual_seed(SEED)
    if kind == "unconditional":
        make_unconditional(size, folder)
    elif size == "tiny":
        from tests import tiny

        {"sd": tiny.make_sd, "sdxl": tiny.make_sdxl}[kind](folder)
    else:
        from benchmarks.made import MODELS

        architecture = MODELS[kind] if size == "true" else small_architecture(kind)
        architecture.save_pipeline(folder, torch.float32)
    return folder


def make_unconditional(size: str, folder: Path) -> None:
    """Writes a DDPM pipeline with the peer's default UNet, or a smaller one."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    config = UNCONDITIONAL_UNET | {"sample_size": SIZES["unconditional"][size].resolution}
    if size == "small":
        config |= {"block_out_channels": narrow(config["block_out_channels"], 4)}
    elif size == "tiny":
        config |= {"block_out_channels": (16, 16), "norm_num_groups": 8, "layers_per_block": 1}
        config |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
        config |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    DDPMPipeline(unet=UNet2DModel(**config), scheduler=DDPMScheduler()).save_pretrained(folder)


def make_images(folder: Path, count: int, resolution: int, seed: int = SEED) -> Path:
    """Writes JPEG files with captions, with random edges from 2 to 3 times the resolution; returns the folder."""
    listing = folder / "metadata.jsonl"
    if listing.exists() and len(listing.read_text(encoding="utf-8").splitlines()) == count:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    random, lines = np.random.default_rng(seed), []
    for number in range(count):
        name = list(COLOURS)[random.integers(len(COLOURS))]
        width, height = (int(side) for side in random.integers(2 * resolution, 3 * resolution + 1, 2))
        Image.fromarray(picture(random, width, height, COLOURS[name])).save(folder / f"{number:05d}.jpg", quality=90)
        lines.append(json.dumps({"file_name": f"{number:05d}.jpg", "text": f"a {name} square, number {number}"}))
    listing.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def picture(random: np.random.Generator, width: int, height: int, colour: tuple[int, int, int]) -> np.ndarray:
    """Returns [height, width, 3] uint8: a coloured square on a blurred background, with noise as in a photograph."""
    coarse = random.integers(0, 200, (max(1, height // 16), max(1, width // 16), 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).copy()
    edge = min(width, height) // 2
    left, top = int(random.integers(width - edge + 1)), int(random.integers(height - edge + 1))
    pixels[top : top + edge, left : left + edge] = colour
    grain = random.integers(0, 24, pixels.shape, dtype=np.uint8)
    return np.minimum(pixels.astype(np.uint16) + grain, 255).astype(np.uint8)
