"""The page for people: one self-contained HTML file, and a Markdown summary beside it."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from greenprune import storage
from greenprune._version import __version__
from greenprune.errors import MissingPackageError, StorageError
from greenprune.harness.results import Candidate, Results
from greenprune.harness.table import energy, number, ratio, share
from greenprune.meters.energy import label
from greenprune.nncec import account_plots, plots, words
from greenprune.nncec.account import Account
from greenprune.nncec.drawing import Plot

TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    path: Path, run_summary: dict[str, Any], results: Results | None, account: Account | None
) -> Path:
    """Write the report, and a summary for pull requests beside it.

    Args:
        path: the HTML file; the summary has the same name and ends in ``.md``.
        run_summary: ``name``, ``seed``, ``machine`` (plain data), ``variants`` (name to
            ``accuracy``, ``macs``, ``params`` and, of the pair, ``accept_rate``), ``selector``,
            ``dial`` (``runtime``, ``reference``, ``table``), ``widths`` and ``layer_macs`` (rows of
            ``layer``, ``dense``, ``mild``, ``aggressive``), ``budgets`` (rows of ``variant``,
            ``step``, ``quantity``, ``dense``, ``allowed``, ``predicted``, ``predicted_dense``,
            ``measured`` or None, ``importance_kept``, ``removed_blocks``) and ``caveats``.
        results: what was measured; None where nothing was.
        account: the carbon account; None where there is none.

    Returns:
        The path of the summary.

    Raises:
        MissingPackageError: jinja2 or matplotlib is not installed.
        StorageError: a file cannot be written.
    """
    summary = path.with_suffix(".md")
    if summary == path:
        raise StorageError(f"{path}: expected a page's name, such as report.html")
    found = {
        "run": run_summary,
        "results": results,
        "account": account,
        "headline": headline(run_summary, results),
        "runtimes": list(dict.fromkeys(c.runtime for c in results.candidates)) if results else [],
        "caveats": caveats(run_summary, results, account),
        "version": __version__,
    }
    storage.write_text(summary, render("report.md", found))
    drawn = {"plots": _plots(run_summary, results, account)}
    storage.write_text(path, render("report.html", found | drawn))
    return summary


def render(template: str, content: dict[str, Any]) -> str:
    """A page from a template of this package.

    Raises:
        MissingPackageError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingPackageError("jinja2", "host") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        life_carbon=words.life_carbon,
        saved_carbon=words.saved_carbon,
        stage_joules=words.stage_joules,
        stage_carbon=words.stage_carbon,
        provenance=words.provenance,
    )
    environment.filters.update(
        number=number,
        ratio=lambda found: _unbroken(ratio(found)),
        energy=lambda found: _unbroken(energy(found)),
        share=share,
        label=label,
        micrograms=words.micrograms,
        grams=words.exact_grams,
        spent=words.spent,
        break_evens=words.break_evens,
        plain=_plain,
        quantity=_quantity,
        fleet=words.describe_fleet,
        intensity=words.describe_intensity,
        md=_markdown,
    )
    return environment.get_template(template).render(**content)


def _unbroken(text: str) -> str:
    """A line may end before an interval, not within it."""
    return text.replace(", ", f",{words.NBSP}")


def _markdown(text: object) -> str:
    """Text that neither ends a table's cell nor becomes a tag."""
    return html.escape(str(text), quote=False).replace("|", "\\|").replace("\n", " ")


