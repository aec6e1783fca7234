"""Adapters at a scale, while samples are drawn."""

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from utils.models.adapter_strength import adapters_at
from utils.models.fused_lora import num_shortened, shorten

TARGETS = ["to_q", "to_v"]
CONFIGS = {
    "lora": LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, init_lora_weights=False),
    "short": LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, init_lora_weights=False),
    "dora": LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "loha": LoHaConfig(r=2, alpha=3, target_modules=TARGETS, init_weights=False),
    "lokr": LoKrConfig(r=2, alpha=3, target_modules=TARGETS, init_weights=False),
}


class Attention(torch.nn.Module):
    """The names and the shape of an attention's projections."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_v = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.to_q(inputs), self.to_v(inputs)], -1)


@pytest.mark.parametrize("kind", list(CONFIGS))
@torch.no_grad()
def test_what_an_adapter_adds_is_scaled(kind):
    from peft import inject_adapter_in_model

    torch.manual_seed(0)
    module, inputs = Attention(), torch.randn(4, 8)
    base = module(inputs)
    module = inject_adapter_in_model(CONFIGS[kind], module, "default")
    if kind == "short":
        shorten(module, "default")
        assert num_shortened(module) == 2
    whole, needed = module(inputs), [each.requires_grad for each in module.parameters()]
    assert not torch.equal(base, whole)
    with adapters_at(0.0, [module]):
        assert torch.equal(module(inputs), base)
    if kind != "dora":  # whose norm contains the scale
        with adapters_at(0.5, [module]):
            torch.testing.assert_close(module(inputs), (base + whole) / 2)
        with adapters_at(-2, [module]), adapters_at(1, [module]):
            torch.testing.assert_close(module(inputs), base - 2 * (whole - base))
    for scale in (None, 1):
        with adapters_at(scale, [module]):
            assert torch.equal(module(inputs), whole)
    assert torch.equal(module(inputs), whole)
    assert needed == [each.requires_grad for each in module.parameters()]
    assert any(isinstance(each, BaseTunerLayer) for each in module.modules())
