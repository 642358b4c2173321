"""The measurement: every candidate in its own process, windows interleaved in random blocks.

Candidates are the dense, mild and aggressive networks and the pair, on each runtime. Several
sessions in one process slow each other, since idle thread pools spin; so each has a process. In
each block every candidate is measured once, in an order drawn anew, so that drift of the machine
falls on all alike, and ratios are paired by block.
"""

from __future__ import annotations

import datetime
import math
import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from greenprune import bundle as bundles
from greenprune import schema
from greenprune.cores import session_threads
from greenprune.errors import MeasurementError, TargetError
from greenprune.harness.client import Client
from greenprune.harness.conditions import hottest_c
from greenprune.harness.environment import Environment, describe_environment
from greenprune.harness.presets import Preset, find_preset
from greenprune.harness.results import SCHEMA_VERSION, MeasuredWindow, MeterRecord, Results
from greenprune.harness.summary import settle, summarise_candidate
from greenprune.harness.verdict import judge_all
from greenprune.meters import open_meter
from greenprune.progress import Advance, progress, say

VARIANTS = ("dense", "mild", "aggressive", "pair")
LOAD_LIMIT_SECONDS = 900.0
PATIENCE = 20
"""How many times longer than the first an inference may take before its process counts as hung."""
LOCK = Path("/tmp" if os.name == "posix" else tempfile.gettempdir()) / "greenprune-bench.lock"
"""One place for all users and sessions of a machine, whatever TMPDIR says."""
COOLED_WITHIN_C = 3.0
COOL_DOWN_LIMIT_SECONDS = 120.0

Key = tuple[str, ...]
"""Variant and runtime; before them, in a race of bundles, whose."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all candidates of a measurement share."""

    preset: Preset
    meter: MeterRecord
    threads: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the candidates' processes answered, by key."""

    created: str
    seconds: float
    before: Environment
    after: Environment
    loaded: dict[Key, dict[str, Any]]
    idle_watts: dict[Key, tuple[float | None, float | None]]
    tries: dict[Key, list[MeasuredWindow]]
    notes: list[str]


def bench(
    bundle: Path,
    *,
    preset: str = "quick",
    meter: str = "auto",
    runtimes: Sequence[str] | None = None,
    threads: int = 0,
    seed: int = 0,
    tdp_watts: float | None = None,
) -> Results:
    """Measure a bundle on this machine: latency and joules for each inference, batch 1.

    One measurement runs on a machine at a time; a second one waits. A window that is invalid for a
    cause is run once more; one that is invalid twice fails the verdict, and stays marked.

    Args:
        bundle: the bundle's folder.
        preset: ``quick`` (for a first look; too short for claims), ``standard``, ``report`` or
            ``mlperf-tiny``.
        meter: see :func:`greenprune.meters.open_meter`.
        runtimes: runtimes to measure; None means all of the bundle that are installed here.
        threads: CPU threads of each candidate; 0 means one for each core.
        seed: of the order within blocks.
        tdp_watts: thermal design power of the processors, for the estimate.

    Raises:
        MeasurementError: no such preset or meter, or a candidate's process failed.
        BundleError: the bundle is damaged.
        TargetError: none of the runtimes is installed here.
    """
    chosen_preset = check_options(preset, tdp_watts)
    opened = bundles.open_bundle(Path(bundle).resolve())
    chosen = choose_runtimes(opened.manifest, runtimes)
    keys = [(variant, runtime) for runtime in chosen for variant in VARIANTS]
    with one_at_a_time():
        opened.verify()
        settings = settle_settings(chosen_preset, meter, threads, seed, tdp_watts)
        measured = run_protocol({key: {"bundle": str(opened.path)} for key in keys}, settings)
    return make_results(opened, keys, measured, settings)


def check_options(preset: str, tdp_watts: float | None) -> Preset:
    """The preset of that name; what is wrong is told before anybody waits for the lock."""
    if tdp_watts is not None and not (tdp_watts > 0 and math.isfinite(tdp_watts)):
        raise MeasurementError(f"TDP {tdp_watts:g} W: expected watts above zero")
    return find_preset(preset)


def settle_settings(
    preset: Preset, meter: str, threads: int, seed: int, tdp_watts: float | None
) -> Settings:
    """Settle ``auto`` once: every worker must use the same meter. The lock is held."""
    with open_meter(meter, tdp_watts=tdp_watts) as probe:
        record = MeterRecord(
            name=probe.name,
            provenance=probe.provenance,
            scope=probe.scope,
            note=probe.note,
            period_seconds=probe.period_seconds,
            tdp_watts=tdp_watts,
        )
    return Settings(preset=preset, meter=record, threads=session_threads(threads), seed=seed)


