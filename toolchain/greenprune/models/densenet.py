"""DenseNet-40 in its CIFAR form."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, whose output is appended to the input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.relu(self.bn(x)))], dim=1)


class DenseNet(nn.Module):
    """DenseNet (Huang et al., 2017) without bottlenecks and compression: three dense blocks.

    With 12 layers a block and a growth of 12 it is DenseNet-40, the form that HRank and its
    followers prune: 282,917,328 MACs and 1,059,298 parameters for 10 classes on 32x32 RGB images.
    Input float32 ``[N, in_channels, height, width]``, output ``[N, num_classes]``.
    """

    def __init__(self, layers: int, growth: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        width = 2 * growth
        parts: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1, bias=False)]
        for number in range(3):
            if number:
                parts.append(_transition(width))
            parts += [DenseLayer(width + index * growth, growth) for index in range(layers)]
            width += layers * growth
        self.features = nn.Sequential(*parts, nn.BatchNorm2d(width), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.flatten(self.pool(self.features(x)), 1)
        return self.classifier(pooled)  # type: ignore[no-any-return]


def _transition(width: int) -> nn.Sequential:
    convolution = nn.Conv2d(width, width, 1, bias=False)
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), convolution, nn.AvgPool2d(2))


def densenet40(num_classes: int = 10, in_channels: int = 3) -> DenseNet:
    """DenseNet-40 with a growth of 12."""
    return DenseNet(12, 12, num_classes, in_channels)
