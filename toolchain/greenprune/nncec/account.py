"""The account of a network's life in joules and carbon, and when pruning has paid for itself.

NNCEC's own equations are not public; what follows is our reading, and claims no identity with them:

- operational carbon: kgCO2e = kWh x PUE x intensity / 1000. The host's stages have the host's
  intensity and its PUE; inferences have the device's intensity and no PUE (1.0);
- full cycle after N inferences: E(N) = E_train + E_prune + N e_inference, for the dense network
  without E_prune;
- break-even in joules: N* = E_prune / (e_dense - e_pruned); in carbon both sides are multiplied by
  what their joules emit, N*_CO2 = N* x PUE x I_host / I_device. E_prune is every stage that is
  neither training nor observing; export and compilation count in it whole, although dense needs a
  part of them;
- SCI (ISO/IEC 21031:2024) with R = one inference: ((E x I) + M) per R, E and M of the device alone;
  training and pruning are in the life's total, not in the score.

- a pruned network's inference counts in a life as r e_dense, with r paired by block, as in the
  break-even, so that both agree.

Embodied carbon is included where the user gives the device's. A stage that was not measured is
named and makes the totals lower bounds; it is never counted as zero silently, and of what no row
has joules there is no total.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

from greenprune.bundle import Provenance
from greenprune.errors import MeasurementError
from greenprune.harness.results import Candidate, InferenceEnergy, Results
from greenprune.harness.statistics import Interval
from greenprune.meters.energy import weakest
from greenprune.nncec.factors import WORLD, Factor, user_supplied
from greenprune.nncec.ledger import JOULES_PER_KWH, Quantity, Row
from greenprune.nncec.life import MOST_INFERENCES, Embodied, Fleet

TRAINING = "train"
OBSERVING = ("load", "bench", "account", "report")
"""Stages that look at the network and change nothing: in the totals, not in break-even."""
TRAINED_ELSEWHERE = "training of the supplied weights"
NOT_MEASURED = "inferences were not measured"
NOTHING_PRUNED = "no stage that pruned is in the ledger with joules"
UNREADABLE = "damaged lines of the ledger"
"""Listed among the stages that were not measured; any stage may have been in such a line."""
HIGHEST_PUE = 5.0
EQUATIONS = "our reading; NNCEC's own equations are not public"


@dataclass(frozen=True, kw_only=True)
class StageTotal:
    """All executions of one stage together: lower bounds where one of them was not measured."""

    stage: str
    seconds: float
    joules: Quantity | None
    kgco2e: Quantity | None
    provenance: Provenance | None
    note: str
    """Why ``joules`` are None or lack a part, where that is known."""


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """Inferences after which pruning has paid; all None, with the reason, where that is unknown."""

    inferences: Quantity | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class VariantAccount:
    """One variant: for each inference, and for its life of ``Account.inferences`` of them."""

    energy_mj: InferenceEnergy | None
    counted_mj: Quantity | None
    """Of one inference as the life counts it: r times the dense network's, paired by block."""
    ugco2e: Quantity | None
    """Of one inference's electricity, micrograms."""
    sci_ugco2e: Quantity | None
    """The score: ``ugco2e`` and one inference's share of the device's embodied carbon."""
    life_joules: Quantity | None
    life_kgco2e: Quantity | None
    """With embodied carbon, where it is given."""
    saved_kgco2e: Quantity | None
    """Against the dense network over the life, what pruning cost deducted; below 0 is a loss.
    None where it is not known; ``break_even.reason`` says why."""
    break_even: BreakEven
    """In joules."""
    break_even_co2: BreakEven


@dataclass(frozen=True, kw_only=True)
class Account:
    """The whole account; ``provenance`` is the weakest of the joules that went into it.

    Intensities and embodied carbon have sources of their own. ``total_kwh`` and ``total_kgco2e``
    are the ledger's: spent so far, no inference in the field. A sum is None where nothing of it was
    measured, and a lower bound where :func:`understated` names its purpose.
    """

    stages: tuple[StageTotal, ...]
    unmeasured_stages: tuple[str, ...]
    incomplete_stages: tuple[str, ...]
    """Measured in part, as a row's note says: their joules are lower bounds."""
    training_joules: Quantity | None
    pruning_joules: Quantity | None
    observing_joules: Quantity | None
    total_kwh: Quantity | None
    total_kgco2e: Quantity | None
    variants: dict[str, VariantAccount]
    runtime: str | None
    inferences: int
    intensity: Factor
    """Where the stages ran."""
    device_intensity: Factor
    """Where the inferences are made."""
    pue: float
    fleet: Fleet | None
    """Where ``inferences`` come from; None where their number was given by itself."""
    embodied: Embodied | None
    embodied_kgco2e: float | None
    """Of the fleet; None: not included."""
    provenance: Provenance | None
    preset: str | None
    valid: bool | None
    """Whether the measurement of the inferences was; None where there was none."""
    equations: str
    unreadable: tuple[str, ...]
    """What is wrong with lines of the ledger that could not be counted."""