def run_protocol(requests: Mapping[Key, dict[str, Any]], settings: Settings) -> Measured:
    """Load all candidates, each in its process, then idle, windows, idle; the lock is held.

    Args:
        requests: what each candidate's worker is told beside the settings.
        settings: the same for all.
    """
    preset = settings.preset
    with ExitStack() as stack:
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        start, before = time.monotonic(), describe_environment()
        clients = start_workers(stack, list(requests))
        with progress(f"bench ({preset.name})", len(requests) * (1 + preset.windows)) as advance:
            loaded = _load(clients, requests, settings, advance)
            idle_before, why_before = _idle(clients, settings)
            tries, warm = measure(clients, preset, settings.seed, advance, before["temperature_c"])
            idle_after, why_after = _idle(clients, settings)
        return Measured(
            created=created,
            seconds=time.monotonic() - start,
            before=before,
            after=describe_environment(),
            loaded=loaded,
            idle_watts={key: (idle_before[key], idle_after[key]) for key in requests},
            tries=tries,
            notes=list(dict.fromkeys([*why_before, *why_after, *warm])),
        )


def make_results(
    opened: bundles.Bundle, keys: Sequence[Key], measured: Measured, settings: Settings
) -> Results:
    """The results of one bundle, whose candidates are ``keys``."""
    settled = {key: settle(measured.tries[key]) for key in keys}
    dense = {key[-1]: kept for key, (kept, _) in settled.items() if key[-2] == "dense"}
    candidates = tuple(
        summarise_candidate(
            variant=key[-2],
            runtime=key[-1],
            loaded=measured.loaded[key],
            idle_watts=measured.idle_watts[key],
            windows=kept,
            dense_windows=dense[key[-1]],
            discarded=discarded,
        )
        for key, (kept, discarded) in settled.items()
    )
    notes = [*_notes(opened.manifest, settings.meter), *measured.notes]
    preset = settings.preset.name
    return Results(
        schema=SCHEMA_VERSION,
        bundle=opened.manifest.name,
        networks_sha256=opened.networks_sha256,
        target=opened.manifest.target,
        created=measured.created,
        preset=preset,
        seed=settings.seed,
        threads=settings.threads,
        meter=settings.meter.name,
        meter_record=settings.meter,
        seconds=measured.seconds,
        environment_before=measured.before,
        environment_after=measured.after,
        candidates=candidates,
        verdict=judge_all(candidates, preset, measured.before, measured.after, notes),
    )


def _notes(manifest: bundles.Manifest, meter: MeterRecord) -> Iterator[str]:
    from greenprune.registry import load_target

    if meter.note:
        yield meter.note
    if meter.provenance is None:
        yield "no joules: measured without a meter (--meter none)"
    if meter.tdp_watts is not None and "estimate" not in meter.name:
        yield f"the TDP is not used: the meter is {meter.name}, which estimates nothing"
    if load_target(manifest.target).capabilities.meters == ("simulated",):
        yield f"'{manifest.target}' is simulated: times and joules are those of this machine"
    if manifest.samples.replay_inputs is None:
        yield "the bundle carries no held-out images: its few reference inputs were replayed"


def choose_runtimes(manifest: bundles.Manifest, asked: Sequence[str] | None) -> list[str]:
    """The bundle's runtimes that are asked for (None: all) and installed here."""
    from greenprune.registry import load_target, split_runtime

    built = list(manifest.variants["dense"].artifacts)
    target = load_target(manifest.target)
    here = target.runtimes_here()
    wanted = built if asked is None else list(asked)
    chosen = [name for name in wanted if name in built and split_runtime(name)[0] in here]
    missing = [name for name in wanted if name not in chosen]
    if not chosen or (asked is not None and missing):
        bases = dict.fromkeys(split_runtime(name)[0] for name in missing if name in built)
        commands = [target.how_to_install(base) for base in bases]
        raise TargetError(
            f"cannot measure on {', '.join(missing) or 'any runtime'}: the bundle "
            f"'{manifest.name}' is built for {', '.join(built) or 'none'}, and installed here are "
            f"{', '.join(here) or 'none'}; {' or '.join(commands) or 'export the bundle for it'}"
        )
    return chosen


