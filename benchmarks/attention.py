"""Compares PyTorch's attention kernels, which --attention_backend selects, by shape.

python benchmarks/attention.py [--size small|true] [--precision fp32|bf16] [--batch 4] [--repeats 9]

The shapes are those of Stable Diffusion's attention layers: `true` at 512, 768 and 1024 pixels, `small` with widths and
edges divided as in benchmarks/train.py. Forward and backward pass of each kernel alternate with PyTorch's own choice.
It prints the speed relative to that choice: median, minimum and maximum of the ratios. A kernel whose output or
gradients differ from float64 by more than rounding gets no speed. It has not been run on a GPU yet.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.printing import print_machine, print_table
from utils.models.attention import attention_by
from utils.models.options import ATTENTION, CPU_ATTENTION

WORDS = 77
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""Tolerance of the relative error in norm, against float64."""


class Layer(NamedTuple):
    """An attention layer: its place, and its numbers of heads, channels per head, queries and keys."""

    name: str
    heads: int
    width: int
    queries: int
    keys: int


def layers(size: str) -> list[Layer]:
    """Returns the self-attention and cross-attention layer of each level with attention."""
    divisor = {"true": 1, "small": 8}[size]
    levels = [(f"SD 1.5, 512 px, level {n}", 8, 40 * 2**n, 64 // 2**n) for n in range(3)]
    levels += [(f"SD 2.1, 768 px, level {n}", 5 * 2**n, 64, 96 // 2**n) for n in range(3)]
    levels += [(f"SDXL, 1024 px, level {n}", 5 * 2**n, 64, 128 // 2**n) for n in (1, 2)]
    found = []
    for name, heads, width, edge in levels:
        edge = edge if size == "true" else edge // 4
        for kind, keys in (("self", edge**2), ("words", WORDS)):
            found.append(Layer(f"{name}, {kind}", heads, max(width // divisor, 4), edge**2, keys))
    return found


def passes(
    layer: Layer, batch: int, dtype: torch.dtype, device: str
) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    """Returns (function that runs forward and backward, expected result in float64).

    A result is the output and the gradients of queries, keys and values.
    """
    random = torch.Generator().manual_seed(0)
    shapes = [(batch, layer.heads, count, layer.width) for count in (layer.queries, layer.keys, layer.keys)]
    exact = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in (*shapes, shapes[0])]

    def run(given: Sequence[Tensor]) -> list[Tensor]:
        inputs = [each.detach().requires_grad_() for each in given[:3]]
        output = scaled_dot_product_attention(*inputs)
        return [output, *torch.autograd.grad(output, inputs, given[3])]

    cast = [each.to(device, dtype) for each in exact]
    with attention_by("math"):
        expected = run([each.to(device).double() for each in cast])
    return (lambda: run(cast)), expected


def seconds(function: Callable[[], object], device: str) -> float:
    """Returns the seconds that a call takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def cell(run: Callable[[], list[Tensor]], expected: list[Tensor], backend: str, tolerance: float, repeats: int) -> str:
    """Returns the speed of a kernel relative to PyTorch's choice, as text, if its results are correct."""
    device, kernel = expected[0].device.type, getattr(SDPBackend, ATTENTION[backend])
    try:
        with sdpa_kernel(kernel):
            found = run()
    except RuntimeError:  # PyTorch's messages vary
        return "not for this shape"
    errors = [
        float((one.detach().double() - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True)
    ]
    if not max(errors) <= tolerance:
        return f"wrong by {max(errors):.1e}"
    run()
    ratios = []
    for _ in range(repeats):
        usual = seconds(run, device)
        with sdpa_kernel(kernel):
            ratios.append(usual / seconds(run, device))
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    """Prints the table of layers and kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    is_gpu = device == "cuda"
    parser.add_argument("--size", choices=("small", "true"), default="true" if is_gpu else "small")
    parser.add_argument("--precision", choices=DTYPES, default="bf16" if is_gpu else "fp32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    print_machine(("torch",))
    if is_gpu:
        print(torch.cuda.get_device_name())
    kernels = tuple(ATTENTION) if is_gpu else CPU_ATTENTION
    rows = []
    for layer in layers(args.size):
        run, expected = passes(layer, args.batch, DTYPES[args.precision], device)
        shape = f"{layer.heads} x {layer.queries} x {layer.keys} x {layer.width}"
        cells = [cell(run, expected, name, TOLERANCE[args.precision], args.repeats) for name in kernels]
        rows.append([layer.name, shape, *cells])
    title = f"Attention, forward and backward, batch {args.batch}, {args.precision}: times as fast as PyTorch's choice"
    print_table(title, ["layer", "heads x queries x keys x width", *kernels], rows)


if __name__ == "__main__":
    main()
