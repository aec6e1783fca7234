"""Forward diffusion: which noise and timesteps are drawn, and what they make of a latent."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.options import UserError, option, require, require_not_negative, require_positive
from utils.seeding import Stream, generator

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_BIASES = ("none", "earlier", "later", "range")


@dataclass(frozen=True)
class NoiseOptions:
    prediction_type: str | None = option(
        None, "what the model predicts; by default what the pipeline's scheduler says", choices=PREDICTION_TYPES
    )
    noise_offset: float = option(
        0.0,
        "scale of the noise that is one number a channel (https://www.crosslabs.org//blog/diffusion-with-offset-noise)",
    )
    input_perturbation: float = option(
        0.0, "scale of the noise added to the model's input only; 0.1 is recommended (https://arxiv.org/abs/2301.11706)"
    )
    timestep_bias_strategy: str = option("none", "which timesteps are drawn more often", choices=TIMESTEP_BIASES)
    timestep_bias_multiplier: float = option(1.0, "how many times as often the biased timesteps are drawn")
    timestep_bias_begin: int = option(0, "first timestep of the strategy range")
    timestep_bias_end: int = option(1000, "timestep before which the strategy range ends")
    timestep_bias_portion: float = option(0.25, "portion of the timesteps that the strategies earlier and later bias")

    dream_training: bool = option(False, "not built yet: DREAM (https://arxiv.org/abs/2312.00210)")
    dream_detail_preservation: float = option(1.0, "not built yet: DREAM's detail preservation")

    def __post_init__(self) -> None:
        if self.dream_training or self.dream_detail_preservation != 1.0:
            raise UserError("--dream_training is not built yet; leave it and --dream_detail_preservation out")
        require_not_negative(self, "noise_offset", "input_perturbation", "timestep_bias_begin")
        require_positive(self, "timestep_bias_multiplier")
        require(
            0 < self.timestep_bias_portion <= 1, "timestep_bias_portion", self.timestep_bias_portion, "be in (0, 1]"
        )


@dataclass(frozen=True)
class Noised:
    """A noised latent and what the model should say of it; all [B, ...] float32.

    Attributes:
        noisy: [B, C, h, w] the model's input.
        target: [B, C, h, w] what it should predict.
        timesteps: [B] int64.
        snr: [B] signal-to-noise ratio alpha_bar / (1 - alpha_bar) at those timesteps.
    """

    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    snr: Tensor


class ForwardProcess:
    """q(x_t | x_0) of a diffusers noise scheduler, and the target of its prediction type, in float32."""

    def __init__(self, scheduler_config: dict, prediction_type: str | None):
        """Args:
        scheduler_config: the config of the pipeline's scheduler, of whichever class.
        prediction_type: replaces the config's.
        """
        from diffusers import DDPMScheduler

        if "beta_start" not in scheduler_config and scheduler_config.get("trained_betas") is None:
            name = scheduler_config.get("_class_name", "the pipeline's scheduler")
            raise UserError(f"{name} has no noise schedule by betas, and what was trained with it is not trained here")
        overrides = {} if prediction_type is None else {"prediction_type": prediction_type}
        self.scheduler = DDPMScheduler.from_config(scheduler_config, **overrides)
        self.prediction_type = self.scheduler.config.prediction_type
        self.num_timesteps = self.scheduler.config.num_train_timesteps
        alphas_cumprod = self.scheduler.alphas_cumprod.float()
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"the pipeline's scheduler has prediction_type {self.prediction_type!r}; "
                f"--prediction_type takes {', '.join(PREDICTION_TYPES)}"
            )
        if self.prediction_type == "epsilon" and float(alphas_cumprod[-1]) == 0:
            raise UserError(
                "--prediction_type must be v_prediction or sample for a scheduler with zero terminal SNR, got epsilon; "
                "at the last timestep epsilon says nothing of the image"
            )
        self._snr = alphas_cumprod / (1 - alphas_cumprod)

    def apply(self, latents: Tensor, noise: Tensor, timesteps: Tensor, input_perturbation: Tensor | None) -> Noised:
        """Noises latents (Ho et al. 2020, equation 4) and gives the target of the prediction type.

        Args:
            latents, noise: [B, C, h, w] float32.
            timesteps: [B] int64.
            input_perturbation: [B, C, h, w], added to the noise of the model's input but not to the target's, or None.
        """
        added = noise if input_perturbation is None else noise + input_perturbation
        noisy = self.scheduler.add_noise(latents, added, timesteps)
        if self.prediction_type == "epsilon":
            target = noise
        elif self.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        else:
            target = latents
        self._snr = self._snr.to(latents.device)
        return Noised(noisy, target, timesteps, self._snr[timesteps])


def timestep_weights(options: NoiseOptions, num_timesteps: int) -> np.ndarray:
    """[num_timesteps] float64, how often each timestep is drawn relative to the others."""
    weights = np.ones(num_timesteps)
    count = int(options.timestep_bias_portion * num_timesteps)
    if options.timestep_bias_strategy == "later":
        weights[num_timesteps - count :] *= options.timestep_bias_multiplier
    elif options.timestep_bias_strategy == "earlier":
        weights[:count] *= options.timestep_bias_multiplier
    elif options.timestep_bias_strategy == "range":
        begin, end = options.timestep_bias_begin, options.timestep_bias_end
        require(begin < num_timesteps, "timestep_bias_begin", begin, f"be below {num_timesteps}")
        require(begin < end <= num_timesteps, "timestep_bias_end", end, f"be in ({begin}, {num_timesteps}]")
        weights[begin:end] *= options.timestep_bias_multiplier
    return weights


@dataclass(frozen=True)
class SampleDraws:
    """What one sample's noising draws; arrays are [C, h, w] float32."""

    posterior_noise: np.ndarray
    noise: np.ndarray
    input_perturbation: np.ndarray | None
    timestep: int


