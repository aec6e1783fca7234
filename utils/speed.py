"""What makes a denoiser faster and changes its numbers little or not at all."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.options import UserError, first_line, option, require

logger = logging.getLogger(__name__)
COMPILED = ("blocks", "denoiser")
ATTENTION = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}
CPU_ATTENTION = ("flash", "math")
GRAPHS = 64  # of one function, at most: a block's differ by widths, sizes and strides
REPLAYS = 3  # of a CUDA graph: its kernels run once as they are, then they are recorded, then replayed
EXACT = 1e-2  # relative error of a gradient: wrong ones were 15 % off, sums that cancel have come out 0.5 % off
ROUNDED = 0.045  # the same of half precision and TF32: a cosine of 0.999
NEGLIGIBLE = 1e-2  # of the root mean square over all gradients, beneath which a parameter's is rounding


@dataclass(frozen=True)
class SpeedOptions:
    compile: str | None = option(
        None,
        "compile the denoiser whole, or only its repeated transformer blocks, which takes seconds; its gradients are "
        "compared with the plain one's on a batch first",
        choices=COMPILED,
        const="denoiser",
    )
    torch_compile: bool = option(False, "the same as --compile denoiser")
    cuda_graphs: bool = option(
        False, "with --compile: replay the kernels of a pass as one, which spares small batches the time to launch each"
    )
    attention_backend: str | None = option(
        None,
        "kernels of PyTorch's attention to try first; by default PyTorch chooses by shape and device",
        choices=tuple(ATTENTION),
    )
    bf16_weights: bool = option(
        False,
        "with --mixed_precision bf16: compute with a bfloat16 copy of the denoiser's weights, made once a step, "
        "instead of casts at each use; what trains and is saved stays float32",
    )
    channels_last: bool = option(False, "keep images' channels together in memory, as convolutions on GPUs like it")
    keep_freed_memory: bool | None = option(
        None,
        "on the host, keep memory that a step has freed for the next one; given back to the kernel it would be zeroed "
        "anew (glibc); by default on a CPU",
    )

    def __post_init__(self) -> None:
        if self.torch_compile and self.compile == "blocks":
            raise UserError("--torch_compile is --compile denoiser, got --compile blocks; give one")
        if self.cuda_graphs and self.compiled is None:
            raise UserError("--cuda_graphs replays what --compile has made; give both")

    @property
    def compiled(self) -> str | None:
        """What is compiled."""
        return self.compile or ("denoiser" if self.torch_compile else None)


@contextmanager
def attention_by(backend: str | None) -> Iterator[None]:
    """Within it PyTorch's attention takes a kernel wherever that can do the shape and the precision.

    Attention that is not PyTorch's (xformers, sliced) is as it was.

    Args:
        backend: a key of `ATTENTION`; None leaves the choice to PyTorch.
    """
    if backend is None:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if torch.cuda.is_available():  # the first call sets an order of its own, on some GPUs
        functional.scaled_dot_product_attention(*torch.zeros(3, 1, 1, 8, 8, device="cuda").unbind())
    others = [] if backend == "math" else [name for name in ATTENTION if name != backend]  # which end in math
    # compiled graphs are kept on disk, under keys that do not know which kernels were chosen
    graphs = torch.compiler.config.patch(cache_key_tag=f"{torch.compiler.config.cache_key_tag} {backend} attention")
    with sdpa_kernel([getattr(SDPBackend, ATTENTION[name]) for name in (backend, *others)], set_priority=True), graphs:
        yield


def compile_denoiser(denoiser: nn.Module, what: str, sizes_vary: bool, cuda_graphs: bool) -> None:
    """Compiles a denoiser in place, its weights' names as they are; in evaluation mode it stays as it was.

    Inductor has made wrong gradients of nearest-neighbour upsampling between convolutions (torch 2.13, CPU), at the
    right loss: upsampling is by repetition from now on.

    Args:
        what: one of `COMPILED`.
        sizes_vary: whether it will see several sizes, of which one graph is made then.
        cuda_graphs: whether its kernels are recorded and replayed; what it gives lasts until the next pass.

    Raises:
        UserError: if it has no repeated blocks.
    """
    from diffusers.models.upsampling import Upsample2D

    _settle_compiler()
    for module in denoiser.modules():
        if isinstance(module, Upsample2D) and module.conv is not None and not module.use_conv_transpose:
            module.interpolate = False
            module.register_forward_pre_hook(_repeat_first)
    if sizes_vary:
        torch.fx.experimental._config.use_duck_shape = False  # a square among them would make a graph of squares alone
    blocks = [denoiser]
    if what == "blocks":
        names = getattr(denoiser, "_repeated_blocks", None) or ()
        blocks = [module for module in denoiser.modules() if type(module).__name__ in names]
        kind = type(denoiser).__name__
        require(bool(blocks), "compile", what, f"be denoiser for a {kind}", "it has no repeated blocks")
    for block in blocks:
        block._compiled_call_impl = _InTraining(block, sizes_vary, cuda_graphs, fullgraph=True)


def _settle_compiler() -> None:
    """Sets what torch.compile needs for these models, for the whole process."""
    import torch._dynamo.config
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    if torch.__version__ < (2, 14):  # pytorch#193061: gradients left unwritten
        torch._inductor.config.triton.mix_order_reduction = False
    if torch.are_deterministic_algorithms_enabled():  # else some kernels are chosen by their times
        torch._inductor.config.deterministic = True


class _InTraining:
    """Calls a module's compiled form while it trains; sampling, in other shapes, is left as it is."""

    def __init__(self, module: nn.Module, sizes_vary: bool, cuda_graphs: bool, fullgraph: bool):
        self._module = module
        self._sizes_vary = sizes_vary
        self._cuda_graphs = cuda_graphs
        mode, dynamic = "reduce-overhead" if cuda_graphs else None, True if sizes_vary else None
        self._compiled = torch.compile(module._call_impl, fullgraph=fullgraph, dynamic=dynamic, mode=mode)

    def in_pieces(self) -> "_InTraining":
        """The same of several graphs, with Python between them."""
        return _InTraining(self._module, self._sizes_vary, self._cuda_graphs, fullgraph=False)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not self._module.training:
            return self._module._call_impl(*arguments, **named)
        return self._compiled(*arguments, **named)


