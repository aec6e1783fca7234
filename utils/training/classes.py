"""The image classes of a run, in the order of their numbers."""

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
    """The image classes.

    Attributes:
        names: class names in the order of their numbers; empty without classes.
        counts: number of images by class.
    """

    names: list[str]
    counts: Mapping[str, int]

    def describe(self) -> str:
        """Returns the number of images of each class as text."""
        return describe_counts(self.names, self.counts) if self.names else "no classes"


def find_classes(options: TrainingOptions, session: Session, data: TrainingData) -> Classes:
    """Finds the image classes; a resumed run keeps the checkpoint's order.

    Raises:
        UserError: if --class_conditional is given and there are fewer than two classes.
    """
    counts = count_classes(data.images.records) if options.captions.class_conditional else Counter()
    return Classes(session.resumption.class_order(_class_names(options, data.images, counts)), counts)


def _class_names(options: TrainingOptions, images: PlannedImages, counts: Mapping[str, int]) -> list[str]:
    """Returns the class names in the order of their numbers; empty without --class_conditional.

    Args:
        counts: number of images by class.

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
            f"--class_conditional needs at least two classes, got {found}{taken}; put the images of each class into "
            "its own folder, or give --label_column"
        )
    warn_of_twins(names)
    return names
