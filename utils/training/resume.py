"""Finds the checkpoint to resume from, and checks that its options and data are those of this run."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from utils.config.options import UserError, first_line, flags_of, rules_of
from utils.data.class_folders import same_text
from utils.data.data_fingerprint import NUM_SHOWN, compare, content_name, is_content_name, read_content, write_content
from utils.data.oddities import DECODING
from utils.data.options import BucketOptions, HeldOutOptions, LoaderOptions
from utils.data.plan import PlannedImages
from utils.data.source_options import INNER
from utils.data.stream import StreamedImages
from utils.runtime.engines import Engine
from utils.runtime.processes import OutputFolder, on_main_process
from utils.runtime.stop_requests import StopRequests
from utils.training.checkpoint import Checkpoints, RunFacts, check_structure, check_training, read_state, step_of
from utils.training.optimizer_options import LENGTH_SCHEDULES, ScheduleOptions
from utils.training.options import CheckpointOptions, TrainingOptions
from utils.training.posthoc_ema import has_averages, set_aside_snapshots

if TYPE_CHECKING:
    from accelerate import Accelerator

    from utils.training.learning_rates import LearningRates

logger = logging.getLogger(__name__)
RECORD_FACT = "data_record"  # name of the file beside the checkpoints that records the images
HELD_OUT_FACT = "held_out_record"  # the same for the held-out images
# checkpoints without this fact are of releases that split each image by its name alone
SPLIT_RULE_FACT, SPLIT_BY_CONTENT = "validation_split_rule", "by content"
DECODING_FACT = "decoding"  # version of the image decoding

EARLIER_STREAM = re.compile(r"^a stream of (None|\d+) images in")
WARMUP = "lr_warmup_steps"


@dataclass(frozen=True)
class Resumption:
    """Where a run starts: at its first step, or at a checkpoint that must match its options and data.

    Attributes:
        accelerator: the processes.
        folder: the output folder.
        checkpoints: the checkpoints in it.
        checkpoint: the checkpoint to resume from; None for a new run.
        group_size: number of consecutive samples from the same bucket.
        structure: settings that must equal the checkpoint's, by flag.
        training: other settings that affect training, by flag.
        may_change: whether those may differ from the checkpoint's (`--allow_changed_options`).
        keeps_record: whether to record the images in the output folder; False on a dry run.
        splits_by_content: whether copies of an image stay on one side of the validation split. Earlier releases did
            not ensure that; a run resumed from one of their checkpoints keeps its split.
    """

    accelerator: "Accelerator"
    folder: Path
    checkpoints: Checkpoints
    checkpoint: Path | None
    group_size: int
    structure: Mapping[str, object]
    training: Mapping[str, object]
    may_change: bool
    keeps_record: bool
    splits_by_content: bool = True

    @property
    def first_step(self) -> int:
        """Optimizer steps done by the checkpoint; 0 without one."""
        return 0 if self.checkpoint is None else step_of(self.checkpoint) or 0

    @property
    def global_batch(self) -> int | None:
        """The global batch of the checkpoint; None without one, or if it does not say."""
        then = None if self.checkpoint is None else read_state(self.checkpoint).facts.training.get("global_batch")
        return then if type(then) is int else None

    @property
    def samples_at_once(self) -> int | None:
        """Samples per process that fitted into memory, if the checkpoint's run was out of memory; else None."""
        return None if self.checkpoint is None else read_state(self.checkpoint).samples_at_once

    def with_structure(self, facts: RunFacts, structure: Mapping[str, object]) -> RunFacts:
        """Returns the facts with further settings that must equal the checkpoint's, known once the model is loaded.

        Settings that a checkpoint of an earlier release does not record are not compared.

        Raises:
            UserError: if they differ from the checkpoint's.
        """
        if self.checkpoint is not None:
            then = read_state(self.checkpoint).facts.structure
            check_structure(self.checkpoint, {name: value for name, value in structure.items() if name in then})
        return replace(facts, structure={**facts.structure, **structure})

    @property
    def classes(self) -> list[str]:
        """The class names of the checkpoint, in the order of their numbers; empty without classes."""
        then = [] if self.checkpoint is None else read_state(self.checkpoint).facts.structure.get("classes")
        return [name for name in then if isinstance(name, str)] if isinstance(then, list) else []

    def class_order(self, names: Sequence[str]) -> list[str]:
        """Returns the classes in the checkpoint's order, if both are the same apart from spelling; else as given."""
        if set(self.classes) == set(names):
            return self.classes
        places = {name: place for place, name in enumerate(_spelled(self.classes))}
        return sorted(names, key=places.get) if places.keys() == set(names) else list(names)

    def schedule(self, options: ScheduleOptions, total_steps: int) -> ScheduleOptions:
        """Returns the learning-rate schedule; without a given warm-up, the checkpoint's, else one that fits the run.

        Warns of a warm-up that takes more than half of the run.
        """
        recorded = None if self.checkpoint is None else read_state(self.checkpoint).facts.training.get(WARMUP)
        schedule = options.fitted(total_steps, recorded)
        if warning := schedule.warning(total_steps):
            logger.warning("%s", warning if self.checkpoint is None else warning.partition("; ")[0])
        return schedule

    def facts(
        self,
        images: PlannedImages | StreamedImages,
        held_out: PlannedImages | None,
        rates: "LearningRates",
        **structure: object,
    ) -> RunFacts:
        """Compares this run with its checkpoint; returns the facts to compare later resumed runs with.

        Changed held-out images only cause a warning: they change the validation loss, not the training.

        Args:
            images: the training images.
            held_out: the held-out images, if any.
            rates: the learning rates of the run.
            structure: settings derived from the data that must equal the checkpoint's, by flag.

        Raises:
            UserError: if the structure differs, or the data without `--allow_changed_options`.
        """
        # Structure: must be the same.
        if self.checkpoint is not None:
            then = read_state(self.checkpoint).facts.structure
            now = {name: _matching_classes(value, then.get(name)) for name, value in structure.items()}
            check_structure(self.checkpoint, now)
        # Data: sources, decoding, then each image.
        data, use = {"data": self._known_as(images.fingerprint())}, images.describe_sources()
        if self.checkpoint is not None:
            check_training(self.checkpoint, use, self.may_change)
            for what, some in {"": images, "held-out ": held_out}.items():
                _warn_of_decoding(self.checkpoint, some, what)
        name = on_main_process(self.accelerator, lambda: self._compare_data(images))
        held_out_name = on_main_process(self.accelerator, lambda: self._compare_held_out(held_out))
        if self.checkpoint is not None:
            check_training(self.checkpoint, data, self.may_change)
            _warn_of_length(self.checkpoint, rates.schedule, rates.total_steps)
        # The facts of this run.
        training = {**self.training, WARMUP: rates.schedule.lr_warmup_steps, **data, **use, RECORD_FACT: name}
        training[DECODING_FACT] = DECODING
        if held_out_name is not None:
            training[HELD_OUT_FACT] = held_out_name
        if self.splits_by_content:
            training[SPLIT_RULE_FACT] = SPLIT_BY_CONTENT
        return RunFacts({**self.structure, **structure}, training, rates.total_steps)

    def _known_as(self, fingerprint: str) -> str:
        """Returns the images' fingerprint, or the checkpoint's if that is the same in an earlier release's wording."""
        recorded = None if self.checkpoint is None else read_state(self.checkpoint).facts.training.get("data")
        said = EARLIER_STREAM.sub("a stream in", recorded) if isinstance(recorded, str) else None
        return recorded if said == fingerprint else fingerprint

    def _compare_data(self, images: PlannedImages | StreamedImages) -> str:
        """Compares the images with the checkpoint's, records them, and returns the record's name."""
        now = images.content()
        if self.checkpoint is not None:
            changes = self._changes_since(self.checkpoint, now, RECORD_FACT)
            if changes and not self.may_change:
                raise UserError(
                    f"{self.checkpoint} was trained on other data: {changes}; put them back, or give "
                    "--allow_changed_options"
                )
            if changes:
                logger.warning("resuming from %s with other data: %s", self.checkpoint, changes)
        return self._write_record(now)

    def _compare_held_out(self, images: PlannedImages | None) -> str | None:
        """Does the same for the held-out images, if any; a change is only a warning."""
        if images is None:
            return None
        now = images.content()
        if self.checkpoint is not None and HELD_OUT_FACT in read_state(self.checkpoint).facts.training:
            changes = self._changes_since(self.checkpoint, now, HELD_OUT_FACT)
            if changes:
                message = (
                    "the held-out images differ from those of %s: %s; earlier validation losses are not comparable"
                )
                logger.warning(message, self.checkpoint, changes)
        return self._write_record(now)

    def _write_record(self, record: pa.Table) -> str:
        """Writes a record to the output folder, unless on a dry run, and returns its name."""
        try:
            return write_content(self.folder, record) if self.keeps_record else content_name(record)
        except OSError as error:
            raise UserError(f"--output_dir: {self.folder} can't be written: {error}") from error

    def _changes_since(self, start: Path, now: pa.Table, fact: str) -> str:
        name = read_state(start).facts.training.get(fact)
        if not isinstance(name, str) or not is_content_name(name):
            logger.warning("%s has no record of its data, so changed images or captions can't be detected", start)
            return ""
        try:
            beside = [start.absolute().parent, start.resolve().parent]  # it may be a link to another disk
            then = read_content(next((each for each in beside if (each / name).exists()), beside[0]), name)
        except (OSError, ValueError) as error:
            logger.warning("changes of images or captions since %s can't be detected: %s", start, first_line(error))
            return ""
        found = compare(then, now)
        if found.num_unknown:
            message = "%d images have the same sizes as for %s but other times; whether they changed can't be detected"
            logger.warning(message, found.num_unknown, start)
        return found.words

    def take_over(self) -> None:
        """Cleans up what earlier runs left in the output folder; called once nothing can refuse this run any more."""
        on_main_process(self.accelerator, self._clean_up)

    def _clean_up(self) -> None:
        start = self.checkpoint
        step = 0 if start is None else read_state(start).step
        self.checkpoints.clean()
        self.checkpoints.set_aside_after(step)
        set_aside_snapshots(self.folder, step if start is not None and has_averages(start) else 0)


