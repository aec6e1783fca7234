"""The loader: from a step's number to its batches, everything random drawn on the way."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.data.images import ImageOptions, cut, draw_cut, read_rgb
from utils.data.sampler import GlobalBatches, Piece, Pieces
from utils.data.sources import Records
from utils.noise import NoiseDraws, stack_draws
from utils.options import ProcessError, option, require_fraction, require_not_negative, require_positive
from utils.records import Batch, ImageRecord
from utils.seeding import Stream, generator

logger = logging.getLogger(__name__)
MAX_REPLACEMENTS = 100


@dataclass(frozen=True)
class LoaderOptions:
    train_batch_size: int = option(16, "samples a process trains on at once")
    gradient_accumulation_steps: int = option(1, "batches whose gradients are added up to one optimizer step")
    dataloader_num_workers: int | None = option(
        None, "processes that load and draw; by default up to 8 for each GPU, and 0 without one"
    )
    caption_dropout: float = option(
        0.0,
        "portion of the samples that train without a caption, for classifier-free guidance",
        aliases=["--proportion_empty_prompts"],
    )

    def __post_init__(self) -> None:
        require_positive(self, "train_batch_size", "gradient_accumulation_steps")
        require_not_negative(self, "dataloader_num_workers")
        require_fraction(self, "caption_dropout")

    def num_workers(self, num_processes: int) -> int:
        """Loader processes for this process, of `num_processes`, which may be on several machines."""
        num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
        if self.dataloader_num_workers is not None:
            return self.dataloader_num_workers
        if not torch.cuda.is_available():
            return 0
        return min(8, max(1, (os.cpu_count() or 1) // num_local_processes - 1))


@dataclass(frozen=True)
class SampleSpec:
    """What the loader must know of the model.

    Attributes:
        resolution: edge of the crops in pixels.
        latent_shape: [C, h, w] of their latents.
        tokenize: B captions -> [B, text encoders, tokens] int64.
    """

    resolution: int
    latent_shape: tuple[int, int, int]
    tokenize: Callable[[list[str]], Tensor] = field(repr=False)


class TrainingDataset(Dataset):
    """Maps a `Piece` (a step and some slots of its global batch) to its `Batch`."""

    def __init__(
        self,
        records: Records,
        batches: GlobalBatches,
        spec: SampleSpec,
        image_options: ImageOptions,
        noise_draws: NoiseDraws,
        caption_dropout: float,
    ):
        self.records = records
        self.batches = batches
        self.spec = spec
        self.image_options = image_options
        self.noise_draws = noise_draws
        self.caption_dropout = caption_dropout
        self.seed = batches.seed

    def __getitem__(self, piece: Piece) -> Batch:
        unreadable: list[tuple[str, str]] = []
        keys, pixels, crops, captions, dropped, draws = [], [], [], [], [], []
        for slot in piece.slots:
            record, image, number, passing = self._read(piece.step, slot, unreadable)
            cut_pixels, crop = cut(
                image, self.spec.resolution, self.image_options, draw_cut(self.seed, number, passing)
            )
            keys.append(record.key)
            pixels.append(cut_pixels)
            crops.append(crop.row())
            captions.append(self._caption(record, piece.step, slot))
            dropped.append(self._is_dropped(piece.step, slot))
            draws.append(self.noise_draws.draw(piece.step, slot, self.spec.latent_shape))
        shown = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        return Batch(
            step=piece.step,
            slots=torch.tensor(piece.slots),
            keys=tuple(keys),
            pixels=torch.from_numpy(np.stack(pixels)),
            input_ids=self.spec.tokenize(shown),
            caption_dropped=torch.tensor(dropped),
            crops=torch.tensor(crops, dtype=torch.float32),
            unreadable=tuple(unreadable),
            **stack_draws(draws),
        )

    def _read(self, step: int, slot: int, unreadable: list) -> tuple[ImageRecord, Image.Image, int, int]:
        """The slot's record, or if it can't be decoded another, drawn by (seed, step, slot): the same on a resume."""
        number, passing = self.batches.draw(step, slot)
        replacements = generator(self.seed, step, slot, Stream.REPLACEMENT)
        for _ in range(MAX_REPLACEMENTS):
            record = self.records[number]
            try:
                return record, read_rgb(record.source), number, passing
            except (OSError, ValueError) as error:
                unreadable.append((record.key, str(error)))
                number = int(replacements.integers(len(self.records)))
        raise ProcessError(f"{MAX_REPLACEMENTS} images in a row can't be read, the last is {unreadable[-1][0]}")

    def _caption(self, record: ImageRecord, step: int, slot: int) -> str:
        if len(record.captions) == 1:
            return record.captions[0]
        return record.captions[int(generator(self.seed, step, slot, Stream.CAPTION).integers(len(record.captions)))]

    def _is_dropped(self, step: int, slot: int) -> bool:
        return bool(generator(self.seed, step, slot, Stream.CAPTION_DROPOUT).random() < self.caption_dropout)


def batches_by_step(
    dataset: TrainingDataset, pieces: Pieces, num_workers: int, pin_memory: bool
) -> Iterator[tuple[int, Iterator[Batch]]]:
    """(step, this process's micro-batches of that step), step by step; micro-batches come as they are loaded."""
    if num_workers > 0:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked after the tokenizers' first use
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=pieces,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )
    batches = iter(loader)
    for step in pieces.steps:
        yield step, (_next(batches) for _ in pieces.slots)


def _next(batches: Iterator[Batch]) -> Batch:
    try:
        return next(batches)
    except ProcessError as error:  # of a worker it holds the worker's traceback, of which the last line is the message
        raise ProcessError(str(error).strip().splitlines()[-1].rpartition("ProcessError: ")[2]) from error
