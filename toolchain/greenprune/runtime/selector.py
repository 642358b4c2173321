"""The selector's decision, apart from any network (device side)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def accepts(score: float, threshold: float) -> bool:
    """:func:`decide` for one answer, without arrays, which take longer than the decision."""
    return score >= threshold


def decide(scores: ArrayLike, threshold: float | None) -> NDArray[np.bool_]:
    """Which answers of the aggressive network are accepted: ``score >= threshold``, bool [N].

    Compared in float64, as the certificate does. NaN is never accepted; a threshold of None
    accepts nothing.
    """
    values = np.asarray(scores, dtype=np.float64)
    if threshold is None:
        return np.zeros(values.shape, dtype=np.bool_)
    return np.asarray(values >= threshold)
