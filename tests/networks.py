"""Feature networks of the true architectures with random weights, small where the architecture lets them be."""

from pathlib import Path

import torch

from tests import tiny
from utils.evaluation.metrics.inception import InceptionNetwork
from utils.evaluation.metrics.lpips import LpipsNetwork

OWN_NETWORK = '''
import numpy as np
import torch
from torch import nn

from utils.evaluation.metrics.features import Network


class Small(Network):
    """Means and deviations of 4 x 4 patches."""

    name = "small"
    settings = "resized to 32"

    def __init__(self):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Conv2d(3, 12, 8, 8), nn.Tanh(), nn.Flatten(), nn.Linear(192, 8))
        self.class_weights = np.random.default_rng(0).normal(size=(5, 8))

    def pixels(self, image):
        pixels = np.asarray(image.resize((32, 32)), np.float32) / 255
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def features(self, pixels):
        return self.module(pixels)
'''


def make_own(file: Path) -> Path:
    """A --feature_module."""
    file.write_text(OWN_NETWORK, encoding="utf-8")
    return file


def make_clip(folder: Path) -> Path:
    """A small CLIP with its tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    text = tiny.text_config(32)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    tiny.tokenizer(folder / "vocabulary").save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def make_dino(folder: Path) -> Path:
    """A small DINOv2."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=224, patch_size=56, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


def make_inception(file: Path) -> Path:
    """pytorch-fid's file, its layers scaled so that a random network tells images apart."""
    torch.manual_seed(0)
    network = InceptionNetwork()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.01)
            module.bias.data.normal_(0, 0.1)
    torch.save(network.state_dict(), file)
    return file


def make_trunk(file: Path, name: str = "alex") -> Path:
    """torchvision's AlexNet or VGG16 file."""
    torch.manual_seed(0)
    network = LpipsNetwork(name)
    torch.save(network.state_dict() | {"classifier.1.weight": torch.zeros(2, 2)}, file)
    return file
