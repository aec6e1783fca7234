"""The samples of a run: drawn before its first step, when they are due, and of its result; sent to the log."""

import signal
from typing import Protocol, Self

import numpy as np

from utils.config.options import Stopped, UserError
from utils.config.progress import Progress
from utils.data.buckets import NONE
from utils.data.plan import PlannedImages
from utils.data.stream import StreamedImages
from utils.sampling.grid_samples import GridSampler
from utils.sampling.infotext import DrawnModel
from utils.sampling.prompt_rows import EDGE_STEP
from utils.sampling.prompt_samples import PromptSampler, TrainedModel
from utils.sampling.samples import Sample
from utils.training.data import TrainingData
from utils.training.log import RunLog
from utils.training.session import Session
from utils.training.state import TrainingState
from utils.training.task import Task
from utils.training.text_to_image_options import Options as TextOptions
from utils.training.text_to_image_pipeline import FoundPipeline
from utils.training.unconditional_options import Options as UnconditionalOptions

MOST_SIZES = 3  # bucket sizes that samples take in turn


class Sampler(Protocol):
    """Draws the samples of a run into its output folder; all processes must call each method."""

    @property
    def count(self) -> int:
        """The number of samples drawn each time."""

    def begin(self, first_step: int) -> None:
        """Renames samples of steps after the one from which the run resumes."""

    def is_due(self, progress: Progress) -> bool:
        """Whether samples are due after a step."""

    def draw(self, progress: Progress, is_last: bool = False) -> list[Sample]:
        """Draws all samples, or fewer if a signal arrives."""

    def draw_first(self, progress: Progress) -> list[Sample]:
        """Draws all samples of what the training starts from, or fewer if a signal arrives."""


class RunSamples:
    """Draws the samples of a run with its current weights, and sends them to the log."""

    def __init__(
        self,
        sampler: Sampler,
        session: Session,
        state: TrainingState,
        tags: tuple[str, str],
        at_start: bool,
    ):
        """Args:
        tags: names in the trackers of samples between steps, and of those of the result.
        at_start: whether to draw before the first step.
        """
        self._sampler, self._session, self._state = sampler, session, state
        self._tags, self._at_start = tags, at_start

    @classmethod
    def of_prompts(
        cls,
        options: TextOptions,
        found: FoundPipeline,
        session: Session,
        data: TrainingData,
        task: Task,
        state: TrainingState,
    ) -> Self:
        """Returns the samples of validation prompts.

        Raises:
            UserError: if a size of the prompts does not fit the VAE, or the adapter can't be scaled as they ask.
        """
        check_rows(options, task)
        drawing, epochs = options.samples, found.default_epochs
        sizes, trained = sample_sizes(data.images, found.resolution), trained_model(options, found, session)
        sampler = PromptSampler(session.surroundings, task.family, drawing, sizes, epochs, trained)
        return cls(sampler, session, state, ("validation", "test"), drawing.sample_at_start)

    @classmethod
    def of_grid(cls, options: UnconditionalOptions, session: Session, task: Task, state: TrainingState) -> Self:
        """Returns the samples of a model without text."""
        sampler = GridSampler(session.surroundings, task.family, options.samples)
        return cls(sampler, session, state, ("test_samples", "test_samples"), options.samples.sample_at_start)

    def begin(self, first_step: int) -> None:
        """Renames samples, and drops lines of their record, of steps after the one from which the run resumes."""
        self._sampler.begin(first_step)

    def is_due(self, progress: Progress) -> bool:
        """Whether samples are due after a step; the validation loss is measured at the same steps."""
        return self._sampler.is_due(progress)

    def draw_first(self, log: RunLog) -> None:
        """Draws samples before the first step of a new run: those of the base model, which later ones compare with.

        Raises:
            Stopped: if a signal to any process interrupted it.
        """
        progress = self._state.progress()
        if not (self._at_start and progress.is_first and self._sampler.count):
            return
        with log.paused("samples"), self._state.evaluating():
            samples = self._sampler.draw_first(progress)
        log.images(samples, progress.step, self._tags[0])
        if len(samples) < self._sampler.count:
            raise Stopped("stopped before step 1", self._session.requests.number or signal.SIGTERM)

    def draw_if_due(self, progress: Progress, log: RunLog) -> None:
        """Draws samples after a step, if they are due."""
        if self.is_due(progress):
            with log.paused("samples"), self._state.evaluating():
                log.images(self._sampler.draw(progress), progress.step, self._tags[0])

    def draw_last(self, log: RunLog) -> list[Sample]:
        """Draws the samples of the result, whose weights the modules must hold; returns those that show it as it is."""
        samples = self._sampler.draw(self._state.progress(), is_last=True)
        log.images(samples, self._state.step, self._tags[1])
        return [sample for sample in samples if not sample.is_scaled]


def trained_model(options: TextOptions, found: FoundPipeline, session: Session) -> TrainedModel:
    """Returns the model that a run trains, as the texts of its samples name it."""
    base, adapter = found.source.path, options.adaptation.start_path
    has_adapter = options.adaptation.adaptation != "full"
    model = DrawnModel.of_training(session.folder.path, base if has_adapter else None)
    start = DrawnModel.at(base, adapters=[adapter] if adapter else [])
    return TrainedModel(model, start if options.model.is_pretrained else None, has_adapter, adapter is None)


def sample_sizes(images: PlannedImages | StreamedImages, resolution: int) -> list[tuple[int, int]]:
    """Returns the (width, height) in pixels that samples take in turn: the buckets with the most images, at most three.

    A stream does not know how many images its buckets have: its samples are square.
    """
    plan = images.plan
    counts = np.bincount(plan.bucket_of[plan.bucket_of != NONE], minlength=len(plan.sizes))
    used = [number for number in np.argsort(-counts, kind="stable") if counts[number]]
    sizes = [plan.sizes[number] for number in used if all(edge % EDGE_STEP == 0 for edge in plan.sizes[number])]
    return sizes[:MOST_SIZES] or [(resolution, resolution)]


def check_rows(options: TextOptions, task: Task) -> None:
    """Checks the prompts' own settings against the model.

    Raises:
        UserError: naming the prompt and the setting.
    """
    factor = task.family.latent_space.factor
    for row in options.samples.rows:
        where = f"{options.samples.prompts_flag} {options.samples.validation_prompts_file}, {row.place}"
        for name in ("width", "height"):
            edge = getattr(row, name)
            if edge is not None and edge % factor:
                below = edge - edge % factor
                raise UserError(
                    f"{where}: {name} {edge} must be divisible by {factor} for this VAE; try {below or factor} or "
                    f"{below + factor}"
                )
        if row.lora_scale not in (None, 1) and task.adaptation.is_dora:
            raise UserError(f"{where}: lora_scale {row.lora_scale:g}: a DoRA's norm contains its scale; leave it out")
