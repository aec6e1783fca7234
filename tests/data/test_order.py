"""The order in which records are drawn."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from tests.pictures import make_picture
from tests.records import plan
from utils.data.options import BucketOptions
from utils.data.order import GlobalBatches, Pieces


def uses(batches: GlobalBatches, steps: int, count: int) -> np.ndarray:
    """How often each record is drawn in the first steps."""
    drawn = Counter(batches.draw(step, slot).record for step in range(steps) for slot in range(batches.size))
    return np.array([drawn[record] for record in range(count)])


def one_source(bucket_of: np.ndarray, size: int, group_size: int, seed: int = 0) -> GlobalBatches:
    return GlobalBatches(bucket_of, np.zeros(len(bucket_of), int), [Fraction(1)], size, group_size, seed)


class TestSampler:
    @pytest.mark.parametrize(("num_records", "size"), [(6, 4), (5, 8), (100, 7), (3, 3)])
    def test_each_record_is_drawn_once_a_pass(self, num_records, size):
        batches = one_source(np.zeros(num_records, int), size, 1, seed=3)
        steps = batches.steps_in(epochs=size)
        drawn = [batches.draw(step, slot)[:2] for step in range(steps) for slot in range(size)]
        assert Counter(drawn) == Counter({(r, p): 1 for r in range(num_records) for p in range(size)})
        assert batches.epochs_before(steps) == size

    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("epochs", [1, 3])
    def test_in_buckets_each_image_is_used_once_an_epoch_give_or_take_one(self, seed, epochs):
        random = np.random.default_rng(seed)
        group = int(random.choice([1, 2, 4, 8]))
        counts = random.integers(group, 120, 12)
        bucket_of = np.repeat(np.arange(12), counts)
        batches = one_source(bucket_of, group * int(random.integers(1, 6)), group, seed)
        steps = batches.steps_in(epochs)
        assert np.abs(uses(batches, steps, len(bucket_of)) - epochs).max() <= 1
        assert batches.epochs_before(steps) == epochs
        for step in range(steps):  # a group is of one bucket
            buckets = [batches.draw(step, slot).bucket for slot in range(batches.size)]
            assert all(len(set(buckets[at : at + group])) == 1 for at in range(0, batches.size, group))

    def test_any_step_can_be_asked_for_first(self):
        bucket_of = np.repeat(np.arange(3), [10, 20, 7])
        in_order = one_source(bucket_of, 8, 2)
        drawn = {(step, slot): in_order.draw(step, slot) for step in range(40) for slot in range(8)}
        for step, slot in [(39, 7), (0, 0), (20, 3), (3, 1)]:
            assert one_source(bucket_of, 8, 2).draw(step, slot) == drawn[step, slot]

    def test_repeats_and_weights(self):
        source_of, bucket_of = np.repeat([0, 1], [30, 300]), np.arange(330) % 3
        repeated = GlobalBatches(bucket_of, source_of, [Fraction(10), Fraction(1)], 16, 4, 0)
        used = uses(repeated, repeated.steps_in(4), 330)
        assert repeated.samples_per_epoch == 600
        assert set(used[:30]) <= {39, 40, 41}
        assert set(used[30:]) <= {3, 4, 5}
        halves = GlobalBatches(bucket_of, source_of, [Fraction(330, 60), Fraction(330, 600)], 16, 4, 0)
        used = uses(halves, 200, 330)
        assert abs(used[:30].sum() - 1600) <= 16

    @pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
    @pytest.mark.parametrize("num_buckets", [1, 2])
    def test_processes_share_the_slots(self, num_processes, num_buckets):
        batches = one_source(np.arange(20) % num_buckets, 10, 5)
        pieces = [
            piece
            for rank in range(num_processes)
            for piece in Pieces(batches, 3, rank, num_processes, first_step=5, last_step=6)
        ]
        assert [slot for piece in pieces for slot in piece.slots] == list(range(10))
        assert all(len({batches.draw(5, slot).bucket for slot in piece.slots}) == 1 for piece in pieces)


def test_a_thousand_images_of_two_hundred_shapes_over_three_ranks(tmp_path):
    random = np.random.default_rng(0)
    shapes = random.integers(24, 90, (200, 2))
    for number in range(1000):
        make_picture(tmp_path / f"{number:04d}.png", tuple(int(edge) for edge in shapes[number % 200]))
    buckets = BucketOptions(use_aspect_ratio_buckets=True, bucket_step=8)
    planned = plan(tmp_path, 64, buckets, group_size=4)
    assert len(planned.plan.sizes) > 5
    epochs, seen = 3, {}
    for num_processes in (1, 2, 3):
        batches = planned.batches(12, 4, seed=1)
        counts, composition = Counter(), {}
        for rank in range(num_processes):
            pieces = Pieces(batches, 12 // num_processes, rank, num_processes, 0, batches.steps_in(epochs))
            for piece in pieces:
                for slot in piece.slots:
                    composition[piece.step, slot] = batches.draw(piece.step, slot)
                    counts[composition[piece.step, slot].record] += 1
        assert set(counts) == set(range(1000))
        assert max(abs(count - epochs) for count in counts.values()) <= 1
        seen[num_processes] = composition
    assert seen[1] == seen[2] == seen[3]
