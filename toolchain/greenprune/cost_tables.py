"""A cost table for a network: out of the cache, measured here, or carried back from a device."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from greenprune import storage
from greenprune.cores import session_threads
from greenprune.errors import GreenpruneError, MeasurementError, TargetError
from greenprune.harness import cost_plan, cost_probe, cost_table
from greenprune.harness.cost_table import CostTable
from greenprune.progress import say
from greenprune.pruning import probe_graphs
from greenprune.pruning.layer_shapes import PricedLayer
from greenprune.pruning.predictor import Predictor
from greenprune.pruning.probe_graphs import Grid
from greenprune.registry import Target, device_kind, load_target
from greenprune.schema import encode


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

    Taken from the cache where it has one of this device, runtime and its version, precision and
    threads that was measured at all of the layers' grid; else measured, and kept there. A
    measurement that was interrupted goes on where it was.

    Args:
        layers: see :func:`~greenprune.pruning.layer_shapes.shapes_of`.
        target: this machine is such a device.
        runtime: by :func:`greenprune.registry.runtime_name`.
        threads: of a session; 0 means one for each core.
        network: what people call the network.
        grid_block: widths are measured at multiples of it; None: the target's ``width_multiple``.
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
    block = grid_block or device.capabilities.width_multiple
    threads = session_threads(threads)
    folder = (cache or storage.user_cache("cost-tables")) / _key(device, runtime, threads, block)
    wanted = probe_graphs.grids(layers, block)
    found = _cached(folder, wanted, device, runtime, threads)
    if found is not None and (not joules or "energy_mj" in Predictor(layers, found).prices()):
        return found
    path = folder / f"{storage.sha256_of(encode(wanted))[:16]}.json"
    say(f"cost table of {network}: measuring on {runtime}, to be kept in {path}")
    graphs = path.with_suffix(".graphs")  # kept until the table is: a resumed one measures the same
    if not _whole(graphs):
        probe_graphs.write_folder(
            graphs, layers, target=device, runtime=runtime, network=network, grid_block=block
        )
    table = cost_probe.measure(graphs, path, threads=threads)
    shutil.rmtree(graphs, ignore_errors=True)
    Predictor(layers, table)  # has it all
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


def _key(device: Target, runtime: str, threads: int, block: int) -> str:
    """A folder's name: tables in it were measured on one device in one way."""
    machine = cost_table.describe_machine(device)
    content = [cost_table.SCHEMA_VERSION, device.name, machine, runtime, threads, block]
    return f"{device.name}-{runtime}-{storage.sha256_of(content)[:16]}"


def _cached(
    folder: Path, wanted: Sequence[Grid], device: Target, runtime: str, threads: int
) -> CostTable | None:
    """A table in the cache with all points wanted; others, and what does not open, are passed
    over: that of a wider network says little of narrow layers."""
    for path in sorted(folder.glob("*.json")):
        try:
            table = cost_table.read(path)
            cost_table.check_device(
                table,
                target=device.name,
                runtime=runtime,
                threads=threads,
                machine=cost_table.describe_machine(device),
            )
        except GreenpruneError:
            continue
        if all(_has(table, grid) for grid in wanted):
            return table
    return None


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
