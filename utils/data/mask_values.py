"""Inspects mask values before training: black masks and masks of class numbers would teach the model nothing."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import ImageChops

from utils.config.batch import MaskFile
from utils.config.options import UserError
from utils.data.images import read_layers, read_mask_layers
from utils.data.masks import have_same_bytes

NEARLY_BLACK = 1 / 16  # of white; class numbers such as 0 and 1 stay below it
DIM = 1 / 2
COLOURED = 1 / 8  # difference between channels; JPEG artefacts in grey stay below it
MANY_LEVELS = 4  # masks with at least so many grey levels in flat areas may hold class numbers
NUM_NAMED = 3
MASKS_LOOKED_AT = 200  # per source before training; for a stream, the first ones that each process reads
WHITE_COUNTS = "only white (255, or 65535 in 16 bits) counts fully"


class MaskValues(NamedTuple):
    """What was measured in one mask.

    Attributes:
        darkest, brightest: its range, from 0 (black) to 1 (white).
        is_clear: whether it is transparent everywhere.
        is_coloured: whether it has colours other than grey.
        is_labelled: whether most of its pixels that are not black are nearly black, as class numbers are.
        levels: the grey levels of its flat areas, if flat areas rather than gradients make up most of its grey pixels.
        is_copy: whether its bytes are those of its image.
    """

    darkest: float
    brightest: float
    is_clear: bool = False
    is_coloured: bool = False
    is_labelled: bool = False
    levels: frozenset[int] = frozenset()
    is_copy: bool = False


def mask_values(image: str | bytes, mask: MaskFile) -> MaskValues:
    """Decodes an image's mask and returns what it holds.

    Args:
        image: path or bytes of the image; b"" to skip the comparison with a mask from a file.

    Raises:
        OSError, ValueError: if the mask can't be read.
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
    """Returns `MaskValues.levels` of a mask [H, W] uint8."""
    inner, right, below = mask[:-1, :-1], mask[:-1, 1:], mask[1:, :-1]
    is_flat = (inner == right) & (inner == below)
    counts, flat = np.bincount(inner.reshape(-1), minlength=256), np.bincount(inner[is_flat], minlength=256)
    grey = slice(1, 255)  # neither black nor white
    if 2 * flat[grey].sum() < counts[grey].sum():
        return frozenset()
    steps = np.maximum(inner, right) - np.minimum(inner, right)
    is_slope = 2 * np.count_nonzero(steps == 1) > np.count_nonzero(steps)  # gradients so wide that 8 bits flatten them
    is_level = (2 * flat >= counts) & (flat > 0)
    return frozenset() if is_slope else frozenset(number for number in range(1, 255) if is_level[number])


@dataclass
class MaskCensus:
    """Counts of what was found in the masks of one source.

    Attributes:
        where: the flag that names the masks, with its value.
        num_masks: number of masks; None for a stream.
        looked_at: number of masks that were decoded.
        brightest: brightest value in all decoded masks, from 0 (black) to 1 (white).
        black, clear, coloured, white: number of masks that are black, transparent, coloured or white; `coloured` means
            in any part, the others everywhere.
        labelled: number of masks that look like class numbers.
        graded: number of masks with flat areas of grey.
        copies: number of masks whose bytes are those of their image.
        levels: grey levels of the flat areas of all masks.
        named: the first image names of some of these kinds.
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
        """Adds the mask of the image called `name`."""
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
        """Whether the masks would remove almost all of the loss."""
        return self.brightest < NEARLY_BLACK

    def check(self) -> None:
        """Refuses masks that would remove almost all of the loss.

        Raises:
            UserError: saying what is wrong with the masks, with the cure.
        """
        if fault := self._fault_of_all():
            raise UserError(fault)

    def all_warnings(self) -> list[str]:
        """Returns the fault that `check` would raise, or else `warnings`: for a run that has already started."""
        fault = self._fault_of_all()
        return [fault] if fault else self.warnings()

    def _fault_of_all(self) -> str:
        """Returns why the masks would remove almost all of the loss; "" if they do not."""
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
        return f"are black everywhere ({names}), so the loss would count nowhere; make the parts to learn white"

    def warnings(self) -> list[str]:
        """Returns one line for each finding that is allowed but may be a mistake."""
        found = []
        if self.black:
            found.append(
                f"{self._some(self.black)} are black everywhere, so their images add nothing to the loss, such as "
                f"{self._names('black')}"
            )
        if NEARLY_BLACK <= self.brightest < DIM:
            found.append(f"{self._of_all} are at most {self.brightest:.2g} of white; {WHITE_COUNTS}")
        if self.labelled:
            found.append(
                f"{self._some(self.labelled)} hold mostly values near black, which look like class numbers, such as "
                f"{self._names('labelled')}; {WHITE_COUNTS}"
            )
        if len(self.levels) >= MANY_LEVELS:
            shown = ", ".join(map(str, sorted(self.levels)[:MANY_LEVELS]))
            found.append(
                f"{self._some(self.graded)} have flat areas in {len(self.levels)} grey levels ({shown}, ...), which "
                f"look like class numbers, such as {self._names('graded')}; each counts by its brightness: make the "
                "parts to learn white, unless you mean to weight them"
            )
        if self.copies:
            found.append(
                f"{self._some(self.copies)} are copies of their images, so the image's brightness is the mask, such as "
                f"{self._names('copies')}; replace them with masks"
            )
        if self.coloured:
            found.append(
                f"{self._some(self.coloured)} have colours, which are converted to brightness, such as "
                f"{self._names('coloured')}; {WHITE_COUNTS}"
            )
        if self.looked_at and self.white == self.looked_at:
            found.append(f"{self._of_all} are white everywhere and change nothing")
        return [f"{self.where}: {line}" for line in found]

    @property
    def _of_all(self) -> str:
        if self.num_masks is None or self.looked_at < self.num_masks:
            return f"all {self.looked_at:,} inspected masks"
        return f"all {self.looked_at:,} masks"

    def _some(self, count: int) -> str:
        return f"{count:,} of {self._of_all.removeprefix('all ')}"

    def _names(self, kind: str) -> str:
        return ", ".join(self.named[kind])
