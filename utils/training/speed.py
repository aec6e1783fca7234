"""What makes a denoiser faster and changes its numbers little or not at all."""

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
CONVOLUTIONS = "ResnetBlock2D"  # which diffusers' `_repeated_blocks` of transformers do not name
GRAPHS = 64  # of one function, at most: a block's differ by widths, sizes and strides
REPLAYS = 3  # of a CUDA graph: its kernels run once as they are, then they are recorded, then replayed
EXACT = 1e-2  # relative error of a gradient: wrong ones were 15 % off, sums that cancel have come out 0.5 % off
FURTHEST = 0.3  # the same of half precision, whatever the plain denoiser's own, unless that is further off
NEGLIGIBLE = 1e-2  # of the root mean square over all gradients, beneath which a parameter's is rounding


@dataclass(frozen=True)
class Compilation:
    """How a denoiser is compiled.

    Attributes:
        what: one of `COMPILED`.
        sizes_vary: whether it will see several sizes, of which one graph is made then.
        cuda_graphs: whether its kernels are recorded and replayed; what it gives lasts until the next pass.
        activation_memory: the portion of activations that is kept for the backward pass; None leaves it to torch.
    """

    what: str
    sizes_vary: bool = False
    cuda_graphs: bool = False
    activation_memory: float | None = None


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The modules that a denoiser is mostly made of, each of which is compiled once for many."""
    names = {*(getattr(denoiser, "_repeated_blocks", None) or ()), CONVOLUTIONS}
    return [module for module in denoiser.modules() if type(module).__name__ in names]


def compiled_part(asked: str | None, denoiser: nn.Module, num_processes: int) -> str | None:
    """What is compiled: one graph of a whole denoiser would keep several processes from sharing gradients meanwhile."""
    if asked != "denoiser" or num_processes == 1 or not repeated_blocks(denoiser):
        return asked
    logger.info(
        "--compile denoiser: its blocks are compiled instead; one graph would give all gradients at its end, and the "
        "processes would share none before"
    )
    return "blocks"


def compile_denoiser(denoiser: nn.Module, how: Compilation) -> None:
    """Compiles a denoiser in place, its weights' names as they are; in evaluation mode it stays as it was.

    Inductor has made wrong gradients of nearest-neighbour upsampling between convolutions (torch 2.13, CPU), at the
    right loss: upsampling is by repetition from now on.

    Raises:
        UserError: if it has no repeated blocks.
    """
    from diffusers.models.upsampling import Upsample2D

    _settle_compiler(how.activation_memory)
    for module in denoiser.modules():
        if isinstance(module, Upsample2D) and module.conv is not None and not module.use_conv_transpose:
            module.interpolate = False
            module.register_forward_pre_hook(_repeat_first)
    if how.sizes_vary:
        torch.fx.experimental._config.use_duck_shape = False  # a square among them would make a graph of squares alone
    blocks = [denoiser]
    if how.what == "blocks":
        blocks, kind = repeated_blocks(denoiser), type(denoiser).__name__
        require(bool(blocks), "compile", how.what, f"be denoiser for a {kind}", "it has no repeated blocks")
    for block in blocks:
        block._compiled_call_impl = _InTraining(block, how, fullgraph=True)


def as_before(denoiser: nn.Module) -> None:
    """Leaves a denoiser uncompiled again."""
    for module in denoiser.modules():
        if isinstance(module._compiled_call_impl, _InTraining):
            module._compiled_call_impl = None


def _settle_compiler(activation_memory: float | None) -> None:
    """Sets what torch.compile needs for these models, for the whole process."""
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config

    torch._functorch.config.activation_memory_budget = 1.0 if activation_memory is None else activation_memory

    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    if torch.__version__ < (2, 14):  # pytorch#193061: gradients left unwritten
        torch._inductor.config.triton.mix_order_reduction = False
    if torch.are_deterministic_algorithms_enabled():  # else some kernels are chosen by their times
        torch._inductor.config.deterministic = True


class _InTraining:
    """Calls a module's compiled form while it trains; sampling, in other shapes, is left as it is."""

    def __init__(self, module: nn.Module, how: Compilation, fullgraph: bool):
        self._module, self._how = module, how
        mode, dynamic = "reduce-overhead" if how.cuda_graphs else None, True if how.sizes_vary else None
        self._compiled = torch.compile(module._call_impl, fullgraph=fullgraph, dynamic=dynamic, mode=mode)

    def in_pieces(self) -> "_InTraining":
        """The same of several graphs, with Python between them."""
        return _InTraining(self._module, self._how, fullgraph=False)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not self._module.training:
            return self._module._call_impl(*arguments, **named)
        return self._compiled(*arguments, **named)


