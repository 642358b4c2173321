"""A cost table for a network: out of the cache, measured here, or carried back from a device."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
import numpy as np
from torch import nn

from greenprune import storage
from greenprune.cores import session_threads
from greenprune.errors import GreenpruneError, MeasurementError, StorageError, TargetError
from greenprune.harness import cost_plan, cost_probe, cost_table
from greenprune.harness.cost_table import CostTable
from greenprune.progress import say
from greenprune.pruning import probe_graphs, surgery
from greenprune.pruning.graph import Analysis
from greenprune.pruning.layer_shapes import PricedLayer
from greenprune.pruning.predictor import Predictor, learn
from greenprune.pruning.probe_graphs import Grid
from greenprune.registry import Target, device_kind, load_target
from greenprune.schema import encode

TAUGHT_SHARES = (1.0, 0.7, 0.45)
"""Of the dense network's widths, of networks that teach what the sum over layers does not know."""
RUNNERS = 2
"""Raised where a target's runner changes what a network costs: tables of before are not taken."""


@dataclass(frozen=True)
class _Setting:
    """How a table is measured, and the folder of the cache that is for it."""

    folder: Path
    device: Target
    runtime: str
    threads: int
    network: str


def table_for(
    layers: Sequence[PricedLayer],
    *,
    target: str,
    runtime: str,
    threads: int = 0,
    network: str = "the network",
    grid_block: int | None = None,
    joules: bool = False,
    cache: Path | None = None,
) -> CostTable:
    """The cost table of a network's layers on this machine.

    The width that the device's kernels are blocked for is found first, and the grid has its
    multiples, with finer ones where groups are narrow. Taken from the cache where it has one of
    this device, runtime and its version, precision and threads that was measured at all of the
    layers' grid; else measured, and kept there. A measurement that was interrupted goes on where it
    was.

    Args:
        layers: see :func:`~greenprune.pruning.layer_shapes.shapes_of`.
        target: this machine is such a device.
        runtime: by :func:`greenprune.registry.runtime_name`.
        threads: of a session; 0 means one for each core.
        network: what people call the network.
        grid_block: widths are measured at multiples of it; None: of the block that was found.
        joules: a table in the cache that has none will not do.
        cache: None: ``$XDG_CACHE_HOME/greenprune/cost-tables``, else under ``~/.cache``.

    Raises:
        TargetError: this machine is no such device, or the target has no such runtime.
        MeasurementError: a layer cannot be measured.
        StorageError: the cache cannot be written.
    """
    device = load_target(target)
    if not device.is_here():
        raise TargetError(
            f"target '{device.name}': expected to measure costs on {device_kind(device)}, this "
            "machine is none; write the folder of graphs here, measure it there with "
            "greenprune-bench --cost-table FOLDER -o table.json, and give that table"
        )
    threads = session_threads(threads)
    folder = (cache or storage.user_cache("cost-tables")) / _key(device, runtime, threads)
    setting = _Setting(folder, device, runtime, threads, network)
    found = _kept(setting, layers, grid_block, joules)
    if found is None:
        with _locked(folder):
            found = _kept(setting, layers, grid_block, joules)  # another run may have measured it
            found = found or _made(setting, layers, grid_block)
    probed, table = found
    Predictor(layers, table)  # has it all
    if probed is None:
        return table
    return replace(
        table,
        block_width=probed.block_width,
        block_probe=probed.block_probe,
        seconds=probed.seconds + table.seconds,
    )


_Found = tuple[CostTable | None, CostTable]
"""The block width's table, where there is one, and the grid's."""


def _kept(
    setting: _Setting, layers: Sequence[PricedLayer], grid_block: int | None, joules: bool
) -> _Found | None:
    """What the cache has, if it has all."""
    block = probe_graphs.block_grid(layers)
    probed = _opened(setting, _path(setting, (), block)) if block else None
    if block and probed is None:
        return None
    wanted = _wanted(setting, layers, grid_block, probed)
    tables = _cached(setting, wanted)
    if joules:
        tables = (each for each in tables if "energy_mj" in Predictor(layers, each).prices())
    table = next(tables, None)
    return None if table is None else (probed, table)


def _made(setting: _Setting, layers: Sequence[PricedLayer], grid_block: int | None) -> _Found:
    block = probe_graphs.block_grid(layers)
    probed = None
    if block:
        probed = _opened(setting, _path(setting, (), block)) or _measured(setting, (), block)
    return probed, _measured(setting, _wanted(setting, layers, grid_block, probed), None)


def _wanted(
    setting: _Setting,
    layers: Sequence[PricedLayer],
    grid_block: int | None,
    probed: CostTable | None,
) -> tuple[Grid, ...]:
    usual = setting.device.capabilities.width_multiple
    block = grid_block or (probed.block_width if probed else usual)
    return probe_graphs.grids(layers, block, min(block, usual))


