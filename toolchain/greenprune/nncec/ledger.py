"""The ledger of a network's life: a row for each stage, appended, never changed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenprune import schema, storage
from greenprune.bundle import Provenance
from greenprune.errors import RunError
from greenprune.meters.energy import Energy
from greenprune.nncec.factors import of_recipe

JOULES_PER_KWH = 3.6e6
REPAIR = (
    "the ledger was changed by hand or damaged: put a copy of it back, or delete that line and "
    "`greenprune run` with the same recipe and --name enters finished stages again (a line of an "
    "interrupted or replaced execution is lost)"
)


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A number and its interval; the field's name gives the unit."""

    value: float
    low: float
    high: float

    def times(self, factor: Quantity) -> Quantity:
        """Product of two quantities that are not negative."""
        return Quantity(
            value=self.value * factor.value,
            low=self.low * factor.low,
            high=self.high * factor.high,
        )

    def scaled(self, factor: float) -> Quantity:
        """Product with an exact number that is not negative."""
        return self.times(Quantity(value=factor, low=factor, high=factor))

    def plus(self, other: Quantity) -> Quantity:
        """Sum; the intervals add up, as errors of one meter do not cancel."""
        return Quantity(
            value=self.value + other.value, low=self.low + other.low, high=self.high + other.high
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One stage. ``joules``, ``kwh`` and ``kgco2e`` are None where nothing was measured.

    ``kwh`` is at the meter; ``kgco2e`` = kwh x PUE x intensity / 1000.
    """

    identity: str
    """The same for the same execution, so that it is entered once."""
    stage: str
    seconds: float
    joules: Quantity | None
    provenance: Provenance | None
    scope: str
    meter: str
    kwh: Quantity | None
    kgco2e: Quantity | None
    intensity_g_per_kwh: Quantity
    pue: float
    source: str
    """Of the intensity."""
    note: str = ""
    """Why joules are None, where that is known, or what they lack: then they are a lower bound."""


def stage_row(
    *,
    identity: str,
    stage: str,
    seconds: float,
    energy: Energy | dict[str, Any] | None,
    intensity_g_per_kwh: float,
    pue: float,
    note: str = "",
) -> Row:
    """The row of one stage; ``energy`` is the record or the plain data that it was encoded to."""
    if isinstance(energy, dict):
        energy = schema.decode(energy, Energy, f"stage '{stage}'", RunError)
    factor = of_recipe(intensity_g_per_kwh)
    intensity = Quantity(value=factor.value, low=factor.low, high=factor.high)
    joules = kwh = kgco2e = None
    if energy is not None:
        joules = Quantity(value=energy.value, low=energy.low, high=energy.high)
        kwh, kgco2e = _derived(joules, intensity, pue)
    return Row(
        identity=identity,
        stage=stage,
        seconds=seconds,
        joules=joules,
        provenance=energy.provenance if energy else None,
        scope=energy.scope if energy else "",
        meter=energy.meter if energy else "none",
        kwh=kwh,
        kgco2e=kgco2e,
        intensity_g_per_kwh=intensity,
        pue=pue,
        source=factor.source,
        note=note,
    )


def _derived(joules: Quantity, intensity: Quantity, pue: float) -> tuple[Quantity, Quantity]:
    """kWh and kgCO2e of joules."""
    kwh = joules.scaled(1 / JOULES_PER_KWH)
    return kwh, kwh.times(intensity).scaled(pue / 1000)


def append(path: Path, row: Row) -> None:
    """Add one row at the end of the file; what is there is never touched.

    Raises:
        StorageError: the disk is full or the file is not writable.
    """
    line = json.dumps(schema.encode(row), allow_nan=False, ensure_ascii=False) + "\n"
    with storage.storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unended = _remove_torn_row(path)
        with path.open("ab") as file:
            file.write(b"\n" * unended + line.encode())
            file.flush()
            os.fsync(file.fileno())


def _remove_torn_row(path: Path) -> bool:
    """A writer that was killed, or a full disk, leaves a part of the last row; it is removed.

    Returns:
        Whether the last row is whole and lacks its line's end alone.
    """
    content = path.read_bytes() if path.is_file() else b""
    tail = content[content.rfind(b"\n") + 1 :]
    if tail and _is_torn(tail):
        storage.write_bytes(path, content[: len(content) - len(tail)])
        return False
    return bool(tail)


def _is_torn(tail: bytes) -> bool:
    """No part of a row is JSON by itself."""
    try:
        json.loads(tail)
    except RecursionError:
        return False  # nothing that a row is cut down to
    except ValueError:
        return True
    return False


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a ledger's file holds: rows in order, and what was wrong with every other line."""

    rows: tuple[Row, ...]
    unreadable: tuple[str, ...]
    """A message for each damaged line; it names file, line and fault."""


def scan(path: Path) -> Content:
    """Every row that can be read; a damaged line is named and the others are kept.

    A file that is not there yet has none. A part of a row after the last line's end is what a
    killed writer left, and no damage.
    """
    if not path.is_file():
        return Content(rows=(), unreadable=())
    *lines, tail = path.read_bytes().split(b"\n")
    if tail and not _is_torn(tail):
        lines.append(tail)
    rows: list[Row] = []
    unreadable: list[str] = []
    entered: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            row = _parse(line, where)
            if entered.setdefault(row.identity, row) != row:
                raise RunError(
                    f"{where}: identity: expected one of its own, got '{row.identity}', which an "
                    "earlier line has with other figures"
                )
            rows.append(row)
        except RunError as error:
            unreadable.append(str(error))
    return Content(rows=tuple(rows), unreadable=tuple(unreadable))


def distinct(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Every execution once, where a line was copied."""
    return tuple({row.identity: row for row in rows}.values())


def _parse(line: bytes, where: str) -> Row:
    try:
        row = schema.decode(json.loads(line), Row, where, RunError)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where}: expected a row as JSON: {error}") from error
    _check(row, where)
    return row


def _check(row: Row, where: str) -> None:
    if not 0 <= row.seconds < math.inf:
        raise RunError(f"{where}: seconds: expected 0 or more, got {row.seconds}")
    if not 1 <= row.pue < math.inf:
        raise RunError(f"{where}: pue: expected 1.0 or more, got {row.pue}")
    measured = {
        name: getattr(row, name) is not None for name in ("joules", "kwh", "kgco2e", "provenance")
    }
    if len(set(measured.values())) > 1:
        null = ", ".join(name for name, found in measured.items() if not found)
        raise RunError(
            f"{where}: expected joules, kwh, kgco2e and provenance together or all null; "
            f"null are: {null}"
        )
    for name in ("joules", "kwh", "kgco2e", "intensity_g_per_kwh"):
        found: Quantity | None = getattr(row, name)
        if found is not None and not 0 <= found.low <= found.value <= found.high < math.inf:
            raise RunError(
                f"{where}: {name}: expected 0 <= low <= value <= high, got {found.low}, "
                f"{found.value}, {found.high}"
            )
    if row.joules is None:
        return
    derived = _derived(row.joules, row.intensity_g_per_kwh, row.pue)
    for name, follows in zip(("kwh", "kgco2e"), derived, strict=True):
        for end in ("value", "low", "high"):
            entered, expected = getattr(getattr(row, name), end), getattr(follows, end)
            if not math.isclose(entered, expected, rel_tol=1e-9):
                raise RunError(
                    f"{where}: {name}.{end}: expected {expected:g}, which follows from joules, "
                    f"intensity_g_per_kwh and pue, got {entered:g}"
                )


def read(path: Path) -> tuple[Row, ...]:
    """All rows in order, where every line is one.

    Raises:
        RunError: a line is not a row of a ledger; all such lines are named.
    """
    found = scan(path)
    if found.unreadable:
        raise RunError(f"{'; '.join(found.unreadable)}; {REPAIR}")
    return found.rows