def _quantity(value: float | None) -> str:
    """A number that may be of any size; '-' where there is none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _plain(value: object) -> str:
    """A fact about the machine, in words."""
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "none"
    return str(value)


def headline(run_summary: dict[str, Any], results: Results | None) -> str:
    """One sentence: what the pair does, how much faster it is, what that costs in accuracy."""
    variants = run_summary["variants"]
    points = 100 * (variants["pair"]["accuracy"] - variants["dense"]["accuracy"])
    accuracy = f"The pair is right on {variants['pair']['accuracy']:.1%} of the test images, "
    accuracy += f"{points:+.1f} points against the dense network"
    if results is None:
        return f"{accuracy}; nothing was measured."
    pair = _pair(run_summary, results)
    if pair is None:
        return f"{accuracy}; the pair was not measured."
    if not pair.speedup.shows_difference:
        speed = f"shows no clear difference in speed on {pair.runtime}"
        speed += " (too few windows)" if pair.speedup.excludes(1.0) else ""
    else:
        speed = f"runs at {pair.speedup.value:.2f} times the dense network's speed"
        speed += f" [{pair.speedup.low:.2f}, {pair.speedup.high:.2f}] on {pair.runtime}"
    sentence = f"{accuracy}, and {speed}"
    if pair.energy_ratio is not None and pair.energy_mj is not None:
        told = "with no clear difference in energy"
        if pair.energy_ratio.shows_difference:
            told = f"at {pair.energy_ratio.value:.0%} of its energy"
        elif pair.energy_ratio.excludes(1.0):
            told += " (too few windows)"
        sentence += f", {told} ({label(pair.energy_mj.provenance)})"
    doubt = "" if results.verdict.valid else "; the measurement is NOT VALID"
    return f"{sentence}; preset {results.preset}{doubt}."


def _pair(run_summary: dict[str, Any], results: Results) -> Candidate | None:
    """The pair on the run's default runtime, or on the first that has it."""
    pairs = {c.runtime: c for c in results.candidates if c.variant == "pair"}
    default = str((run_summary.get("dial") or {}).get("runtime"))
    return pairs.get(default) or next(iter(pairs.values()), None)


def caveats(
    run_summary: dict[str, Any], results: Results | None, account: Account | None
) -> list[str]:
    """Everything that limits what the page says, in plain words."""
    found = list(run_summary.get("caveats", []))
    if results is not None and results.meter == "estimate":
        found.append(
            "No energy counter could be read. Joules are ESTIMATES from CPU time and a range of "
            "watts; compare them with each other, not with a power meter."
        )
    if results is not None and results.meter == "none":
        found.append("Energy was not measured, by request.")
    if account is None:
        return found
    if account.unmeasured_stages:
        found.append(
            "Not measured, so that the totals of the account are lower bounds: "
            f"{', '.join(account.unmeasured_stages)}."
        )
    if account.incomplete_stages:
        found.append(
            "Measured in part, so that their joules are lower bounds: "
            f"{', '.join(account.incomplete_stages)}; the table of the stages says why."
        )
    if account.variants:
        found.append(
            "Lives, savings and break-even count a pruned network's inference as its energy ratio "
            "to dense, paired by block, times dense's; the column of energies is not paired."
        )
    found += [f"The ledger is damaged: {fault}" for fault in account.unreadable]
    if account.embodied_kgco2e is None:
        found.append("Embodied carbon of the devices is not included (give --embodied).")
    found.append(
        "Carbon intensities are yearly averages of a whole country: they know neither the hour nor "
        "the supplier. Embodied carbon of the host, networks, storage and disposal are not counted."
    )
    return found


def _plots(
    run_summary: dict[str, Any], results: Results | None, account: Account | None
) -> dict[str, list[Plot]]:
    """By section: those that there is data for."""
    measured: list[Plot | None] = []
    if results is not None:
        measured = [
            plots.accuracy_against(results, run_summary, "ms"),
            plots.accuracy_against(results, run_summary, "mJ"),
            plots.latency_distributions(results),
            plots.energy_windows(results),
        ]
    layers = [
        plots.layers_bars(run_summary.get("widths", []), "channels"),
        plots.layers_bars(run_summary.get("layer_macs", []), "MACs"),
    ]
    return {
        "measured": [plot for plot in measured if plot is not None],
        "layers": [plot for plot in layers if plot is not None],
        "account": account_plots.all_plots(account) if account is not None else [],
    }
