"""Datasets that are read as a stream: never whole on the disk, and of no length that is known for certain.

The shards of the dataset are dealt out to lanes, and each lane fills the same slots of every global batch. How many
lanes there are follows from the shards and the global batch alone, so the batches are the same on any number of
processes, each of which reads only the lanes of its own slots. A resumed run reads over what was used before it.
"""

import hashlib
import itertools
import logging
import math
import os
import queue
import tarfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from utils.config.batch import ImageRecord, MaskFile
from utils.config.options import UserError, first_line
from utils.config.seeding import Stream, generator
from utils.config.user_files import FileError, short
from utils.data.buckets import BucketPlan, plan_buckets
from utils.data.captions import CaptionOptions, folder_caption, is_written_list, refusal_of
from utils.data.data_fingerprint import content_table, file_facts
from utils.data.dataset_files import dataset_paths, plain_path
from utils.data.duplicates import KnownBytes
from utils.data.file_listing import Fate, Fates, warn_of_unread
from utils.data.folder_contents import settle
from utils.data.folders import list_files, member_captions
from utils.data.images import check_whole, read_header, reason_of
from utils.data.mask_values import MASKS_LOOKED_AT, MaskCensus, mask_values
from utils.data.masks import FolderMasks
from utils.data.options import BucketOptions
from utils.data.order import Draw, Piece
from utils.data.source_options import DataOptions, SourceOptions
from utils.data.sources import (
    check_columns,
    check_dataset_folder,
    check_image_feature,
    detect,
    is_saved_dataset,
    read_alone,
    shards_of,
)
from utils.data.tables import captions_of, data_folders, declared, image_of
from utils.data.tar_shards import CAPTION_COLUMN, IMAGE_COLUMN, MASK_COLUMN, REASON_COLUMN

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)
PIECES_AHEAD = 8
ENOUGH_READ = 1000  # images of a stream, under which a few bad ones say nothing of the portion
SHARD_ERRORS = (OSError, ValueError, EOFError, RuntimeError, tarfile.TarError, pa.ArrowException)
SAVED_SHARDS = 64
STREAMED = {".parquet": "parquet", ".tar": "webdataset"}  # endings, and the builders of `datasets` that read them


class StreamedSample(NamedTuple):
    """An image of a stream, its header readable, with what its crop is drawn by.

    All of a group have the same spare, the image before it of their bucket, lest one can't be decoded.
    """

    record: ImageRecord
    identity: int
    bucket: int
    passing: int
    spare: "StreamedSample | None" = None


@dataclass(frozen=True)
class StreamedRecords:
    """The few images of one micro-batch and some spare ones, to be asked as all of a run's records are.

    Attributes:
        bad: (name, reason) of images that were passed over on the way to these.
        spares: of each sample of the micro-batch the number of its spare one among those behind them, or None.
        has_masks: whether the loss counts only in parts of some images.
    """

    samples: list[StreamedSample] = field(repr=False)
    options: CaptionOptions
    bad: list[tuple[str, str]]
    spares: list[int | None]
    has_masks: bool

    def __len__(self) -> int:
        return len(self.samples)

    def instead(self, place: int) -> list[int]:
        """What may stand for a sample that can't be decoded: its spare, else others of the micro-batch."""
        count, spare = len(self.spares), self.spares[place]
        others = [index for index in range(count) if index != place]
        return ([] if spare is None else [count + spare]) + others

    def draw(self, place: int) -> Draw:
        """The draw of the sample at a place of the micro-batch."""
        return Draw(place, self.samples[place].passing, self.samples[place].bucket)

    def key(self, index: int) -> str:
        """The name by which an image is reported."""
        return self.samples[index].record.key

    def image(self, index: int) -> str | bytes:
        """An image's path or bytes."""
        return self.samples[index].record.source

    def mask(self, index: int) -> MaskFile | None:
        """Where in an image the loss counts; None for everywhere."""
        return self.samples[index].record.mask

    def captions(self, index: int) -> tuple[str, ...]:
        """An image's captions, at least one."""
        return self.samples[index].record.captions

    def caption_options(self, index: int) -> CaptionOptions:
        """How its captions are used."""
        return self.options

    def loss_weight(self, index: int) -> float:
        """The factor on an image's loss: 1, there is one source."""
        return 1.0

    def identity(self, index: int) -> int:
        """What its draws are keyed by."""
        return self.samples[index].identity


