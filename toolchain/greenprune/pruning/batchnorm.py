"""BatchNorm statistics of a network whose channels have just changed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def reestimate(model: nn.Module, images: Tensor, batch_size: int = 128) -> None:
    """Replace every BatchNorm's running statistics by their mean over ``images``, in place.

    Args:
        model: left in eval mode; a network without BatchNorm is unchanged.
        images: normalised inputs, float32 [N, C, H, W].
        batch_size: images in one forward pass.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    layers = [layer for layer in layers if layer.track_running_stats]
    model.eval()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over batches
        layer.train()
    try:
        # equal batches: a last one of a single image would weigh as much as the others
        for batch in images.tensor_split(max(1, len(images) // batch_size)):
            model(batch)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        model.eval()


def reestimated(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy of ``model`` after :func:`reestimate`."""
    again = copy.deepcopy(model)
    reestimate(again, images)
    return again
