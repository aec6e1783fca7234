"""The demo's feature network for evaluate_pipeline.py: the digit classifier, which sees the ink and no colours.

python evaluate_pipeline.py --feature_module demo/digit_features.py ...
"""

import sys
from pathlib import Path

from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from classifier import ink_of_pictures, trained_classifier
from utils.metrics.features import Network


class DigitFeatures(Network):
    """64 features of the ink; the classes are the ten digits."""

    name = "digit classifier"
    settings = "ink between two colours, averaged to 16 x 16"

    def __init__(self) -> None:
        self.module = trained_classifier()
        self.class_weights = self.module.to_logits.weight.double().numpy()

    def pixels(self, image: Image.Image) -> Tensor:
        return ink_of_pictures([image])[0]

    def features(self, pixels: Tensor) -> Tensor:
        return self.module.features(pixels)
