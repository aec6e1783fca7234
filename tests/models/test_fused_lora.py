"""Fused LoRA layers against PEFT's."""

import pytest
import torch
from torch import nn

from tests.comparing import lora, losses
from tests.conftest import mostly_slow


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-5), ("bf16", 2e-3)])
@pytest.mark.parametrize("name", mostly_slow(["sd", "sdxl"], "sd"))
def test_fused_lora_layers_are_pefts(train, name, precision, tolerance):
    flags = ["--adaptation", "lora", "--mixed_precision", precision, "--max_train_steps", 4, "--learning_rate", 1e-3]
    flags += ["--lora_alpha", 8, "--train_text_encoder", "--adam_epsilon", 1e-4]
    fused, plain = train(name, *flags, out="fused"), train(name, *flags, "--no_fused_lora", out="plain")
    assert losses(fused) == pytest.approx(losses(plain), rel=tolerance)
    assert lora(fused).keys() == lora(plain).keys()
    difference = torch.cat([(lora(fused)[key] - each).flatten() for key, each in lora(plain).items()])
    whole = torch.cat([each.flatten() for each in lora(plain).values()])
    assert float(difference.norm() / whole.norm()) < tolerance


def test_fused_lora_layers_have_pefts_outputs_and_gradients():
    from peft import LoraConfig, inject_adapter_in_model

    from utils.models.fused_lora import num_shortened, shorten

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 10), nn.SiLU(), nn.Linear(10, 3, bias=False), nn.Conv1d(5, 2, 1))
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2", "3"], init_lora_weights=False)
    network = inject_adapter_in_model(config, network).double()
    inputs = torch.randn(4, 5, 6, dtype=torch.double)
    expected = network(inputs)
    trained = [each for each in network.parameters() if each.requires_grad]
    wanted = torch.autograd.grad(expected.square().sum(), trained)
    shorten(network, "default")
    assert num_shortened(network) == 2  # the convolution stays peft's
    found = network(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for one, other in zip(torch.autograd.grad(found.square().sum(), trained), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    network[0].enable_adapters(False)
    assert not torch.equal(network(inputs), expected)
    dropping = LoraConfig(target_modules=["0"], lora_dropout=0.1)
    network = inject_adapter_in_model(dropping, nn.Sequential(nn.Linear(2, 2)))
    shorten(network, "default")
    assert not num_shortened(network)
