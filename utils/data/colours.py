"""Conversion to sRGB, by the ICC profile of an image or by the primaries and transfer function of a PNG, AVIF or HEIF.

Little CMS converts 8-bit colours (relative colorimetric, with black point compensation). Colours with more bits are
converted here, by the curves and the matrix of the profile.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE = 8 << 20  # bytes
SAME = 2  # of 255: largest difference at which a profile counts as sRGB, whose curves may be stored as tables
D50 = (0.9642, 1.0, 0.8249)
BT709 = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), (0.3127, 0.3290))
"""x and y of red, green, blue and white."""
PRIMARIES = {  # by code point of H.273; all others use the primaries of sRGB
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), (0.3127, 0.3290)),  # BT.2020
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),  # DCI-P3
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.3127, 0.3290)),  # Display P3
}
GAMMAS = {4: 2.2, 5: 2.8, 8: 1.0, 17: 2.6}  # by code point of H.273; all others use the curve of sRGB
HIGH_DYNAMIC_RANGE = (16, 18)  # PQ and HLG
USUAL_GAMMA = 1 / 2.2  # a gAMA chunk with this value means the curve of sRGB
UNSUPPORTED = b"unsupported"  # placeholder for a profile that can't be used
GREY_MODES = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N", "I", "F")
INPUT_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
"""PIL modes by colour space of a profile."""
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
Chromaticities = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Conversion:
    """The conversion of an ICC profile to sRGB.

    Attributes:
        profile: its bytes.
        mode: PIL mode of the colours that it applies to.
        transform: from this mode to sRGB.
        changes: whether the profile differs from sRGB.
    """

    profile: bytes
    mode: str
    transform: ImageCms.ImageCmsTransform
    changes: bool

    def fits(self, mode: str) -> bool:
        """Returns whether an image of this mode can have this profile."""
        if self.mode == "L":
            return mode in GREY_MODES
        return mode not in ("CMYK", "LAB") if self.mode == "RGB" else mode == self.mode


@lru_cache(maxsize=16)
def conversion(profile: bytes) -> Conversion | None:
    """Returns the conversion of a profile; None if the profile can't be used."""
    if len(profile) > MAX_PROFILE:
        return None
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = INPUT_MODES[opened.profile.xcolor_space.strip()]
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        if mode == "LAB":  # its optimized lookup table is off by 12 of 255
            flags |= ImageCms.Flags.NOOPTIMIZE
        srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.buildTransform(opened, srgb, mode, "RGB", intent, flags)
    except (OSError, KeyError, ValueError, TypeError, ImageCms.PyCMSError):
        return None

    # compare converted grey levels and an RGB grid with sRGB
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    if mode == "RGB":
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        ramp = Image.fromarray(np.concatenate([np.asarray(ramp.convert("RGB")), grid], axis=1))
    changes = True
    if mode in ("RGB", "L"):
        before, after = (np.asarray(each.convert("RGB")).astype(int) for each in (ramp, transform.apply(ramp)))
        changes = bool(np.abs(before - after).max() > SAME)
    return Conversion(profile, mode, transform, changes)


def conversion_of(image: Image.Image) -> Conversion | None:
    """Returns the conversion that an image needs; None if it is sRGB already or its profile can't be used."""
    profile = image.info.get("icc_profile")
    found = conversion(profile) if profile else None
    return found if found is not None and found.changes and found.fits(image.mode) else None


