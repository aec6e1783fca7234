"""The parts, each against something known."""

from collections import Counter

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from utils.config.options import UserError
from utils.config.seeding import Stream, generator
from utils.diffusion.losses import LOSSES, WEIGHTINGS, huber_threshold, loss_weights, weighted_loss
from utils.diffusion.noise import ForwardProcess, NoiseDraws, rectify, stack_draws, timestep_weights
from utils.diffusion.options import LossOptions, NoiseOptions
from utils.diffusion.samplers import changed_scheduler, parameters_of
from utils.training.ema import MovingAverage
from utils.training.optimizer_options import OptimizerOptions, ScheduleOptions
from utils.training.optimizers import NamedParameter, build_optimizer, parameter_groups, rate_factor
from utils.training.options import EmaOptions

BETA_SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "UniPCMultistepScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"),
    *("DPMSolverSinglestepScheduler", "TCDScheduler", "DDIMParallelScheduler"),
)
SD_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def drawing(num_timesteps: int = 1000, global_batch: int = 20, **options) -> NoiseDraws:
    """The draws of a run with these noise options."""
    process = ForwardProcess(SD_SCHEDULE | {"num_train_timesteps": num_timesteps}, {})
    return NoiseDraws(NoiseOptions(**options), process, 0, global_batch)


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


