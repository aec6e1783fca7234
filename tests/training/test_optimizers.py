"""Each optimizer and schedule of the tables against its formula or its package's own result."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import train_unconditional
from tests import tiny
from tests.comparing import assert_same_bits, losses, weights
from tests.conftest import mostly_slow, reset_accelerate
from utils.config.options import UserError
from utils.runtime.sharding import spread_like
from utils.training.checkpoint import read_state
from utils.training.optimizer_options import SCHEDULES, WITHOUT_WARMUP, OptimizerOptions, ScheduleOptions
from utils.training.optimizer_table import OPTIMIZERS
from utils.training.optimizers import NamedParameter, build_optimizer, parameter_groups, rate_factor
from utils.training.per_parameter import PerParameter


class TestStates:
    def test_state_is_laid_out_as_its_weight(self):
        weight = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
        value = torch.arange(48, dtype=torch.uint8).view(4, 3, 2, 2)
        found = spread_like(value, weight)
        assert found.stride() == weight.stride()
        assert torch.equal(found, value)
        assert spread_like(torch.tensor(3.0), weight).shape == ()
        assert spread_like(7, weight) == 7

    @pytest.mark.parametrize("in_backward", [False, True])
    def test_paged_state_is_paged_again_when_it_is_loaded(self, monkeypatch, in_backward):
        options = OptimizerOptions(optimizer="paged_adamw8bit")
        weight = nn.Parameter(torch.randn(64, 128))

        def build() -> torch.optim.Optimizer:
            named = [NamedParameter("weight", weight, 1e-3)]
            return PerParameter(named, options, True, 0) if in_backward else build_optimizer(named, options)

        first = build()
        weight.grad = torch.randn_like(weight)
        (first._parts[0] if in_backward else first).step()
        saved = first.state_dict() if not in_backward else {"state": {0: dict(first.state[weight])}, "param_groups": []}
        second = build()
        if in_backward:
            saved["param_groups"] = [{} for _ in second.param_groups]
        owner = second._parts[0] if in_backward else second
        buffers = []

        def paged(parameter, dtype):
            buffers.append(torch.zeros_like(parameter, dtype=dtype))
            return buffers[-1]

        monkeypatch.setattr(owner, "get_state_buffer", paged, raising=False)
        second.load_state_dict(saved)
        state = second.state[weight]
        assert len(buffers) == 2
        assert state["state1"] is buffers[0]
        assert state["state2"] is buffers[1]
        for name in ("state1", "state2"):
            assert torch.equal(state[name], first.state[weight][name])

    @pytest.mark.parametrize(("name", "most"), [("adamw8bit", 0), ("lion", 0), ("paged_adamw8bit", 1)])
    def test_8_bit_optimizers_wait_for_the_device_once_a_step_at_most(self, monkeypatch, name, most):
        module = pytest.importorskip("bitsandbytes").optim.optimizer
        waits = []
        monkeypatch.setattr(module, "sync_gpu", lambda tensor: waits.append(tensor))
        weights = [nn.Parameter(torch.randn(64, 128)) for _ in range(5)]
        named = [NamedParameter(f"weight{number}", each, 1e-3) for number, each in enumerate(weights)]
        optimizer = build_optimizer(named, OptimizerOptions(optimizer=name))
        for _ in range(3):
            for each in weights:
                each.grad = torch.randn_like(each)
            optimizer.step()
        assert len(waits) == 3 * most
        assert all(np.isfinite(each.detach().numpy()).all() for each in weights)


STEPS = 4
RATE = 1e-2


def gradients() -> list[dict[str, torch.Tensor]]:
    """The gradients of a matrix, a convolution and a bias in a few steps."""
    torch.manual_seed(1)
    shapes = {"matrix": (96, 64), "convolution": (16, 16, 3, 3), "bias": (16,)}
    return [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(STEPS)]


def start() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn_like(gradient)) for name, gradient in gradients()[0].items()}


def moved(make) -> dict[str, torch.Tensor]:
    """Where an optimizer, made of the named parameters, moves them."""
    parameters = start()
    optimizer = make(parameters)
    for gradient in gradients():
        for name, parameter in parameters.items():
            parameter.grad = gradient[name].clone()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def ours(name: str, **options: float) -> dict[str, torch.Tensor]:
    made = OptimizerOptions(optimizer=name, learning_rate=RATE, **options)
    return moved(lambda named: build_optimizer([NamedParameter(key, each, RATE) for key, each in named.items()], made))


def groups(parameters: dict[str, nn.Parameter]) -> list[dict]:
    """Weight decay on all but the bias."""
    bias = parameters["bias"]
    others = [parameter for parameter in parameters.values() if parameter is not bias]
    return [{"params": others, "weight_decay": 0.01}, {"params": [bias], "weight_decay": 0.0}]


def orthogonalized(update: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz as Jordan et al. (2024) have it, in bfloat16."""
    a, b, c = 3.4445, -4.775, 2.0315
    x = update.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if is_tall else x).float()


