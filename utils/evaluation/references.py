"""Sets of images to score or compare with: drawn images, a folder, a dataset, the training images."""

import contextlib
import hashlib
import logging
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils.config.batch import RecordPass
from utils.config.options import UserError, flags_as
from utils.data.captions import CaptionOptions
from utils.data.crop_pixels import cut_out
from utils.data.folders import list_images
from utils.data.images import check_values, image_bytes, open_image, read_header, read_rgb, reason_of
from utils.data.options import ImageOptions
from utils.data.plan import PlannedImages
from utils.data.source_options import DataOptions, SourceOptions
from utils.data.sources import Records, is_saved_dataset, read_records
from utils.evaluation.metrics.features import Picture
from utils.evaluation.metrics.image_sets import ImageSet
from utils.evaluation.options import ReferenceOptions
from utils.sampling.prompts import Task, drawn_texts

logger = logging.getLogger(__name__)
DRAWN_NAME = re.compile(r"(\d{5,})_(\d{5,})")
FOLDER_FLAGS = {"train_data_dir": "images"}  # flag of the training scripts: its name in evaluate_pipeline.py
COLUMN_FLAGS = {  # likewise
    "caption_column": "reference_caption_column",
    "image_column": "reference_image_column",
    "dataset_split": "reference_split",
}


def drawn_images(folder: Path, tasks: Sequence[Task]) -> ImageSet:
    """Returns the images of tasks that were drawn into a folder.

    Images of one prompt or class form a cluster; without prompts and classes each image is its own cluster.
    """
    texts = [task.prompt.text for task in tasks]
    has_texts = all(text is not None for text in texts)
    is_plain = not has_texts and all(task.prompt.label is None for task in tasks)
    numbers = np.array([task.number for task in tasks], int)
    samples = np.array([task.sample for task in tasks], int)
    paths = [folder / f"{task.name}.png" for task in tasks]
    pictures = [Picture(path.name, partial(read_rgb, str(path))) for path in paths]
    clusters = np.arange(len(tasks)) if is_plain else numbers
    return ImageSet(pictures, texts if has_texts else None, clusters, samples)


def folder_images(folder: Path, prompts: Sequence[str] | None = None) -> ImageSet:
    """Returns the images of a folder, sorted by name, with their prompts if those are known.

    Prompts come from the argument, else from the text `prompt` of the PNGs, else from captions as in a training folder.
    File names of this package, `{prompt}_{sample}.png`, tell which images share a prompt; else equal texts do.

    Raises:
        UserError: if the folder has no images, or the number of prompts differs from that of images.
    """
    # Images and their prompts.
    names = list_images(folder, "images")
    if not names:
        raise UserError(f"--images {folder} contains no images; give a folder with images")
    if prompts is not None and len(prompts) != len(names):
        raise UserError(
            f"--images {folder} has {len(names)} images, but there are {len(prompts)} prompts; give one per image"
        )
    texts = list(prompts) if prompts is not None else _png_prompts(folder, names) or _captions(folder, names)

    # Which images share a prompt, and which sample of it each one is.
    matches = [DRAWN_NAME.fullmatch(Path(name).stem) for name in names]
    if all(matches) and texts is not None:
        clusters = np.array([int(match[1]) for match in matches])
        samples = np.array([int(match[2]) for match in matches])
    elif texts is not None:
        numbers: dict[str, int] = {}
        clusters = np.array([numbers.setdefault(text, len(numbers)) for text in texts])
        seen: dict[int, int] = {}
        samples = np.array([_count(seen, cluster) for cluster in clusters.tolist()])
    else:
        clusters = samples = np.arange(len(names))
    pictures = [Picture(name, partial(read_rgb, str(folder / name))) for name in names]
    return ImageSet(pictures, texts, clusters, samples)


def _count(seen: dict[int, int], key: int) -> int:
    seen[key] = seen.get(key, -1) + 1
    return seen[key]