def compile_checked(
    denoiser: nn.Module,
    what: str,
    sizes_vary: bool,
    cuda_graphs: bool,
    gradients: Callable[[], Mapping[str, Tensor]],
    is_exact: bool,
) -> None:
    """Compiles a denoiser, and compares the gradients of a batch with those that the plain one gives.

    Args:
        gradients: runs forward and backward on that batch; gives all gradients by name.
        is_exact: whether arithmetic is in float32 throughout.

    Raises:
        UserError: if it can't be compiled, or its gradients are others.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException, Unsupported

    begun = time.perf_counter()
    with _stirred(denoiser):
        expected = gradients()
        compile_denoiser(denoiser, what, sizes_vary, cuda_graphs)
        try:
            try:
                found = [gradients()]
            except Unsupported as error:
                logger.warning("--compile: not one graph, for %s", first_line(error))
                _allow_breaks(denoiser)
                found = [gradients()]
            found += [gradients() for _ in range(REPLAYS - 1 if cuda_graphs else 0)]
        except (TorchDynamoException, FailOnRecompileLimitHit, RuntimeError, ImportError, OSError) as error:
            # no compiler, or not this model
            raise UserError(f"--compile: the denoiser can't be compiled here: {first_line(error)}") from error
    name, worst = max((largest_error(expected, each) for each in found), key=lambda error: error[1])
    if worst > (EXACT if is_exact else ROUNDED):
        raise UserError(f"--compile: compiled, the gradient of {name} is {worst:.2%} off; leave it out")
    seconds = time.perf_counter() - begun
    logger.info("compiled in %.0f s; all gradients agree with the plain model's to %.1g", seconds, worst)


def largest_error(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[str, float]:
    """The parameter whose gradient is furthest off, and its error relative to its norm.

    Norms so small beside all others' that they are rounding count as NEGLIGIBLE of the others' root mean square.
    """
    squares = sum(float(gradient.cpu().double().square().sum()) for gradient in expected.values())
    usual = (squares / max(1, sum(gradient.numel() for gradient in expected.values()))) ** 0.5
    worst = "", 0.0
    for name, gradient in expected.items():
        if name not in found:
            return name, 1.0
        floor = NEGLIGIBLE * usual * gradient.numel() ** 0.5
        off = float((found[name].cpu().double() - gradient.cpu().double()).norm())
        error = off / max(float(gradient.cpu().double().norm()), floor, 1e-30)
        if not error <= worst[1]:  # NaN too
            worst = name, error if error == error else float("inf")
    return worst


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