class TestOptimizers:
    def check(self, name: str, expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
        for key, value in ours(name).items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=tolerance, msg=key)

    def test_adamw(self):
        expected = {}
        for name, parameter in start().items():
            weight, mean, square = parameter.detach().double(), 0.0, 0.0
            for step, gradient in enumerate(gradients(), start=1):
                gradient = gradient[name].double()
                mean = 0.9 * mean + 0.1 * gradient
                square = 0.999 * square + 0.001 * gradient**2
                weight = weight * (1 - RATE * (0.0 if name == "bias" else 0.01))
                weight = weight - RATE * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
            expected[name] = weight.float()
        self.check("adamw", expected)

    def test_lion(self):
        expected = {}
        for name, parameter in start().items():
            weight, mean = parameter.detach().clone(), torch.zeros_like(parameter)
            for gradient in gradients():
                weight = weight * (1 - RATE * (0.0 if name == "bias" else 0.01))
                weight = weight - RATE * (0.9 * mean + 0.1 * gradient[name]).sign()
                mean = 0.99 * mean + 0.01 * gradient[name]
            expected[name] = weight
        self.check("lion", expected)

    def test_muon_for_matrices_and_adamw_for_the_rest(self):
        weight, momentum = start()["matrix"].detach().clone(), torch.zeros(96, 64)
        for gradient in gradients():
            momentum = 0.95 * momentum + 0.05 * gradient["matrix"]
            update = orthogonalized(0.95 * momentum + 0.05 * gradient["matrix"])
            weight = weight * (1 - RATE * 0.01) - RATE * 0.2 * math.sqrt(96) * update
        adamw = ours("adamw")
        self.check("muon", {"matrix": weight, "convolution": adamw["convolution"], "bias": adamw["bias"]}, 2e-3)

    def test_adafactor(self):
        """The matrix by Shazeer and Stern (2018), algorithm 4, at a given rate with relative step and clipping."""
        weight, rows, columns = start()["matrix"].detach().double(), 0.0, 0.0
        for step, gradient in enumerate(gradients(), start=1):
            gradient = gradient["matrix"].double()
            decay = 1 - step**-0.8
            rows = decay * rows + (1 - decay) * gradient.square().mean(1, keepdim=True)
            columns = decay * columns + (1 - decay) * gradient.square().mean(0, keepdim=True)
            update = gradient / (rows @ columns / rows.mean()).sqrt()
            scale = min(RATE, step**-0.5) * max(1e-3, float(weight.square().mean().sqrt()))
            weight = weight * (1 - RATE * 0.01)
            weight = weight - scale * update / max(1.0, float(update.square().mean().sqrt()))
        torch.testing.assert_close(ours("adafactor")["matrix"], weight.float(), rtol=0, atol=1e-4)

    def test_prodigy_and_schedule_free_are_their_packages(self):
        from prodigyopt import Prodigy
        from schedulefree import AdamWScheduleFree

        prodigy = {"use_bias_correction": True, "safeguard_warmup": True}
        self.check("prodigy", moved(lambda named: Prodigy(groups(named), lr=RATE, **prodigy)), 1e-7)

        def schedule_free(named):
            optimizer = AdamWScheduleFree(groups(named), lr=RATE)
            optimizer.train()
            return optimizer

        self.check("schedule_free_adamw", moved(schedule_free), 1e-7)

    def test_paged_is_8_bit(self):
        self.check("paged_adamw8bit", ours("adamw8bit"), 0.0)

    def test_refusals(self):
        with pytest.raises(UserError, match="--optimizer must be one of adamw, "):
            OptimizerOptions(optimizer="adam")
        with pytest.raises(UserError, match="give one"):
            OptimizerOptions(optimizer="lion", use_8bit_adam=True)
        with pytest.raises(UserError, match="leave out --text_encoder_lr"):
            OptimizerOptions(optimizer="prodigy", learning_rate=1.0, text_encoder_lr=0.5)


