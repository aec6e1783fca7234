"""The verdict from numbers: each word, its step, its interval and its advice."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from utils.evaluation.judging import WORDS, Conditions, judge
from utils.evaluation.readings import Reading, caption_fit, change, mean_interval, t_quantile

IMAGES, PLACES = 16, 4
RUN = Conditions(100, True, "epsilon", [40.0] * IMAGES, 1e-4)


def losses(factor: float = 1.0, seed: int = 0, spread: float = 0.02) -> np.ndarray:
    """Losses of 16 images at 4 timesteps, `factor` times those of the base, up to chance."""
    base = np.random.default_rng(9).uniform(0.1, 0.4, (IMAGES, PLACES))
    return base * factor * np.exp(np.random.default_rng(seed).normal(0, spread, (IMAGES, PLACES)))


def reading(step: int, trained: float = 1.0, held_out: float | None = None, **more: object) -> Reading:
    """A reading of a run whose captions fit and whose predictions moved by 5 % of the base's squared error."""
    gap = np.full((IMAGES, PLACES), 0.02)
    own = losses(trained, step + 1)
    usual = {
        "trained": own,
        "held_out": None if held_out is None else losses(held_out, step + 2),
        "bare": own + np.random.default_rng(step).normal(1, 0.2, gap.shape) * gap,
        "gap": gap,
        "moved": np.full((IMAGES, PLACES), 0.05 * 0.25 if step else 0.0),
        "outside": np.full((32, 1), 0.01 if step else 0.0),
        "outside_loss": np.full((32, 1), 0.3),
    }
    kinds = (
        {} if step else {"own": np.full(IMAGES, 0.2), "epsilon": np.full(IMAGES, 0.2), "sample": np.full(IMAGES, 3.0)}
    )
    return Reading(step, step / 100, **{**usual, "types": kinds, **more})


def still(step: int, trained: float = 1.0) -> Reading:
    return reading(step, trained, 1.0, moved=np.full((IMAGES, PLACES), 1e-6))


def start(held_out: float | None = 1.0, **more: object) -> Reading:
    return replace(reading(0, 1.0, held_out, **more), trained=losses(), held_out=None if held_out is None else losses())


OTHER_TYPE = {"own": np.full(IMAGES, 0.9), "epsilon": np.full(IMAGES, 0.9), "v_prediction": np.full(IMAGES, 0.2)}
CASES = {
    "learning": ([start(), reading(25, 0.95, 0.96), reading(100, 0.9, 0.92)], RUN, 25, ""),
    "not learning": (
        [start(), still(25, 0.9999), still(44, 0.9998), still(100, 0.999)],
        RUN,
        25,
        "--learning_rate 0.001",
    ),
    "diverging": ([start(), reading(25, 1.3, 1.3), reading(44, 1.6, 1.6)], RUN, 44, "--learning_rate 1e-05"),
    "overfitting": ([start(), reading(25, 0.8, 0.97), reading(44, 0.5, 1.1)], RUN, 44, "--max_train_steps 25"),
    "forgetting": (
        [start(), reading(25, 0.9, 0.9), reading(44, 0.9, 0.9, outside=np.full((32, 1), 0.1))],
        RUN,
        44,
        "--learning_rate 2e-05",
    ),
    "copying": (
        [start(), reading(25, 0.9, 0.97), reading(100, 0.4, 0.96)],
        replace(RUN, copies=[0.1, 0.2, 0.1, 0.9]),
        100,
        "--max_train_steps",
    ),
    "data or target wrong": (
        [start(types=OTHER_TYPE), reading(25, 0.9, 0.9)],
        replace(RUN, prediction_type="epsilon"),
        0,
        "--prediction_type v_prediction",
    ),
}


@pytest.mark.parametrize("word", WORDS)
def test_each_word_with_its_first_step_and_the_flag_to_change(word):
    readings, conditions, since, advice = CASES[word]
    verdict = judge(readings, conditions)
    assert (verdict.word, verdict.since_step) == (word, since), verdict.line
    assert verdict.advice.startswith(advice)
    assert verdict.interval.low <= verdict.interval.mean <= verdict.interval.high
    record = verdict.as_record("best")
    assert json.loads(json.dumps(record, allow_nan=False))["verdict"] == word
    assert word in verdict.line


def test_captions_of_other_images_and_images_of_one_colour():
    misled = [replace(each, bare=each.trained - 0.9 * each.gap) for each in (start(), reading(25, 0.9, 0.95))]
    verdict = judge(misled, RUN)
    assert (verdict.word, verdict.since_step) == ("data or target wrong", 0)
    assert "captions" in verdict.line
    # a new word, which costs the base little or comes to help, is no fault
    unknown = replace(start(), gap=start().gap / 10, bare=start().trained - 0.002)
    assert judge([unknown, misled[1]], RUN).word == "learning"
    assert judge([misled[0], reading(25, 0.9, 0.95)], RUN).word == "learning"
    black = judge([start()], replace(RUN, contrasts=[0.0] * IMAGES))
    assert black.word == "data or target wrong"
    assert "one colour" in black.line


