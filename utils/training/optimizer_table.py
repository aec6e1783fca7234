"""Table of optimizers, readable without loading torch. To add one, write a function and add a row here."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from utils.config.options import UserError

if TYPE_CHECKING:
    import torch

    from utils.training.optimizer_options import OptimizerOptions

logger = logging.getLogger(__name__)
ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
Make = Callable[[list[dict], "OptimizerOptions"], "torch.optim.Optimizer"]


@dataclass(frozen=True)
class OptimizerSpec:
    """A row of the table of optimizers.

    Attributes:
        make: builds it from parameter groups.
        state_bytes: bytes of state per trained parameter, of matrices.
        reads: optimizer-specific flags that it reads.
        package: package that it needs beside torch.
        beta2: default of --adam_beta2.
        schedules: learning-rate schedules that it works with; None for all.
        has_one_rate: whether it finds one learning rate for all weights, from all gradients at once; --learning_rate is
            then a factor on it, best near 1.
    """

    make: Make
    state_bytes: int
    reads: tuple[str, ...] = ADAM
    package: str | None = None
    beta2: float = 0.999
    schedules: tuple[str, ...] | None = None
    has_one_rate: bool = False


def package_of(options: "OptimizerOptions") -> ModuleType:
    """Imports the package that an optimizer needs beside torch.

    Raises:
        UserError: if it can't be imported.
    """
    name = options.spec.package
    try:
        return import_module(name)
    except ImportError as error:
        flag = "--use_8bit_adam" if options.use_8bit_adam else f"--optimizer {options.name}"
        raise UserError(f"{flag} needs {name}; pip install {name}") from error


def _adamw(groups: list[dict], options: "OptimizerOptions") -> "torch.optim.Optimizer":
    from utils.training.optimizers import adamw

    return adamw(groups, options)


def _adamw_8bit(groups: list[dict], options: "OptimizerOptions") -> "torch.optim.Optimizer":
    from utils.training.optimizers import of_bitsandbytes

    return of_bitsandbytes("AdamW8bit", options)(groups, betas=options.betas, eps=options.adam_epsilon)


def _paged_adamw_8bit(groups: list[dict], options: "OptimizerOptions") -> "torch.optim.Optimizer":
    """8-bit AdamW whose state moves to host memory if device memory is short (Dettmers et al. 2023, section 3)."""
    from utils.training.optimizers import of_bitsandbytes

    return of_bitsandbytes("PagedAdamW8bit", options)(groups, betas=options.betas, eps=options.adam_epsilon)


def _lion(groups: list[dict], options: "OptimizerOptions") -> "torch.optim.Optimizer":
    """Lion: steps by the sign of averaged gradients (Chen et al. 2023, algorithm 2); needs a tenth of AdamW's rate."""
    from utils.training.optimizers import of_bitsandbytes

    return of_bitsandbytes("Lion", options)(groups, betas=options.betas)


def _adafactor(groups: list[dict], options: "OptimizerOptions") -> "torch.optim.Optimizer":
    """Adafactor: row and column means of squared gradients (Shazeer and Stern 2018), with the given learning rate."""
    import torch

    if any(parameter.is_cuda for group in groups for parameter in group["params"]):
        logger.warning(
            "--optimizer adafactor: PyTorch's implementation waits for the GPU twice per weight in each step; "
            "adamw8bit needs little memory too and waits once per step"
        )
    return torch.optim.Adafactor(groups)


def _prodigy(groups: list[dict], options: "OptimizerOptions") -> "torch.optim.Optimizer":
    """Prodigy: finds the learning rate itself (Mishchenko and Defazio 2023); the given rate is a factor on it."""
    return package_of(options).Prodigy(
        groups, betas=options.betas, eps=options.adam_epsilon, use_bias_correction=True, safeguard_warmup=True
    )


def _schedule_free_adamw(groups: list[dict], options: "OptimizerOptions") -> "torch.optim.Optimizer":
    """AdamW that averages its iterates instead of using a schedule (Defazio et al. 2024); evaluated at the average."""
    optimizer = package_of(options).AdamWScheduleFree(groups, betas=options.betas, eps=options.adam_epsilon)
    optimizer.train()
    return optimizer


def _muon(groups: list[dict], options: "OptimizerOptions") -> "torch.optim.Optimizer":
    """Muon (Jordan et al. 2024) for matrices, AdamW for the other weights."""
    from utils.training.optimizers import Muon

    return Muon(groups, options)


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": OptimizerSpec(_adamw, state_bytes=8, reads=(*ADAM, "fused_adamw")),
    "adamw8bit": OptimizerSpec(_adamw_8bit, state_bytes=2, package="bitsandbytes"),
    "paged_adamw8bit": OptimizerSpec(_paged_adamw_8bit, state_bytes=2, package="bitsandbytes"),
    "adafactor": OptimizerSpec(_adafactor, state_bytes=0, reads=()),
    "lion": OptimizerSpec(_lion, state_bytes=4, reads=ADAM[:2], package="bitsandbytes", beta2=0.99),
    "prodigy": OptimizerSpec(_prodigy, state_bytes=16, package="prodigyopt", has_one_rate=True),
    "schedule_free_adamw": OptimizerSpec(
        _schedule_free_adamw, state_bytes=8, package="schedulefree", schedules=("constant", "constant_with_warmup")
    ),
    "muon": OptimizerSpec(_muon, state_bytes=4, reads=(*ADAM, "fused_adamw", "muon_momentum")),
}


def without(flag: str) -> tuple[str, ...]:
    """Returns the names of the optimizers that do not read a flag."""
    return tuple(name for name, spec in OPTIMIZERS.items() if flag not in spec.reads)
