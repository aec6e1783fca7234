"""Optimizer updates of one parameter at a time: inside the backward pass, or on bfloat16 weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from utils.config.seeding import Stream, generator
from utils.training.optimizer_options import OptimizerOptions
from utils.training.optimizers import NamedParameter, page_again, parameter_groups


def round_stochastically(values: Tensor, random: torch.Generator) -> Tensor:
    """Rounds float32 values to bfloat16, up with a probability that equals the distance from the lower neighbour.

    So the expected value is preserved, and updates smaller than a weight's last bit are not lost (Zamirai et al. 2021,
    "Revisiting BFloat16 Training").
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=values.device, generator=random)
    rounded = ((bits + noise) & -65536).view(torch.float32)  # the upper 16 bits are the bfloat16 value
    return torch.where(torch.isfinite(values), rounded, values).bfloat16()


def _decides_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's kernel skips a step that is marked as non-finite."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


class PerParameter(torch.optim.Optimizer):
    """One optimizer of the table per parameter, so that only one parameter at a time has a gradient or a float32 copy.

    In the backward pass, each parameter is updated as soon as its gradient is computed, and the gradient is freed.
    bfloat16 weights are updated in float32 and rounded stochastically, with the same seed on all processes.
    """

    def __init__(self, parameters: Sequence[NamedParameter], options: OptimizerOptions, in_backward: bool, seed: int):
        self._parameters = [named.parameter for named in parameters]
        self.in_backward = in_backward
        self._seed = seed
        self._squares: list[Tensor] = []
        groups = [parameter_groups([named], options.adam_weight_decay) for named in parameters]
        self._parts = [options.spec.make(group, options) for group in groups]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self.param_groups[0]["rounding_step"] = 0
        for part in self._parts:
            part.state = self.state
        if in_backward:
            for index, parameter in enumerate(self._parameters):
                parameter.register_post_accumulate_grad_hook(self._hook(index))

    def _hook(self, index: int):
        def step(parameter: nn.Parameter) -> None:
            norm, part = parameter.grad.float().norm(), self._parts[index]
            self._squares.append(norm.square())
            if _decides_on_device(part) and parameter.dtype == torch.float32:
                part.found_inf = (~torch.isfinite(norm)).float()
                self._step(index)
                part.found_inf = None
            elif torch.isfinite(norm):  # this waits for the device
                self._step(index)
            parameter.grad = None

        return step

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates all parameters that have a gradient, unless the backward pass has already done so."""
        if not self.in_backward:
            for index in range(len(self._parameters)):
                self._step(index)
        self.param_groups[0]["rounding_step"] += 1

    @torch.no_grad()
    def _step(self, index: int) -> None:
        parameter, part = self._parameters[index], self._parts[index]
        if parameter.grad is None:
            return
        if parameter.dtype == torch.float32:
            part.step()
            return
        weights, gradient = parameter.data, parameter.grad
        parameter.grad = None
        parameter.data = weights.float()
        parameter.grad = gradient.float()
        part.step()
        drawn = generator(self._seed, self.param_groups[0]["rounding_step"], index, Stream.ROUNDING).integers(2**63)
        random = torch.Generator(weights.device).manual_seed(int(drawn))
        weights.copy_(round_stochastically(parameter.data, random))
        parameter.grad = None
        parameter.data = weights

    def grad_norm(self) -> Tensor:
        """Returns the norm of the gradients consumed by the last backward pass, a scalar."""
        norm = torch.stack(self._squares).sum().sqrt() if self._squares else torch.zeros(())
        self._squares = []
        return norm

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads the state unchanged; torch's own method would round it to the dtype of the weights."""
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, values in state_dict["state"].items():
            parameter = order[index]
            self.state[parameter] = {
                name: value.to(parameter.device) if isinstance(value, Tensor) else value
                for name, value in values.items()
            }
            page_again(self._parts[index], parameter, self.state[parameter])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