def test_a_base_converted_to_another_prediction_type_is_right_once_it_predicts_that_as_well():
    first = start(types=OTHER_TYPE)
    assert judge([first, reading(100, 0.2, 0.2)], RUN).word == "learning"


def test_nothing_is_said_before_it_is_certain_and_something_at_the_end():
    assert judge([start()], RUN) is None
    noisy = replace(
        start(), step=10, moved=reading(25).moved, trained=losses(1.0, 3, 0.5), held_out=losses(1.0, 4, 0.5)
    )
    assert judge([start(), noisy], RUN) is None
    worse = replace(noisy, step=100, trained=losses(1.02, 3, 0.5), held_out=losses(1.2, 4, 0.5))
    assert judge([start(), worse], RUN).word == "not learning"
    better = replace(noisy, step=100, trained=losses(0.8, 3, 0.5), held_out=losses(0.8, 4, 0.5))
    assert judge([start(), better], RUN).word == "learning"


def test_a_loss_that_is_no_number_diverges_and_so_does_a_run_that_ended_so():
    broken = reading(25, math.nan, math.nan)
    verdict = judge([start(), broken], RUN)
    assert verdict.word == "diverging"
    json.dumps(verdict.as_record(None), allow_nan=False)
    skipping = judge([start(), replace(reading(25, 0.99, 0.99), skipped=20)], RUN)
    assert (skipping.word, skipping.advice[:15]) == ("diverging", "--learning_rate")
    ended = judge([start(), reading(25, 0.9, 0.9)], replace(RUN, ended="10 consecutive steps were skipped"))
    assert (ended.word, ended.evidence[0]) == ("diverging", "10 consecutive steps were skipped")


def test_a_loss_that_rises_during_warm_up_and_falls_again_is_no_divergence():
    readings = [start(), reading(12, 1.2, 1.2), reading(25, 1.1, 1.1), reading(44, 0.95, 0.95)]
    assert [judge(readings[:count], RUN) for count in (2, 3)] == [None, None]
    assert judge(readings, RUN).word == "learning"


def test_without_held_out_images_it_says_what_cannot_be_told():
    verdict = judge([start(None), reading(44, 0.5)], RUN)
    assert (verdict.word, verdict.advice) == ("learning", "--validation_split 0.05")
    assert any("can't be told" in each for each in verdict.evidence)


def test_readings_survive_json():
    first = replace(start(), trained=losses() * math.nan)
    line = json.dumps(first.as_record(), allow_nan=False)
    again = Reading.of_record(json.loads(line))
    assert np.isnan(again.trained).all()
    assert again.held_out == pytest.approx(first.held_out, rel=1e-6)
    assert again.types["own"].tolist() == first.types["own"].tolist()


def test_intervals_cover_the_mean_as_often_as_they_say():
    random, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        found = mean_interval(random.normal(1.0, 2.0, 8))
        covered += found.low < 1.0 < found.high
    assert 0.93 < covered / 2000 < 0.97
    assert t_quantile(8) == pytest.approx(2.306, abs=0.006)
    assert t_quantile(31) == pytest.approx(2.0395, abs=0.001)


def test_captions_fit_fully_where_the_prediction_is_the_conditional_mean():
    random = np.random.default_rng(0)
    meaning, noise = random.normal(size=(400, 64)), random.normal(size=(400, 64))
    target, mean = meaning + noise, np.zeros(64)
    own, bare = ((target - meaning) ** 2).mean(1), ((target - mean) ** 2).mean(1)
    gap = (meaning**2).mean(1)
    found = caption_fit(Reading(0, 0, trained=own[:, None], bare=bare[:, None], gap=gap[:, None]))
    assert found.low < 1 < found.high
    unrelated = np.roll(meaning, 1, 0)
    own, gap = ((target - unrelated) ** 2).mean(1), (unrelated**2).mean(1)
    found = caption_fit(Reading(0, 0, trained=own[:, None], bare=bare[:, None], gap=gap[:, None]))
    assert found.low < -1 < found.high
    assert change(2 * losses(spread=0), losses(spread=0)) == pytest.approx([math.log(2)] * IMAGES)


def test_a_line_says_where_learning_is_not_certain():
    """One held-out image has no interval: all images together decide, and no infinite number is written."""
    one = losses(0.99)[:1], losses(1.0)[:1]
    readings = [reading(step, trained=trained, held_out=None) for step, trained in ((0, 1.0), (50, 1.0), (100, 0.8))]
    readings = [replace(each, held_out=one[1] if each.step < 100 else one[0]) for each in readings]
    found = judge(readings, RUN)
    assert (found.word, found.signal, found.line.count("not certain")) == ("learning", "improvement", 0)
    assert "one image, without an interval" in found.evidence[0]
    assert "inf" not in found.line

    readings = [replace(reading(step), held_out=None) for step in (0, 50, 100)]
    lower = readings[0].trained * np.exp(np.linspace(-0.5, 0.45, IMAGES))[:, None]
    found = judge([*readings[:2], replace(readings[2], trained=lower)], RUN)
    assert found.word == "learning"
    assert "learning (not certain: the interval includes no change), since step 100" in found.line
