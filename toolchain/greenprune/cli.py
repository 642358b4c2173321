"""The commands: each parses, calls one public function and prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from greenprune._version import __version__
from greenprune.bench_command import bench
from greenprune.command_options import (
    CONTEXT,
    as_json,
    overrides_option,
    print_json,
    recipe_options,
    runs_option,
)
from greenprune.errors import GreenpruneError, TargetError
from greenprune.progress import say
from greenprune.sweep_cli import pick, sweep

USER_MUST_ACT, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``greenprune``."""
    _guarded(commands, arguments, "greenprune")


def export_main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``greenprune-export``."""
    _guarded(export, arguments, "greenprune-export")


def bench_main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``greenprune-bench``."""
    _guarded(bench, arguments, "greenprune-bench")


def _guarded(command: click.Command, arguments: Sequence[str] | None, name: str) -> None:
    """Run a command and turn what the user must know into one message and an exit status."""
    try:
        status = command.main(arguments, prog_name=name, standalone_mode=False)
    except click.exceptions.Abort:
        status = _interrupted()
    except KeyboardInterrupt:
        status = _interrupted()
    except click.ClickException as error:
        error.show()
        status = USER_MUST_ACT
    except GreenpruneError as error:
        say(f"{name}: {error}")
        status = USER_MUST_ACT
    except OSError as error:
        say(
            f"{name}: {error.filename or 'a file'}: {error.strerror or error}; see to it, try again"
        )
        status = USER_MUST_ACT
    sys.exit(status if isinstance(status, int) else 0)


def _interrupted() -> int:
    say("interrupted; the same command goes on where this one stopped")
    return INTERRUPTED


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="greenprune")
def commands() -> None:
    """Make a trained network small, let a selector pick per input, and measure what it costs.

    \b
    Examples:
      greenprune run                        LeNet-5 on digits: the whole way, two minutes
      greenprune run recipe.toml            your own network and images
      greenprune-export --target x86        a bundle of the newest run
      greenprune-bench BUNDLE               measure a bundle on this device
      greenprune doctor                     what this machine can do
    """


@commands.command(context_settings=CONTEXT)
@recipe_options
def run(
    recipe: str | None, overrides: tuple[str, ...], runs: Path, name: str | None, as_json: bool
) -> None:
    """The whole way: from RECIPE to a measured bundle, an account and a report.

    RECIPE is a TOML file or the name of a built-in recipe (see `greenprune recipes`); without it,
    LeNet-5 on handwritten digits. A run that was stopped goes on where it stopped.

    \b
    Examples:
      greenprune run
      greenprune run recipe.toml --set prune.aggressive.macs=0.2
      greenprune run resnet56-cifar10 --set model.weights=resnet56.th --json
    """
    from greenprune import api

    summary = api.run(recipe, overrides=overrides, runs=runs, name=name)
    if not summary:  # under torchrun the first process answers
        return
    if as_json:
        print_json(summary)
        return
    from greenprune.summary import print_summary

    print_summary(summary)


@commands.command(context_settings=CONTEXT)
@recipe_options
def prune(
    recipe: str | None, overrides: tuple[str, ...], runs: Path, name: str | None, as_json: bool
) -> None:
    """Up to the fine-tuned networks: train or load, sparsify, prune, fine-tune.

    \b
    Example:
      greenprune prune recipe.toml --set prune.mild.macs=0.7
    """
    from greenprune import api

    made = api.prune(recipe, overrides=overrides, runs=runs, name=name)
    if not made:  # under torchrun the first process answers
        return
    if as_json:
        print_json(made)
        return
    for variant, found in made["variants"].items():
        click.echo(
            f"{variant:<11}{found['accuracy']:>8.2%}{found['macs']:>14,} MACs"
            f"{found['params']:>12,} parameters   {found['network']}"
        )


