"""One way of drawing: matplotlib paints, and the page gets SVG in its own colours.

Text, axes and every colour are CSS variables of the page, so that one drawing serves light, dark
and print.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from greenprune.errors import MissingPackageError

INK = "#010203"
"""The page's text colour."""
COLOURS = {
    "dense": "#010204",
    "mild": "#010205",
    "aggressive": "#010206",
    "pair": "#010207",
    "training": "#010208",
    "pruning": "#010209",
    "observing": "#01020a",
    "inferences": "#01020b",
    "making the devices": "#01020c",
}
"""Stand for ``var(--dense)`` and so on until the drawing is finished."""
MARKERS = {"dense": "o", "mild": "s", "aggressive": "^", "pair": "D"}
LINES = ("-", "--", ":", "-.")
FILLS = ("full", "none", "left", "bottom")
"""Tell runtimes apart, as lines and as markers."""
WIDTH, HEIGHT = 4.8, 3.4
"""Inches; a phone's width at 72 dots an inch, so that 10 points of text stay readable there."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One figure of the page: what stands above it, the SVG, and what a reader must know of it."""

    caption: str
    svg: str
    note: str = ""


def draw(
    name: str,
    title: str,
    paint: Callable[[Any], None],
    *,
    width: float = WIDTH,
    height: float = HEIGHT,
) -> str:
    """SVG text of what ``paint(axes)`` draws.

    Args:
        name: keeps the ids of several drawings on one page apart.
        title: what the picture shows, for those who do not see it.
        paint: gets matplotlib's axes.
        width: inches.
        height: inches.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("matplotlib", "host") from error
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: Any = dict.fromkeys((*inked, "grid.color"), INK) | {
        "text.parse_math": False,  # a layer's name may contain a dollar sign
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.15,
        "font.family": "sans-serif",
        "font.size": 10,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "legend.handlelength": 1.6,
        "legend.columnspacing": 1.2,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for word, stand_in in COLOURS.items():
        svg = svg.replace(stand_in, f"var(--{word.replace(' ', '-')})")
    svg = svg.replace(INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def legend_below(axes: Any, columns: int = 3) -> None:
    """The legend under the plot, where it hides nothing; what has a colour goes first."""
    found = zip(*axes.get_legend_handles_labels(), strict=True)
    handles, names = zip(*sorted(found, key=lambda entry: entry[1] not in COLOURS), strict=True)
    axes.figure.legend(handles, names, ncols=columns, loc="outside lower center")


def logarithmic(axes: Any) -> None:
    """A logarithmic x axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    def between(value: float, _: int) -> str:
        low, high = axes.get_xlim()
        return f"{value:g}" if high < 200 * low else ""  # more would touch each other

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
    axes.xaxis.set_minor_formatter(FuncFormatter(between))
    axes.tick_params(axis="x", which="minor", pad=5)  # shorter ticks, and words on one line


def grams(axis: Any) -> None:
    """Ticks in µg, mg, g, kg or tonnes of CO2 equivalent."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    small = EngFormatter("g")

    def words(value: float, _: int) -> str:
        if abs(value) < 1e3:
            return small(value)
        return f"{value / 1e3:,.3g} kg" if abs(value) < 1e6 else f"{value / 1e6:,.4g} t"

    axis.set_major_formatter(FuncFormatter(words))
    axis.set_major_locator(MaxNLocator(5))


def engineering(axis: Any, unit: str = "") -> None:
    """Ticks such as 2 k or 3 M, with their unit."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_major_formatter(EngFormatter(unit))
    axis.set_major_locator(MaxNLocator(5))