@pytest.mark.parametrize("name", mostly_slow(OPTIMIZERS, "adamw", "prodigy"))
def test_each_optimizer_learns_and_resumes_bit_by_bit(train, name):
    rate = {"prodigy": 1.0, "lion": 1e-3, "schedule_free_adamw": 1e-2}.get(name, 3e-3)
    flags = ["--optimizer", name, "--learning_rate", rate, "--train_batch_size", 2, "--train_text_encoder"]
    whole = train("sd", *flags, "--max_train_steps", 8, out="whole")
    train("sd", *flags, "--max_train_steps", 4, out="parts")
    parts = train("sd", *flags, "--max_train_steps", 8, "--resume_from_checkpoint", "latest", out="parts")
    assert losses(whole) == losses(parts)
    for file in sorted((whole / "checkpoint-8").rglob("*.safetensors")):
        assert_same_bits(load_file(file), load_file(parts / file.relative_to(whole)))
    assert_same_bits(
        load_file(whole / "unet" / "diffusion_pytorch_model.safetensors"),
        load_file(parts / "unet" / "diffusion_pytorch_model.safetensors"),
    )
    assert sum(losses(whole)[-3:]) < sum(losses(whole)[:3]) + 0.3


def test_schedule_free_exports_the_average(train, capsys):
    flags = ["--optimizer", "schedule_free_adamw", "--learning_rate", 1e-2, "--max_train_steps", 6]
    out = train("sd", *flags, "--train_batch_size", 2)
    name = "diffusion_pytorch_model.safetensors"
    exported, trained = load_file(out / "unet" / name), load_file(out / "checkpoint-6" / "unet" / name)
    state = load_file(out / "checkpoint-6" / "optimizer.safetensors")
    key = "conv_in.weight"
    z = next(tensor for saved, tensor in state.items() if saved.endswith(f"{key}/z"))
    torch.testing.assert_close(exported[key], (trained[key] - 0.1 * z) / 0.9, rtol=1e-4, atol=1e-6)
    train("sd", *flags, "--lr_scheduler", "cosine", out="other", expect=2)
    assert "--lr_scheduler must be constant" in capsys.readouterr().err


