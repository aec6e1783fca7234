"""Where images and captions come from: HF Datasets by name, or a folder of images."""

import glob
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

from utils.options import UserError, first_line, nearest, option, require, require_positive
from utils.records import ImageRecord
from utils.seeding import Stream, generator

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataOptions:
    dataset_name: str | None = option(None, "name of a dataset on the Hub, or a local path that `datasets` can load")
    dataset_config_name: str | None = option(None, "configuration of the dataset")
    train_data_dir: str | None = option(
        None,
        "folder of images with a metadata.jsonl (or .csv) of file_name and captions; with --dataset_name its data_dir",
    )
    image_column: str = option("image", "column of the images")
    caption_column: str = option("text", "column of the captions: a string, or a list of strings of which one is drawn")
    max_train_samples: int | None = option(None, "train on this many images, drawn by the seed")
    cache_dir: str | None = option(None, "where `datasets` keeps what it downloads and converts")

    def __post_init__(self) -> None:
        require_positive(self, "max_train_samples")
        if self.dataset_name is None and self.train_data_dir is None:
            raise UserError("no data to train on; give --dataset_name or --train_data_dir")
        if self.dataset_name is None and not Path(self.train_data_dir).is_dir():
            require(False, "train_data_dir", self.train_data_dir, "be a folder", "it does not exist here")


class Records:
    """The images to train on, in a fixed order; rows are read when asked for.

    Attributes:
        unreadable: (key, reason) of each image that was left out.
        num_missing_captions: images without a caption, which train on the empty one.
    """

    def __init__(self, dataset: "Dataset", image_column: str, caption_column: str, rows: np.ndarray):
        self._dataset = dataset
        self._image_column = image_column
        self._caption_column = caption_column
        self._rows = rows
        self.unreadable: list[tuple[str, str]] = []
        self.num_missing_captions = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> ImageRecord:
        row = int(self._rows[index])
        values = self._dataset[row]
        image = values[self._image_column] or {"path": None, "bytes": b""}
        source = image["bytes"] if image["bytes"] is not None else image["path"]
        return ImageRecord(image["path"] or f"row {row}", source, _captions(values[self._caption_column]))

    def find_unreadable(self, check: Callable[[str | bytes], None]) -> dict[int, str]:
        """The numbers of the records for which `check(source)` raises `OSError` or `ValueError`, and why.

        Only headers are read, on several threads.
        """

        def reason(index: int) -> str | None:
            try:
                check(self[index].source)
            except (OSError, ValueError) as error:
                return first_line(error)
            return None

        with ThreadPoolExecutor(max_workers=min(16, 4 * (os.cpu_count() or 1))) as pool:
            reasons = pool.map(reason, range(len(self)), chunksize=64)
            return {index: found for index, found in enumerate(reasons) if found is not None}

    def without(self, unreadable: dict[int, str]) -> "Records":
        """The same records but for some, which are remembered as unreadable."""
        kept = Records(self._dataset, self._image_column, self._caption_column, np.delete(self._rows, list(unreadable)))
        kept.unreadable = [(self[index].key, reason) for index, reason in unreadable.items()]
        kept.num_missing_captions = self.num_missing_captions
        return kept


def read_records(options: DataOptions, seed: int) -> Records:
    """Opens the dataset, checks its columns and draws the subset of `--max_train_samples`.

    Raises:
        UserError: for a dataset that can't be loaded, is empty, or lacks a column.
    """
    from datasets import Image
    from datasets.exceptions import DatasetGenerationError

    dataset = _load(options)
    _check_columns(dataset.column_names, options)
    try:
        dataset = dataset.cast_column(options.image_column, Image(decode=False))
        dataset = dataset.select_columns([options.image_column, options.caption_column])
    except (DatasetGenerationError, TypeError, ValueError) as error:
        raise UserError(f"--image_column {options.image_column} does not hold images: {first_line(error)}") from error
    if len(dataset) == 0:
        raise UserError("the dataset is empty; check --dataset_name or --train_data_dir")
    rows = np.arange(len(dataset))
    if options.max_train_samples is not None and options.max_train_samples < len(rows):
        order = generator(seed, 0, 0, Stream.SUBSET).permutation(len(rows))
        rows = np.sort(order[: options.max_train_samples])
    records = Records(dataset, options.image_column, options.caption_column, rows)
    records.num_missing_captions = _count_missing_captions(dataset, options.caption_column, rows)
    return records


