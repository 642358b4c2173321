"""Integer ranks of many feature maps at once, equal to ``torch.linalg.matrix_rank`` on each.

``matrix_rank`` counts the singular values above ``max(h, w) eps sigma_1``, eps of float32. Whether
one is above needs no SVD where it is clear: the number of eigenvalues of the Gram matrix G above t
is the number of positive pivots of G - t I (Sylvester's law of inertia), which float64 finds for
many maps at once. Maps with a singular value near the threshold go to the SVD itself.

"Near" is meant to hold whatever rounding may do. The singular values that LAPACK returns are taken
to be within half the threshold, ``max(h, w)/2 eps sigma_1``, of the true ones (its guide puts the
error at a modest multiple of ``eps sigma_1``). G and its elimination without pivoting move an
eigenvalue by at most ``n u (trace G + trace |L| |D| |L|^T)``, u of float64 (Higham, Accuracy and
Stability of Numerical Algorithms, 2nd ed., theorem 9.3), which is computed on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from greenprune.errors import PruningError

CHUNK_NUMBERS = 1 << 20
"""Numbers in the matrices that are eliminated together (8 MB)."""


@torch.no_grad()
def matrix_ranks(maps: Tensor) -> Tensor:
    """Rank of each matrix.

    Args:
        maps: float [..., h, w], finite.

    Returns:
        int64 [...], what ``torch.linalg.matrix_rank(maps)`` returns.

    Raises:
        PruningError: a value is not finite.
    """
    if maps.dtype != torch.float32 or not maps.numel():  # float64 decides for float32 alone
        ranks: Tensor = torch.linalg.matrix_rank(maps)
        return ranks
    stack = maps.reshape(-1, *maps.shape[-2:])
    size = min(stack.shape[1:])
    chunk = min(len(stack), max(1, CHUNK_NUMBERS // size**2))
    space = torch.empty(size**2 * chunk, dtype=torch.float64)
    return torch.cat([_ranks(part, space) for part in stack.split(chunk)]).reshape(maps.shape[:-2])


def _ranks(stack: Tensor, space: Tensor) -> Tensor:
    """Ranks of float32 [maps, h, w]."""
    exact = stack.double()
    if stack.shape[1] > stack.shape[2]:
        exact = exact.transpose(1, 2)
    gram = exact @ exact.transpose(1, 2)
    trace = gram.diagonal(dim1=1, dim2=2).sum(dim=1)
    if not torch.isfinite(trace).all():
        raise PruningError("feature maps hold NaN or infinity: expected a trained network")
    norm = gram.flatten(1).norm(dim=1)
    # norm² / trace <= largest eigenvalue <= norm
    unit = (max(stack.shape[1:]) * torch.finfo(torch.float32).eps) ** 2
    high, low = 1.5**2 * unit * norm, 0.5**2 * unit * norm**2 / trace
    rounding = 0.55 * max(stack.shape[1:]) * torch.finfo(torch.float64).eps

    ranks, growth = _count_above(gram, high * 9 / 8, space)
    # beyond these, float32 under- or overflows on the way
    clear = (trace > 1e-50) & (trace < 1e50) & (rounding * (trace + growth) <= high / 8)
    open_ = (clear & (ranks < gram.shape[1])).nonzero()[:, 0]
    if len(open_):
        most, growth = _count_above(gram[open_], low[open_] * 7 / 8, space)
        sure = rounding * (trace[open_] + growth) <= low[open_] / 8
        clear[open_] = sure & (most == ranks[open_])
    zero = trace == 0
    ranks[zero] = 0
    unclear = (~clear & ~zero).nonzero()[:, 0]
    if len(unclear):
        ranks[unclear] = torch.linalg.matrix_rank(stack[unclear])
    return ranks


def _count_above(gram: Tensor, level: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
    """How many eigenvalues of float64 [maps, n, n] are above ``level`` [maps].

    Symmetric elimination of ``gram - level I`` for all maps side by side, in ``space``. Returns
    int64 [maps] and trace |L| |D| |L|^T, which bounds the rounding; NaN where a pivot was zero.
    """
    size = gram.shape[1]
    work = space[: gram.numel()].view(size**2, len(gram))
    work = work.copy_(gram.flatten(1).t()).view(size, size, len(gram))
    work.diagonal().sub_(level[:, None])
    moved = torch.zeros(size, len(level), dtype=torch.float64)
    for step in range(size - 1):
        row = work[step, step + 1 :]
        factor = row / work[step, step]
        torch.sum(row * factor, dim=0, out=moved[step])
        work[step + 1 :, step + 1 :].addcmul_(factor[:, None], row[None], value=-1)
    pivots = work.diagonal()
    return (pivots > 0).sum(dim=1), pivots.abs().sum(dim=1) + moved.abs().sum(dim=0)
