"""The options of the noise and of the loss."""

from dataclasses import dataclass

from utils.config.options import UserError, option, require, require_fraction, require_not_negative, require_positive
from utils.diffusion.losses import LOSSES, WEIGHTINGS

HUBER_SCHEDULES = ("snr", "exponential", "constant")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "quadratic": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
    "squaredcos_cap_v2": "squaredcos_cap_v2",
    "sigmoid": "sigmoid",
}
"""Spellings of the noise schedules, and diffusers' names for them."""
TIMESTEP_DISTRIBUTIONS = ("uniform", "log_normal", "logit_normal")
TIMESTEP_BIASES = ("none", "earlier", "later", "range")
SAMPLERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
}
"""What samples can be drawn by, where the noise is by betas."""


@dataclass(frozen=True)
class LossOptions:
    loss: str = option("l2", "what is made of the difference of prediction and target", choices=tuple(LOSSES))
    huber_c: float = option(
        0.1,
        "difference at which huber and smooth_l1 turn from squares to absolute values",
        acts_with=("loss=huber", "loss=smooth_l1"),
    )
    huber_schedule: str = option(
        "snr",
        "how that difference depends on the timestep",
        choices=HUBER_SCHEDULES,
        acts_with=("loss=huber", "loss=smooth_l1"),
    )
    weighting: str | None = option(
        None,
        "weight of the loss over the timesteps; uniform by default, min_snr with --snr_gamma",
        choices=tuple(WEIGHTINGS),
    )
    snr_gamma: float | None = option(
        None, "gamma of min_snr, 5.0 by default (https://arxiv.org/abs/2303.09556); given alone it chooses min_snr"
    )
    p2_gamma: float = option(1.0, "gamma of p2 (https://arxiv.org/abs/2204.00227)", acts_with=("weighting=p2",))
    p2_k: float = option(1.0, "k of p2", acts_with=("weighting=p2",))
    unmasked_weight: float = option(0.0, "what the loss counts at least, where an image's mask is black")
    normalize_masked_loss: bool = option(
        False, "divide an image's loss by the mean of its mask, so that small ones count as much"
    )

    def __post_init__(self) -> None:
        require_positive(self, "snr_gamma", "huber_c", "p2_k")
        require_not_negative(self, "p2_gamma")
        require_fraction(self, "unmasked_weight")
        if self.snr_gamma is not None and self.weighting not in (None, "min_snr"):
            raise UserError(f"--snr_gamma goes with --weighting min_snr, got --weighting {self.weighting}; give one")

    @property
    def weighting_name(self) -> str:
        """The name of the weighting in `WEIGHTINGS`."""
        return self.weighting or ("uniform" if self.snr_gamma is None else "min_snr")