def account(
    rows: Sequence[Row],
    results: Results | None,
    *,
    intensity_g_per_kwh: float | Factor = WORLD,
    device_intensity_g_per_kwh: float | Factor | None = None,
    pue: float = 1.0,
    inferences: int = 1_000_000,
    fleet: Fleet | None = None,
    embodied: Embodied | None = None,
    runtime: str | None = None,
    unreadable: Sequence[str] = (),
    absent: Sequence[str] = (),
) -> Account:
    """Make the account.

    Args:
        rows: the ledger; a stage may occur several times, and every execution counts.
        results: what an inference costs; None where nothing was measured.
        intensity_g_per_kwh: of where the stages ran: grams for each kWh, or a factor with its
            source.
        device_intensity_g_per_kwh: of where the inferences are made; None: the same.
        pue: power usage effectiveness of where the stages ran, 1.0 or more (1.56 is typical of an
            unknown data centre).
        inferences: N of the full cycle, where no fleet is given.
        fleet: how many inferences are made, where and for how long.
        embodied: carbon of making a device; needs a fleet, which says how long it is in use.
        runtime: whose inferences are counted; None means the first one measured.
        unreadable: the ledger's damaged lines, from :func:`greenprune.nncec.ledger.scan`.
        absent: stages that are finished and have no row in the ledger.

    Raises:
        MeasurementError: a PUE or an intensity that no place has, a number of inferences that no
            life has, embodied carbon without a fleet, or a runtime that was not measured.
    """
    if not 1.0 <= pue <= HIGHEST_PUE:
        raise MeasurementError(
            f"pue = {pue}: expected 1.0 or more, and at most {HIGHEST_PUE:g}; a data centre has "
            "between 1.1 and 2"
        )
    if not 1 <= inferences <= MOST_INFERENCES:
        raise MeasurementError(
            f"inferences = {inferences}: expected 1 or more, and at most {MOST_INFERENCES:g}"
        )
    if embodied is not None and fleet is None:
        raise MeasurementError(
            "embodied carbon: expected a fleet too, which says how long it lasts"
        )
    host = _factor(intensity_g_per_kwh)
    life = _Life(
        host=host,
        device=host if device_intensity_g_per_kwh is None else _factor(device_intensity_g_per_kwh),
        pue=pue,
        inferences=fleet.inferences if fleet else inferences,
        embodied_kgco2e=embodied.kgco2e(fleet) if embodied and fleet else None,
    )
    chosen = _choose(results, runtime)
    training, pruning, observing = (
        _sum(row.joules for row in rows if purpose(row.stage) == wanted)
        for wanted in ("training", "pruning", "observing")
    )
    joules = _sum((training, pruning, observing))
    kwh = None if joules is None else joules.scaled(1 / JOULES_PER_KWH)
    unmeasured = _unmeasured(rows, absent, unreadable)
    in_part = [row.stage for row in rows if row.joules is not None and row.note]
    dense = chosen["dense"].energy_mj if "dense" in chosen else None
    labels = [row.provenance for row in rows] + [
        candidate.energy_mj.provenance for candidate in chosen.values() if candidate.energy_mj
    ]
    return Account(
        stages=_stages(rows, life),
        unmeasured_stages=unmeasured,
        incomplete_stages=tuple(dict.fromkeys(in_part)),
        training_joules=training,
        pruning_joules=pruning,
        observing_joules=observing,
        total_kwh=kwh,
        total_kgco2e=None if kwh is None else _carbon(kwh, life.host, pue),
        variants={
            name: _variant(candidate, dense, training, pruning, unmeasured, life)
            for name, candidate in chosen.items()
        },
        runtime=next((candidate.runtime for candidate in chosen.values()), None),
        inferences=life.inferences,
        intensity=life.host,
        device_intensity=life.device,
        pue=pue,
        fleet=fleet,
        embodied=embodied,
        embodied_kgco2e=life.embodied_kgco2e,
        provenance=weakest(found for found in labels if found is not None),
        preset=results.preset if results else None,
        valid=results.verdict.valid if results else None,
        equations=EQUATIONS,
        unreadable=tuple(unreadable),
    )


def _factor(given: float | Factor) -> Factor:
    return given if isinstance(given, Factor) else user_supplied(given)


