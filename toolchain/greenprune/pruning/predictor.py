"""What a choice of widths will cost on a device, by its cost table.

A network's cost is the sum of its layers', looked up at their widths, and what the sum does not
know: operations that are not in the table, dispatch, what fusing saves. That is learned from whole
networks measured, as a *correction*: ``slope x sum``, and an intercept that comes with the layers
in equal parts, so that a removed block takes its part along (our reading).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from greenprune.errors import MeasurementError
from greenprune.harness.cost_table import CostTable, LayerShape, Lookup
from greenprune.pruning.layer_shapes import PricedLayer
from greenprune.pruning.optimise import CostFunction, Prices, Term

Costs = NDArray[np.float64]
Lost = Mapping[str, ArrayLike]
"""Channels that each group loses, int64 [choices] or one number; groups left out lose none."""
_Find = Callable[[LayerShape, ArrayLike, ArrayLike], Costs]
_Price = Callable[[PricedLayer, ArrayLike, ArrayLike], Costs]


class Predictor:
    """Costs of pruned forms of one network.

    Widths should lie on the table's blocks: between measured widths costs are interpolated, and
    on most devices a width between two blocks costs as much as the next one or more. Widths below
    the smallest measured one cost as much as that.
    """

    def __init__(self, layers: Sequence[PricedLayer], table: CostTable) -> None:
        """
        Args:
            layers: see :func:`~greenprune.pruning.layer_shapes.shapes_of`.
            table: measured; it has every layer, as wide as it is.

        Raises:
            MeasurementError: the table lacks a layer, or is of narrower ones.
        """
        self.layers = tuple(layers)
        self.table = table
        self._lookup = Lookup(table)
        self._measured = {
            costs.shape: sorted((point.out_width, point.in_width) for point in costs.points)
            for costs in table.costs
        }
        self._least = {
            costs.shape: (
                min(point.in_width for point in costs.points),
                min(point.out_width for point in costs.points),
            )
            for costs in table.costs
        }
        for layer in self.layers:
            for ins, outs in self._corners(layer):
                self._price(layer, self._lookup.latency_us, ins, outs)

    def _corners(self, layer: PricedLayer) -> list[tuple[int, int]]:
        """Of the widths that a layer can have: what the table has there, it has between them."""
        whole = (layer.in_width, layer.out_width)
        if layer.together:
            return [whole]
        ins, outs = (
            (width, 1) if groups else (width,)
            for width, groups in zip(whole, (layer.in_groups, layer.out_groups), strict=True)
        )
        return [(first, second) for first in ins for second in outs]

    def latency_ms(self, lost: Lost) -> Costs:
        """Predicted latency at batch 1, corrected, in milliseconds, float64 [choices]."""
        return self._sum(self._corrected_us, lost)

    def summed_ms(self, lost: Lost) -> Costs:
        """The sum of the layers' latencies alone, which :func:`learn` corrects; as above."""
        return self._sum(self._latency_us, lost)

    def energy_mj(self, lost: Lost) -> Costs:
        """The sum of the layers' energies in millijoules, float64 [choices]; not corrected.

        Raises:
            MeasurementError: the table lacks the joules of a layer.
        """
        return self._sum(self._energy_uj, lost)

    def prices(self) -> dict[str, Prices]:
        """``latency_ms`` and, where the table has joules of every layer, ``energy_mj``: terms that
        add up to :meth:`latency_ms` and :meth:`energy_mj`."""
        found = {"latency_ms": self._prices(self._corrected_us)}
        with contextlib.suppress(MeasurementError):  # no meter, or one that failed
            self.energy_mj({})
            found["energy_mj"] = self._prices(self._energy_uj)
        return found

    def _latency_us(self, layer: PricedLayer, ins: ArrayLike, outs: ArrayLike) -> Costs:
        return self._price(layer, self._lookup.latency_us, ins, outs)

    def _energy_uj(self, layer: PricedLayer, ins: ArrayLike, outs: ArrayLike) -> Costs:
        return self._price(layer, self._lookup.energy_uj, ins, outs)

    def _corrected_us(self, layer: PricedLayer, ins: ArrayLike, outs: ArrayLike) -> Costs:
        known = self.table.correction
        there = (np.asarray(ins) > 0) & (np.asarray(outs) > 0)
        own = known.get("slope", 1.0) * self._latency_us(layer, ins, outs)
        return np.asarray(own + known.get("layer_us", 0.0) * there)

    def _prices(self, price: _Price) -> Prices:
        def cost(layer: PricedLayer) -> CostFunction:
            return lambda ins, outs: price(layer, ins, outs) / 1000

        terms = [
            Term(
                module=layer.module,
                in_width=layer.in_width,
                out_width=layer.out_width,
                in_groups=layer.in_groups,
                out_groups=layer.out_groups,
                cost=cost(layer),
            )
            for layer in self.layers
        ]
        return Prices(constant=0.0, terms=terms)

    def _sum(self, price: _Price, lost: Lost) -> Costs:
        total = np.zeros(np.broadcast_shapes((1,), *(np.shape(each) for each in lost.values())))
        for layer in self.layers:
            ins = layer.in_width - _taken(layer.in_groups, lost)
            outs = layer.out_width - _taken(layer.out_groups, lost)
            total += price(layer, ins, outs)
        return total / 1000

    def _price(self, layer: PricedLayer, find: _Find, ins: ArrayLike, outs: ArrayLike) -> Costs:
        """Of one layer, in micro-units; a convolution in groups costs in proportion to these."""
        if layer.shape.groups > 1:  # of the narrowest measured one that is as wide
            measured = self._measured.get(layer.shape, [])
            own = layer.out_width, layer.in_width  # which find() refuses, where none is
            whole_out, whole_in = next((at for at in measured if at[0] >= own[0]), own)
            whole = find(layer.shape, whole_in, whole_out)
            return np.asarray(whole * np.broadcast_arrays(ins, outs)[1] / whole_out)
        least = self._least.get(layer.shape, (1, 1))
        return find(layer.shape, _at_least(ins, least[0]), _at_least(outs, least[1]))


