"""Compiles the denoiser, and checks its gradients against those of the uncompiled one."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.config.options import UserError, first_line, require

logger = logging.getLogger(__name__)
CONVOLUTIONS = "ResnetBlock2D"  # diffusers' `_repeated_blocks` list transformer blocks only
GRAPHS = 64  # most graphs of one function: those of a block differ by widths, sizes and strides
REPLAYS = 3  # runs of a CUDA graph: the first runs the kernels, the second records, the third replays
EXACT = 1e-2  # allowed relative error of a gradient: wrong ones were 15 % off, cancelling sums up to 0.5 %
FURTHEST = 0.3  # largest allowed error in half precision, unless the uncompiled denoiser's is larger
NEGLIGIBLE = 1e-2  # fraction of the root mean square over all gradients below which a gradient is rounding noise


@dataclass(frozen=True)
class Compilation:
    """How to compile a denoiser.

    Attributes:
        what: one of `COMPILED`.
        sizes_vary: whether image sizes vary; one graph then covers all of them.
        cuda_graphs: whether to record and replay CUDA graphs; outputs are valid until the next pass.
        activation_memory: fraction of activations to keep for the backward pass; None leaves it to torch.
    """

    what: str
    sizes_vary: bool = False
    cuda_graphs: bool = False
    activation_memory: float | None = None


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """Returns the repeated blocks of a denoiser, each kind of which is compiled once."""
    names = {*(getattr(denoiser, "_repeated_blocks", None) or ()), CONVOLUTIONS}
    return [module for module in denoiser.modules() if type(module).__name__ in names]


def compiled_part(asked: str | None, denoiser: nn.Module, num_processes: int) -> str | None:
    """Returns what to compile: with several processes the blocks, to share gradients during the backward pass.

    Args:
        asked: one of `COMPILED`, or None.
    """
    if asked != "denoiser" or num_processes == 1 or not repeated_blocks(denoiser):
        return asked
    logger.info(
        "--compile denoiser: compiling its blocks instead, as a single graph would return all gradients at its end and "
        "processes could not share them earlier"
    )
    return "blocks"


def compile_denoiser(denoiser: nn.Module, how: Compilation) -> None:
    """Compiles a denoiser in place, keeping its weight names; in evaluation mode it runs uncompiled.

    Inductor computed wrong gradients for nearest-neighbour upsampling between convolutions (torch 2.13, CPU) although
    the loss was right, so upsampling is replaced by repetition.

    Raises:
        UserError: if it has no repeated blocks.
    """
    from diffusers.models.upsampling import Upsample2D

    _configure_compiler(how.activation_memory)
    for module in denoiser.modules():
        if isinstance(module, Upsample2D) and module.conv is not None and not module.use_conv_transpose:
            module.interpolate = False
            module.register_forward_pre_hook(_repeat_first)
    if how.sizes_vary:
        torch.fx.experimental._config.use_duck_shape = (
            False  # otherwise a square size would compile a graph for squares only
        )
    blocks = [denoiser]
    if how.what == "blocks":
        blocks, kind = repeated_blocks(denoiser), type(denoiser).__name__
        require(bool(blocks), "compile", how.what, f"be denoiser for a {kind}", "it has no repeated blocks")
    for block in blocks:
        block._compiled_call_impl = _InTraining(block, how, fullgraph=True)


def as_before(denoiser: nn.Module) -> None:
    """Restores an uncompiled denoiser."""
    for module in denoiser.modules():
        if isinstance(module._compiled_call_impl, _InTraining):
            module._compiled_call_impl = None


def _configure_compiler(activation_memory: float | None) -> None:
    """Configures torch.compile for these models, for the whole process."""
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config

    torch._functorch.config.activation_memory_budget = 1.0 if activation_memory is None else activation_memory

    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    if torch.__version__ < (2, 14):  # pytorch#193061: some gradients are not written
        torch._inductor.config.triton.mix_order_reduction = False
    if torch.are_deterministic_algorithms_enabled():  # otherwise some kernels are chosen by timing
        torch._inductor.config.deterministic = True


class _InTraining:
    """Calls a module's compiled form in training mode; sampling, which has other shapes, runs uncompiled."""

    def __init__(self, module: nn.Module, how: Compilation, fullgraph: bool):
        self._module, self._how = module, how
        mode, dynamic = "reduce-overhead" if how.cuda_graphs else None, True if how.sizes_vary else None
        self._compiled = torch.compile(module._call_impl, fullgraph=fullgraph, dynamic=dynamic, mode=mode)

    def in_pieces(self) -> "_InTraining":
        """Returns the same, but allowing graph breaks."""
        return _InTraining(self._module, self._how, fullgraph=False)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not self._module.training:
            return self._module._call_impl(*arguments, **named)
        return self._compiled(*arguments, **named)


