"""Which channels of a network can only be removed together, and what removing them saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from greenprune.errors import PruningError
from greenprune.pruning.atoms import Atoms, Axis, Ledger
from greenprune.pruning.cost import ATTENTION, RECURRENT, TRANSPOSED, Cost, per_layer
from greenprune.pruning.walk import Walk, trace

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Where a group's channels are in what a layer writes or reads.

    ``indices`` is int64 [channels, k]: row i holds the indices of channel i, ascending; k > 1
    where, say, a flatten spreads one channel over several inputs of a linear layer.
    """

    module: str
    indices: Indices


@dataclass(frozen=True, kw_only=True)
class ParameterSlice:
    """Which entries of a parameter or buffer belong to a group; ``indices`` as in :class:`Slice`.

    ``reads``: the entries weigh the channels' values, so that zeroing them masks the channels.
    """

    parameter: str
    dim: int
    indices: Indices
    reads: bool


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number that shrinks with a group: a module's attribute, or an int in the traced code.

    ``per_channel`` is int64 [channels]: how much each channel counts for in it.
    """

    constant: bool
    """Written in the code of graph node ``owner`` at path ``place``; else an attribute ``place``
    of the module ``owner``."""
    owner: str
    place: Any
    per_channel: Indices


@dataclass(frozen=True, kw_only=True)
class Group:
    """Channels of one structure; each of them can be removed by itself.

    Channel i is everything that goes with it: row i of every index array. ``name`` is the first
    layer, in the order of execution, that writes these channels; a further group that starts at
    the same layer has ``#2`` behind the name, and so on.
    """

    name: str
    channels: int
    producers: tuple[Slice, ...]
    consumers: tuple[Slice, ...]
    parameters: tuple[ParameterSlice, ...]
    numbers: tuple[Number, ...]


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A layer of which some channels, or all, must stay."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """A layer that costs MACs; they are proportional to its output and to its input width.

    ``out_groups`` and ``in_groups`` say how many of a layer's outputs and inputs one channel of a
    group takes. Widths are those of the weight: a grouped convolution's ``in_width`` is the inputs
    of one group, which surgery leaves alone.
    """

    module: str
    macs: int
    """For one sample."""
    out_width: int
    in_width: int
    out_groups: dict[str, int]
    in_groups: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What :func:`analyse` found."""

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    layers: tuple[LayerCost, ...]
    shapes: dict[str, tuple[int, ...]]
    """Of all parameters, by full name."""
    same_in_training: bool
    """Training runs the same code."""

    def without(self, refused: Mapping[str, str]) -> Analysis:
        """These groups frozen, each for the reason given."""
        gone = [group for group in self.groups if group.name in refused]
        return replace(
            self,
            groups=tuple(group for group in self.groups if group not in gone),
            frozen=self.frozen
            + tuple(
                Frozen(name=part.module, reason=refused[group.name])
                for group in gone
                for part in group.producers
            ),
            layers=tuple(
                replace(
                    layer,
                    out_groups={k: v for k, v in layer.out_groups.items() if k not in refused},
                    in_groups={k: v for k, v in layer.in_groups.items() if k not in refused},
                )
                for layer in self.layers
            ),
        )

    def predict_cost(self, removed_counts: Mapping[str, int]) -> Cost:
        """Cost after removing so many channels of each group (groups left out lose none).

        Raises:
            PruningError: an unknown group, or a count below 0 or above the group's width.
        """
        places = {group.name: place for place, group in enumerate(self.groups)}
        removed = np.zeros(len(self.groups), dtype=np.int64)
        for name, count in removed_counts.items():
            if name not in places:
                raise unknown_group(self, name)
            width = self.groups[places[name]].channels
            if not 0 <= count <= width:
                raise PruningError(
                    f"group '{name}': expected 0 to {width} channels to remove, got {count}"
                )
            removed[places[name]] = count
        macs, params = self.predict_costs(removed[np.newaxis])
        return Cost(macs=int(macs[0]), params=int(params[0]))

    def predict_costs(self, removed: Indices) -> tuple[Indices, Indices]:
        """Costs of many choices at once.

        Args:
            removed: int64 [choices, groups], how many channels each group loses, in the order of
                ``groups``.

        Returns:
            MACs and parameters, int64 [choices] each.
        """
        table = self.cost_table
        gone = np.tensordot(table.per_channel, removed.T.astype(float), axes=1)
        sizes = (table.sizes[:, :, np.newaxis] - gone).prod(axis=1)
        macs = table.macs @ sizes + table.fixed_macs
        return macs.astype(np.int64), (table.params @ sizes).astype(np.int64)

    @cached_property
    def cost_table(self) -> CostTable:
        """What :meth:`predict_costs` counts by."""
        return _cost_table(self)


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """Every parameter as (size of dimension 0) x (size of dimension 1) x a constant.

    Whole numbers, in float64 for BLAS: below 2**53 they stay exact.
    """

    sizes: NDArray[np.float64]
    """float64 [parameters, 2]"""
    per_channel: NDArray[np.float64]
    """float64 [parameters, 2, groups]: what each removed channel takes off the sizes."""
    params: NDArray[np.float64]
    """float64 [parameters]: entries for each pair of indices of the two dimensions."""
    macs: NDArray[np.float64]
    """float64 [parameters]: MACs likewise."""
    fixed_macs: int