class StreamedBatches:
    """The global batches of a stream, of which only the length is known beforehand, if at all."""

    def __init__(self, size: int, group_size: int, seed: int, num_images: int | None):
        self.size = size
        self.group_size = group_size
        self.seed = seed
        self.samples_per_epoch = math.inf if num_images is None else num_images

    def steps_in(self, epochs: int) -> int:
        """Optimizer steps of as many samples as the dataset has, `epochs` times.

        Raises:
            UserError: if the dataset does not say how many it has.
        """
        if self.samples_per_epoch == math.inf:
            raise UserError("a stream does not say how long it is; give --max_train_steps with --streaming")
        return -(-epochs * self.samples_per_epoch // self.size)

    def epochs_before(self, step: int) -> int:
        """Whole epochs in the first `step` optimizer steps; 0 where that is not known."""
        return int(step * self.size // self.samples_per_epoch)


@dataclass(frozen=True)
class StreamedImages:
    """A stream to train on.

    Attributes:
        num_listed: images, where the dataset says it.
        masks: those that lie in a folder, if there is one.
        bad: why an image could not be trained on, by its name.
        counts: of the images that were read: all, and those without a caption.
        held_out: the images that the validation loss is measured on.
        census: what was found in the first masks.
        fates: what became of the files of its folder, where it has one.
        shards: the files that it is read from, where they lie in a folder.
    """

    dataset: "IterableDataset" = field(repr=False)
    source: SourceOptions
    captions: CaptionOptions
    resolution: int
    buckets: BucketOptions
    num_listed: int | None
    bad: dict[str, str]
    shuffle_buffer_size: int
    masks: FolderMasks | None = None
    fates: Fates | None = field(default=None, repr=False)
    shards: tuple[Path, ...] = field(default=(), repr=False)
    counts: Counter = field(default_factory=Counter, repr=False)
    held_out: KnownBytes = field(default_factory=KnownBytes, repr=False)
    census: MaskCensus = field(default_factory=lambda: MaskCensus("masks", None), repr=False)

    def note_missing_caption(self, key: str) -> None:
        """Counts an image without a caption, and warns of the first."""
        self.counts["missing_captions"] += 1
        if self.counts["missing_captions"] == 1:
            instead = "the name of its folder" if self.captions.on_missing_caption == "folder" else "an empty one"
            logger.warning("%s has no caption and trains on %s, as all others without one will", key, instead)

    def note_written_list(self, key: str, caption: str) -> None:
        """Counts a caption that is the text of a list, and warns of the first."""
        self.counts["written_lists"] += 1
        if self.counts["written_lists"] == 1:
            said = (
                "%s: its caption is a text that looks like a list and is read as one caption: %s; store a list as one"
            )
            logger.warning(said, key, short(caption))

    def look_for_copy(self, key: str, image: str | bytes) -> None:
        """Counts an image of the bytes of a held-out one, and warns of the first."""
        held_out = self.held_out.find(image)
        if held_out is None:
            return
        self.counts["held_out_copies"] += 1
        if self.counts["held_out_copies"] == 1:
            logger.warning(
                "%s of the stream is trained on and has the bytes of the held-out image %s: the loss on such images "
                "does not tell how well the model does on others; data_report.json counts them as held_out_copies",
                *(key, held_out),
            )

    def note_mask(self, is_there: bool) -> None:
        """Counts an image with a mask.

        Raises:
            UserError: if the first thousand have none, where masks were asked for.
        """
        self.counts["masked"] += is_there
        if self.has_masks and self.counts["read"] >= ENOUGH_READ and not self.counts["masked"]:
            raise UserError(f"none of the first {ENOUGH_READ} images of the stream has a mask")

    def look_at_mask(self, record: ImageRecord) -> None:
        """Looks at the mask of an image if it is one of the first, and warns of what they are.

        No run ends by them: others may follow, as in shards that are sorted by class; a dry run refuses black ones.
        """
        census = self.census
        if census.looked_at >= MASKS_LOOKED_AT:
            return
        try:
            values = mask_values(record.source, record.mask)
        except (OSError, ValueError):  # it is named where it is cut
            return
        census.add(record.key, values)
        if census.looked_at == 1 and census.is_nearly_black:
            logger.warning("the mask of %s is black or nearly so, and its loss counts almost nowhere", record.key)
        if census.looked_at == MASKS_LOOKED_AT:
            for line in census.all_warnings():
                logger.warning("%s", line)

    @property
    def has_masks(self) -> bool:
        """Whether the loss counts only in parts of some images."""
        return self.source.has_masks

    @property
    def num_known(self) -> int:
        """Images to which a number of bad ones compares: all, or as many as were read so far."""
        return self.num_listed or max(self.counts["read"], ENOUGH_READ)

    @property
    def plan(self) -> BucketPlan:
        """All buckets that an image may come to."""
        return BucketPlan(self.buckets.sizes(self.resolution), np.zeros(0, np.uint16), [])

    def fingerprint(self) -> str:
        """What is known of the stream to change with its images: not their number, which only some caches know."""
        return f"a stream in {self.dataset.num_shards} shards"

    def content(self) -> pa.Table:
        """The record of the files that it is read from, where they lie here."""
        files = self.shards or _local_files(self.source)
        root = self.source.dataset_name or self.source.train_data_dir
        return content_table([os.path.relpath(path, root) for path in files], file_facts(files), None, None)

    def describe_sources(self) -> dict[str, str]:
        """How its images are used, but for what the options say."""
        return {"masks": "some" if self.has_masks else "none"}

    def describe(self) -> str:
        """How many images there are, in words."""
        count = "of unknown length" if self.num_listed is None else f"of {self.num_listed:,} images"
        return f"a stream {count} in {self.dataset.num_shards} shards"

    def batches(self, size: int, group_size: int, seed: int) -> StreamedBatches:
        """Its global batches of `size`."""
        return StreamedBatches(size, group_size if self.buckets.use_aspect_ratio_buckets else 1, seed, self.num_listed)

    def pieces(
        self, batches: StreamedBatches, micro_batch: int, rank: int, num_processes: int, first_step: int, last_step: int
    ) -> "StreamedPieces":
        """The micro-batches of one process."""
        return StreamedPieces(self, batches, micro_batch, rank, num_processes, first_step, last_step)

    def report(self) -> dict[str, object]:
        """What `data_report.json` says of it."""
        return {
            "images": self.num_listed,
            "streamed": True,
            "read": self.counts["read"],
            "missing_captions": self.counts["missing_captions"],
            **({"masked": self.counts["masked"]} if self.has_masks else {}),
            **({"held_out_copies": copies} if (copies := self.counts["held_out_copies"]) else {}),
            "unreadable": dict(sorted(self.bad.items())),
        }


def open_stream(
    data: DataOptions,
    source: SourceOptions,
    captions: CaptionOptions,
    resolution: int,
    buckets: BucketOptions,
    left_out: Mapping[Path, Fate] = MappingProxyType({}),
) -> StreamedImages:
    """Opens a dataset as a stream; none of its images is read.

    Args:
        left_out: as of `list_folder`.

    Raises:
        UserError: if it can't be opened, lacks a column, or is to fill buckets without saying its images' sizes.
    """
    import datasets

    if source.max_train_samples is not None:
        raise UserError("--max_train_samples is drawn from all images, which a stream does not know; leave one out")
    if source.folder_repeats:
        raise UserError(
            "--folder_repeats counts the images of each folder, which a stream does not know; leave one out"
        )
    fates, shards = None, ()
    try:
        if source.dataset_name is None:
            loaded, fates, shards = _load_shards(source, data.cache_dir, left_out)
        else:
            loaded = _load(source, data.cache_dir)
        dataset = loaded[source.dataset_split] if isinstance(loaded, dict) else loaded
    except KeyError as error:
        raise UserError(
            f"--dataset_split {source.dataset_split} is not in the data, which has {list(loaded)}"
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"the stream can't be opened: {first_line(error)}") from error
    columns = dataset.column_names or list(next(iter(dataset)))
    census = MaskCensus(source.masks_given if source.has_masks else "", None)  # by the names that the user gave
    source = _tar_columns(source, columns)
    check_columns(columns, source)
    sizes = (source.width_column, source.height_column)
    if buckets.use_aspect_ratio_buckets and not set(sizes) <= set(columns):
        raise UserError(
            f"--streaming with --use_aspect_ratio_buckets needs the images' sizes in the rows, in the columns "
            f"{sizes[0]} and {sizes[1]} (--width_column, --height_column); there are {', '.join(columns)}"
        )
    images = [column for column in (source.image_column, source.mask_column) if column is not None]
    texts = [] if source.caption_column is None else [source.caption_column]
    more = (*sizes, REASON_COLUMN)
    dataset = dataset.select_columns([*images, *texts, *(name for name in more if name in columns)])
    flags = {source.image_column: "image_column", source.mask_column: "mask_column"}
    for column in images:
        if dataset.features is not None:
            check_image_feature(dataset.features[column], flags[column], column)
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    split = dataset.info.splits.get(source.dataset_split) if dataset.info.splits else None
    count = split.num_examples if split is not None and split.num_examples else None
    masks = source.masks() if source.mask_dir is not None else None
    size, whole = data.shuffle_buffer_size, (dataset, source, captions, resolution, buckets)
    return StreamedImages(*whole, count, {}, size, masks, fates, shards, census=census)


def _load(source: SourceOptions, cache_dir: str | None):
    import datasets
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    from utils.data.tar_streams import local_samples, tar_samples

    if is_saved_dataset(Path(source.dataset_name)):
        saved = datasets.load_from_disk(plain_path(source.dataset_name, cache_dir))
        splits = saved if isinstance(saved, dict) else {source.dataset_split: saved}
        return {name: each.to_iterable_dataset(min(SAVED_SHARDS, len(each))) for name, each in splits.items()}
    if Path(source.dataset_name).is_dir():
        check_dataset_folder(source)
    alone = read_alone(source, cache_dir)
    if alone is not None:
        return datasets.load_dataset(alone[0], streaming=True, **alone[1])
    builder = datasets.load_dataset_builder(
        source.dataset_name, source.dataset_config_name, cache_dir=cache_dir, data_dir=source.train_data_dir
    )
    if isinstance(builder, WebDataset) and Path(source.dataset_name).is_dir():
        shards = {split: [Path(shard) for shard in files] for split, files in builder.config.data_files.items()}
        return local_samples(shards, source.mask_column, source.text_encoding)
    if isinstance(builder, WebDataset):
        return tar_samples(builder.config.data_files, cache_dir, source.mask_column, builder.base_path)
    return builder.as_streaming_dataset()


def _load_shards(
    source: SourceOptions, cache_dir: str | None, left_out: Mapping[Path, Fate]
) -> tuple[dict, Fates, tuple[Path, ...]]:
    """(the dataset of a folder's shards by its splits, what became of the folder's files, the shards)."""
    import datasets

    from utils.data.tar_streams import local_samples

    listing = source.listing(left_out)
    kind = detect(source, listing)
    suffix = {"parquet": ".parquet", "webdataset": ".tar"}.get(kind)
    if suffix is None:
        raise UserError(
            f"--streaming reads parquet files, tar shards or a --dataset_name; {source.train_data_dir} holds none of "
            "them, and a folder of images needs no stream"
        )
    content = shards_of(source, listing, suffix)
    settle(listing, content, kind)
    warn_of_unread(f"--train_data_dir {source.train_data_dir}", listing.fates)
    files = {source.dataset_split: dataset_paths(listing.root, content.used, cache_dir)}
    shards = tuple(listing.root / name for name in content.used)
    if kind == "webdataset":
        streams = local_samples({source.dataset_split: shards}, source.mask_column, source.text_encoding)
        return streams, listing.fates, shards
    return datasets.load_dataset(kind, data_files=files, streaming=True, **content.reading), listing.fates, shards


def _local_files(source: SourceOptions) -> list[Path]:
    """The files of a dataset that lies in a folder of its own; none of one on the Hub."""
    root = Path(source.dataset_name or "")
    return [root / name for name in list_files(root)] if source.dataset_name and root.is_dir() else []


def _tar_columns(source: SourceOptions, columns: list[str]) -> SourceOptions:
    """The columns of tar shards: those that are named after endings of members, else what a sample's members are."""
    if IMAGE_COLUMN not in columns:
        return source
    caption, mask = source.caption_column, source.mask_column
    return replace(
        source,
        mask_column=MASK_COLUMN if mask is not None and MASK_COLUMN in columns else mask,
        image_column=source.image_column if source.image_column in columns else IMAGE_COLUMN,
        caption_column=caption if caption is None or caption in columns else CAPTION_COLUMN,
    )


class Lane:
    """Some shards of a stream, pass after pass in a seeded order, as groups of one bucket."""

    def __init__(self, images: StreamedImages, number: int, num_lanes: int, group_size: int, seed: int):
        self._images = images
        self._number = number
        self._group_size = group_size
        self._seed = seed
        self._shards = np.arange(number, images.dataset.num_shards, num_lanes)
        given = images.source.dataset_name, images.source.train_data_dir
        self._folders = data_folders(given, images.dataset.info.builder_name)
        self._buffer_size = max(1, images.shuffle_buffer_size // num_lanes)
        self.bad: list[tuple[str, str]] = []

    def groups(self) -> Iterator[list[StreamedSample]]:
        """Groups without end."""
        waiting: dict[int, list[StreamedSample]] = defaultdict(list)
        last: dict[int, StreamedSample] = {}
        for passing in itertools.count():
            any_found = False
            for number, row in enumerate(self._rows(passing)):
                sample = self._sample(row, number, passing)
                if sample is None:
                    continue
                any_found = True
                self._images.counts["read"] += 1
                waiting[sample.bucket].append(sample)
                if len(waiting[sample.bucket]) == self._group_size:
                    spare = last.get(sample.bucket)
                    yield [each._replace(spare=spare) for each in waiting.pop(sample.bucket)]
                    last[sample.bucket] = sample
            if not any_found:
                raise UserError(self._nothing_read())

    def _nothing_read(self) -> str:
        """What ends the run where no image of this lane's shards can be read: each lane fills a part of every batch."""
        names = [str(self._images.shards[number]) for number in self._shards if number < len(self._images.shards)]
        which = ", ".join(names[:3]) or f"{len(self._shards)} of the stream's shards"
        reason = f": {self.bad[-1][0]}: {self.bad[-1][1]}" if self.bad else ", which are empty"
        return f"no image can be read of {which}{reason}; leave these shards out, or put them together with others"

    def _rows(self, passing: int) -> Iterator[dict]:
        """The rows of one pass: shards in a seeded order, and each row drawn from a buffer of those that come next."""
        draws = generator(self._seed, passing, self._number, Stream.SHARD_ORDER)
        buffer: list[dict] = []
        for shard in draws.permutation(self._shards):
            for row in self._shard(int(shard)):
                buffer.append(row)
                if len(buffer) >= self._buffer_size:
                    place = int(draws.integers(len(buffer)))
                    buffer[place], buffer[-1] = buffer[-1], buffer[place]
                    yield buffer.pop()
        for place in draws.permutation(len(buffer)):
            yield buffer[place]

    def _shard(self, number: int) -> Iterator[dict]:
        """The rows of a shard, up to a place where it is broken."""
        dataset = self._images.dataset
        try:
            yield from dataset.shard(num_shards=dataset.num_shards, index=number)
        except SHARD_ERRORS as error:
            reason = f"the shard is broken, what follows in it is left out: {first_line(error)}"
            shards = self._images.shards
            self.bad.append((shards[number].name if number < len(shards) else f"shard {number}", reason))

    def _sample(self, row: dict, number: int, passing: int) -> StreamedSample | None:
        """The sample of a row, or None if its image's header can't be read."""
        source, images = self._images.source, self._images
        value = row[source.image_column]
        path = value.get("path") if isinstance(value, dict) else None
        key = path or f"lane {self._number}, pass {passing}, row {number}"
        if reason := row.get(REASON_COLUMN):
            self.bad.append((key, reason))
            return None
        try:
            image = image_of(value, self._folders)
            header = read_header(image)
            check_whole(image)
        except (OSError, ValueError) as error:
            self.bad.append((key, reason_of(error)))
            return None
        column = source.caption_column
        try:
            captions = () if column is None else images.captions.of(self._captions(row[column], column))
        except FileError as error:
            self.bad.append((key, f"its captions can't be read: {error}"))
            return None
        if refusal := refusal_of(captions):
            self.bad.append((key, refusal))
            return None
        for caption in filter(is_written_list, captions):
            images.note_written_list(key, caption)
        if not captions and images.captions.are_expected:
            if images.captions.on_missing_caption == "error":
                raise UserError(f"{key} has no caption (--on_missing_caption error)")
            images.note_missing_caption(key)
            by_folder = images.captions.on_missing_caption == "folder"
            captions = (folder_caption(key, "") if by_folder else "",)
        place = f"{self._number} {passing} {number}".encode()
        identity = int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little")
        mask = self._mask(row, key, image)
        is_masked = mask is not None and (not mask.is_alpha or "transparent" in header.oddities)
        images.note_mask(is_masked)
        record = ImageRecord(key, image, captions, mask)
        if passing == 0:
            images.look_for_copy(key, image)
        if is_masked:
            images.look_at_mask(record)
        return StreamedSample(record, identity, self._bucket(row, key), passing)

    def _captions(self, value: object, column: str) -> tuple[str, ...]:
        """The captions of a row's column: texts, or the bytes of a tar shard's member.

        Raises:
            FileError: if the member can't be read.
            UserError: if the column holds something else.
        """
        is_chosen = isinstance(value, dict) and isinstance(value.get("bytes"), bytes)
        if not is_chosen and not isinstance(value, bytes):
            return captions_of(value, column)
        name, content = (value["path"], value["bytes"]) if is_chosen else (f"*.{column}", value)
        return member_captions(name, content, self._images.source.text_encoding)

    def _mask(self, row: dict, key: str, image: str | bytes) -> MaskFile | None:
        source, masks = self._images.source, self._images.masks
        if source.alpha_mask:
            return MaskFile(b"", is_alpha=True)
        if masks is not None:
            return masks.named(key, lambda: image)
        mask = None if source.mask_column is None else image_of(row[source.mask_column], self._folders)
        return MaskFile(mask, is_alpha=False) if mask else None

    def _bucket(self, row: dict, key: str) -> int:
        images = self._images
        if not images.buckets.use_aspect_ratio_buckets:
            return 0
        size = declared(row, (images.source.width_column, images.source.height_column))
        if size is None:
            raise UserError(f"{key} has no size in its row, which --use_aspect_ratio_buckets needs under --streaming")
        options = images.buckets
        sizes = options.sizes(images.resolution)
        planned = plan_buckets(np.array([size]), images.resolution, options, np.ones(1), 1)
        return sizes.index(planned.sizes[int(planned.bucket_of[0])])


class StreamedPieces:
    """The micro-batches of one process, read by a thread ahead of the training; a DataLoader's sampler."""

    def __init__(
        self,
        images: StreamedImages,
        batches: StreamedBatches,
        micro_batch: int,
        rank: int,
        num_processes: int,
        first_step: int,
        last_step: int,
    ):
        size, group = batches.size, batches.group_size
        self._images, self._batches = images, batches
        self._num_lanes = num_lanes(size, group, images.dataset.num_shards)
        begin, end = rank * size // num_processes, (rank + 1) * size // num_processes
        self.slots: list[tuple[int, ...]] = []
        while begin < end:
            until = min(begin + micro_batch, end)
            if images.buckets.use_aspect_ratio_buckets:
                until = min(until, (begin // group + 1) * group)
            self.slots.append(tuple(range(begin, until)))
            begin = until
        self.steps = range(first_step, last_step)

    def __len__(self) -> int:
        return len(self.steps) * len(self.slots)

    def __iter__(self) -> Iterator[Piece]:
        ahead: queue.Queue = queue.Queue(PIECES_AHEAD)
        stopped = threading.Event()

        def put(item: object) -> bool:
            while not stopped.is_set():
                try:
                    ahead.put(item, timeout=0.2)
                except queue.Full:
                    continue
                return True
            return False

        def read() -> None:
            try:
                for piece in self._read():
                    if not put(piece):
                        return
                put(None)
            except BaseException as error:  # noqa: BLE001  it is raised where the pieces are taken
                put(error)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        try:
            while (item := ahead.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()

    def _read(self) -> Iterator[Piece]:
        batches, per_lane = self._batches, self._batches.size // self._num_lanes
        mine = sorted({slot // per_lane for slots in self.slots for slot in slots})
        seed = batches.seed
        lanes = {number: Lane(self._images, number, self._num_lanes, batches.group_size, seed) for number in mine}
        groups = {number: lane.groups() for number, lane in lanes.items()}
        a_step = per_lane // batches.group_size
        if self.steps.start:
            logger.info("reading over the %d samples that were used before", self.steps.start * batches.size)
        for stream in groups.values():
            next(itertools.islice(stream, self.steps.start * a_step, self.steps.start * a_step), None)
        for step in self.steps:
            samples: dict[int, StreamedSample] = {}
            for number, stream in groups.items():
                found = [sample for group in itertools.islice(stream, a_step) for sample in group]
                samples |= {number * per_lane + place: sample for place, sample in enumerate(found)}
            for slots in self.slots:
                bad = [entry for lane in lanes.values() for entry in lane.bad]
                for lane in lanes.values():
                    lane.bad.clear()
                chosen = [samples[slot] for slot in slots]
                spares = {sample.spare.identity: sample.spare for sample in chosen if sample.spare is not None}
                bare = [sample._replace(spare=None) for sample in chosen]
                own = [list(spares).index(each.spare.identity) if each.spare else None for each in chosen]
                options, has_masks = self._images.captions, self._images.source.has_masks
                records = StreamedRecords([*bare, *spares.values()], options, bad, own, has_masks)
                yield Piece(step, slots, records)


def num_lanes(size: int, group_size: int, num_shards: int) -> int:
    """The most lanes, at most one a shard, that share a global batch evenly in whole groups."""
    groups = size // group_size
    return max(count for count in range(1, groups + 1) if groups % count == 0 and (count <= num_shards or count == 1))
