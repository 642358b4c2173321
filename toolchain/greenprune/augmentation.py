"""Random variation of training images, drawn from a generator (host side)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from greenprune.errors import DataError


def augment(inputs: Tensor, kind: str, generator: torch.Generator | None = None) -> Tensor:
    """Vary a batch ``[N, C, H, W]``, each image on its own.

    ``shift`` moves by up to 2 pixels, zeros come in; ``crop_flip`` pads by 4, crops at random and
    flips every second image left to right; ``none`` changes nothing.
    """
    if kind == "none":
        return inputs
    if kind == "shift":
        return _crop(inputs, 2, generator)
    if kind == "crop_flip":
        cropped = _crop(inputs, 4, generator)
        flip = torch.rand(len(inputs), generator=generator) < 0.5
        cropped[flip] = cropped[flip].flip(3)
        return cropped
    raise DataError(f"data.augmentation = '{kind}': expected 'none', 'shift' or 'crop_flip'")


def _crop(inputs: Tensor, pad: int, generator: torch.Generator | None) -> Tensor:
    count, _, height, width = inputs.shape
    top, left = torch.randint(2 * pad + 1, (2, count), generator=generator)
    windows = F.pad(inputs, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(count), :, top, left]