def real_meter(name: str) -> tuple[str, float]:
    """A meter that measures here and the period of its updates in seconds, settled once for all
    workers: ``("none", 0.0)`` where none does. The lock is held.

    Args:
        name: see :func:`greenprune.meters.open_meter`.
    """
    with open_meter(name) as probe:
        if (probe.provenance or "").startswith("measured"):
            return probe.name, probe.period_seconds or 0.0
    return "none", 0.0


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold the machine-wide lock, so that two measurements never overlap."""
    lock = filelock.FileLock(LOCK, mode=0o666)
    try:
        lock.acquire(timeout=0)
    except PermissionError as error:
        raise MeasurementError(
            f"{LOCK}: the lock is another user's and cannot be opened; when no measurement of "
            "theirs runs, that user or an administrator must remove the file"
        ) from error
    except filelock.Timeout:
        say("another measurement is running on this machine; waiting for it to end")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def start_workers(stack: ExitStack, keys: Sequence[Key]) -> dict[Key, Client]:
    """A worker process for each candidate, ended with ``stack``."""
    clients = {}
    for key in keys:
        client = Client(f"{', '.join(key[:-1])} on {key[-1]}")
        stack.callback(client.close)
        clients[key] = client
    return clients


def _load(
    clients: Mapping[Key, Client],
    requests: Mapping[Key, dict[str, Any]],
    settings: Settings,
    advance: Advance,
) -> dict[Key, dict[str, Any]]:
    """Load and warm up one after the other: a warm-up beside another is not one."""
    loaded = {}
    for key, client in clients.items():
        request = {
            "variant": key[-2],
            "runtime": key[-1],
            "threads": settings.threads,
            "meter": settings.meter.name,
            "tdp_watts": settings.meter.tdp_watts,
            "period_seconds": settings.meter.period_seconds,
            **requests[key],
        }
        loaded[key] = load_candidate(client, settings.preset, request)
        advance()
    return loaded


def load_candidate(client: Client, preset: Preset, request: dict[str, Any]) -> dict[str, Any]:
    """Load and warm up; how long the first inference takes sets the limits that follow."""
    opened = client.ask("open", LOAD_LIMIT_SECONDS, preset=schema.encode(preset), **request)
    client.single_seconds = opened["single_seconds"]
    inferences = opened["images"] + preset.warmup_inferences
    limit = LOAD_LIMIT_SECONDS + PATIENCE * inferences * client.single_seconds
    return client.ask("load", limit)


def _idle(
    clients: Mapping[Key, Client], settings: Settings
) -> tuple[dict[Key, float | None], list[str]]:
    """Watts of each candidate while all are loaded and none works, and why they are missing.

    None without asking unless the meter measures: an estimate by CPU time knows no idle power.
    """
    if not (settings.meter.provenance or "").startswith("measured"):
        return dict.fromkeys(clients), []
    for client in clients.values():
        client.send("idle")
    watts: dict[Key, float | None] = {}
    problems = []
    for key, client in clients.items():
        answer = client.receive(_limit_seconds(client, settings.preset))
        energy = answer["energy"]
        watts[key] = energy["value"] / energy["seconds"] if energy else None
        if energy is None:
            problems.append(f"{client.name}: no idle power, so no net joules: {answer['problem']}")
    return watts, problems


def _limit_seconds(client: Client, preset: Preset) -> float:
    """How long a window may take before its process counts as hung; no counter makes it so long."""
    seconds = max(
        preset.window_seconds,
        preset.idle_seconds,
        preset.window_inferences * client.single_seconds,
    )
    return PATIENCE * seconds + 600.0


def measure(
    clients: Mapping[Key, Client],
    preset: Preset,
    seed: int,
    advance: Advance,
    started_c: float | None,
) -> tuple[dict[Key, list[MeasuredWindow]], list[str]]:
    """Windows of each candidate, a block after the other, in an order drawn anew for each.

    A block has two of a candidate where the first was invalid; see :func:`settle`.

    Args:
        clients: loaded and warmed up.
        preset: how long and how often.
        seed: of the orders.
        advance: told of each window.
        started_c: temperature before anything was loaded, Celsius, to which the machine cools
            between blocks; None where none can be read.

    Returns:
        The windows, and notes on what went otherwise than the protocol wants.
    """
    draw = random.Random(seed)
    warmer: list[float] = []
    tries: dict[Key, list[MeasuredWindow]] = {key: [] for key in clients}
    for block in range(preset.windows):
        if block:
            warmer.append(_cool_down(started_c, preset))
        order = list(clients)
        draw.shuffle(order)
        for position, key in enumerate(order):
            tries[key] += _window(clients[key], preset, block, position, started_c)
            advance()
    if not any(warmer):
        return tries, []
    note = (
        f"{sum(map(bool, warmer))} of {preset.windows} blocks began before the machine had cooled "
        f"down: up to {max(warmer):.0f} C warmer than at the start, after "
        f"{COOL_DOWN_LIMIT_SECONDS:.0f} s of rest"
    )
    return tries, [note]


def _window(
    client: Client, preset: Preset, block: int, order: int, started_c: float | None
) -> list[MeasuredWindow]:
    """One window; after one that was invalid for a cause, once another, cooled down."""
    tries: list[MeasuredWindow] = []
    while len(tries) < 2 and (not tries or tries[-1].invalid):
        if tries:
            _cool_down(started_c, preset)
        answer = client.ask("window", _limit_seconds(client, preset))
        content = {"block": block, "order": order, **answer}
        tries.append(schema.decode(content, MeasuredWindow, client.name, MeasurementError))
    return tries


def _cool_down(started_c: float | None, preset: Preset) -> float:
    """Wait until the machine is as cool as at the start, or the preset's rest.

    Returns:
        By how many degrees Celsius it is still warmer when the limit is reached; else 0.
    """
    if not preset.rest_seconds:
        return 0.0
    if started_c is None:
        time.sleep(preset.rest_seconds)
        return 0.0
    limit = time.monotonic() + COOL_DOWN_LIMIT_SECONDS
    while (warmer := (hottest_c() or started_c) - started_c) > COOLED_WITHIN_C:
        if time.monotonic() >= limit:
            return warmer
        time.sleep(1.0)
    return 0.0