def find_resumption(
    options: TrainingOptions, engine: Engine, folder: OutputFolder, requests: StopRequests, pipeline_class: str
) -> Resumption:
    """Finds the checkpoint to resume from, compares the options with its options, and claims the output folder.

    Args:
        pipeline_class: name of the pipeline class that is trained.

    Raises:
        UserError: if the folder or the checkpoint belongs to another run.
    """
    # The checkpoint, if any.
    accelerator, asked = engine.accelerator, options.checkpoint
    checkpoints = Checkpoints(folder.path, asked.checkpoints_total_limit)
    start = on_main_process(accelerator, lambda: checkpoints.resolve(asked.resume_from_checkpoint))
    # The options that it must match.
    global_batch = options.loader.global_batch(accelerator.num_processes)
    group_size = _choose_group_size(options.buckets, options.loader, global_batch, start)
    structure = options.structure | {"pretrained_model": pipeline_class}
    structure["bucket_group_size"] = group_size if options.buckets.use_aspect_ratio_buckets else None
    training = _training_options(options)
    training |= {"mixed_precision": accelerator.mixed_precision, "global_batch": global_batch}
    if training[WARMUP] is None:  # not given: decided later by `Resumption.schedule`
        del training[WARMUP]
    if start is not None:
        check_structure(start, structure)
        check_training(start, _options_to_compare(training, start), asked.allow_changed_options, _defaults(options))
    # The output folder.
    if not options.runtime.dry_run:
        overwrite = options.runtime.overwrite_output_dir
        on_main_process(accelerator, lambda: _claim(folder, start, asked, overwrite))
        on_main_process(accelerator, requests.remove_files)
    may_change, is_dry = asked.allow_changed_options, options.runtime.dry_run
    whole = accelerator, folder.path, checkpoints
    by_content = _splits_by_content(start, options.held_out)
    return Resumption(*whole, start, group_size, structure, training, may_change, not is_dry, by_content)