def _unmeasured(
    rows: Sequence[Row], absent: Sequence[str], unreadable: Sequence[str]
) -> tuple[str, ...]:
    names = [row.stage for row in rows if row.joules is None] + list(absent)
    entered = [row.stage for row in rows] + list(absent)
    if not any(purpose(stage) == "training" for stage in entered):
        names.append(TRAINED_ELSEWHERE)
    if unreadable:
        names.append(UNREADABLE)
    return tuple(dict.fromkeys(names))


def purpose(stage: str) -> str:
    """``training``, ``pruning`` or ``observing``: what a stage counts as.

    Stages of one target are called ``bench-x86``, stages of one network ``finetune-mild``.
    """
    kind = stage.partition("-")[0]
    if kind in OBSERVING:
        return "observing"
    return "training" if kind in (TRAINING, TRAINED_ELSEWHERE) else "pruning"


def understated(account: Account) -> frozenset[str]:
    """The purposes whose joules are lower bounds."""
    if UNREADABLE in account.unmeasured_stages:
        return frozenset(("training", "pruning", "observing"))
    named = (*account.unmeasured_stages, *account.incomplete_stages)
    nothing = {"pruning"} if account.pruning_joules is None else set()
    return frozenset(map(purpose, named)) | nothing


@dataclass(frozen=True, kw_only=True)
class _Life:
    host: Factor
    device: Factor
    pue: float
    inferences: int
    embodied_kgco2e: float | None

    def host_over_device(self) -> Quantity:
        """What a joule of a stage emits over what one of an inference does.

        One grid for both: its uncertainty is the same on both sides, and cancels.
        """
        low, high = (
            (1.0, 1.0)
            if self.host == self.device
            else (self.host.low / self.device.high, self.host.high / self.device.low)
        )
        ratio = Quantity(value=self.host.value / self.device.value, low=low, high=high)
        return ratio.scaled(self.pue)


def _choose(results: Results | None, runtime: str | None) -> dict[str, Candidate]:
    if results is None:
        return {}
    runtime = runtime or results.candidates[0].runtime
    results.candidate("dense", runtime)
    return {c.variant: c for c in results.candidates if c.runtime == runtime}


def _sum(parts: Iterable[Quantity | None]) -> Quantity | None:
    """Of those that are known; None of none."""
    known = [part for part in parts if part is not None]
    return reduce(Quantity.plus, known) if known else None


def _carbon(kwh: Quantity, factor: Factor, pue: float) -> Quantity:
    """kgCO2e of kWh."""
    intensity = Quantity(value=factor.value, low=factor.low, high=factor.high)
    return kwh.times(intensity).scaled(pue / 1000)


def _stages(rows: Sequence[Row], life: _Life) -> tuple[StageTotal, ...]:
    totals = []
    for stage in dict.fromkeys(row.stage for row in rows):
        runs = [row for row in rows if row.stage == stage]
        joules = _sum(run.joules for run in runs)
        notes = dict.fromkeys(row.note for row in runs if row.note)
        carbon = joules and _carbon(joules.scaled(1 / JOULES_PER_KWH), life.host, life.pue)
        totals.append(
            StageTotal(
                stage=stage,
                seconds=sum(row.seconds for row in runs),
                joules=joules,
                kgco2e=carbon,
                provenance=weakest(r.provenance for r in runs if r.provenance is not None),
                note="; ".join(notes),
            )
        )
    return tuple(totals)


def _variant(
    candidate: Candidate,
    dense: InferenceEnergy | None,
    training: Quantity | None,
    pruning: Quantity | None,
    unmeasured: Sequence[str],
    life: _Life,
) -> VariantAccount:
    is_dense = candidate.variant == "dense"
    found = candidate.energy_mj
    if found is None:
        nothing = BreakEven(inferences=None, reason=NOT_MEASURED)
        return VariantAccount(
            energy_mj=None,
            counted_mj=None,
            ugco2e=None,
            sci_ugco2e=None,
            life_joules=None,
            life_kgco2e=None,
            saved_kgco2e=None,
            break_even=nothing,
            break_even_co2=nothing,
        )
    prepared = _sum((training,) if is_dense else (training, pruning)) or _exactly(0.0)
    counted = each = _quantity(found)
    if not is_dense and dense is not None and candidate.energy_ratio is not None:
        counted = _quantity(dense).times(_quantity(candidate.energy_ratio))
    # kg to micrograms: 1e9; mJ to J: 1e-3
    ugco2e = _carbon(each.scaled(1e6 / JOULES_PER_KWH), life.device, 1.0)
    use = counted.scaled(1e-3 * life.inferences)
    embodied = life.embodied_kgco2e or 0.0
    paid = paid_co2 = BreakEven(inferences=None, reason="what the others are compared with")
    if not is_dense:
        in_co2 = pruning and pruning.times(life.host_over_device())
        paid, paid_co2 = (
            break_even(cost, dense, candidate.energy_ratio, unmeasured)
            for cost in (pruning, in_co2)
        )
    return VariantAccount(
        energy_mj=found,
        counted_mj=counted,
        ugco2e=ugco2e,
        sci_ugco2e=ugco2e.plus(_exactly(embodied * 1e9 / life.inferences)),
        life_joules=prepared.plus(use),
        life_kgco2e=_carbon(prepared.scaled(1 / JOULES_PER_KWH), life.host, life.pue)
        .plus(_carbon(use.scaled(1 / JOULES_PER_KWH), life.device, 1.0))
        .plus(_exactly(embodied)),
        saved_kgco2e=None
        if is_dense
        else _saved_kgco2e(dense, candidate.energy_ratio, pruning, unmeasured, life),
        break_even=paid,
        break_even_co2=paid_co2,
    )


