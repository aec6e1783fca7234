"""Random numbers of a seed, a position and a purpose."""

from collections import Counter

import numpy as np

from tests.noise import SD_SCHEDULE, drawing
from utils.config.seeding import Stream, generator
from utils.diffusion.noise import ForwardProcess, NoiseDraws, stack_draws


class TestSeeding:
    def test_a_draw_depends_on_all_of_its_key_and_on_nothing_else(self):
        def first(*key):
            return generator(*key, Stream.NOISE).standard_normal(4).tolist()

        assert first(1, 2, 3) == first(1, 2, 3)
        others = [first(1, 2, 4), first(1, 3, 3), first(2, 2, 3), first(1 + 2**32, 2, 3), first(1 + 2**40, 2, 3)]
        assert all(first(1, 2, 3) != other for other in others)
        assert generator(1, 2, 3, Stream.CROP).standard_normal(4).tolist() != first(1, 2, 3)

    def test_noise_is_standard_normal_and_independent(self):
        draws = drawing(global_batch=200)
        noise = np.stack([draws.draw(0, slot, (4, 16, 16)).noise for slot in range(200)]).reshape(200, -1)
        assert abs(noise.mean()) < 0.01
        assert abs(noise.std() - 1) < 0.01
        correlation = np.corrcoef(noise) - np.eye(200)
        assert np.abs(correlation).max() < 6 / np.sqrt(noise.shape[1])

    def test_in_pixels_no_posterior_is_drawn_and_all_else_is_the_same(self):
        draws = drawing()
        alone = NoiseDraws(draws.options, ForwardProcess(SD_SCHEDULE, {}), 0, draws.global_batch, has_posterior=False)
        both, found = draws.draw(3, 1, (4, 8, 8)), alone.draw(3, 1, (4, 8, 8))
        assert (both.posterior_noise != both.noise).all()
        assert found.posterior_noise is stack_draws([found])["posterior_noise"] is None
        assert (found.noise == both.noise).all()
        assert found.timestep == both.timestep

    def test_timesteps_are_uniform(self):
        draws = drawing(10)
        counts = Counter(draws.draw(step, slot, (1, 1, 1)).timestep for step in range(200) for slot in range(20))
        assert set(counts) == set(range(10))
        assert max(abs(count - 400) for count in counts.values()) < 80


def test_each_of_two_to_the_64_positions_has_numbers_of_its_own():
    """Against numpy's Philox with the key as it is; a list of such numbers would become float64, and be rounded."""
    import numpy as np

    for seed, position, place in [(0, 0, 0), (3, 2**63 + 1, 2), (3, 2**63 + 2, 2), (2**62, 2**64 - 1, 5)]:
        key, counter = np.array([seed, position], np.uint64), np.array([0, 0, place, Stream.CROP], np.uint64)
        expected = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(4)
        assert generator(seed, position, place, Stream.CROP).random(4).tolist() == expected.tolist()
    drawn = {generator(0, 2**63 + number, 0, Stream.FLIP).random() for number in range(3000)}
    assert len(drawn) == 3000
