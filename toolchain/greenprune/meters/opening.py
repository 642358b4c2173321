"""Opening a meter by its name, and what this machine's meters can do."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from greenprune.errors import MeasurementError
from greenprune.meters.clock import Clock
from greenprune.meters.external import ExternalDevice
from greenprune.meters.files import access_command
from greenprune.meters.meter import Meter, Source
from greenprune.meters.readers import CounterReader, IntervalReader

NAMES = ("auto", "ina", "rapl", "nvml", "estimate", "none")
PROOF_SECONDS = 1.5
"""A counter or a sensor that does not move for so long does not work; the slowest known moves each
second."""
_HERE = Path("/")


def open_meter(
    name: str = "auto",
    root: Path = _HERE,
    tdp_watts: float | None = None,
    launcher: int | None = None,
) -> Meter:
    """Open a meter.

    ``auto`` takes the best that a real read proves: on a board with power sensors ``ina``, which
    holds the GPU too; elsewhere ``rapl``, or ``estimate`` where RAPL does not work; and where
    a GPU is visible ``+nvml``, since whatever uses it takes joules of both. CUDA_VISIBLE_DEVICES=
    (empty) leaves the GPU out. Where nothing can be read it is ``none``, and its note says why.

    Args:
        name: ``auto``, ``ina``, ``rapl``, ``nvml``, ``estimate``, ``none`` (no joules at all); a
            ``module:function`` that answers a pyJoules device with cumulative microjoules; or
            several that add up, such as ``rapl+nvml``.
        root: where ``sys`` and ``proc`` are looked for. NVML knows this machine alone, so ``auto``
            leaves it out under another root.
        tdp_watts: thermal design power of the processors that this machine sees, for the estimate;
            on a virtual machine the host's x the vCPUs / the host's threads.
        launcher: process whose descendants the estimate counts, this one among them; None: this
            one and its children.

    Raises:
        MeasurementError: an unknown name, a TDP that cannot be, or the meter asked for cannot be
            read.
    """
    return open_with(Clock(), name, root, tdp_watts, launcher)


def open_with(
    clock: Clock,
    name: str,
    root: Path = _HERE,
    tdp_watts: float | None = None,
    launcher: int | None = None,
) -> Meter:
    """:func:`open_meter` by another clock, for simulations."""
    if tdp_watts is not None and not 0 < tdp_watts < math.inf:
        raise MeasurementError(
            f"tdp_watts = {tdp_watts}: expected a finite number of watts above zero"
        )
    estimate = partial(_estimate, clock, root, tdp_watts, launcher)
    if name == "none":
        return Meter("none")
    if name == "auto":
        return _auto(clock, root, estimate)
    sources: list[Source] = []
    try:
        for part in _parts(name):
            sources.append(_open_source(part, clock, root, estimate))
    except BaseException:
        Meter(name, sources).close()
        raise
    return Meter(name, sources)


def _parts(name: str) -> list[str]:
    """The meters that a name adds up. Raises MeasurementError: joules would be counted twice."""
    parts = name.split("+")
    twice = {part for part in parts if parts.count(part) > 1}
    if "estimate" in parts and not {"rapl", "ina"}.isdisjoint(parts):
        twice |= {"estimate", "rapl", "ina"} & set(parts)
    if twice:
        raise MeasurementError(
            f"meter '{name}': expected meters of different things; the joules of "
            f"{', '.join(sorted(twice))} would be counted twice; name one of them, once"
        )
    return parts


def _open_source(name: str, clock: Clock, root: Path, estimate: Callable[[], Source]) -> Source:
    openers: dict[str, Callable[[], Source]] = {
        "ina": lambda: _ina(clock, root),
        "rapl": lambda: _rapl(clock, root),
        "nvml": lambda: _nvml(clock),
        "estimate": estimate,
    }
    if name in openers:
        return openers[name]()
    if ":" in name:
        return _external(name, clock)
    raise MeasurementError(
        f"meter '{name}': unknown; expected one of {', '.join(NAMES)}, module:function, or several "
        "joined by +"
    )


def _auto(clock: Clock, root: Path, estimate: Callable[[], Source]) -> Meter:
    from greenprune.meters.ina import find_rails

    why: list[str] = []
    if find_rails(root):
        try:
            return Meter("ina", [_proved(_ina(clock, root))])
        except MeasurementError as problem:
            why.append(f"no power rails: {problem}")
    names, sources = ["rapl"], []
    try:
        sources.append(_proved(_rapl(clock, root)))
    except MeasurementError as problem:
        names = ["estimate"]
        why.append(f"no counter: {problem}")
        try:
            sources.append(estimate())
        except MeasurementError as reason:
            names = []
            why.append(f"no estimate: {reason}")
    if root == _HERE:
        from greenprune.meters import nvml

        try:
            if nvml.is_here():
                sources.append(_proved(_nvml(clock)))
                names.append("nvml")
        except MeasurementError as problem:
            why.append(f"the GPU is not in it: {problem}")
        except BaseException:
            Meter("+".join(names), sources).close()
            raise
    meter = Meter("+".join(names) or "none", sources)
    meter.note = "; ".join(part for part in (meter.note, *why) if part)
    return meter


def _proved(source: Source) -> Source:
    """The same, if its counters or sensors move; others are closed. Raises MeasurementError: they
    do not."""
    try:
        source.reader.prove(PROOF_SECONDS)
    except MeasurementError:
        source.device.close()
        raise
    return source


def _rapl(clock: Clock, root: Path) -> Source:
    from greenprune.meters.rapl import open_rapl

    device = open_rapl(root, clock)
    domains = ", ".join(str(domain) for domain in device.get_configured_domains())
    return Source(
        reader=CounterReader(device, clock),
        device=device,
        provenance="measured_counter",
        scope=f"the whole machine's {domains}",
    )


def _nvml(clock: Clock) -> Source:
    from greenprune.meters.counters import CounterDevice
    from greenprune.meters.nvml import open_nvml

    device, scope = open_nvml(clock)
    if isinstance(device, CounterDevice):
        return Source(
            reader=CounterReader(device, clock),
            device=device,
            provenance="measured_counter",
            scope=scope,
        )
    return Source(
        reader=IntervalReader(device, clock),
        device=device,
        provenance="measured_rail_integrated",
        scope=scope,
        note="the GPU has no energy counter; its power was sampled",
    )


def _ina(clock: Clock, root: Path) -> Source:
    from greenprune.meters.ina import open_ina

    device, scope = open_ina(root, clock)
    return Source(
        reader=IntervalReader(device, clock),
        device=device,
        provenance="measured_rail_integrated",
        scope=scope,
    )


def _estimate(
    clock: Clock, root: Path, tdp_watts: float | None, launcher: int | None = None
) -> Source:
    from greenprune.meters.estimate import EstimateDevice, is_virtual

    model = "unknown CPU, 4 to 12 W a busy core"
    who = "this process's and its children's" if launcher is None else "torchrun's processes'"
    if tdp_watts is not None:
        model = f"TDP {tdp_watts:g} W x {who} load"
        if is_virtual(root):
            model += (
                f"; this is a virtual machine, so {tdp_watts:g} W must be the share of the host's "
                f"TDP that falls to its {os.cpu_count()} processors"
            )
    device = EstimateDevice(tdp_watts, launcher)
    return Source(
        reader=IntervalReader(device, clock),
        device=device,
        provenance="estimated_model",
        scope=f"{who} share of the CPU",
        note=f"ESTIMATE, {model}",
    )


def _external(place: str, clock: Clock) -> Source:
    """A user's own device; ``scope`` and ``close`` are optional in it."""
    module, _, function = place.partition(":")
    try:
        own = getattr(import_module(module), function)()
        names = [str(domain) for domain in own.get_configured_domains()]
    except MeasurementError:
        raise
    except Exception as error:
        raise MeasurementError(
            f"meter '{place}': expected a function that answers a configured pyJoules device: "
            f"{type(error).__name__}: {error}; see docs/measuring.md"
        ) from error
    if len(set(names)) < len(names):  # pyJoules would keep the last of them alone
        raise MeasurementError(
            f"meter '{place}': expected domains with names of their own (__repr__), found "
            f"{', '.join(names)}; name each apart"
        )
    device = ExternalDevice(place, own, clock)
    return Source(
        reader=CounterReader(device, clock),
        device=device,
        provenance="measured_counter",
        scope=getattr(own, "scope", ", ".join(names)),
    )


def diagnose_meters(root: Path = _HERE) -> dict[str, dict[str, Any]]:
    """Each meter: whether a real read works, why not, and the command that grants access."""
    clock = Clock()
    estimate = partial(_estimate, clock, root, None)
    answer: dict[str, dict[str, Any]] = {}
    for name in ("rapl", "nvml", "ina", "estimate"):
        entry: dict[str, Any] = {"works": True, "reason": "", "command": None}
        try:
            _proved(_open_source(name, clock, root, estimate)).device.close()
        except MeasurementError as problem:
            entry.update(works=False, reason=str(problem))
            if isinstance(problem.__cause__, PermissionError):
                entry["command"] = access_command(_files(name, root))
        answer[name] = entry
    return answer


def _files(name: str, root: Path) -> list[Path]:
    """What a meter reads."""
    from greenprune.meters.ina import find_rails
    from greenprune.meters.rapl import protected_files

    if name == "rapl":
        return protected_files(root)
    return [file.path for rail in find_rails(root) for file in rail.files]
