"""The constant that a removed channel leaves behind, put into the biases of what read it.

A layer that read a channel of mean m loses, on average, ``m`` times the sum of the weights that
read it at every position. Added to the layer's bias this is exact for a channel that was constant
and a layer that does not pad; otherwise it is an approximation, to be kept only where a development
split gains. Behind a BatchNorm whose statistics are estimated anew it changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenprune.pruning.cost import CONVOLUTIONS
from greenprune.pruning.graph import Analysis
from greenprune.pruning.observed import reading
from greenprune.pruning.surgery import add_bias


@torch.no_grad()
def fold_means(
    compact: nn.Module,
    dense: nn.Module,
    analysis: Analysis,
    removed: Mapping[str, Sequence[int]],
    images: Tensor,
    batch_size: int = 128,
) -> tuple[str, ...]:
    """Fold the removed channels' means into the biases of ``compact``, in place.

    Args:
        compact: ``dense`` without the channels ``removed``.
        dense: the network before surgery, of which ``analysis`` is.
        removed: group name to the channels that are gone.
        images: normalised inputs to take the means over, float32 [N, C, H, W].
        batch_size: images in one forward pass.

    Returns:
        The names of the layers that had no bias and have one now (see
        :meth:`greenprune.pruning.record.NetworkRecord.with_biases`).
    """
    gone = _removed_inputs(analysis, removed)
    readers = {
        name: module
        for name, module in dense.named_modules()
        if name in gone and isinstance(module, (nn.Linear, *CONVOLUTIONS))
    }
    means = _input_means(dense, list(readers), images, batch_size)
    kept = _kept_outputs(analysis, removed, readers)
    gained: list[str] = []
    for name, module in readers.items():
        lost = torch.zeros_like(means[name])
        lost[gone[name]] = means[name][gone[name]]
        shift = _response(module, lost)[kept[name]]
        target = compact.get_submodule(name)
        if not bool(shift.any()):
            continue
        if target.bias is None:
            add_bias(compact, name)
            gained.append(name)
        assert isinstance(target.bias, nn.Parameter)
        target.bias.add_(shift.to(target.bias))
    return tuple(gained)


def _removed_inputs(analysis: Analysis, removed: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """For each reader the indices of its inputs that are gone, int64."""
    found: dict[str, list[np.ndarray]] = {}
    for group in analysis.groups:
        channels = np.asarray(removed.get(group.name, ()), dtype=np.int64)
        for consumer in group.consumers if len(channels) else ():
            found.setdefault(consumer.module, []).append(consumer.indices[channels].ravel())
    return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in found.items()}


def _kept_outputs(
    analysis: Analysis, removed: Mapping[str, Sequence[int]], readers: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """For each reader the indices of its outputs that are still there, int64."""
    kept = {
        name: np.ones(module.get_parameter("weight").shape[0], dtype=bool)
        for name, module in readers.items()
    }
    for group in analysis.groups:
        channels = np.asarray(removed.get(group.name, ()), dtype=np.int64)
        for producer in group.producers:
            if producer.module in kept:
                kept[producer.module][producer.indices[channels].ravel()] = False
    return {name: torch.from_numpy(np.flatnonzero(mask)) for name, mask in kept.items()}


def _input_means(
    model: nn.Module, names: list[str], images: Tensor, batch_size: int
) -> dict[str, Tensor]:
    """Mean of each input channel over images and positions, float64 [inputs]."""
    totals: dict[str, Tensor] = {}

    def look(name: str, maps: Tensor) -> None:
        per_channel = maps.detach().double().flatten(2).mean(dim=2) if maps.dim() > 2 else maps
        total = per_channel.double().sum(dim=0)
        totals[name] = totals[name] + total if name in totals else total

    with reading(model, names, look):
        for batch in images.split(batch_size):
            model(batch)
    return {name: total / len(images) for name, total in totals.items()}


def _response(module: nn.Module, constants: Tensor) -> Tensor:
    """What the layer, without bias and padding, answers to constant channels, float64 [outputs]."""
    weight = module.get_parameter("weight").detach().double()
    if isinstance(module, nn.Linear):
        return weight @ constants
    assert isinstance(module, CONVOLUTIONS)
    summed = weight.flatten(2).sum(dim=2, keepdim=True)
    return F.conv1d(constants[None, :, None], summed, groups=module.groups)[0, :, 0]
