"""Progress on stderr, with the time left; silent where stderr is not a terminal (device side)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[..., None]
"""``advance(steps=1, note="")``: some steps are done; ``note`` replaces the text at the end."""


@contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """Show a bar for ``total`` steps and yield the function that advances it."""
    if not sys.stderr.isatty():
        yield _silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(description, total=total, note="")

        def advance(steps: int = 1, note: str | None = None) -> None:
            if note is None:
                bar.advance(task, steps)
            else:
                bar.update(task, advance=steps, note=note)

        yield advance


def _silent(steps: int = 1, note: str | None = None) -> None:
    return None


def say(text: str) -> None:
    """One line for a person, on stderr, so that ``--json`` keeps stdout to itself."""
    print(text, file=sys.stderr, flush=True)