def _splits_by_content(start: Path | None, held_out: HeldOutOptions) -> bool:
    """Whether copies of an image stay together in the split; not if the checkpoint's split was made without that."""
    if start is None or held_out.fraction is None:
        return True
    recorded = read_state(start).facts.training
    is_same_split = recorded.get("validation_split") == held_out.validation_split
    if SPLIT_RULE_FACT in recorded or not is_same_split:
        return True
    logger.info(
        "%s is from an earlier release, which split images by name only; this run keeps that split, so copies of an "
        "image may be both trained on and held out",
        start,
    )
    return False


def _warn_of_decoding(start: Path, images: PlannedImages | StreamedImages | None, what: str) -> None:
    """Warns of images that this release decodes to other pixels than the release that wrote the checkpoint."""
    version = _decoding_of(read_state(start).facts.training)
    if images is None or version >= DECODING:
        return
    if isinstance(images, StreamedImages):
        logger.warning(
            "%s is from an earlier release, which may have decoded some images of the stream differently", start
        )
        return
    chosen = np.flatnonzero(images.survey.decoded_otherwise(version))
    if len(chosen):
        names = ", ".join(images.records.key(index) for index in chosen[:NUM_SHOWN].tolist())
        logger.warning(
            "%s is from an earlier release, which decoded %d of the %d %simages, or their masks, to other pixels, such "
            "as %s; data_report.json lists their kinds under converted",
            *(start, len(chosen), len(images.records), what, names),
        )


