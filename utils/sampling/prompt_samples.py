"""Samples drawn from the prompts of a run, while it trains and at its end."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from utils.config.options import UserError, option, require_not_negative, require_positive
from utils.models.not_finite import watching
from utils.models.text_to_image import TextFamily
from utils.runtime.atomic_files import or_without
from utils.runtime.processes import autocast
from utils.runtime.sharding import unsharded
from utils.runtime.stop_requests import StopRequests
from utils.sampling.controls import SamplingControls, controllable
from utils.sampling.prompts import refuse_files, warn_of_written_settings
from utils.sampling.samples import Sample

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationOptions:
    validation_prompts: list[str] | None = option(None, "prompts of which samples are drawn", is_text=True)
    validation_prompt: str | None = option(
        None, "a single prompt, of which --num_validation_images samples are drawn", is_text=True
    )
    num_validation_images: int | None = option(None, "samples a prompt; by default 4 of a --validation_prompt, else 1")
    validation_epochs: int | None = option(None, "epochs between samples; 5 by default, for LoRA and SDXL 1")
    validation_steps: int | None = option(None, "optimizer steps between samples, instead of --validation_epochs")
    validation_num_inference_steps: int = option(25, "denoising steps of a sample")
    validation_guidance_scale: float | None = option(None, "classifier-free guidance; by default the pipeline's")
    validation_negative_prompt: str | None = option(None, "what the samples should not show", is_text=True)

    def __post_init__(self) -> None:
        require_positive(self, "validation_epochs", "validation_steps", "validation_num_inference_steps")
        require_not_negative(self, "num_validation_images", "validation_guidance_scale")
        if self.validation_prompts is not None and self.validation_prompt is not None:
            raise UserError("--validation_prompt and --validation_prompts are two ways to say the same; give one")
        refuse_files(self.prompts_flag, self.prompts, "give its prompts themselves")

    @property
    def prompts_flag(self) -> str:
        """The flag that names them."""
        return "--validation_prompts" if self.validation_prompts else "--validation_prompt"

    @property
    def prompts(self) -> list[str]:
        """All that samples are drawn of."""
        return self.validation_prompts or ([self.validation_prompt] if self.validation_prompt else [])

    def requests(self, seed: int) -> list["SampleRequest"]:
        """The samples of one validation; number n has the seed `seed + n`, at every validation."""
        prompts = self.prompts
        each = self.num_validation_images
        if each is None:
            each = 4 if self.validation_prompt else 1
        wanted = [(prompt, f"{row:02d}_{column}") for row, prompt in enumerate(prompts) for column in range(each)]
        return [SampleRequest(prompt, name, (seed + index) % 2**63) for index, (prompt, name) in enumerate(wanted)]

    def is_due(self, step: int, epochs_before: int, epochs_after: int, default_epochs: int) -> bool:
        """Whether samples are drawn after optimizer step number `step`, from 1, which ended these epochs.

        As in the diffusers examples, the first epoch is always followed by samples.
        """
        if self.validation_steps is not None:
            return step % self.validation_steps == 0
        interval = self.validation_epochs or default_epochs
        return any(epoch % interval == 0 for epoch in range(epochs_before, epochs_after))


class SampleRequest(NamedTuple):
    """One sample to draw: its prompt, the stem of its file, and the seed of its CPU generator."""

    prompt: str
    name: str
    seed: int


class Sampler:
    """Draws the samples of a run, each process its share, and keeps them in `output_dir/samples/`."""

    def __init__(
        self,
        accelerator: "Accelerator",
        family: TextFamily,
        options: ValidationOptions,
        folder: Path,
        resolution: int,
        seed: int,
        requests: StopRequests,
        controls: SamplingControls | None = None,
    ):
        self._controls = controls or SamplingControls()
        self._stop_requests = requests
        self._accelerator = accelerator
        self._family = family
        self._options = options
        self._folder = folder / "samples"
        self._resolution = resolution
        self._requests = options.requests(seed)
        warn_of_written_settings(options.prompts_flag, options.prompts)

    def draw(self, name: str) -> list[Sample]:
        """Draws all samples, or those until a signal, into `samples/{name}/`; gives them, in order, to every process.

        The pipeline's parts must be in evaluation mode, and hold the weights to draw with.
        """
        from accelerate.utils import gather_object

        rank, num_processes = self._accelerator.process_index, self._accelerator.num_processes
        mine = dict(list(enumerate(self._requests))[rank::num_processes])
        drawn = []
        if self._requests:
            logger.info("drawing %d samples: %s", len(self._requests), self._folder / name)
        with (
            self._family.awake() if self._requests else nullcontext(),
            unsharded(self._family.pipeline.components.values()),
        ):
            for index, image in zip(mine, self._draw(list(mine.values())), strict=False):
                file = self._folder / name / f"{mine[index].name}.png"
                with or_without(file):
                    self._save(image, mine[index], file)
                drawn.append((index, np.asarray(image)))
        shared = sorted(gather_object(drawn), key=lambda pair: pair[0])
        return [Sample(Image.fromarray(pixels), self._requests[index].prompt) for index, pixels in shared]

    @torch.no_grad()
    def _draw(self, requests: Sequence[SampleRequest]) -> list[Image.Image]:
        """The images of some requests, by one part of the pipeline after the other; the first of them, if stopped."""
        family, negative = self._family, self._options.validation_negative_prompt
        processor = family.pipeline.image_processor
        with family.alone(*family.text_encoder_names), autocast(self._accelerator):
            prompts = [family.prompt_arguments(request.prompt, negative) for request in requests]
        with family.alone("unet"), watching(family.pipeline) as watch:
            latents, blames = [], []
            for request, prompt in zip(requests, prompts, strict=True):
                if self._stop_requests.is_asked:
                    break
                watch.forget()
                latents.append(self._denoise(request, prompt))
                blames.append("" if bool(latents[-1].isfinite().all()) else watch.blame())
        with family.alone("vae"):  # outside of autocast, in which it could overflow
            pairs = zip(latents, blames, strict=True)
            decoded = (family.latent_space.pictures(each, partial(str, blame)) for each, blame in pairs)
            return [processor.postprocess(each, output_type="pil")[0] for each in decoded]

    def _denoise(self, request: SampleRequest, prompt: dict[str, Tensor]) -> Tensor:
        """[1, C, h, w] the latents of a request."""
        pipeline, options = self._family.pipeline, self._options
        pipeline.set_progress_bar_config(disable=True)
        guidance = (
            {} if options.validation_guidance_scale is None else {"guidance_scale": options.validation_guidance_scale}
        )
        # the noise that the pipeline would draw, in float32, so that its scheduler computes in it under autocast too
        shape = self._family.latent_space.shape((self._resolution, self._resolution))
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(request.seed))
        controls = self._controls
        with autocast(self._accelerator), controllable(controls, pipeline), controls.attached(pipeline):
            return pipeline(
                **prompt,
                **guidance,
                height=self._resolution,
                width=self._resolution,
                num_inference_steps=options.validation_num_inference_steps,
                latents=noise,
                generator=torch.Generator().manual_seed(request.seed),
                output_type="latent",
            ).images

    def _save(self, image: Image.Image, request: SampleRequest, path: Path) -> None:
        """Writes a PNG that says in its text what it was drawn from."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = PngInfo()
        facts = {
            "prompt": request.prompt,
            "negative_prompt": self._options.validation_negative_prompt,
            "seed": request.seed,
            "num_inference_steps": self._options.validation_num_inference_steps,
            "guidance_scale": self._options.validation_guidance_scale,
        }
        for name, value in facts.items():
            if value is not None:
                text.add_itxt(name, str(value))
        image.save(path, pnginfo=text)
