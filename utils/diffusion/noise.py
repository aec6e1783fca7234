"""Forward diffusion: draws noise and timesteps, and adds the noise to latents."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from utils.config.batch import Noised
from utils.config.file_names import SCHEDULER_CONFIG
from utils.config.options import UserError, require
from utils.config.seeding import Stream, generator
from utils.diffusion.options import PREDICTION_TYPES, NoiseOptions
from utils.diffusion.schedulers import scheduler_of


class ForwardProcess:
    """q(x_t | x_0) of a diffusers noise scheduler, and the target of its prediction type, in float32.

    Attributes:
        scheduler: diffusers' DDPM scheduler with this noise schedule.
        prediction_type: epsilon, v_prediction or sample.
        num_timesteps: T, the length of the noise schedule.
        alphas_cumprod: [T] alpha_bar of each timestep; snr = alpha_bar / (1 - alpha_bar).
        default_distribution: the timestep distribution unless the options name one.
    """

    default_distribution = "uniform"

    def __init__(self, scheduler_config: Mapping, changes: Mapping[str, object]):
        """Reads the noise schedule from a scheduler's config.

        Args:
            scheduler_config: config of the pipeline's scheduler, of any class with a beta schedule.
            changes: values that replace those of the config.

        Raises:
            UserError: if the config has no valid beta schedule, or its prediction type can't be trained.
        """
        from diffusers import DDPMScheduler

        if "beta_start" not in scheduler_config and scheduler_config.get("trained_betas") is None:
            name = scheduler_config.get("_class_name", "the pipeline's scheduler")
            raise UserError(f"{name} has no beta schedule; models with such a scheduler can't be trained here")
        self.scheduler = scheduler_of(DDPMScheduler, scheduler_config, changes)
        self.prediction_type = self.scheduler.config.prediction_type
        self.num_timesteps = self.scheduler.config.num_train_timesteps
        self.alphas_cumprod = alphas_cumprod = self.scheduler.alphas_cumprod.float()
        self._check_betas()
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"the pipeline's scheduler has prediction_type {self.prediction_type!r}; "
                f"--prediction_type takes {', '.join(PREDICTION_TYPES)}"
            )
        if self.prediction_type == "epsilon" and float(alphas_cumprod[-1]) == 0:
            raise UserError(
                "--prediction_type must be v_prediction or sample with zero terminal SNR, got epsilon; "
                "at the last timestep an epsilon prediction holds no information about the image"
            )
        self._snr = alphas_cumprod / (1 - alphas_cumprod)

    def _check_betas(self) -> None:
        """Refuses a noise schedule whose length differs from the config, or whose values are out of range."""
        count, alphas = len(self.alphas_cumprod), self.alphas_cumprod
        if count != self.num_timesteps:
            raise UserError(
                f"the pipeline's {SCHEDULER_CONFIG}: trained_betas has {count:,} betas, but num_train_timesteps is "
                f"{self.num_timesteps:,}; the two must be equal"
            )
        if not bool(((alphas >= 0) & (alphas <= 1)).all()):
            raise UserError(f"the pipeline's {SCHEDULER_CONFIG}: its betas must be in [0, 1], not NaN")

    def describe(self) -> str:
        """Returns the prediction type and the noise schedule, for the log."""
        config = self.scheduler.config
        betas = f"{config.beta_schedule} betas from {config.beta_start:g} to {config.beta_end:g}"
        if config.trained_betas is not None:
            betas = "custom betas"
        terminal = "zero" if float(self.alphas_cumprod[-1]) == 0 else f"{float(self._snr[-1]):.3g}"
        return f"{self.prediction_type}, {betas} in {self.num_timesteps:,} timesteps, terminal SNR {terminal}"

    def apply(self, latents: Tensor, noise: Tensor, timesteps: Tensor, input_perturbation: Tensor | None) -> Noised:
        """Adds noise to latents (Ho et al. 2020, equation 4) and returns it with the target of the prediction type.

        Args:
            latents, noise: [B, C, h, w] float32.
            timesteps: [B] int64.
            input_perturbation: [B, C, h, w], extra noise for the model's input but not for the target, or None.
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
        return Noised(noisy, target, timesteps, self._snr[timesteps], self.num_timesteps)

    def estimate(self, noised: Noised, prediction: Tensor) -> Tensor:
        """Returns the clean latents [B, C, h, w] float32 that a prediction implies (Salimans, Ho 2022, appendix D)."""
        snr = noised.snr.view(-1, 1, 1, 1)
        signal, spread = (snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt()  # sqrt(alpha_bar), sqrt(1 - alpha_bar)
        if self.prediction_type == "epsilon":
            return (noised.noisy - spread * prediction.float()) / signal
        if self.prediction_type == "v_prediction":
            return signal * noised.noisy - spread * prediction.float()
        return prediction.float()


def rectify(noised: Noised, estimate: Tensor, detail_preservation: float) -> Noised:
    """Corrects input and target by the model's own prediction (DREAM, Zhou et al. 2023, algorithm 1).

    Adds delta = (1 - alpha_bar)^(p / 2) (target - estimate) to the target, and sqrt(1 - alpha_bar) delta to the input.

    Args:
        noised: the model's input and its target, epsilon.
        estimate: [B, C, h, w] the model's prediction for `noised`, without gradient.
        detail_preservation: p.
    """
    spread = (1 / (1 + noised.snr)).sqrt().view(-1, 1, 1, 1)  # sqrt(1 - alpha_bar)
    delta = spread**detail_preservation * (noised.target - estimate.float())
    return replace(noised, noisy=noised.noisy + spread * delta, target=noised.target + delta)


def timestep_weights(options: NoiseOptions, alphas_cumprod: np.ndarray, default: str = "uniform") -> np.ndarray:
    """Returns [T] float64: how often each timestep is drawn relative to the others.

    Args:
        options: the distribution, the bias and the range of the timesteps.
        alphas_cumprod: [T] float64, alpha_bar of each timestep.
        default: the distribution unless the options name one.

    Raises:
        UserError: if the range of the bias or of the timesteps does not fit T.
    """
    # the distribution
    num_timesteps = len(alphas_cumprod)
    weights = np.ones(num_timesteps)
    distribution = options.timestep_distribution or default
    if distribution == "log_normal":
        weights = _log_normal_weights(options, alphas_cumprod)
    elif distribution == "logit_normal":
        weights = _logit_normal_weights(options, num_timesteps)

    # the bias
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

    # the range
    first, end = options.min_timestep, options.max_timestep or num_timesteps
    require(first < num_timesteps, "min_timestep", first, f"be below {num_timesteps}")
    require(first < end <= num_timesteps, "max_timestep", end, f"be in ({first}, {num_timesteps}]")
    weights[:first] = weights[end:] = 0
    return weights


def _log_normal_weights(options: NoiseOptions, alphas_cumprod: np.ndarray) -> np.ndarray:
    """Returns [T] probabilities for a truncated normal distribution of log sigma (Karras et al. 2022, table 1)."""
    with np.errstate(divide="ignore"):
        log_sigma = 0.5 * (np.log1p(-alphas_cumprod) - np.log(alphas_cumprod))
    log_sigma = np.minimum(log_sigma, 20.0)  # infinite for zero terminal SNR
    middles = (log_sigma[1:] + log_sigma[:-1]) / 2
    edges = np.concatenate([[log_sigma[0] - (middles[0] - log_sigma[0])], middles, [2 * log_sigma[-1] - middles[-1]]])
    scaled = (edges - options.log_normal_mean) / (options.log_normal_std * math.sqrt(2))
    return np.diff([0.5 * math.erf(edge) for edge in scaled])


def _logit_normal_weights(options: NoiseOptions, num_timesteps: int) -> np.ndarray:
    """Returns [T] probabilities for a normal distribution of the logit of t / T (Esser et al. 2024, equation 19)."""
    edges = np.linspace(0, 1, num_timesteps + 1)[1:-1]
    scaled = (np.log(edges / (1 - edges)) - options.logit_mean) / (options.logit_std * math.sqrt(2))
    return np.diff([-0.5, *(0.5 * math.erf(edge) for edge in scaled), 0.5])


@dataclass(frozen=True)
class SampleDraws:
    """The random draws of one sample; arrays are [C, h, w] float32.

    Attributes:
        posterior_noise: noise that draws a latent from the VAE's posterior; None if latents are not drawn.
        noise: the noise to add and predict.
        input_perturbation: extra noise for the model's input only, or None.
        timestep: from 0 to T - 1.
    """

    posterior_noise: np.ndarray | None
    noise: np.ndarray
    input_perturbation: np.ndarray | None
    timestep: int


class NoiseDraws:
    """Draws each sample's noise and timestep on the CPU, as a function of (seed, step, slot) alone.

    Args:
        options: the noise options.
        process: the forward process, whose timesteps are drawn.
        seed: the run's seed.
        global_batch: samples per optimizer step over all processes.
        has_posterior: whether to draw noise for the VAE's posterior too.
    """

    def __init__(
        self, options: NoiseOptions, process: ForwardProcess, seed: int, global_batch: int, has_posterior: bool = True
    ):
        self.options = options
        self.has_posterior = has_posterior
        self.seed = seed
        self.global_batch = global_batch
        alphas = process.alphas_cumprod.cpu().double().numpy()
        weights = timestep_weights(options, alphas, process.default_distribution)
        self._cumulative = np.cumsum(weights) / weights.sum()
        self._cumulative[np.flatnonzero(weights)[-1] :] = 1.0

    def draw(self, step: int, slot: int, shape: tuple[int, int, int]) -> SampleDraws:
        """Draws for the sample in `slot` of the global batch of optimizer step `step`; `shape` is [C, h, w]."""
        noise = self._normal(step, slot, Stream.NOISE, shape)
        if self.options.noise_offset:
            offset = self._normal(step, slot, Stream.NOISE_OFFSET, (shape[0], 1, 1))
            noise = noise + np.float32(self.options.noise_offset) * offset
        if self.options.multires_noise_iterations:
            noise = self._pyramid(noise, step, slot)
        perturbation = None
        if self.options.input_perturbation:
            scale = np.float32(self.options.input_perturbation)
            perturbation = scale * self._normal(step, slot, Stream.INPUT_PERTURBATION, shape)
        return SampleDraws(
            posterior_noise=self._normal(step, slot, Stream.POSTERIOR, shape) if self.has_posterior else None,
            noise=noise,
            input_perturbation=perturbation,
            timestep=int(np.searchsorted(self._cumulative, self._uniform(step, slot), side="right")),
        )

    def _uniform(self, step: int, slot: int) -> float:
        """Draws a number in [0, 1); if stratified, one from each of as many equal parts as the batch has samples."""
        uniform = generator(self.seed, step, slot, Stream.TIMESTEP).random()
        if self.options.timestep_sampling == "independent":
            return uniform
        strata = generator(self.seed, step, 0, Stream.STRATA).permutation(self.global_batch)
        return (strata[slot] + uniform) / self.global_batch

    def _pyramid(self, noise: np.ndarray, step: int, slot: int) -> np.ndarray:
        """Adds noise at coarser and coarser scales, then scales to unit variance (pyramid noise, Whitaker 2023).

        Scale k is coarser by f^k, with f drawn from 2 to 4.
        """
        draws = generator(self.seed, step, slot, Stream.PYRAMID)
        total, (channels, height, width) = torch.from_numpy(noise)[None], noise.shape
        for scale in range(self.options.multires_noise_iterations):
            factor = (2 + 2 * draws.random()) ** scale
            size = (channels, max(1, int(height / factor)), max(1, int(width / factor)))
            coarse = torch.from_numpy(draws.standard_normal(size, dtype=np.float32))[None]
            enlarged = functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
            total = total + enlarged * self.options.multires_noise_discount**scale
            if 1 in size[1:]:
                break
        return (total / total.std())[0].numpy()

    def _normal(self, step: int, slot: int, stream: Stream, shape: tuple[int, ...]) -> np.ndarray:
        return generator(self.seed, step, slot, stream).standard_normal(shape, dtype=np.float32)


def stack_draws(draws: list[SampleDraws]) -> dict[str, Tensor | None]:
    """Stacks the draws of several samples into batch tensors, by the names of the fields of `Batch`."""
    names = ("posterior_noise", "noise", "input_perturbation")
    arrays = {name: [getattr(draw, name) for draw in draws] for name in names}
    stacked = {name: None if each[0] is None else torch.from_numpy(np.stack(each)) for name, each in arrays.items()}
    return stacked | {
        "timesteps": torch.tensor([draw.timestep for draw in draws], dtype=torch.int64),
    }
