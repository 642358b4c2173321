"""The scores of every group and where each variant was cut; matplotlib is loaded on demand."""

from __future__ import annotations

import io
from collections.abc import Mapping
from math import ceil
from typing import Any

import numpy as np

from greenprune.errors import MissingPackageError
from greenprune.pruning.budget import Removed
from greenprune.pruning.scores import Scoring

COLUMNS = 4
COLOURS = ("#2f80c2", "#d97706", "#16a067", "#6b7280")


def scores_svg(scoring: Scoring, cuts: Mapping[str, Removed], method: str) -> str:
    """An SVG page: for each group its scores in ascending order, and a line for each cut.

    Args:
        scoring: what was measured.
        cuts: variant to the channels that go; what is left of its line goes.
        method: the criterion's name, for the title.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("matplotlib", "host") from error
    rows = max(1, ceil(len(scoring.scores) / COLUMNS))
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "scores", "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3 * COLUMNS, 1.8 * rows + 0.6), layout="constrained")
        grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
        for axes, (name, values) in zip(grid, scoring.scores.items(), strict=False):
            axes.plot(np.arange(len(values)) + 0.5, np.sort(values), ".-", color="#333333")
            for colour, (variant, removed) in zip(COLOURS, cuts.items(), strict=False):
                axes.axvline(len(removed.get(name, ())), color=colour, label=variant)
            axes.set_xlim(0, len(values))
            axes.set_ylim(bottom=min(0.0, float(values.min())))
            axes.set_title(name, fontsize=8)
            axes.tick_params(labelsize=6)
        for axes in grid[len(scoring.scores) :]:
            axes.set_visible(False)
        seen = f", {scoring.images} images" if scoring.images else ""
        figure.suptitle(f"scores of each group's channels: {method}{seen}", fontsize=10)
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=len(cuts), frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
