"""The training benchmark: its gates fail on what they are for, its ratios are ratios, and its launcher counts."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import gates, train
from benchmarks.turns import Turns, quantile, ratio, steps_to_pay
from tests.launching import succeed
from tests.repository import ROOT

NAMES = ("conv.weight", "norm.bias", "out.weight")


def tensors(scale: float = 1.0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Three tensors of one magnitude."""
    random = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(24, 5, generator=random) for name in NAMES}


def nudged(values: dict[str, torch.Tensor], relative: float) -> dict[str, torch.Tensor]:
    """The same, but for an error of that relative size in each tensor."""
    noise = tensors(seed=1)
    return {name: each + relative * noise[name] * each.norm() / noise[name].norm() for name, each in values.items()}


# Gates


def test_gradients_in_float32_are_held_to_the_plain_ones():
    plain = tensors()
    assert gates.gradients_agree(nudged(plain, 5e-5), plain, "fp32").holds
    verdict = gates.gradients_agree(nudged(plain, 2e-4), plain, "fp32")
    assert not verdict.holds
    assert any(name in verdict.says for name in NAMES)


@pytest.mark.parametrize(
    ("rounding", "error", "holds"), [(0.02, 0.04, True), (0.02, 0.08, False), (0.1, 0.2, True), (0.2, 0.35, False)]
)
def test_gradients_in_bfloat16_may_be_twice_as_far_off_float32_as_the_plain_ones(rounding, error, holds):
    exact = tensors()
    verdict = gates.gradients_agree(nudged(exact, error), nudged(exact, rounding), "bf16", exact)
    assert verdict.holds == holds
    assert not gates.gradients_agree({}, nudged(exact, rounding), "bf16", exact).holds


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spoil", ["doubled", "upside down", "zero", "nan", "swapped"])
def test_a_wrong_gradient_of_one_tensor_fails(precision, spoil):
    plain, fast = tensors(), tensors()
    wrong = {
        "doubled": 2 * plain["norm.bias"],
        "upside down": -plain["norm.bias"],
        "zero": torch.zeros(24, 5),
        "nan": torch.full((24, 5), math.nan),
        "swapped": plain["norm.bias"].flip(0),
    }
    fast["norm.bias"] = wrong[spoil]
    exact = None if precision == "fp32" else nudged(plain, 0.02)
    verdict = gates.gradients_agree(fast, plain, precision, exact)
    assert not verdict.holds
    assert "norm.bias" in verdict.says


def test_gradients_of_other_tensors_fail():
    plain = tensors()
    missing = {name: plain[name] for name in NAMES[1:]}
    assert not gates.gradients_agree(missing, plain, "fp32").holds
    assert not gates.gradients_agree(plain, missing, "fp32").holds
    assert not gates.gradients_agree(plain | {"out.weight": torch.ones(3)}, plain, "fp32").holds
    assert not gates.gradients_agree({}, {}, "fp32").holds


def test_a_gradient_that_is_rounding_need_not_agree():
    plain, fast = tensors(), tensors()
    plain["norm.bias"], fast["norm.bias"] = 1e-8 * torch.randn(24, 5), 1e-8 * torch.randn(24, 5)
    assert gates.gradients_agree(fast, plain, "fp32").holds
    fast["norm.bias"] = 1e-3 * torch.randn(24, 5)
    assert not gates.gradients_agree(fast, plain, "fp32").holds


def test_losses_stay_within_three_spreads():
    plain = [1 - step / 100 for step in range(50)]
    varied = [loss + 1e-3 for loss in plain]
    assert gates.losses_agree([loss - 2.9e-3 for loss in plain], plain, varied, "fp32").holds
    assert not gates.losses_agree([loss - 3.1e-3 for loss in plain], plain, varied, "fp32").holds


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_drifting_loss_fails(precision):
    plain = [1 - step / 100 for step in range(50)]
    drifting = [loss + 2e-3 * step for step, loss in enumerate(plain)]
    verdict = gates.losses_agree(drifting, plain, plain, precision)
    assert not verdict.holds
    assert "step 50" in verdict.says
    assert not gates.losses_agree([*plain[:-1], math.nan], plain, plain, precision).holds
    assert not gates.losses_agree(plain[:-1], plain, plain, precision).holds
    assert gates.losses_agree([loss * (1 + 2e-4) for loss in plain], plain, plain, precision).holds


