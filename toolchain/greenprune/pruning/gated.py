"""A network with binary gates on its channels and residual blocks, for training only.

A channel gate multiplies the channel wherever a layer reads it, after BatchNorm and activation. A
gate that is shut is thus the mask of :func:`greenprune.pruning.surgery.masked`, exactly. A block
gate multiplies what the block's branch adds; shut, the block is as good as removed.

Gates are hooks that exist while :class:`Gated` runs; the network itself is never changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenprune.pruning.blocks import Block
from greenprune.pruning.cost import RECURRENT, evaluating
from greenprune.pruning.graph import Analysis, Group

SPEED = 5.0
"""Logits are this many times a linear layer: under SGD they move its square times as fast as the
layer's own outputs would, which a sigmoid needs and weights would not bear."""
OPEN = 2.0
"""Logit that a gate starts from: open at 0.88."""
SPREAD = 1.0
"""Standard deviation over inputs of a gate's first logits."""
PROBE = 3
"""Samples in the batch that shows the layers' inputs: no usual number of steps or channels."""


class Gate(nn.Module):
    """The light gating module: pooled features, standardised, through a linear layer and a sigmoid.

    It looks at features without shaping them: no gradient flows back into the network from here.
    """

    def __init__(self, features: int, gates: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, gates)
        nn.init.normal_(self.linear.weight, std=SPREAD / SPEED / math.sqrt(features))
        nn.init.constant_(self.linear.bias, OPEN / SPEED)

    def forward(self, pooled: Tensor) -> Tensor:
        """From [N, features] to probabilities of being open, [N, gates]."""
        weight = self.linear.weight
        features = F.layer_norm(pooled.detach().to(weight.dtype), pooled.shape[1:])
        return torch.sigmoid(SPEED * self.linear(features).to(weight.dtype))


def binary(probability: Tensor) -> Tensor:
    """1.0 from 0.5 on, else 0.0, exactly; the gradient is the probability's (straight-through)."""
    return probability + ((probability >= 0.5).to(probability.dtype) - probability).detach()