class TestSchedules:
    def rates(self, total: int, **options: object) -> list[float]:
        factor = rate_factor(ScheduleOptions(**options), 1.0, total)
        return [factor(step) for step in range(total)]

    def theirs(self, total: int, make) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = make(optimizer)
        rates = []
        for _ in range(total):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return rates

    @pytest.mark.parametrize(("t_0", "t_mult"), [(7, 1), (3, 2), (5, 3)])
    def test_cosine_warm_restarts(self, t_0, t_mult):
        mine = self.rates(100, lr_scheduler="cosine_warm_restarts", lr_t_0=t_0, lr_t_mult=t_mult, lr_warmup_steps=0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts
        assert mine == pytest.approx(self.theirs(100, lambda optimizer: schedule(optimizer, t_0, t_mult)), abs=1e-9)

    def test_step(self):
        mine = self.rates(50, lr_scheduler="step", lr_step_size=8, lr_gamma=0.5, lr_warmup_steps=0)
        schedule = torch.optim.lr_scheduler.StepLR
        assert mine == pytest.approx(self.theirs(50, lambda optimizer: schedule(optimizer, 8, 0.5)))
        warmed = self.rates(50, lr_scheduler="step", lr_step_size=8, lr_gamma=0.5, lr_warmup_steps=5)
        assert warmed[:6] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
        assert warmed[5:] == pytest.approx(mine[:45])

    @pytest.mark.parametrize(("total", "start"), [(50, 0.3), (20, 0.5), (101, 0.1)])
    def test_one_cycle(self, total, start):
        mine = self.rates(total, lr_scheduler="one_cycle", lr_pct_start=start)
        schedule = torch.optim.lr_scheduler.OneCycleLR
        reference = self.theirs(total, lambda optimizer: schedule(optimizer, 1.0, total, pct_start=start))
        assert mine == pytest.approx(reference, abs=1e-9)

    @pytest.mark.parametrize("name", sorted({*SCHEDULES} - {*WITHOUT_WARMUP}))
    @pytest.mark.parametrize(("warmup", "total"), [(50, 100), (51, 100), (99, 100), (100, 100), (500, 300), (500, 2)])
    def test_a_warning_says_what_a_long_warm_up_does(self, name, warmup, total):
        more = {"cosine_warm_restarts": {"lr_t_0": 7}, "step": {"lr_step_size": 9}}.get(name, {})
        options = ScheduleOptions(lr_scheduler=name, lr_warmup_steps=warmup, **more)
        rates, said = self.rates(total, lr_scheduler=name, lr_warmup_steps=warmup, **more), options.warning(total)
        assert bool(said) == (warmup > total / 2)
        if max(rates) < 1:
            assert f"only increases, to {100 * max(rates):.0f} % of --learning_rate" in said
        elif said:
            assert f"only at step {rates.index(1.0) + 1} of {total}; " in said
        assert not said or said.endswith(f"try --lr_warmup_steps {total // 10}")

    @pytest.mark.parametrize("name", WITHOUT_WARMUP)
    def test_no_warning_where_there_is_no_warm_up(self, name):
        more = {"lr_step_rules": "1:10,0.1"} if name == "piecewise_constant" else {}
        assert not ScheduleOptions(lr_scheduler=name, lr_warmup_steps=500, **more).warning(3)
        assert self.rates(30, lr_scheduler=name, lr_warmup_steps=500, **more) == self.rates(
            30, lr_scheduler=name, lr_warmup_steps=0, **more
        )

    def test_what_goes_together(self):
        with pytest.raises(UserError, match="--lr_t_0 go together"):
            ScheduleOptions(lr_scheduler="cosine_warm_restarts")
        with pytest.raises(UserError, match="--lr_step_size go together"):
            ScheduleOptions(lr_step_size=3)


def learning_rates(out: Path) -> list[float]:
    return [json.loads(line)["learning_rate"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_warm_up_that_is_not_asked_for_fits_the_run(train, caplog, capsys):
    """A tenth of it; a resumed run keeps its checkpoint's, also that of an earlier version, and names another."""
    flags = ["--train_batch_size", 2, "--learning_rate", 1e-3, "--lr_scheduler", "constant_with_warmup"]

    def run(out: str, *more: object, expect: int = 0) -> Path:
        reset_accelerate()
        argv = ["--train_data_dir", train.images, *tiny.UNCONDITIONAL["pixels"], "--resolution", tiny.RESOLUTION]
        argv += ["--output_dir", folder / out, "--report_to", "none", *flags, *more]
        assert train_unconditional.main([str(word) for word in argv]) == expect
        return folder / out

    folder = train("pixels", "--max_train_steps", 1).parent
    out = run("fits", "--max_train_steps", 20)
    assert learning_rates(out)[:4] == [0, 5e-4, 1e-3, 1e-3]
    run("fits", "--max_train_steps", 21, "--resume_from_checkpoint", "latest")
    assert read_state(out / "checkpoint-21").facts.training["lr_warmup_steps"] == 2
    run("fits", "--max_train_steps", 22, "--resume_from_checkpoint", "latest", "--lr_warmup_steps", 3, expect=2)
    assert "--lr_warmup_steps 3 (the checkpoint used 2)" in capsys.readouterr().err
    out = run("earlier", "--max_train_steps", 2, "--lr_warmup_steps", 500)
    assert "in 2 steps the learning rate only increases, to 0 % of --learning_rate; try" in caplog.text
    run("earlier", "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert learning_rates(out) == pytest.approx([0, 2e-6, 4e-6, 6e-6])


def test_a_default_warm_up_that_is_longer_than_the_run_is_named(train, caplog):
    flags = ["--max_train_steps", 2, "--train_batch_size", 2, "--lr_scheduler", "cosine", "--lr_warmup_steps", 500]
    train("sd", *flags)
    assert "--lr_warmup_steps 500: in 2 steps the learning rate only increases" in caplog.text


def test_layer_rates(train, pipelines, capsys):
    """With factors of 0 and 2, SGD-like small steps of Adam: what has 0 stays, what has 2 moves twice as far."""
    from diffusers import DiffusionPipeline

    flags = ["--max_train_steps", 1, "--train_batch_size", 2, "--learning_rate", 1e-4, "--adam_weight_decay", 0]
    plain = weights(train("sd", *flags, out="plain"))
    layered = weights(train("sd", *flags, "--layer_rates", "mid_block=2", "up_blocks.0=0", out="layered"))
    before = DiffusionPipeline.from_pretrained(pipelines["sd"]).unet.state_dict()
    for name, tensor in plain.items():
        factor = 2 if "mid_block" in name else 0 if "up_blocks.0" in name else 1
        moved = layered[name] - before[name]
        torch.testing.assert_close(moved, factor * (tensor - before[name]), rtol=0.01, atol=2e-7, msg=name)
    for rule, named in (("mid_block", "be REGULAR-EXPRESSION=FACTOR"), ("nowhere=2", "matches no trained weight")):
        train("sd", *flags, "--layer_rates", rule, out="bad", expect=2)
        assert named in capsys.readouterr().err


class TestOptim:
    @pytest.mark.parametrize(
        "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    )
    def test_rates_are_those_of_diffusers_schedules(self, name):
        from diffusers.optimization import get_scheduler

        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        schedule = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=40, num_cycles=2, power=2.0)
        options = ScheduleOptions(lr_scheduler=name, lr_warmup_steps=5, lr_num_cycles=2, lr_power=2.0)
        factor = rate_factor(options, 0.1, 40)
        for step in range(40):
            assert 0.1 * factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
            optimizer.step()
            schedule.step()

    def test_piecewise_constant(self):
        options = ScheduleOptions(lr_scheduler="piecewise_constant", lr_step_rules="1:10,0.1:20,0.01")
        assert [rate_factor(options, 1.0, 30)(step) for step in (0, 9, 10, 25)] == [1.0, 1.0, 0.1, 0.01]

    def test_no_decay_on_biases_and_norms(self):
        network = nn.Sequential(nn.Linear(3, 3), nn.GroupNorm(1, 3))
        named = [NamedParameter(name, parameter, 1e-3) for name, parameter in network.named_parameters()]
        groups = {group["weight_decay"]: group["params"] for group in parameter_groups(named, 0.1)}
        assert {decay: len(parameters) for decay, parameters in groups.items()} == {0.1: 1, 0.0: 3}

    @pytest.mark.parametrize("eight_bit", [False, True])
    def test_adamw_against_torch(self, eight_bit):
        torch.manual_seed(0)
        start, gradient = torch.randn(128, 64), torch.randn(128, 64)
        ours, reference = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        options = OptimizerOptions(learning_rate=1e-2, use_8bit_adam=eight_bit)
        optimizer = build_optimizer([NamedParameter("w", ours, 1e-2)], options)
        expected = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
        for _ in range(3):
            ours.grad, reference.grad = gradient.clone(), gradient.clone()
            optimizer.step()
            expected.step()
        assert (
            any(tensor.dtype == torch.uint8 for tensor in optimizer.state[ours].values() if torch.is_tensor(tensor))
            == eight_bit
        )
        difference = (ours - reference).abs()
        assert difference.mean() < (5e-4 if eight_bit else 1e-8)  # of a movement of 0.03

    def test_rates_of_the_text_encoders(self):
        options = OptimizerOptions(learning_rate=3.0, text_encoder_lr=2.0)
        assert [options.rate_of(name) for name in ("unet", "text_encoder", "text_encoder_2")] == [3.0, 2.0, 2.0]
