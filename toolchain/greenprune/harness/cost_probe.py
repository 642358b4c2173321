"""Measuring a cost table: chains of one layer, from a folder of graphs that the host wrote.

A single layer's time is mostly dispatch and reorders, so each point of the grid comes as two chains
of few and of many layers, and what one layer costs is the slope between them. All points are
measured in rounds, so that a slow minute falls on one round of each; a round has a process of its
own, which opens one chain at a time, the two of a point right after each other, so that the clock
that both ran at is one.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from greenprune import schema, storage
from greenprune.cores import session_threads
from greenprune.errors import MeasurementError, TargetError
from greenprune.harness import cost_table, protocol
from greenprune.harness.client import Client
from greenprune.harness.cost_plan import PLAN, Chain, ProbePlan, ProbeShape, read_plan
from greenprune.harness.cost_table import CostPoint, CostTable, ShapeCosts, find_block
from greenprune.harness.cost_worker import window_seconds
from greenprune.harness.environment import versions
from greenprune.harness.statistics import order_interval
from greenprune.progress import Advance, progress, say
from greenprune.registry import Target, device_kind, load_target, split_runtime

WORKER = "greenprune.harness.cost_worker"
EXTRA_ROUNDS = 3
"""So many more for points that are in doubt after the first rounds."""
SPREAD = 0.3
"""An interval wider than this share of its value leaves a point in doubt."""
SAVE_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Window:
    """Two chains of one point, measured right after each other: of few layers, and of many."""

    round: int
    pair: int
    """Which of the plan's distinct pairs of chains."""
    latency_us: tuple[float, float]
    energy_uj: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class _Partial:
    """What an interrupted measurement leaves beside the output."""

    key: str
    """A hash of the plan, the machine, the versions and the settings."""
    seconds: float
    windows: tuple[Window, ...]


@dataclass(kw_only=True)
class _Progress:
    """A measurement under way, and its file."""

    path: Path
    key: str
    before_seconds: float = 0.0
    windows: list[Window] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    saved: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return self.before_seconds + time.monotonic() - self.started

    def save(self) -> None:
        partial = _Partial(key=self.key, seconds=self.seconds, windows=tuple(self.windows))
        storage.write_json(self.path, schema.encode(partial))
        self.saved = time.monotonic()


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What all rounds share."""

    folder: Path
    target: str
    runtime: str
    threads: int
    meter: str
    period_seconds: float
    """Of the meter's updates; 0 without one."""
    seed: int


def measure(
    folder: Path,
    output: Path,
    *,
    threads: int = 0,
    meter: str = "auto",
    rounds: int = 3,
    seed: int = 0,
) -> CostTable:
    """Measure a folder of graphs on this machine and write its cost table.

    A point's cost is the median of its slopes over the rounds, with the interval of
    :func:`~greenprune.harness.statistics.order_interval`. A point is in doubt where the interval
    reaches zero or is wide; it is measured in three more rounds. Where the interval still reaches
    zero its lower end is 0, and where the median does too, the value is the interval's middle.

    An interrupted measurement is resumed by the same command: what was measured stands in
    ``<output>.partial.json`` until the table is complete.

    Args:
        folder: written by the host; see :func:`read_plan`.
        output: the table's file.
        threads: CPU threads of a session; 0 means one for each core.
        meter: see :func:`greenprune.meters.open_meter`; an estimate gives a table no joules.
        rounds: in which every point is measured.
        seed: of the order within rounds.

    Raises:
        MeasurementError: the folder is damaged, this is not the device, a chain cannot be run, or
            a layer's cost cannot be told from nothing at all.
        TargetError: the runtime is not installed here.
        StorageError: the output cannot be written.
    """
    if rounds < 1:
        raise MeasurementError(f"rounds = {rounds}: expected 1 or more")
    if output.is_dir():
        raise MeasurementError(f"{output}: is a folder; expected a file, or a new name")
    plan = read_plan(folder)
    target = _device(plan)
    with protocol.one_at_a_time():
        name, period_seconds = protocol.real_meter(meter)
        settings = _Settings(
            folder=folder.resolve(),
            target=plan.target,
            runtime=plan.runtime,
            threads=session_threads(threads),
            meter=name,
            period_seconds=period_seconds,
            seed=seed,
        )
        machine, found = cost_table.describe_machine(target), versions()
        key = [storage.sha256(folder / PLAN), machine, found, settings.threads, name]
        state = _resume(output, storage.sha256_of(key))
        _run_rounds(plan, settings, rounds, state)
        costs = _conclude(plan, state)
    block_probe = _points(plan.block, costs) if plan.block else ()
    table = CostTable(
        target=plan.target,
        runtime=plan.runtime,
        threads=settings.threads,
        machine=machine,
        versions=dict(found),
        block_width=find_block(block_probe) if block_probe else target.capabilities.width_multiple,
        block_probe=block_probe,
        costs=tuple(
            ShapeCosts(shape=each.shape, mirrored=each.mirrored, points=_points(each, costs))
            for each in plan.shapes
        ),
        meter=name,
        seconds=state.seconds,
    )
    cost_table.write(table, output)
    state.path.unlink(missing_ok=True)
    return table


