"""Measures the scaling factor of a VAE's latents on the data, if its config has none."""

import logging
import math
from pathlib import Path

import numpy as np
import torch

from utils.config.batch import RecordPass
from utils.config.options import UserError
from utils.config.seeding import Stream, generator
from utils.config.user_files import read_json
from utils.data.crop_pixels import cut_out
from utils.data.options import ImageOptions
from utils.data.plan import PlannedImages
from utils.models.base import Family
from utils.runtime.processes import write_json

logger = logging.getLogger(__name__)
FILE = "latent_scaling.json"
NUM_IMAGES = 256


def measured_scaling(
    family: Family, images: PlannedImages, options: ImageOptions, device: torch.device, seed: int
) -> float:
    """Returns 1 / the standard deviation of the latents of up to 256 images (Rombach et al. 2022, appendix G).

    Raises:
        UserError: if no image can be read, or the latents do not vary.
    """

    # Sums over the latents of images in random order; unreadable ones are skipped.
    still = options.still
    order = generator(seed, 0, 0, Stream.SCALING).permutation(len(images.records))
    count, total, squares = 0, 0.0, 0.0
    for number in (int(number) for number in order[:NUM_IMAGES]):
        records, passing = images.records, RecordPass(images.records.identity(number), 0)
        try:
            found = cut_out(records.image(number), None, images.target(number), still, 0, passing)
        except (OSError, ValueError):
            continue
        mean, std = family.latent_space.moments(torch.from_numpy(found.pixels)[None].to(device))
        noise = generator(seed, number, 1, Stream.SCALING).standard_normal(mean.shape, dtype=np.float32)
        values = (mean.cpu() + std.cpu() * torch.from_numpy(noise)).cpu().double()
        count, total, squares = count + values.numel(), total + float(values.sum()), squares + float((values**2).sum())
    variance = squares / count - (total / count) ** 2 if count else 0.0
    if not variance > 0:
        raise UserError("--vae: its latents of the data are constant, so they can't be scaled; try another VAE")
    return variance**-0.5


def remember_scaling(folder: Path, factor: float) -> None:
    """Saves the measured factor for a resumed run."""
    write_json(folder / FILE, {"scaling_factor": factor})
    logger.info("the VAE's config has no scaling factor; measured on the data it is %.5f", factor)


def known_scaling(folder: Path) -> float | None:
    """Returns the factor that the run measured before it was resumed; None if there is none.

    Raises:
        UserError: if the file exists but is invalid.
    """
    file = folder / FILE
    try:
        found = read_json(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror or error}") from error
    factor = found.get("scaling_factor") if isinstance(found, dict) else None
    if type(factor) not in (int, float) or not 0 < factor < math.inf:
        raise UserError(f"{file} has no valid scaling_factor; restore it, or start in another folder")
    return float(factor)
