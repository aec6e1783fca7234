"""Loss functions, their weights by timestep, and masked means."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # flags take their choices from the tables below before torch is imported
    from torch import Tensor

    from utils.config.batch import Noised
    from utils.diffusion.options import LossOptions

LARGEST_SNR = 1000.0


def _l2(difference: "Tensor", c: "Tensor") -> "Tensor":
    return difference.square()


def _l1(difference: "Tensor", c: "Tensor") -> "Tensor":
    return difference.abs()


def _huber(difference: "Tensor", c: "Tensor") -> "Tensor":
    """Pseudo-Huber, 2c (sqrt(d^2 + c^2) - c): about d^2 for small d, 2c |d| for large (arXiv 2403.16728)."""
    return 2 * c * ((difference.square() + c.square()).sqrt() - c)


def _smooth_l1(difference: "Tensor", c: "Tensor") -> "Tensor":
    """2 (sqrt(d^2 + c^2) - c): about d^2 / c for small d, 2 |d| for large."""
    return 2 * ((difference.square() + c.square()).sqrt() - c)


def huber_threshold(options: "LossOptions", noised: "Noised") -> "Tensor":
    """Returns [B]: the Huber threshold c at each sample's timestep (https://arxiv.org/abs/2403.16728).

    constant: c. exponential: c^(t / T). snr: (1 - c) / (1 + sigma)^2 + c with sigma = snr^(-1/2), which falls from 1
    without noise to c.
    """
    c = options.huber_c
    if options.huber_schedule == "exponential":
        return (math.log(c) * noised.timesteps / noised.num_timesteps).exp()
    if options.huber_schedule == "snr":
        return (1 - c) / (1 + noised.snr.rsqrt()).square() + c
    return noised.snr.new_full(noised.snr.shape, c)


def _on_prediction(on_x0: "Tensor", snr: "Tensor", prediction_type: str) -> "Tensor":
    """Converts a weight on the squared error of x0 to one on the squared error of the prediction.

    The error of x0 is the error of epsilon divided by sqrt(snr), that of v divided by sqrt(snr + 1), and that of a
    flow's velocity times sigma = 1 / (1 + sqrt(snr)).
    """
    if prediction_type == "epsilon":
        return on_x0 / snr
    if prediction_type == "flow":
        return on_x0 / (1 + snr.sqrt()).square()
    return on_x0 / (snr + 1) if prediction_type == "v_prediction" else on_x0


def _uniform(snr: "Tensor", prediction_type: str, options: "LossOptions") -> "Tensor":
    """1 on the prediction, of any type: the simple objective (Ho et al. 2020, equation 14)."""
    return snr.new_ones(snr.shape)


def _min_snr(snr: "Tensor", prediction_type: str, options: "LossOptions") -> "Tensor":
    """min(snr, gamma) on x0 (Hang et al. 2023, section 3.4)."""
    return _on_prediction(snr.clamp(max=options.snr_gamma or 5.0), snr, prediction_type)


def _max_snr(snr: "Tensor", prediction_type: str, options: "LossOptions") -> "Tensor":
    """max(snr, 1) on x0 ("truncated SNR", Salimans and Ho 2022, equation 9)."""
    return _on_prediction(snr.clamp(min=1.0), snr, prediction_type)


def _snr(snr: "Tensor", prediction_type: str, options: "LossOptions") -> "Tensor":
    """snr on x0, i.e. 1 on epsilon (Salimans and Ho 2022, section 4)."""
    return _on_prediction(snr, snr, prediction_type)


def _p2(snr: "Tensor", prediction_type: str, options: "LossOptions") -> "Tensor":
    """1 / (k + snr)^gamma on epsilon (Choi et al. 2022, equation 8)."""
    return _on_prediction(snr / (options.p2_k + snr) ** options.p2_gamma, snr, prediction_type)


def _debiased(snr: "Tensor", prediction_type: str, options: "LossOptions") -> "Tensor":
    """1 / sqrt(snr) on epsilon (Yu et al. 2023, https://arxiv.org/abs/2310.08442), 1 / (snr + 1) on v as in kohya's.

    The snr is clipped to 1000.
    """
    clipped = snr.clamp(max=LARGEST_SNR)
    flow = clipped.sqrt() / (1 + clipped.sqrt()).square()  # the error of epsilon is 1 - sigma times that of v
    weights = {
        "epsilon": clipped.rsqrt(),
        "v_prediction": 1 / (clipped + 1),
        "sample": clipped.sqrt(),
        "flow": flow,
    }
    return weights[prediction_type]


LOSSES: dict[str, Callable[["Tensor", "Tensor"], "Tensor"]] = {
    "l2": _l2,
    "l1": _l1,
    "huber": _huber,
    "smooth_l1": _smooth_l1,
}
WEIGHTINGS: dict[str, Callable[["Tensor", str, "LossOptions"], "Tensor"]] = {
    "uniform": _uniform,
    "min_snr": _min_snr,
    "max_snr": _max_snr,
    "snr": _snr,
    "p2": _p2,
    "debiased": _debiased,
}


def loss_weights(snr: "Tensor", prediction_type: str, options: "LossOptions") -> "Tensor":
    """Returns [B]: the weight of each sample's loss by `--weighting`.

    Args:
        snr: [B] signal-to-noise ratios, 0 or more; with epsilon prediction, 0 becomes the smallest positive number.
        prediction_type: epsilon, v_prediction, sample or flow.
        options: the weighting and its parameters.
    """
    if prediction_type == "epsilon":
        from torch import finfo

        snr = snr.clamp(min=finfo(snr.dtype).tiny)
    return WEIGHTINGS[options.weighting_name](snr, prediction_type, options)


SMALLEST_MASK = 1e-3  # lowest mean of a mask that normalization divides by


def mask_weights(masks: "Tensor", options: "LossOptions") -> "Tensor":
    """Returns [B, 1, h, w] float32: the weight of the loss at each place, from uint8 masks of that shape."""
    weights = (masks.float() / 255).clamp(min=options.unmasked_weight)
    if options.normalize_masked_loss:
        weights = weights / weights.mean((1, 2, 3), keepdim=True).clamp(min=SMALLEST_MASK)
    return weights


def masked_mean(values: "Tensor", masks: "Tensor | None", options: "LossOptions") -> "Tensor":
    """Returns [B]: the mean of each sample's values [B, C, h, w], weighted by its mask if there are masks."""
    if masks is not None:
        values = values * mask_weights(masks, options)
    return values.flatten(1).mean(1)


def weighted_loss(
    prediction: "Tensor", noised: "Noised", prediction_type: str, options: "LossOptions", masks: "Tensor | None" = None
) -> "Tensor":
    """Returns [B] float32: the weighted loss of each sample, averaged over its values.

    Args:
        prediction: [B, C, h, w], the model's prediction of `noised.target`.
        noised: the model's input, its target and timesteps.
        prediction_type: epsilon, v_prediction, sample or flow.
        options: the loss function, its weighting and the weight of masked parts.
        masks: [B, 1, h, w] uint8, 255 where the loss counts fully, or None.
    """
    difference = prediction.float() - noised.target.float()
    c = huber_threshold(options, noised).view(-1, *[1] * (difference.ndim - 1))
    losses = masked_mean(LOSSES[options.loss](difference, c), masks, options)
    return loss_weights(noised.snr, prediction_type, options) * losses