def _load(options: DataOptions) -> "Dataset":
    """The train split."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    try:
        loaded = SOURCES["dataset" if options.dataset_name is not None else "imagefolder"](options)
    except DatasetGenerationError as error:
        raise UserError(f"the dataset can't be read: {first_line(error.__cause__ or error)}") from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"the dataset can't be loaded: {first_line(error)}") from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if "train" not in loaded:
        raise UserError(f"the dataset has no train split; it has {', '.join(loaded)}")
    return loaded["train"]


def _load_dataset(options: DataOptions):
    import datasets

    if _is_saved_dataset(Path(options.dataset_name)):
        return datasets.load_from_disk(options.dataset_name)
    return datasets.load_dataset(
        options.dataset_name,
        options.dataset_config_name,
        cache_dir=options.cache_dir,
        data_dir=options.train_data_dir,
    )


def _load_imagefolder(options: DataOptions):
    import datasets

    folder = Path(options.train_data_dir)
    if _is_saved_dataset(folder):
        raise UserError(f"--train_data_dir {folder} is a saved dataset; give it as --dataset_name")
    num_files = _count_images(folder)
    if num_files == 0:
        raise UserError(f"--train_data_dir {folder} holds no images, such as .png, .jpg or .webp files")
    loaded = datasets.load_dataset(
        "imagefolder", data_files={"train": f"{glob.escape(str(folder))}/**"}, cache_dir=options.cache_dir
    )
    num_unlisted = num_files - len(loaded["train"])
    if num_unlisted > 0:
        logger.warning("%d of %d images in %s are not in its metadata and left out", num_unlisted, num_files, folder)
    return loaded


def _count_images(folder: Path) -> int:
    """Images in a folder and those below it, links followed, hidden ones left out."""
    extensions = PIL.Image.registered_extensions()
    return sum(
        os.path.splitext(name)[1].lower() in extensions and not name.startswith(".")
        for _, _, names in os.walk(folder, followlinks=True)
        for name in names
    )


def _is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()


SOURCES = {"dataset": _load_dataset, "imagefolder": _load_imagefolder}


def _check_columns(columns: list[str], options: DataOptions) -> None:
    for flag, column in (("image_column", options.image_column), ("caption_column", options.caption_column)):
        if column in columns:
            continue
        hint = nearest(column, columns)
        raise UserError(
            f"--{flag} {column} is not a column of the data, which has {', '.join(columns)}"
            + (f"; did you mean --{flag} {hint}?" if hint else f"; name one with --{flag}")
            + (
                ""
                if flag == "image_column" or options.dataset_name
                else ", or add a metadata.jsonl of file_name and text"
            )
        )


def _captions(value: str | list[str] | None) -> tuple[str, ...]:
    if value is None:
        return ("",)
    if isinstance(value, str):
        return (value,)
    return tuple(caption or "" for caption in value) or ("",)


def _count_missing_captions(dataset: "Dataset", column: str, rows: np.ndarray) -> int:
    """Images whose caption is None or an empty list.

    Raises:
        UserError: if the column holds neither strings nor lists of strings.
    """
    from datasets import List, Value

    feature = dataset.features[column]
    inner = feature.feature if isinstance(feature, List) else feature
    if not (isinstance(inner, Value) and inner.dtype in ("string", "large_string", "string_view", "null")):
        raise UserError(f"--caption_column {column} must hold strings or lists of strings, got {inner}")
    values = dataset.select_columns([column]).select(rows)[column]
    return sum(1 for value in values if value is None or (isinstance(value, list) and not value))
