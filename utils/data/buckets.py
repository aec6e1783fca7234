"""Aspect-ratio buckets: the sizes that images are trained at, and the bucket of each image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from utils.data.options import BucketOptions


@dataclass(frozen=True)
class BucketPlan:
    """The size that each image is trained at.

    Attributes:
        sizes: [K] (width, height) of each bucket that has images.
        bucket_of: [N] uint16 index of each image's bucket, or `NONE`.
        merged: (size, number of images, sizes of their new buckets) of each bucket that had too few images for a group.
    """

    sizes: list[tuple[int, int]]
    bucket_of: np.ndarray = field(repr=False)
    merged: list[tuple[tuple[int, int], int, list[tuple[int, int]]]]


NONE = np.iinfo(np.uint16).max


def plan_buckets(
    image_sizes: np.ndarray, resolution: int, options: BucketOptions, uses: np.ndarray, group_size: int
) -> BucketPlan:
    """Assigns each image to the bucket with the nearest aspect ratio, measured by its logarithm.

    With `no_upscale`, a bucket must not be larger than the image. An image smaller than every bucket gets a bucket of
    its own size, rounded down to `bucket_step`, or none if an edge is below the minimum. Buckets with too few images
    for a group are merged into their neighbours, unless that would enlarge images: then a group repeats images.

    Args:
        image_sizes: [N, 2] widths and heights in pixels.
        resolution: the area of buckets is the square of this.
        uses: [N] how often each image is used per epoch.
        group_size: consecutive samples from one bucket; buckets with fewer uses per epoch are merged.
    """
    sizes = options.sizes(resolution)
    if len(sizes) == 1 and not options.no_upscale:
        return BucketPlan(sizes, np.zeros(len(image_sizes), np.uint16), [])

    # assign distinct shapes instead of images: many images share a shape
    packed = image_sizes[:, 0].astype(np.int64) << 32 | image_sizes[:, 1].astype(np.int64)
    distinct, shape_of = np.unique(packed, return_inverse=True)
    shapes = np.stack([distinct >> 32, distinct & 0xFFFFFFFF], axis=1)
    nearest = _nearest(shapes, sizes, options.no_upscale)
    if options.no_upscale and options.buckets is None:
        sizes, nearest = _own_buckets(shapes, sizes, nearest, options, resolution)
    bucket_of = nearest[shape_of]

    # merge buckets that are too small for a group, the smallest first
    is_in = bucket_of >= 0
    counts = np.bincount(bucket_of[is_in], uses[is_in], len(sizes))
    merged, kept = [], [number for number in range(len(sizes)) if counts[number] > 0]
    stuck: set[int] = set()  # buckets whose images would have to be enlarged
    while small := [number for number in kept if counts[number] < group_size and number not in stuck]:
        # ties: the one farthest from a square first, because buckets merge towards the square
        number = min(small, key=lambda number: (counts[number], -_distance_from_square(sizes[number])))
        others = [other for other in kept if other != number]
        members = np.flatnonzero(bucket_of == number)
        if not others:
            break
        nearest = _nearest(image_sizes[members], [sizes[other] for other in others], options.no_upscale)
        if (nearest < 0).any():
            stuck.add(number)
            continue
        goals = np.array(others)[nearest]
        bucket_of[members] = goals
        counts += np.bincount(goals, uses[members], len(sizes))
        counts[number] = 0
        kept = others
        merged.append((sizes[number], len(members), [sizes[goal] for goal in np.unique(goals)]))

    # number the remaining buckets from 0
    renumbered = np.full(len(sizes) + 1, NONE, np.uint16)
    renumbered[kept] = np.arange(len(kept))
    return BucketPlan([sizes[number] for number in kept], renumbered[bucket_of], merged)


def _distance_from_square(size: tuple[int, int]) -> float:
    return abs(math.log(size[0] / size[1]))


def _nearest(shapes: np.ndarray, sizes: Sequence[tuple[int, int]], must_fit: bool) -> np.ndarray:
    """Returns [N] the index of the bucket nearest in aspect ratio, the largest if several are; -1 if none fits.

    Args:
        shapes: [N, 2] widths and heights.
        must_fit: whether a bucket must not be larger than the image.
    """
    buckets = np.array(sizes, np.float64)
    ratios = np.log(buckets[:, 0] / buckets[:, 1])
    areas = buckets.prod(1)
    found = np.empty(len(shapes), np.int64)
    for begin in range(0, len(shapes), 65536):
        part = shapes[begin : begin + 65536].astype(np.float64)
        distance = np.abs(np.log(part[:, 0] / part[:, 1])[:, None] - ratios)
        distance = distance.round(9) - 1e-10 * areas / areas.max()  # ties: the largest bucket
        if must_fit:
            distance[(part[:, None, :] < buckets).any(2)] = np.inf
        best = distance.argmin(1)
        found[begin : begin + len(part)] = np.where(np.isinf(distance.min(1)), -1, best)
    return found


def _own_buckets(
    shapes: np.ndarray, sizes: list[tuple[int, int]], nearest: np.ndarray, options: BucketOptions, resolution: int
) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Returns (sizes, nearest) with buckets added for images smaller than the area, at their own rounded-down size."""
    step, least, most = options.step, options.least(resolution), options.most(resolution)
    area = resolution * resolution
    own = np.minimum(shapes // step * step, most)
    is_small = (shapes.prod(1) < area) | (nearest < 0)
    too_large = own.prod(1) > area  # a long image: it keeps a bucket of the full area
    usable = is_small & ~too_large & (own >= least).all(1)
    sizes = list(sizes)
    numbers = {size: number for number, size in enumerate(sizes)}
    nearest = np.where(is_small & ~usable & (own < least).any(1), -1, nearest)
    for place in np.flatnonzero(usable):
        size = (int(own[place, 0]), int(own[place, 1]))
        if size not in numbers:
            numbers[size] = len(sizes)
            sizes.append(size)
        nearest[place] = numbers[size]
    return sizes, nearest
