"""Small denoisers with their inputs, and their gradients."""

import torch
from torch import Tensor, nn

NAMES = ["sd", "pixels"]


def unet_and_inputs(checkpointing: bool = False, depth: int = 1) -> tuple[nn.Module, tuple, dict]:
    """A small conditional UNet of 4 x `depth` transformer blocks, and what it is called with."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(24, 40),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=28,
        attention_head_dim=4,
        norm_num_groups=8,
        transformer_layers_per_block=depth,
    ).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return (
        unet,
        (torch.randn(4, 4, 8, 8), torch.tensor([1, 300, 700, 999])),
        {"encoder_hidden_states": torch.randn(4, 9, 28)},
    )


def gradients(unet: nn.Module, arguments: tuple, named: dict, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        prediction = unet(*arguments, **named).sample
    (prediction.float() - arguments[0]).square().mean().backward()
    found = {name: each.grad.clone() for name, each in trained.items()}
    for each in trained.values():
        each.grad = None
    return found