@commands.command(context_settings=CONTEXT)
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--target", default="x86", show_default=True, help="See `greenprune targets`.")
@click.option("--precision", default="fp32", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The bundle's folder.")
@runs_option
@as_json
def export(
    run: Path | None,
    target: str,
    precision: str,
    output: Path | None,
    runs: Path,
    as_json: bool,
) -> None:
    """Write a bundle of RUN (by default the newest finished run) for one target.

    \b
    Examples:
      greenprune-export --target x86
      greenprune-export runs/lenet5-digits --target x86 -o digits.bundle
    """
    from greenprune import api

    bundle = api.export(run, target=target, precision=precision, output=output, runs=runs)
    if as_json:
        print_json({"bundle": str(bundle), "target": target, "precision": precision})
    else:
        click.echo(f"{bundle}")


@commands.command(context_settings=CONTEXT)
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The page to write.")
@click.option("--carbon", is_flag=True, help="Print the account of the life's joules and carbon.")
@click.option(
    "--per-day", type=float, help="Inferences a day of each device.  [with a fleet: 1000]"
)
@click.option("--years", type=float, help="How long the devices are in use.  [with a fleet: 3]")
@click.option("--devices", type=int, help="How many devices.  [with a fleet: 1]")
@click.option(
    "--intensity",
    metavar="G|PLACE[:YEAR]",
    help="Of the electricity that trained and pruned: gCO2e for each kWh, or a place, such as 42, "
    "FRA or DEU:2023.  [default: the recipe's]",
)
@click.option(
    "--device-intensity",
    metavar="G|PLACE[:YEAR]",
    help="The same of the devices' electricity.  [default: as --intensity]",
)
@click.option("--pue", type=float, help="PUE of the host.  [default: the recipe's]")
@click.option("--embodied", type=float, metavar="KG", help="kgCO2e of making one device.")
@click.option("--lifetime", type=float, metavar="YEARS", help="Of a device.  [default: 5]")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What greenprune-bench measured of this run's bundle on a device elsewhere.",
)
@runs_option
@as_json
def report(
    run: Path | None,
    output: Path | None,
    carbon: bool,
    per_day: float | None,
    years: float | None,
    devices: int | None,
    intensity: str | None,
    device_intensity: str | None,
    pue: float | None,
    embodied: float | None,
    lifetime: float | None,
    results: Path | None,
    runs: Path,
    as_json: bool,
) -> None:
    """Write the HTML report of RUN (by default the newest finished run), and a Markdown summary.

    Any of --per-day, --years, --devices and --embodied makes it the account of a fleet; otherwise
    it counts the recipe's number of inferences.

    \b
    Examples:
      greenprune report -o report.html
      greenprune report --carbon --per-day 5000 --years 4 --devices 200
      greenprune report --carbon --intensity FRA --device-intensity DEU --embodied 25
    """
    from greenprune import api, schema
    from greenprune.nncec import factors, life, words

    if lifetime is not None and embodied is None:
        raise click.UsageError("--lifetime is of a device's making: give --embodied too.")
    terms = {"per_day": per_day, "years": years, "devices": devices}
    given: dict[str, Any] = {key: value for key, value in terms.items() if value is not None}
    account = api.carbon(
        run,
        runs=runs,
        intensity=None if intensity is None else factors.parse_factor(intensity),
        device_intensity=None
        if device_intensity is None
        else factors.parse_factor(device_intensity),
        pue=pue,
        fleet=life.Fleet(**given) if given or embodied is not None else None,
        embodied=None
        if embodied is None
        else life.Embodied(
            device_kgco2e=embodied, **({} if lifetime is None else {"lifetime_years": lifetime})
        ),
        results=results,
    )
    page = api.report(run, output=output, runs=runs, account=account, results=results)
    if as_json:
        print_json({"report": str(page), **({"account": schema.encode(account)} if carbon else {})})
    else:
        if carbon:
            words.print_account(account)
        click.echo(f"{page}")
    if account.unreadable:
        say(f"greenprune: {words.damage(account)}")
        sys.exit(USER_MUST_ACT)


@commands.command(context_settings=CONTEXT)
@as_json
def doctor(as_json: bool) -> None:
    """What this machine can do: runtimes, meters, permissions and how to get them.

    \b
    Example:
      greenprune doctor --json
    """
    from greenprune.harness import environment

    found = environment.diagnose()
    if as_json:
        print_json(found)
    else:
        environment.print_diagnosis(found)


@commands.command(context_settings=CONTEXT)
@as_json
def targets(as_json: bool) -> None:
    """The targets a bundle can be built for.

    \b
    Example:
      greenprune targets
    """
    from greenprune import registry, schema

    found = []
    for name in registry.available_targets():
        try:
            found.append(registry.load_target(name))
        except TargetError as error:  # another package's; the others are still there
            say(f"greenprune: {error}")
    if as_json:
        print_json(
            {
                target.name: {
                    "description": target.description,
                    **schema.encode(target.capabilities),
                    "runtimes_here": list(target.runtimes_here()),
                }
                for target in found
            }
        )
        return
    for target in found:
        precisions = ", ".join(target.capabilities.precisions)
        status = target.capabilities.status
        click.echo(f"{target.name:<17}{target.description}; {precisions}; {status}")
    for alias, name in registry.ALIASES.items():
        click.echo(f"{alias:<17}{name}")


@commands.command(context_settings=CONTEXT)
@as_json
def recipes(as_json: bool) -> None:
    """The built-in recipes.

    \b
    Example:
      greenprune recipes
    """
    from greenprune.recipe import built_in_recipes

    found = built_in_recipes()
    if as_json:
        print_json(found)
        return
    for name, description in found.items():
        click.echo(f"{name:<20}{description}")


commands.add_command(export)
commands.add_command(bench)
commands.add_command(sweep)
commands.add_command(pick)


@commands.command("cost-table", context_settings=CONTEXT)
@click.argument("recipe", required=False)
@overrides_option
@click.option("--runtime", help="To measure, such as openvino-int8.  [default: the target's first]")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder to write."
)
@as_json
def cost_graphs(
    recipe: str | None,
    overrides: tuple[str, ...],
    runtime: str | None,
    output: Path,
    as_json: bool,
) -> None:
    """Write the graphs that a device elsewhere measures its cost table from.

    A budget in milliseconds or joules of such a device needs it: `greenprune-bench --cost-table` is
    run there, with the base install, and its table is named in prune.cost_table. On the device
    itself `greenprune run` does all of this by itself.

    \b
    Example:
      greenprune cost-table recipe.toml --set compile.target=arm -o probe
    """
    from greenprune import api

    folder = api.cost_graphs(recipe, overrides=overrides, runtime=runtime, output=output)
    if as_json:
        print_json({"folder": str(folder)})
    else:
        click.echo(f"{folder}: on the device, greenprune-bench --cost-table {folder} -o table.json")


if __name__ == "__main__":
    main()
