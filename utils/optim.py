"""Optimizers, their parameter groups, and the learning rate of each step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from utils.options import UserError, option, require, require_not_negative, require_positive

SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "piecewise_constant",
)


@dataclass(frozen=True)
class OptimizerOptions:
    learning_rate: float = option(1e-4, "peak learning rate of the UNet")
    text_encoder_lr: float | None = option(
        None, "peak learning rate of the (first) text encoder; by default the UNet's"
    )
    text_encoder_2_lr: float | None = option(None, "peak learning rate of the second; by default the first's")
    scale_lr: bool = option(False, "multiply the learning rates by batch size, accumulation and processes")
    use_8bit_adam: bool = option(False, "AdamW with 8-bit state (bitsandbytes)")
    adam_beta1: float = option(0.9, "decay of the mean gradient")
    adam_beta2: float = option(0.999, "decay of the mean squared gradient")
    adam_weight_decay: float = option(1e-2, "decoupled weight decay, of all but biases and norms")
    adam_epsilon: float = option(1e-8, "term in AdamW's denominator")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0 leaves them as they are")

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate", "text_encoder_lr", "text_encoder_2_lr", "adam_epsilon")
        require_not_negative(self, "adam_weight_decay", "max_grad_norm")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "be in [0, 1)")

    @property
    def optimizer(self) -> str:
        """The name of the optimizer in `OPTIMIZERS`."""
        return "adamw8bit" if self.use_8bit_adam else "adamw"

    def rate_of(self, module: str) -> float:
        """The peak learning rate of a trained module by its name, before scaling."""
        text_encoder = self.text_encoder_lr or self.learning_rate
        rates = {"text_encoder": text_encoder, "text_encoder_2": self.text_encoder_2_lr or text_encoder}
        return rates.get(module, self.learning_rate)


@dataclass(frozen=True)
class ScheduleOptions:
    lr_scheduler: str = option("constant", "course of the learning rate", choices=SCHEDULES)
    lr_warmup_steps: int = option(500, "optimizer steps over which the rate rises from 0; ignored by constant")
    lr_num_cycles: int = option(1, "hard restarts of cosine_with_restarts")
    lr_power: float = option(1.0, "power of the polynomial schedule")
    lr_step_rules: str | None = option(None, "rules of piecewise_constant: 1:10,0.1:20,0.01 is 1 to step 10, 0.1 to 20")

    def __post_init__(self) -> None:
        require_not_negative(self, "lr_warmup_steps")
        require_positive(self, "lr_num_cycles", "lr_power")
        if (self.lr_scheduler == "piecewise_constant") != (self.lr_step_rules is not None):
            raise UserError("--lr_scheduler piecewise_constant and --lr_step_rules go together; give both or neither")


class NamedParameter(NamedTuple):
    """A trained parameter, the name it is saved under, and the peak learning rate of its module."""

    name: str
    parameter: nn.Parameter
    rate: float


def parameter_groups(parameters: list[NamedParameter], weight_decay: float) -> list[dict]:
    """Groups of one learning rate (kept as `peak_lr`) each, without weight decay on vectors: biases and norms."""
    groups: dict[tuple[float, float], dict] = {}
    for _, parameter, rate in parameters:
        decay = weight_decay if parameter.ndim > 1 else 0.0
        group = {"params": [], "lr": rate, "peak_lr": rate, "weight_decay": decay}
        groups.setdefault((rate, decay), group)["params"].append(parameter)
    return list(groups.values())


def _adamw(groups: list[dict], options: OptimizerOptions) -> torch.optim.Optimizer:
    on_cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(
        groups,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=True if on_cuda else None,
    )


def _adamw_8bit(groups: list[dict], options: OptimizerOptions) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError("--use_8bit_adam needs bitsandbytes; pip install bitsandbytes") from error
    return AdamW8bit(groups, betas=(options.adam_beta1, options.adam_beta2), eps=options.adam_epsilon)


OPTIMIZERS: dict[str, Callable[[list[dict], OptimizerOptions], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw_8bit,
}


def build_optimizer(parameters: list[NamedParameter], options: OptimizerOptions) -> torch.optim.Optimizer:
    """The optimizer of `--optimizer` over the parameters, which must be on their device."""
    return OPTIMIZERS[options.optimizer](parameter_groups(parameters, options.adam_weight_decay), options)


def rate_factor(options: ScheduleOptions, peak_rate: float, total_steps: int) -> Callable[[int], float]:
    """The factor on the peak learning rate as a function of the optimizer step, from 0: a diffusers schedule.

    The rate is computed from the step, so a resumed run has no schedule state to restore.

    Raises:
        UserError: for rules of piecewise_constant that can't be read.
    """
    from diffusers.optimization import get_scheduler

    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak_rate)
    try:
        schedule = get_scheduler(
            options.lr_scheduler,
            stand_in,
            step_rules=options.lr_step_rules,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=total_steps,
            num_cycles=options.lr_num_cycles,
            power=options.lr_power,
        )
    except (ValueError, IndexError) as error:
        raise UserError(f"the learning rate schedule {options.lr_scheduler} can't be made: {error}") from error
    return schedule.lr_lambdas[0]


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets the rate of each group to its peak times the factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
