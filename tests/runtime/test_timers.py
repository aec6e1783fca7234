"""Intervals in minutes: when they are over, and that all processes act on them after the same step."""

from itertools import count

import pytest

from utils.config.options import UserError
from utils.runtime.timers import Timer, Timers
from utils.training.options import CheckpointOptions


class Clock:
    """A clock that is set by hand, in minutes."""

    def __init__(self):
        self.minutes = 0.0

    def __call__(self) -> float:
        return 60 * self.minutes


def test_an_interval_begins_with_the_first_step_and_after_each_restart():
    clock = Clock()
    timer = Timer(2, clock)
    clock.minutes = 50  # loading the model does not count
    assert timer.asked(True) == 0
    clock.minutes = 51.9
    assert timer.asked(True) == 0
    clock.minutes = 52
    number = timer.asked(True)
    assert timer.is_over(number)
    assert timer.asked(True) == 0  # it is sent once
    timer.restart()
    assert not timer.is_over(number)
    clock.minutes = 53.9
    assert timer.asked(True) == 0
    timer.restart()  # a checkpoint for another reason
    clock.minutes = 55
    assert timer.asked(True) == 0
    clock.minutes = 56
    assert timer.is_over(timer.asked(True))


def test_without_minutes_nothing_is_due():
    timers = Timers(clock=count(0, 10**9).__next__)
    for _ in range(3):
        heard = timers.asked(True)
        assert heard == [0, 0]
        assert not timers.is_checkpoint_due(heard)
        assert not timers.are_samples_due(heard)
    assert not timers.is_checkpoint_due([])


def test_processes_act_after_the_same_step_although_sums_are_read_a_step_late():
    clocks = [Clock(), Clock()]
    processes = [Timers(1, None, clock) for clock in clocks]
    saved: list[list[int]] = [[], []]
    sent: list[float] = []
    for step in range(1, 200):
        asked = [each.asked(rank == 0) for rank, each in enumerate(processes)]
        read, sent = sent, [one + other for one, other in zip(*asked, strict=True)]
        clocks[0].minutes += 0.125
        clocks[1].minutes += 10  # another machine, whose clock does not count
        for rank, each in enumerate(processes):
            if each.is_checkpoint_due(read) or step % 17 == 0:  # minutes and steps combined
                saved[rank].append(step)
                each.checkpoints.restart()
    assert saved[0] == saved[1]
    apart = [after - before for before, after in zip(saved[0], saved[0][1:], strict=False)]
    assert min(apart) > 1  # a number that was sent before a checkpoint causes no second one
    assert max(apart) == 10  # 8 steps are a minute; the ninth sends it, the tenth reads it


@pytest.mark.parametrize("name", ["checkpointing_minutes", "checkpointing_epochs"])
def test_intervals_are_above_zero(name):
    with pytest.raises(UserError, match=f"--{name} must be a number above 0, got 0"):
        CheckpointOptions(**{name: 0})
