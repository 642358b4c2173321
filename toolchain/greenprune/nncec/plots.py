"""The report's plots, as SVG for the page itself; matplotlib is loaded on demand.

Text and axes take the page's colour (``currentColor``), so that one drawing serves light, dark and
print.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from greenprune.errors import MissingPackageError
from greenprune.harness.results import Candidate, Results
from greenprune.meters.energy import label
from greenprune.nncec.account import Account

_INK = "#010203"
"""Stands for the page's text colour until the drawing is finished."""
COLOURS = {
    "dense": "#6b7280",
    "mild": "#2f80c2",
    "aggressive": "#d97706",
    "pair": "#16a067",
}


def _draw(name: str, paint: Callable[[Any], None], size: tuple[float, float] = (6.4, 3.8)) -> str:
    """SVG text of what ``paint(axes)`` draws; ``name`` keeps the ids of several drawings apart."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("matplotlib", "host") from error
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: Any = dict.fromkeys(inked, _INK) | {
        "text.parse_math": False,  # a layer's name may contain a dollar sign
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.family": "sans-serif",
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace(_INK, "currentColor")


def accuracy_against(results: Results, quantity: str) -> str | None:
    """Accuracy of every candidate against ``"ms"`` or ``"mJ"``; None where nothing is known."""
    points = []
    for candidate in results.candidates:
        found = candidate.latency_ms["p50"] if quantity == "ms" else candidate.energy_mj
        if found is not None and candidate.accuracy is not None:
            points.append((candidate, found))
    if not points:
        return None
    runtimes = list(dict.fromkeys(candidate.runtime for candidate, _ in points))
    provenances = {c.energy_mj.provenance for c, _ in points if c.energy_mj}

    def paint(axes: Any) -> None:
        for candidate, found in points:
            assert candidate.accuracy is not None
            axes.errorbar(
                found.value,
                100 * candidate.accuracy,
                xerr=[[found.value - found.low], [found.high - found.value]],
                fmt="os^D"[runtimes.index(candidate.runtime) % 4],
                color=COLOURS[candidate.variant],
                capsize=3,
                label=candidate.name,
            )
        words = "median latency, ms"
        if quantity == "mJ":
            words = f"mJ an inference ({', '.join(sorted(map(label, provenances)))})"
        axes.set_xlabel(f"{words}; preset {results.preset}")
        axes.set_ylabel("accuracy on the replay images, %")
        axes.legend(fontsize=8)

    return _draw(f"accuracy-{quantity}", paint)


def latency_distributions(results: Results) -> str:
    """Share of inferences that are at least so fast, for each candidate, all windows together."""

    def paint(axes: Any) -> None:
        from matplotlib.ticker import LogFormatter

        styles: dict[str, str] = {}
        for candidate in results.candidates:
            style = styles.setdefault(candidate.runtime, ("-", "--", ":", "-.")[len(styles) % 4])
            quantiles = np.sort(_quantiles_ms(candidate))
            share = np.linspace(0, 100, len(quantiles))
            colour = COLOURS[candidate.variant]
            axes.plot(quantiles, share, linestyle=style, color=colour, label=candidate.name)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.0, 0.4)))
        axes.set_xlabel(f"latency of one inference, ms; preset {results.preset}")
        axes.set_ylabel("inferences at least so fast, %")
        axes.legend(fontsize=8)

    return _draw("latency", paint)


def _quantiles_ms(candidate: Candidate) -> np.ndarray[Any, np.dtype[np.float64]]:
    windows = [window.latency.quantiles_ns for window in candidate.windows]
    return np.asarray(windows, dtype=np.float64).ravel() / 1e6


def stages_bar(account: Account) -> str | None:
    """Joules of each stage as one stacked bar; None where none was measured."""
    known = [(total.stage, total.joules.value) for total in account.stages if total.joules]
    if not known:
        return None

    def paint(axes: Any) -> None:
        import matplotlib

        colours = matplotlib.colormaps["tab20"]
        left = 0.0
        for index, (stage, joules) in enumerate(known):
            colour = colours(index % 20)
            axes.barh([0], [joules], left=left, color=colour, label=f"{stage}: {joules:.3g} J")
            left += joules
        axes.set_yticks([])
        axes.set_xlabel(f"joules ({label(account.provenance)})")
        axes.figure.legend(fontsize=7, ncols=3, loc="outside lower center")

    return _draw("stages", paint, (6.4, 3.2))


def break_even_curve(account: Account) -> str | None:
    """E(N) of every variant over the number of inferences; None where nothing was measured."""
    known = {name: v.energy_mj.value for name, v in account.variants.items() if v.energy_mj}
    if not known:
        return None
    reached = [
        v.break_even.inferences.value for v in account.variants.values() if v.break_even.inferences
    ]
    most = 3 * max(reached) if reached else float(account.inferences)

    def paint(axes: Any) -> None:
        count = np.array([0.0, most])
        for name, millijoules in known.items():
            start = account.training_joules.value
            if name != "dense":
                start += account.pruning_joules.value
            joules = start + count * millijoules * 1e-3
            axes.plot(count, joules, color=COLOURS[name], label=name)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("inferences")
        axes.set_ylabel(f"joules in all ({label(account.provenance)})")
        axes.legend(fontsize=8)

    return _draw("break-even", paint)


def widths_bars(widths: Sequence[dict[str, Any]]) -> str | None:
    """Channels of each layer before and after; None where there are none."""
    if not widths:
        return None

    def paint(axes: Any) -> None:
        places = np.arange(len(widths))
        for offset, name in enumerate(("dense", "mild", "aggressive")):
            heights = [row[name] for row in widths]
            at = places + 0.28 * (offset - 1)
            axes.bar(at, heights, width=0.28, color=COLOURS[name], label=name)
        names = [str(row["layer"]) for row in widths]
        axes.set_xticks(places, names, rotation=90 if len(names) > 6 else 0, fontsize=7)
        axes.set_ylabel("channels")
        axes.legend(fontsize=8)

    return _draw("widths", paint, (max(6.4, 0.22 * len(widths)), 3.4))
