"""How far the pair may fall behind its reference, with what confidence.

For each allowed loss eps, the loosest threshold with
``P(accuracy(reference) - accuracy(pair) <= eps) >= 1 - delta``, found by *fixed-sequence testing*
(Angelopoulos et al., Learn then Test, arXiv 2110.01052): the thresholds are tested in an order
fixed beforehand, strict to loose, and the walk stops at the first that fails; all before it hold at
once. The test of one threshold is the betting bound of Waudby-Smith and Ramdas (arXiv 2010.09686).
K losses are certified jointly by giving each delta / K.

It holds for inputs that are exchangeable with the certification samples, and no longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Method = Literal["betting", "binomial"]

LARGEST_STAKE = 0.75
"""Share of the capital that one sample may cost (Waudby-Smith and Ramdas take 1/2 or 3/4)."""


@dataclass(frozen=True, kw_only=True)
class CertifiedRow:
    """One allowed loss and the loosest threshold that keeps it."""

    threshold: float | None
    """Accept where ``score >= threshold``; None accepts nothing."""
    max_accuracy_loss: float
    """Against the reference, as a fraction."""
    certified: bool
    delta: float
    """1 - delta is the confidence in all rows of the call together."""
    n: int
    coverage: float
    """Share of the samples that the threshold accepts."""
    accuracy: float
    """Of the pair on the samples."""
    reference_accuracy: float
    reason: str = ""
    """Why the row is not certified."""


def certify(
    scores: ArrayLike,
    right_aggressive: ArrayLike,
    right_mild: ArrayLike,
    right_reference: ArrayLike,
    thresholds: Sequence[float],
    losses: Sequence[float],
    *,
    delta: float,
    seed: int,
    method: Method = "betting",
) -> list[CertifiedRow]:
    """Certify a row for each allowed loss.

    Args:
        scores: the selector's, [N]; NaN is never accepted.
        right_aggressive: how right the aggressive network's answers are, [N], booleans or numbers
            in [0, 1].
        right_mild: the mild network's.
        right_reference: the reference network's.
        thresholds: strict to loose, chosen without looking at these samples. Before all of them,
            accepting nothing is tested.
        losses: allowed losses of accuracy, as fractions in (0, 1).
        delta: 1 - delta is the confidence, in all rows together.
        seed: of the order in which the samples are bet on.
        method: ``betting``, or ``binomial``: exact on harms (reference right, pair not) alone,
            which ignores what the pair gains and so certifies less often.

    Returns:
        One row for each loss, in the order of ``losses``. A row that is not certified has no
        threshold and says why.

    Raises:
        ValueError: lengths differ, a value is out of range, thresholds are not strict to loose.
    """
    n, accept, answers = _checked(
        scores, right_aggressive, right_mild, right_reference, thresholds, losses, delta
    )
    aggressive, mild, reference = answers
    pair = np.where(accept, aggressive, mild)
    order = np.random.default_rng(seed).permutation(n)
    differences = (reference - pair)[:, order]
    share = delta / len(losses)
    rows = []
    for loss in losses:
        passed = _is_bounded(differences, loss, share, method)
        last = len(passed) if passed.all() else int(np.argmin(passed))
        used = max(last - 1, 0)
        rows.append(
            CertifiedRow(
                threshold=float(thresholds[used - 1]) if used else None,
                max_accuracy_loss=float(loss),
                certified=last > 0,
                delta=delta,
                n=n,
                coverage=float(accept[used].mean()),
                accuracy=float(pair[used].mean()),
                reference_accuracy=float(reference.mean()),
                reason=""
                if last
                else _why_not(n, loss, share, float(differences[0].mean()), method),
            )
        )
    return rows


def smallest_certifiable_loss(n: int, delta: float, method: Method = "betting") -> float:
    """The smallest loss that ``n`` samples can certify, even where the pair is never worse.

    Give it delta / K where K losses are certified together. 1.0 where they can certify nothing.

    Raises:
        ValueError: n < 1 or delta outside (0, 1).
    """
    if n < 1 or not 0 < delta < 1:
        raise ValueError(f"expected n >= 1 and 0 < delta < 1, got n = {n}, delta = {delta}")
    never_worse = np.zeros((1, n))
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if _is_bounded(never_worse, middle, delta, method)[0]:
            high = middle
        else:
            low = middle
    return high


def _is_bounded(
    differences: Floats, loss: float, delta: float, method: Method
) -> NDArray[np.bool_]:
    """For each row of ``differences`` [T, N], in [-1, 1]: is its expectation at most ``loss``?

    Each True is wrong with probability at most ``delta``.
    """
    if method == "binomial":
        harms = (differences > 0).sum(axis=1)
        tails = _binomial_tails(differences.shape[1], loss)
        return np.asarray(tails[harms] <= delta)
    return np.asarray(_log_capital(differences, loss, delta).max(axis=1) >= math.log(1 / delta))


def _log_capital(differences: Floats, loss: float, delta: float) -> Floats:
    """Log of a gambler's capital after each sample, [T, N] -> [T, N].

    The gambler bets that D stays below ``loss`` on average: each sample multiplies the capital by
    ``1 + stake * (loss - D)``, the stake set from the samples before it. Were E[D] > loss, this
    would be a supermartingale, and reach 1 / delta with probability at most delta (Ville). The
    stakes are the predictable plug-in of Waudby-Smith and Ramdas (their equation 26), carried over
    from [0, 1] to [-1, 1].
    """
    rows, n = differences.shape
    steps = np.arange(2, n + 2)
    mean = np.cumsum(differences, axis=1) / steps
    variance = (1.0 + np.cumsum((differences - mean) ** 2, axis=1)) / steps
    before = np.concatenate([np.ones((rows, 1)), variance[:, :-1]], axis=1)
    stakes = np.sqrt(2.0 * math.log(1.0 / delta) / (n * before))
    stakes = np.minimum(stakes, LARGEST_STAKE / (1.0 - loss))
    return np.asarray(np.cumsum(np.log1p(stakes * (loss - differences)), axis=1))


def _binomial_tails(n: int, probability: float) -> Floats:
    """``P(Bin(n, probability) <= k)`` for k = 0 ... n."""
    logs = np.array(
        [
            math.lgamma(n + 1)
            - math.lgamma(k + 1)
            - math.lgamma(n - k + 1)
            + k * math.log(probability)
            + (n - k) * math.log1p(-probability)
            for k in range(n + 1)
        ]
    )
    return np.asarray(np.minimum(np.cumsum(np.exp(logs)), 1.0))


def _why_not(n: int, loss: float, share: float, behind: float, method: Method) -> str:
    least = smallest_certifiable_loss(n, share, method)
    if loss < least:
        return (
            f"too few samples: {n} can certify a loss of {least:.4f} at best, not {loss:.4f}; "
            "take more certification samples or allow a larger loss"
        )
    return (
        f"the mild network alone is {behind:.4f} below the reference on {n} samples, too close to "
        f"or above {loss:.4f}; a network level with the reference could be certified for "
        f"{least:.4f}: allow a larger loss, take more samples or prune the mild network less"
    )


def _checked(
    scores: ArrayLike,
    right_aggressive: ArrayLike,
    right_mild: ArrayLike,
    right_reference: ArrayLike,
    thresholds: Sequence[float],
    losses: Sequence[float],
    delta: float,
) -> tuple[int, NDArray[np.bool_], Floats]:
    """N, who accepts [1 + thresholds, N] (nothing first), and the three rights [3, N]."""
    points = np.asarray(scores, dtype=np.float64)
    named = {"aggressive": right_aggressive, "mild": right_mild, "reference": right_reference}
    rights = {name: np.asarray(right, dtype=np.float64) for name, right in named.items()}
    if points.ndim != 1 or not len(points):
        raise ValueError(f"scores: expected shape [N], N >= 1, got {points.shape}")
    for name, right in rights.items():
        if right.shape != points.shape:
            raise ValueError(f"right_{name}: expected shape {points.shape}, got {right.shape}")
        if not ((right >= 0) & (right <= 1)).all():
            raise ValueError(f"right_{name}: expected values in [0, 1]")
    grid = np.asarray(thresholds, dtype=np.float64)
    if grid.ndim != 1 or not np.isfinite(grid).all() or (np.diff(grid) > 0).any():
        raise ValueError("thresholds: expected finite numbers, strict (high) to loose (low)")
    if not losses or not all(0 < loss < 1 for loss in losses):
        raise ValueError(f"losses: expected fractions between 0 and 1, got {losses}")
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a fraction between 0 and 1, got {delta}")
    accept = points >= np.concatenate([[np.inf], grid])[:, None]
    accept[0] = False  # a score of infinity would pass even the strictest
    return len(points), accept, np.stack(list(rights.values()))