class NoiseDraws:
    """Draws each sample's noise and timestep on the CPU, by (seed, step, slot) alone."""

    def __init__(self, options: NoiseOptions, num_timesteps: int, seed: int):
        self.options = options
        self.seed = seed
        weights = timestep_weights(options, num_timesteps)
        self._cumulative = np.cumsum(weights) / weights.sum()
        self._cumulative[-1] = 1.0

    def draw(self, step: int, slot: int, shape: tuple[int, int, int]) -> SampleDraws:
        """The draws of the sample at `slot` of the global batch of optimizer step `step`; `shape` is [C, h, w]."""
        noise = self._normal(step, slot, Stream.NOISE, shape)
        if self.options.noise_offset:
            offset = self._normal(step, slot, Stream.NOISE_OFFSET, (shape[0], 1, 1))
            noise = noise + np.float32(self.options.noise_offset) * offset
        perturbation = None
        if self.options.input_perturbation:
            scale = np.float32(self.options.input_perturbation)
            perturbation = scale * self._normal(step, slot, Stream.INPUT_PERTURBATION, shape)
        uniform = generator(self.seed, step, slot, Stream.TIMESTEP).random()
        return SampleDraws(
            posterior_noise=self._normal(step, slot, Stream.POSTERIOR, shape),
            noise=noise,
            input_perturbation=perturbation,
            timestep=int(np.searchsorted(self._cumulative, uniform, side="right")),
        )

    def _normal(self, step: int, slot: int, stream: Stream, shape: tuple[int, ...]) -> np.ndarray:
        return generator(self.seed, step, slot, stream).standard_normal(shape, dtype=np.float32)


def stack_draws(draws: list[SampleDraws]) -> dict[str, Tensor | None]:
    """The draws of several samples as the tensors of a batch, by the names that `Batch` has for them."""
    perturbations = [draw.input_perturbation for draw in draws]
    return {
        "posterior_noise": torch.from_numpy(np.stack([draw.posterior_noise for draw in draws])),
        "noise": torch.from_numpy(np.stack([draw.noise for draw in draws])),
        "input_perturbation": None if perturbations[0] is None else torch.from_numpy(np.stack(perturbations)),
        "timesteps": torch.tensor([draw.timestep for draw in draws], dtype=torch.int64),
    }
