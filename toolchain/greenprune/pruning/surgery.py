"""Cutting channels out of a network, with the proof that nothing else changed."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from greenprune.errors import PruningError
from greenprune.pruning import proof
from greenprune.pruning.blocks import prove_blocks, removable_blocks, remove_block
from greenprune.pruning.graph import Analysis, Group, Number, analyse, unknown_group
from greenprune.pruning.walk import trace

__all__ = [
    "Explanation",
    "Removed",
    "add_bias",
    "analyse_and_try",
    "compact",
    "explain",
    "masked",
    "prove",
    "prove_blocks",
    "prune_channels",
    "removable_blocks",
    "remove_block",
]

Removed = Mapping[str, Sequence[int]]
"""Group name to the channels that go."""
_Cuts = list[tuple[Group, NDArray[np.int64]]]


def prune_channels(model: nn.Module, example_input: Tensor, removed: Removed) -> nn.Module:
    """Remove channels, and prove that the compact network equals the masked one.

    Args:
        model: a network with one tensor input, batch first; it is left as it is.
        example_input: [N, ...], N >= 1.
        removed: group name, as :func:`greenprune.pruning.graph.analyse` gives it, to the indices
            of its channels that go.

    Returns:
        A smaller copy, in the mode of ``model``. Its forward is the model's own, unless numbers
        written in it had to change: then it is a ``torch.fx.GraphModule``.

    Raises:
        PruningError: the network cannot be analysed; an unknown group; an index that is out of
            range or given twice; a group of which no channel would stay.
        ProofError: the compact network computes something else; the message says by how much.
    """
    analysis = analyse(model, example_input)
    prove(model, analysis, example_input, removed)
    return compact(model, analysis, removed)


def masked(model: nn.Module, analysis: Analysis, removed: Removed) -> nn.Module:
    """A copy of the same size in which every weight that reads a removed channel is zero.

    Raises:
        PruningError: as :func:`prune_channels`.
    """
    cuts = _checked(model, analysis, removed)
    result = copy.deepcopy(model)
    with torch.no_grad():
        for group, channels in cuts:
            for part in group.parameters:
                if part.reads:
                    tensor = result.get_parameter(part.parameter)
                    gone = torch.from_numpy(part.indices[channels].ravel())
                    tensor.index_fill_(part.dim, gone.to(tensor.device), 0.0)
    return result


def compact(model: nn.Module, analysis: Analysis, removed: Removed) -> nn.Module:
    """A copy without the removed channels, not proved; see :func:`prune_channels`.

    Raises:
        PruningError: as :func:`prune_channels`.
    """
    cuts = _checked(model, analysis, removed)
    constants = [
        (number, less)
        for group, channels in cuts
        for number in group.numbers
        if number.constant and (less := int(number.per_channel[channels].sum()))
    ]
    graph = None
    if constants:  # traced before attributes shrink: the code may read its numbers from them
        result, graph = trace(model, training=False)
    else:
        result = copy.deepcopy(model)
    for (name, dim), gone in _entries(cuts).items():
        _cut_tensor(result, name, dim, gone)
    for group, channels in cuts:
        for number in group.numbers:
            if not number.constant:
                owner = result.get_submodule(number.owner)
                less = int(number.per_channel[channels].sum())
                setattr(owner, number.place, getattr(owner, number.place) - less)
    return result if graph is None else _with_constants(model, result, graph, constants)


def _checked(model: nn.Module, analysis: Analysis, removed: Removed) -> _Cuts:
    if {name: tuple(value.shape) for name, value in model.named_parameters()} != analysis.shapes:
        raise PruningError(
            "the analysis is of another network: expected the network that it was made of; "
            "analyse this one"
        )
    groups = {group.name: group for group in analysis.groups}
    cuts = []
    for name, channels in removed.items():
        if name not in groups:
            raise unknown_group(analysis, name)
        group, wanted = groups[name], np.asarray(channels, dtype=np.int64)
        out_of_range = wanted[(wanted < 0) | (wanted >= group.channels)]
        if len(out_of_range):
            raise PruningError(
                f"group '{name}': expected channels from 0 to {group.channels - 1}, "
                f"got {out_of_range.tolist()}"
            )
        if len(np.unique(wanted)) != len(wanted):
            raise PruningError(f"group '{name}': a channel is given twice: {wanted.tolist()}")
        if len(wanted) == group.channels:
            raise PruningError(
                f"group '{name}': all {group.channels} channels would go; keep at least one"
            )
        cuts.append((group, wanted))
    return cuts


def _entries(cuts: _Cuts) -> dict[tuple[str, int], NDArray[np.int64]]:
    """The indices that go, for each dimension of each parameter and buffer."""
    found: dict[tuple[str, int], list[NDArray[np.int64]]] = {}
    for group, channels in cuts:
        for part in group.parameters:
            gone = part.indices[channels].ravel()
            found.setdefault((part.parameter, part.dim), []).append(gone)
    return {key: np.concatenate(parts) for key, parts in found.items()}


def _cut_tensor(model: nn.Module, name: str, dim: int, gone: NDArray[np.int64]) -> None:
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    tensor: Tensor = getattr(owner, attribute)
    kept = np.setdiff1d(np.arange(tensor.shape[dim]), gone)
    smaller = tensor.detach().index_select(dim, torch.from_numpy(kept).to(tensor.device))
    if isinstance(tensor, nn.Parameter):
        smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
    setattr(owner, attribute, smaller)


def _with_constants(
    model: nn.Module, traced: nn.Module, graph: fx.Graph, changes: list[tuple[Number, int]]
) -> fx.GraphModule:
    """``traced`` by its graph, with numbers in the code made smaller, in the modes of ``model``."""
    modes = {name: module.training for name, module in model.named_modules()}
    nodes = {node.name: node for node in graph.nodes}
    for number, less in changes:
        node, (kind, *path) = nodes[number.owner], number.place
        if kind == "args":
            node.args = _less(node.args, path, less)
        else:
            node.kwargs = _less(node.kwargs, path, less)
    result = fx.GraphModule(traced, graph, class_name=type(model).__name__)
    for name, module in traced.named_modules():
        if name and any(True for _ in module.parameters(recurse=False)):
            result.add_submodule(name, module)  # also those that forward does not call
    for name, parameter in traced.named_parameters(recurse=False):
        result.register_parameter(name, parameter)
    for name, module in result.named_modules():
        module.training = modes.get(name, model.training)
    return result


def _less(value: Any, path: Sequence[Any], less: int) -> Any:
    """``value`` with the int at ``path`` made smaller; containers are copied."""
    if not path:
        return value - less
    step, rest = path[0], path[1:]
    if isinstance(value, slice):
        parts = {name: getattr(value, name) for name in ("start", "stop", "step")}
        parts[step] = _less(parts[step], rest, less)
        return slice(parts["start"], parts["stop"], parts["step"])
    if isinstance(value, Mapping):
        return {**value, step: _less(value[step], rest, less)}
    return type(value)(
        _less(item, rest, less) if place == step else item for place, item in enumerate(value)
    )


def prove(model: nn.Module, analysis: Analysis, example_input: Tensor, removed: Removed) -> float:
    """Prove that compact equals masked, and return the relative difference that was seen.

    Both networks are built from one copy of ``model`` in float64 whose every parameter and
    statistic was moved at random, so that nothing is zero by luck, and are run in eval mode on
    random input. What they compute is, piece by piece, a rational function of these values: it
    does not agree at a random point unless it agrees everywhere.

    Raises:
        ProofError: they differ by more than ``TOLERANCE``, or one of them fails.
        PruningError: as :func:`prune_channels`.
    """
    reference, example = proof.reference(model, example_input)
    smaller = compact(reference, analysis, removed)
    return proof.check_equal(
        masked(reference, analysis, removed),
        smaller,
        example,
        same_in_training=analysis.same_in_training,
    )


def analyse_and_try(model: nn.Module, example_input: Tensor) -> Analysis:
    """:func:`greenprune.pruning.graph.analyse`, and a trial cut of a channel of every group.

    What the proof refuses is frozen: the rules took it for something that it is not. This takes as
    long as a proof, and is for what offers groups, before hours of training go into them.

    Raises:
        PruningError: as :func:`~greenprune.pruning.graph.analyse`; or nothing can be proved.
    """
    analysis = analyse(model, example_input)

    def cut_one_of_each(names: list[str]) -> None:
        prove(model, analysis, example_input, {name: [0] for name in names})

    refused = proof.refused([group.name for group in analysis.groups], cut_one_of_each)
    return analysis.without(refused)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What can be pruned and what cannot, for people (``str``) and programs (``to_dict``)."""

    analysis: Analysis

    def __str__(self) -> str:
        lines = [f"{len(self.analysis.groups)} groups of channels can be pruned:"]
        for group in self.analysis.groups:
            writers = brief([part.module for part in group.producers])
            readers = brief([part.module for part in group.consumers]) or "nothing"
            line = f"  {group.name}: {group.channels} channels"
            if len(group.producers) > 1:
                lines += [line, f"    written by {writers}", f"    read by {readers}"]
            else:
                lines.append(f"{line}, read by {readers}")
        reasons: dict[str, list[str]] = {}
        for item in self.analysis.frozen:
            reasons.setdefault(item.reason, []).append(item.name)
        if reasons:
            lines.append("frozen, all channels or some:")
            lines += [f"  {brief(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "groups": [
                {
                    "name": group.name,
                    "channels": group.channels,
                    "producers": [part.module for part in group.producers],
                    "consumers": [part.module for part in group.consumers],
                    "parameters": [
                        {"name": part.parameter, "dim": part.dim} for part in group.parameters
                    ],
                }
                for group in self.analysis.groups
            ],
            "frozen": [{"name": item.name, "reason": item.reason} for item in self.analysis.frozen],
        }


