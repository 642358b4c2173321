"""Which artifacts are fastest here: each network in a process of its own, in alternating blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from greenprune.cores import session_threads
from greenprune.errors import MeasurementError
from greenprune.harness import protocol
from greenprune.harness.conditions import hottest_c
from greenprune.harness.presets import Preset, find_preset
from greenprune.harness.results import MeasuredWindow
from greenprune.harness.statistics import Interval, order_interval, paired_ratio
from greenprune.harness.summary import energies_mj, mean_latencies_ms, settle
from greenprune.progress import progress

COUNTER_UPDATES = 100
"""Of the meter in a window, at least, where joules are measured."""
PRESET = replace(find_preset("quick"), name="race", windows=7, window_seconds=0.3, idle_seconds=0.0)


@dataclass(frozen=True, kw_only=True)
class Racer:
    """One runtime: mean latencies of its networks at batch 1."""

    runtime: str
    blocks_ms: dict[str, tuple[float, ...]]
    """By variant; the same block of another variant or runtime was measured beside it."""
    latency_ms: dict[str, Interval]
    """By variant: the median over blocks."""
    energy_mj: dict[str, Interval | None]
    """Likewise of one inference; None without a meter, or where it failed."""
    together_ms: Interval
    """One call of each."""
    over_fastest: Interval
    """``together_ms`` over the fastest runtime's, paired by block."""


@dataclass(frozen=True, kw_only=True)
class Race:
    """The runtimes, fastest first."""

    threads: int
    racers: tuple[Racer, ...]

    @property
    def order(self) -> tuple[str, ...]:
        """Names, fastest first."""
        return tuple(racer.runtime for racer in self.racers)

    def ratio(self, over: str, under: str) -> Interval:
        """Latency of one runtime over another's, one call of each network, paired by block."""
        together = {
            racer.runtime: [sum(block) for block in zip(*racer.blocks_ms.values(), strict=True)]
            for racer in self.racers
        }
        return paired_ratio(together[over], together[under])


def race(
    target: str,
    artifacts: Mapping[str, Mapping[str, Path]],
    inputs: Path,
    *,
    threads: int = 0,
    seed: int = 0,
    preset: Preset = PRESET,
    joules: bool = False,
) -> Race:
    """Race runtimes over the same networks and inputs, batch 1.

    Args:
        target: whose artifacts they are.
        artifacts: runtime to variant to its artifact's main file; the same variants for all.
        inputs: an .npy file, float32 [N, C, H, W].
        threads: of each candidate; 0 means one for each core.
        seed: of the order within blocks.
        preset: how long and how often.
        joules: measured too, in windows of at least 100 updates of the meter.

    Raises:
        MeasurementError: a candidate failed; joules are asked for and no meter measures here.
    """
    if not artifacts:
        raise MeasurementError("a race needs a runtime to measure; got none: name one")
    keys = [(variant, name) for name, networks in artifacts.items() for variant in networks]
    threads = session_threads(threads)
    request: dict[str, Any] = {
        "target": target,
        "inputs": str(inputs.resolve()),
        "threads": threads,
    }
    with protocol.one_at_a_time(), ExitStack() as stack:
        meter = {"meter": "none"}
        if joules:
            meter, preset = _metered(), replace(preset, counter_updates=COUNTER_UPDATES)
        started_c = hottest_c()
        clients = protocol.start_workers(stack, keys)
        with progress("race", len(keys) * (1 + preset.windows)) as advance:
            for variant, name in keys:
                artifact = str(artifacts[name][variant].resolve())
                own = {"artifact": artifact, "runtime": name, **meter}
                protocol.load_candidate(clients[variant, name], preset, request | own)
                advance()
            tries, _ = protocol.measure(clients, preset, seed, advance, started_c)
    windows = {key: settle(found)[0] for key, found in tries.items()}
    means = {key: mean_latencies_ms(kept) for key, kept in windows.items()}
    together = {
        name: [sum(block) for block in zip(*(means[v, name] for v in networks), strict=True)]
        for name, networks in artifacts.items()
    }
    order = sorted(together, key=lambda name: order_interval(together[name]).value)
    return Race(
        threads=threads,
        racers=tuple(
            Racer(
                runtime=name,
                blocks_ms={v: tuple(means[v, name]) for v in artifacts[name]},
                latency_ms={v: order_interval(means[v, name]) for v in artifacts[name]},
                energy_mj={v: _energy_mj(windows[v, name]) for v in artifacts[name]},
                together_ms=order_interval(together[name]),
                over_fastest=paired_ratio(together[name], together[order[0]]),
            )
            for name in order
        ),
    )


def _metered() -> dict[str, Any]:
    name, period_seconds = protocol.real_meter("auto")
    if name == "none":
        raise MeasurementError(
            "expected a meter that measures joules on this machine, found none (`greenprune "
            "doctor` says why); ask for latency instead"
        )
    return {"meter": name, "period_seconds": period_seconds}


def _energy_mj(windows: Sequence[MeasuredWindow]) -> Interval | None:
    found = energies_mj(windows)
    return order_interval(found) if found else None
