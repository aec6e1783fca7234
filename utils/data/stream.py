"""Streamed datasets, which are never stored whole and whose length may be unknown.

The shards of the dataset are divided among lanes, and each lane fills the same slots of every global batch. The number
of lanes depends only on the number of shards and the size of the global batch, so that the batches are the same on any
number of processes. Each process reads only the lanes of its own slots. A resumed run reads and skips the samples that
were already used.
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
ENOUGH_READ = 1000  # images to read before the portion of bad ones, or of masks, is judged
SHARD_ERRORS = (OSError, ValueError, EOFError, RuntimeError, tarfile.TarError, pa.ArrowException)
SAVED_SHARDS = 64
STREAMED = {".parquet": "parquet", ".tar": "webdataset"}  # file extensions, and the `datasets` builders that read them


class StreamedSample(NamedTuple):
    """An image of a stream with a readable header.

    Attributes:
        record: the image with its captions and mask.
        identity: 64 bits that seed its random draws.
        bucket: the number of its bucket.
        passing: the number of the pass over the stream.
        spare: the image of the same bucket before this group, used if one of the group can't be decoded.
    """

    record: ImageRecord
    identity: int
    bucket: int
    passing: int
    spare: "StreamedSample | None" = None


@dataclass(frozen=True)
class StreamedRecords:
    """The images of one micro-batch and their spares, with the same methods as `Records`.

    Attributes:
        samples: the samples of the micro-batch, then the spares.
        options: how captions are used.
        bad: (name, reason) of images that were skipped on the way to these.
        spares: for each sample of the micro-batch the number of its spare, counted from the first spare, or None.
        has_masks: whether some images may have masks.
    """

    samples: list[StreamedSample] = field(repr=False)
    options: CaptionOptions
    bad: list[tuple[str, str]]
    spares: list[int | None]
    has_masks: bool

    def __len__(self) -> int:
        return len(self.samples)

    def instead(self, place: int) -> list[int]:
        """Returns the replacements for a sample that can't be decoded: its spare, then others of the micro-batch."""
        count, spare = len(self.spares), self.spares[place]
        others = [index for index in range(count) if index != place]
        return ([] if spare is None else [count + spare]) + others

    def draw(self, place: int) -> Draw:
        """Returns the draw of a sample of the micro-batch."""
        return Draw(place, self.samples[place].passing, self.samples[place].bucket)

    def key(self, index: int) -> str:
        """Returns an image's name for messages."""
        return self.samples[index].record.key

    def image(self, index: int) -> str | bytes:
        """Returns an image's path or bytes."""
        return self.samples[index].record.source

    def mask(self, index: int) -> MaskFile | None:
        """Returns an image's mask; None if the loss counts everywhere."""
        return self.samples[index].record.mask

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns an image's captions, at least one."""
        return self.samples[index].record.captions

    def caption_options(self, index: int) -> CaptionOptions:
        """Returns how an image's captions are used."""
        return self.options

    def loss_weight(self, index: int) -> float:
        """Returns the factor on an image's loss: 1, as there is only one source."""
        return 1.0

    def identity(self, index: int) -> int:
        """Returns 64 bits that seed the image's random draws."""
        return self.samples[index].identity


