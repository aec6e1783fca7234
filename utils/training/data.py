"""The training data of a run: its images, their order, and the loader of their batches."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from utils.config.batch import Batch
from utils.config.options import require
from utils.data.encodings import Encodings
from utils.data.file_listing import OWN, Fate
from utils.data.loader import SampleSpec, TrainingDataset, Waiting, batches_by_step
from utils.data.order import GlobalBatches, Pieces
from utils.data.plan import PlannedImages
from utils.data.stream import StreamedBatches, StreamedImages, StreamedPieces
from utils.diffusion.noise import NoiseDraws
from utils.models.base import Family
from utils.models.latent_scaling import known_scaling, measured_scaling, remember_scaling
from utils.runtime.processes import OutputFolder, on_main_process
from utils.training.options import TrainingOptions
from utils.training.preparation import DataPreparation
from utils.training.probes import Probes
from utils.training.session import Session
from utils.training.task import Task
from utils.training.validation_loss import HeldOut

logger = logging.getLogger(__name__)


@dataclass
class TrainingData:
    """The data a run trains on, and the number of steps.

    Attributes:
        preparation: lists images, fills the cache, and reports what became of each file.
        images: the training images, assigned to buckets.
        held_out_images: the images for the validation loss, if any.
        batches: which images are in the global batch of each step.
        total_steps: optimizer steps of the whole run.
        resolution: edge of a square image in pixels.
        group_size: number of consecutive samples from the same bucket.
        num_workers: loader workers of this process.
        encodings: the cached encodings, once `encode` has filled the cache.
        held_out: the encoded held-out images, once `encode` has run.
        probes: the encoded images that the verdict measures, once `encode` has run.
    """

    preparation: DataPreparation
    images: PlannedImages | StreamedImages
    held_out_images: PlannedImages | None
    batches: GlobalBatches | StreamedBatches
    total_steps: int
    resolution: int
    group_size: int
    num_workers: int
    encodings: Encodings = field(default_factory=Encodings)
    held_out: HeldOut | None = None
    probes: Probes | None = None
    _unreadable: dict[str, str] = field(default_factory=dict)  # found by this process, not yet sent to the others

    @classmethod
    def plan(cls, options: TrainingOptions, session: Session, resolution: int) -> Self:
        """Lists the images, assigns them to buckets, and fixes their order for every step.

        Raises:
            UserError: if there are no images to train on, or too many can't be read.
        """
        resumption, num_processes = session.resumption, session.accelerator.num_processes
        preparation = _preparation(options, session)
        logger.info("listing the images of %s", options.data_name)
        images = preparation.choose_images(resolution, resumption.group_size)
        held_out = preparation.choose_held_out(resolution)
        batches = images.batches(options.loader.global_batch(num_processes), resumption.group_size, session.seed)
        session.count_samples(batches.size)
        epochs = options.checkpoint.checkpointing_epochs
        known = epochs is None or batches.samples_per_epoch != math.inf
        must = "be left out: the length of the stream is unknown"
        require(known, "checkpointing_epochs", epochs, must, "give --checkpointing_steps")
        total_steps = options.length.max_train_steps or batches.steps_in(options.length.num_train_epochs)
        num_workers = options.loader.num_workers(num_processes)
        group_size = resumption.group_size
        return cls(preparation, images, held_out, batches, total_steps, resolution, group_size, num_workers)

    @property
    def sizes_vary(self) -> bool:
        """Whether batches have several image sizes."""
        return len(self.images.plan.sizes) > 1

    def encode(self, options: TrainingOptions, session: Session, task: Task) -> None:
        """Moves the model to the device, encodes the held-out images, fills the cache, and writes the data report."""
        task.move_to_device(options, session)
        self._settle_scaling(options, session, task.family)
        session.requests.check()
        if self.held_out_images is not None:
            self.held_out = HeldOut(options, session, task, self.held_out_images)
        if not (options.verdict.no_verdict or options.cache.ends_when_filled):
            samples = self.total_steps * self.batches.size
            self.probes = Probes(options, session, task, self.images, self.held_out_images, samples)
        keep_vae = bool(task.terms)
        self.encodings = self.preparation.fill_cache(task.family, self.images, self.num_workers, keep_vae)
        self.write_report()

    def _settle_scaling(self, options: TrainingOptions, session: Session, family: Family) -> None:
        """Sets the latent scaling of a VAE without one: measured on the data, or the one measured before a resume."""
        if not family.measures_scaling:
            return

        def settle() -> float:
            known = None if session.checkpoint is None else known_scaling(session.checkpoint.parent)
            factor = known or measured_scaling(family, self.images, options.image, session.device, session.seed)
            remember_scaling(session.folder.path, factor)
            return factor

        family.rescale(on_main_process(session.accelerator, settle))

    def note_unreadable(self, found: dict[str, str]) -> int:
        """Notes images that could not be read, until `share_unreadable` sends them; returns how many are new."""
        new = {key: why for key, why in found.items() if key not in self.images.bad and key not in self._unreadable}
        self._unreadable |= new
        return len(new)

    def share_unreadable(self) -> None:
        """Sends unreadable images to all processes; all processes must call it."""
        self.preparation.share_unreadable(self._unreadable, self.images)

    def write_report(self) -> None:
        """Writes `data_report.json`, and `data_report.jsonl` with a line per file."""
        self.preparation.write_report(self.images)


@dataclass(frozen=True)
class Feed:
    """This process's samples, step by step.

    Attributes:
        dataset: loads the samples.
        at_once: samples that a process computes at once if memory allows.
        group_size: number of consecutive samples from the same bucket.
        num_workers: loader workers of this process.
        pieces: which samples are in the micro-batches of each step.
        waiting: time that training waited for the current step's data.
        steps: yields (step, its micro-batches), from the first step to the last.
    """

    dataset: TrainingDataset
    at_once: int
    group_size: int
    num_workers: int
    pieces: Pieces | StreamedPieces
    waiting: Waiting
    steps: Iterator[tuple[int, Iterator[Batch]]]

    @classmethod
    def start(cls, options: TrainingOptions, session: Session, data: TrainingData, task: Task, steps: range) -> Self:
        """Starts the loader for a range of optimizer steps."""
        accelerator, family, loader, batches = session.accelerator, task.family, options.loader, data.batches
        space = family.latent_space
        spec = SampleSpec(space.shape, family.tokenizer(), options.cache.cut_variants, options.cache.text_variants)
        draws = NoiseDraws(options.noise, task.process, session.seed, batches.size, space.has_posterior)
        dataset = TrainingDataset(data.images, batches, spec, options.image, draws, data.encodings)
        at_once = loader.samples_at_once(options.buckets.use_aspect_ratio_buckets, data.group_size)
        pieces = data.images.pieces(
            batches, at_once, accelerator.process_index, accelerator.num_processes, steps.start, steps.stop
        )
        waiting, pins = Waiting(), accelerator.device.type == "cuda"
        by_step = batches_by_step(dataset, pieces, data.num_workers, loader.dataloader_timeout, pins, waiting)
        return cls(dataset, at_once, data.group_size, data.num_workers, pieces, waiting, by_step)

    def largest(self, timestep: int) -> Batch:
        """Returns the largest batch of the run, of `at_once` samples, at a timestep."""
        return self.dataset.largest(self.at_once, timestep)


def _preparation(options: TrainingOptions, session: Session) -> DataPreparation:
    folder = session.folder
    return DataPreparation(
        session.accelerator,
        options.data,
        options.source,
        options.captions.for_source(options.source, session.resumption.classes),
        options.selection,
        options.image,
        options.buckets,
        options.cache,
        options.held_out,
        session.seed,
        None if options.runtime.dry_run else folder.path,
        session.requests,
        own_folders(options, folder),
        session.resumption.splits_by_content,
    )


def own_folders(options: TrainingOptions, folder: OutputFolder) -> dict[Path, Fate]:
    """Returns the folders that the run itself writes to, whose files are not data."""
    found = {folder.path: Fate(OWN, "the output of this run"), options.cache.folder: Fate(OWN, "the cache of this run")}
    if options.data.cache_dir is not None:
        found[Path(options.data.cache_dir)] = Fate(OWN, "the folder of --cache_dir")
    return found
