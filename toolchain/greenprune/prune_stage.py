"""The stage that cuts: the mild and the aggressive network, each proved."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from greenprune import processes, registry, schema, storage
from greenprune import stage_parts as parts
from greenprune.data import draw, normalise
from greenprune.errors import NotAvailableError
from greenprune.pipeline import Job, Work
from greenprune.pruning import batchnorm, budget, cost, folding, gates, plots, record, surgery
from greenprune.pruning.graph import Analysis
from greenprune.pruning.scores import Scores, measure
from greenprune.recipe import VariantSettings

CORRECTION_IMAGES = 1024


def prune(work: Work) -> dict[str, Any]:
    """Score once and cut twice, or train with gates twice."""
    if work.job.recipe.prune.method == "gates":
        found = {variant: _train_with_gates(work, variant) for variant in parts.PRUNED}
        return {**found, "headline": _headline(found)}
    return _prune_by_scores(work)


def _headline(results: dict[str, Any]) -> str:
    shares = (f"{name} {results[name]['macs_share']:.1%} of the MACs" for name in parts.PRUNED)
    return ", ".join(shares)


def _prune_by_scores(work: Work) -> dict[str, Any]:
    job, settings = work.job, work.job.recipe.prune
    network, described = parts.load(job, "sparsify")
    analysis = surgery.analyse_and_try(network, parts.example_of(job.data))
    chosen = draw(job.data.train, settings.images, job.recipe.seed + 2)
    scoring = measure(
        network,
        analysis,
        normalise(job.data.train.inputs[chosen], job.data.preprocessing),
        method=settings.method,
        targets=job.data.train.targets[chosen],
        loss=parts.function_of(job.recipe.task.loss),
        seed=job.recipe.seed,
    )
    results: dict[str, Any] = {
        "images": scoring.images,
        "frozen": [{"name": item.name, "reason": item.reason} for item in analysis.frozen],
    }
    cuts = {}
    for variant in parts.PRUNED:
        cuts[variant] = _choose(job, analysis, scoring.scores, variant)
        results[variant] = _cut(work, network, described, analysis, cuts[variant], variant)
    storage.write_json(
        work.folder / "scores.json",
        {
            "method": settings.method,
            "images": scoring.images,
            "stability": scoring.stability,
            "scores": {name: values.tolist() for name, values in scoring.scores.items()},
        },
    )
    plot = plots.scores_svg(scoring, cuts, settings.method)
    storage.write_text(work.folder / "scores.svg", plot)
    return {**results, "headline": _headline(results)}


def _train_with_gates(work: Work, variant: str) -> dict[str, Any]:
    """A network of the pair by one-off training."""
    job = work.job
    network, described = parts.load(job, "sparsify")
    outcome = gates.train(
        network,
        job.data,
        _gate_settings(job, variant),
        seed=job.recipe.seed + 30 + parts.PRUNED.index(variant),
        loss=parts.function_of(job.recipe.task.loss),
        checkpoint=work.checkpoint.with_stem(f"{work.checkpoint.stem}-{variant}"),
        label=f"gates, {variant}",
    )
    record.save_network(work.folder / variant, outcome.network, outcome.record(described))
    return {
        **_compared(job, outcome.network, network),
        "development_accuracy": parts.evaluate(job, outcome.network, job.data.development),
        "removed_blocks": list(outcome.removed_blocks),
        "gated_macs_share": outcome.gated_macs,
        "polarization": outcome.polarization,
        "ungated": outcome.ungated,
        "widths": budget.widths(outcome.analysis, outcome.removed),
        "dense_widths": budget.widths(outcome.analysis, {}),
    }


def _gate_settings(job: Job, variant: str) -> gates.GateSettings:
    """Raises NotAvailableError: several processes."""
    if processes.count() > 1:
        raise NotAvailableError("prune.method = 'gates' under torchrun; use one process")
    settings = job.recipe.prune
    return gates.GateSettings(
        **schema.encode(settings.gates),
        macs=getattr(settings, variant).macs,
        width_multiple=width_multiple(job),
    )


def _compared(job: Job, compact: nn.Module, network: nn.Module) -> dict[str, Any]:
    """Cost of a compact network, and as shares of that of the whole one."""
    example = parts.example_of(job.data)
    counted, dense = cost.count(compact, example), cost.count(network, example)
    return {
        "macs": counted.macs,
        "params": counted.params,
        "macs_share": counted.macs / dense.macs,
        "params_share": counted.params / dense.params,
    }


def _cut(
    work: Work,
    network: nn.Module,
    described: record.NetworkRecord,
    analysis: Analysis,
    removed: budget.Removed,
    variant: str,
) -> dict[str, Any]:
    job = work.job
    cut = surgery.prune_channels(network, parts.example_of(job.data), removed)
    own: VariantSettings = getattr(job.recipe.prune, variant)
    spare = math.inf
    if own.params < 1 and not own.rates:
        allowed = own.params * cost.count(network, parts.example_of(job.data)).params
        spare = allowed - cost.count(cut, parts.example_of(job.data)).params
    compact, gained, tried = _correct(job, cut, network, analysis, removed, spare)
    pruned = described.pruned(analysis, removed).with_biases(*gained)
    record.save_network(work.folder / variant, compact, pruned)
    return {
        **_compared(job, compact, network),
        "development_accuracy": max(tried.values()),
        "corrections": tried,
        "widths": budget.widths(analysis, removed),
        "dense_widths": budget.widths(analysis, {}),
    }


def _correct(
    job: Job,
    cut: nn.Module,
    network: nn.Module,
    analysis: Analysis,
    removed: budget.Removed,
    spare: float,
) -> tuple[nn.Module, tuple[str, ...], dict[str, float]]:
    """Put right what the cut has shifted, in the way that the development split gains from most.

    Folding is left out where the biases that it adds are more than the ``spare`` parameters.

    Returns:
        The network, the layers that gained a bias, and the accuracy of each way.
    """
    images = parts.training_images(job, CORRECTION_IMAGES, seed=job.recipe.seed + 3)
    folded = copy.deepcopy(cut)
    gained = folding.fold_means(folded, network, analysis, removed, images)
    fits = sum(folded.get_parameter(f"{name}.bias").numel() for name in gained) <= spare
    ways: dict[str, tuple[nn.Module, tuple[str, ...]]] = {"none": (cut, ())}
    if fits:
        ways["folded"] = (folded, gained)
    if any(isinstance(module, _BatchNorm) for module in cut.modules()):
        ways["batchnorm"] = (batchnorm.reestimated(cut, images), ())
        if fits:
            ways["folded, batchnorm"] = (batchnorm.reestimated(folded, images), gained)
    tried = {
        way: parts.evaluate(job, each, job.data.development) for way, (each, _) in ways.items()
    }
    best = max(tried, key=tried.__getitem__)  # of equals the first, which changes least
    return *ways[best], tried


def _choose(job: Job, analysis: Analysis, scores: Scores, variant: str) -> budget.Removed:
    """The channels that ``variant`` loses, by its budget or by its rates."""
    settings = job.recipe.prune
    own: VariantSettings = getattr(settings, variant)
    if own.rates:
        multiple = settings.width_multiple or 1
        return budget.by_rates(analysis, scores, own.rates, width_multiple=multiple)
    return budget.choose(
        analysis,
        scores,
        macs=own.macs,
        params=own.params,
        width_multiple=width_multiple(job),
        keep_at_least=settings.keep_at_least,
        scope=settings.scope,
    )


def width_multiple(job: Job) -> int:
    """What the recipe says, or what the target's kernels are blocked for."""
    target = registry.load_target(job.recipe.compile.target)
    return job.recipe.prune.width_multiple or target.capabilities.width_multiple


def reach_budgets(job: Job, network: nn.Module, example: Tensor) -> None:
    """Whether a budget can be reached follows from the network's structure alone.

    Raises:
        PruningError: it cannot.
        NotAvailableError: training with gates on several processes.
    """
    if job.recipe.prune.method == "gates":
        for variant in parts.PRUNED:
            gates.build(network, example, _gate_settings(job, variant))
        return
    analysis = surgery.analyse_and_try(network, example)
    level = {group.name: np.ones(group.channels) for group in analysis.groups}
    for variant in parts.PRUNED:
        _choose(job, analysis, level, variant)
