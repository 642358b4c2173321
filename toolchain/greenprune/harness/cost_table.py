"""What each layer costs on one device at each of its widths: a table, measured once, and read here.

Made by :mod:`greenprune.harness.cost_probe` from a folder of graphs that the host wrote.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from greenprune import schema, storage
from greenprune.errors import MeasurementError
from greenprune.registry import Target, split_runtime

SCHEMA_VERSION = 1
KIND = "greenprune-cost-table"
BLOCKS = (32, 16, 8, 4, 2)
REMEDY = (
    "measure a table of this network: let the host write its folder of graphs, and run "
    "greenprune-bench --cost-table FOLDER -o table.json on the device"
)
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """All that a layer's cost depends on beside its two widths; two layers of one shape cost the
    same at the same widths."""

    operator: Literal["convolution", "linear"]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Top, left, bottom, right, as ONNX has them."""
    groups: int = 1
    """Of a convolution; 0 means one for each channel (depthwise), with equal widths."""
    input_size: tuple[int, int] = (1, 1)
    """Height and width that a convolution reads; of a linear layer (positions of a sample, 1)."""
    activation: str = ""
    """ONNX operator that follows and that runtimes fuse or run right after, such as ``Relu``,
    ``Clip`` (ReLU6) or ``HardSwish``; empty: none."""

    def __str__(self) -> str:
        size, kernel, stride = (
            "x".join(map(str, pair)) for pair in (self.input_size, self.kernel, self.stride)
        )
        if self.operator == "linear":
            words = [f"linear layer, {self.input_size[0]} positions"]
        else:
            words = [f"{kernel} convolution of {size}, stride {stride}"]
            words += {0: ["depthwise"], 1: []}.get(self.groups, [f"{self.groups} groups"])
            words += [f"padding {list(self.padding)}"] if any(self.padding) else []
            words += [f"dilation {list(self.dilation)}"] if self.dilation != (1, 1) else []
        return ", ".join([*words, *([self.activation] if self.activation else [])])


@dataclass(frozen=True, kw_only=True)
class CostPoint:
    """One measured cost: of a layer, at two widths."""

    in_width: int
    out_width: int
    latency_us: float
    """Of one layer: the slope between chains of few and of many repeats. Where a chain alternates
    between a layer and its mirror (in and out exchanged), the mean of the two."""
    latency_us_low: float
    latency_us_high: float
    """The interval of the slope over rounds; 0 below where a round could not tell it from zero."""
    energy_uj: float | None = None
    """Likewise in microjoules; None where no meter measures here."""
    energy_uj_low: float | None = None
    energy_uj_high: float | None = None


@dataclass(frozen=True, kw_only=True)
class ShapeCosts:
    """A shape's measured points: a grid over input and output widths."""

    shape: LayerShape
    mirrored: bool
    """Each point stands for (in, out) and for (out, in): their mean."""
    points: tuple[CostPoint, ...]


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """What layers cost on one device, by one runtime, in one precision, on so many threads."""

    schema_version: int = SCHEMA_VERSION
    kind: str = KIND
    target: str
    runtime: str
    """By :func:`greenprune.registry.runtime_name`: the precision is in it."""
    threads: int
    machine: dict[str, Any]
    """The target's probe of the device; tables of another device are refused."""
    versions: dict[str, str | None]
    block_width: int
    """Found by a probe: the width that this device's kernels are blocked for."""
    block_probe: tuple[CostPoint, ...]
    """What it was found by: one layer at every width."""
    costs: tuple[ShapeCosts, ...]
    meter: str = "none"
    provenance: str = "measured"
    seconds: float = 0.0
    correction: dict[str, float] = field(default_factory=dict)
    """What whole networks taught: a network takes ``slope`` times the sum of its layers' latencies,
    and ``layer_us`` for each of them; the dense one took ``dense_ms``, the narrowest
    ``narrowest_ms``, and where joules were measured ``dense_mj`` and ``narrowest_mj``. Empty: none
    did."""


