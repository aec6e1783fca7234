"""Prepares the data of a run: chooses images, fills the cache, and reports problems."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from utils.config.options import UserError, flags_as
from utils.config.seeding import Stream, generator
from utils.data.cache import EntryStore
from utils.data.captions import CaptionOptions
from utils.data.class_labels import check_held_out_classes
from utils.data.data_fingerprint import DIGESTED_BYTES
from utils.data.duplicates import first_of_same, shared_with
from utils.data.encodings import Encodings, LatentPlan, MaskPlan, texts_of
from utils.data.file_ledger import Ledger
from utils.data.file_listing import HELD_OUT, Fate
from utils.data.mask_values import MASKS_LOOKED_AT, NUM_NAMED, MaskCensus
from utils.data.masks import called_masks
from utils.data.oddities import DOUBTFUL, bits_of
from utils.data.options import BucketOptions, CacheOptions, HeldOutOptions, ImageOptions, SelectionOptions
from utils.data.plan import PlannedImages, check_bad, hold_out, plan_images, upscaling
from utils.data.source_options import DataOptions, SourceOptions, source_entries
from utils.data.sources import Records, read_records
from utils.data.stream import StreamedImages, open_stream
from utils.data.survey import Survey, add_digests, survey, survey_masks, take_census
from utils.data.tables import RowTable
from utils.models.base import Family
from utils.runtime.atomic_files import or_without
from utils.runtime.processes import write_json
from utils.runtime.stop_requests import StopRequests
from utils.training.encoding import CacheFiller, Verification, verify_latents, verify_texts

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
REPORT = "data_report.json"
MUCH_ENLARGED = 2.0  # enlargement factor above which an image looks blurred
MOST_NAMED = 20  # unreadable held-out images to name
MASKS_LOOKED_AT_DRY = 20_000


def _warn_of_bad(num_listed: int, bad: Mapping[str, str]) -> None:
    """Warns of held-out images that can't be read; the validation loss is measured without them."""
    for key, reason in list(bad.items())[:MOST_NAMED]:
        logger.warning("left out of the validation loss: %s: %s", key, reason)
    if len(bad) > MOST_NAMED:
        logger.warning("left out of the validation loss: %d of %d images", len(bad), num_listed)


