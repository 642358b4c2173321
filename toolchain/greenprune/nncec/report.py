"""The page for people: one self-contained HTML file, and nothing fetched from a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from greenprune import storage
from greenprune._version import __version__
from greenprune.errors import MissingPackageError
from greenprune.harness.results import Results
from greenprune.harness.table import energy, number, ratio, share
from greenprune.meters.energy import label
from greenprune.nncec import plots
from greenprune.nncec.account import Account
from greenprune.nncec.ledger import Quantity

TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    path: Path, run_summary: dict[str, Any], results: Results | None, account: Account | None
) -> None:
    """Write the report.

    Args:
        path: the HTML file.
        run_summary: ``name``, ``seed``, ``machine`` (plain data), ``stages``, ``variants`` (name to
            ``accuracy``, ``macs``, ``params`` and, of the pair, ``accept_rate``), ``selector``,
            ``widths`` (rows of ``layer``, ``dense``, ``mild``, ``aggressive``) and ``caveats``.
        results: what was measured; None where nothing was.
        account: the carbon account; None where there is none.

    Raises:
        MissingPackageError: jinja2 or matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingPackageError("jinja2", "host") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number, ratio=ratio, energy=energy, share=share, label=label, quantity=quantity
    )
    page = environment.get_template("report.html").render(
        run=run_summary,
        results=results,
        account=account,
        headline=headline(run_summary, results),
        runtimes=list(dict.fromkeys(c.runtime for c in results.candidates)) if results else [],
        plots=_plots(run_summary, results, account),
        version=__version__,
    )
    storage.write_text(path, page)


def quantity(found: Quantity | None, digits: int = 3) -> str:
    """A value with its interval, as text."""
    if found is None:
        return "not measured"
    if found.low == found.high:
        return f"{found.value:,.{digits}g}"
    return f"{found.value:,.{digits}g} [{found.low:,.{digits}g}, {found.high:,.{digits}g}]"


def headline(run_summary: dict[str, Any], results: Results | None) -> str:
    """One sentence: what the pair does, how much faster it is, what that costs in accuracy."""
    variants = run_summary["variants"]
    points = 100 * (variants["pair"]["accuracy"] - variants["dense"]["accuracy"])
    accuracy = f"The pair is right on {variants['pair']['accuracy']:.1%} of the test images, "
    accuracy += f"{points:+.1f} points against the dense network"
    if results is None:
        return f"{accuracy}; nothing was measured."
    pair = next(c for c in results.candidates if c.variant == "pair")
    if not pair.speedup.excludes(1.0):
        speed = f"shows no clear difference in speed on {pair.runtime}"
    else:
        speed = f"runs at {pair.speedup.value:.2f} times the dense network's speed"
        speed += f" [{pair.speedup.low:.2f}, {pair.speedup.high:.2f}] on {pair.runtime}"
    sentence = f"{accuracy}, and {speed}"
    if pair.energy_ratio is not None and pair.energy_mj is not None:
        sentence += (
            f", at {pair.energy_ratio.value:.0%} of its energy ({label(pair.energy_mj.provenance)})"
        )
    return f"{sentence}; preset {results.preset}."


def _plots(
    run_summary: dict[str, Any], results: Results | None, account: Account | None
) -> list[tuple[str, str]]:
    """Caption and SVG of each plot that there is data for."""
    found: list[tuple[str, str | None]] = []
    if results is not None:
        found += [
            ("Accuracy against latency", plots.accuracy_against(results, "ms")),
            ("Accuracy against energy", plots.accuracy_against(results, "mJ")),
            ("Latency of single inferences", plots.latency_distributions(results)),
        ]
    if account is not None:
        found += [
            ("Where the joules went", plots.stages_bar(account)),
            ("Energy over a life, and where pruning has paid", plots.break_even_curve(account)),
        ]
    found.append(("Channels of each layer", plots.widths_bars(run_summary.get("widths", []))))
    return [(caption, svg) for caption, svg in found if svg is not None]
