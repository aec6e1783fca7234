"""Judges a run by repeated measurements of the same images, captions and noise: numbers in, a verdict out.

All changes are relative to the base model, or to the initial weights of a model from scratch, image by image on the
same noise, so that an interval over images says whether a change is more than chance. Each threshold has its reason
beside it: an interval of 95 %, or an effect that is large on a scale of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from utils.evaluation.readings import (
    Interval,
    Reading,
    caption_fit,
    caption_gain,
    change,
    drift,
    mean_interval,
    share_interval,
    t_quantile,
)

LEARNING, NOT_LEARNING, DIVERGING = "learning", "not learning", "diverging"
OVERFITTING, FORGETTING, COPYING, WRONG = "overfitting", "forgetting", "copying", "data or target wrong"
WORDS = (LEARNING, NOT_LEARNING, DIVERGING, OVERFITTING, FORGETTING, COPYING, WRONG)


@dataclass(frozen=True)
class Conditions:
    """What a judgement must know of a run beside its measurements.

    Attributes:
        total_steps: optimizer steps of the run.
        is_pretrained: whether the denoiser was trained before; if not, changes are relative to its random weights.
        prediction_type: what the model is trained to predict.
        contrasts: standard deviation of the pixels of training images, from 0 to 127.5.
        learning_rate: the peak learning rate; None for an optimizer that finds its own.
        is_averaged: whether the exported weights are moving averages.
        ended: why the run ended as diverged; empty if it did not.
        copies: distance of each sample to the nearest training image, relative to that of held-out images.
    """

    total_steps: int
    is_pretrained: bool = True
    prediction_type: str = "epsilon"
    contrasts: Sequence[float] = ()
    learning_rate: float | None = None
    is_averaged: bool = False
    ended: str = ""
    copies: Sequence[float] = ()


@dataclass(frozen=True)
class Verdict:
    """A judgement of a run.

    Attributes:
        word: one of WORDS.
        interval: 95 % interval of `signal`.
        signal: the name of the number that decided.
        since_step: the step from which on the word was this one.
        best_step: the measured step with the lowest loss of held-out images, or of training images without them.
        advice: the one thing to change, as a flag with its value; empty if nothing need be changed.
        evidence: sentences, the decisive one first.
        signals: all numbers by name.
    """

    word: str
    interval: Interval
    signal: str
    since_step: int
    best_step: int
    advice: str
    evidence: Sequence[str]
    signals: Mapping[str, float]

    @property
    def line(self) -> str:
        """The verdict in one line."""
        advice = f"; change {self.advice}" if self.advice else ""
        is_certain = self.word != LEARNING or self.interval.high < 0
        doubt = "" if is_certain else " (not certain: the interval includes no change)"
        return f"{self.word}{doubt}, since step {self.since_step}: {self.evidence[0]}{advice}"

    def as_record(self, best_checkpoint: str | None) -> dict[str, object]:
        """Returns the content of `verdict.json`."""
        bounds = [value if math.isfinite(value) else None for value in (self.interval.low, self.interval.high)]
        return {
            "verdict": self.word,
            "interval": bounds,
            "signal": self.signal,
            "since_step": self.since_step,
            "best_step": self.best_step,
            "best_checkpoint": best_checkpoint,
            "advice": self.advice,
            "evidence": list(self.evidence),
            "signals": {name: value if math.isfinite(value) else None for name, value in self.signals.items()},
        }


class Sign(NamedTuple):
    """What a rule found: the word, the number that decided with its interval, sentences, and the flag to change."""

    word: str
    interval: Interval
    signal: str
    evidence: tuple[str, ...]
    advice: str = ""


FLAT = 2.0  # grey levels: an image that deviates less from its mean is one colour but for JPEG noise
HALF = 0.5  # of images or samples: most of them
TWICE = math.log(2)  # a base's error for a target it was not trained on is several times that for its own
WORSE = math.log(1.05)  # the rise of the loss by chance of the last batches is a few percent
MUCH_WORSE = math.log(1.25)  # above the lowest reading, which is the lowest partly by chance
ONE_SIDED = 0.83  # of half a 95 % interval: where 95 % lie below, for t from 10 degrees of freedom on
USELESS = 0.8  # of the target's power: a model that fell apart predicts about zero, whose squared error is 1
RISEN = math.log(1.02)  # the same for held-out images, whose noise is the same each time
DRIFTED = 0.16  # of the base's squared error: a move by 0.4 of its standard deviation, near a medium effect (Cohen)
STILL = 4e-4  # of the base's squared error: a move by 2 % of it, which lowers the loss by 4 % at the very most
SETTLED = 0.2  # share of the learning rates applied before a model must have moved


class Course:
    """The readings of a run up to one of them, and the signals that rules look at."""

    def __init__(self, readings: Sequence[Reading], conditions: Conditions):
        self.readings, self.conditions = readings, conditions
        self.base, self.now = readings[0], readings[-1]
        self.trained = self._change("trained", self.base)
        self.held_out = self._change("held_out", self.base)
        both = [change(getattr(self.now, kind), getattr(self.base, kind)) for kind in self._kinds()]
        self.improved = mean_interval(np.concatenate(both)) if both else None
        self.best = min(readings, key=self._level)
        self.fit, self.drift = caption_fit(self.now), drift(self.now, self.base)
        self.moved = None
        if self.now.moved is not None and self.base.trained is not None:
            self.moved = mean_interval((self.now.moved / self.base.trained).mean(1))

    @property
    def is_lower(self) -> bool:
        """Whether the loss is lower than the base's: of held-out images, or of all together.

        During the run with a certainty of 95 %, one-sided, as the question is. At its end a word must be found for a
        model that has moved: the mean decides.
        """
        is_last = self.now.step >= self.conditions.total_steps
        if is_last and self.improved is not None and self.improved.mean < 0:
            return True
        return any(
            each is not None and each.mean + ONE_SIDED * (each.high - each.mean) < 0
            for each in (self.held_out, self.improved)
        )

    def _kinds(self) -> list[str]:
        return [kind for kind in ("trained", "held_out") if getattr(self.now, kind) is not None]

    def _level(self, reading: Reading) -> float:
        """The mean log loss of held-out images, or of training images without them."""
        kind = "trained" if self.base.held_out is None else "held_out"
        if getattr(reading, kind) is None:
            return math.inf
        level = float(change(getattr(reading, kind), getattr(self.base, kind)).mean())
        return level if math.isfinite(level) else math.inf

    def _change(self, kind: str, before: Reading) -> Interval | None:
        now, then = getattr(self.now, kind), getattr(before, kind)
        return None if now is None or then is None else mean_interval(change(now, then))

    def since(self, before: Reading, kind: str = "trained") -> Interval | None:
        """The change of the losses since an earlier reading."""
        return self._change(kind, before)

    @property
    def target_error(self) -> float:
        """Squared error on training images relative to the target's power: 1 for a model that predicts zero."""
        if "own" not in self.base.types or self.now.trained is None:
            return math.nan
        return float(self.base.types["own"].mean() * self.now.trained.sum() / self.base.trained.sum())

    def signals(self) -> dict[str, float]:
        """All numbers by name, with the ends of their intervals."""
        found = {"learnt": self.now.learnt, "target_error": self.target_error, "skipped_steps": self.now.skipped}
        named = {
            "change_trained": self.trained,
            "change_held_out": self.held_out,
            "caption_fit": self.fit,
            "moved": self.moved,
            "drift": self.drift,
        }
        for name, interval in named.items():
            if interval is not None:
                found |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
        return {name: round(float(value), 6) for name, value in found.items() if math.isfinite(value)}


