"""Flags of short unconditional runs, and what their results draw."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

SHORT = ("--max_train_steps", 2, "--train_batch_size", 2, "--learning_rate", 1e-3)


def load(folder: Path):
    from diffusers import DiffusionPipeline

    more = {"custom_pipeline": str(folder), "trust_remote_code": True} if (folder / "pipeline.py").exists() else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, seed: int, **more) -> np.ndarray:
    generators = [torch.Generator().manual_seed(seed + number) for number in range(2)]
    return np.stack([np.asarray(each) for each in pipeline(generator=generators, num_inference_steps=3, **more).images])


def samples(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / f"{number:03d}.png")) for number in range(2)])


def small_unet(**more):
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    types = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(**{"sample_size": 16, "block_out_channels": (8, 16), "norm_num_groups": 8} | types | more)


def three_levels():
    types = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    return small_unet(block_out_channels=(8, 16, 16), **types)
