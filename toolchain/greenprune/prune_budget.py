"""The stage that prices a network's layers on the target, and budgets held to these prices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from greenprune import compilation, cost_tables, models, processes, storage, whole_networks
from greenprune import stage_parts as parts
from greenprune.adaptive import selector
from greenprune.cores import session_threads
from greenprune.errors import MeasurementError, NotAvailableError, PruningError, StorageError
from greenprune.harness import cost_plan, cost_table, protocol
from greenprune.harness.cost_table import CostTable, LayerShape
from greenprune.harness.race import Race
from greenprune.pipeline import Job, Work
from greenprune.pruning import limits, optimise, probe_graphs, surgery, within
from greenprune.pruning.graph import Analysis
from greenprune.pruning.layer_shapes import PricedLayer, shapes_of
from greenprune.pruning.predictor import Predictor
from greenprune.recipe import Recipe
from greenprune.registry import load_target, split_runtime

STAGE = "price"
TABLE = "table.json"
RACED_IMAGES = 16
FINE = 4
"""Kernels are seldom blocked for fewer channels."""


def is_asked(recipe: Recipe) -> bool:
    """Whether a budget is in what only a device can tell."""
    return any(limit.quantity in within.MEASURED for limit in _limits(recipe))


def _in_joules(asked: Iterable[limits.Limit]) -> bool:
    return any(limit.quantity == "energy_mj" for limit in asked)


def _limits(recipe: Recipe) -> list[limits.Limit]:
    variants = (recipe.prune.mild, recipe.prune.aggressive)
    return [limit for own in variants for limit in limits.parse_all(own.budget)]


def preflight(job: Job) -> int:
    """What can be said of the budgets before anything is trained or measured.

    Returns:
        What widths will be multiples of: where the block width is still to be found, one that
        reaches what it will.

    Raises:
        PruningError: the device is not here, and there is no table of it; it is here, joules are
            limited, and no meter measures them.
        MeasurementError: the table is of another target or runtime, or damaged.
        NotAvailableError: steps under torchrun.
    """
    settings, asked = job.recipe.prune, _limits(job.recipe)
    if settings.steps > 1 and asked and processes.count() > 1:
        raise NotAvailableError("prune.steps above 1 under torchrun; use one process")
    if not is_asked(job.recipe):
        return width_multiple(job)
    if _in_joules(asked) and load_target(job.recipe.compile.target).is_here():
        _check_meter()
    if settings.cost_table is not None:
        return _multiple(job, _carried(job, Path(settings.cost_table), ()).block_width)
    _check_here(job)
    return _multiple(job, FINE)


def reach(
    job: Job, network: nn.Module, analysis: Analysis, example: Tensor, *, priced: bool
) -> None:
    """Whether budgets can be reached, as far as that is known without prices.

    Args:
        job: the run.
        network: the dense one, in eval mode.
        analysis: of it.
        example: [N, ...].
        priced: the stage that prices is done, and has found the block.

    Raises:
        GreenpruneError: see :func:`preflight`.
        BudgetError: one cannot.
    """
    multiple = preflight(job)
    if priced:
        multiple = found_multiple(job)
    for variant in parts.PRUNED:
        if getattr(job.recipe.prune, variant).budget:
            terms = terms_of(job, variant, multiple)
            within.check_reachable(terms, network, analysis, example, {})


def _check_meter() -> None:
    with protocol.one_at_a_time():
        name, _ = protocol.real_meter("auto")
    if name == "none":
        raise PruningError(
            "budgets in energy need a meter that measures on this machine, and there are no joules "
            "without one (`greenprune doctor` says why); ask for latency instead"
        )


def _carried(job: Job, path: Path, layers: Sequence[PricedLayer]) -> CostTable:
    """The table that the recipe names, of the device and the precision that it is for."""
    target, threads = load_target(job.recipe.compile.target), job.recipe.threads
    if target.is_here():
        threads = session_threads(threads)  # elsewhere 0 are as many as that device has
    table = cost_tables.table_from_file(path, layers, target=target.name, threads=threads or None)
    wanted = _in_precision(job)
    if table.runtime not in wanted:
        raise MeasurementError(
            f"{path}: expected a cost table of {' or '.join(wanted)}, as compile.runtimes and "
            f"compile.precision have it, it is of '{table.runtime}'; measure one, or change them"
        )
    if target.is_here():
        cost_table.check_device(
            table,
            target=target.name,
            runtime=table.runtime,
            threads=table.threads,
            machine=cost_table.describe_machine(target),
        )
    return table


def price(work: Work) -> dict[str, Any]:
    """Measure what the network's layers cost, or take the table that was carried back; find out
    now, and not after hours of training, whether the budgets can be reached."""
    job = work.job
    network, example = parts.load(job, "train")[0], parts.example_of(job.data)
    analysis = surgery.analyse_and_try(network, example)
    # other budgets than those that training began with
    reach(job, network, analysis, example, priced=False)
    layers = shapes_of(network, example, analysis)
    target = job.recipe.compile.target
    if job.recipe.prune.cost_table is not None:
        carried = _carried(job, Path(job.recipe.prune.cost_table), layers)
        table = replace(carried, correction={})  # what other networks taught
        source = "carried back"
    else:
        table = cost_tables.table_for(
            layers,
            target=target,
            runtime=_fastest(job, network),
            threads=job.recipe.threads,
            network=job.recipe.name,
            grid_block=job.recipe.prune.width_multiple,
            joules=_in_joules(_limits(job.recipe)),
        )
        source = f"{table.seconds:.0f} s of measuring"
    if load_target(target).is_here():
        table = _taught(job, network, analysis, layers, table)
    cost_table.write(table, work.folder / TABLE)
    predictor = Predictor(layers, table)
    if _in_joules(_limits(job.recipe)):
        predictor.energy_mj({})  # which says what the table lacks
    prices = predictor.prices()
    shown = _shown(table)
    for variant in parts.PRUNED:
        terms = terms_of(job, variant, _multiple(job, table.block_width))
        within.check_reachable(terms, network, analysis, example, prices, shown)
    probed = f", kernels in blocks of {table.block_width}" if table.block_probe else ""
    return {
        "runtime": table.runtime,
        "threads": table.threads,
        "block_width": table.block_width,
        "shapes": len(table.costs),
        "headline": f"{len(table.costs)} shapes on {table.runtime} ({source}){probed}",
    }


def _shown(table: CostTable) -> dict[str, tuple[float, float]]:
    """By quantity, what the dense and the narrowest network that taught the table have taken."""
    told = table.correction
    return {
        quantity: (told[f"dense_{unit}"], told[f"narrowest_{unit}"])
        for quantity, unit in (("latency_ms", "ms"), ("energy_mj", "mj"))
        if f"dense_{unit}" in told
    }


def _taught(
    job: Job,
    network: nn.Module,
    analysis: Analysis,
    layers: Sequence[PricedLayer],
    table: CostTable,
) -> CostTable:
    """See :func:`greenprune.cost_tables.taught`."""

    def measure(networks: Mapping[str, nn.Module]) -> dict[str, tuple[float, float | None]]:
        joules = _in_joules(_limits(job.recipe))
        (racer,) = _race(job, networks, [table.runtime], joules=joules).racers
        energy = {name: each.value for name, each in racer.energy_mj.items() if each is not None}
        return {name: (each.value, energy.get(name)) for name, each in racer.latency_ms.items()}

    return cost_tables.taught(
        table,
        network,
        analysis,
        layers,
        width_multiple=_multiple(job, table.block_width),
        keep_at_least=job.recipe.prune.keep_at_least,
        measure=measure,
    )


def write_graphs(job: Job, output: Path, runtime: str | None) -> Path:
    """What a device elsewhere measures its table from; see :func:`greenprune.api.cost_graphs`."""
    if output.exists() and not (output / cost_plan.PLAN).is_file():
        raise StorageError(
            f"{output}: exists and is no folder of graphs for a cost table; choose another with -o"
        )
    model = job.recipe.model
    network = models.build(model.factory, model.arguments).eval()
    example = parts.example_of(job.data)
    analysis = surgery.analyse_and_try(network, example)
    layers = shapes_of(network, example, analysis)
    probe_graphs.write_folder(
        output,
        probe_graphs.grids(layers, width_multiple(job)),
        probe_graphs.block_grid(layers),
        target=load_target(job.recipe.compile.target),
        runtime=runtime or _in_precision(job)[0],
        network=job.recipe.name,
    )
    return output


def _in_precision(job: Job) -> list[str]:
    """The target's runtimes, in the precision that is asked for."""
    precision = job.recipe.compile.precision
    return [name for name in compilation.runtimes(job) if split_runtime(name)[1] == precision]


