"""Chooses the images to train on and their buckets, and records why others are skipped."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from utils.config.options import UserError
from utils.config.seeding import Stream, generator
from utils.config.user_files import short
from utils.data.buckets import NONE, BucketPlan, plan_buckets
from utils.data.captions import is_written_list, refusal_of
from utils.data.data_fingerprint import content_table
from utils.data.file_listing import FILTERED, TRAINED, UNREADABLE, Fate
from utils.data.options import BucketOptions, SelectionOptions
from utils.data.order import GlobalBatches, Pieces
from utils.data.sources import Records
from utils.data.survey import Survey

logger = logging.getLogger(__name__)


def hold_out(records: Records, fraction: float, seed: int, firsts: np.ndarray | None = None) -> tuple[Records, Records]:
    """Splits images into (training images, held-out images); whether an image is held out depends on its name only.

    Args:
        records: the images.
        fraction: portion to hold out, from 0 to 1; at least one image stays in each part.
        seed: the run's seed.
        firsts: [N] for each image the number of the first one with the same bytes, whose name decides for all copies;
            ignored if all images are the same.

    Raises:
        UserError: if there are fewer than two images.
    """
    if len(records) < 2:
        raise UserError(f"--validation_split {fraction:g} needs at least two images, got {len(records)}")
    drawn = np.array(
        [generator(seed, records.identity(index), 0, Stream.HELD_OUT_SPLIT).random() for index in range(len(records))]
    )
    if firsts is not None and len(np.unique(firsts)) > 1:
        drawn = drawn[firsts]
    distinct = np.unique(drawn)
    threshold = np.clip(fraction, distinct[0], distinct[-2])  # at least one of each
    return records.take(np.flatnonzero(drawn > threshold)), records.take(np.flatnonzero(drawn <= threshold))


class Outcome(NamedTuple):
    """What happened to each listed image.

    Attributes:
        records: all listed images.
        codes: [N] the number of each image's fate.
        fates: the fates by their numbers.
    """

    records: Records
    codes: np.ndarray
    fates: list[Fate]


@dataclass(frozen=True)
class PlannedImages:
    """The images to train on.

    Attributes:
        records, survey, plan: sources, facts and buckets of the images to train on, all in the same order.
        num_listed: number of images that the sources list.
        bad: the reason why an image can't be trained on, by its name.
        filtered: number of skipped images, by reason.
        missing_captions: number of images without a caption.
        outcome: what happened to each listed image.
        named_by_folder: number of images without a caption that train on the name of their folder.
    """

    records: Records = field(repr=False)
    survey: Survey = field(repr=False)
    plan: BucketPlan
    num_listed: int
    bad: dict[str, str]
    filtered: dict[str, int]
    missing_captions: int
    outcome: Outcome = field(repr=False)
    named_by_folder: int = 0

    def size(self, index: int) -> tuple[int, int]:
        """Returns the width and height of an upright image."""
        width, height = self.survey.sizes[index]
        return int(width), int(height)

    def target(self, index: int) -> tuple[int, int]:
        """Returns the width and height that an image is trained at."""
        return self.plan.sizes[int(self.plan.bucket_of[index])]

    @property
    def has_masks(self) -> bool:
        """Whether some images may have masks."""
        return self.records.has_masks

    @property
    def num_known(self) -> int:
        """The number of images that bad ones are counted against."""
        return self.num_listed

    def fingerprint(self) -> str:
        """Returns a digest that changes with the images, their sources, their order or their buckets."""
        digest = hashlib.blake2b(digest_size=8)
        for array in (self.plan.bucket_of, self.records.source_numbers):
            digest.update(np.ascontiguousarray(array, np.int64).tobytes())
        digest.update(
            np.array([self.records.identity(index) for index in range(len(self.records))], np.uint64).tobytes()
        )
        digest.update(repr([self.plan.sizes, self.records.repeats()]).encode())
        if self.records.copies is not None:
            digest.update(np.ascontiguousarray(self.records.copies, np.int64).tobytes())
        return f"{len(self.records)} images, {digest.hexdigest()}"

    def content(self) -> pa.Table:
        """Returns a table of facts about the images, from which a resumed run sees whether they changed."""
        records = self.records
        keys = [records.key(index) for index in range(len(records))]
        return content_table(keys, self.survey.facts, self.survey.mask_facts, records.recorded_captions())

    def describe_sources(self) -> dict[str, str]:
        """Describes how each source is used, if there are several; a single one is described by the options."""
        sources = self.records.sources
        if len(sources) == 1:
            return {"masks": sources[0].masks.name.partition(" ")[0] if sources[0].masks else "none"}
        return {f"source {source.name}": source.use for source in sources}

    def describe(self) -> str:
        """Returns the number of images, for the log."""
        return f"{len(self.records):,} images, {len(self.bad)} unreadable ones skipped"

    def pieces(
        self, batches: GlobalBatches, micro_batch: int, rank: int, num_processes: int, first_step: int, last_step: int
    ) -> Pieces:
        """Returns the micro-batches of one process."""
        return Pieces(batches, micro_batch, rank, num_processes, first_step, last_step)

    def batches(self, size: int, group_size: int, seed: int) -> GlobalBatches:
        """Returns the stream of global batches of `size` samples."""
        return GlobalBatches(self.plan.bucket_of, *self.records.groups(), size, group_size, seed)

    def report(self) -> dict[str, object]:
        """Returns the contents of `data_report.json`."""
        encodings = {source.name: source.table.texts.counts for source in self.records.sources if source.table.texts}
        encodings = {name: counts for name, counts in encodings.items() if counts}
        counts = np.bincount(self.plan.bucket_of, minlength=len(self.plan.sizes))
        return {
            "images": self.num_listed,
            "trained": self.num_listed - len(self.bad) - sum(self.filtered.values()),
            "missing_captions": self.missing_captions,
            **({"masked": int(self.survey.is_masked.sum())} if self.records.has_masks else {}),
            "converted": self.survey.oddity_counts(),
            "filtered": self.filtered,
            "unlisted": sum(source.table.num_left_out for source in self.records.sources),
            "buckets": {_name(size): int(count) for size, count in zip(self.plan.sizes, counts, strict=True)},
            "merged_buckets": {_name(size): [_name(goal) for goal in goals] for size, _, goals in self.plan.merged},
            "unreadable": dict(sorted(self.bad.items())),
            **({"not_utf_8": encodings} if encodings else {}),
        }


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def plan_images(
    records: Records,
    survey: Survey,
    resolution: int,
    group_size: int,
    buckets: BucketOptions,
    options: SelectionOptions,
    report: Callable[[int, dict[str, str]], None],
) -> PlannedImages:
    """Skips bad and filtered images, and assigns the others to buckets.

    Args:
        records: the listed images.
        survey: facts from their headers.
        resolution: --resolution, in pixels.
        group_size: consecutive samples from one bucket.
        buckets, options: the options of buckets, and of filters and bad images.
        report: receives the number of listed images and the bad ones, before these may stop the run.

    Raises:
        UserError: for more bad images than allowed, for missing captions if they are an error, or if no image is left.
    """
    # skip images that can't be trained on
    missing, reasons = look_at_captions(records)
    reasons |= survey.reasons
    bad = dict(records.refused) | {records.key(index): reason for index, reason in reasons.items()}
    num_listed = len(records) + len(records.refused)
    report(num_listed, bad)
    check_bad(bad, num_listed, options)
    is_kept = np.ones(len(records), bool)
    is_kept[list(reasons)] = False
    filtered = {}
    codes, fates = np.zeros(len(records), np.int32), [Fate(TRAINED)]
    for index, reason in reasons.items():
        codes[index] = len(fates)
        fates.append(Fate(UNREADABLE, reason))

    def leave_out(reason: str, chosen: np.ndarray) -> None:
        count = int((is_kept & chosen).sum())
        if count:
            filtered[reason] = count
            codes[is_kept & chosen] = len(fates)
            fates.append(Fate(FILTERED, reason))
        is_kept[chosen] = False

    # apply the filters by size and aspect ratio
    shorter, longer = survey.sizes.min(1), survey.sizes.max(1)
    if options.min_image_size is not None:
        leave_out(f"shorter edge under {options.min_image_size}", shorter < options.min_image_size)
    if options.max_image_size is not None:
        leave_out(f"longer edge over {options.max_image_size}", longer > options.max_image_size)
    if options.max_aspect_ratio is not None:
        leave_out(f"aspect ratio over {options.max_aspect_ratio:g}", longer > options.max_aspect_ratio * shorter)

    # apply the filters by enlargement, which depends on the buckets
    group_of, repeats = records.groups()
    uses = np.array([float(repeat) for repeat in repeats])[group_of]
    good = np.flatnonzero(is_kept)
    if len(good):
        first = plan_buckets(survey.sizes[good], resolution, buckets, uses[good], 1)
        leave_out("too small for a bucket without enlarging", _spread(first.bucket_of == NONE, good, len(records)))
        if options.max_upscale is not None:
            factors = upscaling(survey.sizes[good], first)
            too_far = _spread(factors > options.max_upscale, good, len(records))
            leave_out(f"enlarged by more than {options.max_upscale:g}", too_far)
    kept = np.flatnonzero(is_kept)
    if not len(kept):
        reasons = [f"{name}: {reason}" for name, reason in list(bad.items())[:1]]
        reasons += [f"{reason}: {count} images" for reason, count in filtered.items()]
        raise UserError(f"no image is left to train on; {'; '.join(reasons)}")

    # assign the rest to buckets
    plan = plan_buckets(survey.sizes[kept], resolution, buckets, uses[kept], group_size)
    chosen = records if len(kept) == len(records) else records.take(kept)
    missing = [index for index in missing if is_kept[index]]
    check_captions(records, missing)
    by_folder = sum(records.source(index).captions.on_missing_caption == "folder" for index in missing)
    outcome = Outcome(records, codes, fates)
    counts = len(missing), by_folder
    return PlannedImages(chosen, survey.take(kept), plan, num_listed, bad, filtered, counts[0], outcome, counts[1])


def _spread(values: np.ndarray, indices: np.ndarray, length: int) -> np.ndarray:
    spread = np.zeros(length, bool)
    spread[indices] = values
    return spread


def upscaling(image_sizes: np.ndarray, plan: BucketPlan) -> np.ndarray:
    """Returns [N]: the factor that scales each image to cover its bucket, over 1 if it is enlarged; 0 if no bucket."""
    targets = np.array([*plan.sizes, (0, 0)])
    numbers = np.where(plan.bucket_of == NONE, len(plan.sizes), plan.bucket_of)
    return (targets[numbers] / image_sizes).max(1)


def check_bad(bad: dict[str, str], num_listed: int, options: SelectionOptions) -> None:
    """Stops the run if there are more bad images than the options allow.

    Args:
        bad: the reason by the image's name.
        num_listed: number of listed images.
        options: which bad images are allowed.

    Raises:
        UserError: naming the first ones.
    """
    if not bad:
        return
    shown = "; ".join(f"{name}: {reason}" for name, reason in list(bad.items())[:20])
    shown += "" if len(bad) <= 20 else f"; and {len(bad) - 20} more in data_report.json"
    if options.on_bad_image == "error":
        raise UserError(f"{len(bad)} images can't be read (--on_bad_image error): {shown}")
    if len(bad) > options.max_bad_fraction * num_listed:
        raise UserError(
            f"{len(bad)} of {num_listed} images can't be read, more than --max_bad_fraction "
            f"{options.max_bad_fraction:g} allows; repair or remove them, or raise it: {shown}"
        )


def look_at_captions(records: Records) -> tuple[list[int], dict[int, str]]:
    """Returns (images without a caption, the reason why an image's captions can't be used, by its number).

    Raises:
        UserError: if an image has several captions where only one is allowed, as with classes.
    """
    # read all captions
    if not any(source.captions.are_expected for source in records.sources):
        return [], {}
    missing, reasons, several, lists = [], {}, {}, []
    for index, captions in enumerate(records.all_captions()):
        if not captions:
            missing.append(index)
        elif len(captions) > 1 and records.source(index).captions.takes_one:
            several[index] = captions
        elif refusal := refusal_of(captions):
            reasons[index] = refusal
        lists += [caption for caption in captions if is_written_list(caption)]

    # report probable mistakes
    if lists:
        logger.warning(
            "%d captions are text that looks like a list, such as %s; each is read as one caption: metadata.jsonl and "
            "Parquet can hold real lists, from which one caption is drawn",
            *(len(lists), short(lists[0])),
        )
    if several:
        shown = "; ".join(f"{records.key(index)}: {', '.join(map(short, several[index]))}" for index in [*several][:5])
        captions = records.source(next(iter(several))).captions
        word = captions.word
        raise UserError(f"--{word}_column: {len(several):,} images have several {word}s; give each image one: {shown}")
    return missing, reasons


def check_captions(records: Records, missing: Sequence[int]) -> None:
    """Refuses images without a caption if that is an error.

    Args:
        records: the images.
        missing: the numbers of those without a caption.

    Raises:
        UserError: if the source of one of them has `on_missing_caption` set to error.
    """
    refusing = [index for index in missing if records.source(index).captions.on_missing_caption == "error"]
    if refusing:
        names = ", ".join(records.key(index) for index in refusing[:10])
        captions = records.source(refusing[0]).captions
        raise UserError(f"{len(refusing)} images have no {captions.word} ({captions.refusal}), such as {names}")
