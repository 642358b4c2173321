"""LeNet-5."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al., 1998) on blocks of 8: two convolutions, three linear layers.

    The order of layers is the classical one, with ReLU and max-pooling, and with widths that are
    multiples of 8 (16, 32, 128, 64 for 6, 16, 120, 84), so that pruning lands on the blocks that
    processors compute in. Input float32 ``[N, in_channels, 32, 32]``, output ``[N, num_classes]``.
    """

    def __init__(
        self, num_classes: int, in_channels: int, convolutions: Sequence[int], hidden: Sequence[int]
    ) -> None:
        super().__init__()
        first, second = convolutions
        self.conv1 = nn.Conv2d(in_channels, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(second * 5 * 5, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.fc3 = nn.Linear(hidden[1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = self.relu(self.fc1(x))
        x = self.relu(self.fc2(x))
        return self.fc3(x)  # type: ignore[no-any-return]


def lenet5(
    num_classes: int = 10,
    in_channels: int = 1,
    convolutions: Sequence[int] = (16, 32),
    hidden: Sequence[int] = (128, 64),
) -> LeNet5:
    """Build :class:`LeNet5`; the original widths are ``(6, 16)`` and ``(120, 84)``."""
    return LeNet5(num_classes, in_channels, convolutions, hidden)
