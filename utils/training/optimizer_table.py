"""The optimizers: a row for each, known without loading torch. A new optimizer is a function and a row here."""

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
    """What is known of an optimizer.

    Attributes:
        make: builds it over groups of parameters.
        state_bytes: of its state for each trained parameter; what only vectors have is left out.
        reads: the flags that only some optimizers read and this one does.
        package: that it needs beside torch.
        beta2: the default decay of the mean squared gradient.
        schedules: the learning-rate schedules that it goes with; None for all.
        has_one_rate: whether it finds one rate for all weights, from all gradients at once; the rate that is given is
            then a factor, best near 1.
    """

    make: Make
    state_bytes: int
    reads: tuple[str, ...] = ADAM
    package: str | None = None
    beta2: float = 0.999
    schedules: tuple[str, ...] | None = None
    has_one_rate: bool = False


def package_of(options: "OptimizerOptions") -> ModuleType:
    """The package that an optimizer needs beside torch.

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
    """Its state moves to the host's memory where the device's is short (Dettmers et al. 2023, section 3)."""
    from utils.training.optimizers import of_bitsandbytes

    return of_bitsandbytes("PagedAdamW8bit", options)(groups, betas=options.betas, eps=options.adam_epsilon)


def _lion(groups: list[dict], options: "OptimizerOptions") -> "torch.optim.Optimizer":
    """The sign of an average of gradients (Chen et al. 2023, algorithm 2); wants a tenth of AdamW's rate."""
    from utils.training.optimizers import of_bitsandbytes

    return of_bitsandbytes("Lion", options)(groups, betas=options.betas)


def _adafactor(groups: list[dict], options: "OptimizerOptions") -> "torch.optim.Optimizer":
    """Row and column means for the mean squared gradient (Shazeer and Stern 2018), at the rate that is given."""
    import torch

    if any(parameter.is_cuda for group in groups for parameter in group["params"]):
        logger.warning(
            "--optimizer adafactor waits for the GPU twice for each weight in each step, as PyTorch has it; adamw8bit "
            "takes little memory too, and waits once a step"
        )
    return torch.optim.Adafactor(groups)


def _prodigy(groups: list[dict], options: "OptimizerOptions") -> "torch.optim.Optimizer":
    """Finds the rate itself (Mishchenko and Defazio 2023); the learning rate is a factor on it."""
    return package_of(options).Prodigy(
        groups, betas=options.betas, eps=options.adam_epsilon, use_bias_correction=True, safeguard_warmup=True
    )


def _schedule_free_adamw(groups: list[dict], options: "OptimizerOptions") -> "torch.optim.Optimizer":
    """Averages its own steps in place of a schedule (Defazio et al. 2024); evaluated at the average."""
    optimizer = package_of(options).AdamWScheduleFree(groups, betas=options.betas, eps=options.adam_epsilon)
    optimizer.train()
    return optimizer


def _muon(groups: list[dict], options: "OptimizerOptions") -> "torch.optim.Optimizer":
    """Muon (Jordan et al. 2024) for the matrices, AdamW for all else."""
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
    """The optimizers that do not read a flag."""
    return tuple(name for name, spec in OPTIMIZERS.items() if flag not in spec.reads)
