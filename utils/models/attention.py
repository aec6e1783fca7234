"""Selects PyTorch's attention kernel: the requested one, or the fastest by benchmark."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from utils.models.options import ATTENTION

logger = logging.getLogger(__name__)
ROUNDS = 3  # timings per kernel, of which the fastest counts
MARGIN = 0.03  # fraction by which a kernel must be faster than PyTorch's own choice
TOLERANCE = 3e-2  # largest relative difference, in norm, from PyTorch's own choice


@contextmanager
def attention_by(backend: str | None) -> Iterator[None]:
    """Context manager: PyTorch's attention uses a kernel wherever that supports the shape and precision.

    Attention outside of PyTorch's function (xformers, sliced) is not affected.

    Args:
        backend: a key of `ATTENTION`; None leaves the choice to PyTorch.
    """
    if backend is None:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if torch.cuda.is_available():  # on some GPUs the first call sets its own order of kernels
        functional.scaled_dot_product_attention(*torch.zeros(3, 1, 1, 8, 8, device="cuda").unbind())
    others = [] if backend == "math" else [name for name in ATTENTION if name != backend]  # fallbacks, math last
    # compiled graphs are cached on disk under keys that do not include the kernel
    graphs = torch.compiler.config.patch(cache_key_tag=f"{torch.compiler.config.cache_key_tag} {backend} attention")
    with sdpa_kernel([getattr(SDPBackend, ATTENTION[name]) for name in (backend, *others)], set_priority=True), graphs:
        yield


class Attention:
    """Context manager: attention uses a kernel, which can be replaced meanwhile.

    Attributes:
        raced: the kernel that won the benchmark, for a resumed run to use again; "" for PyTorch's own choice, None if
            there was no benchmark.
    """

    def __init__(self, backend: str | None):
        self._backend = backend
        self._stack = ExitStack()
        self.raced: str | None = None

    def __enter__(self) -> Self:
        self._stack.enter_context(attention_by(self._backend))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def take(self, winner: str) -> None:
        """Uses the winner of a benchmark from now on; "" for PyTorch's own choice."""
        self.raced = winner
        self._stack.close()
        self._stack.enter_context(attention_by(winner or None))


class Call(NamedTuple):
    """Shapes and dtype of an attention call."""

    query: torch.Size
    key: torch.Size
    value: torch.Size
    dtype: torch.dtype


class Recorder(TorchFunctionMode):
    """Context manager: counts calls of PyTorch's attention, except masked ones, which few kernels support."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def __torch_function__(self, function: Callable, types: Any, arguments: tuple = (), named: Any = None) -> Any:
        named = named or {}
        if function is functional.scaled_dot_product_attention and named.get("attn_mask") is None:
            names = ("query", "key", "value")
            query, key, value = (*arguments[:3], *(named[name] for name in names[len(arguments[:3]) :]))
            if len(arguments) < 4 or arguments[3] is None:
                self.calls[Call(query.shape, key.shape, value.shape, query.dtype)] += 1
        return function(*arguments, **named)


def race(calls: Mapping[Call, int], kernels: Collection[str], device: torch.device) -> str:
    """Returns the kernel with the shortest total time for all these calls, forward and backward.

    Kernels with deviating results are excluded, and so are those that gain less than MARGIN. Where a kernel does not
    support a call, the time of PyTorch's fallback counts.

    Args:
        calls: how often each call is made.
        kernels: the candidates.
        device: where the calls are made.

    Returns:
        The kernel, or "" for PyTorch's own choice.
    """
    seconds: Counter[str | None] = Counter()
    # Time each kernel on each call, and compare its results.
    wrong: set[str | None] = set()
    for call, count in calls.items():
        shapes = (call.query, call.key, call.value)
        inputs = [torch.randn(shape, dtype=call.dtype, device=device, requires_grad=True) for shape in shapes]
        expected = _passed(inputs)
        for kernel in (None, *kernels):
            try:
                with attention_by(kernel):
                    wrong |= {kernel} if _differs(_passed(inputs), expected) else set()
                    seconds[kernel] += count * min(_seconds(inputs, device) for _ in range(ROUNDS))
            except RuntimeError:  # unsupported call; PyTorch's messages vary
                wrong.add(kernel)

    # Fastest correct kernel, if it gains enough.
    best = min((kernel for kernel in kernels if kernel not in wrong), key=lambda each: seconds[each], default=None)
    is_faster = best is not None and seconds[best] < (1 - MARGIN) * seconds[None]
    logger.info(
        "time of attention per forward and backward pass: %s",
        ", ".join(f"{kernel or 'PyTorch default'} {1000 * taken:.3g} ms" for kernel, taken in seconds.items()),
    )
    return best if is_faster and best is not None else ""


def _passed(inputs: list[Tensor]) -> list[Tensor]:
    """Returns the output and the gradients of attention."""
    output = functional.scaled_dot_product_attention(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, torch.ones_like(output))]


def _differs(found: list[Tensor], expected: list[Tensor]) -> bool:
    errors = [
        torch.linalg.vector_norm(one.float() - other.float()) / torch.linalg.vector_norm(other.float())
        for one, other in zip(found, expected, strict=True)
    ]
    return not float(torch.stack(errors).nan_to_num(nan=float("inf")).max()) <= TOLERANCE


def _seconds(inputs: list[Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    _passed(inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