def _fastest(job: Job, network: nn.Module) -> str:
    """The runtime that the dense network is fastest on, in the precision that is asked for."""
    wanted = _in_precision(job)
    if len(wanted) == 1:
        return wanted[0]
    return _race(job, {"dense": network}, wanted).order[0]


def _check_here(job: Job) -> None:
    if not load_target(job.recipe.compile.target).is_here():
        raise PruningError(
            f"budgets in latency or energy of '{job.recipe.compile.target}' need a table measured "
            "on it, and this machine is none; write the graphs with `greenprune cost-table`, "
            "measure them there, and name the table in prune.cost_table"
        )


def _race(
    job: Job,
    networks: Mapping[str, nn.Module],
    runtimes: Sequence[str],
    *,
    joules: bool = False,
) -> Race:
    int8 = any(split_runtime(name)[1] == "int8" for name in runtimes)
    return whole_networks.race_networks(
        job.recipe.compile.target,
        networks,
        runtimes,
        parts.training_images(job, RACED_IMAGES, seed=job.recipe.seed + 4),
        calibration=compilation.calibration_images(job) if int8 else None,
        threads=job.recipe.threads,
        seed=job.recipe.seed,
        joules=joules,
    )


def terms_of(job: Job, variant: str, multiple: int) -> within.Terms:
    """What a variant may cost in the end, in widths that are multiples of one."""
    settings = job.recipe.prune
    return within.Terms(
        limits=limits.parse_all(getattr(settings, variant).budget),
        width_multiple=multiple,
        keep_at_least=settings.keep_at_least,
        blocks=settings.blocks,
    )


