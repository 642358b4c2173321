"""The measurement: every candidate in its own process, windows interleaved in random blocks.

Candidates are the dense, mild and aggressive networks and the pair, on each runtime. Several
sessions in one process slow each other, since idle thread pools spin; so each has a process. In
each block every candidate is measured once, in an order drawn anew, so that drift of the machine
falls on all alike, and ratios are paired by block.
"""

from __future__ import annotations

import datetime
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import filelock

from greenprune import bundle as bundles
from greenprune import schema
from greenprune.errors import MeasurementError, TargetError
from greenprune.harness.client import Client, WorkerError
from greenprune.harness.environment import describe_environment, hottest_c, usable_cores
from greenprune.harness.presets import Preset, find_preset
from greenprune.harness.results import SCHEMA_VERSION, Candidate, MeasuredWindow, Results
from greenprune.harness.summary import judge_all, summarise_candidate
from greenprune.meters import open_meter
from greenprune.progress import Advance, progress, say

VARIANTS = ("dense", "mild", "aggressive", "pair")
LOAD_LIMIT_SECONDS = 900.0
COOLED_WITHIN_C = 3.0
COOL_DOWN_LIMIT_SECONDS = 120.0

Key = tuple[str, str]
"""Variant and runtime."""


def bench(
    bundle: Path,
    *,
    preset: str = "quick",
    meter: str = "auto",
    runtimes: Sequence[str] | None = None,
    threads: int = 0,
    seed: int = 0,
) -> Results:
    """Measure a bundle on this machine: latency and joules for each inference, batch 1.

    One measurement runs on a machine at a time; a second one waits.

    Args:
        bundle: the bundle's folder.
        preset: ``quick`` (for a first look; too short for claims), ``standard``, ``report`` or
            ``mlperf-tiny``.
        meter: see :func:`greenprune.meters.open_meter`.
        runtimes: runtimes to measure; None means all of the bundle that are installed here.
        threads: CPU threads of each candidate; 0 means one for each core.
        seed: of the order within blocks.

    Raises:
        MeasurementError: a meter or a candidate failed, twice where a window was invalid.
        BundleError: the bundle is damaged.
        TargetError: none of the runtimes is installed here.
    """
    from greenprune.registry import load_target

    chosen = find_preset(preset)
    opened = bundles.open_bundle(Path(bundle).resolve())
    opened.verify()
    keys = [
        (variant, runtime)
        for runtime in _choose_runtimes(opened.manifest, runtimes)
        for variant in VARIANTS
    ]
    with open_meter(meter) as probe:
        meter = probe.name  # settle 'auto' once: every worker must use the same
        notes = [probe.note] if probe.note else []
    if load_target(opened.manifest.target).capabilities.meters == ("simulated",):
        notes.append(
            f"'{opened.manifest.target}' is simulated: times and joules are those of this machine"
        )
    threads = threads or usable_cores()
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    with one_at_a_time(), ExitStack() as stack:
        start, before = time.monotonic(), describe_environment()
        clients = start_workers(stack, keys)
        total = 2 * len(keys) * (1 + chosen.windows) // 2 + 2
        with progress(f"bench ({preset})", total) as advance:
            request = {"bundle": str(opened.path), "threads": threads, "meter": meter}
            loaded = _load(clients, request, chosen, advance)
            idle_before = _idle(clients, chosen, advance)
            windows = measure(clients, chosen, seed, advance)
            idle_after = _idle(clients, chosen, advance)
        after, seconds = describe_environment(), time.monotonic() - start
    candidates = _summarise(keys, loaded, idle_before, idle_after, windows, seed)
    return Results(
        schema=SCHEMA_VERSION,
        bundle=opened.manifest.name,
        target=opened.manifest.target,
        created=created,
        preset=preset,
        seed=seed,
        threads=threads,
        meter=meter,
        seconds=seconds,
        environment_before=before,
        environment_after=after,
        candidates=candidates,
        verdict=judge_all(candidates, preset, before, after, notes),
    )