def percent(log_change: float) -> str:
    """Returns a log ratio of losses in words: "12.0 % below" or "3.1 % above"."""
    if not math.isfinite(log_change):
        return "not a finite number away from"
    share = math.expm1(min(log_change, 50.0))
    return f"{abs(share):.3g} times above" if share > 10 else f"{abs(share):.1%} {'above' if share > 0 else 'below'}"


def _spread(interval: Interval) -> str:
    """The interval of a log ratio in words; one image alone has none."""
    if math.isfinite(interval.mean) and not math.isfinite(interval.low):
        return "one image, without an interval"
    low, high = (math.expm1(min(bound, 50.0)) if math.isfinite(bound) else bound for bound in interval[1:])
    return f"95 % interval {low:+.1%} to {high:+.1%}"


def _rate(course: Course, factor: float) -> str:
    """The flag for another learning rate."""
    rate = course.conditions.learning_rate
    if rate is None:
        return f"--max_train_steps {max(1, round(course.conditions.total_steps * factor))}"
    return f"--learning_rate {rate * factor:.2g} (was {rate:.3g})"


def _is_wrong(course: Course) -> Sign | None:
    """The data or the target is wrong: images of one colour, another prediction type, captions of other images."""
    for rule in (_is_flat, _is_of_another_type, _has_wrong_captions):
        if sign := rule(course):
            return sign
    return None