def brief(names: Sequence[str]) -> str:
    """Names in a row that count up in one number are written as one: ``layer1.[0-8].conv1``."""
    shown, place = [], 0
    while place < len(names):
        text, count = _run(names[place:])
        shown.append(text)
        place += count
    return ", ".join(shown)


def _run(names: Sequence[str]) -> tuple[str, int]:
    """The longest run that the first name starts, and its length."""
    text, count = names[0], 1
    for number in re.finditer(r"\d+", names[0]):
        before, first, after = names[0][: number.start()], int(number[0]), names[0][number.end() :]
        length = 1
        while names[length : length + 1] == [f"{before}{first + length}{after}"]:
            length += 1
        if length > count:
            text, count = f"{before}[{first}-{first + length - 1}]{after}", length
    return text, count


def explain(model: nn.Module, example_input: Tensor) -> Explanation:
    """Say which channels of ``model`` can be pruned together, and what is frozen and why.

    Raises:
        PruningError: the network cannot be traced, fails on ``example_input``, or cannot be proved.
    """
    return Explanation(analysis=analyse_and_try(model, example_input))


def add_bias(model: nn.Module, module_name: str) -> None:
    """Give a convolution or linear layer without bias one of zeros, in place.

    Raises:
        PruningError: there is no such layer, or it has a bias.
    """
    module = dict(model.named_modules()).get(module_name)
    weight = getattr(module, "weight", None)
    widths = [getattr(module, name, None) for name in ("out_channels", "out_features")]
    width = next((width for width in widths if width is not None), None)
    if module is None or weight is None or width is None or module.bias is not None:
        raise PruningError(
            f"'{module_name}': expected a convolution or linear layer without bias, "
            f"found {type(module).__name__ if module is not None else 'nothing'}"
        )
    module.bias = nn.Parameter(weight.new_zeros(width))