def _cost_table(analysis: Analysis) -> CostTable:
    rows = {name: row for row, name in enumerate(analysis.shapes)}
    sizes = np.ones((len(rows), 2))
    params = np.empty(len(rows))
    for name, row in rows.items():
        shape = analysis.shapes[name]
        sizes[row, : len(shape[:2])] = shape[:2]
        params[row] = int(np.prod(shape[2:], dtype=np.int64))
    per_channel = np.zeros((len(rows), 2, len(analysis.groups)))
    for column, group in enumerate(analysis.groups):
        for part in group.parameters:
            if part.parameter in rows:
                per_channel[rows[part.parameter], part.dim, column] = part.indices.shape[1]
    macs = np.zeros(len(rows))
    fixed_macs = 0
    for layer in analysis.layers:
        weights = [name for name in rows if _is_weight(name, layer.module)]
        if not weights:  # computed from other parameters
            fixed_macs += layer.macs
            continue
        entries = sum(prod(analysis.shapes[name]) for name in weights)
        for name in weights:
            macs[rows[name]] = layer.macs // entries * params[rows[name]]
    return CostTable(
        sizes=sizes, per_channel=per_channel, params=params, macs=macs, fixed_macs=fixed_macs
    )


def _is_weight(parameter: str, module: str) -> bool:
    """Whether the MACs of ``module`` are those of this parameter; recurrent layers have several."""
    owner, _, name = parameter.rpartition(".")
    recurrent = name.startswith(("weight_ih_l", "weight_hh_l", "weight_hr_l"))
    return owner == module and (name == "weight" or recurrent)


def unknown_group(analysis: Analysis, name: str) -> PruningError:
    """The error for a group's name that the analysis does not have."""
    known = ", ".join(group.name for group in analysis.groups) or "none"
    return PruningError(f"group '{name}' is unknown; the groups of this network are: {known}")


def analyse(model: nn.Module, example_input: Tensor) -> Analysis:
    """Find the groups of channels of ``model`` that can be pruned.

    The network is traced with torch.fx, in eval and in training mode, and run on two copies of
    the first sample; it is left as it was.

    Args:
        model: a network with one tensor input, batch first.
        example_input: [N, ...], N >= 1, as the network takes it.

    Raises:
        PruningError: the network cannot be traced, or fails on ``example_input``.
    """
    example = example_input[:1].expand(2, *example_input.shape[1:]).clone()
    evaluated, graph = trace(model, training=False)
    _, training_graph = trace(model, training=True)
    same = str(graph) == str(training_graph)
    ledger = Ledger(constants_editable=same)
    unfollowed: list[tuple[str, str]] = []
    for each in [graph] if same else [graph, training_graph]:
        walk = Walk(evaluated, each, ledger)
        try:
            with torch.no_grad():
                walk.run(example)
        except Exception as error:
            raise PruningError(
                f"the network fails on an input of shape {list(example.shape)}: {error}; "
                "expected an example_input that it takes, in batches of any size"
            ) from error
        unfollowed += walk.unfollowed
    groups, frozen = _groups(ledger)
    frozen += [Frozen(name=name, reason=reason) for name, reason in unfollowed]
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return Analysis(
        groups=groups,
        frozen=tuple(sorted(dict.fromkeys(frozen), key=lambda item: order[item.name])),
        layers=_layers(evaluated, per_layer(evaluated, example), groups),
        shapes={name: tuple(value.shape) for name, value in evaluated.named_parameters()},
        same_in_training=same,
    )


_ALONE = "its channels could only go all at once"


