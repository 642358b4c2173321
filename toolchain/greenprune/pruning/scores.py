"""How much each channel matters: DRP and its rivals behind one function.

Criteria that look at feature maps are in ``observed`` and ``hrank``, those that look at weights
alone in ``rivals``; here is what they share: what may go in, and how many images it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from greenprune.errors import DataError, PruningError
from greenprune.pruning import hrank, observed, rivals
from greenprune.pruning.cost import evaluating
from greenprune.pruning.graph import Analysis

Scores = dict[str, NDArray[np.float64]]
"""Group name to one score for each of its channels, float64 [channels]."""

FIRST_IMAGES = 32
STABLE = 0.99
"""Images are doubled until the order changes no more than this, as a rank correlation."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Scores and how sure they are."""

    scores: Scores
    images: int
    """How many images were looked at; 0 for a criterion that looks at weights alone."""
    stability: dict[str, float]
    """For each group Spearman's correlation of its scores with those from about half the images;
    empty where no half was scored."""


def measure(
    model: nn.Module,
    analysis: Analysis,
    images: Tensor,
    *,
    method: str = "drp",
    targets: Tensor | None = None,
    loss: observed.Loss = F.cross_entropy,
    seed: int = 0,
    batch_size: int = 64,
) -> Scoring:
    """Score every prunable channel of ``model``.

    ==============  =============================================================================
    ``drp``         dispersion of the maps that are read, times the weights that read them
    ``drp_rank``    the same with the maps' matrix rank in the place of their dispersion
    ``magnitude``   norm of the filter
    ``bn_scale``    scale of the BatchNorm behind it
    ``taylor``      first-order change of the loss; needs ``targets``
    ``hrank``       matrix rank of the maps after the activation
    ``fpgm``        distance from the other filters of its layer
    ``random``      none of these
    ==============  =============================================================================

    All but ``taylor``, a change of the loss, are shares of a layer's total, summed over the layers
    that read the channel (DRP) or write it (the others).

    Images are taken in order, 32 at first and then always as many again as before, until the mean
    over the groups of Spearman's correlation between the scores before and after is at least 0.99
    (our reading of 'until the order is stable'), or until all are used.

    Args:
        model: the network that ``analysis`` was made of; left as it was.
        analysis: its groups.
        images: normalised inputs in random order, float32 [N, ...]: the most that are used.
        method: one of the above.
        targets: of the images, [N, ...]; for ``taylor``.
        loss: ``loss(outputs, targets)``, a mean over the batch; for ``taylor``.
        seed: of ``random``.
        batch_size: images in one forward pass.

    Raises:
        PruningError: an unknown method, what a method needs is missing, weights or scores that
            are not finite.
        DataError: no images, images of a wrong shape, or values that are not finite.
    """
    if method not in METHODS:
        raise PruningError(f"pruning method '{method}' is unknown; known: {', '.join(METHODS)}")
    _check_weights(model)
    weigh = METHODS[method]
    if weigh is None:
        _check_images(model, images)
        labels = _labels(method, images, targets)
        criterion = _criterion(method, model, analysis, loss)
        found = _until_stable(criterion, images, labels, batch_size)
    else:
        found = Scoring(scores=weigh(model, analysis, seed), images=0, stability={})
    for name, values in found.scores.items():
        if not np.isfinite(values).all():
            raise PruningError(
                f"the {method} scores of group '{name}' are not finite; "
                "expected a trained network and normalised images"
            )
    return found


METHODS: dict[str, Callable[[nn.Module, Analysis, int], Scores] | None] = {
    "drp": None,
    "drp_rank": None,
    "magnitude": lambda model, analysis, seed: rivals.magnitude(model, analysis),
    "bn_scale": lambda model, analysis, seed: rivals.bn_scale(model, analysis),
    "taylor": None,
    "hrank": None,
    "fpgm": lambda model, analysis, seed: rivals.fpgm(model, analysis),
    "random": lambda model, analysis, seed: rivals.random(analysis, seed),
}
"""By name; None for what looks at images."""


def _criterion(
    method: str, model: nn.Module, analysis: Analysis, loss: observed.Loss
) -> observed.Criterion:
    """With nothing seen yet."""
    if method == "taylor":
        return observed.Taylor(model, analysis, loss)
    if method == "hrank":
        return hrank.HRank(model, analysis)
    statistic = observed.Dispersion if method == "drp" else observed.Rank
    return observed.Read(model, analysis, statistic)


def _until_stable(
    criterion: observed.Criterion, images: Tensor, targets: Tensor | None, batch_size: int
) -> Scoring:
    before: Scores | None = None
    stability: dict[str, float] = {}
    start = 0
    for end in _schedule(len(images)):
        for first in range(start, end, batch_size):
            part = slice(first, min(first + batch_size, end))
            criterion.add(images[part], None if targets is None else targets[part])
        start, scores = end, criterion.scores()
        if before is not None:
            stability = {name: spearman(before[name], scores[name]) for name in scores}
            if not stability or np.mean(list(stability.values())) >= STABLE:
                break
        before = scores
    return Scoring(scores=scores, images=start, stability=stability)


def _schedule(count: int) -> Iterator[int]:
    """32, 64, 128, ... and ``count``."""
    end = FIRST_IMAGES
    while end < count:
        yield end
        end *= 2
    yield count


def spearman(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Spearman's rank correlation; ties share their mean rank.

    Two constants agree (1); a constant says nothing about what varies (0).
    """
    from scipy.stats import spearmanr

    constant = [bool((values == values[0]).all()) for values in (first, second)]
    if any(constant):
        return float(all(constant))
    return float(spearmanr(first, second).statistic)


def _check_weights(model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise PruningError(
                f"'{name}' holds NaN or infinity; expected the finite weights of a trained network"
            )


def _check_images(model: nn.Module, images: Tensor) -> None:
    found = f"found {images.dtype} {list(images.shape)}"
    if images.dim() < 2 or not len(images) or not images.is_floating_point():
        raise DataError(f"expected calibration images, float32 [N, ...], N of 1 or more, {found}")
    if not torch.isfinite(images).all():
        raise DataError("the calibration images hold NaN or infinity; look at their normalisation")
    try:
        with torch.no_grad(), evaluating(model):
            model(images[:1])
    except RuntimeError as error:
        raise DataError(
            f"the network does not take images of shape {list(images.shape[1:])}: {error}; "
            "expected calibration images of the shape that it was analysed with"
        ) from error


def _labels(method: str, images: Tensor, targets: Tensor | None) -> Tensor | None:
    """The targets, where the method has a use for them."""
    if method != "taylor":
        return None
    if targets is None:
        raise PruningError(
            "pruning method 'taylor' follows the loss and needs the images' targets; pass "
            "targets=..., or use a method without them"
        )
    if len(targets) != len(images):
        raise DataError(f"expected {len(images)} targets, one for each image, got {len(targets)}")
    return targets