def _taken(groups: Mapping[str, int], lost: Lost) -> NDArray[np.int64]:
    parts = [np.asarray(lost.get(group, 0), dtype=np.int64) * n for group, n in groups.items()]
    return np.asarray(sum(parts, np.int64(0)))


def _at_least(widths: ArrayLike, least: int) -> NDArray[np.int64]:
    """Clamped from below; 0 stays, where there is no layer."""
    given = np.asarray(widths)
    return np.where(given == 0, 0, np.maximum(given, least))


def learn(summed_ms: ArrayLike, measured_ms: ArrayLike) -> dict[str, float]:
    """The correction that whole networks teach: ``measured = intercept + slope x summed``.

    Relative errors count, and outliers little: iteratively reweighted least squares on residuals
    over the measured latency, with Huber's weights (1964; threshold 1.345 robust standard
    deviations). Neither number is below zero: where the best intercept would be, the line goes
    through the origin; where the best slope would be, the latency is constant.

    Args:
        summed_ms: :meth:`Predictor.summed_ms` of several networks, [networks].
        measured_ms: what they took, [networks].

    Returns:
        ``intercept_us`` and ``slope``.

    Raises:
        MeasurementError: fewer than two networks, other lengths, or what is not above zero.
    """
    summed, measured = (np.asarray(each, dtype=np.float64) for each in (summed_ms, measured_ms))
    valid = summed.ndim == 1 and summed.shape == measured.shape and len(summed) >= 2
    if not valid or not all((np.isfinite(each) & (each > 0)).all() for each in (summed, measured)):
        raise MeasurementError(
            "a correction is learned from two networks or more, each with a predicted and a "
            f"measured latency above zero; got {summed.tolist()} and {measured.tolist()}"
        )
    terms = np.stack([1 / measured, summed / measured], axis=1)  # their sum should be 1
    weights = np.ones(len(measured))
    for _ in range(50):
        found = _not_negative(terms, weights)
        residuals = np.abs(terms @ found - 1)
        spread = 1.4826 * float(np.median(residuals))
        after = (
            np.minimum(1.0, 1.345 * spread / np.maximum(residuals, 1e-12)) if spread else weights
        )
        if np.allclose(after, weights, rtol=1e-9):
            break
        weights = after
    return {"intercept_us": float(found[0]) * 1000, "slope": float(found[1])}


def _not_negative(terms: Costs, weights: Costs) -> Costs:
    """Weighted least squares towards 1, coefficients not below zero."""
    from scipy.optimize import nnls

    root = np.sqrt(weights)
    scale = np.linalg.norm(terms, axis=0)  # columns of one size, for the solver's tolerance
    return np.asarray(nnls(root[:, None] * terms / scale, root)[0] / scale)
