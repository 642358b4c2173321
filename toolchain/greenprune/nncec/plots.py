"""What was measured, drawn: accuracy against cost, latencies, windows, layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from greenprune.harness.results import Candidate, Results
from greenprune.harness.summary import energies_mj
from greenprune.meters.energy import label, weakest
from greenprune.nncec.drawing import (
    COLOURS,
    FILLS,
    INK,
    LINES,
    MARKERS,
    Plot,
    draw,
    engineering,
    legend_below,
    logarithmic,
)

NETWORKS = ("dense", "mild", "aggressive")
WIDE = 5.0
"""Costs that are further apart than this are drawn on a logarithmic axis."""
_UNITS = {
    "ms": "mean latency of an inference, ms",
    "mJ": "energy of an inference, mJ",
}


def accuracy_against(results: Results, run: Mapping[str, Any], unit: str) -> Plot | None:
    """Accuracy on the test images of every variant on every runtime, and of the dial's rows.

    Args:
        results: costs of the variants.
        run: ``variants`` with accuracies; ``dial`` with ``runtime``, ``reference`` and ``table``.
        unit: ``"ms"`` or ``"mJ"``.

    Returns:
        None where nothing is known.
    """
    measured = [(found, cost) for found in results.candidates if (cost := _cost(found, unit))]
    if not measured:
        return None
    runtimes = list(dict.fromkeys(candidate.runtime for candidate, _ in measured))
    accuracies = {name: 100 * found["accuracy"] for name, found in run["variants"].items()}
    points = dial_points(results, run, unit)
    certified = [(x, y) for x, y, holds in points if holds]
    uncertified = [(x, y) for x, y, holds in points if not holds]

    def paint(axes: Any) -> None:
        for runtime, fill in zip(runtimes, FILLS * len(runtimes), strict=False):
            for found, (value, low, high) in measured:
                if found.runtime != runtime:
                    continue
                axes.errorbar(
                    value,
                    accuracies[found.variant],
                    xerr=[[value - low], [high - value]],
                    fmt=MARKERS[found.variant],
                    fillstyle=fill,
                    color=COLOURS[found.variant],
                    markersize=8,
                    elinewidth=1,
                    capsize=3,
                    label=found.variant if runtime == runtimes[0] else None,
                )
        for runtime, fill in zip(runtimes, FILLS * len(runtimes), strict=False):
            if len(runtimes) > 1:
                axes.plot([], [], "o", color=INK, fillstyle=fill, label=runtime)
        for rows, face, name in (
            (certified, COLOURS["pair"], "dial, certified"),
            (uncertified, "none", "dial, not certified"),
        ):
            if rows:
                x, y = zip(*rows, strict=True)
                axes.scatter(x, y, s=16, facecolor=face, edgecolor=COLOURS["pair"], label=name)
        costs = [cost[0] for _, cost in measured]
        if max(costs) > WIDE * min(costs) > 0:
            logarithmic(axes)
        else:
            axes.set_xlim(left=0)
        axes.set_xlabel(f"{_UNITS[unit]}{_estimate(results) if unit == 'mJ' else ''}")
        axes.set_ylabel("accuracy, %")
        legend_below(axes)

    note = (
        f"Preset {results.preset}. Accuracy is on the test images; a horizontal bar is the "
        "interval of the cost."
    )
    if points:
        note += (
            " The dial's points are the pair at other thresholds: their loss against the reference "
            "was found on the certification images, their cost follows from the share of inputs "
            "that goes to both networks."
        )
    title = f"Accuracy against {_UNITS[unit]}, for every variant and the dial"
    return Plot(
        caption="Accuracy against latency" if unit == "ms" else _energy_caption(results),
        svg=draw(f"accuracy-{unit}", title, paint),
        note=note,
    )


def _energy_caption(results: Results) -> str:
    return f"Accuracy against energy{_estimate(results)}"


def _estimate(results: Results) -> str:
    """`` (ESTIMATE)`` where the joules are no measurement."""
    found = weakest(c.energy_mj.provenance for c in results.candidates if c.energy_mj)
    return "" if label(found) == "measured" else f" ({label(found)})"


def _cost(candidate: Candidate, unit: str) -> tuple[float, float, float] | None:
    """Value, low and high of one inference; the mean latency, as a pair's median hides the inputs
    that both networks answer."""
    found = candidate.latency_ms["mean"] if unit == "ms" else candidate.energy_mj
    return None if found is None else (found.value, found.low, found.high)


def dial_points(
    results: Results, run: Mapping[str, Any], unit: str
) -> list[tuple[float, float, bool]]:
    """Cost, accuracy in percent and whether it is certified, of every row of the dial.

    A row's cost is aggressive's, and mild's for the share that it does not accept. Its accuracy is
    the reference's on the test images less the loss found on the certification images.
    """
    dial = run.get("dial")
    if not dial:
        return []
    costs = {
        found.variant: cost[0]
        for found in results.candidates
        if found.runtime == dial["runtime"] and (cost := _cost(found, unit))
    }
    if not {"mild", "aggressive"} <= costs.keys():
        return []
    reference = run["variants"][dial["reference"]]["accuracy"]
    points = []
    for row in dial["table"]:
        both = costs["aggressive"] + (1 - row["coverage"]) * costs["mild"]
        mean = costs["mild"] if row["threshold"] is None else both
        accuracy = reference + row["accuracy"] - row["reference_accuracy"]
        points.append((mean, 100 * accuracy, bool(row["certified"])))
    return points


def latency_distributions(results: Results) -> Plot:
    """Share of inferences that are at least so fast, for each candidate, all windows together."""

    def paint(axes: Any) -> None:
        styles: dict[str, str] = {}
        for candidate in results.candidates:
            style = styles.setdefault(candidate.runtime, LINES[len(styles) % len(LINES)])
            quantiles, share = latency_share(candidate)
            colour = COLOURS[candidate.variant]
            name = candidate.variant if candidate.runtime == next(iter(styles)) else None
            axes.plot(quantiles, share, linestyle=style, color=colour, linewidth=1.8, label=name)
        if len(styles) > 1:
            for runtime, style in styles.items():
                axes.plot([], [], color=INK, alpha=0.6, linestyle=style, label=runtime)
        logarithmic(axes)
        axes.set_xlabel("latency of an inference, ms")
        axes.set_ylabel("inferences at least so fast, %")
        legend_below(axes)

    title = "Distribution of the latencies of single inferences, for every variant"
    return Plot(
        caption="Latency of single inferences",
        svg=draw("latency", title, paint),
        note=f"Preset {results.preset}, all windows together. Further left is faster; a steep "
        "line is an even latency.",
    )


Numbers = np.ndarray[Any, np.dtype[np.float64]]


def latency_share(candidate: Candidate) -> tuple[Numbers, Numbers]:
    """Latencies in ms, rising, and the percentage of inferences that are at least so fast.

    Each window's quantiles stand for its inferences, so that a window counts by their number.
    """
    found = [
        (quantile / 1e6, window.inferences / len(window.latency.quantiles_ns))
        for window in candidate.windows
        for quantile in window.latency.quantiles_ns
    ]
    latencies, weights = np.array(sorted(found), dtype=np.float64).T
    return latencies, 100 * np.cumsum(weights) / weights.sum()


def energy_windows(results: Results) -> Plot | None:
    """Millijoules an inference of every window, over the part that idling takes anyway."""
    known = [found for found in results.candidates if found.energy_mj]
    if not known:
        return None
    places = np.arange(len(known))[::-1]
    spent = [energies_mj(found.windows) for found in known]
    shown = [value for found in spent for value in found]
    apart = max(shown) > WIDE * min(shown) > 0

    def paint(axes: Any) -> None:
        idle = [_idle_mj(found) for found in known]
        if any(part is not None for part in idle):
            widths = [part or 0.0 for part in idle]
            axes.barh(places, widths, height=0.6, color=INK, alpha=0.22, label="of it idle")
        for place, found, values in zip(places, known, spent, strict=True):
            colour = COLOURS[found.variant]
            axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.6, markersize=5)
            assert found.energy_mj is not None
            middle = found.energy_mj.value
            axes.plot([middle, middle], [place - 0.35, place + 0.35], color=colour, linewidth=2)
        axes.plot([], [], "o", color=INK, alpha=0.6, label="a window")
        axes.plot([], [], "|", color=INK, markersize=11, label="median")
        axes.set_yticks(places, [found.name for found in known])
        if apart:
            logarithmic(axes)
            axes.set_xlim(left=0.5 * min([*shown, *(part for part in idle if part)]))
        else:
            axes.set_xlim(left=0)
        axes.set_xlabel(f"mJ an inference{_estimate(results)}")
        legend_below(axes)

    note = f"Preset {results.preset}. "
    if all(_idle_mj(found) is None for found in known):
        note += "The idle baseline was not measured."
    else:
        note += "Gross: what the machine takes when it idles is in it."
    return Plot(
        caption=f"Energy of every window{_estimate(results)}",
        svg=draw(
            "windows",
            "Energy of an inference in every window, and the idle part of it",
            paint,
            height=1.4 + 0.36 * len(known),
        ),
        note=note,
    )


def _idle_mj(candidate: Candidate) -> float | None:
    """Of one inference's time at the idle power before and after, averaged."""
    watts = [w for w in (candidate.idle_watts_before, candidate.idle_watts_after) if w is not None]
    if not watts:
        return None
    seconds = sum(window.seconds for window in candidate.windows)
    return 1e3 * float(np.mean(watts)) * seconds / sum(w.inferences for w in candidate.windows)