def _is_flat(course: Course) -> Sign | None:
    """Half or more of the training images are of one colour."""
    contrasts = np.array(course.conditions.contrasts)
    if not len(contrasts):
        return None
    share = share_interval(contrasts < FLAT)
    if share.low < HALF:
        return None
    text = f"{share.mean:.0%} of the {len(contrasts)} training images looked at are of one colour"
    return Sign(WRONG, share, "flat_images", (text,), "--train_data_dir to a folder of real images")


def _is_of_another_type(course: Course) -> Sign | None:
    """The base predicts another target: its error is less than half as large for another prediction type.

    A model that has since learnt its new target as well as the base predicts its own is not wrong any more.
    """
    types = course.base.types
    if not course.conditions.is_pretrained or course.conditions.prediction_type not in types:
        return None
    others = {name: errors for name, errors in types.items() if name != "own"}
    best = min(others, key=lambda name: float(others[name].mean()))
    interval = mean_interval(np.log(np.maximum(types["own"], 1e-12) / np.maximum(others[best], 1e-12)))
    if not interval.low > TWICE or course.target_error <= float(others[best].mean()):
        return None
    own, other = float(types["own"].mean()), float(others[best].mean())
    text = (
        f"the base predicts {best}: relative to the target's power its squared error is {other:.2f} for {best}, and "
        f"{own:.2f} for {course.conditions.prediction_type}, which it is trained on"
    )
    return Sign(WRONG, interval, "log_error_of_the_target", (text,), f"--prediction_type {best}")


def _has_wrong_captions(course: Course) -> Sign | None:
    """Captions mislead the base: its loss is lower without them, as if they belonged to other images.

    Words that the base doesn't know cost it little; captions that have since come to help are right.
    """
    fit, gain, now = caption_fit(course.base), caption_gain(course.base), caption_gain(course.now)
    if not course.conditions.is_pretrained or fit is None or gain is None or now is None:
        return None
    if not (fit.high < 0 and gain.high < -WORSE) or now.low > 0:
        return None
    text = (
        f"captions don't fit their images: the base's loss with them is {percent(-gain.mean)} its loss without "
        f"({_spread(gain.negated())})"
    )
    return Sign(WRONG, gain.negated(), "caption_loss", (text,), "--caption_column to the captions of these images")


def _has_broken(course: Course) -> Sign | None:
    """The loss is not finite, steps are skipped, or the model is hardly better than one that predicts zero."""
    advice = _rate(course, 0.1)
    trained = course.trained or course.held_out or Interval(math.nan, -math.inf, math.inf)
    if course.conditions.ended:
        return Sign(DIVERGING, trained, "change_trained", (course.conditions.ended,), advice)
    if not trained.is_finite:
        text = "the loss on training images is not a finite number"
        return Sign(DIVERGING, trained, "change_trained", (text,), advice)
    steps, skipped = _since_last(course)
    if 2 * skipped > steps:
        text = f"{skipped} of the last {steps} steps were skipped: their loss or gradient is not a finite number"
        return Sign(DIVERGING, trained, "change_trained", (text,), advice)
    error = course.target_error
    if trained.low > MUCH_WORSE and error >= USELESS:
        text = f"the squared error is {error:.2f} of the target's power, and 1 for a model that predicts zero"
        return Sign(DIVERGING, trained, "change_trained", (text, _about(course, "trained")), advice)
    return None