def find_block(points: Sequence[CostPoint]) -> int:
    """The width that a device's kernels are blocked for: 1, 2, 4, 8, 16 or 32.

    It is the largest b such that widths that end halfway through a block of b save next to nothing
    over the whole block. For each block of b whose upper edge was measured, the widest width in
    its lower half stands for these. Without blocks its cost would lie on the line from the edge
    below to the upper edge; with blocks of b it is that of the upper edge, or more, where a
    remainder takes slow kernels. Blocks of b are found where these widths save, summed over the
    blocks as shares of the upper edges' costs, less than half of what the line says.
    (Our definition.) At width 0 the cost is 0.

    Args:
        points: one layer at many widths, in = out; best at every width from a few to 40 or more.
    """
    cost = {0: 0.0} | {point.out_width: point.latency_us for point in points}
    for block in BLOCKS:
        saved = expected = 0.0
        for edge in (width for width in cost if width and width % block == 0):
            half = [w for w in cost if edge - block < w <= edge - block // 2]
            if not half:
                continue
            width, below = max(half), max(w for w in cost if w <= edge - block)
            saved += 1 - cost[width] / cost[edge]
            share = (edge - width) / (edge - below)
            expected += share * (1 - cost[below] / cost[edge])
        if expected > 0 and saved < expected / 2:
            return block
    return 1


def write(table: CostTable, path: Path) -> None:
    """Write a table as JSON, whole or not at all.

    Raises:
        MeasurementError: the table holds what :func:`read` would refuse.
        StorageError: it cannot be written.
    """
    _check(table, path)
    storage.write_json(path, schema.encode(table))


def read(path: Path) -> CostTable:
    """Read what :func:`write` wrote.

    Raises:
        MeasurementError: the file is missing, damaged, of another kind or schema, or holds numbers
            that no measurement gives.
    """
    try:
        content = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise MeasurementError(
            f"{path}: expected a cost table: {error.strerror or error}; {REMEDY}"
        ) from error
    except (msgspec.DecodeError, RecursionError) as error:  # NaN is none of JSON's numbers
        raise MeasurementError(
            f"{path}: a damaged cost table: {error}; copy it again, or measure again"
        ) from error
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind != KIND:
        raise MeasurementError(f"{path}: expected kind '{KIND}', found {kind!r}; {REMEDY}")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise MeasurementError(
            f"{path}: a cost table of schema {content.get('schema_version')}, this version of "
            f"greenprune reads {SCHEMA_VERSION}; measure again"
        )
    table = schema.decode(content, CostTable, str(path), MeasurementError)
    _check(table, path)
    return table


def _check(table: CostTable, path: Path) -> None:
    for name in ("block_width", "threads"):
        if getattr(table, name) < 1:
            raise MeasurementError(
                f"{path}: expected a {name} of 1 and more, found {getattr(table, name)}; "
                "measure again"
            )
    shapes = [costs.shape for costs in table.costs]
    if len(set(shapes)) < len(shapes):
        raise MeasurementError(f"{path}: a shape stands there twice; measure again")
    for costs in table.costs:
        widths = [(point.in_width, point.out_width) for point in costs.points]
        if not widths or len(set(widths)) < len(widths):
            raise MeasurementError(
                f"{path}: {costs.shape}: expected points, each pair of widths once"
            )
        for point in costs.points:
            _check_point(point, f"{path}: {costs.shape}, {point.in_width} to {point.out_width}")
    for point in table.block_probe:
        _check_point(point, f"{path}: block probe, width {point.out_width}")


def _check_point(point: CostPoint, where: str) -> None:
    if min(point.in_width, point.out_width) < 1:
        raise MeasurementError(f"{where}: expected widths of 1 and more; measure again")
    for name in ("latency_us", "energy_uj"):
        parts = [getattr(point, f"{name}{end}") for end in ("_low", "", "_high")]
        if parts == [None] * 3:
            continue
        low, value, high = (math.nan if part is None else part for part in parts)
        if not (0 <= low <= value <= high < math.inf and value > 0):
            raise MeasurementError(
                f"{where}: expected a finite {name} above zero within its interval, found "
                f"{parts[1]} in {parts[0]} to {parts[2]}; measure again"
            )


def describe_machine(target: Target) -> dict[str, Any]:
    """What a table is bound to: the target's probe of this machine and, where it computes on one,
    the GPUs and their drivers."""
    found = target.probe()
    if "nvml" in target.capabilities.meters:
        from greenprune.harness.conditions import gpus

        found["gpus"] = [f"{gpu['name']}, driver {gpu['driver']}" for gpu in gpus()]
    return found


def check_device(
    table: CostTable, *, target: str, runtime: str, threads: int, machine: dict[str, Any]
) -> None:
    """Refuse a table that was not measured on this device, by this runtime.

    Args:
        table: as it was read.
        target: its name.
        runtime: its name, with the precision.
        threads: of a session, as :func:`greenprune.cores.session_threads` answers them.
        machine: from :func:`describe_machine`; of its versions the runtime's alone counts.

    Raises:
        MeasurementError: it names all that differs.
    """
    base = split_runtime(runtime)[0]

    def facts(target: str, runtime: str, threads: int, machine: dict[str, Any]) -> dict[str, Any]:
        own = {key: value for key, value in machine.items() if key != "versions"}
        version = machine.get("versions", {}).get(base)
        told = {"target": target, "runtime": runtime, "threads": threads}
        return told | {f"version of {base}": version} | own

    measured = facts(table.target, table.runtime, table.threads, table.machine)
    here = facts(target, runtime, threads, machine)
    differing = [
        f"{key} (measured: {measured.get(key)}, here: {here.get(key)})"
        for key in {**measured, **here}
        if measured.get(key) != here.get(key)
    ]
    if differing:
        raise MeasurementError(
            f"the cost table is of another device or setting: {'; '.join(differing)}; {REMEDY}"
        )


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """Costs over ascending input and output widths; of a depthwise layer there is one row."""

    in_widths: Array
    out_widths: Array
    costs: Array
    """[input widths, output widths]; NaN where nothing is known."""


class Lookup:
    """A table's costs at any widths; build it once for many questions.

    A width that was not measured costs what the next one that was does, if that ends in the same
    block of the device, else what the whole block does. Between measured widths it interpolates, in
    both directions linearly (which is exact for what grows with the product of the widths). Below
    the smallest measured width it answers that width's cost, too much rather than too little; at
    width 0 there is no layer and no cost; above the largest it refuses. A point that lacks in a
    grid is interpolated from its row and column, or costs what the next wider layer does.
    """

    def __init__(self, table: CostTable) -> None:
        self._block = table.block_width
        self._latency = {c.shape: _grid(c, "latency_us") for c in table.costs}
        self._energy = {c.shape: _grid(c, "energy_uj") for c in table.costs}
        self._lacks = (
            "it was measured without a meter that measures"
            if table.meter == "none"
            else f"its meter, {table.meter}, failed in every round"
        )

    def latency_us(self, shape: LayerShape, in_widths: ArrayLike, out_widths: ArrayLike) -> Array:
        """Microseconds of one layer, float64, of the shape that the widths broadcast to.

        Args:
            shape: of the layer.
            in_widths: channels read; of a depthwise convolution the same as ``out_widths``.
            out_widths: channels written.

        Raises:
            MeasurementError: the table lacks the shape, or so large a width.
        """
        return self._find(self._latency, "microseconds", shape, in_widths, out_widths)

    def energy_uj(self, shape: LayerShape, in_widths: ArrayLike, out_widths: ArrayLike) -> Array:
        """Microjoules; as :meth:`latency_us`.

        Raises:
            MeasurementError: likewise, or the table was measured without a meter.
        """
        return self._find(self._energy, "microjoules", shape, in_widths, out_widths)

    def _find(
        self,
        grids: dict[LayerShape, _Grid],
        what: str,
        shape: LayerShape,
        in_widths: ArrayLike,
        out_widths: ArrayLike,
    ) -> Array:
        if shape not in grids:
            raise MeasurementError(f"the cost table lacks this layer: {shape}; {REMEDY}")
        grid = grids[shape]
        if np.isnan(grid.costs).all():
            raise MeasurementError(
                f"the cost table has no {what} of this layer: {shape}; {self._lacks}: use a budget "
                "of milliseconds, or measure where a meter does"
            )
        columns, rows = np.broadcast_arrays(
            np.asarray(in_widths, dtype=np.float64), np.asarray(out_widths, dtype=np.float64)
        )
        if shape.groups == 0 and not np.array_equal(columns, rows):
            raise MeasurementError(
                f"{shape}: expected as many channels out as in, it is depthwise; found "
                f"{columns.ravel().tolist()} and {rows.ravel().tolist()}"
            )
        costs = _interpolate(grid, self._block, columns, rows, shape, what)
        return np.where((columns == 0) | (rows == 0), 0.0, costs)


def _grid(costs: ShapeCosts, quantity: str) -> _Grid:
    """The points as an array; a mirrored shape's stand on both sides of the diagonal."""
    found: dict[tuple[int, int], float] = {}
    for point in costs.points:
        value = getattr(point, quantity)
        widths = (1 if costs.shape.groups == 0 else point.in_width, point.out_width)
        cost = math.nan if value is None else float(value)
        if costs.mirrored and costs.shape.groups:
            found.setdefault(widths[::-1], cost)
        found[widths] = cost
    ins, outs = (sorted({pair[side] for pair in found}) for side in (0, 1))
    grid = np.full((len(ins), len(outs)), math.nan)
    for (row, column), cost in found.items():
        grid[ins.index(row), outs.index(column)] = cost
    return _Grid(
        in_widths=np.array(ins, dtype=np.float64),
        out_widths=np.array(outs, dtype=np.float64),
        costs=_filled(np.array(ins, dtype=np.float64), np.array(outs, dtype=np.float64), grid),
    )


def _filled(ins: Array, outs: Array, grid: Array) -> Array:
    """The same without gaps, as far as may be.

    A gap between known values of its row or column, or of both, is interpolated; another has the
    least cost of the layers that are narrower on neither side. What is known of narrower layers
    alone stays NaN.
    """
    while np.isnan(grid).any() and not np.isnan(grid).all():
        along_rows = np.array([_between(outs, row) for row in grid])
        along_columns = np.array([_between(ins, column) for column in grid.T]).T
        both = np.stack([along_rows, along_columns])
        known = ~np.isnan(both)
        counts = known.sum(axis=0)
        means = np.where(known, both, 0.0).sum(axis=0) / np.maximum(counts, 1)
        after = np.where(np.isnan(grid) & (counts > 0), means, grid)
        if np.isnan(after).sum() == np.isnan(grid).sum():
            break
        grid = after
    filled = grid.copy()
    for row, column in np.argwhere(np.isnan(grid)):
        wider = grid[row:, column:]
        filled[row, column] = np.min(wider, initial=math.inf, where=~np.isnan(wider))
    filled[np.isinf(filled)] = math.nan
    return filled


def _between(widths: Array, values: Array) -> Array:
    known = ~np.isnan(values)
    if not known.any():
        return values
    return np.interp(widths, widths[known], values[known], left=math.nan, right=math.nan)


def _interpolate(
    grid: _Grid, block: int, columns: Array, rows: Array, shape: LayerShape, what: str
) -> Array:
    depthwise = shape.groups == 0
    total = np.zeros(columns.shape)
    ends = []
    for axis, widths in ((grid.in_widths, columns), (grid.out_widths, rows)):
        wanted = np.ones_like(widths) if depthwise and axis is grid.in_widths else widths
        if not (np.isfinite(wanted) & (wanted >= 0) & (wanted <= axis[-1])).all():
            raise MeasurementError(
                f"{shape}: expected widths of 0 to {axis[-1]:.0f}, the largest that was measured; "
                f"found {np.max(wanted):.0f}; {REMEDY}"
            )
        clamped = np.maximum(_whole_blocks(wanted, axis, block), axis[0])
        lower = np.clip(np.searchsorted(axis, clamped, side="right") - 1, 0, max(len(axis) - 2, 0))
        upper = np.minimum(lower + 1, len(axis) - 1)
        span = np.where(upper > lower, axis[upper] - axis[lower], 1.0)
        share = (clamped - axis[lower]) / span
        ends.append(((lower, 1 - share), (upper, share)))
    for row, row_share in ends[0]:
        for column, column_share in ends[1]:
            weight = row_share * column_share
            total += np.where(weight > 0, weight * grid.costs[row, column], 0.0)
    missing = np.isnan(total) & (columns > 0) & (rows > 0)
    if missing.any():
        first = tuple(np.argwhere(missing)[0])
        raise MeasurementError(
            f"{shape}: {columns[first]:.0f} to {rows[first]:.0f}: the table's {what} have no "
            f"points on all sides of these widths; {REMEDY}"
        )
    return total


def _whole_blocks(widths: Array, measured: Array, block: int) -> Array:
    """The end of each width's block, or the next measured width if that comes before."""
    following = measured[np.minimum(np.searchsorted(measured, widths), len(measured) - 1)]
    ends: Array = np.minimum(np.ceil(widths / block) * block, following)
    return ends
