"""What saves memory computes the same, or the same but for what it says."""

import pytest
import torch
from torch import nn

from tests.test_equivalences import assert_same_bits, lora, losses, weights
from utils.families.quantization import quantize_linears


@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 1e-5), ("int8", 0.012)])
def test_quantised_layers_against_their_own_rounding(kind, tolerance):
    """nf4 by Dettmers et al. (2023): the nearest of 16 levels, scaled by the largest of each 64 weights."""
    from bitsandbytes.functional import dequantize_4bit

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 32, bias=False))
    inputs, expected = torch.randn(5, 64), nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 32, bias=False))
    expected.load_state_dict(network.state_dict())
    quantize_linears(network, kind, torch.device("cpu"))
    assert network[0].weight.dtype in (torch.uint8, torch.int8)
    if kind == "nf4":
        levels = dequantize_4bit(network[0].weight.data, network[0].weight.quant_state)
        blocks = (expected[0].weight.view(-1, 64), levels.view(-1, 64))
        scales = blocks[0].abs().amax(1, keepdim=True)
        assert ((blocks[0] - blocks[1]).abs() / scales).max() < 0.16  # half the widest gap between two levels
        for layer in (0, 2):
            weight = network[layer].weight
            expected[layer].weight.data = dequantize_4bit(weight.data, weight.quant_state)
    error = float((network(inputs) - expected(inputs)).norm() / expected(inputs).norm())
    assert error < tolerance
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_lora_on_a_quantised_base(train, pipelines, name, kind):
    from diffusers import DiffusionPipeline

    flags = ["--adaptation", "lora", "--max_train_steps", 6, "--train_batch_size", 2, "--learning_rate", 1e-2]
    plain = train(name, *flags, out="plain")
    quantised = train(name, *flags, "--quantize_base", kind, out="quantised")
    assert losses(quantised) == pytest.approx(losses(plain), rel=0.05)
    assert losses(quantised) != losses(plain)
    assert lora(quantised).keys() == lora(plain).keys()
    pipeline = DiffusionPipeline.from_pretrained(pipelines[name])
    pipeline.load_lora_weights(quantised)
    parts = train(name, *flags[:2], *flags[4:], "--max_train_steps", 3, "--quantize_base", kind, out="parts")
    train(name, *flags, "--quantize_base", kind, "--resume_from_checkpoint", "latest", out="parts")
    assert losses(parts) == losses(quantised)


def test_slices_and_tiles(train, capsys):
    flags = ["--max_train_steps", 3, "--train_batch_size", 3, "--learning_rate", 1e-3, "--adam_epsilon", 1e-5]
    plain = train("sd", *flags, out="plain")
    sliced = train("sd", *flags, "--vae_slicing", "--attention_slicing", out="sliced")
    assert losses(sliced) == pytest.approx(losses(plain), rel=1e-5)
    tiled = train("sd", *flags, "--vae_tiling", out="tiled")
    assert_same_bits(weights(tiled), weights(plain))  # smaller than a tile
    train("sd", "--quantize_base", "nf4", out="full", expect=2)
    assert "--quantize_base nf4 goes with --adaptation lora" in capsys.readouterr().err
