"""`--fast`: which speed options are safe and faster on a device."""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from utils.runtime.engines import Engine
from utils.training.options import SpeedOptions

logger = logging.getLogger(__name__)
TENSOR_CORES = (7, 0)  # lowest compute capability with half-precision tensor cores and Triton support


@dataclass(frozen=True)
class Circumstances:
    """The facts that decide whether a speed option pays.

    Attributes:
        device: device type, such as cuda.
        capability: compute capability of a CUDA device.
        precision: no, fp16 or bf16.
        trains_base: whether the denoiser's own weights train in float32.
        sizes_vary: whether batches have several image sizes.
        can_compile: whether torch.compile works here and its gradients can be checked.
        is_spread: whether weights or optimizer state are sharded over the processes.
        is_deterministic: whether --deterministic is given.
    """

    device: str
    capability: tuple[int, int]
    precision: str
    trains_base: bool
    sizes_vary: bool
    can_compile: bool
    is_spread: bool
    is_deterministic: bool

    @property
    def has_tensor_cores(self) -> bool:
        """Whether half-precision matrix products run on tensor cores."""
        return self.device == "cuda" and self.capability >= TENSOR_CORES and self.precision != "no"


class Part(NamedTuple):
    """A speed option that `--fast` turns on.

    Attributes:
        name: name of the option.
        value: value to set.
        why: reason, for the log.
        pays: whether it is safe and faster under given circumstances.
    """

    name: str
    value: Any
    why: str
    pays: Callable[[Circumstances], bool]

    @property
    def flag(self) -> str:
        """The flag as given on the command line."""
        return f"--{self.name}" if self.value is True else f"--{self.name} {self.value}"


PARTS = (
    Part(
        "bf16_weights",
        True,
        "weights are cast once per step",
        lambda here: here.precision == "bf16" and here.trains_base and here.device in ("cuda", "cpu"),
    ),
    Part("channels_last", True, "convolutions without transposing", lambda here: here.has_tensor_cores),
    Part(
        "compile",
        "blocks",
        "fewer, larger kernels",
        lambda here: here.has_tensor_cores and here.can_compile,
    ),
    Part(
        "cudnn_benchmark",
        True,
        "the fastest convolutions for the only image size",
        lambda here: here.device == "cuda" and not here.sizes_vary and not here.is_deterministic,
    ),
)


def circumstances(engine: Engine, trains_base: bool, sizes_vary: bool, steps_in_backward: bool) -> Circumstances:
    """Returns the circumstances of a run on this machine."""
    device = engine.accelerator.device
    has_triton = importlib.util.find_spec("triton") is not None
    return Circumstances(
        device.type,
        torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0),
        engine.accelerator.mixed_precision,
        trains_base,
        sizes_vary,
        has_triton and not steps_in_backward,
        engine.spreads,
        torch.are_deterministic_algorithms_enabled(),
    )


def paying_parts(speed: SpeedOptions, here: Circumstances) -> list[Part]:
    """Returns the parts that pay and are not already given."""
    if here.is_spread:
        return []
    return [part for part in PARTS if part.pays(here) and not _is_given(speed, part)]


def _is_given(speed: SpeedOptions, part: Part) -> bool:
    return speed.compiled is not None if part.name == "compile" else bool(getattr(speed, part.name))


def hastened(speed: SpeedOptions, parts: list[Part]) -> SpeedOptions:
    """Returns the options with the parts turned on if `--fast` is given, and logs which and why."""
    if not speed.fast:
        return speed
    said = ", ".join(f"{part.flag} ({part.why})" for part in parts)
    logger.info("--fast turns on: %s", said or "nothing more that pays here")
    return replace(speed, **{part.name: part.value for part in parts})


def offer(speed: SpeedOptions, parts: list[Part]) -> None:
    """Logs what `--fast` would turn on."""
    if parts and not speed.fast:
        logger.info("--fast would add: %s", ", ".join(f"{part.flag} ({part.why})" for part in parts))
