"""CRNN: convolutions, then a recurrent layer that reads the columns from left to right."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from greenprune.errors import WeightsError

RECURRENT = {"lstm": nn.LSTM, "gru": nn.GRU}


class CRNN(nn.Module):
    """A small CRNN (Shi et al., 2017) that reads an image as a sequence of columns.

    Three 3x3 convolutions with BatchNorm, ReLU and max-pooling, which divide the height by 8 and
    the width by 4, rounded down; a bidirectional LSTM or GRU over the columns; the mean of its
    outputs over the columns; one linear layer. Input float32 ``[N, in_channels, height, width]``
    (28x28 or 32x32 for MNIST), output ``[N, num_classes]``.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        height: int,
        convolutions: Sequence[int],
        hidden: int,
        layers: int,
        cell: str,
    ) -> None:
        super().__init__()
        if cell not in RECURRENT:
            raise WeightsError(f"cell = '{cell}': expected one of {', '.join(RECURRENT)}")
        parts: list[nn.Module] = []
        width = in_channels
        for out, pool in zip(convolutions, ((2, 2), (2, 2), (2, 1)), strict=True):
            convolution = nn.Conv2d(width, out, 3, padding=1, bias=False)
            parts += [convolution, nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(pool)]
            width = out
        self.features = nn.Sequential(*parts)
        self.recurrent = RECURRENT[cell](
            width * (height // 8), hidden, layers, batch_first=True, bidirectional=True
        )
        self.classifier = nn.Linear(2 * hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.features(x).permute(0, 3, 1, 2).flatten(2)
        states = self.recurrent(columns)[0]
        return self.classifier(states.mean(dim=1))  # type: ignore[no-any-return]


def crnn(
    num_classes: int = 10,
    in_channels: int = 1,
    height: int = 32,
    convolutions: Sequence[int] = (16, 32, 64),
    hidden: int = 64,
    layers: int = 1,
    cell: str = "lstm",
) -> CRNN:
    """Build :class:`CRNN`; ``cell`` is ``lstm`` or ``gru``.

    Raises:
        WeightsError: another cell.
    """
    return CRNN(num_classes, in_channels, height, convolutions, hidden, layers, cell)