def layers_bars(rows: Sequence[Mapping[str, Any]], quantity: str) -> Plot | None:
    """``"channels"`` or ``"MACs"`` of each layer before and after; None where there are none.

    Args:
        rows: ``layer``, ``dense``, ``mild`` and ``aggressive`` of each.
        quantity: what they are.
    """
    if not rows:
        return None
    names = [str(row["layer"]) for row in rows]
    longest = max(map(len, names))
    every = -(-len(names) // 24)

    def paint(axes: Any) -> None:
        for name, width in zip(NETWORKS, (0.86, 0.58, 0.3), strict=True):
            heights = [row[name] for row in rows]
            axes.bar(range(len(rows)), heights, width=width, color=COLOURS[name], label=name)
        rotation = 90 if len(names) * longest > 36 else 0
        axes.set_xticks(range(0, len(names), every), names[::every], rotation=rotation, fontsize=8)
        axes.grid(visible=False, axis="x")
        engineering(axes.yaxis)
        axes.set_ylabel(quantity)
        legend_below(axes)

    return Plot(
        caption=f"{quantity[0].upper()}{quantity[1:]} of each layer, before and after",
        svg=draw(quantity.lower(), f"{quantity} of each layer: dense, mild and aggressive", paint),
        note="" if every == 1 else f"Every {every}th layer is named; the table below has them all.",
    )
