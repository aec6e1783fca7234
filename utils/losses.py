"""The loss of a prediction and its weight over the timesteps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.options import option, require_positive


@dataclass(frozen=True)
class LossOptions:
    snr_gamma: float | None = option(
        None, "weight the loss by min-SNR with this gamma; 5.0 is recommended (https://arxiv.org/abs/2303.09556)"
    )

    def __post_init__(self) -> None:
        require_positive(self, "snr_gamma")

    @property
    def weighting(self) -> str:
        """The name of the weighting in `WEIGHTINGS`."""
        return "uniform" if self.snr_gamma is None else "min_snr"


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """[B] mean squared error of each sample, over all its other axes."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def uniform(snr: Tensor, prediction_type: str, options: LossOptions) -> Tensor:
    """[B] ones: the simple objective (Ho et al. 2020, equation 14)."""
    return torch.ones_like(snr)


def min_snr(snr: Tensor, prediction_type: str, options: LossOptions) -> Tensor:
    """[B] min-SNR-gamma weights (Hang et al. 2023, section 3.4): min(snr, gamma) on x0, as the prediction needs it.

    An epsilon error counts 1/snr times as much on x0, a v error 1/(snr + 1) times. An snr of 0 has the limit's weight 1
    under epsilon.
    """
    gamma = options.snr_gamma
    clipped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return torch.where(snr > 0, clipped / snr.clamp(min=torch.finfo(snr.dtype).tiny), 1.0)
    if prediction_type == "v_prediction":
        return clipped / (snr + 1)
    return clipped


LOSSES = {"l2": l2}
WEIGHTINGS = {"uniform": uniform, "min_snr": min_snr}


def weighted_loss(
    prediction: Tensor, target: Tensor, snr: Tensor, prediction_type: str, options: LossOptions
) -> Tensor:
    """[B] the weighted loss of each sample, in float32.

    Args:
        prediction, target: [B, ...].
        snr: [B] signal-to-noise ratio of each sample's timestep, 0 or more.
        prediction_type: what is predicted: epsilon, v_prediction or sample.
    """
    return WEIGHTINGS[options.weighting](snr, prediction_type, options) * l2(prediction, target)
