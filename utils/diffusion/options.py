"""The options of the noise and the loss."""

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
"""Choices of --sampler for models with a beta schedule, and diffusers' schedulers."""


@dataclass(frozen=True)
class LossOptions:
    loss: str = option("l2", "loss function", choices=tuple(LOSSES))
    huber_c: float = option(
        0.1,
        "difference at which huber and smooth_l1 change from squared to absolute error",
        acts_with=("loss=huber", "loss=smooth_l1"),
    )
    huber_schedule: str = option(
        "snr",
        "how --huber_c depends on the timestep",
        choices=HUBER_SCHEDULES,
        acts_with=("loss=huber", "loss=smooth_l1"),
    )
    weighting: str | None = option(
        None,
        "loss weight by timestep; default: uniform, or min_snr if --snr_gamma is given",
        choices=tuple(WEIGHTINGS),
    )
    snr_gamma: float | None = option(
        None, "gamma of --weighting min_snr, which it implies (https://arxiv.org/abs/2303.09556); default: 5.0"
    )
    p2_gamma: float = option(
        1.0, "gamma of --weighting p2 (https://arxiv.org/abs/2204.00227)", acts_with=("weighting=p2",)
    )
    p2_k: float = option(1.0, "k of --weighting p2", acts_with=("weighting=p2",))
    unmasked_weight: float = option(0.0, "lowest weight of the loss, from 0 to 1, where a mask is black")
    normalize_masked_loss: bool = option(
        False, "divide each image's loss by the mean of its mask, so that images with small masks count as much"
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
        None, "prediction type of the model; default: that of the pipeline's scheduler", choices=PREDICTION_TYPES
    )
    beta_schedule: str | None = option(
        None, "noise schedule; default: that of the pipeline's scheduler", choices=BETA_SCHEDULES
    )
    rescale_betas_zero_snr: bool = option(
        False,
        "rescale the noise schedule to zero terminal SNR, so that the last timestep is pure noise "
        "(https://arxiv.org/abs/2305.08891); not for epsilon prediction",
    )
    noise_offset: float = option(
        0.0,
        "strength of offset noise, one random value per channel "
        "(https://www.crosslabs.org//blog/diffusion-with-offset-noise)",
    )
    input_perturbation: float = option(
        0.0,
        "strength of extra noise in the model's input but not in the target; 0.1 is recommended "
        "(https://arxiv.org/abs/2301.11706)",
    )
    timestep_bias_strategy: str = option("none", "timesteps to draw more often", choices=TIMESTEP_BIASES)
    timestep_bias_multiplier: float = option(
        1.0, "factor by which biased timesteps are drawn more often", acts_with=("timestep_bias_strategy",)
    )
    timestep_bias_begin: int = option(
        0, "first biased timestep of --timestep_bias_strategy range", acts_with=("timestep_bias_strategy=range",)
    )
    timestep_bias_end: int = option(
        1000,
        "end of the biased timesteps of --timestep_bias_strategy range (exclusive)",
        acts_with=("timestep_bias_strategy=range",),
    )
    timestep_bias_portion: float = option(
        0.25,
        "portion of the timesteps, from 0 to 1, that --timestep_bias_strategy earlier or later biases",
        acts_with=("timestep_bias_strategy=earlier", "timestep_bias_strategy=later"),
    )

    timestep_distribution: str = option(
        "uniform", "distribution of the timesteps, before the bias", choices=TIMESTEP_DISTRIBUTIONS
    )
    log_normal_mean: float = option(
        -1.2,
        "mean of log sigma for --timestep_distribution log_normal, with sigma = snr^(-1/2)",
        acts_with=("timestep_distribution=log_normal",),
    )
    log_normal_std: float = option(
        1.2,
        "standard deviation of log sigma for --timestep_distribution log_normal",
        acts_with=("timestep_distribution=log_normal",),
    )
    logit_mean: float = option(
        0.0,
        "mean of the logit of t / T for --timestep_distribution logit_normal; higher is noisier",
        acts_with=("timestep_distribution=logit_normal", "flow_matching"),
    )
    logit_std: float = option(
        1.0,
        "standard deviation of the logit of t / T for --timestep_distribution logit_normal",
        acts_with=("timestep_distribution=logit_normal", "flow_matching"),
    )
    timestep_sampling: str = option(
        "independent",
        "draw the timesteps of a global batch independently, or one from each of as many equal strata",
        choices=("independent", "stratified"),
    )
    min_timestep: int = option(0, "lowest timestep to train on")
    max_timestep: int | None = option(None, "end of the timesteps to train on (exclusive); default: all of them")
    multires_noise_iterations: int = option(
        0, "number of scales of multi-resolution (pyramid) noise; 6 to 10 are usual, 0 is plain noise"
    )
    multires_noise_discount: float = option(
        0.3,
        "factor from 0 to 1 by which each coarser scale of pyramid noise is weaker",
        acts_with=("multires_noise_iterations",),
    )
    dream_training: bool = option(
        False, "DREAM: correct input and target by the model's own prediction (https://arxiv.org/abs/2312.00210)"
    )
    dream_detail_preservation: float = option(
        1.0, "p of DREAM: higher values correct early timesteps less", acts_with=("dream_training",)
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
        """Changes to the pipeline's scheduler config, for training, sampling and the exported pipeline."""
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
    """Noise options of unconditional training: those of a pretrained pipeline, and those of a model from scratch."""

    prediction_type: str | None = option(
        None,
        "prediction type of the model; default: that of the pretrained pipeline, or epsilon from scratch",
        choices=PREDICTION_TYPES,
    )
    beta_schedule: str | None = option(
        None,
        "noise schedule; default: that of the pretrained pipeline, or linear from scratch",
        choices=BETA_SCHEDULES,
        aliases=["--ddpm_beta_schedule"],
    )
    ddpm_num_steps: int | None = option(
        None, "number of timesteps in the noise schedule; default: as the pretrained pipeline, or 1000 from scratch"
    )
    timestep_distribution: str | None = option(
        None,
        "distribution of the timesteps, before the bias; default: logit_normal with --flow_matching, else uniform",
        choices=TIMESTEP_DISTRIBUTIONS,
    )
    flow_matching: bool = option(
        False, "train a rectified flow instead of a diffusion model (https://arxiv.org/abs/2209.03003)"
    )
    flow_shift: float = option(
        1.0, "timestep shift of flow matching; over 1 spends more timesteps at high noise, for large images"
    )

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
            raise UserError(f"{flag} has no effect with --flow_matching, which has no beta schedule; leave one out")
        if self.flow_shift != 1 and not self.flow_matching:
            raise UserError(f"--flow_shift {self.flow_shift:g} goes with --flow_matching; give both or neither")

    @property
    def scheduler_changes(self) -> dict[str, object]:
        """Changes to the scheduler config of a pretrained pipeline, or of a model from scratch."""
        changes = super().scheduler_changes
        return changes if self.ddpm_num_steps is None else changes | {"num_train_timesteps": self.ddpm_num_steps}
