"""Plans crops and augmentations from image sizes and seeded random numbers, the same in cached and live runs."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from utils.config.batch import Crop, RecordPass
from utils.config.seeding import Stream, generator
from utils.data.options import INTERPOLATIONS, ImageOptions

RESAMPLING = {name: Image.Resampling[name.partition("_")[0].upper()] for name in INTERPOLATIONS}


@dataclass(frozen=True)
class Cut:
    """Rotation, crop, flip and colour jitter of an image; depends only on its size and the random numbers.

    Attributes:
        degrees: counter-clockwise rotation.
        box: left, top, right and bottom of the part that is resized to the target, in pixels of the rotated image.
        mirrored: whether the resized part is mirrored.
        brightness, contrast, saturation: factors; 1 for no change.
        crop: position and size of the crop, for the model.
    """

    degrees: float
    box: tuple[float, float, float, float]
    mirrored: bool
    brightness: float
    contrast: float
    saturation: float
    crop: Crop


def plan_cut(
    size: tuple[int, int], target: tuple[int, int], options: ImageOptions, seed: int, passing: RecordPass
) -> Cut:
    """Plans the crop and augmentations of an image for one pass; the same in cached and live runs.

    The image is scaled to just cover the target, and the rest is cropped away.

    Args:
        size: (width, height) of the upright image.
        target: (width, height) of the crop.
        passing: the record and variant that seed the random numbers.
    """
    # rotation: keep the largest rectangle of the same aspect ratio without empty corners
    degrees = 0.0
    if options.random_rotation:
        drawn = generator(seed, passing.identity, passing.variant, Stream.ROTATION).random()
        degrees = float((2 * drawn - 1) * options.random_rotation)
    inner = _inscribed(size, degrees)

    # resize: scale that rectangle to cover the target
    resized = _cover(inner, target)
    scale = inner[0] / resized[0], inner[1] / resized[1]  # image pixels per resized pixel
    margin = (size[0] - inner[0]) / 2, (size[1] - inner[1]) / 2

    # crop: offset of the target in the resized rectangle, at the centre or random
    if options.center_crop:
        left, top = round((resized[0] - target[0]) / 2), round((resized[1] - target[1]) / 2)
    else:
        vertical, horizontal = generator(seed, passing.identity, passing.variant, Stream.CROP).random(2)
        left = int(horizontal * (resized[0] - target[0] + 1))
        top = int(vertical * (resized[1] - target[1] + 1))
    mirrored = options.random_flip and _is_mirrored(seed, passing)
    seen_from_left = resized[0] - target[0] - left if mirrored else left  # the crop refers to the mirrored image

    # the same crop in pixels of the image, clipped against rounding errors
    begin = margin[0] + seen_from_left * scale[0], margin[1] + top * scale[1]
    end = begin[0] + target[0] * scale[0], begin[1] + target[1] * scale[1]
    box = (*begin, min(end[0], size[0]), min(end[1], size[1]))
    crop = Crop(
        original_height=size[1],
        original_width=size[0],
        top=top + round(margin[1] / scale[1]),
        left=left + round(margin[0] / scale[0]),
        height=target[1],
        width=target[0],
    )
    return Cut(degrees, box, mirrored, *_jitter(options.color_jitter, seed, passing), crop)


def make_cut(image: Image.Image, cut: Cut, options: ImageOptions) -> np.ndarray:
    """Applies a planned cut to an upright image; returns [C, H, W] with the value range of the image."""
    if cut.degrees:
        image = image.rotate(cut.degrees, Image.Resampling.BICUBIC)
    # resize only the part that is kept: otherwise an image of 30,000 x 20 pixels would need gigabytes
    target = (cut.crop.width, cut.crop.height)
    taken = image.resize(target, RESAMPLING[options.image_interpolation_mode], box=cut.box)
    if cut.mirrored:
        taken = taken.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance, factor in (
        (ImageEnhance.Brightness, cut.brightness),
        (ImageEnhance.Contrast, cut.contrast),
        (ImageEnhance.Color, cut.saturation),
    ):
        if factor != 1:
            taken = enhance(taken).enhance(factor)
    values = np.asarray(taken)
    return np.array(np.atleast_3d(values).transpose(2, 0, 1), order="C")  # copy, because PIL owns the memory


def _cover(size: tuple[float, float], target: tuple[int, int]) -> tuple[int, int]:
    """Returns the smallest (width, height) with the image's aspect ratio that covers the target."""
    (width, height), (target_width, target_height) = size, target
    if target_width * height >= target_height * width:
        return target_width, max(target_height, int(target_width * height // width))
    return max(target_width, int(target_height * width // height)), target_height


def _inscribed(size: tuple[int, int], degrees: float) -> tuple[float, float]:
    """Returns (width, height) of the largest upright rectangle that the rotated image fills.

    It has the image's aspect ratio and centre.
    """
    if not degrees:
        return size
    width, height = size
    sine, cosine = math.sin(math.radians(abs(degrees))), math.cos(math.radians(degrees))
    shrink = min(width / (width * cosine + height * sine), height / (height * cosine + width * sine))
    return width * shrink, height * shrink


def _is_mirrored(seed: int, passing: RecordPass) -> bool:
    return bool(generator(seed, passing.identity, passing.variant, Stream.FLIP).random() < 0.5)


def _jitter(strength: float, seed: int, passing: RecordPass) -> tuple[float, float, float]:
    """Returns random factors of brightness, contrast and saturation."""
    if not strength:
        return 1.0, 1.0, 1.0
    drawn = generator(seed, passing.identity, passing.variant, Stream.COLOR_JITTER).random(3)
    brightness, contrast, saturation = (float(value) for value in 1 + strength * (2 * drawn - 1))
    return brightness, contrast, saturation
