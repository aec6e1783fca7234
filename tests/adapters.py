"""Adapters of all kinds on tiny pipelines, with numbers that change something, and what PEFT makes of them."""

from collections.abc import Callable
from pathlib import Path

import torch

TARGETS = [
    *("to_k", "to_out.0", "q_proj", "fc1", "proj_in", "linear_1", "time_emb_proj"),
    *("conv1", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out"),
]
"""Linear layers and convolutions of all places of a UNet and its text encoders."""


def configs() -> dict[str, Callable[[], object]]:
    """PEFT's configs by kind of adapter."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    lora = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS, "init_lora_weights": False}
    patterns = {"alpha_pattern": {"to_k": 7}, "rank_pattern": {"to_k": 2}}
    others = {"alpha": 5, "target_modules": TARGETS, "init_weights": False}
    return {
        "lora": lambda: LoraConfig(**lora),
        "patterns": lambda: LoraConfig(**lora, **patterns),
        "rslora": lambda: LoraConfig(**lora, use_rslora=True),
        "dora": lambda: LoraConfig(**lora, use_dora=True),
        "loha": lambda: LoHaConfig(r=3, **others),
        "loha with cores": lambda: LoHaConfig(r=3, **others, use_effective_conv2d=True),
        "lokr": lambda: LoKrConfig(r=2, **others),
        "lokr of two products": lambda: LoKrConfig(r=1, **others, decompose_both=True),
        "lokr with cores": lambda: LoKrConfig(r=2, **others, use_effective_conv2d=True),
        "lokr of whole factors": lambda: LoKrConfig(r=64, **others),
    }


class Adapted:
    """A pipeline with an adapter of one kind in it.

    Attributes:
        pipeline: the pipeline.
        weights: its weights without the adapter, by component and layer.
        layers: the adapter's layers as read from PEFT's tensors.
    """

    def __init__(self, folder: Path, kind: str, text_encoders: bool = True):
        from diffusers import DiffusionPipeline
        from peft.utils import get_peft_model_state_dict

        from utils.formats.adapter_files import adapter_layers
        from utils.models.adapter_components import components_of

        torch.manual_seed(1)
        self.pipeline = DiffusionPipeline.from_pretrained(folder)
        self.components = components_of(self.pipeline)
        self.weights = {
            (each.name, name): base.weight.detach().clone()
            for each in self.components
            for name, base in self._modules(each.name).items()
        }
        self.layers = []
        for each in self.components if text_encoders else self.components[:1]:
            module = getattr(self.pipeline, each.name)
            module.add_adapter(configs()[kind](), adapter_name="default")
            tensors = get_peft_model_state_dict(module, adapter_name="default")
            config = module.peft_config["default"].to_dict()
            self.layers += adapter_layers(tensors, self.components, {"": config}, each.name)

    def _modules(self, component: str) -> dict[str, torch.nn.Module]:
        from utils.models.adapter_components import family_of_parts, layers_by_name

        family = family_of_parts(type(self.pipeline).__name__, self.pipeline.components)
        return layers_by_name(family, component, getattr(self.pipeline, component))

    def merged(self) -> dict[tuple[str, str], torch.Tensor]:
        """The weights of the adapted layers as PEFT merges them."""
        found = {}
        for layer in self.layers:
            module = self._modules(layer.component)[layer.name]
            module.merge()
            found[layer.component, layer.name] = module.get_base_layer().weight.detach()
        return found
