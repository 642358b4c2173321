"""``greenprune-bench``: measure a bundle, race two, certify one, compare results, price layers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from greenprune.command_options import CONTEXT, as_json, print_json, print_table

UNUSED = {
    "cost-table": ("bundles", "certify", "compare", "preset", "tdp_watts", "threshold"),
    "compare": ("bundles", "output", "certify", "preset", "meter", "tdp_watts", "threads"),
    "certify": ("output", "preset", "meter", "tdp_watts", "threshold"),
    None: ("threshold",),
}
"""What `bench` does not look at, when it prices layers, compares, certifies or measures."""


@click.command(context_settings=CONTEXT)
@click.argument("bundles", metavar="BUNDLE [BUNDLE]", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--preset",
    type=click.Choice(["quick", "standard", "report", "mlperf-tiny"]),
    default="standard",
    show_default=True,
    help="How long and how strictly: quick takes seconds, standard about 2 minutes a candidate.",
)
@click.option("--meter", default="auto", show_default=True, help="See `greenprune doctor`.")
@click.option(
    "--tdp",
    "tdp_watts",
    type=float,
    metavar="WATTS",
    help="Thermal design power of the processors, for the estimate where there is no counter.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    help="CPU threads; 0 means one for each core.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write results as JSON, and their windows as CSV beside it.",
)
@click.option(
    "--compare",
    nargs=2,
    metavar="OLD NEW",
    type=click.Path(path_type=Path),
    help="Compare two results files instead of measuring; status 1 if the new ones are worse.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(min=0.0, max=1.0),
    default=0.03,
    show_default=True,
    help="With --compare: the smallest change that counts, as a fraction.",
)
@click.option(
    "--certify",
    is_flag=True,
    help="Certify the bundle's pair on this device with the images that it carries; no measuring.",
)
@click.option(
    "--cost-table",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Measure what layers cost on this device, from the graphs that `greenprune cost-table` "
    "wrote, into the table that -o names.",
)
@as_json
def bench(
    bundles: tuple[Path, ...],
    preset: str,
    meter: str,
    tdp_watts: float | None,
    threads: int,
    output: Path | None,
    compare: tuple[Path, Path] | None,
    threshold: float,
    certify: bool,
    cost_table: Path | None,
    as_json: bool,
) -> None:
    """Measure latency and joules of a BUNDLE on this device; needs no torch.

    Two bundles are measured side by side, and each difference is called real or not.

    \b
    Examples:
      greenprune-bench digits.bundle
      greenprune-bench digits.bundle --preset quick --json
      greenprune-bench before.bundle after.bundle -o race.json
      greenprune-bench --compare baseline.json results.json
      greenprune-bench --cost-table probe -o table.json
    """
    from greenprune import certification, harness

    mode = "cost-table" if cost_table else "compare" if compare else "certify" if certify else None
    _check_bench(len(bundles), output, mode)
    if cost_table:
        _price(cost_table, output, threads, meter, as_json)
        return
    if certify:
        told = certification.describe(certification.certify_bundle(bundles[0], threads=threads))
        if as_json:
            print_json(told)
        else:
            click.echo(told["headline"])
        return
    if compare:
        old, new = (harness.read_results(path) for path in compare)
        compared = harness.compare_results(old, new, threshold=threshold)
        print_table(compared, as_json)
        sys.exit(1 if compared.regression else 0)
    if output:
        harness.check_destination(output)
    measure: Callable[..., Any] = harness.bench if len(bundles) == 1 else harness.race_bundles
    results = measure(*bundles, preset=preset, meter=meter, threads=threads, tdp_watts=tdp_watts)
    print_table(results, as_json)  # first: no full disk may take what was measured
    if output:
        harness.write_results(output, results)
    if len(bundles) == 1 and not results.verdict.valid:
        sys.exit(1)


def _price(folder: Path, output: Path | None, threads: int, meter: str, as_json: bool) -> None:
    """Measure a cost table, and say what it came to."""
    from greenprune.harness import cost_probe

    assert output is not None  # _check_bench
    table = cost_probe.measure(folder, output, threads=threads, meter=meter)
    points = sum(len(costs.points) for costs in table.costs)
    told = {
        "table": str(output),
        "target": table.target,
        "runtime": table.runtime,
        "threads": table.threads,
        "block_width": table.block_width,
        "points": points,
        "seconds": table.seconds,
        "meter": table.meter,
    }
    if as_json:
        print_json(told)
        return
    click.echo(
        f"{output}: {points} costs on {table.runtime}, {table.threads} threads, in "
        f"{table.seconds:.0f} s; kernels in blocks of {table.block_width}; joules: {table.meter}"
    )


def _check_bench(bundles: int, output: Path | None, mode: str | None) -> None:
    """Refuse what does not go together before anything is measured."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and name in UNUSED[mode] and context.params[name] != ():
            what = "BUNDLE" if name == "bundles" else parameter.opts[-1]
            why = f"not used with --{mode}" if mode else "used with --compare only"
            raise click.UsageError(f"{what}: {why}; leave it out.")
    if mode == "cost-table" and output is None:
        raise click.UsageError("--cost-table needs -o TABLE.json: what it is for.")
    if not bundles and mode not in ("compare", "cost-table"):
        raise click.UsageError("Missing argument 'BUNDLE'.")
    most = 1 if mode == "certify" else 2
    if bundles > most:
        raise click.UsageError(f"Got {bundles} bundles, expected {'1' if most == 1 else '1 or 2'}.")
    if output and output.suffix != ".json":
        raise click.UsageError(f"-o {output}: expected a name that ends in .json.")
