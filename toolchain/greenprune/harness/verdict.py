"""Whether numbers can be relied upon: failures forbid it, notes limit it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from greenprune.harness.conditions import slowdowns
from greenprune.harness.environment import Environment
from greenprune.harness.results import Candidate, MeasuredWindow, Verdict
from greenprune.harness.statistics import coefficient_of_variation
from greenprune.meters.energy import Energy

COV_NOTED, COV_FAILS = 0.01, 0.05
IDLE_DRIFT = 0.05
BUSY_LOAD_SHARE = 0.5
BACKGROUND_CORES, STOLEN_CORES = 0.1, 0.01
CLOCK_CHANGE = 0.05
WARMER_C = 3.0
WINDOWS_FOR_95 = 6
SETTINGS = ("governor", "energy_preference", "boost", "power_mode", "clocks_locked", "on_battery")
"""Of the environment: what must stay as it is."""


def judge_candidate(
    steady: bool,
    windows: Sequence[MeasuredWindow],
    discarded: Sequence[MeasuredWindow],
    idle_watts: tuple[float | None, float | None],
) -> Verdict:
    """The verdict on one candidate's windows."""
    failures, notes = [], []
    if not steady:
        failures.append("not steady after the longest warm-up")
    failures += [f"block {w.block} was invalid twice: {w.invalid}" for w in windows if w.invalid]
    notes += [f"block {w.block} was measured again: {w.invalid}" for w in discarded]
    for what, values in (("latency", _medians(windows)), ("energy", _measured_joules(windows))):
        spread = coefficient_of_variation(values) if values else 0.0
        if spread > COV_FAILS:
            failures.append(f"{what} varies by {spread:.1%} over windows (limit {COV_FAILS:.0%})")
        elif spread > COV_NOTED:
            notes.append(f"{what} varies by {spread:.1%} over windows")
    before, after = idle_watts
    if before and after is not None and abs(after - before) / before > IDLE_DRIFT:
        drift = abs(after - before) / before
        notes.append(f"idle power drifted by {drift:.0%}: read net joules with care")
    return Verdict(valid=not failures, failures=tuple(failures), notes=tuple(notes))


def _medians(windows: Sequence[MeasuredWindow]) -> list[float]:
    return [window.latency.p50_ns for window in windows]


def _measured_joules(windows: Sequence[MeasuredWindow]) -> list[float]:
    """For each inference; what a model estimated varies with the model, not with the machine."""
    return [
        energy.value / window.inferences
        for window in windows
        if (energy := joules(window)) is not None and energy.provenance.startswith("measured")
    ]


def joules(window: MeasuredWindow) -> Energy | None:
    """The energy that counts; that of an invalid window is a gap, though the window keeps it."""
    return None if window.invalid else window.energy


def judge_all(
    candidates: Sequence[Candidate],
    preset: str,
    before: Environment,
    after: Environment,
    notes: Sequence[str],
) -> Verdict:
    """The verdict on the whole: it is valid where every candidate is."""
    failures = [f"{c.name}: {reason}" for c in candidates for reason in c.verdict.failures]
    found = list(notes)
    if preset == "quick":
        found.append("preset quick: windows too short for a claim; use standard or report")
    if min((len(c.windows) for c in candidates), default=WINDOWS_FOR_95) < WINDOWS_FOR_95:
        found.append(
            f"fewer than {WINDOWS_FOR_95} windows: no interval reaches 95%, no saving is claimed"
        )
    if (before["throttle_events"] or 0) < (after["throttle_events"] or 0):
        found.append("the processor throttled; windows in which it did were measured again")
    found += [f"at the end: {reason}" for gpu in after["gpus"] for reason in slowdowns(gpu)]
    found += _machine_notes(before, after)
    found += _window_notes([window for c in candidates for window in c.windows])
    found += [f"{c.name}: {note}" for c in candidates for note in c.verdict.notes]
    return Verdict(valid=not failures, failures=tuple(failures), notes=tuple(found))


def _machine_notes(before: Environment, after: Environment) -> Iterator[str]:
    if before["virtual_machine"]:
        yield "a virtual machine: other guests share the processor"
    if before["container"]:
        yield "in a container: what runs beside it may not be seen"
    if before["governor"] not in (None, "performance"):
        yield f"frequency governor is '{before['governor']}', not 'performance'"
    if before["load_average"][0] > BUSY_LOAD_SHARE * before["usable_cores"]:
        yield f"the machine was busy at the start: load {before['load_average'][0]:.1f}"
    if before["on_battery"]:
        yield "on battery"
    started, ended = dict(before), dict(after)
    for key in SETTINGS:
        if started[key] != ended[key]:
            words = key.replace("_", " ")
            yield f"{words} changed during the measurement: {started[key]} to {ended[key]}"
    start, end = before["temperature_c"], after["temperature_c"]
    if start is not None and end is not None and end - start > WARMER_C:
        yield f"the machine ended {end - start:.0f} C warmer than it began"


def _window_notes(windows: Sequence[MeasuredWindow]) -> Iterator[str]:
    """What the windows' conditions say, over all of them."""
    found = [window.conditions for window in windows]
    background = [c.background_cores for c in found if c.background_cores is not None]
    if background and (mean := sum(background) / len(background)) > BACKGROUND_CORES:
        yield (
            f"other programs kept {mean:.1f} cores busy during the windows "
            f"(up to {max(background):.1f})"
        )
    stolen = [c.stolen_cores for c in found if c.stolen_cores is not None]
    if stolen and (mean := sum(stolen) / len(stolen)) > STOLEN_CORES:
        yield f"the hypervisor gave {mean:.2f} cores' time to other guests during the windows"
    clocks = [c.frequency_mhz for c in found if c.frequency_mhz]
    if clocks and max(clocks) > (1 + CLOCK_CHANGE) * min(clocks):
        yield f"the processor's clock changed: {min(clocks):.0f} to {max(clocks):.0f} MHz"