class Passes(Protocol):
    """Context manager factory: runs forward and backward on one batch; the parameters hold the gradients inside it."""

    def __call__(
        self, in_float32: bool = False, at_once: int | None = None
    ) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Yields the gradients by parameter name.

        Args:
            in_float32: compute everything in float32, one sample after the other.
            at_once: number of samples, the first of the batch; None for the default.
        """


def compile_checked(denoiser: nn.Module, how: Compilation, gradients: Passes, is_exact: bool) -> None:
    """Compiles a denoiser, and compares its gradients on a batch with those of the uncompiled one.

    In half precision, the uncompiled gradients of single tensors deviate from float32 by up to 20 %, and a compiled
    denoiser rounds differently. So both are compared with float32: a compiled gradient may have twice the error of the
    uncompiled one, plus EXACT. As compiler bugs also show in float32, one sample is compared there, within EXACT.

    Args:
        gradients: computes the gradients.
        is_exact: whether all arithmetic is in float32.

    Raises:
        UserError: if it can't be compiled, or its gradients differ.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException, Unsupported

    begun = time.perf_counter()
    with _comparable(denoiser):
        # Uncompiled: gradients in float32, and the rounding error of half precision.
        with gradients(in_float32=not is_exact) as found:
            expected = Reference(found)
        rounding: Mapping[str, float] = {}
        if not is_exact:
            with gradients(in_float32=True, at_once=1) as found:
                expected_of_one = Reference(found)
            with gradients() as found:
                rounding = expected.errors(found)

        # Compiled: the same, including replays of a CUDA graph.
        compile_denoiser(denoiser, how)
        try:
            try:
                with gradients() as found:
                    errors = [expected.errors(found)]
            except Unsupported as error:
                logger.warning("--compile: using several graphs because of: %s", first_line(error))
                _allow_breaks(denoiser)
                with gradients() as found:
                    errors = [expected.errors(found)]
            for _ in range(REPLAYS - 1 if how.cuda_graphs else 0):
                with gradients() as found:
                    errors.append(expected.errors(found))
            if not is_exact:
                with gradients(in_float32=True, at_once=1) as found:
                    check_errors(expected_of_one.errors(found), {})
        except UserError:
            raise
        except (TorchDynamoException, FailOnRecompileLimitHit, RuntimeError, ImportError, OSError) as error:
            # no compiler, or the model is not supported
            raise UserError(f"--compile: the denoiser can't be compiled here: {first_line(error)}") from error
    # Refuse wrong gradients.
    for each in errors:
        check_errors(each, rounding)
    worst = max(max(each.values(), default=0.0) for each in errors)
    said = (
        f"the uncompiled model's to {max(rounding.values(), default=0.0):.1g}" if rounding else "as without compiling"
    )
    seconds = time.perf_counter() - begun
    logger.info("compiled in %.0f s; gradients agree with float32 to %.1g, %s", seconds, worst, said)


def check_errors(errors: Mapping[str, float], rounding: Mapping[str, float]) -> None:
    """Refuses gradients whose error is larger than rounding explains.

    Args:
        errors: relative errors of the compiled denoiser's gradients, by parameter name.
        rounding: the same for the uncompiled denoiser; empty in float32 arithmetic.

    Raises:
        UserError: with the name of the worst gradient.
    """
    usual = typical_error(rounding.values())
    excess = {name: error - allowed_error(max(rounding.get(name, 0.0), usual)) for name, error in errors.items()}
    name = max(excess, key=lambda each: excess[each], default="")
    if name and not excess[name] <= 0:
        plain = f", uncompiled {rounding[name]:.2%}" if name in rounding else ""
        raise UserError(f"--compile: the compiled gradient of {name} is {errors[name]:.2%} off{plain}; leave it out")


def typical_error(errors: Iterable[float]) -> float:
    """Returns the root mean square of errors; a single tensor's error may be small by chance."""
    squares = [error * error for error in errors]
    return (sum(squares) / len(squares)) ** 0.5 if squares else 0.0


def allowed_error(rounding: float) -> float:
    """Returns the allowed relative error of a compiled gradient, given that of the uncompiled one."""
    return max(min(2 * rounding + EXACT, FURTHEST), rounding + EXACT)


class Reference:
    """Reference gradients, kept on the host; compared on the device, one after the other."""

    def __init__(self, gradients: Mapping[str, Tensor]):
        self._kept = {name: gradient.detach().float().to("cpu", copy=True) for name, gradient in gradients.items()}
        squares = sum(float(each.cpu().double().square().sum()) for each in self._kept.values())
        count = max(1, sum(each.numel() for each in self._kept.values()))
        self._usual = (squares / count) ** 0.5

    def errors(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """Returns each gradient's error relative to the norm of its reference; 1 if missing, infinite if not finite.

        Norms too small to be more than rounding noise count as NEGLIGIBLE times the root mean square of all gradients.
        """
        names = [name for name in self._kept if name in found]
        rows = []
        for name in names:
            gradient = found[name].detach()
            kept = self._kept[name].to(gradient.device)
            floor = NEGLIGIBLE * self._usual * kept.numel() ** 0.5
            norm = torch.linalg.vector_norm(kept).clamp(min=max(floor, 1e-30))
            rows.append(torch.linalg.vector_norm(gradient.float() - kept) / norm)
        errors = dict(zip(names, torch.stack(rows).tolist() if rows else [], strict=True))
        errors = {name: error if error == error else float("inf") for name, error in errors.items()}
        return dict.fromkeys(self._kept, 1.0) | errors


def _allow_breaks(denoiser: nn.Module) -> None:
    for module in denoiser.modules():
        if isinstance(module._compiled_call_impl, _InTraining):
            module._compiled_call_impl = module._compiled_call_impl.in_pieces()


@contextmanager
def _comparable(denoiser: nn.Module) -> Iterator[None]:
    """Context manager: makes all-zero weights random, as no gradient passes through them; turns dropout off.

    Compiled dropout draws other random numbers.
    """
    zeros = [each for each in denoiser.parameters() if each.requires_grad and not each.any()]
    dropouts = [(module, module.p) for module in denoiser.modules() if isinstance(module, nn.Dropout) and module.p]
    with torch.no_grad():
        for parameter in zeros:
            parameter.normal_(std=0.02)
    for module, _ in dropouts:
        module.p = 0.0
    try:
        yield
    finally:
        for module, share in dropouts:
            module.p = share
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


def _repeat_first(module: nn.Module, arguments: tuple) -> tuple:
    images, *rest = arguments
    if rest and rest[0] is not None:  # an explicit size that is not twice the input's
        return functional.interpolate(images, size=rest[0], mode="nearest"), *rest
    return images.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2), *rest
