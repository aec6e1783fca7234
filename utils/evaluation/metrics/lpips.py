"""LPIPS (Zhang et al. 2018, version 0.1) as a squared Euclidean distance of embeddings.

The weights w of its heads are not negative, so sum_l mean_hw sum_c w_lc (x_lc - y_lc)^2 = |v(x) - v(y)|^2, where v(x)
concatenates sqrt(w_lc / HW_l) x_lc over all layers l, and x_l is normalised over the channels at each position. The
heads are those of the lpips package; their license is in lpips_heads.LICENSE.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.config.tensor_files import read_safetensors

HEADS = Path(__file__).with_name("lpips_heads.safetensors")
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SMALLEST_LENGTH = 1e-10


def _alex() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU()),
    )


def _vgg() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for block, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        layers += [nn.MaxPool2d(2, 2)] if block else []
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


TRUNKS = {"alex": (_alex, (1, 4, 7, 9, 11)), "vgg": (_vgg, (3, 8, 15, 22, 29))}


class LpipsNetwork(nn.Module):
    """torchvision's AlexNet or VGG16 without classifier (same parameter names), with the heads of LPIPS."""

    def __init__(self, name: str):
        super().__init__()
        build, self._layers = TRUNKS[name]
        self.features = build()
        heads = read_safetensors(HEADS)
        for index in range(len(self._layers)):
            self.register_buffer(f"head_{index}", heads[f"{name}.{index}"], persistent=False)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)

    def load_trunk(self, tensors: dict[str, Tensor]) -> None:
        """Loads the weights of a torchvision checkpoint, without its classifier.

        Raises:
            RuntimeError: if a weight is missing or has another shape.
        """
        self.load_state_dict({name: tensor for name, tensor in tensors.items() if name.startswith("features.")})

    def forward(self, images: Tensor) -> Tensor:
        """Returns embeddings [B, D] of images [B, 3, H, W] in [-1, 1]; D depends on the image size."""
        found, parts = (images - self.shift) / self.scale, []
        for index, layer in enumerate(self.features):
            found = layer(found)
            if index in self._layers:
                head = getattr(self, f"head_{self._layers.index(index)}")
                unit = found / (found.square().sum(1, keepdim=True).sqrt() + SMALLEST_LENGTH)
                weight = (head / math.prod(found.shape[2:])).sqrt().view(1, -1, 1, 1)
                parts.append((unit * weight).flatten(1))
        return torch.cat(parts, 1)