def _device(plan: ProbePlan) -> Target:
    """The plan's target, if this machine is one and has the runtime."""
    target = load_target(plan.target)
    if target.capabilities.meters == ("simulated",):
        raise MeasurementError(
            f"'{plan.target}' is simulated: there is no device whose time could be measured; "
            "choose a target that exists"
        )
    if not target.is_here():
        raise MeasurementError(
            f"these graphs are for '{plan.target}': expected {device_kind(target)}, which this "
            "machine is not; copy the folder to the device and measure there"
        )
    here = target.runtimes_here()
    base, _ = split_runtime(plan.runtime)
    if base not in here:
        raise TargetError(
            f"cannot measure on {plan.runtime}: installed here are {', '.join(here) or 'none'}; "
            f"{target.how_to_install(base)}, or have the folder written for another"
        )
    return target


def _resume(output: Path, key: str) -> _Progress:
    """Go on where the same measurement was interrupted; the file is written at once, so that a
    place that is not writable is told before anybody waits."""
    path = output.with_name(f"{output.name}.partial.json")
    state = _Progress(path=path, key=key)
    if path.is_file():
        try:
            content = msgspec.json.decode(path.read_bytes())
            partial = schema.decode(content, _Partial, str(path), MeasurementError)
        except (OSError, msgspec.DecodeError, MeasurementError):
            partial = None
        if partial is not None and partial.key == key:
            say(f"{path}: going on after {len(partial.windows)} measured pairs of chains")
            state.windows, state.before_seconds = list(partial.windows), partial.seconds
        else:
            say(f"{path}: of another device, folder or setting, or damaged; beginning anew")
    state.save()
    return state


def _pairs(plan: ProbePlan) -> list[tuple[Chain, ...]]:
    """The distinct pairs of chains; points may share theirs."""
    shapes = (*plan.shapes, *((plan.block,) if plan.block else ()))
    return list(dict.fromkeys(point.chains for shape in shapes for point in shape.points))


def _run_rounds(plan: ProbePlan, settings: _Settings, rounds: int, state: _Progress) -> None:
    pairs = _pairs(plan)
    done = {(window.round, window.pair) for window in state.windows}
    first = [(r, p) for r in range(rounds) for p in range(len(pairs)) if (r, p) not in done]
    if first:
        minutes = 2 * len(first) * window_seconds(settings.period_seconds) / 60
        say(f"{len(first)} pairs of chains to measure; at least {minutes:.1f} minutes")
    with progress(f"cost table, {plan.runtime}", len(first)) as advance:
        for number in range(rounds):
            todo = [pair for at, pair in first if at == number]
            _run_round(number, {pair: pairs[pair] for pair in todo}, settings, state, advance)
    for number in range(rounds, rounds + EXTRA_ROUNDS):
        earlier = _by_pair(window for window in state.windows if window.round < number)
        doubtful = [p for p, windows in earlier.items() if _in_doubt(windows, pairs[p])]
        todo = [pair for pair in doubtful if (number, pair) not in done]
        if not todo:
            continue
        with progress("cost table, points in doubt", len(todo)) as advance:
            _run_round(number, {pair: pairs[pair] for pair in todo}, settings, state, advance)


def _run_round(
    number: int,
    todo: Mapping[int, tuple[Chain, ...]],
    settings: _Settings,
    state: _Progress,
    advance: Advance,
) -> None:
    """Measure pairs of chains, each once, in a new process and a new order."""
    if not todo:
        return
    draw = random.Random(f"{settings.seed} {number}")
    order = list(todo)
    draw.shuffle(order)
    try:
        with closing(Client(f"{settings.folder} on {settings.runtime}", WORKER)) as client:
            client.ask(
                "open",
                protocol.LOAD_LIMIT_SECONDS,
                folder=str(settings.folder),
                target=settings.target,
                runtime=settings.runtime,
                threads=settings.threads,
                meter=settings.meter,
                period_seconds=settings.period_seconds,
            )
            for pair in order:
                few_first = draw.random() < 0.5
                state.windows.append(_window(client, number, pair, todo[pair], few_first))
                advance()
                if time.monotonic() - state.saved >= SAVE_SECONDS:
                    state.save()
    finally:
        state.save()


