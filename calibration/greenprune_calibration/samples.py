"""Which images to calibrate with."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def draw_balanced(labels: ArrayLike, count: int, seed: int) -> NDArray[np.int64]:
    """Indices of ``count`` samples with the classes as even as the labels allow.

    Classes take turns in a random order, each giving a random sample of its own until it has none
    left, so that a class with few samples gives all of them and the others fill up.

    Args:
        labels: integers [N].
        count: how many, at most N.
        seed: of the draw.

    Returns:
        Sorted distinct indices, int64 [count].

    Raises:
        ValueError: labels are not one-dimensional, or fewer than ``count``.
    """
    classes = np.asarray(labels)
    if classes.ndim != 1:
        raise ValueError(f"labels: expected one dimension, got shape {classes.shape}")
    if not 0 <= count <= len(classes):
        raise ValueError(
            f"count: expected 0 to {len(classes)} (the samples there are), got {count}"
        )
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(classes))
    names, members = np.unique(classes[shuffled], return_inverse=True)
    turn = np.empty(len(classes), dtype=np.int64)  # how many of its class come before it
    for name in range(len(names)):
        mine = members == name
        turn[mine] = np.arange(mine.sum())
    precedence = generator.permutation(len(names))[members]
    order = np.lexsort((precedence, turn))
    return np.sort(shuffled[order[:count]]).astype(np.int64)