class TestNoise:
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    def test_forward_process_against_float64(self, prediction_type):
        process = ForwardProcess(SD_SCHEDULE, {"prediction_type": prediction_type})
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        alpha_bar = torch.from_numpy(np.cumprod(1 - betas))
        latents, noise = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
        timesteps = torch.tensor([0, 1, 500, 998, 999])
        signal, spread = (
            alpha_bar[timesteps].sqrt().view(-1, 1, 1, 1),
            (1 - alpha_bar[timesteps]).sqrt().view(-1, 1, 1, 1),
        )
        noised = process.apply(latents, noise, timesteps, None)
        targets = {"epsilon": noise, "v_prediction": signal * noise - spread * latents, "sample": latents}
        torch.testing.assert_close(noised.noisy.double(), signal * latents + spread * noise, rtol=0, atol=1e-5)
        torch.testing.assert_close(noised.target.double(), targets[prediction_type].double(), rtol=0, atol=1e-5)
        snr = (signal / spread).square().flatten()
        torch.testing.assert_close(noised.snr.double(), snr, rtol=1e-3, atol=0)

    def test_input_perturbation_is_in_the_input_alone(self):
        process = ForwardProcess(SD_SCHEDULE, {})
        latents, noise = torch.zeros(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
        noised = process.apply(latents, noise, torch.tensor([999]), torch.ones(1, 4, 2, 2))
        assert torch.equal(noised.target, noise)
        assert (noised.noisy - noise).abs().min() > 0.5

    def test_noise_offset_shifts_channels_and_leaves_the_rest(self):
        plain = drawing().draw(1, 2, (4, 8, 8))
        offset = drawing(noise_offset=0.1).draw(1, 2, (4, 8, 8))
        difference = offset.noise - plain.noise
        assert np.abs(difference - difference[:, :1, :1]).max() < 1e-6
        assert plain.timestep == offset.timestep

    def test_zero_terminal_snr_refuses_epsilon(self):
        with pytest.raises(UserError, match="zero terminal SNR"):
            ForwardProcess(SD_SCHEDULE | {"rescale_betas_zero_snr": True}, {})
        process = ForwardProcess(SD_SCHEDULE | {"rescale_betas_zero_snr": True}, {"prediction_type": "v_prediction"})
        noised = process.apply(torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.tensor([999]), None)
        assert float(noised.snr) == 0
        assert torch.isfinite(loss_weights(noised.snr, "v_prediction", LossOptions(snr_gamma=5))).all()

    @pytest.mark.parametrize(
        ("strategy", "begin", "end"), [("later", 75, 100), ("earlier", 0, 25), ("range", 10, 30), ("none", 0, 0)]
    )
    def test_timestep_bias(self, strategy, begin, end):
        options = NoiseOptions(
            timestep_bias_strategy=strategy, timestep_bias_multiplier=3, timestep_bias_begin=10, timestep_bias_end=30
        )
        expected = np.ones(100)
        expected[begin:end] = 3
        assert timestep_weights(options, np.linspace(0.99, 0.01, 100)).tolist() == expected.tolist()

    @pytest.mark.parametrize("name", BETA_SCHEDULERS)
    def test_a_schedule_that_is_a_class_default_is_trained_and_exported(self, name):
        pretrained = getattr(diffusers, name)()
        expected = pretrained.alphas_cumprod.float()
        process = ForwardProcess(pretrained.config, {})
        torch.testing.assert_close(process.alphas_cumprod, expected)
        changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}
        exported = changed_scheduler(pretrained, changes)
        torch.testing.assert_close(exported.alphas_cumprod.float(), expected)
        clips = bool(pretrained.config.get("clip_sample")) and "clip_sample" in parameters_of(type(pretrained))
        assert bool(exported.config.get("clip_sample")) == clips

    @pytest.mark.parametrize("name", ["linear", "scaled_linear", "quadratic", "cosine", "sigmoid"])
    @pytest.mark.parametrize("scheduler", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
    @pytest.mark.parametrize("zero_snr", [False, True])
    def test_the_exported_scheduler_has_the_trained_noise_schedule(self, tmp_path, name, scheduler, zero_snr):
        options = NoiseOptions(beta_schedule=name, rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction")
        pretrained = getattr(diffusers, scheduler)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        process = ForwardProcess(pretrained.config, options.scheduler_changes)
        exported = changed_scheduler(pretrained, options.scheduler_changes)
        exported.save_pretrained(tmp_path)
        loaded = type(exported).from_pretrained(tmp_path)
        assert loaded.config.prediction_type == "v_prediction"
        expected = process.alphas_cumprod
        rows = slice(None, -1) if zero_snr else slice(None)  # Euler keeps a last value just above 0
        torch.testing.assert_close(loaded.alphas_cumprod[rows], expected[rows], rtol=1e-4, atol=1e-6)
        closed = {
            "linear": np.linspace(0.00085, 0.012, 1000),
            "scaled_linear": np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
            "quadratic": np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
            "sigmoid": 1 / (1 + np.exp(-np.linspace(-6, 6, 1000))) * (0.012 - 0.00085) + 0.00085,
        }
        if name in closed and not zero_snr:
            alpha_bar = torch.from_numpy(np.cumprod(1 - closed[name]))
            torch.testing.assert_close(expected.double(), alpha_bar, rtol=1e-3, atol=1e-6)
        if zero_snr:
            assert float(expected[-1]) == 0
            assert loaded.config.timestep_spacing == "trailing"

    def test_min_and_max_timestep(self):
        draws = drawing(100, min_timestep=20, max_timestep=30)
        drawn = {draws.draw(step, slot, (1, 1, 1)).timestep for step in range(40) for slot in range(20)}
        assert drawn == set(range(20, 30))

    def test_stratified_timesteps_fill_every_stratum(self):
        draws = drawing(100, global_batch=20, timestep_sampling="stratified")
        orders = []
        for step in range(5):
            timesteps = [draws.draw(step, slot, (1, 1, 1)).timestep for slot in range(20)]
            assert sorted(timestep // 5 for timestep in timesteps) == list(range(20))
            orders.append([timestep // 5 for timestep in timesteps])
        assert orders[0] != orders[1]

    def test_log_normal_timesteps(self):
        draws = drawing(timestep_distribution="log_normal", log_normal_mean=0.3, log_normal_std=0.5)
        drawn = [draws.draw(step, slot, (1, 1, 1)).timestep for step in range(100) for slot in range(20)]
        alpha_bar = ForwardProcess(SD_SCHEDULE, {}).alphas_cumprod.double().numpy()[drawn]
        log_sigma = 0.5 * np.log((1 - alpha_bar) / alpha_bar)
        assert log_sigma.mean() == pytest.approx(0.3, abs=0.05)
        assert log_sigma.std() == pytest.approx(0.5, abs=0.05)

    def test_pyramid_noise_is_normed_and_smoother(self):
        plain = drawing().draw(0, 0, (4, 32, 32)).noise
        pyramid = drawing(multires_noise_iterations=6, multires_noise_discount=0.8).draw(0, 0, (4, 32, 32)).noise
        assert pyramid.std() == pytest.approx(1, abs=1e-3)

        def coarse(noise):
            return noise.reshape(4, 4, 8, 4, 8).mean(axis=(2, 4)).std()

        assert coarse(pyramid) > 2 * coarse(plain)

    @pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
    def test_dream_against_diffusers(self, power):
        from diffusers.training_utils import compute_dream_and_update_latents

        process = ForwardProcess(SD_SCHEDULE, {})
        timesteps = torch.tensor([3, 700])
        latents, noise, estimate = torch.randn(3, 2, 4, 3, 3)
        noised = process.apply(latents, noise, timesteps, None)

        class Unet:
            def __call__(self, *arguments):
                self.sample = estimate
                return self

        expected = compute_dream_and_update_latents(
            Unet(), process.scheduler, timesteps, noise, noised.noisy, noised.target, None, power
        )
        rectified = rectify(noised, estimate, power)
        torch.testing.assert_close(rectified.noisy, expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rectified.target, expected[1], rtol=1e-4, atol=1e-5)


SNR = 0.2, 1.0, 30.0, 2000.0
PAPERS = {  # on epsilon, v and x0, as the papers (of debiased on v: kohya) have them
    "uniform": (lambda s: 1, lambda s: 1, lambda s: 1),
    "min_snr": (lambda s: min(s, 5) / s, lambda s: min(s, 5) / (s + 1), lambda s: min(s, 5)),
    "max_snr": (lambda s: max(s, 1) / s, lambda s: max(s, 1) / (s + 1), lambda s: max(s, 1)),
    "snr": (lambda s: 1, lambda s: s / (s + 1), lambda s: s),
    "p2": (lambda s: 1 / (2 + s) ** 0.5, lambda s: s / (s + 1) / (2 + s) ** 0.5, lambda s: s / (2 + s) ** 0.5),
    "debiased": (lambda s: min(s, 1000) ** -0.5, lambda s: 1 / (min(s, 1000) + 1), lambda s: min(s, 1000) ** 0.5),
}


class TestLosses:
    @pytest.mark.parametrize("name", WEIGHTINGS)
    @pytest.mark.parametrize("place", range(3), ids=["epsilon", "v_prediction", "sample"])
    def test_weights_are_those_of_the_papers(self, name, place):
        prediction_type = ("epsilon", "v_prediction", "sample")[place]
        options = LossOptions(weighting=name, p2_k=2.0, p2_gamma=0.5)
        expected = torch.tensor([float(PAPERS[name][place](snr)) for snr in SNR])
        torch.testing.assert_close(loss_weights(torch.tensor(SNR), prediction_type, options), expected)
        if prediction_type != "epsilon":
            assert torch.isfinite(loss_weights(torch.zeros(1), prediction_type, options)).all()

    def test_snr_gamma_alone_is_min_snr(self):
        weights = loss_weights(torch.tensor([0.0, 1.0, 10.0]), "epsilon", LossOptions(snr_gamma=5))
        torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 0.5]))

    @pytest.mark.parametrize("name", LOSSES)
    def test_losses_against_closed_forms(self, name):
        options = LossOptions(loss=name, huber_c=0.3, huber_schedule="constant")
        process = ForwardProcess(SD_SCHEDULE, {})
        noised = process.apply(torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([1, 400, 999]), None)
        prediction = torch.randn(3, 4, 2, 2)
        difference = (prediction - noised.target).double()
        root = (difference**2 + 0.09).sqrt()
        closed = {
            "l2": difference**2,
            "l1": difference.abs(),
            "huber": 2 * 0.3 * (root - 0.3),
            "smooth_l1": 2 * (root - 0.3),
        }
        loss = weighted_loss(prediction, noised, "epsilon", options)
        torch.testing.assert_close(loss.double(), closed[name].mean(dim=(1, 2, 3)), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("schedule", ["snr", "exponential", "constant"])
    def test_the_huber_threshold(self, schedule):
        process = ForwardProcess(SD_SCHEDULE, {})
        timesteps = torch.tensor([0, 500, 999])
        noised = process.apply(torch.zeros(3, 4, 2, 2), torch.zeros(3, 4, 2, 2), timesteps, None)
        alpha_bar = process.alphas_cumprod[timesteps].double()
        sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
        closed = {
            "snr": 0.9 / (1 + sigma) ** 2 + 0.1,
            "exponential": torch.exp(timesteps * np.log(0.1) / 1000),
            "constant": torch.full((3,), 0.1),
        }
        threshold = huber_threshold(LossOptions(huber_schedule=schedule), noised)
        torch.testing.assert_close(threshold.double(), closed[schedule].double(), rtol=1e-4, atol=1e-5)


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


class TestMovingAverage:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"offload_ema": True},
            {"foreach_ema": False},
            {"use_ema_warmup": True, "ema_inv_gamma": 2.0, "ema_power": 0.9},
        ],
    )
    def test_against_diffusers(self, options):
        from diffusers.training_utils import EMAModel

        torch.manual_seed(0)
        rise = {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.9} if "use_ema_warmup" in options else {}
        parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
        ours, theirs = MovingAverage(parameters, EmaOptions(use_ema=True, **options)), EMAModel(parameters, **rise)
        for _ in range(20):
            for parameter in parameters:
                parameter.data.add_(torch.randn_like(parameter))
            ours.update()
            theirs.step(parameters)
        for one, other in zip(ours.averages, theirs.shadow_params, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        weights = [parameter.detach().clone() for parameter in parameters]
        with ours.in_place():
            assert torch.equal(parameters[0], ours.averages[0])
        assert all(torch.equal(weight, parameter) for weight, parameter in zip(weights, parameters, strict=True))

    @pytest.mark.parametrize("options", [{}, {"use_ema_warmup": True}, {"offload_ema": True}])
    def test_every_few_steps_by_the_decay_of_all_of_them(self, options):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.zeros(7))
        often = MovingAverage([parameter], EmaOptions(use_ema=True, **options))
        seldom = MovingAverage([parameter], EmaOptions(use_ema=True, ema_every=4, **options))
        for block in range(5):  # of weights that stand still within a block
            parameter.data.copy_(torch.randn(7))
            for step in range(4):
                before = seldom.averages[0].clone()
                often.update()
                seldom.update()
                assert torch.equal(seldom.averages[0], before) == (step < 3), (block, step)
            torch.testing.assert_close(often.averages[0], seldom.averages[0], rtol=1e-5, atol=1e-6)
        assert often.num_updates == seldom.num_updates == 20

    def test_every_few_steps_of_a_shorter_run_is_refused(self, refused):
        flags = ["--max_train_steps", 3]
        refused([*flags, "--use_ema", "--ema_every", 4], "--ema_every must be at most the run's 3 optimizer steps, got")
        refused([*flags, "--ema_every", 2], "--ema_every goes with --use_ema")


def test_a_process_that_trains_apart_is_refused(monkeypatch, tmp_path):
    from accelerate import Accelerator

    from tests.conftest import reset_accelerate
    from utils.runtime.options import RuntimeOptions
    from utils.runtime.processes import start_processes

    reset_accelerate()
    Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started"):
        start_processes(RuntimeOptions(), 1, [], tmp_path, "logs")


def test_each_of_two_to_the_64_positions_has_numbers_of_its_own():
    """Against numpy's Philox with the key as it is; a list of such numbers would become float64, and be rounded."""
    import numpy as np

    for seed, position, place in [(0, 0, 0), (3, 2**63 + 1, 2), (3, 2**63 + 2, 2), (2**62, 2**64 - 1, 5)]:
        key, counter = np.array([seed, position], np.uint64), np.array([0, 0, place, Stream.CROP], np.uint64)
        expected = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(4)
        assert generator(seed, position, place, Stream.CROP).random(4).tolist() == expected.tolist()
    drawn = {generator(0, 2**63 + number, 0, Stream.FLIP).random() for number in range(3000)}
    assert len(drawn) == 3000