class StreamedBatches:
    """The global batches of a stream; of these only the number per epoch may be known in advance."""

    def __init__(self, size: int, group_size: int, seed: int, num_images: int | None):
        self.size = size
        self.group_size = group_size
        self.seed = seed
        self.samples_per_epoch = math.inf if num_images is None else num_images

    def steps_in(self, epochs: int) -> int:
        """Returns the number of optimizer steps that use as many samples as `epochs` epochs have.

        Raises:
            UserError: if the length of the dataset is unknown.
        """
        if self.samples_per_epoch == math.inf:
            raise UserError("the length of the stream is unknown; give --max_train_steps with --streaming")
        return -(-epochs * self.samples_per_epoch // self.size)

    def epochs_before(self, step: int) -> int:
        """Returns the number of whole epochs in the first `step` optimizer steps; 0 if unknown."""
        return int(step * self.size // self.samples_per_epoch)


@dataclass(frozen=True)
class StreamedImages:
    """A stream to train on.

    Attributes:
        dataset: the stream of the `datasets` library.
        source, captions, buckets: the options of the source, its captions and the buckets.
        resolution: --resolution, in pixels.
        num_listed: number of images, if the dataset states it.
        bad: the reason why an image could not be trained on, by its name.
        shuffle_buffer_size: number of images in the shuffle buffer.
        masks: masks in a folder (--mask_dir), if there is one.
        fates: how each file of its folder was used; None if it has no folder.
        shards: the files that it is read from, if these are in a folder.
        counts: number of images read, without a caption, with a mask, and so on.
        held_out: the images that the validation loss is measured on.
        census: what was found in the first masks.
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
            logger.warning("%s has no caption and trains on %s, as will all others without a caption", key, instead)

    def note_written_list(self, key: str, caption: str) -> None:
        """Counts a caption whose text looks like a list, and warns of the first."""
        self.counts["written_lists"] += 1
        if self.counts["written_lists"] == 1:
            told = "%s: its caption is text that looks like a list and is read as one caption: %s; store it as a list"
            logger.warning(told, key, short(caption))

    def look_for_copy(self, key: str, image: str | bytes) -> None:
        """Counts an image with the same bytes as a held-out one, and warns of the first."""
        held_out = self.held_out.find(image)
        if held_out is None:
            return
        self.counts["held_out_copies"] += 1
        if self.counts["held_out_copies"] == 1:
            logger.warning(
                "%s of the stream is a copy of the held-out image %s but is trained on: the validation loss on such "
                "images does not show how well the model generalizes; data_report.json counts them as held_out_copies",
                *(key, held_out),
            )

    def note_mask(self, is_there: bool) -> None:
        """Counts an image with a mask.

        Raises:
            UserError: if masks were requested and the first thousand images have none.
        """
        self.counts["masked"] += is_there
        if self.has_masks and self.counts["read"] >= ENOUGH_READ and not self.counts["masked"]:
            raise UserError(f"none of the first {ENOUGH_READ} images of the stream has a mask")

    def look_at_mask(self, record: ImageRecord) -> None:
        """Inspects the masks of the first images, and warns of probable mistakes.

        They do not stop the run, since other masks may follow, as in shards sorted by class; a dry run refuses black
        masks.
        """
        census = self.census
        if census.looked_at >= MASKS_LOOKED_AT:
            return
        try:
            values = mask_values(record.source, record.mask)
        except (OSError, ValueError):  # reported when the mask is cropped
            return
        census.add(record.key, values)
        if census.looked_at == 1 and census.is_nearly_black:
            logger.warning("the mask of %s is black or nearly black, so its loss counts almost nowhere", record.key)
        if census.looked_at == MASKS_LOOKED_AT:
            for line in census.all_warnings():
                logger.warning("%s", line)

    @property
    def has_masks(self) -> bool:
        """Whether some images may have masks."""
        return self.source.has_masks

    @property
    def num_known(self) -> int:
        """The number of images that bad ones are counted against: all, or those read so far."""
        return self.num_listed or max(self.counts["read"], ENOUGH_READ)

    @property
    def plan(self) -> BucketPlan:
        """All buckets that an image may belong to."""
        return BucketPlan(self.buckets.sizes(self.resolution), np.zeros(0, np.uint16), [])

    def fingerprint(self) -> str:
        """Describes the stream for checkpoints, without the number of images, which is not always known."""
        return f"a stream in {self.dataset.num_shards} shards"

    def content(self) -> pa.Table:
        """Returns a table of facts about its local files, from which a resumed run sees whether they changed."""
        files = self.shards or _local_files(self.source)
        root = self.source.dataset_name or self.source.train_data_dir
        return content_table([os.path.relpath(path, root) for path in files], file_facts(files), None, None)

    def describe_sources(self) -> dict[str, str]:
        """Describes how its images are used, beyond the options."""
        return {"masks": "some" if self.has_masks else "none"}

    def describe(self) -> str:
        """Returns the number of images and shards, for the log."""
        count = "of unknown length" if self.num_listed is None else f"of {self.num_listed:,} images"
        return f"a stream {count} in {self.dataset.num_shards} shards"

    def batches(self, size: int, group_size: int, seed: int) -> StreamedBatches:
        """Returns the stream of global batches of `size` samples."""
        return StreamedBatches(size, group_size if self.buckets.use_aspect_ratio_buckets else 1, seed, self.num_listed)

    def pieces(
        self, batches: StreamedBatches, micro_batch: int, rank: int, num_processes: int, first_step: int, last_step: int
    ) -> "StreamedPieces":
        """Returns the micro-batches of one process."""
        return StreamedPieces(self, batches, micro_batch, rank, num_processes, first_step, last_step)

    def report(self) -> dict[str, object]:
        """Returns the contents of `data_report.json`."""
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
    """Opens a dataset as a stream, without reading images.

    Args:
        data, source, captions, buckets: the options.
        resolution: --resolution, in pixels.
        left_out: see `list_folder`.

    Raises:
        UserError: if it can't be opened, lacks a column, or has no size columns for aspect-ratio buckets.
    """
    import datasets

    # refuse options that need the whole dataset
    if source.max_train_samples is not None:
        raise UserError("--max_train_samples needs to know all images, which --streaming does not; leave one out")
    if source.folder_repeats:
        raise UserError("--folder_repeats needs to count each folder's images, which --streaming can't; leave one out")

    # open the stream
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
        raise UserError(f"{source.given_as}: the stream can't be opened: {first_line(error)}") from error

    # check the columns
    columns = dataset.column_names or list(next(iter(dataset)))
    census = MaskCensus(source.masks_given if source.has_masks else "", None)  # before the columns are replaced
    source = _tar_columns(source, columns)
    check_columns(columns, source)
    sizes = (source.width_column, source.height_column)
    if buckets.use_aspect_ratio_buckets and not set(sizes) <= set(columns):
        raise UserError(
            f"--streaming with --use_aspect_ratio_buckets needs the images' sizes in the columns {sizes[0]} and "
            f"{sizes[1]} (--width_column, --height_column); the data has {', '.join(columns)}"
        )

    # select them, and keep images undecoded
    images = [column for column in (source.image_column, source.mask_column) if column is not None]
    texts = [] if source.caption_column is None else [source.caption_column]
    more = (*sizes, REASON_COLUMN)
    dataset = dataset.select_columns([*images, *texts, *(name for name in more if name in columns)])
    flags = {source.image_column: "image_column", source.mask_column: "mask_column"}
    for column in images:
        if dataset.features is not None:
            check_image_feature(dataset.features[column], flags[column], column)
        dataset = dataset.cast_column(column, datasets.Image(decode=False))

    # find out its length, if the dataset states it
    split = dataset.info.splits.get(source.dataset_split) if dataset.info.splits else None
    count = split.num_examples if split is not None and split.num_examples else None
    masks = source.masks() if source.mask_dir is not None else None
    size, whole = data.shuffle_buffer_size, (dataset, source, captions, resolution, buckets)
    return StreamedImages(*whole, count, {}, size, masks, fates, shards, census=census)


def _load(source: SourceOptions, cache_dir: str | None):
    import datasets
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    from utils.data.tar_streams import local_samples, tar_samples

    # a folder that `save_to_disk` wrote
    if is_saved_dataset(Path(source.dataset_name)):
        saved = datasets.load_from_disk(plain_path(source.dataset_name, cache_dir))
        splits = saved if isinstance(saved, dict) else {source.dataset_split: saved}
        return {name: each.to_iterable_dataset(min(SAVED_SHARDS, len(each))) for name, each in splits.items()}

    # a folder whose split is read on its own
    if Path(source.dataset_name).is_dir():
        check_dataset_folder(source)
    alone = read_alone(source, cache_dir)
    if alone is not None:
        return datasets.load_dataset(alone[0], streaming=True, **alone[1])

    # tar shards, or any other builder
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
    """Returns (the streams of a folder's shards by split, how each file of the folder was used, the shards)."""
    import datasets

    from utils.data.tar_streams import local_samples

    listing = source.listing(left_out)
    kind = detect(source, listing)
    suffix = {"parquet": ".parquet", "webdataset": ".tar"}.get(kind)
    if suffix is None:
        raise UserError(
            f"--streaming reads Parquet files, tar shards or a --dataset_name; {source.train_data_dir} holds none of "
            "these; leave --streaming out for a folder of images"
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
    """Returns the files of a dataset in a local folder; none for a dataset on the Hub."""
    root = Path(source.dataset_name or "")
    return [root / name for name in list_files(root)] if source.dataset_name and root.is_dir() else []


def _tar_columns(source: SourceOptions, columns: list[str]) -> SourceOptions:
    """Returns the source with the columns of tar shards: named extensions if these exist, else the chosen members."""
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
    """Some shards of a stream, read pass after pass in an order drawn from the seed, in groups from one bucket."""

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
        """Yields groups endlessly.

        Raises:
            UserError: if no image of a pass can be read.
        """
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
        """Returns the error for a lane without readable images, which stops the run as each lane fills every batch."""
        names = [str(self._images.shards[number]) for number in self._shards if number < len(self._images.shards)]
        which = ", ".join(names[:3]) or f"{len(self._shards)} of the stream's shards"
        reason = f": {self.bad[-1][0]}: {self.bad[-1][1]}" if self.bad else ", which are empty"
        return f"no image can be read from {which}{reason}; remove these shards, or merge them with others"

    def _rows(self, passing: int) -> Iterator[dict]:
        """Yields the rows of one pass: shards in an order drawn from the seed, rows through a shuffle buffer."""
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
        """Yields the rows of a shard, up to the first broken one."""
        dataset = self._images.dataset
        try:
            yield from dataset.shard(num_shards=dataset.num_shards, index=number)
        except SHARD_ERRORS as error:
            reason = f"the shard is broken, its remaining rows are skipped: {first_line(error)}"
            shards = self._images.shards
            self.bad.append((shards[number].name if number < len(shards) else f"shard {number}", reason))

    def _sample(self, row: dict, number: int, passing: int) -> StreamedSample | None:
        """Returns the sample of a row, or None if it can't be used."""
        # check the image
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

        # read the captions
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

        # record the mask, and copies of held-out images
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
        """Returns the captions in a row's column: text, or the bytes of a member of a tar shard.

        Raises:
            FileError: if the member can't be read.
            UserError: if the column holds another type.
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
            raise UserError(
                f"{key} has no width and height in its row, which --use_aspect_ratio_buckets needs with --streaming"
            )
        options = images.buckets
        sizes = options.sizes(images.resolution)
        planned = plan_buckets(np.array([size]), images.resolution, options, np.ones(1), 1)
        return sizes.index(planned.sizes[int(planned.bucket_of[0])])


class StreamedPieces:
    """The micro-batches of one process, read ahead in a thread; the sampler of its DataLoader."""

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
        # read ahead in a thread, which stops when this iterator is closed
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
            except BaseException as error:  # noqa: BLE001  it is raised in the consuming thread
                put(error)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()

        # yield what it has read, and raise its errors here
        try:
            while (item := ahead.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()

    def _read(self) -> Iterator[Piece]:
        # open the lanes of this process
        batches, per_lane = self._batches, self._batches.size // self._num_lanes
        mine = sorted({slot // per_lane for slots in self.slots for slot in slots})
        seed = batches.seed
        lanes = {number: Lane(self._images, number, self._num_lanes, batches.group_size, seed) for number in mine}
        groups = {number: lane.groups() for number, lane in lanes.items()}
        a_step = per_lane // batches.group_size

        # skip what was used before the run was resumed
        if self.steps.start:
            logger.info("skipping the %d samples that were already used", self.steps.start * batches.size)
        for stream in groups.values():
            next(itertools.islice(stream, self.steps.start * a_step, self.steps.start * a_step), None)

        # read each step's samples, and divide them into micro-batches
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
    """Returns the largest number of lanes, at most one per shard, that divides a global batch into whole groups."""
    groups = size // group_size
    return max(count for count in range(1, groups + 1) if groups % count == 0 and (count <= num_shards or count == 1))
