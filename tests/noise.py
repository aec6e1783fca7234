"""Draws of noise, and the noise schedule of Stable Diffusion."""

from utils.diffusion.noise import ForwardProcess, NoiseDraws
from utils.diffusion.options import NoiseOptions

SD_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def drawing(num_timesteps: int = 1000, global_batch: int = 20, **options) -> NoiseDraws:
    """The draws of a run with these noise options."""
    process = ForwardProcess(SD_SCHEDULE | {"num_train_timesteps": num_timesteps}, {})
    return NoiseDraws(NoiseOptions(**options), process, 0, global_batch)
