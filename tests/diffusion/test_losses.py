"""Losses and their weights against the papers."""

import numpy as np
import pytest
import torch

from tests.noise import SD_SCHEDULE
from utils.diffusion.losses import LOSSES, WEIGHTINGS, huber_threshold, loss_weights, weighted_loss
from utils.diffusion.noise import ForwardProcess
from utils.diffusion.options import LossOptions

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
