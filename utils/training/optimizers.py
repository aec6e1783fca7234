"""Optimizers, their parameter groups, and the learning rate of each step."""

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn

from utils.config.options import UserError, as_number, option, require, require_not_negative, require_positive

logger = logging.getLogger(__name__)
SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "piecewise_constant",
    "cosine_warm_restarts",
    "step",
    "one_cycle",
    "reduce_on_plateau",
)
WITHOUT_WARMUP = ("constant", "piecewise_constant", "one_cycle")
LONGEST_WARMUP = 500  # optimizer steps, of a warm-up that is not asked for
LENGTH_SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "one_cycle")  # reach to the run's end
FUSED_DEVICES = {"cuda", "cpu"}
ONE_CYCLE_START = 25.0  # torch's OneCycleLR: the rate begins at 1/25 of its peak and ends at 1/10,000 of that
ONE_CYCLE_END = 1e4


@dataclass(frozen=True)
class OptimizerOptions:
    learning_rate: float = option(1e-4, "peak learning rate of the UNet")
    text_encoder_lr: float | None = option(
        None, "peak learning rate of the (first) text encoder; by default the UNet's"
    )
    text_encoder_2_lr: float | None = option(None, "peak learning rate of the second; by default the first's")
    layer_rates: list[str] | None = option(
        None,
        "factors on the rate of the weights whose names hold a regular expression, such as mid_block=2 attn2=0.5",
        is_text=True,
    )
    scale_lr: bool = option(False, "multiply the learning rates by batch size, accumulation and processes")
    optimizer: str | None = option(
        None,
        "adamw by default, fused where the device has it; adamw8bit, paged_adamw8bit and lion are bitsandbytes', "
        "adafactor and muon (for the matrices; AdamW for the rest) torch's, prodigy finds its rate itself",
    )
    use_8bit_adam: bool = option(False, "the same as --optimizer adamw8bit")
    adam_beta1: float = option(0.9, "decay of the mean gradient")
    adam_beta2: float | None = option(None, "decay of the mean squared gradient; by default 0.999, of lion 0.99")
    muon_momentum: float = option(0.95, "decay of muon's mean gradient")
    adam_weight_decay: float = option(1e-2, "decoupled weight decay, of all but biases and norms")
    adam_epsilon: float = option(1e-8, "term in AdamW's denominator")
    max_grad_norm: float | None = option(
        None, "gradients are scaled down to this norm, by default 1; 0 leaves them as they are"
    )
    fused_adamw: bool | None = option(
        None, "AdamW's step, with clipping and the guard against what is not finite, as one kernel; by default on"
    )
    optimizer_in_backward: bool = option(
        False, "step each weight as soon as its gradient is there, and free that: less memory, no clipping"
    )

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate", "text_encoder_lr", "text_encoder_2_lr", "adam_epsilon")
        require_not_negative(self, "adam_weight_decay", "max_grad_norm")
        for rule in self.layer_rates or ():
            pattern, separator, factor = rule.rpartition("=")
            must = "be REGULAR-EXPRESSION=FACTOR, such as mid_block=2"
            is_number = isinstance(as_number(factor), float) and 0 <= as_number(factor) < math.inf
            require(bool(separator and pattern) and is_number, "layer_rates", rule, must)
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"--layer_rates {pattern} is no regular expression: {error}") from error
        if self.layer_rates and self.optimizer == "prodigy":
            raise UserError("--optimizer prodigy has one rate for all it trains; leave out --layer_rates")
        if self.optimizer_in_backward and self.max_grad_norm:
            raise UserError(
                "--optimizer_in_backward never has all gradients at once, for --max_grad_norm; leave one out"
            )
        if self.optimizer_in_backward and self.optimizer == "prodigy":
            raise UserError("--optimizer prodigy finds one rate from all gradients; leave out --optimizer_in_backward")
        for name in ("adam_beta1", "adam_beta2", "muon_momentum"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, name, value, "be in [0, 1)")
        if self.optimizer is not None:
            require(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, f"be one of {', '.join(OPTIMIZERS)}")
        if self.use_8bit_adam and self.optimizer not in (None, "adamw8bit"):
            raise UserError(f"--use_8bit_adam is --optimizer adamw8bit, got --optimizer {self.optimizer}; give one")
        text_rates = {self.rate_of(name) for name in ("text_encoder", "text_encoder_2")}
        if self.optimizer == "prodigy" and text_rates != {self.learning_rate}:
            raise UserError("--optimizer prodigy has one rate for all it trains; leave out --text_encoder_lr")

    @property
    def name(self) -> str:
        """The name of the optimizer in `OPTIMIZERS`."""
        return self.optimizer or ("adamw8bit" if self.use_8bit_adam else "adamw")

    @property
    def clip_norm(self) -> float:
        """The norm that gradients are scaled down to; infinite to leave them as they are."""
        if self.max_grad_norm is None:
            return math.inf if self.optimizer_in_backward else 1.0
        return self.max_grad_norm or math.inf

    @property
    def betas(self) -> tuple[float, float]:
        """Decay of the mean gradient and of the mean squared gradient."""
        default = 0.99 if self.name == "lion" else 0.999
        return self.adam_beta1, default if self.adam_beta2 is None else self.adam_beta2

    def factor_of(self, name: str) -> float:
        """The factor on the rate of a weight by its name: that of the first of the rules that it holds."""
        for rule in self.layer_rates or ():
            pattern, _, factor = rule.rpartition("=")
            if re.search(pattern, name):
                return float(factor)
        return 1.0

    def scaled(self, factor: int) -> "OptimizerOptions":
        """The options with all learning rates times the factor where `--scale_lr` asks for it."""
        if not self.scale_lr:
            return self
        names = ("learning_rate", "text_encoder_lr", "text_encoder_2_lr")
        return replace(
            self, **{name: getattr(self, name) * factor for name in names if getattr(self, name) is not None}
        )

    def rate_of(self, module: str) -> float:
        """The peak learning rate of a trained module by its name, before scaling."""
        text_encoder = self.text_encoder_lr or self.learning_rate
        rates = {"text_encoder": text_encoder, "text_encoder_2": self.text_encoder_2_lr or text_encoder}
        return rates.get(module, self.learning_rate)