def _choose_runtimes(manifest: bundles.Manifest, asked: Sequence[str] | None) -> list[str]:
    from greenprune.registry import load_target, split_runtime

    built = list(manifest.variants["dense"].artifacts)
    here = load_target(manifest.target).runtimes_here()
    wanted = built if asked is None else list(asked)
    chosen = [name for name in wanted if name in built and split_runtime(name)[0] in here]
    missing = [name for name in wanted if name not in chosen]
    if not chosen or (asked is not None and missing):
        raise TargetError(
            f"cannot measure on {', '.join(missing) or 'any runtime'}: the bundle "
            f"'{manifest.name}' is built for {', '.join(built) or 'none'}, and installed here are "
            f"{', '.join(here) or 'none'}; install the runtime or export the bundle for it"
        )
    return chosen


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold the machine-wide lock, so that two measurements never overlap."""
    path = Path(tempfile.gettempdir()) / "greenprune-bench.lock"
    lock = filelock.FileLock(path, mode=0o666)
    try:
        lock.acquire(timeout=0)
    except PermissionError as error:
        raise MeasurementError(
            f"{path}: the lock of another user's measurement cannot be opened; "
            "remove it when that measurement has ended"
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
    for variant, runtime in keys:
        client = Client(f"{variant} on {runtime}")
        stack.callback(client.close)
        clients[variant, runtime] = client
    return clients


def _load(
    clients: Mapping[Key, Client], request: dict[str, Any], preset: Preset, advance: Advance
) -> dict[Key, dict[str, Any]]:
    """Load and warm up one after the other: a warm-up beside another is not one."""
    loaded = {}
    for (variant, runtime), client in clients.items():
        loaded[variant, runtime] = client.ask(
            "load",
            LOAD_LIMIT_SECONDS,
            variant=variant,
            runtime=runtime,
            preset=schema.encode(preset),
            **request,
        )
        advance()
    return loaded


def _idle(
    clients: Mapping[Key, Client], preset: Preset, advance: Advance
) -> dict[Key, float | None]:
    """Watts of each candidate while all are loaded and none works; None unless measured, as an
    estimate by CPU time knows no idle power."""
    for client in clients.values():
        client.send("idle", seconds=preset.idle_seconds)
    watts: dict[Key, float | None] = {}
    for key, client in clients.items():
        energy = client.receive(preset.idle_seconds + 60)["energy"]
        measured = energy is not None and energy["provenance"].startswith("measured")
        watts[key] = energy["value"] / energy["seconds"] if measured else None
    advance()
    return watts


def measure(
    clients: Mapping[Key, Client], preset: Preset, seed: int, advance: Advance
) -> dict[Key, list[MeasuredWindow]]:
    """Windows of each candidate, a block after the other, in an order drawn anew for each."""
    draw, started_c = random.Random(seed), hottest_c()
    windows: dict[Key, list[MeasuredWindow]] = {key: [] for key in clients}
    for block in range(preset.windows):
        if block:
            _cool_down(started_c, preset)
        order = list(clients)
        draw.shuffle(order)
        for position, key in enumerate(order):
            windows[key].append(_window(clients[key], preset, block, position))
            advance()
    return windows


def _window(client: Client, preset: Preset, block: int, order: int) -> MeasuredWindow:
    """One window; one that was invalid for a cause is run once more, and says so."""
    limit, rerun = 20 * preset.window_seconds + 600, ""
    try:
        answer = client.ask("window", limit)
    except WorkerError as error:
        if error.kind != MeasurementError.__name__:
            raise
        rerun = str(error)
        answer = client.ask("window", limit)
    content = {"block": block, "order": order, "rerun": rerun, **answer}
    return schema.decode(content, MeasuredWindow, client.name, MeasurementError)


def _cool_down(started_c: float | None, preset: Preset) -> None:
    """Wait until the machine is as cool as at the start, or the preset's rest."""
    if not preset.rest_seconds:
        return
    if started_c is None:
        time.sleep(preset.rest_seconds)
        return
    limit = time.monotonic() + COOL_DOWN_LIMIT_SECONDS
    while (hottest_c() or started_c) > started_c + COOLED_WITHIN_C and time.monotonic() < limit:
        time.sleep(1.0)


def _summarise(
    keys: Sequence[Key],
    loaded: Mapping[Key, dict[str, Any]],
    idle_before: Mapping[Key, float | None],
    idle_after: Mapping[Key, float | None],
    windows: Mapping[Key, list[MeasuredWindow]],
    seed: int,
) -> tuple[Candidate, ...]:
    return tuple(
        summarise_candidate(
            variant=variant,
            runtime=runtime,
            loaded=loaded[variant, runtime],
            idle_watts=(idle_before[variant, runtime], idle_after[variant, runtime]),
            windows=windows[variant, runtime],
            dense_windows=windows["dense", runtime],
            seed=seed,
        )
        for variant, runtime in keys
    )
