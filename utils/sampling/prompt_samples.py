"""Samples of the validation prompts, drawn during training and at its end."""

import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from utils.config.progress import Progress
from utils.models.adapter_strength import adapters_at
from utils.models.not_finite import watching
from utils.models.scaled_adapters import number_text
from utils.models.text_to_image import TextFamily
from utils.runtime.atomic_files import or_without
from utils.runtime.processes import autocast, on_main_process
from utils.runtime.sharding import unsharded
from utils.sampling.controls import controllable
from utils.sampling.infotext import Drawing, DrawnModel, call_default, png_texts, sampler_name
from utils.sampling.prompts import warn_of_written_settings
from utils.sampling.sample_options import SampleRequest, ValidationOptions
from utils.sampling.sample_record import BASE, LINES, SampleFacts, SampleRecord
from utils.sampling.samples import LAST, Sample, Surroundings

logger = logging.getLogger(__name__)


class TrainedModel(NamedTuple):
    """The model that a run trains.

    Attributes:
        model: its name in the texts of images; None: they don't name it.
        start: the name of what the training starts from; None: the same.
        has_adapter: whether an adapter trains, which samples may scale.
        adapter_is_new: whether the adapter does not change the base before the first step.
    """

    model: DrawnModel | None = None
    start: DrawnModel | None = None
    has_adapter: bool = False
    adapter_is_new: bool = True


