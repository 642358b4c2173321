"""Criteria that look at the weights alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from greenprune.errors import PruningError
from greenprune.pruning.graph import Analysis, Group

Values = NDArray[np.float64]


def magnitude(model: nn.Module, analysis: Analysis) -> dict[str, Values]:
    """Squared L2 norm of each filter, as a share of its layer's, summed over the group's layers."""
    parameters = dict(model.named_parameters())
    scores = {}
    for group in analysis.groups:
        total = np.zeros(group.channels)
        for filters, layer in _filters(parameters, group):
            total += filters.square().sum(dim=1).numpy() / max(layer, 1e-30)
        scores[group.name] = total
    return scores


def fpgm(model: nn.Module, analysis: Analysis) -> dict[str, Values]:
    """Distance from the geometric median (He et al., CVPR 2019, equation 8).

    The sum of a filter's Euclidean distances from the other filters of its layer that may go, as a
    share of the layer's, summed over the group's layers: what the others can replace is low.
    """
    parameters = dict(model.named_parameters())
    scores = {}
    for group in analysis.groups:
        total = np.zeros(group.channels)
        for filters, _ in _filters(parameters, group):
            distances = torch.cdist(
                filters, filters, compute_mode="donot_use_mm_for_euclid_dist"
            ).sum(dim=1)
            total += (distances / distances.sum().clamp(min=1e-30)).numpy()
        scores[group.name] = total
    return scores


def bn_scale(model: nn.Module, analysis: Analysis) -> dict[str, Values]:
    """BatchNorm's scale (Network Slimming, Liu et al., ICCV 2017).

    Its absolute value as a share of its layer's, summed over the group's BatchNorms.

    Raises:
        PruningError: a group has no BatchNorm.
    """
    modules = dict(model.named_modules())
    scores = {}
    for group in analysis.groups:
        owners = ((part, *part.parameter.rpartition(".")[::2]) for part in group.parameters)
        parts = [
            part
            for part, owner, kind in owners
            if kind == "weight" and isinstance(modules[owner], _BatchNorm)
        ]
        if not parts:
            raise PruningError(
                f"pruning method 'bn_scale' needs a BatchNorm behind every group, and "
                f"'{group.name}' has none; use 'drp' or 'magnitude'"
            )
        scores[group.name] = np.zeros(group.channels)
        for part in parts:
            scale = model.get_parameter(part.parameter).detach().double().abs().cpu().numpy()
            share = scale[part.indices].sum(axis=1) / max(scale.sum(), 1e-30)
            scores[group.name] += share
    return scores


def random(analysis: Analysis, seed: int) -> dict[str, Values]:
    """Uniform in [0, 2 / channels), so that a group's scores add up to about one."""
    generator = np.random.default_rng(seed)
    return {
        group.name: generator.random(group.channels) * 2 / group.channels
        for group in analysis.groups
    }


def _filters(parameters: dict[str, nn.Parameter], group: Group) -> Iterator[tuple[Tensor, float]]:
    """Of each layer that writes the group: float64 [channels, entries], and the layer's energy.

    A filter is all weights that go with a channel because the layer writes it; those of a grouped
    layer also read.
    """
    for producer in group.producers:
        own = [
            (part, parameters[part.parameter].detach().double().cpu())
            for part in group.parameters
            if part.parameter.rpartition(".")[0] == producer.module and part.parameter in parameters
        ]
        own = [(part, weight) for part, weight in own if weight.dim() > 1]
        written = [(part, weight) for part, weight in own if not part.reads] or own
        filters = [
            weight.movedim(part.dim, 0)[torch.from_numpy(part.indices)].flatten(1)
            for part, weight in written
        ]
        if filters:
            energy = sum(float(weight.square().sum()) for _, weight in written)
            yield torch.cat(filters, dim=1), energy
