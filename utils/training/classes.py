"""The classes of the images of a run, in the order of their numbers."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from utils.config.options import UserError
from utils.data.class_folders import describe_counts, same_text, warn_of_twins
from utils.data.class_labels import count_classes, in_order
from utils.data.folders import ALL_SPLIT_WORDS
from utils.data.plan import PlannedImages
from utils.training.data import TrainingData
from utils.training.options import TrainingOptions
from utils.training.session import Session


class Classes(NamedTuple):
    """The classes of the images.

    Attributes:
        names: in the order of their numbers; none without classes.
        counts: how many images have each.
    """

    names: list[str]
    counts: Mapping[str, int]

    def describe(self) -> str:
        """How many images each class has, in words."""
        return describe_counts(self.names, self.counts) if self.names else "no classes"


def find_classes(options: TrainingOptions, session: Session, data: TrainingData) -> Classes:
    """The classes of the images, in the order of the checkpoint's, where the run resumes.

    Raises:
        UserError: if classes are asked for and there are fewer than two.
    """
    counts = count_classes(data.images.records) if options.captions.class_conditional else Counter()
    return Classes(session.resumption.class_order(_class_names(options, data.images, counts)), counts)


def _class_names(options: TrainingOptions, images: PlannedImages, counts: Mapping[str, int]) -> list[str]:
    """The names of the classes, in the order of their numbers; none without classes.

    Args:
        counts: how many images have each.

    Raises:
        UserError: if there are fewer than two.
    """
    if not options.captions.class_conditional:
        return []
    orders = [tuple(map(same_text, source.table.classes)) for source in images.records.sources]
    names = in_order(list(counts), orders)
    if len(names) < 2:
        found = f"one, {names[0]}" if names else "none"
        split = images.records.key(0).split("/")[0] if len(images.records) else ""
        is_split = split.lower() in ALL_SPLIT_WORDS and options.source.caption_column is None
        taken = f", as the folder {split} is taken for a split" if is_split else ""
        raise UserError(
            f"--class_conditional needs at least two classes, got {found}{taken}; put images into a folder for each, "
            "or name a --label_column"
        )
    warn_of_twins(names)
    return names