def _decoding_of(training: Mapping[str, object]) -> int:
    """The decoding version a checkpoint was trained with; for earlier releases the lowest possible one."""
    version = training.get(DECODING_FACT)
    if isinstance(version, int):
        return version
    return 2 if SPLIT_RULE_FACT in training else int(RECORD_FACT in training)


def _matching_classes(now: object, then: object) -> object:
    """Returns the checkpoint's class names if both are the same apart from spelling; else the current ones."""
    return then if type(then) is type(now) and _spelled(now) == _spelled(then) else now


def _spelled(names: object) -> object:
    """Returns class names, or a mapping keyed by them, in normalized spelling; anything else unchanged."""
    if isinstance(names, Mapping):
        return {same_text(name): value for name, value in names.items()}
    return [same_text(name) if isinstance(name, str) else name for name in names] if isinstance(names, list) else names


def _options_to_compare(training: Mapping[str, object], start: Path) -> dict[str, object]:
    """Returns the options to compare with a checkpoint's: without --class_folders if both mean its default."""
    rules = training.get("class_folders"), read_state(start).facts.training.get("class_folders")
    is_same = set(rules) <= {None, INNER}
    return {name: value for name, value in training.items() if name != "class_folders" or not is_same}


def _defaults(options: TrainingOptions) -> dict[str, object]:
    """Returns the default of each option."""
    return {field.name: field.default for field, _ in flags_of(options)}


def _training_options(options: TrainingOptions) -> dict[str, object]:
    """Returns the options that a resumed run may not change freely, by flag, as a checkpoint records them."""
    return {field.name: value for field, value in flags_of(options) if not rules_of(field).resume.is_free}


def _choose_group_size(buckets: BucketOptions, loader: LoaderOptions, global_batch: int, start: Path | None) -> int:
    """Returns the number of consecutive samples per bucket: the given one, the checkpoint's, or the micro-batch."""
    recorded = None if start is None else read_state(start).facts.structure.get("bucket_group_size")
    recorded = recorded if type(recorded) is int and recorded > 0 else None
    chosen = buckets.bucket_group_size or recorded or math.gcd(loader.train_batch_size, global_batch)
    if global_batch % chosen:
        raise UserError(f"--bucket_group_size must divide the global batch of {global_batch}, got {chosen}")
    return chosen


def _claim(folder: OutputFolder, start: Path | None, options: CheckpointOptions, overwrite: bool) -> None:
    """Claims the output folder for this run."""
    is_inside = start is not None and start.resolve().parent == folder.path.resolve()
    folder.claim(is_inside or options.resume_from_checkpoint == "latest", overwrite)


def _warn_of_length(start: Path, options: ScheduleOptions, total_steps: int) -> None:
    """Warns if the learning-rate schedule changes because the run's length has changed."""
    before = read_state(start).facts.total_steps
    if options.lr_scheduler in LENGTH_SCHEDULES and before != total_steps:
        message = (
            "--lr_scheduler %s depends on the run's length, which was %d steps and is now %d: the learning rate jumps"
        )
        logger.warning(message, options.lr_scheduler, before, total_steps)
