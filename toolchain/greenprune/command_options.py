"""What the commands share: options, and how answers are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
runs_option = click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    help="The folder that holds all runs.",
)


overrides_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe, as in --set train.epochs=3; can be repeated.",
)


def recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """RECIPE, and what goes with it."""
    for option in (
        as_json,
        click.option("--name", help="The run's name; by default the recipe's."),
        runs_option,
        overrides_option,
        click.argument("recipe", required=False),
    ):
        function = option(function)
    return function


def print_json(content: Any) -> None:
    """On stdout."""
    click.echo(json.dumps(content, indent=2, ensure_ascii=False))


def print_table(results: Any, as_json: bool) -> None:
    """A record of the harness, as JSON or as its table."""
    from rich.console import Console

    from greenprune import schema

    if as_json:
        print_json(schema.encode(results))
    else:
        # a pipe has no width of its own, and 80 columns would break every figure
        Console(width=None if sys.stdout.isatty() else 140).print(results.table())
