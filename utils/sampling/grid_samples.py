"""Samples of an unconditional or class-conditional model, always from the same noise: images, a grid, a film strip."""

import logging
import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from utils.config.progress import Progress
from utils.data.images import decode
from utils.diffusion.samplers import sampler_of
from utils.models.unconditional import UnconditionalFamily
from utils.runtime.atomic_files import or_without
from utils.runtime.processes import autocast, on_main_process, write_json
from utils.runtime.sharding import unsharded
from utils.sampling.infotext import Drawing, DrawnModel, png_texts, sampler_name
from utils.sampling.sample_options import SamplingOptions
from utils.sampling.sample_record import RECORD, STEP, STRIP, SampleFacts, SampleRecord
from utils.sampling.samples import LAST, Sample, Surroundings

logger = logging.getLogger(__name__)
GRID = "grid.png"
FRAMES = 20  # most frames of a film strip
GAP = 2  # pixels between the images of a grid
LARGEST_PICTURE = 256  # longest edge in a grid, in pixels


class GridSampler:
    """Draws the samples of a run into `output_dir/samples/`; each process draws its share.

    Sample n always has the seed `seed + n`, and the class n modulo the number of classes.
    """

    def __init__(self, surroundings: Surroundings, family: UnconditionalFamily, options: SamplingOptions):
        self._surroundings = surroundings
        self._accelerator, self._controls = surroundings.accelerator, surroundings.controls
        self._controls.check(sampler_of(family.pipeline.scheduler, options.sampler, options.eta))
        if options.eta > 0:
            said = "--eta %g: the samples of this run are drawn with it, but the exported pipeline uses eta 0"
            logger.warning(said, options.eta)
        self._steps = options.steps_of(family.pipeline.scheduler)
        self._family = family
        self._options = options
        self._folder = surroundings.folder / "samples"
        self._record = SampleRecord(self._folder, surroundings.seen)
        self._seeds = surroundings.seeds(options.count)
        classes = sorted(family.classes)
        self._labels = [classes[number % len(classes)] for number in range(options.count)] if classes else []

    @property
    def count(self) -> int:
        """The number of samples drawn each time."""
        return len(self._seeds)

    def begin(self, first_step: int) -> None:
        """Renames samples, and drops lines of their record, of steps after the one from which the run resumes."""
        on_main_process(self._accelerator, partial(self._record.begin, first_step))

    def draw_first(self, progress: Progress) -> list[Sample]:
        """Draws all samples before the first step, of what the training starts from, into `samples/step-0/`."""
        return self.draw(progress)

    def is_due(self, progress: Progress) -> bool:
        """Whether samples are due after a step; the validation loss is measured at the same steps."""
        return self._options.is_due(progress)

    def draw(self, progress: Progress, is_last: bool = False) -> list[Sample]:
        """Draws all samples, or fewer if a signal arrives; returns them, in order, on every process.

        They are saved in `samples/step-{step}/`, the last ones in `samples/final/`.

        The denoiser must be in evaluation mode, and hold the weights to draw with.
        """
        # This process's share, in batches.
        mine = self._surroundings.share(range(len(self._seeds)))
        drawn: list[tuple[int, Image.Image]] = []
        at_once = self._options.eval_batch_size
        logger.info("drawing %d samples of step %d: %s", len(self._seeds), progress.step, self._folder)
        with self._family.awake(), unsharded(self._family.pipeline.components.values()):
            for begin in range(0, len(mine), at_once):
                if self._surroundings.requests.is_asked:
                    break
                numbers = mine[begin : begin + at_once]
                drawn += zip(numbers, self._draw(numbers), strict=True)

        self._surroundings.requests.timers.samples.restart()

        # All samples, on every process; the main process saves them.
        shared = self._surroundings.gather(drawn)
        if self._accelerator.is_main_process and shared:
            images, numbers = [image for _, image in shared], [number for number, _ in shared]
            with or_without(f"a part of {self._folder}"):
                self._save(images, numbers, progress.step, is_last)
        place = f"{self._folder.name}/{LAST if is_last else f'step-{progress.step}'}"
        return [
            Sample(image, self._caption(number), f"{place}/{_file_name(row)}")
            for row, (number, image) in enumerate(shared)
        ]

    def _draw(self, numbers: Sequence[int]) -> list[Image.Image]:
        options, family = self._options, self._family
        scheduler = sampler_of(family.pipeline.scheduler, options.sampler, options.eta)
        seeds = [self._seeds[number] for number in numbers]
        labels = [self._labels[number] for number in numbers] if self._labels else []
        with autocast(self._accelerator), self._controls.attached(family.pipeline, scheduler):
            return family.draw(seeds, labels, scheduler, self._steps, options.guidance_scale, options.eta)

    def _caption(self, number: int) -> str:
        return self._family.classes[self._labels[number]] if self._labels else f"sample {number}"

    def _drawing(self, number: int, size: tuple[int, int], model: DrawnModel) -> Drawing:
        """The settings of a sample; `size` is its width and height in pixels."""
        options = self._options
        return Drawing(
            seed=self._seeds[number],
            size=size,
            sampler=sampler_name(sampler_of(self._family.pipeline.scheduler, options.sampler, options.eta)),
            steps=self._steps,
            guidance=options.guidance_scale if self._labels else None,
            model=model,
            more=[("Eta DDIM", options.eta or None), ("Class", self._caption(number) if self._labels else None)],
        )

    def _facts(self, number: int, size: tuple[int, int], file: str) -> SampleFacts:
        """The line of a sample in the record; `size` is its width and height in pixels."""
        caption = self._caption(number) if self._labels else None
        guidance = self._options.guidance_scale if self._labels else None
        return SampleFacts(file, caption, None, *size, self._seeds[number], self._steps, guidance)

    def _save(self, images: Sequence[Image.Image], numbers: Sequence[int], step: int, is_last: bool) -> None:
        of_step = self._folder / f"step-{step}"
        folder = self._folder / LAST if is_last else of_step
        for old in (folder, of_step):  # a resumed run may reach the same step again
            shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(parents=True)
        drawn, lines = [], []
        model = DrawnModel(self._surroundings.folder.resolve().name)
        for place, (number, image) in enumerate(zip(numbers, images, strict=True)):
            file = _file_name(place)
            image.save(folder / file, pnginfo=png_texts({}, self._drawing(number, image.size, model)))
            drawn.append({"file": file, "seed": self._seeds[number], "of": self._caption(number)})
            lines.append(self._facts(number, image.size, f"{self._folder.name}/{folder.name}/{file}"))
        write_json(folder / RECORD, {"step": step, "samples": drawn})
        self._record.add(step, lines)
        grid_of(images, math.ceil(math.sqrt(len(images)))).save(folder / GRID)
        frames = film(self._folder)
        grid_of(frames, len(frames)).save(self._folder / STRIP)


