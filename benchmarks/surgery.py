"""The same networks pruned by greenprune and by torch-pruning: does it run, is it its own mask?

    python benchmarks/surgery.py

Each network of tests/integration/test_architectures.py, ViT-B/16 whole and the CRNNs lose 30% of
the channels of every group that the tool finds, by magnitude; the layers that give the outputs are
left alone. Weights are random and moved at random, in float64. *Equal* means that the compact
network's outputs are those of the network of the old size whose weights that read a removed channel
are zero, to 1e-10 of the largest output. For torch-pruning this mask is made of the indices that
its own groups give for the inputs of convolution and linear layers; where it cuts something else
that reads (attention, recurrent layers, parameters), no mask is made and the field is null. It cuts
LayerNorm too, whose statistics then are those of fewer channels: that is a difference by design,
and shows as one. Needs torch-pruning 1.6.1. Writes results/surgery.json.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_result
from torch import Tensor, nn

from greenprune.errors import GreenpruneError, ProofError
from greenprune.models import build
from greenprune.pruning import cost, proof, surgery
from greenprune.pruning.graph import analyse

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "integration"))
RATE = 0.3
SEED = 0


def networks() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    from test_architectures import NETWORKS, of_torchvision

    found = {name: (make, shape) for name, (make, shape, _) in NETWORKS.items()}
    found["vit_b_16"] = (of_torchvision("vit_b_16", image_size=32), (3, 32, 32))
    for cell in ("lstm", "gru"):
        found[f"crnn_{cell}"] = (crnn(cell), (1, 32, 32))
    return found


def crnn(cell: str) -> Callable[[], nn.Module]:
    return lambda: build("greenprune.models:crnn", {"cell": cell})


def by_greenprune(model: nn.Module, example: Tensor) -> dict[str, Any]:
    """Analysis, proof and surgery; ``model`` is the moved reference."""
    started = time.process_time()
    analysis = analyse(model, example)
    removed = {
        group.name: np.argsort(_magnitude(model, group))[: int(group.channels * RATE)].tolist()
        for group in analysis.groups
    }
    try:
        difference: float | None = surgery.prove(model, analysis, example, removed)
    except ProofError:
        difference = None
    compact = surgery.compact(model, analysis, removed)
    return {
        "runs": _runs(compact, model, example),
        "params": cost.count(compact, example).params,
        "equal": difference is not None,
        "difference": difference,
        "cpu_seconds": round(time.process_time() - started, 2),
        "frozen_layers": len(analysis.frozen),
    }


def _magnitude(model: nn.Module, group: Any) -> np.ndarray:
    """The squared weights of each channel."""
    total = np.zeros(group.channels)
    state = dict(model.named_parameters())
    for part in group.parameters:
        if part.parameter in state and not part.reads:
            rows = state[part.parameter].detach().movedim(part.dim, 0).square()
            total += rows.reshape(len(rows), -1).sum(1).numpy()[part.indices].sum(1)
    return total


def by_torch_pruning(model: nn.Module, example: Tensor, outputs: set[str]) -> dict[str, Any]:
    """Its MagnitudePruner, as its README has it; what it raises is recorded."""
    import torch_pruning as tp

    pruned, mask = copy.deepcopy(model), Mask(model)
    started = time.process_time()
    try:
        pruner = tp.pruner.MagnitudePruner(
            pruned,
            example,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=RATE,
            ignored_layers=[pruned.get_submodule(name) for name in sorted(outputs)],
            num_heads={
                module: module.num_heads
                for module in pruned.modules()
                if isinstance(module, nn.MultiheadAttention)
            },
        )
        for group in pruner.step(interactive=True):
            for dep, indices in group:
                mask.note(pruner.DG, dep, indices)
            group.prune()
    except Exception as error:
        seconds = round(time.process_time() - started, 2)
        return {"error": f"{type(error).__name__}: {error}"[:200], "cpu_seconds": seconds}
    seconds = round(time.process_time() - started, 2)
    runs = _runs(pruned, model, example)
    difference = None
    if runs is True and mask.complete:
        try:
            difference = proof.check_equal(mask.network, pruned, example)
            equal: bool | None = True
        except ProofError as error:
            equal, difference = False, _number(str(error))
    else:
        equal = False if runs is not True else None
    return {
        "runs": runs,
        "params": sum(parameter.numel() for parameter in pruned.parameters()),
        "equal": equal,
        "difference": difference,
        "cpu_seconds": seconds,
    }


class Mask:
    """The network at its old size, with the columns at zero that read what was removed."""

    def __init__(self, model: nn.Module) -> None:
        self.network = copy.deepcopy(model)
        self.alive: dict[str, np.ndarray] = {}
        self.complete = True

    @torch.no_grad()
    def note(self, graph: Any, dep: Any, indices: Any) -> None:
        """One dependency of a group that is about to be pruned; indices are of what is left."""
        if not graph.is_in_channel_pruning_fn(dep.handler):
            return
        module = dep.target.module
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase | nn.Parameter):
            self.complete = False
        if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            return
        name = graph._module2name[module]
        layer = self.network.get_submodule(name)
        width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        alive = self.alive.get(name, np.arange(width))
        gone = alive[list(indices)]
        self.alive[name] = np.setdiff1d(alive, gone)
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        groups = getattr(layer, "groups", 1)
        if transposed:
            layer.weight[gone] = 0
            return
        rows = layer.weight.shape[0] // groups
        for index in gone:
            group, column = divmod(int(index), width // groups)
            layer.weight[group * rows : (group + 1) * rows, column] = 0


def _runs(compact: nn.Module, model: nn.Module, example: Tensor) -> bool | str:
    """True, or why not."""
    try:
        with torch.no_grad():
            found, expected = proof._outputs(compact, example), proof._outputs(model, example)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    same = [t.shape for t in found] == [t.shape for t in expected]
    return same or "its outputs have other shapes"


def _number(message: str) -> float | None:
    _, found, rest = message.partition("relative difference ")
    return float(rest.split(",")[0]) if found else None


def main() -> None:
    started = time.perf_counter()
    warnings.simplefilter("ignore")
    figures: dict[str, Any] = {"rate": RATE, "torch_pruning": _version(), "networks": {}}
    for name, (make, shape) in networks().items():
        torch.manual_seed(SEED)
        model, example = proof.reference(make().eval(), torch.zeros(1, *shape))
        outputs = {
            item.name
            for item in analyse(model, example).frozen
            if item.reason == "an output of the network"
        }
        row: dict[str, Any] = {"params": cost.count(model, example).params}
        try:
            row["greenprune"] = by_greenprune(model, example)
        except GreenpruneError as error:
            row["greenprune"] = {"error": str(error)[:200]}
        row["torch_pruning"] = by_torch_pruning(model, example, outputs)
        figures["networks"][name] = row
        print(name, row, flush=True)
    write_result("surgery", seed=SEED, seconds=time.perf_counter() - started, figures=figures)


def _version() -> str:
    from importlib.metadata import version

    return version("torch-pruning")


if __name__ == "__main__":
    main()