class Passes(Protocol):
    """Runs forward and backward on one batch, whose gradients are in the parameters meanwhile."""

    def __call__(
        self, in_float32: bool = False, at_once: int | None = None
    ) -> AbstractContextManager[Mapping[str, Tensor]]:
        """The gradients by the parameters' names.

        Args:
            in_float32: all in float32 arithmetic, one sample after the other.
            at_once: of the first samples alone.
        """


def compile_checked(denoiser: nn.Module, how: Compilation, gradients: Passes, is_exact: bool) -> None:
    """Compiles a denoiser, and compares the gradients of a batch with those of the plain one.

    Half precision rounds: the plain denoiser's own gradients are 20 % off float32's in single tensors, and a compiled
    one rounds elsewhere. So both are held against float32: compiled, a gradient may be twice as far off as it is plain,
    and EXACT more. Compilers' faults show in float32 too: one sample is compared there, by EXACT.

    Args:
        is_exact: whether arithmetic is in float32 throughout.

    Raises:
        UserError: if it can't be compiled, or its gradients are others.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException, Unsupported

    begun = time.perf_counter()
    with _stirred(denoiser):
        # What the plain denoiser gives, and how far rounding takes it from float32.
        with gradients(in_float32=not is_exact) as found:
            expected = Reference(found)
        rounding: Mapping[str, float] = {}
        if not is_exact:
            with gradients(in_float32=True, at_once=1) as found:
                expected_of_one = Reference(found)
            with gradients() as found:
                rounding = expected.errors(found)

        # The same of the compiled one; what a CUDA graph replays too.
        compile_denoiser(denoiser, how)
        try:
            try:
                with gradients() as found:
                    errors = [expected.errors(found)]
            except Unsupported as error:
                logger.warning("--compile: not one graph, for %s", first_line(error))
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
            # no compiler, or not this model
            raise UserError(f"--compile: the denoiser can't be compiled here: {first_line(error)}") from error
    for each in errors:
        check_errors(each, rounding)
    worst = max(max(each.values(), default=0.0) for each in errors)
    said = f"the plain model's are {max(rounding.values(), default=0.0):.1g} off too" if rounding else "as the plain's"
    seconds = time.perf_counter() - begun
    logger.info("compiled in %.0f s; all gradients agree with float32's to %.1g, %s", seconds, worst, said)


def check_errors(errors: Mapping[str, float], rounding: Mapping[str, float]) -> None:
    """Refuses gradients that are further off float32's than a compiler may take them.

    Args:
        errors: of the compiled denoiser's gradients, relative.
        rounding: the same of the plain denoiser's; none of float32 arithmetic.

    Raises:
        UserError: naming the worst.
    """
    usual = typical_error(rounding.values())
    excess = {name: error - allowed_error(max(rounding.get(name, 0.0), usual)) for name, error in errors.items()}
    name = max(excess, key=lambda each: excess[each], default="")
    if name and not excess[name] <= 0:
        plain = f", the plain one {rounding[name]:.2%}" if name in rounding else ""
        raise UserError(f"--compile: compiled, the gradient of {name} is {errors[name]:.2%} off{plain}; leave it out")


def typical_error(errors: Iterable[float]) -> float:
    """The root mean square of errors: a single tensor's may be small by chance, which another rounding need not be."""
    squares = [error * error for error in errors]
    return (sum(squares) / len(squares)) ** 0.5 if squares else 0.0


def allowed_error(rounding: float) -> float:
    """How far off float32 a compiled gradient may be where plain ones are so far off by rounding, both relative."""
    return max(min(2 * rounding + EXACT, FURTHEST), rounding + EXACT)


class Reference:
    """Gradients that others are compared with, kept on the host; compared on the device, one after the other."""

    def __init__(self, gradients: Mapping[str, Tensor]):
        self._kept = {name: gradient.detach().float().to("cpu", copy=True) for name, gradient in gradients.items()}
        squares = sum(float(each.cpu().double().square().sum()) for each in self._kept.values())
        count = max(1, sum(each.numel() for each in self._kept.values()))
        self._usual = (squares / count) ** 0.5

    def errors(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """The error of each gradient relative to its norm; 1 of one that is missing, infinite of what is not finite.

        Norms so small beside all others' that they are rounding count as NEGLIGIBLE of the others' root mean square.
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
def _stirred(denoiser: nn.Module) -> Iterator[None]:
    """Within it trained weights that are all zero are not, for no gradient reaches what lies before them; no dropout.

    A compiled dropout draws other numbers.
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
    if rest and rest[0] is not None:  # a size that is no doubling
        return functional.interpolate(images, size=rest[0], mode="nearest"), *rest
    return images.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2), *rest