def _file_name(place: int) -> str:
    """The name of the file of a sample, by its place among those drawn."""
    return f"{place:03d}.png"


def film(folder: Path) -> list[Image.Image]:
    """Returns the first sample of each step at which samples were drawn, in order of steps.

    At most FRAMES, spread evenly over the logarithm of the step, because most changes come early.
    """
    found = {
        math.inf if path.name == LAST else int(path.name.partition("-")[2]): path / "000.png"
        for path in folder.iterdir()
        if (path.name == LAST or STEP.fullmatch(path.name)) and (path / "000.png").is_file()
    }
    frames = []
    for step in _spread(sorted(found)):
        frames.append(decode(str(found[step])))
    return frames


def _spread(steps: list[float]) -> list[float]:
    """At most FRAMES of the ascending steps, including the first and the last."""
    if len(steps) <= FRAMES:
        return steps
    ordered = np.array(steps[:-1])
    wanted = np.geomspace(max(ordered[0], 1), ordered[-1], FRAMES - 1)
    near = {int(np.abs(ordered - step).argmin()) for step in wanted}
    return [steps[number] for number in sorted(near)] + steps[-1:]


def grid_of(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Returns a grid of images, each in the middle of its cell; all are scaled by the same factor.

    Small images are enlarged without smoothing, large ones reduced.
    """
    # The size of the cells.
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    scale = (
        max(1, 64 // max(width, height))
        if max(width, height) <= LARGEST_PICTURE
        else LARGEST_PICTURE / max(width, height)
    )
    width, height = max(1, round(width * scale)), max(1, round(height * scale))

    # The grid, row by row.
    rows = math.ceil(len(images) / columns)
    size = (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP)
    sheet = Image.new("RGBA" if images[0].mode == "RGBA" else "RGB", size, "white")
    for number, image in enumerate(images):
        shown = image.convert(sheet.mode)
        own = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        if shown.size != own:
            shown = shown.resize(own, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
        left, top = GAP + number % columns * (width + GAP), GAP + number // columns * (height + GAP)
        sheet.paste(shown, (left + (width - own[0]) // 2, top + (height - own[1]) // 2))
    return sheet
