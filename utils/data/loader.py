"""Loads training batches: reads images, chooses captions, and draws all random numbers by step and slot."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.config.batch import Batch, RecordPass
from utils.config.options import ProcessError, UserError
from utils.config.seeding import Stream, generator
from utils.data.captions import compose
from utils.data.crop_pixels import cut_out
from utils.data.encodings import Encodings
from utils.data.images import reason_of
from utils.data.options import ImageOptions
from utils.data.order import Draw, GlobalBatches, Piece, Pieces
from utils.data.plan import PlannedImages
from utils.data.sources import Records
from utils.data.stream import StreamedBatches, StreamedImages, StreamedPieces, StreamedRecords
from utils.data.workers import LoadingError, make_loader
from utils.diffusion.noise import NoiseDraws, stack_draws

MAX_REPLACEMENTS = 100


@dataclass(frozen=True)
class SampleSpec:
    """What the loader needs to know about the model and the random variants.

    Attributes:
        latent_shape: maps (width, height) of pixels to the shape [C, h, w] of their latents.
        tokenize: maps B captions to [B, text encoders, tokens] int64.
        cut_variants, text_variants: number of passes after which crops and flips, and tag orders, repeat; None for
            never.
    """

    latent_shape: Callable[[tuple[int, int]], tuple[int, int, int]] = field(repr=False)
    tokenize: Callable[[list[str]], Tensor] = field(repr=False)
    cut_variants: int | None = None
    text_variants: int | None = None


class Sight(NamedTuple):
    """One image as the model receives it.

    Attributes:
        values: pixels [3, H, W] uint8, or cached moments [2, C, h, w].
        crop: [6] float32, `Crop.row()`.
        mask: [1, h, w] uint8, or None without masks.
    """

    values: Tensor
    crop: Tensor
    mask: Tensor | None


class TrainingDataset(Dataset):
    """Dataset of batches: maps a `Piece` (a step and slots of its global batch, all from one bucket) to a `Batch`."""

    def __init__(
        self,
        images: PlannedImages | StreamedImages,
        batches: GlobalBatches | StreamedBatches,
        spec: SampleSpec,
        image_options: ImageOptions,
        noise_draws: NoiseDraws,
        encodings: Encodings | None = None,
    ):
        self.images = images
        self.sizes = images.plan.sizes
        self.batches = batches
        self.spec = spec
        self.image_options = image_options
        self.noise_draws = noise_draws
        self.encodings = encodings or Encodings()
        self.seed = batches.seed
        self._members: dict[tuple[int, int], np.ndarray] = {}

    def __getitem__(self, piece: Piece) -> Batch:
        # samples: read the image, the caption and the noise of each slot
        records = piece.streamed or self.images.records
        unreadable = [] if piece.streamed is None else list(piece.streamed.bad)
        chosen, keys, seen, texts, dropped, draws = [], [], [], [], [], []
        for slot in piece.slots:
            draw, sight = self._look(piece, slot, unreadable)
            text, drop = text_of(records, draw, self.seed, piece.step, slot, self.spec.text_variants)
            chosen.append(draw.record)
            keys.append(records.key(draw.record))
            seen.append(sight)
            texts.append(text)
            dropped.append(drop)
            shape = self.spec.latent_shape(self.sizes[draw.bucket])
            draws.append(self.noise_draws.draw(piece.step, slot, shape))

        # captions: tokenize them, or read their cached states
        states = input_ids = None
        if self.encodings.texts is None:
            input_ids = self.spec.tokenize(["" if drop else text for text, drop in zip(texts, dropped, strict=True)])
        else:
            entries = [self.encodings.texts.read(text, drop) for text, drop in zip(texts, dropped, strict=True)]
            states = {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}

        # batch: stack the samples; values are pixels, or moments if latents are cached
        is_live = self.encodings.latents is None
        values = torch.stack([sight.values for sight in seen])
        return Batch(
            step=piece.step,
            slots=tuple(piece.slots),
            keys=tuple(keys),
            pixels=values if is_live else None,
            moments=None if is_live else values,
            input_ids=input_ids,
            states=states,
            caption_dropped=torch.tensor(dropped),
            crops=torch.stack([sight.crop for sight in seen]),
            loss_weights=torch.tensor([records.loss_weight(index) for index in chosen]),
            unreadable=tuple(unreadable),
            masks=torch.stack([sight.mask for sight in seen]) if records.has_masks else None,
            **stack_draws(draws),
        )

    def largest(self, count: int, timestep: int) -> Batch:
        """Returns an empty batch with the largest possible shapes: `count` samples of the largest bucket.

        Args:
            timestep: the timestep of all samples.
        """
        width, height = max(self.sizes, key=lambda size: size[0] * size[1])
        latent = (count, *self.spec.latent_shape((width, height)))
        zeros, encodings = torch.zeros(latent), self.encodings
        pixels = np.zeros((count, self.image_options.channels, height, width), self.image_options.pixel_type)
        states = None
        if encodings.texts is not None:
            states = {
                name: state[None].repeat(count, *[1] * state.ndim)
                for name, state in encodings.texts.read("", True).items()
            }
        return Batch(
            step=0,
            slots=tuple(range(count)),
            keys=("",) * count,
            pixels=torch.from_numpy(pixels) if encodings.latents is None else None,
            moments=None if encodings.latents is None else torch.zeros(count, 2, *latent[1:]),
            input_ids=self.spec.tokenize([""] * count) if states is None else None,
            states=states,
            caption_dropped=torch.zeros(count, dtype=torch.bool),
            crops=torch.tensor([[height, width, 0.0, 0.0, height, width]]).repeat(count, 1),
            loss_weights=torch.ones(count),
            posterior_noise=zeros if self.noise_draws.has_posterior else None,
            noise=zeros,
            input_perturbation=zeros if self.noise_draws.options.input_perturbation else None,
            timesteps=torch.full((count,), timestep),
            masks=torch.full((count, 1, *latent[2:]), 255, dtype=torch.uint8) if self.images.has_masks else None,
        )

    def with_draws(self, batch: Batch) -> Batch:
        """Returns the batch with its noise and timesteps replaced by those of the first step."""
        shape = tuple(batch.noise.shape[1:])
        draws = [self.noise_draws.draw(0, slot, shape) for slot in range(len(batch))]
        return replace(batch, **stack_draws(draws))

    def _look(self, piece: Piece, slot: int, unreadable: list) -> tuple[Draw, Sight]:
        """Reads the image of a slot; if it is unreadable, another image of the same bucket and source.

        The replacement is drawn by (seed, step, slot), so that a resumed run chooses the same.

        Args:
            unreadable: (key, reason) of unreadable images; extended in place.

        Raises:
            ProcessError: if too many images in a row can't be read.
        """
        if piece.streamed is None:
            records, draw = self.images.records, self.batches.draw(piece.step, slot)
        else:
            records, draw = piece.streamed, piece.streamed.draw(slot - piece.slots[0])
        before = len(unreadable)
        for number in self._candidates(piece, slot, draw):
            draw = draw._replace(record=number)
            try:
                return draw, self._see(records, draw)
            except (OSError, ValueError) as error:
                unreadable.append((records.key(number), reason_of(error)))
        tried = len(unreadable) - before
        raise ProcessError(f"{tried} images in a row can't be read, the last one is {unreadable[-1][0]}")

    def _candidates(self, piece: Piece, slot: int, draw: Draw) -> Iterator[int]:
        """Yields the record of a slot, then its replacements in case it can't be read."""
        yield draw.record
        if piece.streamed is not None:
            yield from piece.streamed.instead(draw.record)
            return
        replacements = generator(self.seed, piece.step, slot, Stream.REPLACEMENT)
        members = self._members_like(draw)
        for _ in range(MAX_REPLACEMENTS - 1):
            yield int(members[replacements.integers(len(members))])

    def _see(self, records: Records | StreamedRecords, draw: Draw) -> Sight:
        """Reads an image and its mask from the cache or from files."""
        latents, masks = self.encodings.latents, self.encodings.masks
        if latents is not None:
            entry = latents.read(draw.record, draw.passing)
            mask = None if masks is None else masks.read(draw.record, draw.passing)["masks"]
            return Sight(entry["moments"], entry["crops"], mask)
        size, passing = self.sizes[draw.bucket], pass_of(records, draw, self.spec.cut_variants)
        shape = self.spec.latent_shape(size)[1:] if records.has_masks else None
        image, mask = records.image(draw.record), records.mask(draw.record)
        found = cut_out(image, mask, size, self.image_options, self.seed, passing, shape)
        mask = None if found.mask is None else torch.from_numpy(found.mask)[None]
        return Sight(torch.from_numpy(found.pixels), torch.tensor(found.crop.row()), mask)

    def _members_like(self, draw: Draw) -> np.ndarray:
        """Returns the indices of the records in the same bucket and source."""
        sources = self.images.records.source_numbers
        key = draw.bucket, int(sources[draw.record])
        if key not in self._members:
            self._members[key] = np.flatnonzero((self.images.plan.bucket_of == key[0]) & (sources == key[1]))
        return self._members[key]


