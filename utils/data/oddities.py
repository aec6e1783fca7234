"""What is out of the ordinary in images, and which of it earlier releases decoded into other pixels."""

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
CHANGED_BY = {  # by version of the decoding: whose pixels it made others
    1: (CONVERTED,),
    2: (UNCOMMON,),
    3: (TURNED_ANEW, CLIPPED, SMALL_PALETTE),
}
DECODING = max(CHANGED_BY)
"""The version of how pixels are decoded. Raise it with a line above when images of some kind get other pixels."""
DOUBTFUL = (CLIPPED, DARK)  # of which it was guessed which number is white
IN_KEYS = {CONVERTED: b"in sRGB", UNCOMMON: b"by bit depth"}


def bits_of(names: Collection[str]) -> int:
    """A bit mask of `ODDITIES`, of some of them."""
    return sum(1 << bit for bit, name in enumerate(ODDITIES) if name in names)


@lru_cache
def names_in(bits: int) -> tuple[str, ...]:
    """The oddities of a bit mask."""
    return tuple(name for bit, name in enumerate(ODDITIES) if bits >> bit & 1)


def how_read(names: Collection[str]) -> bytes:
    """What goes into the key of what is remembered of an image's pixels, for it to be made anew where they changed.

    b"" of most images; a mask has no colours to convert, and is asked without `CONVERTED`.
    """
    changed = [name for kinds in CHANGED_BY.values() for name in kinds if name in names]
    return b"".join(IN_KEYS.get(name, name.encode()) for name in changed)


def changed_since(bits: np.ndarray, version: int) -> np.ndarray:
    """[N] bool, which images are decoded into other pixels than by an earlier version.

    Args:
        bits: [N] bit masks of `ODDITIES`.
    """
    kinds = bits_of([name for number, names in CHANGED_BY.items() if number > version for name in names])
    return bits & kinds != 0