def _png_prompts(folder: Path, names: Sequence[str]) -> list[str] | None:
    """The prompts in PNGs drawn by this package, empty for an unreadable image; None if any PNG has no prompt."""
    texts, num_broken = [], 0
    for name in names:
        if not name.lower().endswith(".png"):
            return None
        try:
            with open_image(str(folder / name)) as image:
                text = drawn_texts(image.info).get("prompt")
        except (OSError, ValueError) as error:
            logger.warning("--images %s can't be read: %s", folder / name, reason_of(error))
            text, num_broken = "", num_broken + 1
        if text is None:
            return None
        texts.append(text)
    return texts if num_broken < len(texts) else None


def _captions(folder: Path, names: Sequence[str]) -> list[str] | None:
    """The captions of images, read as from a training folder; None if any image has no caption."""
    try:
        with flags_as(FOLDER_FLAGS):
            records = read_records(DataOptions(), SourceOptions(train_data_dir=str(folder)), CaptionOptions(), 0)
    except UserError as error:
        logger.warning("%s: continuing without captions, which can't be read: %s", folder, error)
        return None
    found = {records.key(index): records.captions(index)[0] for index in range(len(records))}
    texts = [found.get(name, "") for name in names]
    return texts if all(texts) else None


def read_images(flag: str, name: str, options: ReferenceOptions, seed: int) -> ImageSet:
    """Returns the images of a training folder (captions are optional) or a dataset.

    Args:
        flag: the name of the flag that gives the folder or dataset.
        name: its value.

    Raises:
        UserError: if there are no images, or they can't be read.
    """
    path = Path(name)
    shared = {
        "dataset_split": options.reference_split,
        "image_column": options.reference_image_column,
        "caption_column": options.reference_caption_column,
        "max_train_samples": options.max_reference_images if flag == "reference" else None,
    }
    source = {"train_data_dir": name} if path.exists() and not is_saved_dataset(path) else {"dataset_name": name}
    try:
        with flags_as({"train_data_dir": flag, "dataset_name": flag} | COLUMN_FLAGS):
            records = read_records(DataOptions(), SourceOptions(**source, **shared), CaptionOptions(), seed)
    except UserError as error:
        text, *cure = re.split(r"; \w+ --data_format", str(error), maxsplit=1)  # evaluation has no such flag
        text += "; remove the others from the folder" if cure else ""
        raise UserError(text if flag in text else f"--{flag} {name}: {text}") from error
    count = len(records)
    read = partial(_read_record, records, resolution=options.reference_resolution)
    pictures = [Picture(records.key(index), partial(read, index)) for index in range(count)]
    return ImageSet(pictures, None, np.arange(count), np.arange(count), _fingerprint(records, options))


def _read_record(records: Records, index: int, resolution: int | None) -> Image.Image:
    image = read_rgb(records.image(index))
    return image if resolution is None else ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)


def trained_images(images: PlannedImages, options: ImageOptions) -> ImageSet:
    """Returns the training images as the model sees them, but all centre-cropped; transparency becomes white."""
    count, read = len(images.records), partial(_read_trained, images, options.still)
    pictures = [Picture(images.records.key(index), partial(read, index)) for index in range(count)]
    return ImageSet(pictures, None, np.arange(count), np.arange(count))


def _read_trained(images: PlannedImages, options: ImageOptions, index: int) -> Image.Image:
    records = images.records
    passing = RecordPass(records.identity(index), 0)
    pixels = cut_out(records.image(index), None, images.target(index), options, 0, passing).pixels
    seen = Image.fromarray(pixels.round().astype(np.uint8).transpose(1, 2, 0).squeeze())
    if seen.mode == "RGBA":
        seen = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return seen.convert("RGB")


def _fingerprint(records: Records, options: ReferenceOptions) -> str:
    """The SHA-256 of the images' bytes, their resolution, and how their colours and bit depths are converted.

    Images that need no conversion keep the fingerprint that they had before conversions were added.
    """
    digest = hashlib.sha256(str(options.reference_resolution).encode())
    for index in range(len(records)):
        try:
            content = image_bytes(records.image(index))
        except OSError as error:
            raise UserError(f"--reference: {records.key(index)} can't be read: {error.strerror or error}") from error
        digest.update(content)
        with contextlib.suppress(OSError, ValueError):  # a broken image is reported when its pixels are read
            digest.update(check_values(content, read_header(content)).how_read)
    return digest.hexdigest()
