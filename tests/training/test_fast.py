"""`--fast`: which parts it turns on where, and that a part whose check fails is left out by name."""

import json
import logging
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.comparing import assert_same_bits, losses, weights
from tests.conftest import mostly_slow
from utils.config.options import UserError
from utils.models import attention
from utils.models.attention import Call, Recorder, race
from utils.models.options import CPU_ATTENTION
from utils.training.fast import PARTS, Circumstances, hastened, offer, paying_parts
from utils.training.options import SpeedOptions
from utils.training.speed import Compilation, as_before, compile_denoiser

HOPPER = Circumstances(
    device="cuda",
    capability=(9, 0),
    precision="bf16",
    trains_base=True,
    sizes_vary=False,
    can_compile=True,
    is_spread=False,
    is_deterministic=False,
)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["bf16_weights", "channels_last", "compile", "cudnn_benchmark"]),
        ({"trains_base": False}, ["channels_last", "compile", "cudnn_benchmark"]),
        ({"precision": "fp16"}, ["channels_last", "compile", "cudnn_benchmark"]),
        ({"precision": "no"}, ["cudnn_benchmark"]),
        ({"capability": (6, 1)}, ["bf16_weights", "cudnn_benchmark"]),
        ({"sizes_vary": True}, ["bf16_weights", "channels_last", "compile"]),
        ({"is_deterministic": True}, ["bf16_weights", "channels_last", "compile"]),
        ({"can_compile": False}, ["bf16_weights", "channels_last", "cudnn_benchmark"]),
        ({"is_spread": True}, []),
        ({"device": "cpu", "capability": (0, 0)}, ["bf16_weights"]),
        ({"device": "cpu", "capability": (0, 0), "precision": "no"}, []),
        ({"device": "mps", "capability": (0, 0)}, []),
    ],
    ids=str,
)
def test_what_pays_where(changes, names):
    assert [part.name for part in paying_parts(SpeedOptions(fast=True), replace(HOPPER, **changes))] == names


def test_what_is_given_is_left_as_it_is(caplog):
    caplog.set_level(logging.INFO)
    given = SpeedOptions(fast=True, compile="denoiser", channels_last=True)
    parts = paying_parts(given, HOPPER)
    found = hastened(given, parts)
    assert (found.compile, found.channels_last, found.bf16_weights, found.cudnn_benchmark) == ("denoiser",) + (
        True,
    ) * 3
    assert "--fast turns on: --bf16_weights (weights are cast once per step), --cudnn_benchmark (" in caplog.text
    plain = SpeedOptions()
    assert hastened(plain, paying_parts(plain, HOPPER)) is plain


def test_the_log_says_what_it_would_add(caplog):
    caplog.set_level(logging.INFO)
    offer(SpeedOptions(), list(PARTS))
    assert "--fast would add: --bf16_weights (" in caplog.text
    assert "--compile blocks (fewer, larger kernels)" in caplog.text
    caplog.clear()
    offer(SpeedOptions(fast=True), list(PARTS))
    offer(SpeedOptions(), [])
    assert not caplog.text


def test_a_run_is_that_of_its_parts(train, caplog):
    caplog.set_level(logging.INFO)
    flags = ["--max_train_steps", 2, "--mixed_precision", "bf16"]
    plain = train("sd", *flags, "--bf16_weights", out="plain")
    fast = train("sd", *flags, "--fast", out="fast")
    assert "--fast turns on: --bf16_weights" in caplog.text
    assert losses(fast) == losses(plain)
    assert_same_bits(weights(fast), weights(plain))
    caplog.clear()
    train("sd", *flags, out="without")
    assert "--fast would add: --bf16_weights (weights are cast once per step)" in caplog.text
    caplog.clear()
    train("pixels", "--max_train_steps", 1, "--fast", out="pixels")
    assert "--fast turns on: nothing more that pays here" in caplog.text


