"""The demo's feature network for evaluate_pipeline.py: the digit classifier, which sees ink but not colours.

python evaluate_pipeline.py --feature_module demo/digit_features.py ...
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from classifier import ink_of_pictures, to_network_size, trained_classifier
from digits import enlarge, split_digits
from utils.evaluation.metrics.features import Network


class DigitFeatures(Network):
    """64 features of the ink, scaled to a mean square of 1 on real digits; its classes are the ten digits."""

    name = "digit classifier"
    settings = "ink between two colours, averaged to 16 x 16"

    def __init__(self) -> None:
        self.module = trained_classifier()
        fields = np.stack([enlarge(ink) for ink in split_digits()[1].ink])
        with torch.no_grad():
            self._scale = float(self.module.features(to_network_size(fields)).square().mean().sqrt())
        self.class_weights = self.module.to_logits.weight.double().numpy() * self._scale

    def pixels(self, image: Image.Image) -> Tensor:
        return ink_of_pictures([image])[0]

    def features(self, pixels: Tensor) -> Tensor:
        return self.module.features(pixels) / self._scale