def _since_last(course: Course) -> tuple[int, int]:
    """Steps, and skipped ones, since the last reading."""
    if len(course.readings) < 2:
        return 0, 0
    before, now = course.readings[-2:]
    return now.step - before.step, now.skipped - before.skipped


def _is_worse(course: Course) -> Sign | None:
    """The loss on training images themselves rises: above the base's, or above its lowest since, and does not fall."""
    if course.trained is None or len(course.readings) < 3:
        return None
    before, lowest = course.readings[-2], min(course.readings, key=lambda each: float(np.log(each.trained).mean()))
    last, risen = course.since(before), course.since(lowest)
    # one reading above may be a warm-up; two in a row that don't fall are not
    was = Course(course.readings[:-1], course.conditions)
    is_above = course.trained.low > WORSE and was.trained is not None and was.trained.low > WORSE
    has_risen = risen is not None and risen.low > MUCH_WORSE and before is not lowest
    if not (is_above or has_risen) or last is None or last.high < 0:
        return None
    text = _about(course, "trained") if is_above else f"the loss on training images is {percent(risen.mean)} its lowest"
    return Sign(DIVERGING, course.trained if is_above else risen, "change_trained", (text,), _rate(course, 0.1))


def _is_copying(course: Course) -> Sign | None:
    """Most samples are nearer to a training image than half the distance at which held-out images are."""
    copies = np.array(course.conditions.copies)
    if len(copies) < 2:
        return None
    share = share_interval(copies < HALF)
    if share.mean <= HALF:
        return None
    near = "nearly training images: less than half as far as held-out images are"
    text = f"{share.mean:.0%} of {len(copies)} samples are {near}"
    return Sign(COPYING, share, "copies", (text,), _length(course))


def _length(course: Course) -> str:
    step = course.best.step or max(1, course.now.step // 4)
    return f"--max_train_steps {step} (was {course.conditions.total_steps})"


def _is_overfitting(course: Course) -> Sign | None:
    """Training images improve, held-out images less, and these are worse than the base or than they were."""
    if course.trained is None or course.held_out is None or not course.trained.high < 0:
        return None
    one, other = (change(getattr(course.now, kind), getattr(course.base, kind)) for kind in ("held_out", "trained"))
    gap = float(one.mean() - other.mean())
    fewest = min(len(one), len(other))
    error = math.sqrt(one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other)) if fewest > 1 else math.inf
    half = t_quantile(fewest - 1) * error
    risen = course.since(course.best, "held_out")
    is_above = course.held_out.low > 0
    has_risen = course.best.step > 0 and risen is not None and risen.low > RISEN
    if gap - half <= WORSE or not (is_above or has_risen):
        return None
    text = f"the loss is {percent(course.trained.mean)} the base's on training images, and on held-out images "
    text += (
        f"{percent(course.held_out.mean)} it"
        if is_above
        else f"{percent(risen.mean)} the lowest, of step {course.best.step}"
    )
    return Sign(OVERFITTING, Interval(gap, gap - half, gap + half), "gap", (text,), _length(course))


def _is_forgetting(course: Course) -> Sign | None:
    """Predictions for captions outside the data have moved by more than DRIFTED of the base's own squared error."""
    found = course.drift
    if found is None or not course.conditions.is_pretrained or not found.low > DRIFTED:
        return None
    text = (
        f"predictions for captions outside of the data changed by {found.mean:.0%} of the base's squared error (95 % "
        f"interval {found.low:.0%} to {found.high:.0%})"
    )
    return Sign(FORGETTING, found, "drift", (text, *_abouts(course)), _rate(course, 0.2))


