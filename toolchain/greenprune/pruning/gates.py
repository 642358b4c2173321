"""Gates: one training that finds the sub-network while it trains the weights (host side).

After arXiv 2302.10798 (Zhi et al.), reconstructed from its abstract: the formulas are our reading.
Every prunable channel and every removable residual block gets a binary gate. While training, a
light module opens or shuts each gate for each input by itself (:mod:`greenprune.pruning.gated`);
thresholds at 0.5 are passed by straight-through gradients. The loss is

    task + s (M(g) / M_dense - target)^2 + p Σ_i g_i (1 - g_i) / n,

g_i being the mean of gate i over the batch (n of them) and M(g) the MACs expected with these means.
The last term, polarization, is zero where every gate says the same of all inputs: the gates come to
agree on one static sub-network. It is cut out by the surgery that all pruning goes through, and is
trained on for the epochs that are left. No gate stays.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenprune import training
from greenprune.data import Data, batches, draw, normalise, take
from greenprune.distillation import Loss
from greenprune.errors import PruningError
from greenprune.pruning import batchnorm, removal, surgery
from greenprune.pruning.budget import Removed
from greenprune.pruning.gated import Gated
from greenprune.pruning.graph import Analysis
from greenprune.pruning.record import NetworkRecord
from greenprune.pruning.settling import check_target, settle
from greenprune.recipe import AtLeastOne, Fraction, GateTrainingSettings

IMAGES = 4096
"""Training images over which a gate's mean is taken in the end, to 0.008 (a standard error)."""
BATCHNORM_IMAGES = 1024
ANNEALED = 0.5
"""Share of the gated training in which the target goes from 1 to what was asked for."""


@dataclass(frozen=True, kw_only=True)
class GateSettings(GateTrainingSettings):
    """The recipe's settings, and what is to stay."""

    macs: Fraction = 0.5
    """Share of the dense network's MACs that may stay."""
    width_multiple: AtLeastOne = 8
    """Every width lands on a multiple of this; 1 switches rounding off."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A compact network without gates, and how it came to be."""

    network: nn.Module
    removed_blocks: tuple[str, ...]
    removed: Removed
    """Channels that went after the blocks: by the groups of ``analysis``."""
    analysis: Analysis
    """Of the network without the removed blocks."""
    gated_macs: float
    """Share of the MACs with every gate where most training images have it."""
    macs: float
    """Share of the MACs that stays."""
    moved: int
    """Gates that were turned for the widths' multiple and for the budget."""
    polarization: float
    """Mean of g (1 - g) over all gates at the end, g being the mean over training images; 0: all
    images agree."""
    ungated: dict[str, str]
    """Groups that could not have gates, and why; they stay whole."""
    history: training.History
    """With gates; the loss has all three terms."""
    settled_history: training.History
    """Of the static sub-network."""

    def record(self, described: NetworkRecord) -> NetworkRecord:
        """The record of ``network``, from that of the network that was trained.

        Raises:
            PruningError: blocks went, and channels had been removed before.
        """
        if self.removed_blocks:
            described = described.without_blocks(*self.removed_blocks)
        return described.pruned(self.analysis, self.removed)


def train(
    model: nn.Module,
    data: Data,
    settings: GateSettings,
    *,
    seed: int,
    loss: Loss = training.cross_entropy,
    checkpoint: Path | None = None,
    label: str = "gates",
) -> Outcome:
    """Train ``model`` with gates to the target, cut the static sub-network out, train it on.

    A gate is open in the sub-network where it is open for at least half of the training images.
    Then widths are rounded to their multiple, and the budget is made to hold (:func:`settle`).

    Args:
        model: float32; trained in place while it has gates, and left without them, uncut.
        data: as :func:`greenprune.training.fit` uses it.
        settings: weights and gates are trained by one SGD.
        seed: of the gates' first weights and the order of images.
        loss: ``loss(outputs, targets)``, a scalar tensor.
        checkpoint: a file's name; ``-gated`` and ``-settled`` are put behind its stem for the two
            parts, from which a training that was killed is resumed; the caller deletes them.
        label: what the progress bar says.

    Raises:
        PruningError: nothing to put gates on, a target out of reach, or more epochs with gates
            than epochs.
        ProofError: the surgery's.
        TrainingError: as ``fit``.
    """
    if settings.gated_epochs > settings.epochs:
        raise PruningError(
            f"expected gated_epochs of at most epochs = {settings.epochs}, got "
            f"{settings.gated_epochs}; it is the part of them that has gates"
        )
    example = take(data.train, torch.arange(2), data.preprocessing)[0]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        gated = build(model, example, settings)
    first = dataclasses.replace(settings, epochs=settings.gated_epochs)
    history = training.fit(
        gated,
        data,
        first,
        seed=seed,
        loss=objective(gated, data, first, loss),
        checkpoint=checkpoint and checkpoint.with_stem(f"{checkpoint.stem}-gated"),
        label=label,
    )
    probability, opened = _means(gated, data, seed)
    settled = settle(
        gated,
        opened,
        probability,
        macs=settings.macs,
        width_multiple=settings.width_multiple,
    )
    compact, blocks, analysis, removed = cut(gated, settled, example)
    drawn = draw(data.train, BATCHNORM_IMAGES, seed)
    images = normalise(data.train.inputs[drawn], data.preprocessing)
    batchnorm.reestimate(compact, images)
    after = training.fit(
        compact,
        data,
        dataclasses.replace(settings, epochs=settings.epochs - settings.gated_epochs),
        seed=seed + 1,
        loss=loss,
        checkpoint=checkpoint and checkpoint.with_stem(f"{checkpoint.stem}-settled"),
        label=f"{label}, settled",
    )
    return Outcome(
        network=compact,
        removed_blocks=blocks,
        removed=removed,
        analysis=analysis,
        gated_macs=float(gated.share(opened >= 0.5)),
        macs=float(gated.share(settled)),
        moved=int((settled != (opened >= 0.5)).sum()),
        polarization=float(polarization(opened)),
        ungated=gated.ungated,
        history=history,
        settled_history=after,
    )


