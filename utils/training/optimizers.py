"""Builds optimizers and their parameter groups, and computes the learning rate of each step."""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from utils.config.options import UserError
from utils.training.optimizer_options import OptimizerOptions, ScheduleOptions
from utils.training.optimizer_table import package_of

logger = logging.getLogger(__name__)
FUSED_DEVICES = {"cuda", "cpu"}
ONE_CYCLE_START = 25.0  # as torch's OneCycleLR: the rate starts at 1/25 of its peak and ends at 1/10,000 of that
ONE_CYCLE_END = 1e4


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Returns the optimizer inside accelerate's wrapper, or the optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)


class NamedParameter(NamedTuple):
    """A trained parameter, its name in files, and its peak learning rate."""

    name: str
    parameter: nn.Parameter
    rate: float


def parameter_groups(parameters: list[NamedParameter], weight_decay: float) -> list[dict]:
    """Returns a group per learning rate (kept as `peak_lr`) and weight decay; vectors (biases, norms) do not decay."""
    groups: dict[tuple[float, float], dict] = {}
    for _, parameter, rate in parameters:
        decay = weight_decay if parameter.ndim > 1 else 0.0
        group = {"params": [], "lr": rate, "peak_lr": rate, "weight_decay": decay}
        groups.setdefault((rate, decay), group)["params"].append(parameter)
    return list(groups.values())


def adamw(groups: list[dict], options: OptimizerOptions) -> torch.optim.Optimizer:
    """Builds torch's AdamW, fused if the devices support it."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = devices <= FUSED_DEVICES if options.fused_adamw is None else options.fused_adamw
    return torch.optim.AdamW(groups, betas=options.betas, eps=options.adam_epsilon, fused=fused)


def of_bitsandbytes(name: str, options: OptimizerOptions) -> type[torch.optim.Optimizer]:
    """Returns a bitsandbytes optimizer class that waits for the device at most once per step and reloads paged state.

    The original waits after each parameter, and loads paged state into ordinary device memory.
    """
    package = package_of(options)
    kind, module = getattr(package.optim, name), package.optim.optimizer

    class Once(kind):
        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            """Updates all parameters."""
            # Step without waiting after each parameter.
            parameters = [each for group in self.param_groups for each in group["params"]]
            strides = [(each, each.stride()) for each in parameters if not each.is_contiguous()]
            waits, module.sync_gpu = module.sync_gpu, lambda _: None
            try:
                loss = super().step(closure)
            finally:
                module.sync_gpu = waits
            if self.is_paged:  # paging is asynchronous to the stream, and must be complete before state is read
                waits(parameters[0])
            for parameter, before in strides:  # on a CPU it replaces channels-last weights by contiguous ones
                if parameter.stride() != before:
                    parameter.data = torch.empty_strided(parameter.shape, before, dtype=parameter.dtype).copy_(
                        parameter.data
                    )
            return loss

        def load_state_dict(self, *arguments: Any, **named: Any) -> None:
            """Loads the state, as `torch.optim.Optimizer` does, and pages it."""
            super().load_state_dict(*arguments, **named)
            for parameter, state in self.state.items():
                page_again(self, parameter, state)

    Once.__name__ = Once.__qualname__ = name
    return Once


def page_again(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: dict[str, Any]) -> None:
    """Moves a parameter's loaded state into paged memory if the optimizer is a paged one of bitsandbytes."""
    if not getattr(optimizer, "is_paged", False):
        return
    for name in ("state1", "state2"):
        if isinstance(state.get(name), torch.Tensor):
            buffer = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
            state[name] = buffer.copy_(state[name])


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices and AdamW for other weights, as one optimizer.

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, equation 4), so both use one learning rate.
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
            self._parts.append(adamw(others, options))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Lets both parts use this optimizer's groups and state."""
        begin = 0
        for part in self._parts:
            end = begin + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[begin:end], self.state
            begin = end

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads the state, as `torch.optim.Optimizer` does, and shares it with both parts."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Takes a step of both parts."""
        for part in self._parts:
            part.step()


def _only(group: dict, chosen: Callable[[nn.Parameter], bool]) -> dict:
    return group | {"params": [parameter for parameter in group["params"] if chosen(parameter)]}


def build_optimizer(parameters: list[NamedParameter], options: OptimizerOptions) -> torch.optim.Optimizer:
    """Builds the optimizer of `--optimizer`; the parameters must be on their device already."""
    return options.spec.make(parameter_groups(parameters, options.adam_weight_decay), options)


def _cosine_warm_restarts(options: ScheduleOptions, total_steps: int, step: int) -> float:
    """Half a cosine per cycle, each cycle `lr_t_mult` times as long (Loshchilov and Hutter 2017, equation 5)."""
    step, length = max(0, step - options.lr_warmup_steps), options.lr_t_0
    if options.lr_t_mult > 1:
        cycle = int(math.log(step / length * (options.lr_t_mult - 1) + 1, options.lr_t_mult))
        # log may have rounded down
        while length * (options.lr_t_mult ** (cycle + 1) - 1) // (options.lr_t_mult - 1) <= step:
            cycle += 1
        begin = length * (options.lr_t_mult**cycle - 1) // (options.lr_t_mult - 1)
        step, length = step - begin, length * options.lr_t_mult**cycle
    return _cosine(1.0, 0.0, step % length / length)


def _step(options: ScheduleOptions, total_steps: int, step: int) -> float:
    return options.lr_gamma ** (max(0, step - options.lr_warmup_steps) // options.lr_step_size)


def _constant(options: ScheduleOptions, total_steps: int, step: int) -> float:
    return 1.0


def _one_cycle(options: ScheduleOptions, total_steps: int, step: int) -> float:
    """Rises and falls along cosines (Smith and Topin 2018), as torch's OneCycleLR."""
    rise = options.lr_pct_start * total_steps - 1
    begin, end = 1 / ONE_CYCLE_START, 1 / (ONE_CYCLE_START * ONE_CYCLE_END)
    if step <= rise:
        return _cosine(begin, 1.0, step / rise)
    return _cosine(1.0, end, min(1.0, (step - rise) / max(total_steps - 1 - rise, 1e-9)))


def _cosine(begin: float, end: float, portion: float) -> float:
    return end + (begin - end) / 2 * (1 + math.cos(math.pi * portion))


def _warmed_up(factor: Callable, options: ScheduleOptions, total_steps: int, step: int) -> float:
    """Multiplies a factor by a linear warm-up from 0."""
    rise = 1.0 if step >= options.lr_warmup_steps else step / options.lr_warmup_steps
    return factor(options, total_steps, step) * rise


OWN_FACTORS: dict[str, Callable[[ScheduleOptions, int, int], float]] = {
    "cosine_warm_restarts": partial(_warmed_up, _cosine_warm_restarts),
    "step": partial(_warmed_up, _step),
    "one_cycle": _one_cycle,
    "reduce_on_plateau": partial(_warmed_up, _constant),  # times the reductions so far, see LearningRates.factor
}


def rate_factor(options: ScheduleOptions, peak_rate: float, total_steps: int) -> Callable[[int], float]:
    """Returns the factor on the peak learning rate as a function of the optimizer step, counted from 0.

    The learning rate depends only on the step, so a resumed run has no schedule state to restore.

    Raises:
        UserError: for invalid --lr_step_rules.
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
        raise UserError(f"--lr_scheduler {options.lr_scheduler} can't be built: {error}") from error
    return schedule.lr_lambdas[0]


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets the learning rate of each group to its peak times the factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
