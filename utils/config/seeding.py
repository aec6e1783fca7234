"""The source of every random number.

Each draw has its own stream: numpy's counter-based Philox generator (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3") with the key (seed, position) and the counter (0, 0, place, stream number). A draw is therefore
independent of all earlier draws, and enabling one draw changes no other. torch.Generator would keep only 32 bits of
its seed: among two million samples about 500 would share their noise with another one.
"""

from enum import IntEnum

import numpy as np
from numpy.random.bit_generator import ISeedSequence


class Stream(IntEnum):
    """The name of a draw. The numbers define what a seed means: add new ones at the end, never change one."""

    ORDER = 0
    CROP = 1
    FLIP = 2
    CAPTION = 3
    CAPTION_DROPOUT = 4
    POSTERIOR = 5
    NOISE = 6
    TIMESTEP = 7
    NOISE_OFFSET = 8
    INPUT_PERTURBATION = 9
    MODEL = 10
    REPLACEMENT = 11
    SUBSET = 12
    STRATA = 13
    PYRAMID = 14
    ROTATION = 15
    COLOR_JITTER = 16
    TAG_ORDER = 17
    TAG_DROPOUT = 18
    HEAD_START = 19
    GROUP_ORDER = 20
    SOURCE_ORDER = 21
    SHARD_ORDER = 22
    HELD_OUT_SPLIT = 23
    HELD_OUT_POSTERIOR = 24
    HELD_OUT_NOISE = 25
    ROUNDING = 26
    SCALING = 27
    PROBE = 28
    EVALUATION = 40


class _Key(ISeedSequence):
    """Passes Philox its key unchanged; numpy's own `key` argument would first ask the system for random bits."""

    def __init__(self, seed: int, position: int):
        self._key = np.array([seed, position], np.uint64)

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        """Returns the key: two 64-bit words, as Philox expects."""
        return self._key


def generator(seed: int, position: int, place: int, stream: Stream) -> np.random.Generator:
    """Returns the generator of one draw.

    Args:
        seed: the run's seed, 0 or more.
        position: the optimizer step; for draws before encoding, the record's identity.
        place: the slot in the global batch; for draws before encoding, the number of the pass over the record.
    """
    counter = np.array([0, 0, place, stream], np.uint64)
    return np.random.Generator(np.random.Philox(_Key(seed, position), counter=counter))


def model_seed(seed: int, step: int, first_slot: int) -> int:
    """Returns the seed for the model's own draws (dropout) in the micro-batch that starts at `first_slot`."""
    return int(generator(seed, step, first_slot, Stream.MODEL).integers(2**63))
