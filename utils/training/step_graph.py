"""A whole optimizer step as one CUDA graph: forward, backward, clipping and AdamW, one graph per batch shape.

The graph reads the batch, the learning rates and whether to step from fixed addresses. A recorded step is compared with
the plain one before it is used; batches whose step can't be recorded are computed without a graph. The moving average
is updated after the replay, in one call for all weights, since its decay differs at each step.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from utils.config.options import first_line
from utils.runtime.memory import is_out_of_memory
from utils.training.backward import Gradients
from utils.training.encoding import EncodedBatch
from utils.training.optimizers import unwrapped
from utils.training.speed import Reference, allowed_error
from utils.training.state import TrainingState

logger = logging.getLogger(__name__)
WARM_UPS = 3  # runs before a recording: at first use, libraries allocate workspaces and autocast caches its casts
SHAPES = 16  # most graphs; each keeps its intermediate results


class Outcome(NamedTuple):
    """The losses of a batch, [B], and the norm of its gradients before clipping, []."""

    losses: Tensor
    norm: Tensor


class Recorder(Protocol):
    """Records the kernels that a function launches on a device."""

    def record(self, compute: Callable[[], Outcome]) -> tuple[Outcome, Callable[[], None]]:
        """Returns the function's outcome, and a function that replays the kernels into the same memory."""


class CudaRecorder:
    """Records CUDA graphs that share one memory pool, as they run one after the other."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, compute: Callable[[], Outcome]) -> tuple[Outcome, Callable[[], None]]:
        """Warms up on a side stream, as https://docs.pytorch.org/docs/stable/notes/cuda.html requires, then records."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outcome = compute()
        return outcome, graph.replay


class Recording(NamedTuple):
    """A recorded step.

    Attributes:
        inputs: the batch that it reads.
        outcome: the losses and the gradient norm that it computes.
        gradients: the gradients that it computes, by parameter.
        replay: runs it again.
    """

    inputs: EncodedBatch
    outcome: Outcome
    gradients: dict[nn.Parameter, Tensor]
    replay: Callable[[], None]


class StepGraph:
    """Takes whole optimizer steps by replaying recorded ones, one recording per batch shape."""

    def __init__(self, recorder: Recorder, gradients: Gradients, state: TrainingState, max_norm: float):
        self._recorder, self._gradients, self._state, self._max_norm = recorder, gradients, state, max_norm
        self._optimizer = unwrapped(state.optimizer)
        device = gradients.accelerator.device
        self._is_held = torch.ones((), device=device)  # 1 while nothing may change
        self._rates = [torch.zeros((), device=device) for _ in self._optimizer.param_groups]
        self._recordings: dict[tuple, Recording | None] = {}
        self._latest: Recording | None = None

    def __call__(self, encoded: EncodedBatch) -> Tensor | None:
        """Takes an optimizer step on a batch, and stores the norm of its gradients in `TrainingState.ahead`.

        Returns:
            The losses, [B]; None if the step has to be taken without a graph.
        """
        encoded = encoded.bare()
        shape = encoded.shape
        if shape not in self._recordings:
            self._recordings[shape] = self._recorded(encoded) if len(self._recordings) < SHAPES else None
        recording = self._recordings[shape]
        if recording is None:
            self._forget_gradients()
            return None
        self._is_held.zero_()
        outcome = self._replayed(recording, encoded)
        self._state.ahead.norm = outcome.norm
        return outcome.losses

    def _replayed(self, recording: Recording, encoded: EncodedBatch) -> Outcome:
        """Replays a recorded step on a batch at the current learning rates; returns copies of its outcome."""
        torch._foreach_copy_(recording.inputs.tensors, encoded.tensors)
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        recording.replay()
        if recording is not self._latest:
            self._latest = recording
            for parameter, gradient in recording.gradients.items():
                parameter.grad = gradient
        return Outcome(recording.outcome.losses.clone(), recording.outcome.norm.clone())

    def _recorded(self, encoded: EncodedBatch) -> Recording | None:
        """Records a step for batches of this shape; None if that fails or its results differ from the plain step's."""
        try:
            # The plain step, for comparison.
            self._forget_gradients()
            losses = self._gradients.passes(encoded)
            expected = Reference(self._named_gradients())

            # Record the step, which changes no weights while it is held.
            self._is_held.fill_(1)
            inputs = encoded.cloned()
            with self._rates_on_device():
                outcome, replay = self._recorder.record(lambda: self._compute(inputs))
            gradients = {each: each.grad for each in self._gradients.model.parameters() if each.grad is not None}
            recording = Recording(inputs, outcome, gradients, replay)
            found = self._replayed(recording, encoded)
            errors = expected.errors(self._named_gradients())
        except RuntimeError as error:
            self._forget_gradients()
            self._warn_without_graph("out of memory" if is_out_of_memory(error) else first_line(error))
            return None

        # Refuse a recording whose gradients or losses differ.
        worst = max(errors, key=lambda name: errors[name])
        allowed = allowed_error(0.0)
        if errors[worst] > allowed or not torch.allclose(found.losses, losses, rtol=allowed, atol=1e-6):
            self._forget_gradients()
            self._warn_without_graph(f"the recorded gradient of {worst} is {errors[worst]:.2%} off")
            return None
        logger.info("--cuda_graphs: recorded a step; gradients agree with the plain step's to %.1g", errors[worst])
        return recording

    def _compute(self, encoded: EncodedBatch) -> Outcome:
        """Takes a step as the training loop does."""
        self._optimizer.zero_grad(set_to_none=True)
        losses = self._gradients.passes(encoded)
        norm = self._state.clip(self._max_norm)
        self._state.step_on_device(norm, self._is_held)
        return Outcome(losses, norm)

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Context manager: the optimizer reads learning rates from device tensors, which replays can set."""
        groups = self._optimizer.param_groups
        kept = [(group["lr"], group["capturable"]) for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"], group["capturable"] = rate.fill_(group["lr"]), True
        try:
            yield
        finally:
            for group, (rate, is_capturable) in zip(groups, kept, strict=True):
                group["lr"], group["capturable"] = rate, is_capturable

    def _named_gradients(self) -> dict[str, Tensor]:
        named = self._gradients.model.named_parameters()
        return {name: each.grad for name, each in named if each.grad is not None}

    def _forget_gradients(self) -> None:
        self._gradients.drop()
        self._latest = None

    def _warn_without_graph(self, reason: str) -> None:
        logger.warning("--cuda_graphs: batches of this shape are computed without a graph: %s", reason)


def obstacle(gradients: Gradients, state: TrainingState) -> str:
    """Returns why steps of a run can't be recorded; empty if they can."""
    if gradients.accelerator.num_processes > 1:
        return "several processes share gradients"
    if not state.decides_on_device or state.own_parameters:
        return "it needs fused AdamW, without fp16 and without a loss module that trains"
    if gradients.num_batches > 1 or gradients.size < gradients.num_samples:
        return "a step accumulates the gradients of several batches"
    if any(isinstance(each, nn.Dropout) and each.p for each in gradients.model.modules()):
        return "dropout draws new numbers at each step"
    return ""
