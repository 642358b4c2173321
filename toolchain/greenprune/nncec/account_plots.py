"""The account, drawn: the ledger, a life, and when pruning has paid."""

from __future__ import annotations

from typing import Any

import numpy as np

from greenprune.meters.energy import label
from greenprune.nncec.account import (
    Account,
    BreakEven,
    VariantAccount,
    purpose,
    understated,
)
from greenprune.nncec.drawing import (
    COLOURS,
    INK,
    MARKERS,
    Plot,
    draw,
    engineering,
    grams,
    legend_below,
)
from greenprune.nncec.ledger import JOULES_PER_KWH, Quantity
from greenprune.nncec.words import exact_grams, not_valid, quantity

PURPOSES = ("training", "pruning", "observing")
MAKING = "making the devices"
LARGE = 10.0
"""Embodied carbon of so many times the largest operational would hide the latter."""


def all_plots(account: Account) -> list[Plot]:
    """Those that there is data for."""
    found = [
        stages_bar(account),
        life_bars(account),
        break_even_curve(account, "J"),
        break_even_curve(account, "gCO2e"),
    ]
    return [plot for plot in found if plot is not None]


def _estimate(account: Account) -> str:
    word = label(account.provenance)
    return "" if word == "measured" else f" ({word})"


def stages_bar(account: Account) -> Plot | None:
    """The ledger as a stacked bar, unrolled: each stage begins where the one before it ended."""
    known = [(total.stage, total.joules.value) for total in account.stages if total.joules]
    whole = sum(joules for _, joules in known)
    if whole == 0:
        return None

    def paint(axes: Any) -> None:
        names, left, seen = ["all"], 0.0, set()
        for wanted in PURPOSES:
            part = sum(joules for stage, joules in known if purpose(stage) == wanted)
            axes.barh(0, part, left=left, color=COLOURS[wanted], label=wanted if part else None)
            left += part
        left = 0.0
        for place, (stage, joules) in enumerate(known, start=1):
            seen.add(purpose(stage))
            axes.barh(place, joules, left=left, color=COLOURS[purpose(stage)])
            names.append(f"{stage}  {joules / whole:.0%}")
            left += joules
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        engineering(axes.xaxis, "J")
        axes.set_xlabel(f"joules{_estimate(account)}")
        legend_below(axes)

    return Plot(
        caption=f"Where the joules went{_estimate(account)}",
        svg=draw(
            "stages",
            f"The ledger as a stacked bar: {whole:.3g} J over {len(known)} stages",
            paint,
            height=1.3 + 0.26 * (len(known) + 1),
        ),
        note="The first bar is the whole; below it every stage begins where the one above ends.",
    )


def _known(account: Account) -> dict[str, VariantAccount]:
    return {name: found for name, found in account.variants.items() if found.energy_mj}


def life_bars(account: Account) -> Plot | None:
    """Carbon of each variant's whole life, stacked; the whisker is the interval of the total."""
    known = _known(account)
    if not known:
        return None
    places = range(len(known))
    parts = _life_parts(account, known)
    operational = sum(parts.values())
    making = 1e3 * (account.embodied_kgco2e or 0.0)
    note = "The whisker is the interval of the total; the meter's part of it is common to all."
    if account.embodied_kgco2e is not None and making <= LARGE * max(operational):
        parts[MAKING] = np.full(len(known), making)
        making = 0.0
    elif making:
        note += (
            f" Making the devices, {exact_grams(making / 1e3)}, is the same for all and not drawn: "
            "it would hide the rest."
        )
    if understated(account) & {"training", "pruning"}:
        note += " Lower bounds: not everything was measured."

    def paint(axes: Any) -> None:
        left = np.zeros(len(known))
        for name, values in parts.items():
            axes.barh(places, values, left=left, height=0.6, color=COLOURS[name], label=name)
            left += values
        lives = [found.life_kgco2e for found in known.values() if found.life_kgco2e]
        low, high = (
            1e3 * np.array([getattr(life, end) for life in lives]) - making
            for end in ("low", "high")
        )
        errors = np.clip([left - low, high - left], 0, None)
        axes.errorbar(left, places, xerr=errors, fmt="none", ecolor=INK, capsize=3, linewidth=1)
        axes.set_yticks(places, list(known))
        axes.invert_yaxis()
        grams(axes.xaxis)
        axes.set_xlabel(f"CO2 equivalent{_estimate(account)}")
        legend_below(axes, 2)

    return Plot(
        caption=f"Carbon of a life of {account.inferences:,} inferences{_estimate(account)}",
        svg=draw(
            "life",
            f"Carbon of each variant's life of {account.inferences} inferences",
            paint,
            height=1.6 + 0.4 * len(known),
        ),
        note=note,
    )


