"""Removing whole residual blocks: of ``act(x + branch(x))`` only ``act(x)`` stays."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from greenprune.errors import PruningError
from greenprune.pruning import proof
from greenprune.pruning.cost import Cost, evaluating, per_layer
from greenprune.pruning.layer_rules import elementwise
from greenprune.pruning.rules import rule_of
from greenprune.pruning.walk import trace

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_Rewrite = Callable[[fx.Graph, fx.Node, fx.Node, fx.Node], None]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A residual block that can be removed."""

    branches: tuple[str, ...]
    """What is added to the block's input, in order: the name of the module that gives it, or ""
    where a function does. With all of them at zero, the block is as good as removed."""
    saves: Cost
    """MACs of one sample, and parameters, that go with the block."""


def removable_blocks(model: nn.Module, example_input: Tensor) -> dict[str, Block]:
    """The residual blocks that can be removed whole, by module name, in the order of the modules.

    A block is a submodule, with one tensor in and one of the same shape out, that computes
    ``act(x + branch(x))``, with or without ``act``; the input may go through more than one such
    addition (attention, then MLP). Of blocks within blocks the innermost count. Blocks that are
    called more than once are left out, and so are those whose removal the proof refuses.

    Args:
        model: any network; it is left as it is.
        example_input: [N, ...], N >= 1.
    """
    calls = _calls(model, example_input)
    found: dict[str, tuple[str, ...]] = {}
    for name, module in reversed(list(model.named_modules())):  # children before parents
        inside = any(inner.startswith(f"{name}.") for inner in found)
        if name and not inside and calls.get(name) == [True]:
            try:
                graph = trace(module, training=False)[1]
                steps = _residual(name, module, graph)
                _without_branches(name, module)
            except PruningError:
                continue
            found[name] = tuple(
                f"{name}.{branch.target}" if branch.op == "call_module" else ""
                for _, _, branch in steps
            )
    macs = per_layer(model, example_input)
    refused = proof.refused(list(found), partial(prove_blocks, model, example_input))
    return {
        name: Block(branches=found[name], saves=_saves(model, name, macs))
        for name in reversed(list(found))
        if name not in refused
    }


def _saves(model: nn.Module, name: str, macs: Mapping[str, int]) -> Cost:
    """All that is under the name; activations have neither MACs nor parameters."""
    every = list(model.named_parameters(remove_duplicate=False))
    inside = {id(p): p.numel() for key, p in every if key.startswith(f"{name}.")}
    outside = {id(p) for key, p in every if not key.startswith(f"{name}.")}
    return Cost(
        macs=sum(layer for key, layer in macs.items() if key.startswith(f"{name}.")),
        params=sum(size for key, size in inside.items() if key not in outside),
    )


def remove_block(model: nn.Module, name: str) -> None:
    """Replace the residual block ``name``, in place, by what it does when its branch adds zero.

    That is its closing activation, or nothing. The rest of the network, and the names of all
    modules that stay, are as before.

    Raises:
        PruningError: there is no such submodule, or it is no residual block.
    """
    replaced = _without_branches(name, _block(model, name))
    _replace(model, name, replaced)


def prove_blocks(model: nn.Module, example_input: Tensor, names: Sequence[str]) -> float:
    """Prove that the network without these blocks equals the one whose branches are times zero.

    As :func:`greenprune.pruning.surgery.prove` does for channels; returns the relative difference.

    Raises:
        ProofError: they differ, or the smaller network does not run.
        PruningError: as :func:`remove_block`.
    """
    reference, example = proof.reference(model, example_input)
    smaller = copy.deepcopy(reference)
    for name in names:
        block = _block(reference, name)
        _replace(reference, name, _rewritten(name, block, _times_zero, training=False))
        remove_block(smaller, name)
    return proof.check_equal(reference, smaller, example)


def _block(model: nn.Module, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if not name or name not in modules:
        raise PruningError(
            f"'{name}': expected the name of a residual block of {type(model).__name__}, found "
            "no such submodule; removable_blocks lists them"
        )
    return modules[name]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _without_branches(name: str, block: nn.Module) -> nn.Module:
    evaluated = _rewritten(name, block, _drop, training=False)
    if str(evaluated.graph) != str(_rewritten(name, block, _drop, training=True).graph):
        raise PruningError(f"block '{name}' does something else in training after its branch")
    if all(node.op in ("placeholder", "output") for node in evaluated.graph.nodes):
        identity: nn.Module = nn.Identity().train(block.training)
        return identity
    return evaluated


def _rewritten(name: str, block: nn.Module, rewrite: _Rewrite, *, training: bool) -> fx.GraphModule:
    """A copy of the block, ``rewrite`` done to its residual additions, without what is unused."""
    traced, graph = trace(block, training=training)
    for addition, stream, branch in reversed(_residual(name, block, graph)):
        rewrite(graph, addition, stream, branch)
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)  # in-place operations and assertions of the branch too
    result = fx.GraphModule(traced, graph, class_name=type(block).__name__)
    for inner, module in result.named_modules():
        module.training = block.get_submodule(inner).training
    return result


def _drop(graph: fx.Graph, addition: fx.Node, stream: fx.Node, branch: fx.Node) -> None:
    addition.replace_all_uses_with(stream)


def _times_zero(graph: fx.Graph, addition: fx.Node, stream: fx.Node, branch: fx.Node) -> None:
    with graph.inserting_before(addition):
        addition.replace_input_with(branch, graph.call_function(operator.mul, (branch, 0.0)))


def _residual(
    name: str, block: nn.Module, graph: fx.Graph
) -> list[tuple[fx.Node, fx.Node, fx.Node]]:
    """The additions on the way of the block's input to its output: (addition, input, branch)."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    steps = None
    if len(inputs) == 1 and isinstance(output, fx.Node):
        steps = _stream(block, output, inputs[0])
    if not steps:
        raise PruningError(
            f"'{name}' ({type(block).__name__}): expected a residual block, activation(x + "
            "branch(x)) with the block's own input as x, found another form; removable_blocks "
            "lists those that are"
        )
    return steps


def _stream(
    block: nn.Module, node: fx.Node, start: fx.Node
) -> list[tuple[fx.Node, fx.Node, fx.Node]] | None:
    """The additions between ``start`` and ``node`` where nothing but these and activations is."""
    if node is start:
        return []
    sources = [value for value in node.args if isinstance(value, fx.Node)]
    if node.target in _ADDITIONS and len(sources) == 2 and not node.kwargs:
        ways = [_stream(block, source, start) for source in sources]
        known = [place for place, way in enumerate(ways) if way is not None]
        if len(known) != 1:  # neither operand is the block's input, or both are
            return None
        way = ways[known[0]]
        assert way is not None
        return [*way, (node, sources[known[0]], sources[1 - known[0]])]
    module = block.get_submodule(str(node.target)) if node.op == "call_module" else None
    alone = len(node.all_input_nodes) == 1 and len(sources) == 1
    if alone and rule_of(node, module) is elementwise:
        return _stream(block, sources[0], start)
    return None


@torch.no_grad()
def _calls(model: nn.Module, example: Tensor) -> dict[str, list[bool]]:
    """For each call of each submodule: is it a tensor in and one of the same shape out."""
    calls: dict[str, list[bool]] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            tensors = [v for v in (*arguments, output) if isinstance(v, Tensor)]
            same = len(tensors) == 2 == len(arguments) + 1 and tensors[0].shape == tensors[1].shape
            calls.setdefault(name, []).append(same)

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return calls
