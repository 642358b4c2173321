"""Criteria that look at what layers read, batch by batch, with all hooks in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from greenprune.errors import PruningError
from greenprune.pruning.cost import CONVOLUTIONS, RECURRENT, evaluating
from greenprune.pruning.graph import Analysis, Group
from greenprune.pruning.ranks import matrix_ranks

Values = NDArray[np.float64]
Loss = Callable[[Tensor, Tensor], Tensor]


class Criterion(Protocol):
    """Looks at one batch after the other, and can be asked at any time."""

    def add(self, images: Tensor, targets: Tensor | None) -> None: ...

    def scores(self) -> dict[str, Values]: ...


class Read:
    """DRP, our reading: how discrete what a consumer reads is, times the weights that read it.

    A score is the share of what its consumers read that would be lost with the channel: for each
    consumer ``(d_c ||W_c||)^2 / sum_j (d_j ||W_j||)^2`` over its input channels j, summed over the
    consumers, so that scores of different layers can be compared. Maps are taken as they are read:
    after BatchNorm, activation and pooling. d is the dispersion of the map or its matrix rank.

    Where an addition or a product joins what several layers write, it reads the channel as well,
    and counts as one more consumer of the average share: without this a residual stream, whose
    channels also go straight through, would be cut before the branches.
    """

    def __init__(
        self, model: nn.Module, analysis: Analysis, statistic: Callable[[], Dispersion | Rank]
    ) -> None:
        self.model = model
        self.groups = analysis.groups
        self.norms = _consumer_norms(model, analysis)
        self.seen = {name: statistic() for name in self.norms}

    @torch.no_grad()
    def add(self, images: Tensor, targets: Tensor | None) -> None:
        with reading(self.model, self.seen, lambda name, maps: self.seen[name].add(maps)):
            self.model(images)

    def scores(self) -> dict[str, Values]:
        energies = {
            name: (self.seen[name].mean() * norms) ** 2
            for name, norms in self.norms.items()
            if self.seen[name].count  # else it is called in training alone
        }
        scores = {}
        for group in self.groups:
            scores[group.name] = np.zeros(group.channels)
            for consumer in (part for part in group.consumers if part.module in energies):
                energy = energies[consumer.module]
                share = energy[consumer.indices].sum(axis=1) / max(energy.sum(), 1e-30)
                scores[group.name] += share
            scores[group.name] *= 1 + _joins(group) / max(1, len(group.consumers))
        return scores


def _joins(group: Group) -> int:
    """How many operations join what several layers write (a depthwise layer passes on)."""
    passing = {consumer.module for consumer in group.consumers}
    return max(0, len([p for p in group.producers if p.module not in passing]) - 1)


class Dispersion:
    """Standard deviation of each channel's map.

    Within the map, averaged over images; where the maps are single values, over images.
    """

    def __init__(self) -> None:
        self.count = 0
        self.average: Any = 0.0
        self.squares: Any = 0.0
        self.within = False

    def add(self, maps: Tensor) -> None:
        """``maps`` is [N, channels, ...]."""
        self.within = maps.dim() > 2 and maps[0, 0].numel() > 1
        values = maps.flatten(2).std(dim=2, correction=0) if self.within else maps.flatten(1)
        values = values.double()
        average = values.mean(dim=0)
        # Chan's update: exact for constants, however large
        shift, count = average - self.average, self.count + len(values)
        self.squares = (
            self.squares
            + (values - average).square().sum(dim=0)
            + shift**2 * self.count * len(values) / count
        )
        self.average = self.average + shift * len(values) / count
        self.count = count

    def mean(self) -> Values:
        """float64 [channels]."""
        found = self.average if self.within else (self.squares / self.count).sqrt()
        return np.asarray(found.cpu().numpy(), dtype=np.float64)


class Rank:
    """Mean integer rank of each channel's map over images.

    Maps of three dimensions are unfolded along the last one; a sequence or a single value has rank
    one where it is not zero.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total: Any = 0

    def add(self, maps: Tensor) -> None:
        """``maps`` is [N, channels, ...]."""
        width = maps.shape[-1] if maps.dim() > 2 else 1
        ranks = matrix_ranks(maps.reshape(*maps.shape[:2], -1, width))
        self.total = self.total + ranks.sum(dim=0)
        self.count += len(maps)

    def mean(self) -> Values:
        """float64 [channels]."""
        return np.asarray((self.total.double() / self.count).cpu().numpy(), dtype=np.float64)