@dataclass(frozen=True)
class NoiseOptions:
    prediction_type: str | None = option(
        None, "what the model predicts; by default what the pipeline's scheduler says", choices=PREDICTION_TYPES
    )
    beta_schedule: str | None = option(
        None, "course of the noise; by default what the pipeline's scheduler says", choices=BETA_SCHEDULES
    )
    rescale_betas_zero_snr: bool = option(
        False, "let the last timestep be noise alone (https://arxiv.org/abs/2305.08891); not for epsilon prediction"
    )
    noise_offset: float = option(
        0.0,
        "scale of the noise that is one number a channel (https://www.crosslabs.org//blog/diffusion-with-offset-noise)",
    )
    input_perturbation: float = option(
        0.0, "scale of the noise added to the model's input only; 0.1 is recommended (https://arxiv.org/abs/2301.11706)"
    )
    timestep_bias_strategy: str = option("none", "which timesteps are drawn more often", choices=TIMESTEP_BIASES)
    timestep_bias_multiplier: float = option(
        1.0, "how many times as often the biased timesteps are drawn", acts_with=("timestep_bias_strategy",)
    )
    timestep_bias_begin: int = option(
        0, "first timestep of the strategy range", acts_with=("timestep_bias_strategy=range",)
    )
    timestep_bias_end: int = option(
        1000, "timestep before which the strategy range ends", acts_with=("timestep_bias_strategy=range",)
    )
    timestep_bias_portion: float = option(
        0.25,
        "portion of the timesteps that the strategies earlier and later bias",
        acts_with=("timestep_bias_strategy=earlier", "timestep_bias_strategy=later"),
    )

    timestep_distribution: str = option(
        "uniform", "how timesteps are distributed, before the bias", choices=TIMESTEP_DISTRIBUTIONS
    )
    log_normal_mean: float = option(
        -1.2, "mean of the log of sigma = snr^(-1/2) under log_normal", acts_with=("timestep_distribution=log_normal",)
    )
    log_normal_std: float = option(
        1.2, "standard deviation of the log of sigma under log_normal", acts_with=("timestep_distribution=log_normal",)
    )
    logit_mean: float = option(
        0.0,
        "mean of the logit of t / T under logit_normal; more is noisier",
        acts_with=("timestep_distribution=logit_normal", "flow_matching"),
    )
    logit_std: float = option(
        1.0,
        "standard deviation of the logit of t / T under logit_normal",
        acts_with=("timestep_distribution=logit_normal", "flow_matching"),
    )
    timestep_sampling: str = option(
        "independent",
        "timesteps of a global batch: one by one, or one of each stratum",
        choices=("independent", "stratified"),
    )
    min_timestep: int = option(0, "smallest timestep that is trained")
    max_timestep: int | None = option(None, "timestep before which training ends; by default all are trained")
    multires_noise_iterations: int = option(
        0, "scales of noise that are added up (pyramid noise, Whitaker 2023); 6 to 10 are usual, 0 is plain noise"
    )
    multires_noise_discount: float = option(
        0.3, "share of each further scale in pyramid noise", acts_with=("multires_noise_iterations",)
    )
    dream_training: bool = option(
        False, "rectify input and target by the model's own estimate (https://arxiv.org/abs/2312.00210)"
    )
    dream_detail_preservation: float = option(
        1.0, "p of DREAM: larger ones rectify early timesteps less", acts_with=("dream_training",)
    )

    def __post_init__(self) -> None:
        require_not_negative(self, "noise_offset", "input_perturbation", "timestep_bias_begin", "min_timestep")
        require_not_negative(self, "multires_noise_iterations", "dream_detail_preservation")
        require_positive(self, "log_normal_std", "logit_std", "max_timestep")
        require_fraction(self, "multires_noise_discount")
        require_positive(self, "timestep_bias_multiplier")
        require(
            0 < self.timestep_bias_portion <= 1, "timestep_bias_portion", self.timestep_bias_portion, "be in (0, 1]"
        )

    @property
    def scheduler_changes(self) -> dict[str, object]:
        """What of the pipeline's scheduler config is to be otherwise, for training, sampling and the result."""
        changes: dict[str, object] = {}
        if self.prediction_type is not None:
            changes["prediction_type"] = self.prediction_type
        if self.beta_schedule is not None:
            changes |= {"beta_schedule": BETA_SCHEDULES[self.beta_schedule], "trained_betas": None}
        if self.rescale_betas_zero_snr:
            changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return changes


@dataclass(frozen=True)
class ProcessOptions(NoiseOptions):
    """As those of a pretrained pipeline's noise, and what a model from scratch starts with."""

    prediction_type: str | None = option(
        None,
        "what the model predicts; by default what the pretrained pipeline says, else epsilon",
        choices=PREDICTION_TYPES,
    )
    beta_schedule: str | None = option(
        None,
        "course of the noise; by default what the pretrained pipeline says, else linear",
        choices=BETA_SCHEDULES,
        aliases=["--ddpm_beta_schedule"],
    )
    ddpm_num_steps: int | None = option(
        None, "length of the noise schedule; by default the pretrained pipeline's, else 1000"
    )
    timestep_distribution: str | None = option(
        None,
        "how timesteps are distributed, before the bias; by default logit_normal in flow matching, else uniform",
        choices=TIMESTEP_DISTRIBUTIONS,
    )
    flow_matching: bool = option(
        False, "train a rectified flow: from noise to image at constant speed (https://arxiv.org/abs/2209.03003)"
    )
    flow_shift: float = option(1.0, "over 1 moves flow matching's times towards the noise, for large images")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "ddpm_num_steps", "flow_shift")
        given = {
            "--prediction_type": self.prediction_type is not None,
            "--beta_schedule": self.beta_schedule is not None,
            "--rescale_betas_zero_snr": self.rescale_betas_zero_snr,
            "--dream_training": self.dream_training,
        }
        if self.flow_matching and any(given.values()):
            flag = next(flag for flag, is_given in given.items() if is_given)
            raise UserError(f"{flag} is of noise by betas, which --flow_matching has not; leave one out")
        if self.flow_shift != 1 and not self.flow_matching:
            raise UserError(f"--flow_shift {self.flow_shift:g} goes with --flow_matching; give both or neither")

    @property
    def scheduler_changes(self) -> dict[str, object]:
        """What of a pipeline's scheduler config is to be otherwise."""
        changes = super().scheduler_changes
        return changes if self.ddpm_num_steps is None else changes | {"num_train_timesteps": self.ddpm_num_steps}