@dataclass(frozen=True)
class DataPreparation:
    """Prepares the data of a run according to its options.

    Attributes:
        report_folder: folder for `data_report.json` and `data_report.jsonl`; None on a dry run.
        requests: stop requests, which may interrupt filling the cache.
        left_out: folders inside the data whose files are not data, and what becomes of these files.
        splits_by_content: whether copies of an image stay on one side of a fractional validation split.
        ledger: what became of every file.
        firsts: for each image, the number of the first byte-identical one, once known.
    """

    accelerator: "Accelerator"
    data: DataOptions
    source: SourceOptions
    captions: CaptionOptions
    selection: SelectionOptions
    image: ImageOptions
    buckets: BucketOptions
    cache: CacheOptions
    held_out: HeldOutOptions
    seed: int
    report_folder: Path | None
    requests: StopRequests
    left_out: Mapping[Path, Fate]
    splits_by_content: bool = True
    ledger: Ledger = field(default_factory=Ledger)
    firsts: list[np.ndarray] = field(default_factory=list, repr=False)

    def choose_images(self, resolution: int, group_size: int) -> PlannedImages | StreamedImages:
        """Chooses the training images and their buckets; the main process reads headers and sends them to the others.

        Raises:
            UserError: as `read_records` and `plan_images`.
        """
        # A stream: nothing is listed in advance.
        if self.data.streaming:
            (entry,) = source_entries(self.data, self.source, self.captions)
            images = open_stream(
                self.data, entry.source, entry.captions, resolution, self.buckets, self._left_out_of_training
            )
            self.ledger.train_on(images)
            return images
        # List the images; the main process comes first to fill the cache of `datasets` for all.
        with self.accelerator.main_process_first():
            records = read_records(self.data, self.source, self.captions, self.seed, self._left_out_of_training)
        self._warn_of_unused_cache(records)
        if self.held_out.fraction is not None:
            firsts = self._first_of_same(records)
            records, _ = hold_out(records, self.held_out.fraction, self.seed, firsts)
        # Read their sizes, filter them and assign buckets; a dry run reports all problems, where a run would end.
        known = self._survey(records, self.report_folder is not None)
        selection = self.selection
        if self.report_folder is None:
            selection = replace(selection, max_bad_fraction=1.0, on_bad_image="skip")
        images = plan_images(records, known, resolution, group_size, self.buckets, selection, self._report_bad)
        # Check the masks, and report what was left out.
        if records.has_masks:
            self._check_masks(images)
        say_what_was_left_out(images, group_size)
        self.ledger.train_on(images)
        return images

    def _warn_of_unused_cache(self, records: Records) -> None:
        """Warns if `--cache_dir` is given but the `datasets` library, which uses it, reads nothing."""
        is_used = any(isinstance(source.table, RowTable) for source in records.sources)
        if self.data.cache_dir is None or is_used or self.held_out.validation_data_dir is not None:
            return
        if self.accelerator.is_main_process:
            logger.warning(
                "--cache_dir %s has no effect: it is for datasets and parquet files; encodings are cached in "
                "--encoding_cache_dir",
                self.data.cache_dir,
            )

    def _check_masks(self, images: PlannedImages) -> None:
        """Checks the masks, and warns of unusual ones.

        Raises:
            UserError: if no image has a mask, or if the masks together exclude almost everything from the loss.
        """
        if not images.survey.is_masked.any():
            flag = self.source.mask_flag or "dataset_file"  # its sources have the mask options
            cures = {
                "alpha_mask": "none has a transparent part; leave it out",
                "mask_dir": "a mask must have the same relative path as its image",
                "mask_column": "the column is empty",
                "dataset_file": "check the mask options of its sources",
            }
            raise UserError(f"--{flag}: no image has a mask; {cures[flag]}")
        for census in self._census(images):
            census.check()
            for line in census.warnings():
                logger.warning("%s", line)

    def _census(self, images: PlannedImages) -> list[MaskCensus]:
        """Examines the masks of each source; the main process reads them and sends the findings to the others."""
        from accelerate.utils import broadcast_object_list

        found = None
        if self.accelerator.is_main_process:
            where = self.source.masks_given if self.source.has_masks else f"--dataset_file {self.data.dataset_file}"
            most = MASKS_LOOKED_AT_DRY if self.report_folder is None else MASKS_LOOKED_AT
            found = take_census(images.records, images.survey.is_masked, where, most)
        return broadcast_object_list([found])[0]

    @property
    def _left_out_of_training(self) -> Mapping[Path, Fate]:
        folder = self.held_out.validation_data_dir
        return {
            **self.left_out,
            **({} if folder is None else {Path(folder): Fate(HELD_OUT, "the folder of --validation_data_dir")}),
        }

    def choose_held_out(self, resolution: int) -> PlannedImages | None:
        """Chooses the held-out images, if requested, and logs what became of all files."""
        found = self._choose_held_out(resolution)
        self.ledger.held_out, self.ledger.is_portion = found, self.held_out.fraction is not None
        for line in self.ledger.lines():
            logger.info("%s", line)
        return found

    def _choose_held_out(self, resolution: int) -> PlannedImages | None:
        options, data, source = self.held_out, self.data, self.source
        if not options.is_asked:
            return None
        # List the images: of a folder, of a split, or a fraction of the training data.
        if options.validation_data_dir is not None:
            data = replace(data, dataset_file=None)
            source = replace(source, dataset_name=None, train_data_dir=options.validation_data_dir, mask_dir=None)
        elif options.fraction is None:
            source = replace(source, dataset_split=options.validation_split)
        names = {"train_data_dir": "validation_data_dir"} if options.validation_data_dir is not None else {}
        with flags_as(names | {"dataset_split": "validation_split"}), self.accelerator.main_process_first():
            records = read_records(data, source, self.captions, self.seed, self.left_out)
        if options.fraction is not None:
            _, records = hold_out(records, options.fraction, self.seed, self._first_of_same(records))
        limit = options.max_validation_samples
        if limit is not None and limit < len(records):
            order = generator(self.seed, 0, 0, Stream.HELD_OUT_SPLIT).permutation(len(records))
            records = records.take(np.sort(order[:limit]))
        # Read their sizes, assign buckets and check masks.
        known = self._survey(records, self.report_folder is not None)
        selection = replace(self.selection, max_bad_fraction=1.0)
        images = plan_images(records, known, resolution, 1, self.buckets, selection, _warn_of_bad)
        for census in self._census(images) if records.has_masks else ():
            if census.is_nearly_black:
                logger.warning(
                    "the validation loss counts almost nowhere: the masks of the held-out images are black or nearly so"
                )
        # Compare them with the training images.
        trained = self.ledger.images
        if isinstance(trained, StreamedImages):
            self._send_digests(trained, images)
        elif trained is not None:
            if self.captions.are_classes:
                check_held_out_classes(trained.records, images.records, self._held_out_flag)
            if options.fraction is None:
                self._warn_of_shared(images)
        return images

    @property
    def _held_out_flag(self) -> str:
        """The flag that names the held-out images, with its value."""
        folder, split = self.held_out.validation_data_dir, self.held_out.validation_split
        return f"--validation_split {split}" if folder is None else f"--validation_data_dir {folder}"

    def _send_digests(self, trained: StreamedImages, found: PlannedImages) -> None:
        """Gives a stream the digests of held-out images, so that it can warn of copies among the training images."""
        from accelerate.utils import broadcast_object_list

        known = found.survey
        if self.accelerator.is_main_process:
            add_digests(known, found.records, known.sizes[:, 0] > 0, self.cache.folder, show_progress=True)
        digests = broadcast_object_list([known.digests])[0]
        names = (found.records.key(index) for index in range(len(found.records)))
        trained.held_out.learn(names, known.num_bytes, digests.tolist())

    def _first_of_same(self, records: Records) -> np.ndarray | None:
        """Returns `first_of_same`, computed once by the main process and sent to the others; None if unused."""
        from accelerate.utils import broadcast_object_list

        if not self.splits_by_content:
            return None
        if not self.firsts:
            found = None
            if self.accelerator.is_main_process:
                known = survey(records, self.cache.folder, show_progress=True)
                found = first_of_same(records, known, self.cache.folder)
                num_copies = int((found != np.arange(len(found))).sum())
                if num_copies == len(found) - 1:
                    said = (
                        "all %d images are byte-identical, so those held out by --validation_split are trained on too"
                    )
                    logger.warning(said, len(found))
                elif num_copies:
                    said = "%d images are byte-identical to another and stay on the same side of --validation_split"
                    logger.info(said, num_copies)
            self.firsts.append(broadcast_object_list([found])[0])
        return self.firsts[0]

    def _warn_of_shared(self, found: PlannedImages) -> None:
        """Warns of held-out images with byte-identical copies among the training images."""
        trained = self.ledger.images
        if not self.accelerator.is_main_process or not isinstance(trained, PlannedImages):
            return
        shared = shared_with(found.records, found.survey, trained.records, trained.survey, self.cache.folder)
        if shared:
            logger.warning(
                "%d of the %d held-out images are byte-identical to training images, such as %s; the loss on them does "
                "not show how well the model generalizes",
                *(len(shared), len(found.records), found.records.key(shared[0])),
            )

    def _survey(self, records: Records, knows_contents: bool) -> Survey:
        """Reads the sizes and other header facts of the images; the main process does and sends them to the others.

        Args:
            records: the images.
            knows_contents: whether to compute digests, which a resumed run compares.
        """
        from accelerate.utils import broadcast_object_list

        known = None
        if self.accelerator.is_main_process:
            known = survey(records, self.cache.folder, show_progress=True)
            with_digests = self.cache.cache_latents and self.report_folder is not None
            with_digests |= knows_contents and known.total_bytes <= DIGESTED_BYTES
            if with_digests:
                add_digests(known, records, known.sizes[:, 0] > 0, self.cache.folder, show_progress=True)
            if records.has_masks:
                survey_masks(known, records, self.cache.folder, with_digests, show_progress=True)
        return broadcast_object_list([known])[0]

    def _report_bad(self, num_listed: int, bad: dict[str, str]) -> None:
        """Writes the bad images to the report before they may end the run."""
        if self.report_folder is not None and self.accelerator.is_main_process and bad:
            with or_without(self.report_folder / REPORT):
                write_json(self.report_folder / REPORT, {"images": num_listed, "unreadable": bad})

    def fill_cache(
        self, family: Family, images: PlannedImages | StreamedImages, num_workers: int, keep_vae: bool
    ) -> Encodings:
        """Encodes what is not cached yet, and moves encoders that are no longer needed off the device.

        Args:
            num_workers: loader workers of this process.
            keep_vae: whether the VAE is still needed.
        """
        cache = self.cache
        filler = self._filler(family, num_workers)
        latents = masks = texts = None
        # Latents and masks.
        if cache.cache_latents:
            cuts = (images, self.image, self.seed, self.num_crops)
            plan = LatentPlan(*cuts, filler.vae_fingerprint())
            latents = filler.latents(plan, EntryStore(cache.folder / "latents"))
            bad = latents.bad
            if images.records.has_masks:
                masks = filler.masks(MaskPlan(*cuts, family.latent_space.shape), EntryStore(cache.folder / "masks"))
                bad = masks.bad | bad
            self.share_unreadable({images.records.key(index): why for index, why in bad.items()}, images)
            num_crops = int((latents.places[:, :, 0] >= 0).sum())
            logger.info("%d crops of %d images are cached in %s", num_crops, len(images.records), cache.folder)
            if cache.verify_cache:
                report_verification("images", verify_latents(filler, plan, latents))
        # Text states.
        if cache.cache_text_embeddings:
            distinct = self.texts(images)
            texts = filler.texts(distinct, filler.text_fingerprint(), EntryStore(cache.folder / "text"))
            logger.info("%d captions are cached in %s", len(distinct), cache.folder)
            if cache.verify_cache:
                report_verification("captions", verify_texts(filler, distinct, texts))
        # Free the device from the encoders.
        vae_is_done = cache.cache_latents and not keep_vae
        family.rest(self.accelerator.device, vae=vae_is_done, text_encoders=cache.cache_text_embeddings)
        return Encodings(latents, masks, texts)

    def texts(self, images: PlannedImages) -> list[str]:
        """Returns each distinct text of the training images; of tags in a new order at each step, one per caption."""
        return list(texts_of(images, self.seed, self.cache.text_variants))

    def cache_bytes(self, family: Family, images: PlannedImages, num_texts: int) -> dict[str, int]:
        """Returns the bytes that the cache would take, by kind."""
        filler = self._filler(family, 0)
        moments = [family.latent_space.num_cached(size) for size in images.plan.sizes]
        counts = np.bincount(images.plan.bucket_of, minlength=len(moments))
        values = int(sum(int(count) * size for count, size in zip(counts, moments, strict=True)))
        states = filler.states([("", True)])
        return {
            "latents": values
            * (self.cache.cut_variants or 1 if self.image.varies else 1)
            * filler.latent_dtype.itemsize,
            "text states": (num_texts + 1) * sum(state.nbytes for state in states.values()),
        }

    def _filler(self, family: Family, num_workers: int) -> CacheFiller:
        dtype = None if self.cache.cache_dtype is None else getattr(torch, self.cache.cache_dtype)
        size, check = self.cache.cache_batch_size, self.requests.check
        return CacheFiller(self.accelerator, family, dtype, size, num_workers, check)

    @property
    def num_crops(self) -> int:
        """Number of cached crops per image."""
        return self.cache.cut_variants if self.image.varies else 1

    def write_report(self, images: PlannedImages | StreamedImages, is_last: bool = True) -> None:
        """Writes `data_report.json` and `data_report.jsonl`: what became of the images and of each file.

        Args:
            is_last: whether the report will not be rewritten soon.
        """
        if self.accelerator.is_main_process:
            with or_without(f"the report on the data in {self.report_folder}"):
                write_json(self.report_folder / REPORT, images.report() | self.ledger.report())
                self.ledger.write(self.report_folder, is_last)

    def share_unreadable(self, found: dict[str, str], images: PlannedImages | StreamedImages) -> None:
        """Sends images that this process could not decode to all processes, warns of each, and writes the report.

        Args:
            found: reason by image name; emptied.

        Raises:
            UserError: on all processes, if more images are bad than --max_bad_fraction allows.
        """
        from accelerate.utils import gather_object

        together = dict(gather_object(list(found.items())))
        found.clear()
        new = {key: reason for key, reason in together.items() if key not in images.bad}
        for key, reason in new.items():
            logger.warning("left out %s: %s", key, reason)
        images.bad.update(new)
        if new:
            self.write_report(images, is_last=False)
            check_bad(images.bad, images.num_known, self.selection)


