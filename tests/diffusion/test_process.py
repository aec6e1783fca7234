"""Noise processes against closed forms, and points that are learnt by them."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import nn

from utils.diffusion.losses import loss_weights, weighted_loss
from utils.diffusion.noise import NoiseDraws, timestep_weights
from utils.diffusion.options import LossOptions, ProcessOptions
from utils.diffusion.process import ScoreProcess, process_of
from utils.diffusion.samplers import sampler_of
from utils.models.unconditional import fresh_scheduler


def named(scheduler) -> tuple[str, Mapping]:
    """A scheduler as `process_of` takes it."""
    return type(scheduler).__name__, scheduler.config


def betas_of(schedule: str, count: int) -> np.ndarray:
    """[T] float64 a schedule's betas by its definition."""
    first, last = 1e-4, 0.02
    if schedule == "linear":
        return np.linspace(first, last, count)
    if schedule in ("scaled_linear", "quadratic"):
        return np.linspace(first**0.5, last**0.5, count) ** 2
    if schedule == "sigmoid":
        return (last - first) / (1 + np.exp(-np.linspace(-6, 6, count))) + first
    bar = [math.cos((step / count + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(count + 1)]
    return np.array([min(1 - bar[step + 1] / bar[step], 0.999) for step in range(count)])


def alphas_cumprod_of(schedule: str, count: int, zero_snr: bool) -> np.ndarray:
    """[T] float64 alpha_bar; with zero terminal SNR as Lin et al. (2024), algorithm 1, have it."""
    roots = np.sqrt(np.cumprod(1 - betas_of(schedule, count)))
    if zero_snr:
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return roots**2


@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero snr"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "scaled_linear", "quadratic", "sigmoid"])
def test_the_forward_process_and_its_target(schedule, prediction, zero_snr):
    if zero_snr and prediction == "epsilon":
        pytest.skip("is refused")
    options = ProcessOptions(
        prediction_type=prediction, beta_schedule=schedule, ddpm_num_steps=500, rescale_betas_zero_snr=zero_snr
    )
    process = process_of(options, *named(fresh_scheduler(options, clips=True)))
    random = np.random.default_rng(0)
    clean, noise = random.standard_normal((2, 20, 3, 4, 4))
    timesteps = random.integers(0, 500, 20)
    timesteps[:2] = 0, 499
    bar = alphas_cumprod_of(schedule, 500, zero_snr)[timesteps].reshape(-1, 1, 1, 1)
    noisy = np.sqrt(bar) * clean + np.sqrt(1 - bar) * noise
    target = {"epsilon": noise, "sample": clean, "v_prediction": np.sqrt(bar) * noise - np.sqrt(1 - bar) * clean}
    found = process.apply(torch.tensor(clean).float(), torch.tensor(noise).float(), torch.from_numpy(timesteps), None)
    np.testing.assert_allclose(found.noisy.numpy(), noisy, atol=2e-5)
    np.testing.assert_allclose(found.target.numpy(), target[prediction], atol=2e-5)
    np.testing.assert_allclose(found.snr.numpy(), (bar / (1 - bar)).ravel(), rtol=2e-3, atol=1e-6)
    if bar.min() > 1e-3:
        np.testing.assert_allclose(process.estimate(found, found.target).numpy(), clean, atol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_a_straight_line(shift):
    options = ProcessOptions(flow_matching=True, flow_shift=shift, ddpm_num_steps=500)
    process = process_of(options, *named(fresh_scheduler(options, clips=True)))
    random = np.random.default_rng(0)
    clean, noise = random.standard_normal((2, 20, 3, 4, 4))
    timesteps = random.integers(0, 500, 20)
    timesteps[:2] = 0, 499
    sigmas = (timesteps + 1) / 500
    sigmas = (shift * sigmas / (1 + (shift - 1) * sigmas)).reshape(-1, 1, 1, 1)
    found = process.apply(torch.tensor(clean).float(), torch.tensor(noise).float(), torch.from_numpy(timesteps), None)
    np.testing.assert_allclose(found.noisy.numpy(), (1 - sigmas) * clean + sigmas * noise, atol=1e-5)
    np.testing.assert_allclose(found.target.numpy(), noise - clean, atol=1e-6)
    np.testing.assert_allclose(found.timesteps.numpy(), 500 * sigmas.ravel(), rtol=1e-6)
    np.testing.assert_allclose(process.estimate(found, found.target).numpy(), clean, atol=1e-5)


def test_a_score_process_adds_noise_alone():
    process = ScoreProcess({"num_train_timesteps": 100, "sigma_min": 0.01, "sigma_max": 50.0})
    clean, noise = torch.randn(2, 5, 3, 4, 4)
    timesteps = torch.tensor([0, 20, 50, 80, 99])
    sigmas = 0.01 * (50 / 0.01) ** (timesteps.double() / 99)
    found = process.apply(clean, noise, timesteps, None)
    torch.testing.assert_close(found.noisy, (clean + sigmas.view(-1, 1, 1, 1) * noise).float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.timesteps, sigmas.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.target, -noise)


def test_logit_normal_times_are_those_of_a_normal_logit():
    options = ProcessOptions(flow_matching=True, logit_mean=0.4, logit_std=0.8)
    process = process_of(options, *named(fresh_scheduler(options, clips=True)))
    assert process.default_distribution == "logit_normal"
    shares = timestep_weights(options, np.ones(1000) * 0.5, "logit_normal")
    assert shares.sum() == pytest.approx(1)
    drawn = 1 / (1 + np.exp(-np.random.default_rng(0).normal(0.4, 0.8, 400_000)))
    counted = np.histogram(drawn, 20, (0, 1))[0] / len(drawn)
    np.testing.assert_allclose(shares.reshape(20, 50).sum(1), counted, atol=3e-3)
    draws = NoiseDraws(options, process, 0, 1)
    times = [draws.draw(step, 0, (1, 1, 1)).timestep for step in range(2000)]
    assert np.mean(times) == pytest.approx(1000 * drawn.mean(), abs=12)


@pytest.mark.parametrize(("weighting", "on_x0"), [("min_snr", lambda snr: min(snr, 5)), ("snr", lambda snr: snr)])
def test_weights_on_a_flow_are_those_on_its_clean_image(weighting, on_x0):
    for sigma in (0.1, 0.3, 0.9):
        snr = ((1 - sigma) / sigma) ** 2
        found = loss_weights(torch.tensor([snr]), "flow", LossOptions(weighting=weighting))
        assert float(found) == pytest.approx(on_x0(snr) * sigma**2, rel=1e-5)


GAUSSIANS = {
    "epsilon": ProcessOptions(prediction_type="epsilon", beta_schedule="linear"),
    "sample": ProcessOptions(prediction_type="sample", beta_schedule="cosine"),
    "v_prediction": ProcessOptions(
        prediction_type="v_prediction", beta_schedule="sigmoid", rescale_betas_zero_snr=True
    ),
    "flow": ProcessOptions(flow_matching=True),
}
CENTRES = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in np.arange(8) * math.pi / 4])
WIDTH = 0.08


def eight_gaussians(count: int, seed: int) -> torch.Tensor:
    """[n, 2, 1, 1] points around the corners of an octagon of radius 1."""
    random = torch.Generator().manual_seed(seed)
    chosen = CENTRES[torch.randint(8, (count,), generator=random)]
    return (chosen + WIDTH * torch.randn(count, 2, generator=random)).view(-1, 2, 1, 1)


class Points(nn.Module):
    """A denoiser of points."""

    def __init__(self):
        super().__init__()
        hidden = [layer for _ in range(2) for layer in (nn.Linear(128, 128), nn.SiLU())]
        self.layers = nn.Sequential(nn.Linear(18, 128), nn.SiLU(), *hidden, nn.Linear(128, 2))

    def forward(self, points: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        angles = timesteps.float().view(-1, 1) * (math.pi / 1000) * 2.0 ** torch.arange(-1, 7)
        return self.layers(torch.cat([points.flatten(1), angles.sin(), angles.cos()], dim=1)).view(-1, 2, 1, 1)


def sliced_wasserstein(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean over 64 directions of the Wasserstein-1 distance of the projections of as many points."""
    angles = torch.arange(64) * math.pi / 64
    directions = torch.stack([angles.cos(), angles.sin()])
    return float((((one @ directions).sort(0).values) - (other @ directions).sort(0).values).abs().mean())


@pytest.mark.parametrize(
    "kind", [pytest.param(each, marks=pytest.mark.slow) if each != "flow" else each for each in GAUSSIANS]
)
def test_eight_gaussians_are_learnt(kind):
    """Within 0.06 of the true density, whose own samples are 0.016 apart; noise is 0.23 away."""
    options = GAUSSIANS[kind]
    scheduler = fresh_scheduler(options, clips=False)
    process, draws_of = process_of(options, *named(scheduler)), torch.Generator().manual_seed(0)
    shares = timestep_weights(options, process.alphas_cumprod.double().numpy(), process.default_distribution)
    torch.manual_seed(0)
    model, loss_options = Points(), LossOptions()
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2500)
    for step in range(2500):
        clean = eight_gaussians(384, step)
        timesteps = torch.multinomial(torch.from_numpy(shares), 384, True, generator=draws_of)
        noised = process.apply(clean, torch.randn(clean.shape, generator=draws_of), timesteps, None)
        prediction = model(noised.noisy, noised.timesteps)
        weighted_loss(prediction, noised, process.prediction_type, loss_options).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    sampler = sampler_of(scheduler, "euler" if kind == "flow" else "ddim")
    sampler.set_timesteps(100)
    points = torch.randn(4000, 2, 1, 1, generator=draws_of) * getattr(sampler, "init_noise_sigma", 1.0)
    with torch.no_grad():
        for t in sampler.timesteps:
            points = sampler.step(model(points, t.expand(4000)), t, points).prev_sample
    points, true = points.flatten(1), eight_gaussians(4000, 10**6).flatten(1)
    assert sliced_wasserstein(points, true) < 0.06
    nearest = torch.cdist(points, CENTRES)
    assert (nearest.min(1).values < 4 * WIDTH).float().mean() > 0.8
    counts = nearest.argmin(1).bincount(minlength=8) / 4000
    assert ((counts > 0.08) & (counts < 0.17)).all()
