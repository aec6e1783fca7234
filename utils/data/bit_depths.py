"""Pixels of other than 8 bits: what their numbers stand for, by the format, the bit depth and the kind of number."""

import contextlib
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImagePalette, TiffImagePlugin

from utils.data.colours import strips
from utils.data.oddities import CLIPPED, DARK

BITS_PER_SAMPLE, PHOTOMETRIC, CHANNELS, PLANAR, COLOR_MAP, SAMPLE_FORMAT = 258, 262, 277, 284, 320, 339  # of TIFF
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
KINDS = {1: "unsigned", 2: "signed", 3: "float"}  # by its SampleFormat
FLOAT_SCALES = (1, 255, 65535)
INTEGER_SCALES = (255, 65535)
OVERSHOOT = 1.125  # of white, to which resampling filters go beyond it
DARKEST = 1 / 16  # of a white that is only guessed, under which a picture would be black
PNG_DEPTH = 24  # where its first bytes say the bit depth


class Samples(NamedTuple):
    """How a file of deep grey stores it.

    Attributes:
        bits: of a number.
        kind: unsigned, signed or float.
        is_inverted: whether 0 is white.
    """

    bits: int
    kind: str
    is_inverted: bool = False


USUAL = Samples(16, "unsigned")
FLOAT = Samples(32, "float")


def note_samples(image: Image.Image, head: bytes) -> None:
    """Notes in the `info` of an opened image what PIL does not tell of its numbers.

    `samples` of deep grey in a TIFF; `clear`, the transparent grey or colour in 16 bits of a PNG, whose `transparency`
    otherwise is brought to 8 bits, as its pixels are; `uncommon` where any of that differs from what PIL makes of it.

    Args:
        head: the file's first bytes.

    Raises:
        OSError: if PIL would read other values than the file holds.
    """
    if image.format == "TIFF":
        _note_tiff(image)
    elif image.format == "PNG" and isinstance(image.info.get("transparency"), int | tuple) and image.mode != "P":
        _note_clear_colour(image, head[PNG_DEPTH])
    if image.mode == "F" or image.info.get("samples", USUAL) != USUAL:
        image.info["uncommon"] = True


def _note_tiff(image: Image.Image) -> None:
    bits = image.tag_v2.get(BITS_PER_SAMPLE, (1,))
    kind = KINDS.get(image.tag_v2.get(SAMPLE_FORMAT, (1,))[0], "unsigned")
    if kind == "signed" and bits[0] == 8:
        raise OSError("TIFFs of signed 8-bit numbers are not read; save it with unsigned ones")
    if image.tag_v2.get(PLANAR) == 2 and len(bits) > 1 and bits[0] > 8:
        raise OSError("TIFFs of more than 8 bits whose channels lie apart (planar) are not read; save it interleaved")
    colours = image.tag_v2.get(COLOR_MAP, ())
    if image.mode in ("P", "PA") and max(colours, default=0) in range(1, 256):  # as libtiff tells 8 bits from 16
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))
        image.info["small palette"] = True
    if is_deep_grey(image):
        image.info["samples"] = Samples(bits[0], kind, image.tag_v2.get(PHOTOMETRIC) == 0)