def moved(start: dict[str, torch.Tensor], update: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights after an update."""
    return {name: each + update[name] for name, each in start.items()}


def test_updates_in_the_same_direction_hold():
    start, update = tensors(), tensors(1e-2, seed=2)
    plain, varied = moved(start, update), moved(start, nudged(update, 1e-3))
    assert gates.updates_agree(start, moved(start, nudged(update, 0.1)), plain, varied).holds
    assert not gates.updates_agree(start, moved(start, nudged(update, 0.4)), plain, varied).holds


@pytest.mark.parametrize("spoil", ["frozen", "backwards", "nan", "halved too often"])
def test_a_wrong_update_of_one_tensor_fails(spoil):
    start, update = tensors(), tensors(1e-2, seed=2)
    update["norm.bias"] *= 1e-2  # so small that the cosine of all does not see it
    plain, varied = moved(start, update), moved(start, nudged(update, 1e-3))
    factors = {"frozen": 0.0, "backwards": -1.0, "nan": math.nan, "halved too often": 0.25}
    fast = moved(start, update | {"norm.bias": factors[spoil] * update["norm.bias"]})
    verdict = gates.updates_agree(start, fast, plain, varied)
    assert not verdict.holds
    assert "norm.bias" in verdict.says


def test_an_update_that_nobody_reproduces_counts_only_in_all():
    start, update = tensors(), tensors(1e-2, seed=2)
    noise = {seed: update | {"norm.bias": 1e-4 * tensors(seed=seed)["norm.bias"]} for seed in (3, 4, 5)}
    fast, plain, varied = (moved(start, noise[seed]) for seed in (3, 4, 5))
    assert gates.updates_agree(start, fast, plain, varied).holds
    assert not gates.updates_agree(start, start, start, start).holds


def test_an_export_has_to_load_alone_and_draw():
    good = {"loss": 0.5, "draws": True}
    assert gates.export_loads(good, alone=True).holds
    assert not gates.export_loads(good, alone=False).holds
    assert not gates.export_loads(good | {"draws": False}, alone=True).holds
    assert not gates.export_loads(good | {"loss": math.nan}, alone=True).holds
    assert "no such file" in gates.export_loads({"why": "OSError: no such file"}, alone=True).says


# Numbers


def record(seconds: list[float], start: float = 10.0, **phases: float) -> dict:
    """A record of as many steps after the first."""
    steps = [{"seconds": start, "phases": {"caching": 4.0, "loading": 1.0}, "calls": {"synchronising": 99}}]
    steps += [{"seconds": each, "phases": phases, "calls": {"synchronising": 2}} for each in seconds]
    return {"main_seconds": 3.0, "steps": steps, "device_seconds": [], "memory": {"steps": 5}, "sites": {}}


def test_what_a_record_comes_to():
    phases = {"data": 0.1, "encoders": 0.2, "forward": 0.3, "backward": 0.5, "optimizer": 0.2, "ema": 0.1}
    turns = Turns([record([9.0, 2.0, 2.0], **phases), record([9.0, 1.0, 1.0], **phases)], warm_up=2, batch=4)
    assert turns.seconds_by_turn == [[2.0, 2.0], [1.0, 1.0]]
    assert turns.step_seconds == 1.5
    assert turns.images_per_second == pytest.approx((3.0, 2.0, 4.0))
    assert turns.share(turns.phase_seconds("data")) == pytest.approx(0.1 / 1.5)
    assert turns.outside_seconds == pytest.approx(1.5 - 1.1)
    assert turns.host_seconds == pytest.approx(1.5 - 1.4)
    assert turns.synchronising == 2
    assert (turns.start_seconds(), turns.start_seconds("main"), turns.start_seconds("caching")) == (10.0, 3.0, 4.0)


def test_on_a_gpu_steps_are_timed_between_events():
    timed = record([9.0, 2.0, 2.0], data=0.25, blocked=0.75) | {"device_seconds": [9.0, 1.0, 1.5]}
    turns = Turns([timed], warm_up=2, batch=4)
    assert turns.seconds_by_turn == [[1.0, 1.5]]
    assert turns.host_seconds == pytest.approx(1.0)


def test_a_ratio_and_its_interval():
    value, low, high = ratio([[1.0, 1.0, 1.1], [1.0, 0.9, 1.0]], [[2.0, 2.2, 2.0], [2.0, 2.0, 1.8]])
    assert value == pytest.approx(2.0)
    assert low <= value <= high
    assert low > 1.6
    assert high < 2.5
    steady = ratio([[1.0] * 5] * 3, [[1.5] * 5] * 3)
    assert tuple(steady) == (1.5, 1.5, 1.5)
    rounds_differ = ratio([[1.0] * 50, [1.0] * 50, [1.0] * 50], [[1.0] * 50, [2.0] * 50, [3.0] * 50])
    assert rounds_differ.low < 1.5
    assert rounds_differ.high > 2.5


def test_quantiles_are_numpys():
    import numpy as np

    values = sorted(np.random.default_rng(0).normal(size=31).tolist())
    for share in (0.1, 0.5, 0.9, 1.0):
        assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)))


def test_when_a_longer_start_has_paid():
    ours, theirs = (Turns([record([seconds] * 3, start)], 1, 1) for seconds, start in ((1.0, 30.0), (1.5, 10.0)))
    assert steps_to_pay(ours, theirs) == pytest.approx(41)  # 30 + 40 * 1.0 = 10 + 40 * 1.5
    assert steps_to_pay(theirs, ours) == 1
    slower = Turns([record([2.0] * 3, 40.0)], 1, 1)
    assert steps_to_pay(slower, theirs) == math.inf


# The launcher

SCRIPT = """
import argparse, torch
from torch.utils.data import DataLoader
from diffusers.models.unets.unet_2d import UNet2DModel

argparse.ArgumentParser().parse_known_args()
torch.manual_seed(0)
model = UNet2DModel(3, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
inner = torch.optim.SGD(model.parameters(), lr=0.0)
optimizer.register_step_pre_hook(lambda *_: inner.step())  # a step within a step
for batch in DataLoader(torch.arange(24.0).reshape(8, 3), batch_size=2):
    for half in batch.split(1):
        loss = model(half).mean() / 2
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss.item(), float(loss)
    if batch.sum() > 1e9:
        pass
raise SystemExit(3)
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small script's record."""
    folder = tmp_path_factory.mktemp("launched")
    package = folder / "diffusers" / "models" / "unets"
    package.mkdir(parents=True)
    for place in (package, package.parent, package.parent.parent):
        (place / "__init__.py").touch()
    (package / "unet_2d.py").write_text("import torch\nclass UNet2DModel(torch.nn.Linear):\n    pass\n")
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, ROOT / "benchmarks" / "launch.py", "--record", folder, "--keep_gradients"]
    done = subprocess.run([*command, "--profile_steps", "3", folder / "script.py", "--flag"], check=False)
    assert done.returncode == 3
    return folder


def test_the_launcher_counts_steps_phases_and_waits(launched):
    found = json.loads((launched / "record.json").read_text())
    assert len(found["steps"]) == 4
    assert 0 < found["main_seconds"] < found["steps"][0]["seconds"]
    for step in found["steps"][1:]:
        assert step["calls"] == {"synchronising": 3}  # item, float, bool; not what the loader and the optimizer do
        assert set(step["phases"]) == {"data", "forward", "backward", "optimizer", "blocked"}
        assert sum(step["phases"].values()) < step["seconds"]
    places = {name.split(" in ")[0]: name.split(" in ")[1] for name in found["sites"]}
    assert set(places) == {"item", "__float__", "__bool__"}
    assert all(place.startswith("script.py:") for place in places.values())
    assert found["memory"]["steps"] > 1e7
    assert (launched / "profile").stat().st_size


def test_the_launcher_keeps_losses_and_gradients(launched):
    found = json.loads((launched / "record.json").read_text())
    torch.manual_seed(0)
    model, data = torch.nn.Linear(3, 1), torch.arange(24.0).reshape(8, 3)
    loss = model(data[:2]).mean()
    loss.backward()
    assert len(found["losses"]) == 4
    assert found["losses"][0] == pytest.approx(loss.item())
    kept = load_file(launched / "gradients.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(kept[name], parameter.grad)


# The command


def test_help_imports_no_torch():
    code = "import sys; sys.argv = ['train.py', '--help']\nimport benchmarks.train as train\ntry:\n    train.main()\n"
    code += "except SystemExit:\n    print('torch' in sys.modules, 'numpy' in sys.modules)"
    shown = succeed([sys.executable, "-c", code])
    assert shown.split()[-2] == "False"
    assert "--peer_script" in shown


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--size", "true"], "--size must be tiny or small without a GPU"),
        (["--batch", "3"], "--batch must be even"),
        (["--steps", "5", "--warm_up", "10"], "--steps must be at least 12"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--peer_script", "nowhere.py"], "--peer_script must be a file"),
        (["--peer_script", "train_unconditional.py"], "try --case unconditional"),
        (["--peer_script", "evaluate_pipeline.py"], "--peer_script must be train_text_to_image.py"),
    ],
)
def test_what_can_not_be_is_refused(flags, named, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.main(["--case", "sd", "--folder", str(tmp_path), *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert named in lines[0]


def test_the_fast_path_has_what_the_script_offers_and_the_case_can_have():
    offered = (
        "  --cache_latents [CACHE_LATENTS], --cache-latents\n  --fused_adamw FUSED, --fused-adamw\n  --foreach_ema "
    )
    offered += "[F]\n  --dataloader_num_workers N\n"
    names = {
        case: {name for name, each in train.OPTIMISATIONS.items() if each.is_for(train.CASES[case], "fp32", offered)}
        for case in train.CASES
    }
    assert names["sd"] == {"cache", "fused_adamw", "foreach_ema", "workers"}
    assert names["lora"] == names["sd"] - {"foreach_ema"}
    assert names["unconditional"] == names["sd"] - {"cache"}
    possible = {name: each for name, each in train.OPTIMISATIONS.items() if name in names["sd"]}
    assert train.flags_with(possible, ["fused_adamw"]) == (
        ["--dataloader_num_workers", "0", "--fused_adamw", "true", "--no_foreach_ema"]
    )
    assert not train.OPTIMISATIONS["bf16_weights"].is_for(train.CASES["sd"], "fp32", "  --bf16_weights [x]")
    assert train.OPTIMISATIONS["bf16_weights"].is_for(train.CASES["sd"], "bf16", "  --bf16_weights [x]")


def test_a_peer_is_tuned_as_far_as_its_script_goes():
    both = 'add("--foreach_ema")\nadd("--use_ema")'
    assert train.tuned_flags(both, 16) == ["--dataloader_num_workers", "8", "--foreach_ema"]
    assert train.tuned_flags('add("--use_ema")', 2) == ["--dataloader_num_workers", "2"]


@pytest.mark.parametrize("said", ["CUDA out of memory", "no such file"])
def test_a_peer_checkpoints_only_where_memory_is_short(said, monkeypatch, tmp_path):
    def fail(contest, side, place):
        assert side.flags == ["--a", "--max_train_steps", "3"]
        place.mkdir(parents=True)
        (place / "log").write_text(said)
        raise train.ChildError(said)

    monkeypatch.setattr(train, "has_gpu", lambda: True)
    monkeypatch.setattr(train, "take_turn", fail)
    side = train.Side("peer", Path("script.py"), ["--a"], ["--a"], is_peer=True)
    contest = train.contest_of(train.parse_arguments(["--case", "sd", "--size", "tiny", "--folder", str(tmp_path)]))
    if "memory" in said:
        assert train.that_fits(contest, side).changes == ["--a", "--gradient_checkpointing"]
        return
    with pytest.raises(train.ChildError):
        train.that_fits(contest, side)


def test_a_gate_that_fails_prints_no_speed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(train.Contest, "make_assets", lambda self: None)
    monkeypatch.setattr(train, "possible_optimisations", lambda contest: {})
    verdicts = [gates.Verdict("gradients", True, "fine"), gates.Verdict("losses", False, "they drift")]
    monkeypatch.setattr(train, "check", lambda *_: verdicts)
    monkeypatch.setattr(train, "take_turns", lambda *_: pytest.fail("it went on"))
    assert train.main(["--case", "sd", "--size", "tiny", "--folder", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "no speed is printed: losses" in shown
    assert "images/s" not in shown


@pytest.mark.nightly
def test_the_smallest_case_without_a_peer(tmp_path):
    flags = ["--case", "unconditional", "--size", "tiny", "--rounds", "1", "--steps", "6", "--warm_up", "2"]
    command = [sys.executable, "benchmarks/train.py", *flags, "--check_steps", "4", "--threads", "1"]
    shown = succeed([*command, "--folder", tmp_path])
    assert shown.count("| yes |") >= 4
    assert "images/s" in shown
    assert "GFLOPs per image" in shown
