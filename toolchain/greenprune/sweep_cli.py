"""``greenprune sweep`` and ``greenprune pick``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from greenprune.command_options import CONTEXT, as_json, print_json, runs_option


@click.command(context_settings=CONTEXT)
@click.argument("recipe", required=False)
@click.option(
    "--budgets",
    multiple=True,
    required=True,
    metavar="BUDGET[,BUDGET]",
    help="Of one point's aggressive network, such as 'latency x0.5' or 'latency x0.5,params x0.4'; "
    "once for each point.",
)
@click.option(
    "--targets",
    default="x86",
    show_default=True,
    metavar="TARGET[,TARGET]",
    help="Every target gets every point.",
)
@click.option(
    "--mild",
    metavar="BUDGET[,BUDGET]",
    help="Of every point's mild network.  [default: half-way between the point's shares and the "
    "dense network]",
)
@click.option(
    "--address",
    metavar="ADDRESS",
    help="Of a Ray cluster, as in ray://host:10001, or auto.  [default: a Ray of its own]",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Points that train at once on this machine.  [default: one a core]",
)
@click.option("--name", help="The sweep's name.  [default: the recipe's and -sweep]")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe in all points; can be repeated.",
)
@runs_option
@as_json
def sweep(
    recipe: str | None,
    budgets: tuple[str, ...],
    targets: str,
    mild: str | None,
    address: str | None,
    workers: int | None,
    name: str | None,
    overrides: tuple[str, ...],
    runs: Path,
    as_json: bool,
) -> None:
    """Run many points of RECIPE with Ray, and draw their Pareto front.

    Each point is a run of its own in the sweep's folder. A sweep that was stopped goes on where it
    stopped; status 1 if a point failed.

    \b
    Examples:
      greenprune sweep --budgets "macs x0.5" --budgets "macs x0.3" --workers 2
      greenprune sweep recipe.toml --budgets "latency x0.5,params x0.4" --address ray://host:10001
    """
    from greenprune import sweep as sweeping

    if address is not None and workers is not None:
        raise click.UsageError("--workers is of a Ray of its own; a cluster has them: leave it out")
    made = sweeping.sweep(
        recipe,
        budgets=[_split(texts) for texts in budgets],
        targets=_split(targets),
        mild=None if mild is None else _split(mild),
        address=address,
        workers=workers,
        overrides=overrides,
        runs=runs,
        name=name,
    )
    if as_json:
        print_json(made)
    else:
        _print_sweep(made)
    if made["failed"]:
        sys.exit(1)


def _split(texts: str) -> list[str]:
    return [text.strip() for text in texts.split(",") if text.strip()]


def _print_sweep(made: dict[str, Any]) -> None:
    for target, found in made["fronts"].items():
        click.echo(
            f"{target}: hypervolume {found['hypervolume']:.4f} of {', '.join(found['objectives'])};"
            f" knee {found['knee'] or 'none'}; {len(found['front'])} on the front"
        )
        for objective, reason in found["left_out"].items():
            click.echo(f"  {objective} left out: {reason}")
    for point in made["points"]:
        if point["state"] == "failed":
            click.echo(f"failed: {point['name']}: {point['error']}")
    click.echo(made["page"])


@click.command(context_settings=CONTEXT)
@click.argument("sweep", type=click.Path(path_type=Path))
@click.option("--latency", "latency_ms", type=float, metavar="MS", help="Mean, at most.")
@click.option("--energy", "energy_mj", type=float, metavar="MJ", help="Of an inference, at most.")
@click.option("--bytes", "most_bytes", type=int, help="Of the artifacts, at most.")
@click.option(
    "--accuracy",
    type=click.FloatRange(min=0.0, max=1.0),
    help="On the development images, at least; alone, it picks the fastest.",
)
@click.option("--target", help="Needed where the sweep has several.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The bundle's folder.")
@runs_option
@as_json
def pick(
    sweep: Path,
    latency_ms: float | None,
    energy_mj: float | None,
    most_bytes: int | None,
    accuracy: float | None,
    target: str | None,
    output: Path | None,
    runs: Path,
    as_json: bool,
) -> None:
    """Export the most accurate candidate of SWEEP within the limits.

    \b
    Examples:
      greenprune pick lenet5-digits-sweep --latency 0.05
      greenprune pick runs/lenet5-digits-sweep --accuracy 0.97 -o digits.bundle
    """
    from greenprune import pick as picking
    from greenprune import schema, sweep_record

    folder = runs / sweep if not sweep.is_dir() and (runs / sweep).is_dir() else sweep
    picked = picking.pick(
        folder,
        latency_ms=latency_ms,
        energy_mj=energy_mj,
        bytes=most_bytes,
        accuracy=accuracy,
        target=target,
        output=output,
    )
    chosen = picked.candidate
    if as_json:
        print_json(
            {
                "bundle": str(picked.bundle),
                "point": chosen.point,
                "variant": chosen.variant,
                "threshold": picked.threshold,
                "runtime": chosen.measured.runtime,
                "valid": chosen.measured.valid,
                "mean_ms": chosen.mean_ms,
                "figures": schema.encode(chosen.figures),
            }
        )
        return
    at = f" at threshold {picked.threshold:.4g}" if picked.threshold is not None else ""
    click.echo(f"{picked.bundle}")
    click.echo(f"use its '{chosen.variant}'{at}: {sweep_record.describe(chosen)}")
    if not chosen.measured.valid:
        click.echo("its measurement is NOT VALID by its own rules; measure the bundle again")
