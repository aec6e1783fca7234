"""Forward processes without a beta schedule (flow matching, variance-exploding noise), and the choice of a process."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from utils.config.batch import Noised
from utils.config.options import UserError
from utils.diffusion.noise import ForwardProcess, timestep_weights
from utils.diffusion.options import NoiseOptions, ProcessOptions


class FlowProcess:
    """Rectified flow (Liu et al. 2023, equation 1), in float32.

    x_t = (1 - sigma) x_0 + sigma epsilon, with the velocity epsilon - x_0 as the target. Timestep k has the sigma
    (k + 1) / T, shifted. The model's timestep input is sigma T, as in diffusers' flow-match schedulers.
    """

    prediction_type = "flow"
    default_distribution = "logit_normal"

    def __init__(self, scheduler_config: Mapping):
        self.num_timesteps = count = int(scheduler_config.get("num_train_timesteps", 1000))
        shift = shift_of(scheduler_config)
        sigmas = torch.arange(1, count + 1, dtype=torch.float64, device="cpu") / count
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        self.sigmas = sigmas.float()
        self.alphas_cumprod = ((1 - sigmas).square() / ((1 - sigmas).square() + sigmas.square())).float()
        self._snr = ((1 - sigmas) / sigmas).square().float()
        self._shift = shift

    def describe(self) -> str:
        """Returns the prediction type and the noise levels, for the log."""
        return f"flow velocity, {self.num_timesteps:,} timesteps shifted by {self._shift:g}, terminal SNR zero"

    def apply(self, latents: Tensor, noise: Tensor, timesteps: Tensor, input_perturbation: Tensor | None) -> Noised:
        """Mixes latents with noise, as `ForwardProcess.apply`."""
        self.sigmas, self._snr = self.sigmas.to(latents.device), self._snr.to(latents.device)
        sigmas = self.sigmas[timesteps].view(-1, 1, 1, 1)
        added = noise if input_perturbation is None else noise + input_perturbation
        noisy = (1 - sigmas) * latents + sigmas * added
        told = self.sigmas[timesteps] * self.num_timesteps
        return Noised(noisy, noise - latents, told, self._snr[timesteps], self.num_timesteps)

    def estimate(self, noised: Noised, prediction: Tensor) -> Tensor:
        """Returns the clean latents [B, C, h, w] float32 that a prediction implies: x_t - sigma v."""
        sigmas = 1 / (1 + noised.snr.sqrt()).view(-1, 1, 1, 1)
        return noised.noisy - sigmas * prediction.float()


class ScoreProcess:
    """Variance-exploding noise: x_t = x_0 + sigma_t epsilon (Song et al. 2021, section 3.4), in float32.

    The sigmas are a geometric sequence. The model's timestep input is sigma; sigma times its output, the score, is
    -epsilon, and is the prediction here.
    """

    prediction_type = "epsilon"
    default_distribution = "uniform"

    def __init__(self, scheduler_config: Mapping):
        self.num_timesteps = int(scheduler_config["num_train_timesteps"])
        ends = math.log(scheduler_config["sigma_min"]), math.log(scheduler_config["sigma_max"])
        sigmas = torch.linspace(*ends, self.num_timesteps, dtype=torch.float64, device="cpu").exp()
        self.sigmas = sigmas.float()
        self.alphas_cumprod = (1 / (1 + sigmas.square())).float()
        self._snr = sigmas.pow(-2).float()

    def describe(self) -> str:
        """Returns the prediction type and the noise levels, for the log."""
        low, high = float(self.sigmas[0]), float(self.sigmas[-1])
        return f"score, {self.num_timesteps:,} noise levels from {low:g} to {high:g}"

    def apply(self, latents: Tensor, noise: Tensor, timesteps: Tensor, input_perturbation: Tensor | None) -> Noised:
        """Adds noise to latents, as `ForwardProcess.apply`."""
        self.sigmas, self._snr = self.sigmas.to(latents.device), self._snr.to(latents.device)
        told = self.sigmas[timesteps]
        added = noise if input_perturbation is None else noise + input_perturbation
        noisy = latents + told.view(-1, 1, 1, 1) * added
        return Noised(noisy, -noise, told, self._snr[timesteps], self.num_timesteps)

    def estimate(self, noised: Noised, prediction: Tensor) -> Tensor:
        """Returns the clean latents [B, C, h, w] float32 that a prediction implies: x_t + sigma times it."""
        return noised.noisy + noised.timesteps.view(-1, 1, 1, 1) * prediction.float()


Process = ForwardProcess | FlowProcess | ScoreProcess
BETAS = (ForwardProcess,)  # for model families that are trained only with a beta schedule
EVERY_PROCESS = (ForwardProcess, FlowProcess, ScoreProcess)


def kind_of(name: str, scheduler_config: Mapping) -> type[Process]:
    """Returns the class of the forward process that a diffusers scheduler belongs to.

    Args:
        name: name of the scheduler's class.
        scheduler_config: its config.
    """
    if "FlowMatch" in name or scheduler_config.get("prediction_type") == "flow_prediction":
        return FlowProcess
    return ScoreProcess if "SdeVe" in name else ForwardProcess


def is_flow(scheduler: Any) -> bool:
    """Whether a diffusers scheduler is for flow matching."""
    return kind_of(type(scheduler).__name__, scheduler.config) is FlowProcess


def is_score(scheduler: Any) -> bool:
    """Whether a diffusers scheduler is for a score-based pipeline with variance-exploding noise."""
    return kind_of(type(scheduler).__name__, scheduler.config) is ScoreProcess


def shift_of(scheduler_config: Mapping) -> float:
    """Returns the timestep shift of a flow scheduler, under whichever name its config has it."""
    return float(scheduler_config.get("shift", scheduler_config.get("flow_shift", 1.0)))


def check_changes(options: ProcessOptions, scheduler: Any) -> None:
    """Refuses changes to a beta schedule for a pretrained pipeline that has none.

    Raises:
        UserError: naming the flag.
    """
    flags = {
        "--prediction_type": options.prediction_type is not None,
        "--beta_schedule": options.beta_schedule is not None,
        "--rescale_betas_zero_snr": options.rescale_betas_zero_snr,
    }
    name = type(scheduler).__name__
    if options.flow_matching and is_score(scheduler):
        raise UserError("--flow_matching: a score-based pipeline can only be trained with its own noise; leave it out")
    if any(flags.values()) and (is_flow(scheduler) or is_score(scheduler)):
        flag = next(flag for flag, is_given in flags.items() if is_given)
        raise UserError(
            f"{flag} needs a beta schedule, which the pretrained pipeline's {name} does not have; leave it out"
        )


def process_of(
    options: NoiseOptions, name: str, scheduler_config: Mapping, kinds: Sequence[type[Process]] = EVERY_PROCESS
) -> Process:
    """Returns the forward process of a diffusers scheduler, with the changes of the options.

    Args:
        options: the noise options.
        name: name of the scheduler's class.
        scheduler_config: its config.
        kinds: processes that the model family supports; any other scheduler is read as one with a beta schedule.

    Raises:
        UserError: if the options do not fit the process, or the process is not supported.
    """
    kind = kind_of(name, scheduler_config)
    if kind is ForwardProcess or kind not in kinds:
        process = ForwardProcess(scheduler_config, options.scheduler_changes)
    else:
        process = kind(scheduler_config)
    timestep_weights(options, process.alphas_cumprod.cpu().double().numpy(), process.default_distribution)
    if options.dream_training and (type(process) is not ForwardProcess or process.prediction_type != "epsilon"):
        raise UserError(
            f"--dream_training needs a beta schedule and epsilon prediction; the pipeline's {name} has "
            f"{process.prediction_type}; leave it out"
        )
    return process