def width_multiple(job: Job) -> int:
    """What the recipe says, or what the target's kernels are taken to be blocked for."""
    target = load_target(job.recipe.compile.target)
    return job.recipe.prune.width_multiple or target.capabilities.width_multiple


def found_multiple(job: Job) -> int:
    """Likewise; where a table was measured, of the block that its probe found if that is less."""
    if not is_asked(job.recipe):
        return width_multiple(job)
    return _multiple(job, int(job.results(STAGE)["block_width"]))


def _multiple(job: Job, block: int) -> int:
    return job.recipe.prune.width_multiple or min(block, width_multiple(job))


def prices_sha256(job: Job) -> str:
    """Of the run's table, by which decisions are known; empty where no budget asks for one."""
    return storage.sha256(job.place(STAGE) / TABLE) if is_asked(job.recipe) else ""


def price_of(job: Job) -> within.Price:
    """What the run's table says of a network; nothing where no budget asks for one."""
    if not is_asked(job.recipe):
        return lambda network, analysis: {}
    job.results(STAGE)  # finished, and up to date
    table: CostTable = cost_table.read(job.place(STAGE) / TABLE)
    example = parts.example_of(job.data)
    dense = parts.load(job, "train")[0]
    whole = shapes_of(dense, example, surgery.analyse_and_try(dense, example))

    def of(network: nn.Module, analysis: Analysis) -> dict[str, optimise.Prices]:
        return Predictor(as_priced(shapes_of(network, example, analysis), whole), table).prices()

    return of


def as_priced(
    layers: Iterable[PricedLayer], whole: Iterable[PricedLayer]
) -> tuple[PricedLayer, ...]:
    """What is left of a network, each call with the shape that it had in the ``whole`` one: what a
    removed block leaves may follow a layer otherwise, and a convolution in groups may have lost
    some, but the table knows them as they were."""
    shapes: dict[str, list[LayerShape]] = {}
    for layer in whole:
        shapes.setdefault(layer.module, []).append(layer.shape)
    calls = {module: iter(own) for module, own in shapes.items()}
    return tuple(replace(layer, shape=next(calls[layer.module])) for layer in layers)


def measure_of(job: Job, variant: str) -> within.Measure | None:
    """How two networks are measured side by side; None where the device is not here.

    The aggressive one has a selector's head on, as it will be shipped.
    """
    if not is_asked(job.recipe) or not load_target(job.recipe.compile.target).is_here():
        return None
    runtime = str(job.results(STAGE)["runtime"])

    joules = _in_joules(limits.parse_all(getattr(job.recipe.prune, variant).budget))

    def measure(dense: nn.Module, pruned: nn.Module) -> dict[str, tuple[float, float]]:
        if variant == "aggressive":
            pruned = _with_head(job, pruned)
        networks = {"dense": dense, "pruned": pruned}
        (racer,) = _race(job, networks, [runtime], joules=joules).racers
        latency, energy = racer.latency_ms, racer.energy_mj
        found = {"latency_ms": (latency["dense"].value, latency["pruned"].value)}
        if joules:
            both = energy["dense"], energy["pruned"]
            if both[0] is None or both[1] is None:
                raise MeasurementError(
                    "joules: the meter failed in every window of the dense or the pruned network; "
                    "`greenprune doctor` says what it reads"
                )
            found["energy_mj"] = (both[0].value, both[1].value)
        return found

    return measure


def _with_head(job: Job, network: nn.Module) -> nn.Module:
    """The network and a selector's head, which costs the same whatever it will have learned; alone
    where no selector can read it, so that it can be pruned and nothing more."""
    try:
        return selector.untrained(network, parts.example_of(job.data), job.recipe.selector.hidden)
    except PruningError:
        return network
