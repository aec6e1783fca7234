"""What is in masks: found before the training, since masks that are black or hold labels would teach nothing."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import ImageChops

from utils.config.batch import MaskFile
from utils.config.options import UserError
from utils.data.images import read_layers, read_mask_layers
from utils.data.masks import have_same_bytes

NEARLY_BLACK = 1 / 16  # of white; labels such as 0 and 1 stay below it
DIM = 1 / 2
COLOURED = 1 / 8  # difference between channels, more than JPEG makes of grey
MANY_LEVELS = 4  # greys of flat areas, from which on they may be numbers of classes
NUM_NAMED = 3
MASKS_LOOKED_AT = 200  # of a source before the training, or of a stream in each process, as they come
WHITE_COUNTS = "only white (255, or 65535 in 16 bits) counts fully"


class MaskValues(NamedTuple):
    """The range of one mask.

    Attributes:
        darkest, brightest: from 0, black, to 1, white.
        is_clear: whether it is transparent everywhere.
        is_coloured: whether it has other colours than grey.
        is_labelled: whether most of what is not black in it is nearly so, as the numbers of classes are.
        levels: the greys of its flat areas, if these and no slopes make up most of what is grey in it.
        is_copy: whether it has the bytes of its image.
    """

    darkest: float
    brightest: float
    is_clear: bool = False
    is_coloured: bool = False
    is_labelled: bool = False
    levels: frozenset[int] = frozenset()
    is_copy: bool = False


def mask_values(image: str | bytes, mask: MaskFile) -> MaskValues:
    """The values of an image's mask, which is decoded for it.

    Args:
        image: its path or bytes; b"" where a mask in a file is not to be compared with it.

    Raises:
        OSError, ValueError: if it can't be read.
    """
    if mask.is_alpha:
        alpha = read_layers(image, "black")[1]
        darkest, brightest = (255, 255) if alpha is None else alpha.getextrema()
        return MaskValues(darkest / 255, brightest / 255, is_clear=brightest == 0)
    rgb, alpha, deepest = read_mask_layers(mask.source)
    grey = rgb.convert("L")
    darkest, brightest = grey.getextrema() if deepest is None else deepest
    counts = grey.histogram()
    is_labelled = deepest is None and 2 * sum(counts[1 : int(NEARLY_BLACK * 255) + 1]) > sum(counts[1:])
    red, green, blue = rgb.split()
    differences = (ImageChops.difference(*pair).getextrema()[1] for pair in ((red, green), (green, blue)))
    is_clear = alpha is not None and alpha.getextrema()[1] == 0
    is_coloured = max(differences) / 255 > COLOURED
    levels = frozenset() if is_coloured or is_labelled or deepest is not None else _levels(np.asarray(grey))
    is_copy = image != b"" and have_same_bytes(mask.source, image)
    return MaskValues(darkest / 255, brightest / 255, is_clear, is_coloured, is_labelled, levels, is_copy)


def _levels(mask: np.ndarray) -> frozenset[int]:
    """As of `MaskValues`, of a mask [H, W] uint8."""
    inner, right, below = mask[:-1, :-1], mask[:-1, 1:], mask[1:, :-1]
    is_flat = (inner == right) & (inner == below)
    counts, flat = np.bincount(inner.reshape(-1), minlength=256), np.bincount(inner[is_flat], minlength=256)
    grey = slice(1, 255)  # neither black nor white
    if 2 * flat[grey].sum() < counts[grey].sum():
        return frozenset()
    steps = np.maximum(inner, right) - np.minimum(inner, right)
    is_slope = 2 * np.count_nonzero(steps == 1) > np.count_nonzero(steps)  # so wide that it is flat in 8 bits
    is_level = (2 * flat >= counts) & (flat > 0)
    return frozenset() if is_slope else frozenset(number for number in range(1, 255) if is_level[number])


@dataclass
class MaskCensus:
    """What was found in the masks of one source.

    Attributes:
        where: the flag that gave them, with its value.
        num_masks: how many there are; None of a stream.
        brightest: of all that were looked at, from 0, black, to 1, white.
        black, clear, coloured, white: how many are black, transparent or white everywhere, or have colours.
        labelled: how many look like numbers of classes.
        graded: how many have flat areas of grey, of all of which these are the levels.
        copies: how many have the bytes of their image.
        named: the first names of some of these kinds.
    """

    where: str
    num_masks: int | None
    looked_at: int = 0
    brightest: float = 0.0
    black: int = 0
    clear: int = 0
    coloured: int = 0
    white: int = 0
    labelled: int = 0
    graded: int = 0
    copies: int = 0
    levels: set[int] = field(default_factory=set)
    named: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, values: MaskValues) -> None:
        """Adds one mask, that of the image of this name."""
        self.looked_at += 1
        self.brightest = max(self.brightest, values.brightest)
        self.clear += values.is_clear
        self.white += values.darkest == 1
        kinds = {"black": values.brightest == 0, "coloured": values.is_coloured, "labelled": values.is_labelled}
        kinds |= {"graded": bool(values.levels), "copies": values.is_copy}
        self.black += kinds["black"]
        self.coloured += kinds["coloured"]
        self.labelled += kinds["labelled"]
        self.graded += kinds["graded"]
        self.copies += kinds["copies"]
        self.levels |= values.levels
        for kind in (kind for kind, holds in kinds.items() if holds):
            names = self.named.setdefault(kind, [])
            names += [name] if len(names) < NUM_NAMED else []

    @property
    def is_nearly_black(self) -> bool:
        """Whether the loss would count almost nowhere."""
        return self.brightest < NEARLY_BLACK

    def check(self) -> None:
        """Refuses masks by which the loss would count almost nowhere.

        Raises:
            UserError: naming what they are, with the cure.
        """
        if fault := self._fault_of_all():
            raise UserError(fault)

    def all_warnings(self) -> list[str]:
        """What `check` refuses, or else what `warnings` says, where the run has begun."""
        fault = self._fault_of_all()
        return [fault] if fault else self.warnings()

    def _fault_of_all(self) -> str:
        """Why the loss would count almost nowhere; "" where it counts."""
        is_wrong = self.looked_at and self.is_nearly_black
        return f"{self.where}: {self._of_all} {self._fault()}" if is_wrong else ""

    def _fault(self) -> str:
        if self.brightest > 0:
            return (
                f"are nearly black: their brightest value is {self.brightest:.2g} of white, so the loss would count "
                "almost nowhere; multiply labels of 0 and 1 by 255, or by 65535 in 16 bits"
            )
        if self.clear == self.looked_at:
            return "are transparent everywhere, so the loss would count nowhere; save them with an opaque white part"
        names = self._names("black")
        return f"are black everywhere ({names}), so the loss would count nowhere; make white what is to be learnt"

    def warnings(self) -> list[str]:
        """What is allowed but may not be meant, a line each."""
        found = []
        if self.black:
            found.append(
                f"{self._some(self.black)} are black everywhere, so the loss counts nowhere in their images, such as "
                f"{self._names('black')}"
            )
        if NEARLY_BLACK <= self.brightest < DIM:
            found.append(f"{self._of_all} are at most {self.brightest:.2g} of white; {WHITE_COUNTS}")
        if self.labelled:
            found.append(
                f"{self._some(self.labelled)} hold mostly values near black, as numbers of classes are, such as "
                f"{self._names('labelled')}; {WHITE_COUNTS}"
            )
        if len(self.levels) >= MANY_LEVELS:
            shown = ", ".join(map(str, sorted(self.levels)[:MANY_LEVELS]))
            found.append(
                f"{self._some(self.graded)} have flat areas of together {len(self.levels)} greys ({shown}, ...), as "
                f"numbers of classes are, such as {self._names('graded')}; each counts by its brightness: make white "
                "what is to be learnt, unless grades are meant"
            )
        if self.copies:
            found.append(
                f"{self._some(self.copies)} are copies of their images, whose brightness is then their mask, such as "
                f"{self._names('copies')}; give masks in their place"
            )
        if self.coloured:
            found.append(
                f"{self._some(self.coloured)} have colours, which count by their brightness, such as "
                f"{self._names('coloured')}; {WHITE_COUNTS}"
            )
        if self.looked_at and self.white == self.looked_at:
            found.append(f"{self._of_all} are white everywhere and change nothing")
        return [f"{self.where}: {line}" for line in found]

    @property
    def _of_all(self) -> str:
        if self.num_masks is None or self.looked_at < self.num_masks:
            return f"all {self.looked_at:,} masks that were looked at"
        return f"all {self.looked_at:,} masks"

    def _some(self, count: int) -> str:
        return f"{count:,} of {self._of_all.removeprefix('all ')}"

    def _names(self, kind: str) -> str:
        return ", ".join(self.named[kind])
