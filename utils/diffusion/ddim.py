"""DDIM with consistent steps; diffusers' own scheduler takes them only with some settings."""

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class ConsistentDDIMScheduler(DDIMScheduler):
    """DDIM (Song et al. 2021, equation 12) whose clean estimate and noise always add up to the noisy sample.

    diffusers' `DDIMScheduler` differs from the equation in three ways. It clips the clean estimate, but by default
    keeps the noise of the unclipped one. It steps down by T // n timesteps, which is not the distance to the next
    timestep where n does not divide T. And for some n, rounding adds a timestep of -1.

    Attributes:
        eta: portion of DDPM's noise that each step adds, unless `step` is given another.
    """

    eta = 0.0

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Sets the timesteps, all of them at least 0."""
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = self.timesteps[self.timesteps >= 0]

    def step(  # noqa: PLR0913 - the signature is that of diffusers
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Steps from a timestep to the next one, with the arguments of `DDIMScheduler.step`.

        Args:
            use_clipped_model_output: has no effect: the noise always follows from the clipped clean estimate.
        """
        # find the next timestep, and split the sample into clean estimate and noise
        timestep, eta = int(timestep), eta or self.eta
        lower = self.timesteps[self.timesteps < timestep]
        previous = int(lower[0]) if len(lower) else -1
        clean = super().step(model_output, timestep, sample).pred_original_sample
        signal = self.alphas_cumprod[timestep]
        signal_after = self.alphas_cumprod[previous] if previous >= 0 else self.final_alpha_cumprod
        noise = (sample - signal**0.5 * clean) / (1 - signal) ** 0.5

        # mix them for the next timestep, with fresh noise if eta > 0
        deviation = eta * self._get_variance(timestep, previous) ** 0.5
        result = signal_after**0.5 * clean + (1 - signal_after - deviation**2).clamp(min=0) ** 0.5 * noise
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=model_output.dtype
                )
            result = result + deviation * variance_noise
        return DDIMSchedulerOutput(prev_sample=result, pred_original_sample=clean) if return_dict else (result, clean)
