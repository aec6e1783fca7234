"""Unusual properties of images, and those for which earlier releases decoded different pixels."""

from collections.abc import Collection
from functools import lru_cache

import numpy as np

CONVERTED = "colours converted to sRGB"
UNCOMMON = "uncommon bit depth"
TURNED_ANEW = "turned by XMP or EXIF that earlier releases did not read"
CLIPPED = "floating-point numbers beyond 1, taken for white"
DARK = "floating-point numbers that are dark if 255 or 65535 is white"
SMALL_PALETTE = "palette in 16 bits of numbers that have 8"
ODDITIES = (
    "CMYK",
    "palette",
    "grey",
    "16-bit or more",
    "transparent",
    "turned by EXIF",
    "animated, first frame taken",
    "other mode",
    "non-ASCII name",
    "under 64 pixels",
    CONVERTED,
    "unusable colour profile, ignored",
    "over 89 megapixels, read in half the size",
    UNCOMMON,
    "marked as linear light (QOI), read as sRGB",
    TURNED_ANEW,
    CLIPPED,
    DARK,
    SMALL_PALETTE,
)
CHANGED_BY = {  # by decoding version: the oddities whose images it decodes to different pixels
    1: (CONVERTED,),
    2: (UNCOMMON,),
    3: (TURNED_ANEW, CLIPPED, SMALL_PALETTE),
}
DECODING = max(CHANGED_BY)
"""The decoding version. Add a line above, which raises it, when images of some kind decode to different pixels."""
DOUBTFUL = (CLIPPED, DARK)  # where the value of white is a guess
IN_KEYS = {CONVERTED: b"in sRGB", UNCOMMON: b"by bit depth"}


def bits_of(names: Collection[str]) -> int:
    """Returns the bit mask of some of the `ODDITIES`."""
    return sum(1 << bit for bit, name in enumerate(ODDITIES) if name in names)


@lru_cache
def names_in(bits: int) -> tuple[str, ...]:
    """Returns the oddities in a bit mask."""
    return tuple(name for bit, name in enumerate(ODDITIES) if bits >> bit & 1)


def how_read(names: Collection[str]) -> bytes:
    """Returns the part of an image's cache key that changes when a new release decodes its pixels differently.

    Args:
        names: the image's oddities; for a mask without `CONVERTED`, as masks have no colours to convert.

    Returns:
        b"" for most images.
    """
    changed = [name for kinds in CHANGED_BY.values() for name in kinds if name in names]
    return b"".join(IN_KEYS.get(name, name.encode()) for name in changed)


def changed_since(bits: np.ndarray, version: int) -> np.ndarray:
    """Returns [N] bool: which images decode to different pixels than with an earlier version.

    Args:
        bits: [N] bit masks of `ODDITIES`.
        version: the earlier decoding version.
    """
    kinds = bits_of([name for number, names in CHANGED_BY.items() if number > version for name in names])
    return bits & kinds != 0
