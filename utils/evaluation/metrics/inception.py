"""The Inception network of FID, with the parameter names of pytorch-fid's weight file.

It is Inception v3 (Szegedy et al. 2015) as in TensorFlow of December 2015. Unlike the usual one, average pooling
excludes padding, the last block uses max pooling, the epsilon of batch normalisation is 1e-3, and it has 1008 classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_FEATURES, NUM_CLASSES, INPUT_SIZE = 2048, 1008, 299


class Convolution(nn.Module):
    """A convolution without bias, followed by batch normalisation and ReLU."""

    def __init__(self, channels: int, out: int, kernel_size: int | tuple[int, int], stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(images)))


def _mean_around(images: Tensor) -> Tensor:
    return functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)


def _maximum_around(images: Tensor) -> Tensor:
    return functional.max_pool2d(images, 3, 1, 1)


class BlockA(nn.Module):
    """Block at 35 x 35: branches 1 x 1, 5 x 5, twice 3 x 3, and average pooling."""

    def __init__(self, channels: int, pool_features: int):
        super().__init__()
        self.branch1x1 = Convolution(channels, 64, 1)
        self.branch5x5_1 = Convolution(channels, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, padding=1)
        self.branch_pool = Convolution(channels, pool_features, 1)

    def forward(self, images: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(images))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(images)))
        return torch.cat([self.branch1x1(images), five, three, self.branch_pool(_mean_around(images))], 1)


class BlockB(nn.Module):
    """Downsampling from 35 x 35 to 17 x 17."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3 = Convolution(channels, 384, 3, 2)
        self.branch3x3dbl_1 = Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, 2)

    def forward(self, images: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(images)))
        return torch.cat([self.branch3x3(images), double, functional.max_pool2d(images, 3, 2)], 1)


class BlockC(nn.Module):
    """Block at 17 x 17: branches 1 x 1, 7 x 7 factorised into two and four convolutions, and average pooling."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        across, down = {"kernel_size": (1, 7), "padding": (0, 3)}, {"kernel_size": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Convolution(channels, 192, 1)
        self.branch7x7_1 = Convolution(channels, width, 1)
        self.branch7x7_2 = Convolution(width, width, **across)
        self.branch7x7_3 = Convolution(width, 192, **down)
        self.branch7x7dbl_1 = Convolution(channels, width, 1)
        self.branch7x7dbl_2 = Convolution(width, width, **down)
        self.branch7x7dbl_3 = Convolution(width, width, **across)
        self.branch7x7dbl_4 = Convolution(width, width, **down)
        self.branch7x7dbl_5 = Convolution(width, 192, **across)
        self.branch_pool = Convolution(channels, 192, 1)

    def forward(self, images: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(images)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(images)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(images), seven, double, self.branch_pool(_mean_around(images))], 1)


class BlockD(nn.Module):
    """Downsampling from 17 x 17 to 8 x 8."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3_1 = Convolution(channels, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, 2)
        self.branch7x7x3_1 = Convolution(channels, 192, 1)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Convolution(192, 192, 3, 2)

    def forward(self, images: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(images))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(images)))
        return torch.cat([three, self.branch7x7x3_4(seven), functional.max_pool2d(images, 3, 2)], 1)


class BlockE(nn.Module):
    """Block at 8 x 8: branches 1 x 1, split 3 x 3, 3 x 3 then split 3 x 3, and average (or, if last, max) pooling."""

    def __init__(self, channels: int, has_maximum: bool):
        super().__init__()
        self.pool = _maximum_around if has_maximum else _mean_around
        across, down = {"kernel_size": (1, 3), "padding": (0, 1)}, {"kernel_size": (3, 1), "padding": (1, 0)}
        self.branch1x1 = Convolution(channels, 320, 1)
        self.branch3x3_1 = Convolution(channels, 384, 1)
        self.branch3x3_2a = Convolution(384, 384, **across)
        self.branch3x3_2b = Convolution(384, 384, **down)
        self.branch3x3dbl_1 = Convolution(channels, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Convolution(384, 384, **across)
        self.branch3x3dbl_3b = Convolution(384, 384, **down)
        self.branch_pool = Convolution(channels, 192, 1)

    def forward(self, images: Tensor) -> Tensor:
        three = self.branch3x3_1(images)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(images))
        parts = [
            self.branch1x1(images),
            *(self.branch3x3_2a(three), self.branch3x3_2b(three)),
            *(self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)),
            self.branch_pool(self.pool(images)),
        ]
        return torch.cat(parts, 1)


class InceptionNetwork(nn.Module):
    """Maps images [B, 3, 299, 299] in [-1, 1] to features [B, 2048] after the last average pooling ("pool3").

    `fc` maps features to classes; the Inception Score uses its weights without bias, as the original code does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, has_maximum=False)
        self.Mixed_7c = BlockE(2048, has_maximum=True)
        self.fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        found = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        found = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(functional.max_pool2d(found, 3, 2)))
        found = functional.max_pool2d(found, 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            found = getattr(self, f"Mixed_{name}")(found)
        return found.mean((2, 3))
