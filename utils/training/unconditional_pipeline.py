"""The pipeline that train_unconditional.py trains: found, and checked, before data and weights are read."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from utils.config.options import UserError
from utils.diffusion.process import process_of
from utils.models.unconditional import UnconditionalFamily, Wanted, default_edge, fresh_scheduler, pick_unconditional
from utils.runtime.processes import use_hub_cache_if_offline
from utils.training.unconditional_options import Options

logger = logging.getLogger(__name__)
IMAGE_LEFT = 0.15  # most share of the image at the last timestep: samples start from pure noise


class FoundPipeline(NamedTuple):
    """The pipeline to train, as described by the options.

    Attributes:
        family: the class of its family.
        resolution: edge of the images in pixels.
        output_dir: the output folder of the run.
    """

    family: type[UnconditionalFamily]
    resolution: int
    output_dir: str

    def wanted(self, options: Options, classes: Sequence[str], sizes: Sequence[tuple[int, int]]) -> Wanted:
        """Returns what the model must do: draw images of these sizes, (width, height) in pixels, and classes."""
        edge = self.resolution
        return Wanted(edge, options.image.channels, tuple(classes), list(sizes) == [(edge, edge)])


def find_pipeline(options: Options) -> FoundPipeline:
    """Returns the family of the pipeline, and checks the options against it before data and weights are read.

    Raises:
        UserError: if they do not fit.
    """
    model = options.model
    names = (model.pretrained_model_name_or_path, model.vae, options.source.dataset_name)
    if not all(name is None or Path(name).exists() for name in names):
        use_hub_cache_if_offline()
    family = pick_unconditional(model, options.captions.class_conditional, options.samples.sampler)
    check_family(options, family)
    resolution = options.image.resolution or default_edge(model, family)
    return FoundPipeline(family, resolution, options.runtime.output_dir or family.default_output_dir)


def check_family(options: Options, family_class: type[UnconditionalFamily]) -> None:
    """Checks that the options fit the family, before data and weights are read.

    Raises:
        UserError: naming the flag that does not fit.
    """
    # A new model: its shape, and the noise schedule that it draws with.
    if options.model.pretrained_model_name_or_path is None:
        edge = options.image.resolution or family_class.default_resolution
        family_class.check_shape(options.model, Wanted(edge, options.image.channels))
        scheduler = fresh_scheduler(options.noise, clips=True)
        left = float(process_of(options.noise, type(scheduler).__name__, scheduler.config).alphas_cumprod[-1]) ** 0.5
        if left > IMAGE_LEFT:
            logger.warning(
                "the noise schedule ends with %.0f %% of the image, but samples start from pure noise; try more "
                "--ddpm_num_steps, or --beta_schedule cosine",
                100 * left,
            )
        options.samples.steps_of(scheduler)

    # Flags for colours and for a VAE.
    if options.perceptual.perceptual_weight is not None and options.image.image_channels != 3:
        raise UserError("--perceptual_weight needs RGB images, so --image_channels must be 3; remove one of them")
    if family_class.coder_names:
        return
    asked = {
        "--cache_latents": options.cache.cache_latents,
        "--vae_slicing": options.model.vae_slicing,
        "--vae_tiling": options.model.vae_tiling,
    }
    flag = next((flag for flag, is_given in asked.items() if is_given), None)
    if flag is not None:
        raise UserError(f"{flag} needs a VAE, and this model has none; remove it, or give --vae")
