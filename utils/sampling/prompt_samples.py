"""Samples of the validation prompts, drawn during training and at its end."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from utils.config.progress import Progress
from utils.models.not_finite import watching
from utils.models.text_to_image import TextFamily
from utils.runtime.atomic_files import or_without
from utils.runtime.processes import autocast
from utils.runtime.sharding import unsharded
from utils.sampling.controls import controllable
from utils.sampling.infotext import Drawing, DrawnModel, call_default, png_texts, sampler_name
from utils.sampling.options import SampleRequest, ValidationOptions
from utils.sampling.prompts import warn_of_written_settings
from utils.sampling.samples import LAST, Sample, Surroundings

logger = logging.getLogger(__name__)


class PromptSampler:
    """Draws samples of the validation prompts into `output_dir/samples/`; each process draws its share."""

    def __init__(
        self,
        surroundings: Surroundings,
        family: TextFamily,
        options: ValidationOptions,
        resolution: int,
        default_epochs: int,
        model: DrawnModel | None = None,
    ):
        """Args:
        resolution: edge of the samples in pixels.
        default_epochs: epochs between samples if the options set no interval.
        model: what the texts of the images call the model; by default they don't name it.
        """
        self._surroundings = surroundings
        self._accelerator, self._controls = surroundings.accelerator, surroundings.controls
        self._family = family
        self._options = options
        self._folder = surroundings.folder / "samples"
        self._resolution, self._default_epochs = resolution, default_epochs
        self._requests = options.requests(surroundings.seed)
        self._model, self._sampler = model, sampler_name(family.pipeline.scheduler)
        warn_of_written_settings(options.prompts_flag, options.prompts)

    def is_due(self, progress: Progress) -> bool:
        """Whether samples are due after a step; the validation loss is measured at the same steps."""
        return self._options.is_due(progress, self._default_epochs)

    def draw(self, progress: Progress, is_last: bool = False) -> list[Sample]:
        """Draws all samples, or fewer if a signal arrives; returns them, in order, on every process.

        They are saved in `samples/step-{step}/`, the last ones in `samples/final/`.

        The pipeline's models must be in evaluation mode, and hold the weights to draw with.
        """
        name = LAST if is_last else f"step-{progress.step}"
        if is_last and self._model is not None:
            self._model = self._model.exported(self._surroundings.folder)
        mine = dict(self._surroundings.share(list(enumerate(self._requests))))
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
                drawn.append((index, image))
        self._surroundings.requests.timers.samples.restart()
        shared = self._surroundings.gather(drawn)
        requests, folder = self._requests, f"{self._folder.name}/{name}"
        return [
            Sample(image, requests[index].prompt, f"{folder}/{requests[index].name}.png") for index, image in shared
        ]

    @torch.no_grad()
    def _draw(self, requests: Sequence[SampleRequest]) -> list[Image.Image]:
        """Draws the images of some requests, with one model on the device at a time; fewer if a signal arrives."""
        # Prompts, then latents, then images.
        family, negative = self._family, self._options.validation_negative_prompt
        processor = family.pipeline.image_processor
        with family.alone(*family.text_encoder_names), autocast(self._accelerator):
            prompts = [family.prompt_arguments(request.prompt, negative) for request in requests]
        with family.alone(family.denoiser_name), watching(family.pipeline) as watch:
            latents, blames = [], []
            for request, prompt in zip(requests, prompts, strict=True):
                if self._surroundings.requests.is_asked:
                    break
                watch.forget()
                latents.append(self._denoise(request, prompt))
                blames.append("" if bool(latents[-1].isfinite().all()) else watch.blame())
        with family.alone("vae"):  # outside of autocast, where the VAE could overflow
            pairs = zip(latents, blames, strict=True)
            decoded = (family.latent_space.pictures(each, partial(str, blame)) for each, blame in pairs)
            return [processor.postprocess(each, output_type="pil")[0] for each in decoded]

    def _denoise(self, request: SampleRequest, prompt: dict[str, Tensor]) -> Tensor:
        """The latents [1, C, h, w] of a request."""
        pipeline, options = self._family.pipeline, self._options
        pipeline.set_progress_bar_config(disable=True)
        guidance = (
            {} if options.validation_guidance_scale is None else {"guidance_scale": options.validation_guidance_scale}
        )
        # the noise that the pipeline would draw, but always in float32, so that its scheduler computes in float32
        shape = self._family.latent_space.shape((self._resolution, self._resolution))
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(request.seed))
        controls = self._controls
        with autocast(self._accelerator), controllable(controls, pipeline), controls.attached(pipeline):
            self._sampler = sampler_name(pipeline.scheduler)
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
        """Writes a PNG with its prompt, seed and settings as PNG text."""
        path.parent.mkdir(parents=True, exist_ok=True)
        family, guidance = self._family, self._options.validation_guidance_scale
        drawing = Drawing(
            seed=request.seed,
            size=image.size,
            sampler=self._sampler,
            steps=self._options.validation_num_inference_steps,
            guidance=call_default(family.pipeline, "guidance_scale") if guidance is None else guidance,
            prompt=request.prompt,
            negative_prompt=self._options.validation_negative_prompt or "",
            model=self._model,
            more=[("Clip skip", family.clip_skip_of_uis)],
        )
        facts = {
            "prompt": request.prompt,
            "negative_prompt": self._options.validation_negative_prompt,
            "seed": request.seed,
            "num_inference_steps": self._options.validation_num_inference_steps,
            "guidance_scale": self._options.validation_guidance_scale,
        }
        image.save(path, pnginfo=png_texts(facts, drawing))