def taught(
    table: CostTable,
    network: nn.Module,
    analysis: Analysis,
    layers: Sequence[PricedLayer],
    *,
    width_multiple: int,
    keep_at_least: float,
    measure: Callable[[Mapping[str, nn.Module]], Mapping[str, tuple[float, float | None]]],
) -> CostTable:
    """The table with what whole networks teach: the dense one, and it evenly cut to some widths,
    down to the narrowest that a budget can lead to.

    Args:
        table: of the network.
        network: the dense one, in eval mode.
        analysis: of it.
        layers: of it; see :func:`~greenprune.pruning.layer_shapes.shapes_of`.
        width_multiple: widths are multiples of it.
        keep_at_least: share of its channels that each group keeps.
        measure: milliseconds and, where they are measured, millijoules of several networks, side
            by side on the table's runtime.
    """
    whole = np.array([group.channels for group in analysis.groups])
    shares = np.array([*(share for share in TAUGHT_SHARES if share > keep_at_least), keep_at_least])
    widths = width_multiple * np.ceil(shares[:, None] * whole / width_multiple).astype(np.int64)
    lost = np.unique(whole - np.minimum(widths, whole), axis=0)  # [networks, groups]
    if len(lost) == 1:
        return table  # nothing can be narrower
    networks = {
        f"network {place}": surgery.compact(
            network,
            analysis,
            {group.name: range(n) for group, n in zip(analysis.groups, row, strict=True) if n},
        )
        for place, row in enumerate(lost.tolist())
    }
    measured = measure(networks)
    measured_ms = [measured[name][0] for name in networks]
    joules = [measured[name][1] for name in networks]
    counts = {group.name: n for group, n in zip(analysis.groups, lost.T, strict=True)}
    found = learn(Predictor(layers, table).summed_ms(counts), measured_ms)
    correction = {
        "layer_us": found["intercept_us"] / len(layers),
        "slope": found["slope"],
        "dense_ms": measured_ms[0],
        "narrowest_ms": measured_ms[-1],
    }
    if joules[0] is not None and joules[-1] is not None:
        correction |= {"dense_mj": joules[0], "narrowest_mj": joules[-1]}
    return replace(table, correction=correction)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two runs that want one table measure it once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            say(f"{folder}: another run measures there; waiting for it to end")
            lock.acquire()
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot keep cost tables there: {error.strerror or error}; set "
            "XDG_CACHE_HOME to a folder that can be written"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _path(setting: _Setting, planned: Sequence[Grid], block: Grid | None) -> Path:
    return setting.folder / f"{storage.sha256_of(encode([planned, block]))[:16]}.json"


def _measured(setting: _Setting, planned: Sequence[Grid], block: Grid | None) -> CostTable:
    path = _path(setting, planned, block)
    what = f"block width for {setting.network}" if block else f"cost table of {setting.network}"
    say(f"{what}: measuring on {setting.runtime}, to be kept in {path}")
    graphs = path.with_suffix(".graphs")  # kept until the table is: a resumed one measures the same
    if not _whole(graphs):
        probe_graphs.write_folder(
            graphs,
            planned,
            block,
            target=setting.device,
            runtime=setting.runtime,
            network=setting.network,
        )
    table = cost_probe.measure(graphs, path, threads=setting.threads)
    shutil.rmtree(graphs, ignore_errors=True)
    return table


def table_from_file(
    path: Path,
    layers: Sequence[PricedLayer],
    *,
    target: str,
    runtime: str | None = None,
    threads: int | None = None,
) -> CostTable:
    """A table that was measured on a device and carried back.

    Args:
        path: as ``greenprune-bench --cost-table`` wrote it.
        layers: of the network that it is for.
        target: the kind of device.
        runtime: as :func:`table_for`; None: whichever it was measured by.
        threads: of a session there; None: however many it was measured with.

    Raises:
        MeasurementError: there is no such table, it is damaged, of another target, runtime or
            number of threads, or it lacks a layer.
    """
    table = cost_table.read(path)
    device = load_target(target)
    wanted = {
        "target": (device.name, table.target),
        "runtime": (runtime or table.runtime, table.runtime),
        "threads": (table.threads if threads is None else threads, table.threads),
    }
    for what, (expected, found) in wanted.items():
        if expected != found:
            raise MeasurementError(
                f"{path}: expected a cost table of {what} '{expected}', it is of '{found}'; "
                "measure one there"
            )
    try:
        Predictor(layers, table)
    except MeasurementError as error:
        raise MeasurementError(f"{path}: {error}") from error
    return table


def _key(device: Target, runtime: str, threads: int) -> str:
    """A folder's name: tables in it were measured on one device in one way."""
    machine = cost_table.describe_machine(device)
    content = [cost_table.SCHEMA_VERSION, RUNNERS, device.name, machine, runtime, threads]
    return f"{device.name}-{runtime}-{storage.sha256_of(content)[:16]}"


def _cached(setting: _Setting, wanted: Sequence[Grid]) -> Iterator[CostTable]:
    """Tables in the cache with all points wanted: that of a wider network says little of narrow
    layers."""
    tables = (_opened(setting, path) for path in sorted(setting.folder.glob("*.json")))
    return (table for table in tables if table and all(_has(table, grid) for grid in wanted))


def _opened(setting: _Setting, path: Path) -> CostTable | None:
    """None where there is none, where it does not open, or is of another device after all."""
    try:
        table = cost_table.read(path)
        cost_table.check_device(
            table,
            target=setting.device.name,
            runtime=setting.runtime,
            threads=setting.threads,
            machine=cost_table.describe_machine(setting.device),
        )
    except GreenpruneError:
        return None
    return table


def _has(table: CostTable, grid: Grid) -> bool:
    points: set[tuple[int, int]] = set()
    for costs in table.costs:
        if costs.shape == grid.shape:
            own = {(point.in_width, point.out_width) for point in costs.points}
            points = own | {each[::-1] for each in own} if costs.mirrored else own
    return points.issuperset((*grid.chains, *grid.fans))


def _whole(graphs: Path) -> bool:
    try:
        cost_plan.read_plan(graphs)
    except MeasurementError:
        return False
    return True
