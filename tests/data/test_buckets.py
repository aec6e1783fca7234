"""Buckets of aspect ratios."""

import math

import numpy as np
import pytest

from utils.config.options import UserError
from utils.data.buckets import NONE, plan_buckets
from utils.data.options import BucketOptions, area_buckets


class TestBuckets:
    def test_all_sizes_of_the_area(self):
        sizes = area_buckets(512 * 512, 64, 256, 1024)
        assert {(512, 512), (1024, 256), (256, 1024), (576, 448), (448, 576), (704, 320)} <= set(sizes)
        assert all(width * height <= 512 * 512 and width % 64 == height % 64 == 0 for width, height in sizes)
        assert {(height, width) for width, height in sizes} == set(sizes)

    @pytest.mark.parametrize("seed", range(5))
    def test_the_nearest_by_the_logarithm_of_the_aspect_ratio(self, seed):
        random = np.random.default_rng(seed)
        shapes = random.integers(40, 4000, (300, 2))
        options = BucketOptions(use_aspect_ratio_buckets=True)
        planned = plan_buckets(shapes, 512, options, np.ones(300), 1)
        everywhere = options.sizes(512)
        for (width, height), number in zip(shapes, planned.bucket_of, strict=True):
            best = min(abs(math.log(width / height) - math.log(w / h)) for w, h in everywhere)
            w, h = planned.sizes[number]
            assert abs(abs(math.log(width / height) - math.log(w / h)) - best) < 1e-8

    def test_small_buckets_are_merged_and_reported(self):
        shapes = np.array([(512, 512)] * 10 + [(1024, 256)] * 3 + [(256, 1024)] * 4)
        planned = plan_buckets(shapes, 512, BucketOptions(use_aspect_ratio_buckets=True), np.ones(17), 4)
        assert sorted(planned.sizes) == [(256, 1024), (512, 512)]
        assert planned.merged == [((1024, 256), 3, [(512, 512)])]
        assert np.bincount(planned.bucket_of).min() == 4

    def test_no_upscale(self):
        shapes = np.array([(300, 400), (2000, 1000), (100, 400), (512, 512), (520, 300)])
        options = BucketOptions(use_aspect_ratio_buckets=True, no_upscale=True)
        planned = plan_buckets(shapes, 512, options, np.ones(5), 1)
        assert planned.bucket_of[2] == NONE  # its shorter edge is under the least
        sizes = [planned.sizes[number] if number != NONE else None for number in planned.bucket_of]
        assert sizes[0] == (256, 384)
        assert sizes[3] == (512, 512)
        assert sizes[4] == (512, 256)
        for size, shape in zip(sizes, shapes, strict=True):
            assert size is None or (size[0] <= shape[0] and size[1] <= shape[1])

    def test_an_explicit_list(self):
        options = BucketOptions(use_aspect_ratio_buckets=True, buckets=["512x512", "768x512"])
        planned = plan_buckets(np.array([(900, 600), (500, 500), (100, 400)]), 512, options, np.ones(3), 1)
        assert [planned.sizes[number] for number in planned.bucket_of] == [(768, 512), (512, 512), (512, 512)]

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"buckets": ["512"]}, "--use_aspect_ratio_buckets"),
            ({"use_aspect_ratio_buckets": True, "buckets": ["512"]}, "--buckets"),
            ({"use_aspect_ratio_buckets": True, "buckets": ["511x512"]}, "divisible by 8"),
            ({"use_aspect_ratio_buckets": True, "bucket_step": 12}, "--bucket_step"),
            ({"no_upscale": True}, "--no_upscale"),
        ],
    )
    def test_bad_options(self, options, named):
        with pytest.raises(UserError, match=named):
            BucketOptions(**options)


def test_merging_takes_the_smallest_again_after_each_merge_and_enlarges_nothing_where_asked():
    options = BucketOptions(use_aspect_ratio_buckets=True)
    shapes = np.array([(512, 512), (800, 400), (400, 800)])
    planned = plan_buckets(shapes, 512, options, np.ones(3), 8)
    assert planned.sizes == [(512, 512)]
    assert [count for _, count, _ in planned.merged] == [1, 1]
    still = BucketOptions(use_aspect_ratio_buckets=True, no_upscale=True)
    shapes = np.array([(300, 300)] * 2 + [(900, 600)] * 9)
    planned = plan_buckets(shapes, 512, still, np.ones(11), 4)
    targets = np.array(planned.sizes)[planned.bucket_of]
    assert (targets <= shapes).all()
    assert not planned.merged