@dataclass(frozen=True)
class ScheduleOptions:
    lr_scheduler: str = option("constant", "course of the learning rate", choices=SCHEDULES)
    lr_warmup_steps: int | None = option(500, "optimizer steps over which the rate rises from 0; ignored by constant")
    lr_num_cycles: int = option(1, "hard restarts of cosine_with_restarts")
    lr_power: float = option(1.0, "power of the polynomial schedule")
    lr_t_0: int | None = option(None, "optimizer steps of the first cycle of cosine_warm_restarts")
    lr_t_mult: int = option(1, "how many times as long each next cycle of cosine_warm_restarts is")
    lr_step_size: int | None = option(None, "optimizer steps after which step multiplies the rate by --lr_gamma")
    lr_gamma: float = option(0.1, "factor of step and reduce_on_plateau")
    lr_patience: int = option(
        5,
        "measurements without a lower validation loss after which reduce_on_plateau multiplies the rate by --lr_gamma",
    )
    lr_pct_start: float = option(0.3, "portion of the run in which one_cycle rises")
    lr_step_rules: str | None = option(
        None, "rules of piecewise_constant: 1:10,0.1:20,0.01 is 1 to step 10, 0.1 to 20", is_text=True
    )

    def __post_init__(self) -> None:
        require_not_negative(self, "lr_warmup_steps", "lr_patience")
        require_positive(self, "lr_num_cycles", "lr_power", "lr_t_0", "lr_t_mult", "lr_step_size", "lr_gamma")
        require(0 < self.lr_pct_start < 1, "lr_pct_start", self.lr_pct_start, "be between 0 and 1")
        for schedule, name in (("cosine_warm_restarts", "lr_t_0"), ("step", "lr_step_size")):
            if (self.lr_scheduler == schedule) != (getattr(self, name) is not None):
                raise UserError(f"--lr_scheduler {schedule} and --{name} go together; give both or neither")
        if (self.lr_scheduler == "piecewise_constant") != (self.lr_step_rules is not None):
            raise UserError("--lr_scheduler piecewise_constant and --lr_step_rules go together; give both or neither")

    def fitted(self, total_steps: int, recorded: int | None) -> "ScheduleOptions":
        """The options with a warm-up: the one that is asked for, else a resumed run's own, else one that fits the run.

        Args:
            recorded: the warm-up of the checkpoint that the run resumes from.
        """
        if self.lr_warmup_steps is not None:
            return self
        fitting = min(LONGEST_WARMUP, total_steps // 10)
        return replace(self, lr_warmup_steps=fitting if recorded is None else recorded)

    def warning(self, total_steps: int) -> str:
        """What a warm-up of more than half of the run does, and the cure; empty if it is shorter."""
        warmup = self.lr_warmup_steps
        if self.lr_scheduler in WITHOUT_WARMUP or 2 * warmup <= total_steps:
            return ""
        does = f"the learning rate reaches --learning_rate only at step {warmup + 1} of {total_steps}"
        if warmup >= total_steps:
            share = 100 * (total_steps - 1) / warmup
            does = f"in {total_steps} steps the learning rate only rises, to {share:.0f} % of --learning_rate"
        return f"--lr_warmup_steps {warmup}: {does}; try --lr_warmup_steps {total_steps // 10}"


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, out of accelerate's wrapper where it has one."""
    return getattr(optimizer, "optimizer", optimizer)


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
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = devices <= FUSED_DEVICES if options.fused_adamw is None else options.fused_adamw
    return torch.optim.AdamW(groups, betas=options.betas, eps=options.adam_epsilon, fused=fused)


def _adamw_8bit(groups: list[dict], options: OptimizerOptions) -> torch.optim.Optimizer:
    return _of_bitsandbytes("AdamW8bit", options)(groups, betas=options.betas, eps=options.adam_epsilon)


def _paged_adamw_8bit(groups: list[dict], options: OptimizerOptions) -> torch.optim.Optimizer:
    """Its state moves to the host's memory where the device's is short (Dettmers et al. 2023, section 3)."""
    return _of_bitsandbytes("PagedAdamW8bit", options)(groups, betas=options.betas, eps=options.adam_epsilon)


def _lion(groups: list[dict], options: OptimizerOptions) -> torch.optim.Optimizer:
    """The sign of an average of gradients (Chen et al. 2023, algorithm 2); wants a tenth of AdamW's rate."""
    return _of_bitsandbytes("Lion", options)(groups, betas=options.betas)


def _of_bitsandbytes(name: str, options: OptimizerOptions) -> type[torch.optim.Optimizer]:
    """An optimizer of bitsandbytes that waits for the device at most once a step, and stays paged when it is loaded.

    By itself it waits after each parameter, and takes paged state back as ordinary memory of the device.
    """
    package = _package("bitsandbytes", options)
    kind, module = getattr(package.optim, name), package.optim.optimizer

    class Once(kind):
        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            """A step of all parameters."""
            parameters = [each for group in self.param_groups for each in group["params"]]
            strides = [(each, each.stride()) for each in parameters if not each.is_contiguous()]
            waits, module.sync_gpu = module.sync_gpu, lambda _: None
            try:
                loss = super().step(closure)
            finally:
                module.sync_gpu = waits
            if self.is_paged:  # what is paged moves beside the stream, and must be there before it is read
                waits(parameters[0])
            for parameter, before in strides:  # on a CPU it puts contiguous weights in the place of channels-last ones
                if parameter.stride() != before:
                    parameter.data = torch.empty_strided(parameter.shape, before, dtype=parameter.dtype).copy_(
                        parameter.data
                    )
            return loss

        def load_state_dict(self, *arguments: Any, **named: Any) -> None:
            """As every optimizer's."""
            super().load_state_dict(*arguments, **named)
            for parameter, state in self.state.items():
                page_again(self, parameter, state)

    Once.__name__ = Once.__qualname__ = name
    return Once


def page_again(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: dict[str, Any]) -> None:
    """Puts a parameter's loaded state where a paged optimizer of bitsandbytes has it; does nothing of any other."""
    if not getattr(optimizer, "is_paged", False):
        return
    for name in ("state1", "state2"):
        if isinstance(state.get(name), torch.Tensor):
            buffer = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
            state[name] = buffer.copy_(state[name])


def _adafactor(groups: list[dict], options: OptimizerOptions) -> torch.optim.Optimizer:
    """Row and column means for the mean squared gradient (Shazeer and Stern 2018), at the rate that is given."""
    if any(parameter.is_cuda for group in groups for parameter in group["params"]):
        logger.warning(
            "--optimizer adafactor waits for the GPU twice for each weight in each step, as PyTorch has it; adamw8bit "
            "takes little memory too, and waits once a step"
        )
    return torch.optim.Adafactor(groups)


def _prodigy(groups: list[dict], options: OptimizerOptions) -> torch.optim.Optimizer:
    """Finds the rate itself (Mishchenko and Defazio 2023); the learning rate is a factor on it."""
    return _package("prodigyopt", options).Prodigy(
        groups, betas=options.betas, eps=options.adam_epsilon, use_bias_correction=True, safeguard_warmup=True
    )


def _schedule_free_adamw(groups: list[dict], options: OptimizerOptions) -> torch.optim.Optimizer:
    """Averages its own steps in place of a schedule (Defazio et al. 2024); evaluated at the average."""
    optimizer = _package("schedulefree", options).AdamWScheduleFree(
        groups, betas=options.betas, eps=options.adam_epsilon
    )
    optimizer.train()
    return optimizer


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the matrices, AdamW for all else, as one optimizer.

    Muon's steps are scaled to the size of AdamW's (Liu et al. 2025, equation 4), so that one rate serves both.
    """

    def __init__(self, groups: list[dict], options: OptimizerOptions):
        matrices = [_only(group, lambda parameter: parameter.ndim == 2) for group in groups]
        others = [_only(group, lambda parameter: parameter.ndim != 2) for group in groups]
        matrices, others = ([group for group in part if group["params"]] for part in (matrices, others))
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            momentum, scale = options.muon_momentum, "match_rms_adamw"
            self._parts.append(torch.optim.Muon(matrices, momentum=momentum, adjust_lr_fn=scale))
        if others:
            self._parts.append(_adamw(others, options))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Has the parts work on this optimizer's own groups and state."""
        begin = 0
        for part in self._parts:
            end = begin + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[begin:end], self.state
            begin = end

    def load_state_dict(self, state_dict: dict) -> None:
        """As every optimizer's."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """A step of both."""
        for part in self._parts:
            part.step()


def _only(group: dict, chosen: Callable[[nn.Parameter], bool]) -> dict:
    return group | {"params": [parameter for parameter in group["params"] if chosen(parameter)]}


def _package(name: str, options: OptimizerOptions):
    """A package that only some optimizers need."""
    try:
        return import_module(name)
    except ImportError as error:
        flag = "--use_8bit_adam" if options.use_8bit_adam else f"--optimizer {options.name}"
        raise UserError(f"{flag} needs {name}; pip install {name}") from error


OPTIMIZERS: dict[str, Callable[[list[dict], OptimizerOptions], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw_8bit,
    "paged_adamw8bit": _paged_adamw_8bit,
    "adafactor": _adafactor,
    "lion": _lion,
    "prodigy": _prodigy,
    "schedule_free_adamw": _schedule_free_adamw,
    "muon": Muon,
}
STATE_BYTES = {
    **{"adamw": 8, "adamw8bit": 2, "paged_adamw8bit": 2, "adafactor": 0, "lion": 4, "prodigy": 16},
    **{"schedule_free_adamw": 8, "muon": 4},
}
"""Bytes of an optimizer's state per trained parameter: of matrices, to which what others have comes to little."""
OPTIMIZER_PACKAGES = {
    "adamw8bit": "bitsandbytes",
    "paged_adamw8bit": "bitsandbytes",
    "lion": "bitsandbytes",
    "prodigy": "prodigyopt",
    "schedule_free_adamw": "schedulefree",
}


def build_optimizer(parameters: list[NamedParameter], options: OptimizerOptions) -> torch.optim.Optimizer:
    """The optimizer of `--optimizer` over the parameters, which must be on their device."""
    return OPTIMIZERS[options.name](parameter_groups(parameters, options.adam_weight_decay), options)


def _cosine_warm_restarts(options: ScheduleOptions, total_steps: int, step: int) -> float:
    """Half a cosine in each cycle, each `lr_t_mult` times as long (Loshchilov and Hutter 2017, equation 5)."""
    step, length = max(0, step - options.lr_warmup_steps), options.lr_t_0
    if options.lr_t_mult > 1:
        cycle = int(math.log(step / length * (options.lr_t_mult - 1) + 1, options.lr_t_mult))
        while (
            length * (options.lr_t_mult ** (cycle + 1) - 1) // (options.lr_t_mult - 1) <= step
        ):  # lest log rounds down
            cycle += 1
        begin = length * (options.lr_t_mult**cycle - 1) // (options.lr_t_mult - 1)
        step, length = step - begin, length * options.lr_t_mult**cycle
    return _cosine(1.0, 0.0, step % length / length)


def _step(options: ScheduleOptions, total_steps: int, step: int) -> float:
    return options.lr_gamma ** (max(0, step - options.lr_warmup_steps) // options.lr_step_size)


def _constant(options: ScheduleOptions, total_steps: int, step: int) -> float:
    return 1.0


def _one_cycle(options: ScheduleOptions, total_steps: int, step: int) -> float:
    """Up and down again along cosines (Smith and Topin 2018), as torch's OneCycleLR."""
    rise = options.lr_pct_start * total_steps - 1
    begin, end = 1 / ONE_CYCLE_START, 1 / (ONE_CYCLE_START * ONE_CYCLE_END)
    if step <= rise:
        return _cosine(begin, 1.0, step / rise)
    return _cosine(1.0, end, min(1.0, (step - rise) / max(total_steps - 1 - rise, 1e-9)))


def _cosine(begin: float, end: float, portion: float) -> float:
    return end + (begin - end) / 2 * (1 + math.cos(math.pi * portion))


def _warmed_up(factor: Callable, options: ScheduleOptions, total_steps: int, step: int) -> float:
    """A factor after a linear rise from 0."""
    rise = 1.0 if step >= options.lr_warmup_steps else step / options.lr_warmup_steps
    return factor(options, total_steps, step) * rise


OWN_FACTORS: dict[str, Callable[[ScheduleOptions, int, int], float]] = {
    "cosine_warm_restarts": partial(_warmed_up, _cosine_warm_restarts),
    "step": partial(_warmed_up, _step),
    "one_cycle": _one_cycle,
    "reduce_on_plateau": partial(_warmed_up, _constant),  # times what the measurements so far say
}


def rate_factor(options: ScheduleOptions, peak_rate: float, total_steps: int) -> Callable[[int], float]:
    """The factor on the peak learning rate as a function of the optimizer step, from 0.

    The rate is computed from the step, so a resumed run has no schedule state to restore.

    Raises:
        UserError: for rules of piecewise_constant that can't be read.
    """
    from diffusers.optimization import get_scheduler

    if options.lr_scheduler in OWN_FACTORS:
        return partial(OWN_FACTORS[options.lr_scheduler], options, total_steps)
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