def say_what_was_left_out(images: PlannedImages, group_size: int) -> None:
    """Logs which images were left out, and which are trained on in an unusual way."""
    # Unreadable and filtered images.
    for name, reason in list(images.bad.items())[:20]:
        logger.warning("left out %s: %s", name, reason)
    if images.bad:
        logger.warning("left out %d unreadable images", len(images.bad))
    for reason, count in images.filtered.items():
        logger.warning("%d images are left out: %s", count, reason)
    # Captions.
    by_folder = images.named_by_folder
    if by_folder:
        logger.warning("%d images have no caption and train on their folder's name", by_folder)
    if images.missing_captions > by_folder:
        without = images.missing_captions - by_folder
        logger.warning("%d images have no caption and train on an empty one (see --on_missing_caption)", without)
    # Folders with kohya's repeat counts.
    folders = images.records.numbered_folders() if images.records.copies is None else {}
    if set(folders.values()) - {1}:
        name, count = max(folders.items(), key=lambda each: each[1])
        logger.info(
            "%d folders have names with kohya's repeat counts, such as %s; each of their images is used once per "
            "epoch; --folder_repeats uses it as often as the number says, here %d times",
            *(len(folders), name, count),
        )
    # Pixels and masks.
    warn_of_guesses(images.records, images.survey)
    warn_of_called_masks(images.records)
    enlarged = upscaling(images.survey.sizes, images.plan)
    num_enlarged = int((enlarged > MUCH_ENLARGED).sum())
    if num_enlarged:
        message = "%d images are enlarged by more than %g, up to %.3g times; --max_upscale %g leaves them out"
        logger.warning(message, num_enlarged, MUCH_ENLARGED, enlarged.max(), MUCH_ENLARGED)
    num_whole = int((~images.survey.is_masked).sum()) if images.records.has_masks else 0
    if num_whole:
        logger.warning("%d images have no mask; their loss counts everywhere", num_whole)
    # Small buckets.
    for (width, height), count, goals in images.plan.merged:
        others = ", ".join(f"{goal[0]}x{goal[1]}" for goal in goals)
        reason = f"fewer than a group of {group_size}"
        logger.info("bucket %dx%d has %d images, %s: moved them to %s", width, height, count, reason, others)