def test_a_part_whose_gate_fails_is_left_out(train, caplog, monkeypatch):
    def refuse(denoiser: nn.Module, how: Compilation, *_: object) -> None:
        compile_denoiser(denoiser, how)
        raise UserError("--compile: the compiled gradient of conv_in.weight is 44 % off; leave it out")

    monkeypatch.setattr("utils.training.speed_up.compile_checked", refuse)
    monkeypatch.setattr("utils.training.fast.Circumstances.has_tensor_cores", property(lambda self: True))
    monkeypatch.setattr("utils.training.fast.importlib.util.find_spec", lambda name: object())
    flags = ["--max_train_steps", 2]
    fast = train("sd", *flags, "--fast", out="fast")
    assert "--fast leaves out --compile blocks: the compiled gradient of conv_in.weight is 44 % off" in caplog.text
    assert losses(fast) == pytest.approx(losses(train("sd", *flags, out="plain")), rel=1e-4)
    train("sd", *flags, "--compile", "blocks", expect=2, out="asked")  # what was asked for ends the run


def test_a_denoiser_is_as_before(monkeypatch):
    from diffusers.models.resnet import ResnetBlock2D

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = nn.Sequential(ResnetBlock2D(in_channels=8, temb_channels=None, groups=4))
    compile_denoiser(model, Compilation("blocks"))
    assert model[0]._compiled_call_impl is not None
    as_before(model)
    assert model[0]._compiled_call_impl is None


def recorded(**named: object) -> dict[Call, int]:
    query = torch.randn(2, 4, 16, 8)
    with Recorder() as recorder:
        functional.scaled_dot_product_attention(query, query, query, **named)
        functional.scaled_dot_product_attention(query, key=query[:, :, :5], value=query[:, :, :5], dropout_p=0.0)
        functional.scaled_dot_product_attention(query, query, query)
    return dict(recorder.calls)


def test_calls_of_attention_are_counted_but_for_masked_ones():
    shapes = [torch.Size((2, 4, count, 8)) for count in (16, 5)]
    own, of_words = (Call(shapes[0], shape, shape, torch.float32) for shape in shapes)
    assert recorded() == {own: 2, of_words: 1}
    assert recorded(attn_mask=torch.ones(16, 16, dtype=torch.bool)) == {own: 1, of_words: 1}


@pytest.mark.parametrize(
    ("seconds", "wrong", "winner"),
    [
        ({None: 1.0, "flash": 0.5, "math": 0.7}, (), "flash"),
        ({None: 1.0, "flash": 0.5, "math": 0.7}, ("flash",), "math"),
        ({None: 1.0, "flash": 0.98, "math": 1.2}, (), ""),
        ({None: 1.0, "flash": 0.5, "math": 0.7}, ("flash", "math"), ""),
    ],
    ids=str,
)
def test_the_race_is_won_by_the_fastest_that_is_right(monkeypatch, seconds, wrong, winner):
    current = []

    @contextmanager
    def by(kernel):
        current.append(kernel)
        yield
        current.pop()

    passed = attention._passed

    def changed(inputs):
        found = passed(inputs)
        return [found[0], found[1], found[2] * 1.1, found[3]] if current and current[-1] in wrong else found

    monkeypatch.setattr(attention, "attention_by", by)
    monkeypatch.setattr(attention, "_passed", changed)
    monkeypatch.setattr(attention, "_seconds", lambda *_: seconds[current[-1]])
    assert race(recorded(), ["flash", "math"], torch.device("cpu")) == winner


def test_a_real_race_ends():
    assert race(recorded(), CPU_ATTENTION, torch.device("cpu")) in ("", *CPU_ATTENTION)


@pytest.mark.parametrize("winner", mostly_slow(["math", ""], "math"))
def test_what_won_is_kept_for_a_resumed_run(train, monkeypatch, caplog, winner):
    """On a stand-in for a GPU: a race is run once, and its winner computes from the first step on."""
    races = []

    def raced(calls, kernels, device):
        races.append(len(calls))
        return winner

    monkeypatch.setattr("utils.training.speed_up.race", raced)
    monkeypatch.setattr("utils.training.speed_up.RACED_ON", ("cpu",))
    flags = ["--fast", "--checkpointing_steps", 2]
    out = train("sd", *flags, "--max_train_steps", 2)
    assert json.loads((out / "checkpoint-2" / "training_state.json").read_text())["attention"] == winner
    train("sd", *flags, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    assert len(races) == 1
    assert races[0] > 0
    train("sd", *flags, "--max_train_steps", 1, "--deterministic", out="deterministic")
    train("sd", *flags, "--max_train_steps", 1, "--attention_backend", "math", out="asked")
    train("sd", "--max_train_steps", 1, out="plain")
    assert len(races) == 1
