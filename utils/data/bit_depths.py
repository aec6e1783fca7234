"""Images with more or less than 8 bits per channel: how their values map to brightness.

The mapping depends on the file format, the bit depth and the sample type (unsigned, signed or float).
"""

import contextlib
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImagePalette, TiffImagePlugin

from utils.data.colours import strips
from utils.data.oddities import CLIPPED, DARK

BITS_PER_SAMPLE, PHOTOMETRIC, CHANNELS, PLANAR, COLOR_MAP, SAMPLE_FORMAT = 258, 262, 277, 284, 320, 339  # TIFF tags
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
KINDS = {1: "unsigned", 2: "signed", 3: "float"}  # by value of the tag SampleFormat
FLOAT_SCALES = (1, 255, 65535)
INTEGER_SCALES = (255, 65535)
OVERSHOOT = 1.125  # times white: resampling filters may exceed white by that much
DARKEST = 1 / 16  # times a guessed white: an image with a lower maximum would be nearly black
PNG_DEPTH = 24  # offset of the bit depth in a PNG file


class Samples(NamedTuple):
    """How a file stores grey values of more than 8 bits.

    Attributes:
        bits: bits per value.
        kind: unsigned, signed or float.
        is_inverted: whether 0 is white.
    """

    bits: int
    kind: str
    is_inverted: bool = False


USUAL = Samples(16, "unsigned")
FLOAT = Samples(32, "float")


def note_samples(image: Image.Image, head: bytes) -> None:
    """Adds to the `info` of an opened image what PIL does not report about its values.

    `samples`: how a TIFF stores grey of more than 8 bits. `clear`: the transparent grey or colour of a 16-bit PNG. The
    `transparency` of other PNGs is scaled to 8 bits, like the pixels. `uncommon`: set if any of these differs from
    PIL's own interpretation.

    Args:
        head: first bytes of the file.

    Raises:
        OSError: if PIL would read wrong values.
    """
    if image.format == "TIFF":
        _note_tiff(image)
    elif image.format == "PNG" and isinstance(image.info.get("transparency"), int | tuple) and image.mode != "P":
        _note_clear_colour(image, head[PNG_DEPTH])
    if image.mode == "F" or image.info.get("samples", USUAL) != USUAL:
        image.info["uncommon"] = True


def _note_tiff(image: Image.Image) -> None:
    """Does the part of `note_samples` for a TIFF."""
    bits = image.tag_v2.get(BITS_PER_SAMPLE, (1,))
    kind = KINDS.get(image.tag_v2.get(SAMPLE_FORMAT, (1,))[0], "unsigned")
    if kind == "signed" and bits[0] == 8:
        raise OSError("TIFFs with signed 8-bit numbers are not read; save the image with unsigned numbers")
    if image.tag_v2.get(PLANAR) == 2 and len(bits) > 1 and bits[0] > 8:
        raise OSError(
            "planar TIFFs with over 8 bits per channel are not read; save the image with interleaved channels"
        )
    colours = image.tag_v2.get(COLOR_MAP, ())
    # libtiff recognizes 8-bit palettes by the same rule
    if image.mode in ("P", "PA") and max(colours, default=0) in range(1, 256):
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))
        image.info["small palette"] = True
    if is_deep_grey(image):
        image.info["samples"] = Samples(bits[0], kind, image.tag_v2.get(PHOTOMETRIC) == 0)


def unread_tiff(file: BinaryIO) -> str:
    """Returns why PIL cannot open a TIFF (its channels and bit depth), and how to convert it."""
    cure = "is not read; save it as PNG, or with 8 bits per channel"
    with contextlib.suppress(SyntaxError, ValueError, LookupError, TypeError, OSError, struct.error):
        file.seek(2)
        is_big = b"+" in file.read(2)
        file.seek(0)
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if is_big else 8))
        file.seek(tags.next)
        tags.load(file)
        bits, kind = tags[BITS_PER_SAMPLE], KINDS.get(tags.get(SAMPLE_FORMAT, (1,))[0], "unsigned")
        named = {1: "1 channel"}.get(tags.get(CHANNELS, 1), f"{tags.get(CHANNELS, 1)} channels")
        return f"a TIFF with {named} of {'/'.join(map(str, sorted(set(bits))))} bits ({kind}) {cure}"
    return f"a TIFF of this kind {cure}"


