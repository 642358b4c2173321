"""The account of a network's life in joules and carbon, and when pruning has paid for itself.

NNCEC's own equations are not public; what follows is our reading, and claims no identity with them:

- operational carbon: kgCO2e = kWh x PUE x intensity / 1000, PUE on the host's stages only (a
  device in the field has none: 1.0);
- full cycle after N inferences: E(N) = E_train + E_prune + N e_inference, for the dense network
  without E_prune;
- break-even: N* = E_prune / (e_dense - e_pruned). E_prune is every stage that is neither training
  nor observing; export and compilation count in it whole, although dense needs a part of them.

Embodied carbon of the hardware is not included. A stage that was not measured is named and makes
the totals lower bounds; it is never counted as zero silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from greenprune.bundle import Provenance
from greenprune.errors import MeasurementError
from greenprune.harness.results import Candidate, InferenceEnergy, Results
from greenprune.harness.statistics import Interval
from greenprune.meters.energy import weakest
from greenprune.nncec.factors import Factor, user_supplied
from greenprune.nncec.ledger import JOULES_PER_KWH, Quantity, Row

TRAINING = "train"
OBSERVING = ("load", "bench", "account", "report")
"""Stages that look at the network and change nothing: in the totals, not in break-even."""
TRAINED_ELSEWHERE = "training of the supplied weights"
EQUATIONS = "our reading; NNCEC's own equations are not public"


@dataclass(frozen=True, kw_only=True)
class StageTotal:
    """All executions of one stage together."""

    stage: str
    seconds: float
    joules: Quantity | None
    kgco2e: Quantity | None
    provenance: Provenance | None


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """Inferences after which pruning has paid; all None, with the reason, where that is unknown."""

    inferences: Quantity | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class VariantAccount:
    """One variant: for each inference, and for its life of ``Account.inferences`` of them."""

    energy_mj: InferenceEnergy | None
    ugco2e: Quantity | None
    life_joules: Quantity | None
    life_kgco2e: Quantity | None
    break_even: BreakEven


@dataclass(frozen=True, kw_only=True)
class Account:
    """The whole account; ``provenance`` is the weakest of all that went into it."""

    stages: tuple[StageTotal, ...]
    unmeasured_stages: tuple[str, ...]
    training_joules: Quantity
    pruning_joules: Quantity
    observing_joules: Quantity
    total_kwh: Quantity
    total_kgco2e: Quantity
    variants: dict[str, VariantAccount]
    runtime: str | None
    inferences: int
    intensity: Factor
    pue: float
    provenance: Provenance | None
    preset: str | None
    embodied: str
    equations: str


def account(
    rows: Sequence[Row],
    results: Results | None,
    *,
    intensity_g_per_kwh: float | Factor = 445.0,
    pue: float = 1.0,
    inferences: int = 1_000_000,
    runtime: str | None = None,
) -> Account:
    """Make the account.

    Args:
        rows: the ledger; a stage may occur several times, and every execution counts.
        results: what an inference costs; None where nothing was measured.
        intensity_g_per_kwh: grams for each kWh, or a factor with its source.
        pue: power usage effectiveness of where the stages ran, 1.0 or more (1.56 is typical of an
            unknown data centre).
        inferences: N of the full cycle.
        runtime: whose inferences are counted; None means the first one measured.

    Raises:
        MeasurementError: pue below 1, or a runtime that was not measured.
    """
    if not pue >= 1.0:
        raise MeasurementError(f"pue = {pue}: expected 1.0 or more")
    factor = (
        intensity_g_per_kwh
        if isinstance(intensity_g_per_kwh, Factor)
        else user_supplied(intensity_g_per_kwh)
    )
    chosen = _choose(results, runtime)
    training, pruning, observing = (
        _sum(row.joules for row in rows if _purpose(row.stage) == purpose)
        for purpose in ("training", "pruning", "observing")
    )
    kwh = _sum((training, pruning, observing)).scaled(1 / JOULES_PER_KWH)
    unmeasured = tuple(dict.fromkeys(row.stage for row in rows if row.joules is None))
    if not any(_purpose(row.stage) == "training" for row in rows):
        unmeasured += (TRAINED_ELSEWHERE,)
    dense = chosen["dense"].energy_mj if "dense" in chosen else None
    life = _Life(factor=factor, pue=pue, inferences=inferences)
    labels = [row.provenance for row in rows] + [
        candidate.energy_mj.provenance for candidate in chosen.values() if candidate.energy_mj
    ]
    return Account(
        stages=_stages(rows, life),
        unmeasured_stages=unmeasured,
        training_joules=training,
        pruning_joules=pruning,
        observing_joules=observing,
        total_kwh=kwh,
        total_kgco2e=_carbon(kwh, factor, pue),
        variants={
            name: _variant(candidate, dense, training, pruning, unmeasured, life)
            for name, candidate in chosen.items()
        },
        runtime=next((candidate.runtime for candidate in chosen.values()), None),
        inferences=inferences,
        intensity=factor,
        pue=pue,
        provenance=weakest(found for found in labels if found is not None),
        preset=results.preset if results else None,
        embodied="not included",
        equations=EQUATIONS,
    )


def _purpose(stage: str) -> str:
    """Stages of one target are called ``bench-x86``, stages of one network ``finetune-mild``."""
    kind = stage.partition("-")[0]
    if kind in OBSERVING:
        return "observing"
    return "training" if kind == TRAINING else "pruning"


@dataclass(frozen=True, kw_only=True)
class _Life:
    factor: Factor
    pue: float
    inferences: int


def _choose(results: Results | None, runtime: str | None) -> dict[str, Candidate]:
    if results is None:
        return {}
    runtime = runtime or results.candidates[0].runtime
    results.candidate("dense", runtime)
    return {c.variant: c for c in results.candidates if c.runtime == runtime}


def _sum(parts: Iterable[Quantity | None]) -> Quantity:
    total = Quantity(value=0.0, low=0.0, high=0.0)
    for part in parts:
        if part is not None:
            total = total.plus(part)
    return total


def _carbon(kwh: Quantity, factor: Factor, pue: float) -> Quantity:
    """kgCO2e of kWh."""
    intensity = Quantity(value=factor.value, low=factor.low, high=factor.high)
    return kwh.times(intensity).scaled(pue / 1000)


def _stages(rows: Sequence[Row], life: _Life) -> tuple[StageTotal, ...]:
    totals = []
    for stage in dict.fromkeys(row.stage for row in rows):
        runs = [row for row in rows if row.stage == stage]
        joules = None if any(r.joules is None for r in runs) else _sum(r.joules for r in runs)
        carbon = joules and _carbon(joules.scaled(1 / JOULES_PER_KWH), life.factor, life.pue)
        totals.append(
            StageTotal(
                stage=stage,
                seconds=sum(row.seconds for row in runs),
                joules=joules,
                kgco2e=carbon,
                provenance=weakest(r.provenance for r in runs if r.provenance is not None),
            )
        )
    return tuple(totals)


def _variant(
    candidate: Candidate,
    dense: InferenceEnergy | None,
    training: Quantity,
    pruning: Quantity,
    unmeasured: Sequence[str],
    life: _Life,
) -> VariantAccount:
    is_dense = candidate.variant == "dense"
    prepared = training if is_dense else training.plus(pruning)
    found = candidate.energy_mj
    if found is None:
        nothing = BreakEven(inferences=None, reason="inferences were not measured")
        return VariantAccount(
            energy_mj=None, ugco2e=None, life_joules=None, life_kgco2e=None, break_even=nothing
        )
    each = Quantity(value=found.value, low=found.low, high=found.high).scaled(1e-3)
    # kg to micrograms: 1e9
    ugco2e = _carbon(each.scaled(1e9 / JOULES_PER_KWH), life.factor, 1.0)
    use = each.scaled(life.inferences)
    return VariantAccount(
        energy_mj=found,
        ugco2e=ugco2e,
        life_joules=prepared.plus(use),
        life_kgco2e=_carbon(prepared.scaled(1 / JOULES_PER_KWH), life.factor, life.pue).plus(
            _carbon(use.scaled(1 / JOULES_PER_KWH), life.factor, 1.0)
        ),
        break_even=(
            BreakEven(inferences=None, reason="the network that the others are compared with")
            if is_dense
            else break_even(pruning, dense, candidate.energy_ratio, unmeasured)
        ),
    )


def break_even(
    pruning: Quantity,
    dense: InferenceEnergy | None,
    ratio: Interval | None,
    unmeasured: Sequence[str] = (),
) -> BreakEven:
    """N* = E_prune / (e_dense (1 - r)), with r the pruned network's energy over the dense one's.

    r is paired by block, so that what both share (the machine's drift, an estimate's watts for
    each core) cancels; its interval decides whether there is a saving at all.
    """
    if dense is None or ratio is None:
        return BreakEven(inferences=None, reason="inferences were not measured")
    if ratio.high >= 1.0:
        return BreakEven(
            inferences=None,
            reason="no saving is shown: the energy ratio to dense is "
            f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}], which is not wholly below 1",
        )
    missing = [
        stage for stage in unmeasured if stage != TRAINED_ELSEWHERE and _purpose(stage) == "pruning"
    ]
    if missing:
        return BreakEven(
            inferences=None, reason=f"stages without a measurement: {', '.join(missing)}"
        )
    found = Quantity(
        value=pruning.value / (1e-3 * dense.value * (1 - ratio.value)),
        low=pruning.low / (1e-3 * dense.high * (1 - ratio.low)),
        high=pruning.high / (1e-3 * dense.low * (1 - ratio.high)),
    )
    return BreakEven(inferences=found, reason="")
