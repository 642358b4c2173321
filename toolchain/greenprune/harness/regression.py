"""Old results against new ones: a gate for regressions in a user's CI.

The two files were measured at different times and share no blocks, so their ratios are unpaired
(:func:`greenprune.harness.statistics.unpaired_ratio`). All intervals together miss with 5 % at
most: each one's confidence is raised to 1 - 0.05 / their number (Bonferroni). What differs between
two runs of the same thing, another day or another boot, no interval over windows contains; that is
what the threshold is for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from greenprune.errors import MeasurementError
from greenprune.harness.environment import Environment
from greenprune.harness.results import Candidate, MeterRecord, Results
from greenprune.harness.statistics import (
    THRESHOLD,
    Interval,
    raised_confidence,
    supports_claim,
    unpaired_ratio,
)
from greenprune.harness.summary import energies_mj, mean_latencies_ms
from greenprune.meters.energy import label

if TYPE_CHECKING:
    from rich.table import Table

MACHINE = (
    "cpu",
    "cores",
    "usable_cores",
    "governor",
    "energy_preference",
    "boost",
    "clocks_locked",
    "power_mode",
    "virtual_machine",
    "container",
    "on_battery",
    "system",
    "versions",
)
"""Of the environment: what two comparable measurements share."""

Judgement = Literal["regression", "improvement", "no clear difference"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One quantity of one candidate; the ratio is new over old, so above 1 is worse."""

    variant: str
    runtime: str
    quantity: Literal["latency", "energy"]
    old: float
    """Median over windows: milliseconds (mean latency) or millijoules for each inference."""
    new: float
    ratio: Interval
    judgement: Judgement


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two results of the same variants, and whether the new ones are worse."""

    old: str
    """The bundle's name and when it was measured."""
    new: str
    preset: tuple[str, str]
    threshold: float
    differences: tuple[str, ...]
    """What else differs between the two, and may be the cause of a change; and too few windows."""
    changes: tuple[Change, ...]
    energy: str
    """What the joules are: measured, ESTIMATE ..., not measured."""
    regression: bool

    def table(self) -> Table:
        """The changes as a table for a terminal."""
        from greenprune.harness.table import comparison_table

        return comparison_table(self)


def compare_results(old: Results, new: Results, *, threshold: float = THRESHOLD) -> Comparison:
    """Compare candidate by candidate; a regression is one that the interval supports.

    Args:
        old: the baseline.
        new: of the same variants and runtimes, at least.
        threshold: smallest change that matters, as a fraction. A regression needs an interval
            whose low end is above 1 at the confidence that is needed, and a ratio above
            1 + threshold.

    Raises:
        MeasurementError: one of the two is NOT VALID, the new results lack a candidate, or joules
            are of another provenance: such numbers cannot be compared.
    """
    _check_valid(old, new)
    lacking = [c.name for c in old.candidates if c.name not in {n.name for n in new.candidates}]
    if lacking:
        raise MeasurementError(
            f"the new results lack {', '.join(lacking)}; expected all that the old ones have: "
            "measure the same variants and runtimes, or take a new baseline"
        )
    pairs = [(each, new.candidate(each.variant, each.runtime)) for each in old.candidates]
    for pair in pairs:
        _check_energy(*pair)
    joules = not _other_joules(old.meter_record, new.meter_record)
    samples = [sample for pair in pairs for sample in _samples(*pair, joules=joules)]
    confidence = raised_confidence(len(samples))
    changes = tuple(_change(*sample, confidence, threshold) for sample in samples)
    return Comparison(
        old=f"{old.bundle}, {old.created}",
        new=f"{new.bundle}, {new.created}",
        preset=(old.preset, new.preset),
        threshold=threshold,
        differences=(*_differences(old, new), *_weakness(changes, confidence)),
        changes=changes,
        energy=label(old.meter_record.provenance),
        regression=any(change.judgement == "regression" for change in changes),
    )


def _check_valid(old: Results, new: Results) -> None:
    for which, results in (("old", old), ("new", new)):
        if not results.verdict.valid:
            raise MeasurementError(
                f"the {which} results are NOT VALID: {'; '.join(results.verdict.failures)}; "
                "nothing can be read from them: measure again, on a quieter machine"
            )


