"""HRank's criterion: the matrix rank of what layers write, in one pass for all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from greenprune.pruning.graph import Analysis
from greenprune.pruning.observed import Rank, channels_second
from greenprune.pruning.walk import trace

Values = NDArray[np.float64]


class HRank:
    """HRank (Lin et al., CVPR 2020): mean integer rank of the maps behind each layer's activation.

    After the first activation that follows the layer through BatchNorm and additions, or what
    comes last before any other operation; as a share of the layer's, summed over the group's
    layers, which leaves the order within a layer.
    """

    def __init__(self, model: nn.Module, analysis: Analysis) -> None:
        self.groups = analysis.groups
        self.traced, self.graph = trace(model, training=False)
        modules = dict(self.traced.named_modules())
        names = dict.fromkeys(p.module for group in analysis.groups for p in group.producers)
        self.nodes: dict[fx.Node, list[str]] = {}
        for node in self.graph.nodes:
            if node.op == "call_module" and node.target in names:
                self.nodes.setdefault(_activated(node, modules), []).append(str(node.target))
        self.seen = {name: Rank() for name in names}

    @torch.no_grad()
    def add(self, images: Tensor, targets: Tensor | None) -> None:
        modules = dict(self.traced.named_modules())

        def look(node: fx.Node, value: Any) -> None:
            for name in self.nodes.get(node, ()):
                maps = value[0] if isinstance(value, tuple) else value
                self.seen[name].add(channels_second(modules[name], maps))

        _Looking(self.traced, self.graph, look).run(images)

    def scores(self) -> dict[str, Values]:
        scores = {group.name: np.zeros(group.channels) for group in self.groups}
        for group in self.groups:
            # what is called in training alone has not been seen
            for producer in (part for part in group.producers if self.seen[part.module].count):
                ranks = self.seen[producer.module].mean()
                share = ranks[producer.indices].sum(axis=1) / max(ranks.sum(), 1e-30)
                scores[group.name] += share
        return scores


class _Looking(fx.Interpreter):
    """Runs a graph and shows every node's value."""

    def __init__(
        self, model: nn.Module, graph: fx.Graph, look: Callable[[fx.Node, Any], None]
    ) -> None:
        super().__init__(model, graph=graph)
        self.look = look

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.look(n, value)
        return value


ACTIVATIONS = frozenset(
    """
    ReLU ReLU6 LeakyReLU ELU SELU CELU GELU SiLU Mish PReLU Sigmoid Tanh Hardswish Hardsigmoid
    Hardtanh Softplus relu relu_ relu6 leaky_relu elu gelu silu mish hardswish hardsigmoid
    hardtanh softplus sigmoid sigmoid_ tanh tanh_ clamp clamp_
    """.split()  # noqa: SIM905 (a column of names would fill the page)
)
ADDITIONS = frozenset(["add", "iadd", "add_"])


def _activated(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node:
    """The first activation that follows ``node`` through BatchNorm and additions, or the last
    node before anything else."""
    while True:
        for user in node.users:
            module = modules[str(user.target)] if user.op == "call_module" else None
            name = (
                type(module).__name__ if module else getattr(user.target, "__name__", user.target)
            )
            if name in ACTIVATIONS:
                return user
            if isinstance(module, _BatchNorm) or name in ADDITIONS:
                node = user
                break
        else:
            return node
