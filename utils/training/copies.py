"""How near samples are to training images, compared with held-out images: whether the model copies."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.config.seeding import Stream, generator
from utils.data.options import ImageOptions
from utils.data.plan import PlannedImages
from utils.models.base import Family
from utils.runtime.memory import is_out_of_memory
from utils.sampling.samples import Sample
from utils.training.task import Task
from utils.training.validation_loss import read_crop

MOST_TRAINED, MOST_HELD_OUT = 256, 32


@torch.no_grad()
def copying_distances(
    task: Task,
    images: PlannedImages,
    held_out: PlannedImages,
    options: ImageOptions,
    samples: Sequence[Sample],
    seed: int,
) -> list[float]:
    """Returns each sample's distance to the nearest training image, relative to the median of held-out images.

    Distances are root mean squares in the latents of the VAE, or in pixels for a model of pixels. At most MOST_TRAINED
    training images are looked at, chosen by the seed. The result is empty if sizes don't match or memory is short.
    """
    family = task.family
    with family.awake():
        device = next(family.denoiser.parameters()).device
        try:
            trained = _encoded(family, images, MOST_TRAINED, options, seed, device)
            known = _encoded(family, held_out, MOST_HELD_OUT, options, seed, device)
            drawn = [_latent(family, _pixels(sample.image, family), device) for sample in samples]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return []
    usual = [distance for each in known if (distance := _nearest(each, trained)) is not None]
    found = [distance for each in drawn if (distance := _nearest(each, trained)) is not None]
    if not usual or not float(np.median(usual)) > 0:
        return []
    return (np.array(found) / float(np.median(usual))).tolist()


def _encoded(
    family: Family, images: PlannedImages, most: int, options: ImageOptions, seed: int, device: torch.device
) -> list[Tensor]:
    """Latents [C, h, w] of some images, cut as in sampling."""
    order = generator(seed, len(images.records), 2, Stream.PROBE).permutation(len(images.records))
    crops = (read_crop(family, images, int(number), options) for number in order[:most])
    return [_latent(family, torch.from_numpy(crop.pixels), device) for crop in crops if crop is not None]


def _latent(family: Family, pixels: Tensor, device: torch.device) -> Tensor:
    return family.latent_space.moments(pixels[None].to(device))[0][0].float().cpu()


def _pixels(image: Image.Image, family: Family) -> Tensor:
    """[channels, H, W] uint8 pixels of a sample."""
    mode = "L" if family.latent_space.vae is None and family.latent_space.channels == 1 else "RGB"
    pixels = np.asarray(image.convert(mode))
    return torch.from_numpy(np.atleast_3d(pixels).transpose(2, 0, 1).copy())


def _nearest(latent: Tensor, others: Sequence[Tensor]) -> float | None:
    """Root mean square distance to the nearest of the others with the same size; None if there is none."""
    same = [each for each in others if each.shape == latent.shape]
    if not same:
        return None
    return float((torch.stack(same) - latent).square().flatten(1).mean(1).sqrt().min())