def _check_energy(old: Candidate, new: Candidate) -> None:
    provenances = {c.energy_mj.provenance if c.energy_mj else None for c in (old, new)}
    if len(provenances) > 1 and None not in provenances:
        classes = " and ".join(sorted(str(p) for p in provenances))
        raise MeasurementError(
            f"{old.name}: joules of {classes} cannot be compared; measure both with the same "
            "--meter, or with --meter none to compare latencies alone"
        )


def _other_joules(old: MeterRecord, new: MeterRecord) -> str:
    """Why the joules of the two cannot be set against each other; empty where they can."""
    if (old.provenance is None) != (new.provenance is None):
        return "only one of the two has them"
    if (old.name, old.scope) != (new.name, new.scope):
        return "they are of different meters, or of other parts of the machine"
    if old.provenance == "estimated_model" and old.tdp_watts != new.tdp_watts:
        return "they are estimated from another TDP"
    return ""


def _samples(
    old: Candidate, new: Candidate, *, joules: bool
) -> Iterator[tuple[Candidate, Literal["latency", "energy"], list[float], list[float]]]:
    """What is compared: each window's mean; energies if ``joules`` and both have them."""
    yield old, "latency", mean_latencies_ms(old.windows), mean_latencies_ms(new.windows)
    energies = energies_mj(old.windows), energies_mj(new.windows)
    if joules and all(energies):
        yield old, "energy", *energies


def _change(
    candidate: Candidate,
    quantity: Literal["latency", "energy"],
    old: list[float],
    new: list[float],
    confidence: float,
    threshold: float,
) -> Change:
    ratio = unpaired_ratio(new, old, confidence)
    return Change(
        variant=candidate.variant,
        runtime=candidate.runtime,
        quantity=quantity,
        old=median(old),
        new=median(new),
        ratio=ratio,
        judgement=_judge(ratio, confidence, threshold),
    )


def _judge(ratio: Interval, confidence: float, threshold: float) -> Judgement:
    if not supports_claim(ratio, confidence, threshold):
        return "no clear difference"
    return "regression" if ratio.value > 1 else "improvement"


def _weakness(changes: Sequence[Change], confidence: float) -> Iterator[str]:
    """Where a gate cannot fail, whatever was measured, it says so."""
    reached = min(change.ratio.confidence for change in changes)
    if reached < confidence - 1e-12:
        yield (
            f"too few windows to find a regression: {reached:.2%} sure at most, and "
            f"{len(changes)} quantities need {confidence:.2%} each"
        )


def _differences(old: Results, new: Results) -> Iterator[str]:
    settings: tuple[tuple[str, Any, Any], ...] = (
        ("preset", old.preset, new.preset),
        ("threads", old.threads, new.threads),
        ("meter", old.meter, new.meter),
        ("scope of the joules", old.meter_record.scope, new.meter_record.scope),
        ("TDP", old.meter_record.tdp_watts, new.meter_record.tdp_watts),
        ("target", old.target, new.target),
    )
    before, after = _machine(old.environment_before), _machine(new.environment_before)
    machine = ((key.replace("_", " "), before[key], after[key]) for key in before)
    for what, was, now in (*settings, *machine):
        if was != now:
            yield f"{what}: {_words(was, now)} (old), {_words(now, was)} (new)"
    if why := _other_joules(old.meter_record, new.meter_record):
        yield f"joules are not compared: {why}"
    added = {c.name for c in new.candidates} - {c.name for c in old.candidates}
    if added:
        yield f"only the new results have: {', '.join(sorted(added))}"


def _machine(environment: Environment) -> dict[str, Any]:
    """What two comparable measurements share; of a GPU, what does not change from day to day."""
    everything: dict[str, Any] = dict(environment)
    gpus = [
        f"{gpu['name']}, driver {gpu['driver']}, power limit {gpu['power_limit_watts']} W"
        for gpu in environment["gpus"]
    ]
    return {key: everything[key] for key in MACHINE} | {"GPUs": "; ".join(gpus) or "none"}


def _words(value: Any, other: Any) -> str:
    """A value for people; of a dictionary, what is not the same in the other."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{k} {v}" for k, v in value.items() if other.get(k) != v) or "none of these"
