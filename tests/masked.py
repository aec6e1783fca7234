"""Masks, and a folder of images with them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

MASKED = (40, 20, 90, 70)  # left, top, right, bottom


def mask_image(size: tuple[int, int] = (120, 90), box: tuple[int, int, int, int] = MASKED) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def masked_folder(folder: Path, count: int = 6, in_alpha: bool = False) -> Path:
    """Images of which each has a mask, in its alpha channel or in `masks` beside the folder."""
    random = np.random.default_rng(0)
    masks = folder.parent / "masks"
    folder.mkdir(parents=True)
    masks.mkdir(exist_ok=True)
    for number in range(count):
        image = Image.fromarray(random.integers(0, 255, (90, 120, 3), np.uint8))
        mask = mask_image(box=(10 * number, 20, 10 * number + 50, 70))
        if in_alpha:
            image.putalpha(mask)
        else:
            mask.save(masks / f"{number}.png")
        image.save(folder / f"{number}.webp", lossless=True, exact=True)
        (folder / f"{number}.txt").write_text(f"image {number}")
    return folder


def values(array: object, kind: str = "PNG") -> bytes:
    """A mask's file of an array."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(array)).save(file, kind)
    return file.getvalue()


BLACK, WHITE = values(np.zeros((8, 8), np.uint8)), values(np.full((8, 8), 255, np.uint8))
STILL = ["--train_batch_size", 2, "--max_train_steps", 4, "--learning_rate", 1e-3, "--adam_weight_decay", 0]