class Taylor:
    """First-order change of the loss without the channel (Molchanov et al., ICLR 2017, eq. 8).

    The mean over images of ``|sum x dL/dx|``, over all values x of the channel as its consumers
    read them. The square in its place (CVPR 2019) is ruled by a few images of large loss.
    """

    def __init__(self, model: nn.Module, analysis: Analysis, loss: Loss) -> None:
        self.model = model
        self.groups = analysis.groups
        self.names = _consumer_names(analysis)
        self.loss = loss
        self.count = 0
        self.total = {group.name: np.zeros(group.channels) for group in analysis.groups}

    def add(self, images: Tensor, targets: Tensor | None) -> None:
        read: dict[str, Tensor] = {}
        with torch.enable_grad(), hooked(self.model, self.names, read.__setitem__):
            outputs = self.model(images.clone().requires_grad_())
            value = self.loss(outputs, targets) * len(images)  # type: ignore[arg-type]
        gradients = (
            torch.autograd.grad(
                value, list(read.values()), allow_unused=True, materialize_grads=True
            )
            if read
            else ()
        )
        change = {}
        for (name, maps), gradient in zip(read.items(), gradients, strict=True):
            module = self.model.get_submodule(name)
            slopes = channels_second(module, maps.detach() * gradient).double()
            change[name] = slopes.reshape(*slopes.shape[:2], -1).sum(dim=2).cpu().numpy()
        for group in self.groups:
            total = np.zeros((len(images), group.channels))
            for consumer in (part for part in group.consumers if part.module in change):
                total += change[consumer.module][:, consumer.indices].sum(axis=2)
            self.total[group.name] += np.abs(total).sum(axis=0)
        self.count += len(images)

    def scores(self) -> dict[str, Values]:
        return {name: total / self.count for name, total in self.total.items()}


# What consumers read


def _consumer_names(analysis: Analysis) -> list[str]:
    names = (consumer.module for group in analysis.groups for consumer in group.consumers)
    return list(dict.fromkeys(names))


@contextmanager
def hooked(
    model: nn.Module, names: Iterable[str], look: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Inside, ``look(name, tensor)`` is called with what each of the modules reads, as it reads
    it; the network is in eval mode."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, given: look(name, given[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        with evaluating(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def reading(
    model: nn.Module, names: Iterable[str], look: Callable[[str, Tensor], None]
) -> AbstractContextManager[None]:
    """:func:`hooked`, with the channels second in what ``look`` is shown."""

    def seconded(name: str, maps: Tensor) -> None:
        look(name, channels_second(model.get_submodule(name), maps))

    return hooked(model, names, seconded)


def channels_second(module: nn.Module, maps: Tensor) -> Tensor:
    """What ``module`` reads or writes as [N, channels, ...]."""
    if isinstance(module, RECURRENT):
        return maps.movedim(-1, 1) if module.batch_first else maps.permute(1, 2, 0)
    return maps.movedim(-1, 1) if isinstance(module, nn.Linear) else maps


def _consumer_norms(model: nn.Module, analysis: Analysis) -> dict[str, Values]:
    """For each consumer the L2 norm of the weights that read each of its inputs, float64 [inputs].

    Whatever the layer is: the analysis says which parameters read the group's channels.
    """
    reading: dict[str, dict[tuple[str, int], None]] = {
        name: {} for name in _consumer_names(analysis)
    }
    for group in analysis.groups:
        for consumer in group.consumers:
            for part in group.parameters:
                if (
                    part.reads
                    and part.parameter.rpartition(".")[0] == consumer.module
                    and np.array_equal(part.indices, consumer.indices)
                    and "weight_hh" not in part.parameter  # reads a layer's own state
                ):
                    reading[consumer.module][part.parameter, part.dim] = None
    norms = {}
    for name, parts in reading.items():
        module = model.get_submodule(name)
        if isinstance(module, CONVOLUTIONS) and module.groups > 1:
            weight = module.weight.detach().double()
            by_group = weight.reshape(module.groups, -1, *weight.shape[1:])
            energy = by_group.flatten(3).square().sum(dim=(1, 3)).flatten()
        elif parts:
            reads = torch.cat(
                [
                    model.get_parameter(parameter).detach().double().movedim(dim, 0).flatten(1)
                    for parameter, dim in sorted(parts)
                ],
                dim=1,
            )
            energy = reads.square().sum(dim=1)
        else:
            raise PruningError(
                f"no score is defined for channels read by '{name}' ({type(module).__name__}), "
                "whose weights do not read them one by one; use 'magnitude'"
            )
        norms[name] = np.asarray(energy.sqrt().cpu().numpy(), dtype=np.float64)
    return norms