def _note_clear_colour(image: Image.Image, depth: int) -> None:
    """Scales the transparent colour of a PNG, using only as many bits as its pixels have."""
    clear, top = image.info["transparency"], (1 << depth) - 1
    numbers = [number & top for number in (clear if isinstance(clear, tuple) else (clear,))]
    if depth == 16:
        del image.info["transparency"]
        image.info["clear"] = tuple(numbers)
    elif image.mode != "1":  # for mode 1, PIL has already scaled it to 8 bits
        numbers = [number * 255 // top for number in numbers]
        image.info["transparency"] = tuple(numbers) if isinstance(clear, tuple) else numbers[0]
    if image.info.get("transparency") != clear:
        image.info["uncommon"] = True


def is_deep_grey(image: Image.Image) -> bool:
    """Returns whether an image is grey with more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


@np.errstate(invalid="ignore")
def deep_grey(image: Image.Image) -> np.ndarray | None:
    """Returns grey of more than 8 bits as [H, W] float32 from 0 to 255; None for other images.

    White is the maximum of the bit depth for unsigned integers of up to 16 bits. For other integers it is the first of
    255, 65535 and the maximum of the bit depth that no value exceeds; for floating point, the first of 1, 255 and
    65535. It is also 1 if most floating-point values are at most 1 and only some, such as highlights, exceed it. A
    doubtful choice is recorded in `info["guessed"]`, as names of oddities.

    Raises:
        ValueError: if the values match none of these ranges.
    """
    if not is_deep_grey(image):
        return None
    samples = image.info.get("samples") or (FLOAT if image.mode == "F" else USUAL)
    values = np.asarray(image)
    if samples.bits == 32 and samples.kind == "unsigned":
        if "halved" in image.info:  # PIL has averaged the values as signed numbers
            raise ValueError(
                "images of over 89 megapixels with unsigned 32-bit numbers are not read; save the image in 16 bits"
            )
        values = values.view(np.uint32)

    # find the value of white, then scale strip by strip: float64 for the whole image would take gigabytes
    full, image.info["guessed"] = _float_white(values) if samples.kind == "float" else (_white(values, samples), ())
    scale = 255 / full if samples.kind == "float" else np.float64(255 / full)
    found = np.empty(values.shape, np.float32)
    for strip in strips(values.shape):
        part = values[strip]
        part = np.nan_to_num(part, posinf=full, neginf=0) if samples.kind == "float" else part
        found[strip] = (part * scale).clip(0, 255)
        if samples.is_inverted:
            found[strip] = 255 - found[strip]
    return found


def _white(values: np.ndarray, samples: Samples) -> int:
    """Returns the integer that is white.

    Raises:
        ValueError: if the values match no known range.
    """
    bits, kind, _ = samples
    if kind == "unsigned" and bits <= 16:
        return (1 << bits) - 1
    lowest, highest = values.min(), values.max()
    top = (1 << (bits - 1 if kind == "signed" else bits)) - 1
    scales = [*(scale for scale in INTEGER_SCALES if scale < top), top]
    white = next((scale for scale in scales if highest <= scale), None)
    if white is None or not _is_range(lowest, highest, white):
        raise _unknown_white(samples, lowest, highest)
    return white


def _float_white(values: np.ndarray) -> tuple[int, tuple[str, ...]]:
    """Returns (the floating-point value of white, oddities that make it doubtful).

    Raises:
        ValueError: as `_white`, or if no value is finite.
    """
    known = np.isfinite(values)
    if not known.any():
        raise ValueError("it holds no finite number")
    lowest, highest = values.min(where=known, initial=np.inf), values.max(where=known, initial=-np.inf)
    sample = values.reshape(-1)[:: 1 + (values.size >> 20)]  # every value would take gigabytes
    seen = sample[sample >= DARKEST]  # values that are not nearly black if white is 1
    is_fractional = bool((sample[np.isfinite(sample)] % 1).any())
    if highest > OVERSHOOT and lowest >= 1 - OVERSHOOT and is_fractional and _is_mostly(seen <= OVERSHOOT):
        return 1, (CLIPPED,)
    white = next((scale for scale in FLOAT_SCALES if highest <= scale * OVERSHOOT), None)
    if white is None or not _is_range(lowest, highest, white):
        raise _unknown_white(FLOAT, lowest, highest)
    is_dark = white > 1 and is_fractional and _is_mostly(seen < white * DARKEST)
    return white, (DARK,) if is_dark else ()


def _is_mostly(holds: np.ndarray) -> bool:
    """Returns whether at least half of the values are true; False for none."""
    return bool(2 * np.count_nonzero(holds) >= len(holds) > 0)


def _is_range(lowest: float, highest: float, white: int) -> bool:
    """Returns whether values from `lowest` to `highest` are plausible for this white: few negative, not all dark."""
    darkest = 0 if white == 1 else white * DARKEST
    is_black = highest == 0 == lowest
    return bool(lowest >= -white * (OVERSHOOT - 1) and (is_black or (highest > 0 and highest >= darkest)))


def _unknown_white(samples: Samples, lowest: float, highest: float) -> ValueError:
    """Returns the error for values that match no known range."""
    return ValueError(
        f"can't tell which value is white ({samples.kind}, {samples.bits} bits, from {lowest:.6g} to {highest:.6g}); "
        "save it as unsigned 8-bit or 16-bit integers, or as floating-point numbers from 0 to 1"
    )


def clear_grey(image: Image.Image) -> np.ndarray | None:
    """Returns the alpha channel [H, W] uint8 of 16-bit grey with one transparent value; None if it has none."""
    clear = image.info.get("clear")
    return None if clear is None else np.where(np.asarray(image) == clear[0], 0, 255).astype(np.uint8)


def clear_colour(high: Image.Image, low: Image.Image, clear: Sequence[int]) -> Image.Image:
    """Returns the alpha channel (mode L) of a 16-bit colour image with one transparent colour.

    Args:
        high, low: images of the high and the low bytes.
        clear: the transparent colour, 16 bits per channel.
    """
    alpha = np.full(high.size[::-1], 255, np.uint8)
    pair = np.array([number >> 8 for number in clear]), np.array([number & 255 for number in clear])
    for strip in strips(alpha.shape):
        is_clear = (np.asarray(high)[strip] == pair[0]).all(2) & (np.asarray(low)[strip] == pair[1]).all(2)
        alpha[strip][is_clear] = 0
    return Image.fromarray(alpha)


OTHER_HALF = {f"{bands};16{one}": f"{bands};16{other}" for bands in ("RGB", "RGBA") for one, other in ("BL", "LB")}
OTHER_HALF |= {f"{bands};16N": f"{bands};16{'B' if sys.byteorder == 'little' else 'L'}" for bands in ("RGB", "RGBA")}
"""PIL's raw modes of 16-bit colour, of which it keeps the high byte, and the raw modes that keep the low byte."""


def has_two_halves(opened: Image.Image) -> bool:
    """Returns whether an opened image has 16-bit colours."""
    modes = {tile.args if isinstance(tile.args, str) else (tile.args or [""])[0] for tile in opened.tile}
    return bool(modes) and modes <= OTHER_HALF.keys()


def take_other_half(opened: Image.Image) -> None:
    """Makes the decoder of a 16-bit colour image read the low bytes instead of the high ones."""
    opened.tile = [_renamed(tile, OTHER_HALF) for tile in opened.tile]


def _renamed(tile: Any, modes: Mapping[str, str]) -> Any:
    """Returns a PIL tile with its raw mode replaced."""
    args = tile.args
    return tile._replace(args=modes[args] if isinstance(args, str) else (modes[args[0]], *args[1:]))