def unread_tiff(file: BinaryIO) -> str:
    """Why PIL does not open a TIFF: what its pixels are, with the cure."""
    cure = "is not read; save it as PNG, or with 8 bits for each channel"
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
    """Of a PNG's colour that is transparent only as many bits count as its pixels have."""
    clear, top = image.info["transparency"], (1 << depth) - 1
    numbers = [number & top for number in (clear if isinstance(clear, tuple) else (clear,))]
    if depth == 16:
        del image.info["transparency"]
        image.info["clear"] = tuple(numbers)
    elif image.mode != "1":  # of which PIL has brought it to 8 bits
        numbers = [number * 255 // top for number in numbers]
        image.info["transparency"] = tuple(numbers) if isinstance(clear, tuple) else numbers[0]
    if image.info.get("transparency") != clear:
        image.info["uncommon"] = True


def is_deep_grey(image: Image.Image) -> bool:
    """Whether an image is grey of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


@np.errstate(invalid="ignore")
def deep_grey(image: Image.Image) -> np.ndarray | None:
    """[H, W] float32 from 0 to 255 of grey in more than 8 bits; None of other images.

    Unsigned integers of up to 16 bits end at the largest number of their bits. Others end at 255, 65535 or the largest
    of their bits, floating-point numbers at 1, 255 or 65535: the first that none goes beyond. Floating-point numbers
    that mostly end at 1 do so too where some, as highlights, go beyond it. What is doubtful about their white is
    noted as `guessed` in the image's `info`, by the names of oddities.

    Raises:
        ValueError: if they are of no such range, so that a wrong picture would come out.
    """
    if not is_deep_grey(image):
        return None
    samples = image.info.get("samples") or (FLOAT if image.mode == "F" else USUAL)
    values = np.asarray(image)
    if samples.bits == 32 and samples.kind == "unsigned":
        if "halved" in image.info:  # of numbers that PIL takes for signed ones
            raise ValueError("unsigned 32-bit numbers of over 89 megapixels are not read; save it in 16 bits")
        values = values.view(np.uint32)
    full, image.info["guessed"] = _float_white(values) if samples.kind == "float" else (_white(values, samples), ())
    scale = 255 / full if samples.kind == "float" else np.float64(255 / full)
    found = np.empty(values.shape, np.float32)
    for strip in strips(values.shape):  # float64 of all of it would take gigabytes
        part = values[strip]
        part = np.nan_to_num(part, posinf=full, neginf=0) if samples.kind == "float" else part
        found[strip] = (part * scale).clip(0, 255)
        if samples.is_inverted:
            found[strip] = 255 - found[strip]
    return found


def _white(values: np.ndarray, samples: Samples) -> int:
    """The integer that stands for white.

    Raises:
        ValueError: if that can't be told.
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
    """(the floating-point number that stands for white, the oddities that make it doubtful).

    Raises:
        ValueError: as `_white`.
    """
    known = np.isfinite(values)
    if not known.any():
        raise ValueError("it holds no finite number")
    lowest, highest = values.min(where=known, initial=np.inf), values.max(where=known, initial=-np.inf)
    sample = values.reshape(-1)[:: 1 + (values.size >> 20)]  # a copy of all would take gigabytes
    seen = sample[sample >= DARKEST]  # what would not be nearly black if 1 were white
    is_fractional = bool((sample[np.isfinite(sample)] % 1).any())
    if highest > OVERSHOOT and lowest >= 1 - OVERSHOOT and is_fractional and _is_mostly(seen <= OVERSHOOT):
        return 1, (CLIPPED,)
    white = next((scale for scale in FLOAT_SCALES if highest <= scale * OVERSHOOT), None)
    if white is None or not _is_range(lowest, highest, white):
        raise _unknown_white(FLOAT, lowest, highest)
    is_dark = white > 1 and is_fractional and _is_mostly(seen < white * DARKEST)
    return white, (DARK,) if is_dark else ()


def _is_mostly(holds: np.ndarray) -> bool:
    """Whether something holds for at least half of what there is."""
    return bool(2 * np.count_nonzero(holds) >= len(holds) > 0)


def _is_range(lowest: float, highest: float, white: int) -> bool:
    """Whether numbers from the lowest to the highest make a picture if this one is white."""
    darkest = 0 if white == 1 else white * DARKEST
    is_black = highest == 0 == lowest
    return bool(lowest >= -white * (OVERSHOOT - 1) and (is_black or (highest > 0 and highest >= darkest)))


def _unknown_white(samples: Samples, lowest: float, highest: float) -> ValueError:
    return ValueError(
        f"which of its numbers is white can't be told ({samples.kind}, {samples.bits} bits, from {lowest:.6g} to "
        f"{highest:.6g}); save it in 8 or 16 bits without a sign, or as floating-point numbers from 0 to 1"
    )


def clear_grey(image: Image.Image) -> np.ndarray | None:
    """[H, W] uint8 the alpha channel of 16-bit grey of which one value is transparent; None without one."""
    clear = image.info.get("clear")
    return None if clear is None else np.where(np.asarray(image) == clear[0], 0, 255).astype(np.uint8)


def clear_colour(high: Image.Image, low: Image.Image, clear: Sequence[int]) -> Image.Image:
    """The alpha channel of 16-bit colours of which one is transparent.

    Args:
        high, low: images of the higher and the lower bytes.
        clear: the transparent one, in 16 bits.
    """
    alpha = np.full(high.size[::-1], 255, np.uint8)
    pair = np.array([number >> 8 for number in clear]), np.array([number & 255 for number in clear])
    for strip in strips(alpha.shape):
        is_clear = (np.asarray(high)[strip] == pair[0]).all(2) & (np.asarray(low)[strip] == pair[1]).all(2)
        alpha[strip][is_clear] = 0
    return Image.fromarray(alpha)


OTHER_HALF = {f"{bands};16{one}": f"{bands};16{other}" for bands in ("RGB", "RGBA") for one, other in ("BL", "LB")}
OTHER_HALF |= {f"{bands};16N": f"{bands};16{'B' if sys.byteorder == 'little' else 'L'}" for bands in ("RGB", "RGBA")}
"""What PIL calls 16-bit colours, of which it keeps the higher byte, and the name under which it keeps the lower one."""


def has_two_halves(opened: Image.Image) -> bool:
    """Whether an opened image has 16-bit colours."""
    modes = {tile.args if isinstance(tile.args, str) else (tile.args or [""])[0] for tile in opened.tile}
    return bool(modes) and modes <= OTHER_HALF.keys()


def take_other_half(opened: Image.Image) -> None:
    """Tells the decoder of 16-bit colours to take the lower bytes."""
    opened.tile = [_renamed(tile, OTHER_HALF) for tile in opened.tile]


def _renamed(tile: Any, modes: Mapping[str, str]) -> Any:
    """A part of a file, its decoder told by another name what pixels it holds."""
    args = tile.args
    return tile._replace(args=modes[args] if isinstance(args, str) else (modes[args[0]], *args[1:]))
