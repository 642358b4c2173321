"""GoogLeNet in its CIFAR form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STAGES = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
"""Widths of each inception block, as the columns of table 1 in Szegedy et al. have them: 1x1,
3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection."""


class Inception(nn.Module):
    """Four branches side by side; two 3x3 convolutions stand for the 5x5 one."""

    def __init__(self, in_channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pool = widths
        self.branch1 = _unit(in_channels, one, 1)
        self.branch3 = nn.Sequential(_unit(in_channels, reduce3, 1), _unit(reduce3, three, 3))
        self.branch5 = nn.Sequential(
            _unit(in_channels, reduce5, 1), _unit(reduce5, five, 3), _unit(five, five, 3)
        )
        self.branch_pool = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), _unit(in_channels, pool, 1)
        )
        self.out_channels = one + three + five + pool

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(x)]
        return torch.cat(parts, dim=1)


class GoogLeNet(nn.Module):
    """GoogLeNet (Szegedy et al., 2015) with BatchNorm and a 3x3 stem of stride 1.

    The CIFAR form that HRank and its followers prune: 1,521,756,160 MACs and 6,166,250
    parameters for 10 classes on 32x32 RGB images. Input float32 ``[N, in_channels, height,
    width]``, output ``[N, num_classes]``.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [_unit(in_channels, 192, 3)]
        width = 192
        for number, stage in enumerate(STAGES):
            if number:
                layers.append(nn.MaxPool2d(3, stride=2, padding=1))
            for widths in stage:
                block = Inception(width, widths)
                layers.append(block)
                width = block.out_channels
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.flatten(self.pool(self.features(x)), 1)
        return self.classifier(pooled)  # type: ignore[no-any-return]


def _unit(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def googlenet(num_classes: int = 10, in_channels: int = 3) -> GoogLeNet:
    """Build :class:`GoogLeNet`."""
    return GoogLeNet(num_classes, in_channels)