class Gated(nn.Module):
    """``network`` behind gates that depend on the input.

    All gates stand in one row: the channels of ``groups``, group by group, then the ``blocks``.

    Args:
        network: trained in place.
        analysis: of the network.
        blocks: those that may get a gate, as :func:`~greenprune.pruning.blocks.removable_blocks`
            finds them; a block of which a function, no module, makes the branch is passed over.
        example_input: [N, ...], N >= 1.
    """

    def __init__(
        self,
        network: nn.Module,
        analysis: Analysis,
        blocks: Mapping[str, Block],
        example_input: Tensor,
    ) -> None:
        super().__init__()
        self.network = network
        shapes = _shapes_read(network, analysis, blocks, example_input)
        self.ungated = _ungated(network, analysis, shapes)
        """Groups without gates, and why."""
        self.groups = tuple(g for g in analysis.groups if g.name not in self.ungated)
        self.blocks = {
            name: block
            for name, block in blocks.items()
            if all(block.branches) and shapes[name][:1] == (PROBE,)
        }
        self.gates = nn.ModuleList(
            [Gate(group.channels, group.channels) for group in self.groups]
            + [Gate(shapes[name][1], 1) for name in self.blocks]
        )
        self.sizes = [group.channels for group in self.groups] + [1] * len(self.blocks)
        self.readers = _readers(network, self.groups)
        self.positions = nn.ModuleList(self.readers)
        self.macs = Macs(analysis, self.groups, list(self.blocks))
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.fixed: Tensor | None = None
        """Where set, bool [gates]: the gates are these, whatever the input."""
        self.found: dict[int, Tensor] = {}
        """Probabilities [N, gates] of the last batch, by the number of the gating module."""

    def forward(self, inputs: Tensor) -> Tensor:
        """The network's outputs; ``step`` counts the batches seen in training."""
        if self.training:
            self.step += 1
        self.found = {}
        with self._hooked():
            outputs: Tensor = self.network(inputs)
        return outputs

    def probabilities(self) -> Tensor:
        """Of the last batch, [N, gates]."""
        return torch.cat([self.found[number] for number in range(len(self.gates))], dim=1)

    def means(self) -> Tensor:
        """Of the last batch's binary gates, [gates]."""
        return binary(self.probabilities()).mean(dim=0)

    def share(self, gates: Tensor) -> Tensor:
        """Share of the MACs that stay with these gates, float64 [...].

        Args:
            gates: [..., gates] from 0 to 1; between these, the expectation for gates that are open
                with these probabilities independently of each other.
        """
        parts = gates.double().split(self.sizes, dim=-1)
        removed = [(1 - part).sum(dim=-1) for part in parts[: len(self.groups)]]
        blocks = [part.squeeze(-1) for part in parts[len(self.groups) :]]
        answer: Tensor = self.macs(removed, blocks)
        return answer

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        handles = []
        for reader in self.readers:
            module = self.network.get_submodule(reader.name)
            handles.append(module.register_forward_pre_hook(self._reading(reader)))
        for number, (name, block) in enumerate(self.blocks.items(), start=len(self.groups)):
            handles.append(
                self.network.get_submodule(name).register_forward_pre_hook(self._entering(number))
            )
            for branch in block.branches:
                module = self.network.get_submodule(branch)
                handles.append(module.register_forward_hook(self._adding(number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _reading(self, reader: Reader) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def gate(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            pooled = None
            gates = []
            for number, indices in reader.parts():
                if self.fixed is None and number not in self.found:
                    pooled = reader.pooled(given[0].detach()) if pooled is None else pooled
                    features = pooled[:, indices].mean(dim=-1)
                    self.found[number] = self.gates[number](features)
                gates.append(self._binary(number))
            return (reader.multiply(given[0], torch.cat(gates, dim=-1)), *given[1:])

        return gate

    def _entering(self, number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(module: nn.Module, given: tuple[Any, ...]) -> None:
            if self.fixed is None:
                self.found[number] = self.gates[number](_pooled(given[0].detach()))

        return look

    def _adding(self, number: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def gate(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
            gates = self._binary(number).to(output.dtype)
            return output * gates.reshape(-1, *[1] * (output.dim() - 1))

        return gate

    def _binary(self, number: int) -> Tensor:
        """[N, gates of the module], or [1, gates] where they are fixed."""
        if self.fixed is None:
            return binary(self.found[number])
        fixed: Tensor = self.fixed.split(self.sizes)[number].unsqueeze(0)
        return fixed.double()


class Reader(nn.Module):
    """A layer that reads gated channels: which of its inputs are which gates.

    ``numbers`` are the gating modules, in the order in which ``multiply`` takes their gates.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.last = isinstance(module, (nn.Linear, *RECURRENT))  # channels come last
        self.batch_dim = _batch_dim(module)
        self.numbers: list[int] = []
        self.position: Tensor
        self.register_buffer(
            "position", torch.zeros(_inputs(module), dtype=torch.int64), persistent=False
        )
        self.columns = 1  # the first column is always one: inputs that no gate is for

    def add(self, number: int, indices: Tensor) -> None:
        """``indices`` int64 [channels, k]: the inputs of each channel."""
        self.register_buffer(f"indices{len(self.numbers)}", indices, persistent=False)
        self.numbers.append(number)
        columns = torch.arange(self.columns, self.columns + len(indices))
        self.position[indices] = columns.unsqueeze(1).expand_as(indices)
        self.columns += len(indices)

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """The gating modules' numbers, and the inputs that are theirs."""
        for place, number in enumerate(self.numbers):
            yield number, self.get_buffer(f"indices{place}")

    def pooled(self, maps: Tensor) -> Tensor:
        """Mean of each input over positions, [N, inputs]."""
        if self.batch_dim == 1:
            maps = maps.transpose(0, 1)
        return _pooled(maps.movedim(-1, 1) if self.last else maps)

    def multiply(self, maps: Tensor, gates: Tensor) -> Tensor:
        """``maps``, as the layer reads them, times ``gates`` [N, gates]."""
        one = gates.new_ones(len(gates), 1)
        mask = torch.cat([one, gates], dim=1)[:, self.position].to(maps.dtype)
        if self.last:
            mask = mask.reshape(len(mask), *[1] * (maps.dim() - 2), -1)
            return maps * (mask.transpose(0, 1) if self.batch_dim == 1 else mask)
        return maps * mask.reshape(*mask.shape, *[1] * (maps.dim() - 2))


class Macs(nn.Module):
    """The network's MACs as a differentiable function of widths and blocks.

    A layer's MACs are proportional to its output and to its input width (the analysis' cost
    table), and to the gate of the block it is in.
    """

    def __init__(self, analysis: Analysis, groups: Sequence[Group], blocks: Sequence[str]) -> None:
        super().__init__()
        table = analysis.cost_table
        rows = np.flatnonzero(table.macs)
        names = [list(analysis.shapes)[row] for row in rows]
        columns = [analysis.groups.index(group) for group in groups]
        inside = [
            next((n for n, block in enumerate(blocks) if name.startswith(f"{block}.")), len(blocks))
            for name in names
        ]
        dense = int((table.macs * table.sizes.prod(axis=1)).sum()) + table.fixed_macs
        self.fixed_share = table.fixed_macs / dense
        self._keep("sizes", table.sizes[rows])
        self._keep("per_channel", table.per_channel[rows][:, :, columns])
        self._keep("weights", table.macs[rows] / dense)
        self.register_buffer("inside", torch.tensor(inside, dtype=torch.int64), persistent=False)

    def _keep(self, name: str, values: Any) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=torch.float64), persistent=False)

    def forward(self, removed: Sequence[Tensor], blocks: Sequence[Tensor]) -> Tensor:
        """Share of the MACs, from how many channels each group loses and how open blocks are."""
        like = [*removed, *blocks][0]
        gone = torch.stack(list(removed), dim=-1) if removed else like.new_zeros(*like.shape, 0)
        widths = self.get_buffer("sizes") - torch.einsum(
            "rdg,...g->...rd", self.get_buffer("per_channel"), gone
        )
        open_blocks = torch.stack([*blocks, torch.ones_like(like)], dim=-1)
        layers = widths.prod(dim=-1) * self.get_buffer("weights")
        layers = layers * open_blocks[..., self.get_buffer("inside")]
        return layers.sum(dim=-1) + self.fixed_share


def _pooled(maps: Tensor) -> Tensor:
    """[N, channels, ...] to the means over all positions, [N, channels]."""
    return maps.flatten(2).mean(dim=2) if maps.dim() > 2 else maps


def _batch_dim(module: nn.Module) -> int:
    return 1 if isinstance(module, RECURRENT) and not module.batch_first else 0


def _inputs(module: nn.Module) -> int:
    """How many inputs a layer reads."""
    sizes = (getattr(module, n, None) for n in ("in_channels", "in_features", "input_size"))
    return int(next(size for size in sizes if size is not None))


@torch.no_grad()
def _shapes_read(
    network: nn.Module, analysis: Analysis, blocks: Mapping[str, Block], example_input: Tensor
) -> dict[str, tuple[int, ...]]:
    """The shape of what each consumer and each block is given, in a batch of ``PROBE``."""
    consumers = [part.module for group in analysis.groups for part in group.consumers]
    shapes: dict[str, tuple[int, ...]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, given: tuple[Any, ...]) -> None:
            shapes[name] = tuple(given[0].shape) if given and isinstance(given[0], Tensor) else ()

        return note

    handles = [
        network.get_submodule(name).register_forward_pre_hook(hook(name))
        for name in dict.fromkeys([*consumers, *blocks])
    ]
    try:
        with evaluating(network):
            network(example_input[:1].expand(PROBE, *example_input.shape[1:]).clone())
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _ungated(
    network: nn.Module, analysis: Analysis, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Groups whose channels are not all read from a layer's input, where a gate could be."""
    reasons = {}
    for group in analysis.groups:
        consumers = {part.module for part in group.consumers}
        readers = {part.parameter.rpartition(".")[0] for part in group.parameters if part.reads}
        if not consumers:
            reasons[group.name] = "nothing reads its channels"
        elif not readers <= consumers:
            inner = ", ".join(sorted(readers - consumers))
            reasons[group.name] = f"'{inner}' reads its channels inside, where no gate can be"
        for name in consumers:
            shape, module = shapes.get(name, ()), network.get_submodule(name)
            if len(shape) < 2 or shape[_batch_dim(module)] != PROBE:
                reasons[group.name] = f"'{name}' does not read one row of channels an image"
    return reasons


def _readers(network: nn.Module, groups: Sequence[Group]) -> tuple[Reader, ...]:
    readers: dict[str, Reader] = {}
    for number, group in enumerate(groups):
        for part in group.consumers:
            name = part.module
            if name not in readers:
                readers[name] = Reader(name, network.get_submodule(name))
            readers[name].add(number, torch.from_numpy(part.indices))
    return tuple(readers.values())