def warn_of_guesses(records: Records, known: Survey) -> None:
    """Warns of images and masks whose white level had to be guessed."""
    for doubt in DOUBTFUL:
        chosen = np.flatnonzero((known.oddities | known.mask_oddities) & bits_of([doubt]))
        if len(chosen):
            names = ", ".join(records.key(index) for index in chosen[:NUM_NAMED].tolist())
            message = "%d images or masks have %s, such as %s; save them with values from 0 to 1, or in 8 or 16 bits"
            logger.warning(message, len(chosen), doubt, names)


def warn_of_called_masks(records: Records) -> None:
    """Warns of training images whose names look like masks of other images."""
    found = called_masks(records.key(index) for index in range(len(records)))
    if found:
        logger.warning(
            "%d training images have names of masks of others, such as %s of %s; if they are masks, move them to a "
            "folder of their own under their images' names and give --mask_dir, or remove them",
            *(len(found), *found[0]),
        )


def report_verification(what: str, found: Verification) -> None:
    """Logs the result of --verify_cache.

    Raises:
        UserError: if cached entries differ from what the encoders compute now.
    """
    quality = ""
    if found.peak_signal_to_noise is not None:
        quality = f"; PSNR of the decoded latents against the pixels: {found.peak_signal_to_noise:.1f} dB"
    if found.different:
        names = ", ".join(found.different[:10])
        raise UserError(
            f"--verify_cache: {len(found.different)} of {found.num_entries} {what} differ from their cached encodings, "
            f"such as {names}; remove the folder of --encoding_cache_dir and fill it again"
        )
    logger.info("verified %d cached %s: relative error at most %.1e%s", found.num_entries, what, found.worst, quality)
