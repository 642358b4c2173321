"""Two bundles against each other: is one really faster, does one really take less energy?

Every candidate of both is measured in the same randomised blocks, so that what changes on the
machine falls on both alike, and each ratio is paired by block. A difference is called real by the
rule of :mod:`greenprune.harness.regression`: all intervals together miss with 5 % at most, and the
difference is larger than what two processes that run the same network may differ by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greenprune import bundle as bundles
from greenprune.errors import TargetError
from greenprune.harness import protocol
from greenprune.harness.results import SCHEMA_VERSION, Candidate, Results, Verdict
from greenprune.harness.statistics import THRESHOLD, Interval, raised_confidence, supports_claim
from greenprune.harness.summary import energy_ratio, latency_ratio
from greenprune.meters.energy import label, weakest

if TYPE_CHECKING:
    from rich.table import Table

CLAIM = "and the difference is real"


@dataclass(frozen=True, kw_only=True)
class RacedPair:
    """One variant on one runtime, of both bundles; ratios are B over A, so below 1 B is better.

    The intervals' confidence is raised, so that those of all pairs together miss with 5 % at most.
    """

    variant: str
    runtime: str
    latency_ratio: Interval
    """Mean latency, paired by block."""
    energy_ratio: Interval | None
    """Gross joules for each inference, paired by block; None without a meter."""
    accuracy: tuple[float | None, float | None]
    """Of A and B, each on its own held-out images."""
    words: str
    """What the intervals say."""

    @property
    def name(self) -> str:
        return f"{self.variant} on {self.runtime}"


@dataclass(frozen=True, kw_only=True)
class BundleRace:
    """Two bundles, A (``first``) and B (``second``), measured in the same blocks."""

    schema: int
    first: Results
    second: Results
    pairs: tuple[RacedPair, ...]
    verdict: Verdict
    """Valid where both are."""

    def table(self) -> Table:
        """The pairs as a table for a terminal."""
        from greenprune.harness.table import race_table

        return race_table(self)


def race_bundles(
    first: Path,
    second: Path,
    *,
    preset: str = "quick",
    meter: str = "auto",
    runtimes: Sequence[str] | None = None,
    threads: int = 0,
    seed: int = 0,
    tdp_watts: float | None = None,
) -> BundleRace:
    """Measure two bundles side by side and say for each variant and runtime which is better.

    Args:
        first: a bundle's folder, A.
        second: another's, B.
        runtimes: runtimes to measure; None means all that both bundles have and are installed.
        preset: this and the rest as in :func:`greenprune.harness.bench`.

    Raises:
        MeasurementError: no such preset or meter, or a candidate's process failed.
        BundleError: a bundle is damaged.
        TargetError: the bundles have no runtime in common, or none that is installed here.
    """
    chosen_preset = protocol.check_options(preset, tdp_watts)
    opened = {
        side: bundles.open_bundle(Path(path).resolve())
        for side, path in (("A", first), ("B", second))
    }
    chosen = _common_runtimes(opened, runtimes)
    requests: dict[protocol.Key, dict[str, Any]] = {
        (side, variant, runtime): {"bundle": str(bundle.path)}
        for side, bundle in opened.items()
        for runtime in chosen
        for variant in protocol.VARIANTS
    }
    with protocol.one_at_a_time():
        for bundle in opened.values():
            bundle.verify()
        settings = protocol.settle_settings(chosen_preset, meter, threads, seed, tdp_watts)
        measured = protocol.run_protocol(requests, settings)
    sides = {
        side: protocol.make_results(
            bundle, [key for key in requests if key[0] == side], measured, settings
        )
        for side, bundle in opened.items()
    }
    notes = list(_differences(opened["A"].manifest, opened["B"].manifest))
    return make_race(sides["A"], sides["B"], notes)


def make_race(first: Results, second: Results, notes: Sequence[str]) -> BundleRace:
    """The pairs of two results that were measured in the same blocks."""
    sides = (("A", first.verdict), ("B", second.verdict))
    failures = [f"{side}: {reason}" for side, verdict in sides for reason in verdict.failures]
    shared = [note for note in first.verdict.notes if note in second.verdict.notes]
    own = [f"{side}: {n}" for side, verdict in sides for n in verdict.notes if n not in shared]
    doubt = "preset quick, a first look" if first.preset == "quick" else ""
    if failures:
        doubt = "the measurement is not valid"
    both = [(a, second.candidate(a.variant, a.runtime)) for a in first.candidates]
    ratios = sum(1 + (energy_ratio(b.windows, a.windows) is not None) for a, b in both)
    return BundleRace(
        schema=SCHEMA_VERSION,
        first=first,
        second=second,
        pairs=tuple(_pair(a, b, doubt, raised_confidence(ratios)) for a, b in both),
        verdict=Verdict(
            valid=not failures, failures=tuple(failures), notes=(*notes, *shared, *own)
        ),
    )


def _pair(a: Candidate, b: Candidate, doubt: str, confidence: float) -> RacedPair:
    latency = latency_ratio(b.windows, a.windows, confidence)
    joules = energy_ratio(b.windows, a.windows, confidence)
    words = [f"latency: {_say(latency, doubt, confidence)}"]
    if joules is not None:
        provenance = weakest([c.energy_mj.provenance for c in (a, b) if c.energy_mj is not None])
        claim = "by the estimate" if provenance == "estimated_model" else CLAIM
        words.append(f"energy ({label(provenance)}): {_say(joules, doubt, confidence, claim)}")
    return RacedPair(
        variant=a.variant,
        runtime=a.runtime,
        latency_ratio=latency,
        energy_ratio=joules,
        accuracy=(a.accuracy, b.accuracy),
        words="; ".join(words),
    )


def _say(ratio: Interval, doubt: str, confidence: float, claim: str = CLAIM) -> str:
    """What a paired ratio says, B over A; ``doubt``: why it may claim nothing."""
    if not ratio.excludes(1.0):
        return "no clear difference"
    size = f"B takes {abs(ratio.value - 1):.1%} {'more' if ratio.value > 1 else 'less'} than A"
    if not doubt and not supports_claim(ratio, confidence, threshold=0.0):
        doubt = f"{ratio.confidence:.1%} sure at most, of {confidence:.1%}: too few windows"
    if not doubt and not supports_claim(ratio, confidence):
        doubt = f"within {THRESHOLD:.0%}, as two runs of the same bundle may differ"
    return f"{size}, but no claim: {doubt}" if doubt else f"{size}, {claim}"


def _common_runtimes(opened: dict[str, bundles.Bundle], asked: Sequence[str] | None) -> list[str]:
    a, b = (protocol.choose_runtimes(bundle.manifest, asked) for bundle in opened.values())
    common = [runtime for runtime in a if runtime in b]
    if not common:
        raise TargetError(
            f"nothing to race: A has {', '.join(a)} and B has {', '.join(b)}, of what is installed "
            "here; export both for the same target and precision"
        )
    return common


def _differences(a: bundles.Manifest, b: bundles.Manifest) -> Iterator[str]:
    """What a reader of the ratios must know of the two bundles."""
    if a.target != b.target:
        yield f"A was exported for '{a.target}', B for '{b.target}'"
    if a.input.shape != b.input.shape:
        yield f"A answers inputs of shape {list(a.input.shape)}, B of {list(b.input.shape)}"
    replayed = [m.files.get(m.samples.replay_inputs or m.samples.reference_input) for m in (a, b)]
    if replayed[0] != replayed[1]:
        yield "A and B replay different images: accuracies and accept rates are of different sets"
