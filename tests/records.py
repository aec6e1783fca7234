"""Records of folders and of sources, and the images that are planned of them."""

import os
from pathlib import Path

from utils.data.captions import CaptionOptions
from utils.data.options import BucketOptions, SelectionOptions
from utils.data.plan import PlannedImages, plan_images
from utils.data.source_options import DataOptions, LabelledSource, LabelOptions, SourceOptions
from utils.data.sources import Records, read_records
from utils.data.survey import survey


def records_of(folder: Path | None = None, captions: CaptionOptions | None = None, **options) -> Records:
    """The records of a folder, or of the sources that the options name."""
    data = DataOptions(dataset_file=options.pop("dataset_file", None))
    if folder is not None:
        options["train_data_dir"] = str(folder)
    return read_records(data, SourceOptions(**options), captions or CaptionOptions(), 0)


def plan(
    folder: Path,
    resolution: int,
    buckets: BucketOptions | None = None,
    group_size: int = 1,
    memory: Path = Path(os.environ["HF_HOME"]),
    selection: SelectionOptions | None = None,
    **options,
) -> PlannedImages:
    """A folder's images, planned."""
    records = records_of(folder, **options)
    known = survey(records, memory)
    selection = selection or SelectionOptions()
    return plan_images(
        records, known, resolution, group_size, buckets or BucketOptions(), selection, lambda count, bad: None
    )


def found(records: Records) -> dict[str, tuple[str, ...]]:
    """Captions by key."""
    return {records.key(index): records.captions(index) for index in range(len(records))}


def keys(records: Records) -> list[str]:
    return [records.key(index) for index in range(len(records))]


def class_records(folder: Path, rule: str | None = None) -> dict[str, str]:
    """The class of each image of a folder."""
    source = LabelledSource(train_data_dir=str(folder))
    captions = LabelOptions(class_conditional=True, class_folders=rule).for_source(source)
    records = read_records(DataOptions(), source, captions, 0)
    return {records.key(index): records.captions(index)[0] for index in range(len(records))}
