"""Flags of short runs, and what text-to-image results draw."""

from pathlib import Path

import numpy as np
import torch

from tests import tiny

FLAGS = ["--train_batch_size", 2, "--learning_rate", 1e-3, "--checkpointing_steps", 2, "--lr_scheduler", "constant"]
SHORT = ("--max_train_steps", 2, "--train_batch_size", 2, "--learning_rate", 1e-3)


def draw(pipeline, prompt: str = "a red square", seed: int = 0, **more) -> np.ndarray:
    """One sample of a pipeline as pixels."""
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        prompt,
        height=tiny.RESOLUTION,
        width=tiny.RESOLUTION,
        generator=torch.Generator("cpu").manual_seed(seed),
        **{"num_inference_steps": 3} | more,
    ).images[0]
    return np.asarray(image)


def load(folder: Path):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder)


VALIDATION = (
    "--validation_prompt",
    "a red square",
    "--num_validation_images",
    2,
    "--validation_num_inference_steps",
    3,
)
