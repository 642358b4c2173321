"""A sweep for people: ``front.html``, one self-contained page, and ``front.csv`` beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from greenprune import front as measures
from greenprune import schema, storage, sweep_record
from greenprune._version import __version__
from greenprune.meters.energy import label
from greenprune.nncec.drawing import COLOURS, INK, MARKERS, Plot, draw, legend_below
from greenprune.nncec.report import render
from greenprune.sweep_record import CANDIDATES, Candidate, Front, Sweep

PAGE, TABLE = "front.html", "front.csv"
AXES = {
    "ms": "mean latency of an inference, ms",
    "mJ": "energy of an inference, mJ",
    "kB": "size of the artifact, kB",
}
COLUMNS = (
    "target",
    "point",
    "variant",
    "on_front",
    "knee",
    "accuracy",
    "development_accuracy",
    "mean_ms",
    "latency_share",
    "energy_mj",
    "energy_low_mj",
    "energy_high_mj",
    "energy_provenance",
    "energy_share",
    "bytes",
    "bytes_share",
    "macs",
    "params",
    "runtime",
    "machine",
    "preset",
    "valid",
)


def report(folder: Path) -> dict[str, Any]:
    """Write the page and the table of a sweep; return what ``greenprune sweep --json`` prints.

    Raises:
        RunError: the folder holds no sweep.
        MissingPackageError: jinja2, matplotlib or moocore is not installed.
    """
    sweep = sweep_record.read(folder)
    fronts = sweep_record.fronts(sweep)
    rows = {found.target: _rows(found) for found in fronts}
    storage.write_text(folder / TABLE, _csv([row for part in rows.values() for row in part]))
    parts = [
        {
            "front": found,
            "knee": _knee(found),
            "plots": plots(found),
            "rows": sorted(rows[found.target], key=lambda row: float(row["mean_ms"])),
        }
        for found in fronts
    ]
    content = {
        "sweep": sweep,
        "headline": _headline(sweep, fronts),
        "parts": parts,
        "caveats": _caveats(sweep, fronts),
        "version": __version__,
    }
    storage.write_text(folder / PAGE, render("front.html", content))
    return {
        "sweep": str(folder),
        "page": str(folder / PAGE),
        "points": schema.encode(sweep.points),
        "failed": [point.name for point in sweep.points if point.state == "failed"],
        "fronts": {found.target: _summary(found) for found in fronts},
    }


def _summary(found: Front) -> dict[str, Any]:
    names = [
        each.name for each, chosen in zip(found.candidates, found.chosen, strict=True) if chosen
    ]
    return {
        "objectives": list(found.objectives),
        "left_out": found.left_out,
        "hypervolume": found.hypervolume,
        "knee": _knee(found),
        "front": names,
    }


def _knee(found: Front) -> str | None:
    return None if found.knee is None else found.candidates[found.knee].name


def _rows(found: Front) -> list[dict[str, Any]]:
    rows = []
    for place, (each, chosen) in enumerate(zip(found.candidates, found.chosen, strict=True)):
        figures, measured = each.figures, each.measured
        energy, (latency_share, energy_share, bytes_share) = figures.energy_mj, each.costs
        row = {
            "target": found.target,
            "point": each.point,
            "variant": each.variant,
            "on_front": chosen,
            "knee": place == found.knee,
            "accuracy": figures.accuracy,
            "development_accuracy": figures.development_accuracy,
            "mean_ms": each.mean_ms,
            "latency_share": latency_share,
            "energy_mj": energy.value if energy else None,
            "energy_low_mj": energy.low if energy else None,
            "energy_high_mj": energy.high if energy else None,
            "energy_provenance": energy.provenance if energy else None,
            "energy_share": energy_share,
            "bytes": figures.bytes,
            "bytes_share": bytes_share,
            "macs": figures.macs,
            "params": figures.params,
            "runtime": measured.runtime,
            "machine": measured.machine,
            "preset": measured.preset,
            "valid": measured.valid,
        }
        rows.append(row)
    return rows


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _headline(sweep: Sweep, fronts: Sequence[Front]) -> str:
    done = sum(point.state == "done" for point in sweep.points)
    told = f"{done} of {len(sweep.points)} points of {sweep.recipe} are finished"
    for found in fronts:
        if found.knee is None:
            continue
        best = found.candidates[found.knee]
        told += (
            f"; on {found.target} the knee is {best.name}: {best.figures.development_accuracy:.2%} "
            f"of the development images ({-100 * best.loss:+.2f} points against the dense network) "
            f"at {best.costs[0]:.0%} of its latency, {best.figures.accuracy:.2%} of the test images"
        )
    return f"{told}."


def _caveats(sweep: Sweep, fronts: Sequence[Front]) -> list[str]:
    told = [
        "Shares are of the dense network on its fastest runtime, measured in the same run, in "
        "alternating blocks; fronts, hypervolume and knee go by these, so that what changed on the "
        "machine between two runs falls out. The plots scale them by the median of the dense "
        "networks.",
        "The hypervolume is what the front dominates of the box between the ideal (the dense "
        "network's accuracy for nothing) and the dense network's costs at a loss of "
        f"{100 * measures.WORST_LOSS:.0f} points of accuracy: 0 is no better than the dense "
        "network. The knee is the candidate that alone dominates most.",
        "Fronts, knee and `greenprune pick` go by the accuracy on the development images; that on "
        "the test images chooses nothing. A front of many candidates flatters each a little.",
        "Each point is a life of its own: its account counts the training that all points share.",
    ]
    for found in fronts:
        told += [
            f"On {found.target}, {objective} is left out of the comparison: {reason}."
            for objective, reason in found.left_out.items()
        ]
        measured = {each.point: each.measured for each in found.candidates}
        machines = {each.machine for each in measured.values()}
        if len(machines) > 1:
            told.append(
                f"On {found.target}, points were measured on different machines "
                f"({'; '.join(sorted(machines))}): their milliseconds are not comparable."
            )
        invalid = [name for name, each in measured.items() if not each.valid]
        if invalid:
            told.append(
                f"Measurements that are NOT VALID by their own rules: {', '.join(invalid)}."
            )
        if any(each.preset == "quick" for each in measured.values()):
            told.append(
                "The preset 'quick' measures for seconds; its figures are for a first look."
            )
    if any(point.state != "done" for point in sweep.points):
        told.append("Points that are not finished are not in any front.")
    return list(dict.fromkeys(told))


def plots(found: Front) -> list[Plot]:
    """Accuracy against milliseconds, millijoules (where all were measured) and bytes."""
    if not found.candidates:
        return []
    dense = [each.dense for each in found.candidates]
    mean_ms = [each.mean_ms / each.figures.latency_share for each in found.candidates]
    columns = [("ms", 0, float(np.median(mean_ms)))]
    if "energy" in found.objectives:
        known = [each.energy_mj.value for each in dense if each.energy_mj]
        columns.append(("mJ", 1, float(np.median(known))))
    columns.append(("kB", 2, float(np.median([each.bytes for each in dense])) / 1e3))
    return [_plot(found, unit, place, scale) for unit, place, scale in columns]


def _plot(found: Front, unit: str, place: int, scale: float) -> Plot:
    costs = np.array([each.costs[place] or 0.0 for each in found.candidates]) * scale
    accuracies = np.array([100 * each.figures.development_accuracy for each in found.candidates])
    plane = measures.pareto(np.column_stack([-accuracies, costs]))
    estimate = _estimate(found.candidates) if unit == "mJ" else ""

    def paint(axes: Any) -> None:
        order = np.flatnonzero(plane)[np.argsort(costs[plane])]
        axes.step(
            costs[order], accuracies[order], where="post", color=INK, alpha=0.5, label="front"
        )
        for variant in CANDIDATES:
            for chosen in (True, False):
                shown = [
                    number
                    for number, each in enumerate(found.candidates)
                    if each.variant == variant and found.chosen[number] == chosen
                ]
                axes.plot(
                    costs[shown],
                    accuracies[shown],
                    MARKERS[variant],
                    color=COLOURS[variant],
                    fillstyle="full" if chosen else "none",
                    markersize=7,
                    linestyle="none",
                    clip_on=False,  # one at 100% is shown whole
                    label=variant if chosen else None,
                )
        dense = 100 * float(
            np.median([each.dense.development_accuracy for each in found.candidates])
        )
        at_dense = [scale], [dense]
        axes.plot(*at_dense, MARKERS["dense"], color=COLOURS["dense"], label="dense", clip_on=False)
        if found.knee is not None:
            at = [costs[found.knee]], [accuracies[found.knee]]
            ring = {"fillstyle": "none", "markersize": 14, "clip_on": False}
            axes.plot(*at, "o", color=INK, label="knee", **ring)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{AXES[unit]}{estimate}")
        axes.set_ylabel("development accuracy, %")
        lowest, highest = axes.get_ylim()
        axes.set_ylim(lowest, min(highest, 100.0))
        legend_below(axes)

    return Plot(
        caption=f"Accuracy against {AXES[unit].split(' of ')[0].removeprefix('mean ')}{estimate}",
        svg=draw(
            f"front-{found.target}-{unit}",
            f"Accuracy against {AXES[unit]}, for all candidates on {found.target}",
            paint,
        ),
        note="Filled: on the front of all objectives. The line is the front of this plane alone; "
        "the ring is the knee.",
    )


def _estimate(found: Sequence[Candidate]) -> str:
    """`` (ESTIMATE)`` where the joules are no measurement; all are of one kind."""
    kinds = [each.figures.energy_mj.provenance for each in found if each.figures.energy_mj]
    told = label(kinds[0])
    return "" if told == "measured" else f" ({told})"