def pass_of(records: Records | StreamedRecords, draw: Draw, variants: int | None) -> RecordPass:
    """Returns the record and variant that seed the crop and the tag order of a draw."""
    return RecordPass(records.identity(draw.record), draw.passing if variants is None else draw.passing % variants)


def text_of(
    records: Records | StreamedRecords, draw: Draw, seed: int, step: int, slot: int, variants: int | None
) -> tuple[str, bool]:
    """Returns (the caption text of a slot of a step, whether it is dropped)."""
    captions, options = records.captions(draw.record), records.caption_options(draw.record)
    chosen = 0
    if len(captions) > 1:
        chosen = int(generator(seed, step, slot, Stream.CAPTION).integers(len(captions)))
    text = compose(captions[chosen], options, seed, pass_of(records, draw, variants))
    return text, bool(generator(seed, step, slot, Stream.CAPTION_DROPOUT).random() < options.caption_dropout)


class Waiting:
    """Measures how long the training thread waits for data in the current step, in seconds."""

    def __init__(self):
        self.seconds = 0.0

    def next(self, batches: Iterator[Batch]) -> Batch:
        """Returns the next batch.

        Raises:
            LoadingError: if loading failed; without the traceback of the data-loader process.
        """
        began = time.perf_counter()
        try:
            return next(batches)
        except LoadingError:
            raise
        except UserError as error:  # from a data-loader process: the last line of its traceback is the message
            raise LoadingError(str(error).strip().splitlines()[-1].rpartition("ProcessError: ")[2]) from error
        finally:
            self.seconds += time.perf_counter() - began


def batches_by_step(
    dataset: TrainingDataset,
    pieces: Pieces | StreamedPieces,
    num_workers: int,
    timeout: int,
    pin_memory: bool,
    waiting: Waiting,
) -> Iterator[tuple[int, Iterator[Batch]]]:
    """Yields (step, iterator over this process's micro-batches of that step), loading micro-batches in the background.

    Args:
        dataset: maps pieces to batches.
        pieces: the micro-batches of each step.
        num_workers: data-loader processes; 0 loads in the training process.
        timeout: seconds to wait for a data-loader process; 0 for no limit.
        pin_memory: whether batches are in page-locked memory.
        waiting: measures the time spent waiting in each step.
    """
    loader = make_loader(
        dataset,
        num_workers,
        sampler=pieces,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        timeout=timeout if num_workers > 0 else 0,
    )
    batches = iter(loader)
    for step in pieces.steps:
        waiting.seconds = 0.0
        yield step, (waiting.next(batches) for _ in pieces.slots)