def build(model: nn.Module, example_input: Tensor, settings: GateSettings) -> Gated:
    """Put gates on ``model``, all open at first.

    Raises:
        PruningError: nothing to put gates on, or a target out of reach.
    """
    if not 0 < settings.macs < 1:
        raise PruningError(
            f"expected a share of the MACs above 0 and below 1 as the target, got {settings.macs}"
        )
    analysis = surgery.analyse_and_try(model, example_input)
    blocks = surgery.removable_blocks(model, example_input) if settings.blocks else {}
    gated = Gated(model, analysis, blocks, example_input)
    if not gated.groups:
        reasons = [f"'{name}': {why}" for name, why in gated.ungated.items()]
        reasons += [f"'{item.name}': {item.reason}" for item in analysis.frozen]
        raise PruningError(
            f"{type(model).__name__} has no channels that gates could be put on "
            f"({'; '.join(reasons) or 'it has no layers'}); expected a network that can be pruned"
        )
    check_target(gated, macs=settings.macs, width_multiple=settings.width_multiple)
    return gated


def objective(gated: Gated, data: Data, settings: GateSettings, loss: Loss) -> Loss:
    """The loss of the module's docstring, of the batch that ``gated`` has just seen.

    The target comes down from 1 in the first half of the gated training, and polarization's
    weight goes up from 0 through all of it: what costs least is shut first, and inputs may
    disagree before they must agree.
    """
    steps = settings.epochs * math.ceil(len(data.train) / settings.batch_size)

    @functools.wraps(loss)  # a checkpoint knows its loss by name
    def with_gates(outputs: Tensor, targets: Tensor) -> Tensor:
        if loss is training.cross_entropy:
            task = F.cross_entropy(outputs, targets, label_smoothing=settings.label_smoothing)
        else:
            task = loss(outputs, targets)
        done = int(gated.step) / steps
        target = 1 - (1 - settings.macs) * min(1.0, done / ANNEALED)
        means = gated.means()
        distance = (gated.share(means) - target).square().float()
        return (
            task + settings.sparsity * distance + settings.polarization * done * polarization(means)
        )

    return with_gates


def polarization(means: Tensor) -> Tensor:
    """Mean of g (1 - g) over gates: 0 where each says the same of all inputs, at most 0.25."""
    return (means * (1 - means)).mean()


@torch.no_grad()
def _means(gated: Gated, data: Data, seed: int) -> tuple[Tensor, Tensor]:
    """Mean probability and mean binary gate over training images, float64 [gates] each."""
    drawn = draw(data.train, IMAGES, seed)
    split = dataclasses.replace(
        data.train, inputs=data.train.inputs[drawn], targets=data.train.targets[drawn]
    )
    gated.eval()
    total = torch.zeros(2, sum(gated.sizes), dtype=torch.float64)
    for inputs, _ in batches(split, data.preprocessing, 256):
        gated(inputs)
        found = gated.probabilities()
        total += torch.stack([found, (found >= 0.5).to(found.dtype)]).sum(dim=1)
    return total[0] / len(split), total[1] / len(split)


def cut(
    gated: Gated, settled: Tensor, example_input: Tensor
) -> tuple[nn.Module, tuple[str, ...], Analysis, Removed]:
    """Cut out what is shut: blocks first, then channels, each proved.

    Args:
        gated: left as it is.
        settled: bool [gates].

    Returns:
        The compact network, the blocks that went, the analysis of the network without these, and
        the channels that went from it.
    """
    parts = settled.split(gated.sizes)
    count = len(gated.groups)
    blocks = tuple(
        name for name, part in zip(gated.blocks, parts[count:], strict=True) if not part.all()
    )
    shut = {
        group.name: tuple(np.flatnonzero(~part.numpy()).tolist())
        for group, part in zip(gated.groups, parts[:count], strict=True)
    }
    found = removal.cut(gated.network, example_input, gated.groups, shut, blocks)
    return found.network, blocks, found.analysis, found.removed
