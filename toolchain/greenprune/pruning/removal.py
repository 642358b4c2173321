"""Cutting blocks and channels out of one network: blocks first, then channels, each proved."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from greenprune.pruning import surgery
from greenprune.pruning.graph import Analysis, Group, analyse


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What is left, and how it came about."""

    network: nn.Module
    """The compact one."""
    without_blocks: nn.Module
    """Before channels went."""
    analysis: Analysis
    """Of the network without these blocks."""
    removed: dict[str, tuple[int, ...]]
    """The channels that went from it, by its own groups."""


def cut(
    network: nn.Module,
    example_input: Tensor,
    groups: Sequence[Group],
    removed: surgery.Removed,
    blocks: Sequence[str] = (),
) -> Cut:
    """Cut out blocks and channels.

    Args:
        network: left as it is.
        example_input: [N, ...].
        groups: of the network, before anything goes.
        removed: which of their channels go.
        blocks: residual blocks that go.

    Raises:
        PruningError, ProofError: as :func:`~greenprune.pruning.surgery.prune_channels`.
    """
    smaller = network
    if blocks:
        surgery.prove_blocks(network, example_input, blocks)
        smaller = copy.deepcopy(network)
        for name in blocks:
            surgery.remove_block(smaller, name)
    analysis = analyse(smaller, example_input)
    translated = _translated(groups, removed, analysis)
    return Cut(
        network=surgery.prune_channels(smaller, example_input, translated),
        without_blocks=smaller,
        analysis=analysis,
        removed=translated,
    )


def _translated(
    groups: Sequence[Group], removed: surgery.Removed, analysis: Analysis
) -> dict[str, tuple[int, ...]]:
    """The channels by the groups of ``analysis``, which removed blocks may have changed.

    Channels are known by the layer that writes them and their place there. A group of which all
    would go (only where a block's removal has split it) keeps its first.
    """
    gone: Mapping[str, set[int]] = {name: set(channels) for name, channels in removed.items()}
    shut = {
        (part.module, index)
        for group in groups
        for part in group.producers
        for channel, indices in enumerate(part.indices.tolist())
        if channel in gone.get(group.name, ())
        for index in indices
    }
    translated = {}
    for group in analysis.groups:
        part = group.producers[0]
        places = [(part.module, int(indices[0])) for indices in part.indices]
        going = [place for place, key in enumerate(places) if key in shut]
        going = going[1:] if len(going) == group.channels else going
        if going:
            translated[group.name] = tuple(going)
    return translated