def strips(shape: tuple[int, ...]) -> Iterator[slice]:
    """Returns slices of the rows of an image [H, W, ...], each of about a million pixels."""
    height = max(1, (1 << 20) // shape[1])
    return (slice(begin, begin + height) for begin in range(0, shape[0], height))


def has_unusable_profile(image: Image.Image) -> bool:
    """Returns whether an image's profile is damaged, or is for another colour mode."""
    profile = image.info.get("icc_profile")
    found = conversion(profile) if profile else None
    return bool(profile) and (found is None or not found.fits(image.mode))


def to_srgb(image: Image.Image) -> Image.Image:
    """Returns an 8-bit image in sRGB: the same image if it needs no conversion, else one of mode L, LA, RGB or RGBA."""
    needed = conversion_of(image)
    if needed is None:
        return image
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    colours = image if image.mode == needed.mode else image.convert(needed.mode)
    if needed.mode == "L":
        found = colours.point(np.rint(_grey_table(needed)).astype(int).tolist())
    else:
        found = needed.transform.apply(colours)
    if alpha is not None:
        found.putalpha(alpha)
    found.info.pop("icc_profile", None)
    return found


@np.errstate(all="ignore")
def grey_to_srgb(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """Converts grey of more than 8 bits to sRGB.

    Args:
        values: [H, W] float32 from 0 to 255, the pixels of `image`.

    Returns:
        [H, W] from 0 to 255.
    """
    needed = conversion_of(image)
    if needed is None:
        return values
    tags = _tags(needed.profile)
    curve = tags.get(b"kTRC" if needed.mode == "L" else b"gTRC")
    if curve is None or _linear(curve, values[:1]) is None:
        curve, table = None, _grey_table(needed)
    found = np.empty_like(values)
    for strip in strips(values.shape):
        linear = None if curve is None else _linear(curve, values[strip] / 255)
        found[strip] = np.interp(values[strip], np.arange(256), table) if linear is None else _encoded(linear)
    return found


@np.errstate(all="ignore")
def deep_to_srgb(values: np.ndarray, image: Image.Image) -> np.ndarray | None:
    """Converts colours of more than 8 bits to sRGB.

    Args:
        values: [H, W, 3 or 4] float32 from 0 to 255, the pixels of `image`.

    Returns:
        Colours in the same shape; None if the profile does not consist of curves and a matrix, so that only Little CMS
        can convert it, in 8 bits.
    """
    needed = conversion_of(image)
    if needed is None:
        return values
    tags = _tags(needed.profile)
    curves = [tags.get(name, b"") for name in (b"rTRC", b"gTRC", b"bTRC")]
    columns = [tags.get(name, b"") for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
    can_be_read = [len(each) >= 20 for each in columns] + [_linear(each, np.zeros(1)) is not None for each in curves]
    if b"A2B0" in tags or not all(can_be_read):
        return None
    matrix = np.linalg.inv(_matrix(BT709)) @ np.array([_fixed(each[8:20]) for each in columns]).T
    found = values.copy()
    for strip in strips(values.shape):
        channels = [_linear(curve, values[strip][..., place] / 255) for place, curve in enumerate(curves)]
        found[strip][..., :3] = _encoded(np.stack(channels, axis=-1) @ matrix.T)
    return found


def _as_fixed(numbers) -> bytes:
    """Returns numbers in the 15.16-bit fixed-point format of ICC profiles."""
    return struct.pack(f">{len(numbers)}i", *(round(float(number) * 65536) for number in numbers))


def _matrix(primaries: Chromaticities) -> np.ndarray:
    """Returns the [3, 3] matrix from linear colours of these primaries to XYZ, adapted to a D50 white point."""
    xyz = np.array([[x / y, 1, (1 - x - y) / y] if y else [np.inf] * 3 for x, y in primaries])
    white = xyz[3]
    colours = xyz[:3].T
    colours = colours * np.linalg.solve(colours, white)
    ratio = (BRADFORD @ np.array(D50)) / (BRADFORD @ white)
    return np.linalg.inv(BRADFORD) @ np.diag(ratio) @ BRADFORD @ colours


def matrix_profile(primaries: Chromaticities, gamma: float | None) -> bytes:
    """Returns an ICC profile of these primaries and this transfer function.

    Args:
        primaries: x and y of red, green, blue and white.
        gamma: exponent of the transfer function; None for the curve of sRGB.

    Raises:
        ValueError: if the primaries or the gamma are not physically possible.
    """
    with np.errstate(all="ignore"):
        try:
            matrix = _matrix(primaries)
        except np.linalg.LinAlgError as error:
            raise ValueError("its primaries lie on a line") from error
    if not np.abs(matrix).max() < 10 or (gamma is not None and not 0.1 < gamma < 10):
        raise ValueError("its primaries or gamma are not physically possible")
    kind, numbers = (0, [gamma]) if gamma is not None else (3, [2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045])
    curve = b"para" + bytes(4) + struct.pack(">HH", kind, 0) + _as_fixed(numbers)
    points = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix.T, strict=True)) | {b"wtpt": D50}
    tags = {name: b"XYZ " + bytes(4) + _as_fixed(point) for name, point in points.items()}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    begin = 132 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, begin + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI", begin + len(body), b"", 0x04200000) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    return (head + _as_fixed(D50)).ljust(128, b"\0") + table + body


LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
ADOBE_RGB = matrix_profile(((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), (0.3127, 0.3290)), 563 / 256)


@lru_cache(maxsize=16)
def profile_of_code_points(primaries: int, transfer: int) -> bytes | None:
    """Returns the ICC profile for H.273 code points, as stored in PNG, AVIF and HEIF; None for sRGB and unknown ones.

    Returns `UNSUPPORTED` for transfer functions of high dynamic range.
    """
    if transfer in HIGH_DYNAMIC_RANGE:
        return UNSUPPORTED
    if primaries not in PRIMARIES and transfer not in GAMMAS:
        return None
    return matrix_profile(PRIMARIES.get(primaries, BT709), GAMMAS.get(transfer))


def profile_of_gamma(chromaticity: tuple[float, ...] | None, gamma: float | None) -> bytes | None:
    """Returns the ICC profile for the cHRM and gAMA chunks of a PNG; None for sRGB.

    Args:
        chromaticity: x and y of white, red, green and blue.
        gamma: encoding exponent; values within 5 % of 1/2.2 mean the curve of sRGB.
    """
    if gamma is not None and abs(gamma / USUAL_GAMMA - 1) < 0.05:
        gamma = None
    if chromaticity is None and gamma is None:
        return None
    primaries = BT709
    if chromaticity is not None:
        white, red, green, blue = zip(chromaticity[::2], chromaticity[1::2], strict=True)
        primaries = (red, green, blue, white)
    try:
        return matrix_profile(primaries, 1 / gamma if gamma else gamma)
    except ValueError:
        return UNSUPPORTED


def _encoded(linear: np.ndarray) -> np.ndarray:
    """Converts linear light from 0 to 1 to sRGB from 0 to 255."""
    linear = np.nan_to_num(linear).clip(0, 1)  # a damaged curve may yield NaN
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _grey_table(needed: Conversion) -> np.ndarray:
    """Returns [256] the sRGB grey, 0 to 255, of each grey level of a profile."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None]).convert(needed.mode)
    return np.asarray(needed.transform.apply(ramp).convert("RGB"))[0, :, 1].astype(np.float64)


def _tags(profile: bytes) -> dict[bytes, bytes]:
    """Returns the tags of a profile that Little CMS can open."""
    found = {}
    for number in range(min(int.from_bytes(profile[128:132], "big"), 100)):
        name, begin, size = struct.unpack_from(">4sII", profile, 132 + 12 * number)
        found[name] = profile[begin : begin + size]
    return found


def _linear(curve: bytes, values: np.ndarray) -> np.ndarray | None:
    """Converts values from 0 to 1 to linear light by an ICC curve; None if the type of the curve is unknown."""
    if curve[:4] == b"curv" and len(curve) >= 12:
        count = int.from_bytes(curve[8:12], "big")
        points = np.frombuffer(curve[12 : 12 + 2 * count], ">u2")
        if len(points) != count:
            return None
        if count < 2:
            return values ** (points[0] / 256) if count else values
        return np.interp(values, np.linspace(0, 1, count), points / 65535)
    lengths = {0: 1, 1: 3, 2: 4, 3: 5, 4: 7}
    kind = int.from_bytes(curve[8:10], "big")
    if curve[:4] != b"para" or kind not in lengths or len(curve) < 12 + 4 * lengths[kind]:
        return None
    numbers = _fixed(curve[12 : 12 + 4 * lengths[kind]])
    power, scale, shift, slope, edge, high, low = (*numbers, *(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)[len(numbers) - 1 :])
    if kind in (1, 2):
        edge, slope = -shift / scale if scale else 0.0, 0.0
        high = low = numbers[3] if kind == 2 else 0.0
    light = np.maximum(scale * values + shift, 0) ** power + high
    return np.where(values >= edge, light, slope * values + low)


def _fixed(content: bytes) -> list[float]:
    """Returns numbers from the 15.16-bit fixed-point format of ICC profiles."""
    return [number / 65536 for number in struct.unpack(f">{len(content) // 4}i", content)]
