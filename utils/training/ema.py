"""The exponential moving average (EMA) of the trained weights."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from utils.runtime.sharding import is_sharded, own_part, put_in_place, spread_like
from utils.training.options import EmaOptions

CHUNK = 256 << 20  # bytes of weights to copy at a time for averaging


def _chunks(sizes: Sequence[int]) -> list[slice]:
    """Returns slices of consecutive tensors of at most CHUNK bytes together; a larger tensor is a slice of its own."""
    found, begin, held = [], 0, 0
    for place, size in enumerate(sizes):
        if held and held + size > CHUNK:
            found.append(slice(begin, place))
            begin, held = place, 0
        held += size
    return [*found, slice(begin, len(sizes))]


class Staging:
    """Pinned host memory, allocated once, through which GPU tensors are copied with a single wait."""

    def __init__(self):
        self._memory = torch.empty(0)

    def take(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Returns float32 copies on the host, valid until the next call."""
        if all(value.device.type == "cpu" for value in values):
            return list(values)
        count = sum(value.numel() for value in values)
        if count > self._memory.numel():
            self._memory = torch.empty(count, pin_memory=values[0].is_cuda)
        taken, begin = [], 0
        for value in values:
            part = self._memory[begin : begin + value.numel()].view(value.shape)
            taken.append(part.copy_(value, non_blocking=True))
            begin += value.numel()
        if values[0].is_cuda:
            torch.cuda.current_stream(values[0].device).synchronize()
        return taken


class MovingAverage:
    """Moving averages of parameters, updated after each optimizer step.

    The decay follows diffusers' `EMAModel`, whose fields `state` returns for the config of the saved weights.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], options: EmaOptions):
        from diffusers.training_utils import EMAModel

        self._parameters = list(parameters)
        self._options = options
        self._schedule = EMAModel(
            [],
            decay=options.ema_decay,
            use_ema_warmup=options.use_ema_warmup,
            inv_gamma=options.ema_inv_gamma,
            power=options.ema_power,
        )
        # in float32 even for bfloat16 weights: in bfloat16, updates would be rounded away
        self.averages = [self._at_home(parameter.detach().float().clone()) for parameter in self._parameters]
        self._own = [own_part(average) for average in self.averages]
        self._is_copied = options.offload_ema or any(each.dtype != torch.float32 for each in self._parameters)
        self._chunks = _chunks([each.nbytes for each in self._own])
        self._staging = Staging()

    def _at_home(self, tensor: Tensor) -> Tensor:
        if not self._options.offload_ema:
            return tensor
        host = tensor.to("cpu")
        return host.pin_memory() if torch.cuda.is_available() else host

    @property
    def num_updates(self) -> int:
        """Number of updates so far."""
        return self._schedule.optimization_step

    @property
    def state(self) -> dict[str, float | int | bool]:
        """The EMA fields that diffusers keeps in the config of averaged weights."""
        return {name: value for name, value in self._schedule.state_dict().items() if name != "shadow_params"}

    def load(self, averages: Sequence[Tensor], num_updates: int) -> None:
        """Loads saved averages, in the order of the parameters."""
        for average, saved in zip(self.averages, averages, strict=True):
            average.copy_(spread_like(saved, average))
        self._schedule.optimization_step = num_updates

    def decay(self, update: int) -> float:
        """Returns the decay at an update, counted from 1."""
        return self._schedule.get_decay(update)

    @torch.no_grad()
    def update(self, is_taken: Tensor | None = None) -> None:
        """average += (1 - decay) * (weight - average), for all weights, with the decay of all steps since the last.

        With `--ema_every` k, only every k-th call updates.

        Args:
            is_taken: [] bool on the device, whether the optimizer took its step; if not, the averages stay unchanged.
                The update is counted anyway, since the host would otherwise wait for the device at each step. With
                `--ema_every` over 1 it is ignored, as earlier steps count too.
        """
        # Count the update, and see whether the averages move in this call.
        self._schedule.optimization_step += 1
        done, every = self._schedule.optimization_step, self._options.ema_every
        if done % every:
            return
        if every > 1:
            is_taken = None
        elif self._options.offload_ema and is_taken is not None:  # this waits for the device anyway
            if not is_taken:
                return
            is_taken = None
        # Move them, in chunks where the weights have to be copied.
        weight = 1 - math.prod(self.decay(step) for step in range(done - every + 1, done + 1))
        for places in self._chunks if self._is_copied or is_taken is not None else [slice(None)]:
            averages, values = self._own[places], [own_part(each) for each in self._parameters[places]]
            if self._is_copied:
                values = [value.float() for value in values]
            if is_taken is not None:
                values = [torch.where(is_taken, *pair) for pair in zip(values, averages, strict=True)]
            if self._options.offload_ema:
                values = self._staging.take(values)
            if self._options.foreach_ema:
                torch._foreach_lerp_(averages, values, weight)
                continue
            for average, value in zip(averages, values, strict=True):
                average.lerp_(value, weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context manager: the parameters hold the averages, on the parameters' device."""
        undo = []
        try:
            for parameter, average in zip(self._parameters, self.averages, strict=True):
                undo.append(put_in_place(parameter, average))
            yield
        finally:
            for put_back in undo:
                put_back()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Context manager: the parameters refer to the averages on the averages' device, for saving only."""
        if any(map(is_sharded, self._parameters)):
            with self.in_place():
                yield
            return
        kept = [parameter.data for parameter in self._parameters]
        try:
            for parameter, average in zip(self._parameters, self.averages, strict=True):
                parameter.data = average
            yield
        finally:
            for parameter, values in zip(self._parameters, kept, strict=True):
                parameter.data = values