def _groups(ledger: Ledger) -> tuple[tuple[Group, ...], list[Frozen]]:
    """Components of tied atoms, put into groups by what they are members of."""
    component = ledger.components()
    axes = [axis for axis in ledger.axes.values() if len(axis.atoms)]
    written = [axis for axis in axes if axis.kind == "output"]
    count = int(component.max(initial=-1)) + 1

    reason = np.full(count, -1)  # the first one given
    for number, (atoms, _) in reversed(list(enumerate(ledger.frozen))):
        reason[component[atoms]] = number
    frozen = [
        Frozen(name=axis.owner, reason=ledger.frozen[number][1])
        for axis in written
        for number in dict.fromkeys(reason[component[axis.atoms]].tolist())
        if number >= 0
    ]

    # The first layer that writes a component, and its first index there, order everything.
    layer, index = np.full(count, -1), np.full(count, -1)
    for number, axis in reversed(list(enumerate(written))):
        members = component[axis.atoms]
        layer[members] = number
        index[members[::-1]] = np.arange(len(members))[::-1]
    ordered = np.lexsort((index, layer))
    ordered = ordered[(layer[ordered] >= 0) & (reason[ordered] < 0)]

    families = _families(component, count, axes)[ordered]
    _, first, family = np.unique(families, return_index=True, return_inverse=True)
    groups: list[Group] = []
    names: dict[str, int] = {}
    row = np.full(count, -1)
    for wanted in np.argsort(first):
        members = ordered[family == wanted]
        if len(members) == 1:
            frozen += [
                Frozen(name=axis.owner, reason=_ALONE)
                for axis in written
                if members[0] in component[axis.atoms]
            ]
            continue
        name = written[layer[members[0]]].owner
        names[name] = names.get(name, 0) + 1
        unique = name if names[name] == 1 else f"{name}#{names[name]}"
        row[members] = np.arange(len(members))
        groups.append(_group(unique, len(members), axes, component, row))
        row[members] = -1
    return tuple(groups), frozen


def _families(component: Atoms, count: int, axes: list[Axis]) -> Atoms:
    """A label for each component: equal where they are in the same axes equally often.

    Numbers in the code are left out: the two sides of a padding differ in nothing else.
    """
    label = np.zeros(count, dtype=np.int64)
    labels = 1
    for axis in axes:
        if axis.kind != "constant":
            members, times = np.unique(component[axis.atoms], return_counts=True)
            pairs = label[members] * (times.max() + 1) + times
            _, refined = np.unique(pairs, return_inverse=True)
            label[members] = labels + refined
            labels += len(members)
    return label


def _group(name: str, channels: int, axes: list[Axis], component: Atoms, row: Atoms) -> Group:
    """The group of the components whose ``row`` is not negative."""
    producers, consumers, parameters, numbers = [], [], [], []
    for axis, places, rows in _members(axes, component, row):
        if axis.kind in ("attribute", "constant"):
            numbers.append(
                Number(
                    constant=axis.kind == "constant",
                    owner=axis.owner,
                    place=axis.place,
                    per_channel=np.bincount(rows, minlength=channels),
                )
            )
            continue
        indices = places[np.argsort(rows, kind="stable")].reshape(channels, -1)
        if axis.kind == "output":
            producers.append(Slice(module=axis.owner, indices=indices))
        elif axis.kind == "input":
            consumers.append(Slice(module=axis.owner, indices=indices))
        else:
            parameters.append(
                ParameterSlice(
                    parameter=axis.owner, dim=axis.place, indices=indices, reads=axis.reads
                )
            )
    return Group(
        name=name,
        channels=channels,
        producers=tuple(producers),
        consumers=tuple(consumers),
        parameters=tuple(parameters),
        numbers=tuple(numbers),
    )


def _members(
    axes: list[Axis], component: Atoms, row: Atoms
) -> Iterator[tuple[Axis, Indices, Indices]]:
    """The axes that hold the group's channels: at which places, and which channel each is."""
    for axis in axes:
        rows = row[component[axis.atoms]]
        places = np.flatnonzero(rows >= 0)
        if len(places):
            yield axis, places, rows[places]


def _layers(
    model: nn.Module, macs: Mapping[str, int], groups: tuple[Group, ...]
) -> tuple[LayerCost, ...]:
    taken: dict[tuple[str, int], dict[str, int]] = {}
    for group in groups:
        for part in group.parameters:
            per_channel = part.indices.shape[1]
            taken.setdefault((part.parameter, part.dim), {})[group.name] = per_channel
    layers = []
    for name, total in macs.items():
        module = model.get_submodule(name)
        if isinstance(module, RECURRENT):
            written, read = (f"{name}.weight_hh_l0", 1), (f"{name}.weight_ih_l0", 1)
            out_width, in_width = module.hidden_size, module.input_size
        elif isinstance(module, ATTENTION):  # stays whole
            written = read = ("", 0)
            out_width = in_width = module.embed_dim
        else:
            out_dim, in_dim = (1, 0) if isinstance(module, TRANSPOSED) else (0, 1)
            shape = getattr(module, "weight").shape  # noqa: B009 (may be computed: no Parameter)
            out_width, in_width = shape[out_dim], shape[in_dim]
            written, read = (f"{name}.weight", out_dim), (f"{name}.weight", in_dim)
        layers.append(
            LayerCost(
                module=name,
                macs=total,
                out_width=out_width,
                in_width=in_width,
                out_groups=taken.get(written, {}),
                in_groups=taken.get(read, {}),
            )
        )
    return tuple(layers)