def _window(
    client: Client, number: int, pair: int, chains: tuple[Chain, ...], few_first: bool
) -> Window:
    order = chains if few_first else chains[::-1]
    answers = []
    for chain in order:
        client.name = chain.artifact
        content = {"artifact": chain.artifact, "input_shape": list(chain.input_shape)}
        answers.append(client.ask("window", protocol.LOAD_LIMIT_SECONDS, **content))
    few, many = answers if few_first else answers[::-1]
    energies = (few["energy_uj"], many["energy_uj"])
    return Window(
        round=number,
        pair=pair,
        latency_us=(few["latency_us"], many["latency_us"]),
        energy_uj=None if None in energies else energies,
    )


def _by_pair(windows: Iterator[Window]) -> dict[int, list[Window]]:
    found: dict[int, list[Window]] = defaultdict(list)
    for window in windows:
        found[window.pair].append(window)
    return dict(found)


def _slopes(
    windows: Sequence[Window], chains: tuple[Chain, ...]
) -> tuple[list[float], list[float]]:
    """Microseconds and microjoules of one layer, of each round that has them."""
    layers = chains[1].layers - chains[0].layers
    energies = [window.energy_uj for window in windows if window.energy_uj is not None]
    latencies = [window.latency_us for window in windows]
    return (
        [(many - few) / layers for few, many in latencies],
        [(many - few) / layers for few, many in energies],
    )


def _in_doubt(windows: Sequence[Window], chains: tuple[Chain, ...]) -> bool:
    for slopes in filter(None, _slopes(windows, chains)):
        found = order_interval(slopes)
        if found.low <= 0 or found.high - found.low > SPREAD * found.value:
            return True
    return False


@dataclass(frozen=True, kw_only=True)
class _Cost:
    """A cost above zero, within its interval."""

    value: float
    low: float
    high: float


def _cost(slopes: Sequence[float]) -> _Cost | None:
    """The median over rounds; None where every round says that more layers cost less.

    No layer costs less than nothing: an interval that reaches below zero ends there, and a median
    there is no value at all, so that the middle of what is left stands for it.
    """
    found = order_interval(slopes)
    if found.high <= 0:
        return None
    low = max(found.low, 0.0)
    return _Cost(value=found.value if found.value > 0 else found.high / 2, low=low, high=found.high)


def _conclude(
    plan: ProbePlan, state: _Progress
) -> dict[tuple[Chain, ...], tuple[_Cost, _Cost | None]]:
    """The costs of each pair of chains, in microseconds and in microjoules.

    Raises:
        MeasurementError: some cost less than nothing; their windows are forgotten, so that the
            same command measures these again.
    """
    pairs, windows = _pairs(plan), _by_pair(iter(state.windows))
    costs, absurd = {}, []
    for number, chains in enumerate(pairs):
        latencies, energies = _slopes(windows[number], chains)
        latency = _cost(latencies)
        if latency is None:
            absurd.append(number)
            continue
        costs[chains] = (latency, _cost(energies) if energies else None)
    if absurd:
        state.windows = [window for window in state.windows if window.pair not in absurd]
        state.save()
        raise MeasurementError(
            f"{len(absurd)} of {len(pairs)} pairs of chains, such as "
            f"{pairs[absurd[0]][1].artifact}, took less time with more layers in every round; "
            "end what else runs on this machine and run the same command again: it measures these "
            "alone"
        )
    return costs


def _points(
    probe: ProbeShape, costs: Mapping[tuple[Chain, ...], tuple[_Cost, _Cost | None]]
) -> tuple[CostPoint, ...]:
    found = []
    for point in probe.points:
        latency, energy = costs[point.chains]
        found.append(
            CostPoint(
                in_width=point.in_width,
                out_width=point.out_width,
                latency_us=latency.value,
                latency_us_low=latency.low,
                latency_us_high=latency.high,
                energy_uj=energy.value if energy else None,
                energy_uj_low=energy.low if energy else None,
                energy_uj_high=energy.high if energy else None,
            )
        )
    return tuple(found)