def _is_still(course: Course) -> Sign | None:
    """Nothing was learnt: the predictions hardly moved, or at the end no loss is lower."""
    improved, moved = course.improved, course.moved
    is_last = course.now.step >= course.conditions.total_steps
    if improved is None or not (course.now.learnt >= SETTLED or is_last):
        return None
    if moved is not None and moved.high < STILL and improved.low > -2 * math.sqrt(STILL):
        text = f"predictions on training images moved by {moved.mean:.1e} of the base's squared error, so hardly at all"
        cure = "--ema_decay 0.99" if course.conditions.is_averaged else _rate(course, 10)
        return Sign(NOT_LEARNING, improved, "improvement", (text, *_abouts(course)), cure)
    if is_last and not course.is_lower:
        # predictions that moved far without a lower loss need smaller steps, others larger ones
        factor = 0.3 if moved is not None and moved.mean > -2 * min(0.0, improved.mean) else 3
        return Sign(NOT_LEARNING, improved, "improvement", _abouts(course), _rate(course, factor))
    return None


def _is_learning(course: Course) -> Sign | None:
    """The loss is lower than the base's, as `Course.is_lower` says, and not only by a step of the first few updates."""
    if not course.is_lower or (course.moved is not None and course.moved.high < STILL):
        return None
    advice = "--validation_split 0.05" if course.held_out is None else ""
    is_held_out = course.held_out is not None and course.held_out.mean < 0 and math.isfinite(course.held_out.low)
    interval, signal = (course.held_out, "change_held_out") if is_held_out else (course.improved, "improvement")
    doubt = () if interval.high < 0 else ("its interval includes no change: measure more images, or train longer",)
    return Sign(LEARNING, interval, signal, (*_abouts(course), *doubt), advice)


def _about(course: Course, kind: str) -> str:
    """A sentence on the change of a loss."""
    found = {"trained": course.trained, "held_out": course.held_out}[kind]
    images = {"trained": "training images", "held_out": "held-out images"}[kind]
    base = "the base's" if course.conditions.is_pretrained else "that of the first weights"
    return f"the loss on {images} is {percent(found.mean)} {base} ({_spread(found)})"


def _abouts(course: Course) -> tuple[str, ...]:
    """Sentences on what is known, held-out images first."""
    known = [_about(course, "held_out")] if course.held_out is not None else []
    known += [_about(course, "trained")] if course.trained is not None else []
    return tuple(known)


# in this order: what makes later ones meaningless comes first
RULES = (_has_broken, _is_wrong, _is_copying, _is_overfitting, _is_forgetting, _is_worse, _is_still, _is_learning)


def signs(readings: Sequence[Reading], conditions: Conditions) -> list[Sign | None]:
    """Returns what each reading shows, with those before it; None while nothing is certain."""
    found: list[Sign | None] = []
    for count in range(1, len(readings) + 1):
        is_whole = count == len(readings)
        # how the run ended, and its last samples, say nothing of earlier steps
        known = conditions if is_whole else replace(conditions, ended="", copies=())
        course = Course(readings[:count], known)
        found.append(next((sign for rule in RULES if (sign := rule(course))), None))
    return found


def judge(readings: Sequence[Reading], conditions: Conditions) -> Verdict | None:
    """Returns the verdict after the last reading; None while nothing is certain.

    Args:
        readings: the measurements in the order of their steps, that of the base first.
        conditions: what else is known of the run.
    """
    found, course = signs(readings, conditions), Course(readings, conditions)
    sign = found[-1]
    if sign is None and course.now.step < conditions.total_steps:
        return None
    sign = sign or Sign(NOT_LEARNING, Interval(math.nan, -math.inf, math.inf), "", ("no change is certain",), "")
    # The first reading of those in a row that say the same.
    since = readings[-1].step
    same = (COPYING, OVERFITTING) if sign.word == COPYING else (sign.word,)  # copies are looked for at the end alone
    for reading, each in zip(reversed(readings), reversed(found), strict=True):
        if each is None or each.word not in same:
            break
        since = reading.step
    cannot = ()
    if course.held_out is None:
        cannot = ("without held-out images overfitting and copying can't be told: --validation_split 0.05 would",)
    more = [each for each in _abouts(course) if each not in sign.evidence]
    evidence = (*sign.evidence, *more, *cannot)
    return Verdict(
        sign.word, sign.interval, sign.signal, since, course.best.step, sign.advice, evidence, course.signals()
    )
