"""How much each channel matters: DRP and its rivals behind one function.

A score is the share of what its consumers read that would be lost with the channel, summed over
the consumers, so that scores of different layers can be compared.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from greenprune.errors import PruningError
from greenprune.pruning.cost import TRANSPOSED, evaluating
from greenprune.pruning.graph import Analysis, Group

Scores = dict[str, NDArray[np.float64]]
"""Group name to one score for each of its channels, float64 [channels]."""


def score(
    model: nn.Module,
    analysis: Analysis,
    images: Tensor,
    *,
    method: str = "drp",
    seed: int = 0,
    batch_size: int = 64,
) -> Scores:
    """Score every prunable channel of ``model``.

    Args:
        model: the network that ``analysis`` was made of.
        analysis: its groups.
        images: normalised inputs, float32 [N, C, H, W]; read by ``drp`` alone.
        method: ``drp``, ``magnitude`` or ``random``.
        seed: of ``random``.
        batch_size: images in one forward pass.

    Raises:
        PruningError: an unknown method, or a score that is not finite.
    """
    methods: dict[str, Callable[[], Scores]] = {
        "drp": lambda: _drp(model, analysis, images, batch_size),
        "magnitude": lambda: _magnitude(model, analysis),
        "random": lambda: _random(analysis, seed),
    }
    if method not in methods:
        raise PruningError(f"pruning method '{method}' is unknown; known: {', '.join(methods)}")
    scores = methods[method]()
    for name, values in scores.items():
        if not np.isfinite(values).all():
            raise PruningError(
                f"the {method} scores of group '{name}' are not finite; "
                "expected a trained network and normalised images"
            )
    return scores


def _drp(model: nn.Module, analysis: Analysis, images: Tensor, batch_size: int) -> Scores:
    """DRP, our reading: dispersion of a channel's map times the norm of the weights that read it.

    The map is taken as its consumer reads it, after BatchNorm, activation and pooling.
    """
    spread = _dispersion(model, _consumer_names(analysis), images, batch_size)
    modules = dict(model.named_modules())

    def weight(group: Group) -> NDArray[np.float64]:
        total = np.zeros(group.channels)
        for consumer in group.consumers:
            signal = spread[consumer.module] * _input_norms(modules[consumer.module])
            energy = signal**2
            total += energy[consumer.indices].sum(axis=1) / max(energy.sum(), 1e-30)
        return total

    return {group.name: weight(group) for group in analysis.groups}


def _consumer_names(analysis: Analysis) -> list[str]:
    names = (consumer.module for group in analysis.groups for consumer in group.consumers)
    return list(dict.fromkeys(names))


@torch.no_grad()
def _dispersion(
    model: nn.Module, names: list[str], images: Tensor, batch_size: int
) -> dict[str, NDArray[np.float64]]:
    """Standard deviation of each input channel's map for the modules called ``names``.

    Within the map, averaged over images; where a consumer reads single values (a linear layer, a
    1x1 map), over images. One sweep with all hooks. Returns float64 [input channels] for each.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    within_map: dict[str, bool] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            maps = arguments[0].detach()
            if isinstance(module, nn.Linear):
                maps = maps.movedim(-1, 1)  # it reads its channels last
            maps = maps.flatten(2) if maps.dim() > 2 else maps
            within_map[name] = maps.dim() == 3 and maps.shape[2] > 1
            seen[name].append(
                maps.std(dim=2, correction=0) if within_map[name] else maps.flatten(1)
            )

        return record

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(hook(name)) for name in names]
    try:
        with evaluating(model):
            for batch in images.split(batch_size):
                model(batch)
    finally:
        for handle in handles:
            handle.remove()

    spread = {}
    for name in names:
        values = torch.cat(seen[name]).double()
        over_images = values.mean(dim=0) if within_map[name] else values.std(dim=0, correction=0)
        spread[name] = over_images.cpu().numpy()
    return spread


def _input_norms(module: nn.Module) -> NDArray[np.float64]:
    """L2 norm of the weights that read each input channel, float64 [input channels]."""
    weight = module.get_parameter("weight").detach().double()
    if isinstance(module, nn.Linear):
        norms = weight.norm(dim=0)
    elif isinstance(module, nn.Conv2d):
        by_group = weight.reshape(module.groups, -1, *weight.shape[1:])
        norms = by_group.flatten(3).norm(dim=(1, 3)).flatten()
    else:
        raise PruningError(
            f"no score is defined for channels read by {type(module).__name__}; "
            "expected a convolution or a linear layer"
        )
    return np.asarray(norms.cpu().numpy(), dtype=np.float64)


def _magnitude(model: nn.Module, analysis: Analysis) -> Scores:
    """L2 norm of each filter, as a share of its layer's, summed over the layers that produce it."""
    modules = dict(model.named_modules())
    scores = {}
    for group in analysis.groups:
        total = np.zeros(group.channels)
        for producer in group.producers:
            module = modules[producer.module]
            weight = module.get_parameter("weight").detach().double()
            if isinstance(module, TRANSPOSED) and module.groups == 1:
                weight = weight.transpose(0, 1)  # [in, out, ...]
            energy = weight.flatten(1).square().sum(dim=1).cpu().numpy()
            total += energy[producer.indices].sum(axis=1) / max(energy.sum(), 1e-30)
        scores[group.name] = total
    return scores


def _random(analysis: Analysis, seed: int) -> Scores:
    generator = np.random.default_rng(seed)
    return {group.name: generator.random(group.channels) for group in analysis.groups}
