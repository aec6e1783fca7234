"""Noise and timesteps against their closed forms."""

import diffusers
import numpy as np
import pytest
import torch

from tests.noise import SD_SCHEDULE, drawing
from utils.config.options import UserError
from utils.diffusion.losses import loss_weights
from utils.diffusion.noise import ForwardProcess, rectify, timestep_weights
from utils.diffusion.options import LossOptions, NoiseOptions
from utils.diffusion.samplers import changed_scheduler, parameters_of

BETA_SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "UniPCMultistepScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"),
    *("DPMSolverSinglestepScheduler", "TCDScheduler", "DDIMParallelScheduler"),
)


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