def _life_parts(account: Account, known: dict[str, VariantAccount]) -> dict[str, Any]:
    """Grams of each operational part, for each variant."""
    host = account.intensity.value * account.pue / JOULES_PER_KWH
    device = account.device_intensity.value / JOULES_PER_KWH
    pruning = [0.0 if name == "dense" else _value(account.pruning_joules) for name in known]
    inferences = [1e-3 * _value(v.counted_mj) * account.inferences for v in known.values()]
    return {
        "training": np.full(len(known), _value(account.training_joules) * host),
        "pruning": np.array(pruning) * host,
        "inferences": np.array(inferences) * device,
    }


def _value(found: Quantity | None) -> float:
    """What is known of it; the caller says that it is a lower bound."""
    return 0.0 if found is None else found.value


def break_even_curve(account: Account, unit: str) -> Plot | None:
    """E(N) of every variant in ``"J"`` or ``"gCO2e"``, and where each crosses the dense one's.

    None where it is not known what pruning cost: the curves would start too low.
    """
    known = _known(account)
    if not any(found.saved_kgco2e for found in known.values()):
        return None
    known = {name: v for name, v in known.items() if name == "dense" or v.saved_kgco2e}
    in_joules = unit == "J"
    paid = {name: v.break_even if in_joules else v.break_even_co2 for name, v in known.items()}
    reached = [found.inferences.value for found in paid.values() if found.inferences]
    most = 2.2 * max(reached, default=0.0) or float(account.inferences)
    stage_scale, use_scale = 1.0, 1.0
    if not in_joules:
        stage_scale = account.intensity.value * account.pue / JOULES_PER_KWH
        use_scale = account.device_intensity.value / JOULES_PER_KWH

    def paint(axes: Any) -> None:
        count = np.array([0.0, most])
        for name, found in known.items():
            start = _value(account.training_joules)
            if name != "dense":
                start += _value(account.pruning_joules)
            line = start * stage_scale + count * _value(found.counted_mj) * 1e-3 * use_scale
            axes.plot(count, line, color=COLOURS[name], label=name, linewidth=1.8)
            crossing = paid[name].inferences
            if crossing is not None:
                _mark(axes, name, crossing, most, np.interp(crossing.value, count, line))
        axes.set_xlim(0, most)
        axes.set_ylim(bottom=0)
        engineering(axes.xaxis)
        if in_joules:
            engineering(axes.yaxis, "J")
        else:
            grams(axes.yaxis)
        axes.set_xlabel("inferences")
        axes.set_ylabel(f"{'joules' if in_joules else 'CO2 equivalent'}{_estimate(account)}")
        legend_below(axes, 4)

    what = "joules" if in_joules else "carbon"
    return Plot(
        caption=f"When pruning has paid for itself, in {what}{_estimate(account)}",
        svg=draw(
            "break-even" if in_joules else "break-even-co2",
            f"Training, pruning and inferences together in {what}, over the number of inferences",
            paint,
        ),
        note=_break_even_note(paid, account) + _curve_note(account),
    )


def _mark(axes: Any, name: str, crossing: Quantity, most: float, height: float) -> None:
    """The crossing, with its interval; an arrow where that goes on beyond the plot."""
    beyond = crossing.high > most
    ends = [[crossing.value - crossing.low], [0.0 if beyond else crossing.high - crossing.value]]
    if beyond:
        arrow = {"arrowstyle": "->", "color": COLOURS[name], "linewidth": 1}
        start = (crossing.value, height)
        axes.annotate("", xy=(most, height), xytext=start, arrowprops=arrow)
    axes.errorbar(
        crossing.value,
        height,
        xerr=ends,
        fmt=MARKERS[name],
        color=COLOURS[name],
        capsize=3,
        elinewidth=1,
        markersize=6,
    )


def _break_even_note(paid: dict[str, BreakEven], account: Account) -> str:
    crossed = [
        f"{name} after {quantity(found.inferences)} inferences"
        for name, found in paid.items()
        if found.inferences
    ]
    never = [name for name, found in paid.items() if not found.inferences and name != "dense"]
    told = f"Paid for: {'; '.join(crossed)}{not_valid(account)}. " if crossed else ""
    return told + (f"Not shown to pay: {', '.join(never)}." if never else "")


def _curve_note(account: Account) -> str:
    told = " A pruned network's line rises by dense's energy times the ratio paired by block."
    short = understated(account)
    if "training" in short:
        told += " Training was not all measured: every line starts too low by the same."
    if "pruning" in short:
        told += " Pruning was not all measured: the crossings are later."
    return told
