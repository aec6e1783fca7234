"""A bfloat16 copy of a denoiser's weights for computing, beside the float32 weights that train."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from utils.training.optimizers import unwrapped

GROUP = 32  # weights whose gradients are converted in one call; more means fewer calls but longer-lived gradients


class _Copied(torch.autograd.Function):
    """Replaces weights by their copies in the forward pass; passes the copies' gradients to the weights in float32.

    One function handles a group of weights: one per weight would cost the host more time than small models compute.
    """

    @staticmethod
    def forward(ctx: Any, *weights_and_copies: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        copies = weights_and_copies[len(weights_and_copies) // 2 :]
        return tuple(copy.view_as(copy) for copy in copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [gradient for gradient in gradients if gradient is not None]
        whole = [torch.empty_like(gradient, dtype=torch.float32) for gradient in there]
        if there:
            torch._foreach_copy_(whole, there)
        found = iter(whole)
        return *(None if gradient is None else next(found) for gradient in gradients), *(None for _ in gradients)


class HalfCopy:
    """Runs a denoiser in bfloat16 throughout, without autocast's cast of each weight at each use.

    The copy is renewed in one call after each optimizer step. Gradients are accumulated and applied in float32.
    Outside `in_place`, the denoiser has its float32 weights.
    """

    def __init__(self, denoiser: nn.Module, optimizer: torch.optim.Optimizer):
        from diffusers.models.embeddings import GaussianFourierProjection

        exact = (GaussianFourierProjection,)  # frequencies of the time embedding
        if all(each.device.type == "cpu" for each in denoiser.parameters()):
            exact += (nn.GroupNorm, nn.LayerNorm)  # as with autocast, which computes these in float32 on a CPU
        self._places = [
            (owner, name)
            for owner in denoiser.modules()
            for name, each in owner.named_parameters(recurse=False)
            if each.dtype == torch.float32 and not isinstance(owner, exact)
        ]
        self._weights = [owner._parameters[name] for owner, name in self._places]
        self._copies = [each.detach().bfloat16() for each in self._weights]
        self._trained = [place for place, each in enumerate(self._weights) if each.requires_grad]
        self._is_active = False
        self._is_stale = True
        self._forward = denoiser.forward
        denoiser.forward = self._without_autocast
        unwrapped(optimizer).register_step_post_hook(self._mark_stale)

    def _mark_stale(self, *_: Any) -> None:
        self._is_stale = True

    def _without_autocast(self, *arguments: Any, **named: Any) -> Any:
        if not self._is_active:
            return self._forward(*arguments, **named)
        noisy, *rest = arguments  # not the timesteps, which bfloat16 would round
        if "encoder_hidden_states" in named:
            named["encoder_hidden_states"] = named["encoder_hidden_states"].bfloat16()
        with torch.autocast(noisy.device.type, enabled=False):
            return self._forward(noisy.bfloat16(), *rest, **named)

    @torch.no_grad()
    def _renew(self) -> None:
        torch._foreach_copy_(self._copies, [each.detach() for each in self._weights])
        self._is_stale = False

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context manager: the denoiser computes with the copy, for one forward and backward pass."""
        if self._is_stale:
            self._renew()
        self._is_active = True
        try:
            for (owner, name), copy in zip(self._places, self._copies, strict=True):
                owner._parameters[name] = copy
            for begin in range(0, len(self._trained), GROUP):
                group = self._trained[begin : begin + GROUP]
                weights, copies = [self._weights[place] for place in group], [self._copies[place] for place in group]
                for place, copied in zip(group, _Copied.apply(*weights, *copies), strict=True):
                    owner, name = self._places[place]
                    owner._parameters[name] = copied
            yield
        finally:
            self._is_active = False
            for (owner, name), weight in zip(self._places, self._weights, strict=True):
                owner._parameters[name] = weight