def _quantity(found: InferenceEnergy | Interval) -> Quantity:
    return Quantity(value=found.value, low=found.low, high=found.high)


def _exactly(value: float) -> Quantity:
    return Quantity(value=value, low=value, high=value)


def _saved_kgco2e(
    dense: InferenceEnergy | None,
    ratio: Interval | None,
    pruning: Quantity | None,
    unmeasured: Sequence[str],
    life: _Life,
) -> Quantity | None:
    """N e_dense (1 - r) I_device - E_prune PUE I_host, in kgCO2e; r as in :func:`break_even`."""
    if dense is None or ratio is None or _unknown(pruning, unmeasured) or pruning is None:
        return None
    scale = 1e-3 * life.inferences / JOULES_PER_KWH / 1000
    spent = _carbon(pruning.scaled(1 / JOULES_PER_KWH), life.host, life.pue)
    # 1 - r may be below zero, so that an end may come from either end of the others
    ends = [
        millijoules * (1 - share) * grams * scale
        for millijoules in (dense.low, dense.high)
        for share in (ratio.low, ratio.high)
        for grams in (life.device.low, life.device.high)
    ]
    return Quantity(
        value=dense.value * (1 - ratio.value) * life.device.value * scale - spent.value,
        low=min(ends) - spent.high,
        high=max(ends) - spent.low,
    )


def _unknown(pruning: Quantity | None, unmeasured: Sequence[str]) -> str:
    """Why it is not known what pruning cost; empty where it is."""
    missing = [stage for stage in unmeasured if purpose(stage) == "pruning"]
    if missing:
        return f"stages without a measurement: {', '.join(missing)}"
    return NOTHING_PRUNED if pruning is None else ""


def break_even(
    pruning: Quantity | None,
    dense: InferenceEnergy | None,
    ratio: Interval | None,
    unmeasured: Sequence[str] = (),
) -> BreakEven:
    """N* = E_prune / (e_dense (1 - r)), with r the pruned network's energy over the dense one's.

    For N* in carbon, ``pruning`` is the joules of inferences that emit as much as pruning did.
    r is paired by block, so that what both share (the machine's drift, an estimate's watts for
    each core) cancels; its interval decides whether there is a saving at all, at the confidence
    that :attr:`Interval.shows_difference` asks for.
    """
    if dense is None or ratio is None:
        return BreakEven(inferences=None, reason=NOT_MEASURED)
    unknown = _unknown(pruning, unmeasured)
    if unknown or pruning is None:
        return BreakEven(inferences=None, reason=unknown)
    if ratio.high >= 1.0 or not ratio.shows_difference:
        why = (
            "which is not wholly below 1"
            if ratio.high >= 1.0
            else f"from too few windows: its confidence is {ratio.confidence:.0%}"
        )
        return BreakEven(
            inferences=None,
            reason="no saving is shown: the energy ratio to dense is "
            f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}], {why}",
        )
    if dense.low <= 0:
        return BreakEven(
            inferences=None,
            reason="the dense network's energy is not shown to be above 0: "
            f"{dense.value:.3g} [{dense.low:.3g}, {dense.high:.3g}] mJ",
        )
    found = Quantity(
        value=pruning.value / (1e-3 * dense.value * (1 - ratio.value)),
        low=pruning.low / (1e-3 * dense.high * (1 - ratio.low)),
        high=pruning.high / (1e-3 * dense.low * (1 - ratio.high)),
    )
    return BreakEven(inferences=found, reason="")