class PromptSampler:
    """Draws samples of the validation prompts into `output_dir/samples/`; each process draws its share."""

    def __init__(
        self,
        surroundings: Surroundings,
        family: TextFamily,
        options: ValidationOptions,
        sizes: Sequence[tuple[int, int]],
        default_epochs: int,
        trained: "TrainedModel | None" = None,
    ):
        """Args:
        sizes: (width, height) in pixels that samples take in turn if their prompt sets none.
        default_epochs: epochs between samples if the options set no interval.
        trained: the model, as the texts of the images name it; by default they don't.
        """
        self._surroundings = surroundings
        self._accelerator, self._controls = surroundings.accelerator, surroundings.controls
        self._family = family
        self._options = options
        self._folder = surroundings.folder / "samples"
        self._record = SampleRecord(self._folder, surroundings.seen)
        self._default_epochs = default_epochs
        self._trained = trained or TrainedModel()
        self._requests = options.requests(surroundings.seed, sizes)
        self._model, self._sampler = self._trained.model, sampler_name(family.pipeline.scheduler)
        self._guidance = call_default(family.pipeline, "guidance_scale")
        warn_of_written_settings(options.prompts_flag, options.prompts)

    @property
    def count(self) -> int:
        """The number of samples drawn each time."""
        return len(self._requests)

    def begin(self, first_step: int) -> None:
        """Renames samples, and drops lines of their record, of steps after the one from which the run resumes."""
        on_main_process(self._accelerator, partial(self._record.begin, first_step))

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
        drawn = self._drawn(name, self._requests)
        self._surroundings.requests.timers.samples.restart()
        replaces = {progress.step} if is_last else set()
        return self._recorded(progress.step, {name: (self._requests, drawn)}, replaces)

    def draw_first(self, progress: Progress) -> list[Sample]:
        """Draws all samples before the first step, of what the training starts from; fewer if a signal arrives.

        They are saved in `samples/step-0/`. An adapter that training continues from (--lora_weights) is part of that:
        the base alone, without it, is drawn into `samples/base/` from the same noise.
        """
        name, trained = f"step-{progress.step}", self._trained
        self._model = trained.start or trained.model
        wanted = {name: self._requests}
        if trained.has_adapter and not trained.adapter_is_new:
            wanted[BASE] = [request._replace(lora_scale=0.0) for request in self._requests]
        found = {folder: (requests, self._drawn(folder, requests)) for folder, requests in wanted.items()}
        self._model = trained.model
        samples = self._recorded(progress.step, found)
        is_whole = len(samples) == self.count * len(wanted)
        return samples[: self.count] if is_whole else samples[: self.count - 1]

    def _drawn(self, name: str, requests: Sequence[SampleRequest]) -> list[tuple[int, Image.Image]]:
        """Draws and saves samples into a folder; returns (number, image) of all processes, fewer after a signal."""
        mine = dict(self._surroundings.share(list(enumerate(requests))))
        drawn = []
        if requests:
            logger.info("drawing %d samples: %s", len(requests), self._folder / name)
        with (
            self._family.awake() if requests else nullcontext(),
            unsharded(self._family.pipeline.components.values()),
        ):
            for index, image in zip(mine, self._draw(list(mine.values())), strict=False):
                file = self._folder / name / f"{mine[index].name}.png"
                with or_without(file):
                    self._save(image, mine[index], file)
                drawn.append((index, image))
        return self._surroundings.gather(drawn)

    def _recorded(
        self,
        step: int,
        found: Mapping[str, tuple[Sequence[SampleRequest], Sequence[tuple[int, Image.Image]]]],
        replaced: Collection[int] = (),
    ) -> list[Sample]:
        """Records drawn samples, given by their folder, and returns them.

        Args:
            replaced: steps whose own folders these samples replace.
        """
        samples, facts = [], []
        for name, (requests, drawn) in found.items():
            for index, image in drawn:
                request = requests[index]
                file = f"{self._folder.name}/{name}/{request.name}.png"
                is_scaled = request.lora_scale not in (None, 1)
                samples.append(Sample(image, request.prompt, file, request.negative_prompt or "", is_scaled))
                facts.append(self._facts(file, request))
        if self._accelerator.is_main_process and samples:
            with or_without(self._folder / LINES):
                for each in replaced:
                    shutil.rmtree(self._folder / f"step-{each}", ignore_errors=True)
                self._record.add(step, facts)
        return samples

    def _facts(self, file: str, request: SampleRequest) -> SampleFacts:
        width, height = request.size
        guidance = self._guidance if request.guidance_scale is None else request.guidance_scale
        return SampleFacts(
            file,
            request.prompt,
            request.negative_prompt,
            width,
            height,
            request.seed,
            request.steps,
            guidance,
            self._scale(request),
        )

    def _scale(self, request: SampleRequest) -> float | None:
        """The factor on what the adapter adds to the weights; None without an adapter."""
        return (1.0 if request.lora_scale is None else request.lora_scale) if self._trained.has_adapter else None

    def _adapters_at(self, request: SampleRequest) -> AbstractContextManager[None]:
        """Context manager: the trained adapter acts at the scale of a request."""
        parts = [part for part in self._family.pipeline.components.values() if isinstance(part, nn.Module)]
        return adapters_at(request.lora_scale, parts)

    @torch.no_grad()
    def _draw(self, requests: Sequence[SampleRequest]) -> list[Image.Image]:
        """Draws the images of some requests, with one model on the device at a time; fewer if a signal arrives."""
        # Prompts, then latents, then images.
        family = self._family
        processor = family.pipeline.image_processor
        with family.alone(*family.text_encoder_names), autocast(self._accelerator):
            prompts = []
            for request in requests:
                with self._adapters_at(request):
                    prompts.append(family.prompt_arguments(request.prompt, request.negative_prompt))
        with family.alone(family.denoiser_name), watching(family.pipeline) as watch:
            latents, blames = [], []
            for request, prompt in zip(requests, prompts, strict=True):
                if self._surroundings.requests.is_asked:
                    break
                watch.forget()
                with self._adapters_at(request):
                    latents.append(self._denoise(request, prompt))
                blames.append("" if bool(latents[-1].isfinite().all()) else watch.blame())
        with family.alone("vae"):  # outside of autocast, where the VAE could overflow
            pairs = zip(latents, blames, strict=True)
            decoded = (family.latent_space.pictures(each, partial(str, blame)) for each, blame in pairs)
            return [processor.postprocess(each, output_type="pil")[0] for each in decoded]

    def _denoise(self, request: SampleRequest, prompt: dict[str, Tensor]) -> Tensor:
        """The latents [1, C, h, w] of a request."""
        pipeline = self._family.pipeline
        pipeline.set_progress_bar_config(disable=True)
        guidance = {} if request.guidance_scale is None else {"guidance_scale": request.guidance_scale}
        width, height = request.size
        # the noise that the pipeline would draw, but always in float32, so that its scheduler computes in float32
        shape = self._family.latent_space.shape((width, height))
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(request.seed))
        controls = self._controls
        with autocast(self._accelerator), controllable(controls, pipeline), controls.attached(pipeline):
            self._sampler = sampler_name(pipeline.scheduler)
            return pipeline(
                **prompt,
                **guidance,
                height=height,
                width=width,
                num_inference_steps=request.steps,
                latents=noise,
                generator=torch.Generator().manual_seed(request.seed),
                output_type="latent",
            ).images

    def _save(self, image: Image.Image, request: SampleRequest, path: Path) -> None:
        """Writes a PNG with its prompt, seed and settings as PNG text."""
        path.parent.mkdir(parents=True, exist_ok=True)
        guidance = self._guidance if request.guidance_scale is None else request.guidance_scale
        drawing = Drawing(
            seed=request.seed,
            size=image.size,
            sampler=self._sampler,
            steps=request.steps,
            guidance=guidance,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt or "",
            model=self._model_at(request),
            more=[("Clip skip", self._family.clip_skip_of_uis)],
        )
        facts = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "seed": request.seed,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "lora_scale": request.lora_scale,
        }
        image.save(path, pnginfo=png_texts(facts, drawing))

    def _model_at(self, request: SampleRequest) -> DrawnModel | None:
        """The model that a request is drawn with, with the scale of its adapter."""
        scale = request.lora_scale
        if self._model is None or scale in (None, 1):
            return self._model
        names = [f"{name}={number_text(scale)}" for name in self._model.adapters] if scale else []
        return replace(self._model, adapters=names)
