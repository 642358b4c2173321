"""VGG-16 in its CIFAR form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """VGG-16 (Simonyan and Zisserman, 2015) with BatchNorm and a 512-512-classes head.

    The CIFAR form that HRank and its followers prune: 313,463,808 MACs and 14,991,946 parameters
    for 10 classes. Input float32 ``[N, in_channels, 32, 32]``, output ``[N, num_classes]``.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_channels
        for number, stage in enumerate(STAGES):
            if number:
                layers.append(nn.MaxPool2d(2))
            for out in stage:
                layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
                width = out
        self.features = nn.Sequential(*layers, nn.AvgPool2d(2))
        self.classifier = nn.Sequential(
            nn.Linear(width, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))  # type: ignore[no-any-return]


def vgg16(num_classes: int = 10, in_channels: int = 3) -> VGG16:
    """Build :class:`VGG16`."""
    return VGG16(num_classes, in_channels)
