"""What makes a denoiser faster and changes its numbers little or not at all."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.options import UserError, first_line, option

logger = logging.getLogger(__name__)
COMPILED_TOLERANCE = 1e-2  # of a parameter's gradient, relative


@dataclass(frozen=True)
class SpeedOptions:
    torch_compile: bool = option(False, "compile the denoiser; its gradients are compared with the plain one's first")
    channels_last: bool = option(False, "keep images' channels together in memory, as convolutions on GPUs like it")


def hasten(denoiser: nn.Module, options: SpeedOptions, probe: dict[str, Tensor]) -> list[str]:
    """Switches on what was asked for; gives it in words.

    Args:
        probe: arguments of a forward pass, by which a compiled denoiser is compared with the plain one.
    """
    active = []
    if options.channels_last:
        denoiser.to(memory_format=torch.channels_last)
        active.append("channels last")
    if options.torch_compile:
        compile_denoiser(denoiser, probe)
        active.append("torch.compile")
    if torch.backends.cuda.matmul.allow_tf32:
        active.append("TF32")
    return active


def compile_denoiser(denoiser: nn.Module, probe: dict[str, Tensor]) -> None:
    """Compiles a denoiser in place, its weights' names as they are.

    Inductor has made wrong gradients of nearest-neighbour upsampling between convolutions (torch 2.13, CPU), at the
    right loss: upsampling is by repetition here, and all gradients are compared.

    Raises:
        UserError: if it can't be compiled, or its gradients are others.
    """
    from diffusers.models.upsampling import Upsample2D

    for module in denoiser.modules():
        if isinstance(module, Upsample2D) and module.conv is not None and not module.use_conv_transpose:
            module.interpolate = False
            module.register_forward_pre_hook(_repeat_first)
    zeros = [parameter for parameter in denoiser.parameters() if not parameter.any()]
    with torch.no_grad():  # behind last layers of zeros there would be no gradient to compare
        for parameter in zeros:
            parameter.normal_(std=0.02)
    expected = _gradients(denoiser, probe)
    try:
        denoiser.compile()
        found = _gradients(denoiser, probe)
    except (RuntimeError, ImportError, OSError) as error:  # no compiler, or a model that it can't take
        raise UserError(f"--torch_compile: the denoiser can't be compiled here: {first_line(error)}") from error
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()
    for name, gradient in expected.items():
        error = float((found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12))
        if error > COMPILED_TOLERANCE and float(gradient.norm()) > 1e-6:
            raise UserError(f"--torch_compile: compiled, the gradient of {name} is {error:.0%} off; leave it out")
    logger.info("--torch_compile: all gradients agree with the plain model's")


def _repeat_first(module: nn.Module, arguments: tuple) -> tuple:
    images, *rest = arguments
    if rest and rest[0] is not None:  # a size that is no doubling
        return functional.interpolate(images, size=rest[0], mode="nearest"), *rest
    return images.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2), *rest


def _gradients(denoiser: nn.Module, probe: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the mean squared output, by the parameters' names; none are left."""
    denoiser(**probe).sample.float().square().mean().backward()
    found = {}
    for name, parameter in denoiser.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.detach().clone()
            parameter.grad = None
    return found
