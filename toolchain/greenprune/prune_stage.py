"""The stage that cuts: the mild and the aggressive network, each proved."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from greenprune import processes, prune_budget, schema, storage, training
from greenprune import stage_parts as parts
from greenprune.data import draw, normalise
from greenprune.errors import NotAvailableError, RunError
from greenprune.pipeline import Job, Work
from greenprune.prune_budget import width_multiple
from greenprune.pruning import (
    batchnorm,
    budget,
    cost,
    folding,
    gates,
    plots,
    record,
    removal,
    surgery,
    within,
)
from greenprune.pruning.graph import Analysis, analyse
from greenprune.pruning.scores import Scores, Scoring, measure
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
    prune_budget.reach(job, network, analysis, parts.example_of(job.data), priced=True)
    scoring = _score(job, network, analysis)
    results: dict[str, Any] = {
        "images": scoring.images,
        "frozen": [{"name": item.name, "reason": item.reason} for item in analysis.frozen],
    }
    cuts: dict[str, budget.Removed] = {}
    subject = Subject(network, described, analysis, scoring.scores)
    for variant in parts.PRUNED:
        if getattr(settings, variant).budget:
            cuts[variant], results[variant] = _within_budget(work, subject, variant)
        else:
            cuts[variant] = _choose(job, analysis, scoring.scores, variant)
            results[variant] = _one_shot(work, subject, cuts[variant], variant)
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


@dataclass(frozen=True)
class Subject:
    """A network that channels are cut out of."""

    network: nn.Module
    described: record.NetworkRecord
    analysis: Analysis
    scores: Scores


def _score(job: Job, network: nn.Module, analysis: Analysis) -> Scoring:
    settings = job.recipe.prune
    chosen = draw(job.data.train, settings.images, job.recipe.seed + 2)
    return measure(
        network,
        analysis,
        normalise(job.data.train.inputs[chosen], job.data.preprocessing),
        method=settings.method,
        targets=job.data.train.targets[chosen],
        loss=parts.function_of(job.recipe.task.loss),
        seed=job.recipe.seed,
    )


def _one_shot(
    work: Work, subject: Subject, removed: budget.Removed, variant: str
) -> dict[str, Any]:
    """Cut the channels out at once, and save what is left."""
    job = work.job
    example = parts.example_of(job.data)
    own: VariantSettings = getattr(job.recipe.prune, variant)
    cut = removal.cut(subject.network, example, subject.analysis.groups, removed)
    spare = math.inf
    if own.params < 1 and not own.rates:
        allowed = own.params * cost.count(subject.network, example).params
        spare = allowed - cost.count(cut.network, example).params
    left, tried = _corrected(job, cut, subject.described, spare)
    return _saved(work, subject, left, tried, variant)


def _within_budget(
    work: Work, first: Subject, variant: str
) -> tuple[budget.Removed, dict[str, Any]]:
    """Cut in steps until the budget holds; after each but the last, train briefly and score again.

    Returns:
        The channels that the first step took, and the results.
    """
    job, settings = work.job, work.job.recipe.prune
    example = parts.example_of(job.data)
    terms = prune_budget.terms_of(job, variant, prune_budget.found_multiple(job))
    held = Held(first.network, prune_budget.price_of(job), prune_budget.measure_of(job, variant))
    subject, told, gone = first, [], None
    if settings.blocks and settings.steps > 1:
        subject = _without_blocks(work, first, terms, held, f"{variant}-blocks")
        terms = replace(terms, blocks=False)
    for step in range(1, settings.steps + 1):
        part = replace(terms, way=step / settings.steps)
        decided = _decided(work, subject, part, held, f"{variant}-{step}")
        told.append(within.described(decided))
        gone = decided.choice.removed if gone is None else gone
        described = subject.described
        if decided.choice.removed_blocks:
            described = described.without_blocks(*decided.choice.removed_blocks)
        spare = 0.0 if "params" in decided.goals else math.inf
        last = step == settings.steps
        cut = decided.apply(subject.network, subject.analysis, example)
        left, tried = _corrected(job, cut, described, spare if last else 0.0)
        if last:
            break
        _train_between(work, first.network, left.network, f"{variant}-{step}")
        analysis = surgery.analyse_and_try(left.network, example)
        scores = _score(job, left.network, analysis).scores
        subject = Subject(left.network, left.described, analysis, scores)
    results = _saved(work, first, left, tried, variant)
    blocks = list(left.described.removed_blocks)
    return gone or {}, {**results, "budget": told, "removed_blocks": blocks}


@dataclass(frozen=True)
class Held:
    """What budgets are held to."""

    dense: nn.Module
    price: within.Price
    measure: within.Measure | None


def _decided(
    work: Work, subject: Subject, terms: within.Terms, held: Held, name: str
) -> within.Decision:
    """What goes, as a run that was interrupted has decided by the same prices: measured again it
    might be another choice, which the checkpoints after it do not fit."""
    prices = prune_budget.prices_sha256(work.job)[:8]
    path = work.checkpoint.with_name(f"{work.checkpoint.stem}-{name}-{prices}.json")
    if path.is_file():
        with contextlib.suppress(ValueError, RunError):  # damaged, or another version's
            content = json.loads(path.read_text(encoding="utf-8"))
            return schema.decode(content, within.Decision, str(path), RunError)
    decided = within.decide(
        terms,
        held.dense,
        subject.network,
        subject.analysis,
        subject.scores,
        parts.example_of(work.job.data),
        held.price,
        held.measure,
    )
    storage.write_json(path, schema.encode(decided))
    return decided


def _without_blocks(
    work: Work, first: Subject, terms: within.Terms, held: Held, name: str
) -> Subject:
    """With several steps, the blocks that the whole way needs gone go before the first: a record
    has blocks go before channels, and no later step could take one."""
    example = parts.example_of(work.job.data)
    gone = _decided(work, first, terms, held, name).choice.removed_blocks
    if not gone:
        return first
    cut = removal.cut(first.network, example, first.analysis.groups, {}, gone)
    analysis = surgery.analyse_and_try(cut.network, example)
    scores = _score(work.job, cut.network, analysis).scores
    return Subject(cut.network, first.described.without_blocks(*gone), analysis, scores)


def _train_between(work: Work, dense: nn.Module, network: nn.Module, name: str) -> None:
    job = work.job
    training.fit(
        network,
        job.data,
        job.recipe.prune.between,
        seed=job.recipe.seed + 40,
        loss=parts.function_of(job.recipe.task.loss),
        teacher=dense,
        checkpoint=work.checkpoint.with_stem(f"{work.checkpoint.stem}-{name}"),
        label=f"between, {name}",
    )


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


@dataclass(frozen=True)
class Left:
    """A compact network and its record."""

    network: nn.Module
    described: record.NetworkRecord


def _saved(
    work: Work, subject: Subject, left: Left, tried: dict[str, float], variant: str
) -> dict[str, Any]:
    job = work.job
    record.save_network(work.folder / variant, left.network, left.described)
    remaining = analyse(left.network, parts.example_of(job.data))
    return {
        **_compared(job, left.network, subject.network),
        "development_accuracy": max(tried.values()),
        "corrections": tried,
        "widths": budget.widths(remaining, {}),
        "dense_widths": budget.widths(subject.analysis, {}),
    }


def _corrected(
    job: Job, found: removal.Cut, described: record.NetworkRecord, spare: float
) -> tuple[Left, dict[str, float]]:
    """Put right what the cut has shifted, in the way that the development split gains from most.

    Folding is left out where the biases that it adds are more than the ``spare`` parameters.

    Args:
        described: the record of the network before channels went.

    Returns:
        What is left, and the accuracy of each way.
    """
    images = parts.training_images(job, CORRECTION_IMAGES, seed=job.recipe.seed + 3)
    cut, folded = found.network, copy.deepcopy(found.network)
    gained = folding.fold_means(folded, found.without_blocks, found.analysis, found.removed, images)
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
    network, biased = ways[best]
    pruned = described.pruned(found.analysis, found.removed).with_biases(*biased)
    return Left(network, pruned), tried


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


def reach_budgets(job: Job, network: nn.Module, example: Tensor, *, priced: bool) -> None:
    """Whether a budget can be reached follows from the network's structure alone.

    ``priced``: see :func:`greenprune.prune_budget.reach`.

    Raises:
        PruningError: it cannot.
        NotAvailableError: training with gates on several processes.
    """
    if job.recipe.prune.method == "gates":
        for variant in parts.PRUNED:
            gates.build(network, example, _gate_settings(job, variant))
        return
    analysis = surgery.analyse_and_try(network, example)
    prune_budget.reach(job, network, analysis, example, priced=priced)
    level = {group.name: np.ones(group.channels) for group in analysis.groups}
    for variant in parts.PRUNED:
        if not getattr(job.recipe.prune, variant).budget:
            _choose(job, analysis, level, variant)
