"""What the tables of all pages are made with."""

from __future__ import annotations

import json
from typing import Any

from common import RESULTS


def read(name: str) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def percent(spread: dict[str, float]) -> str:
    return f"{spread['mean'] * 100:.2f} ± {spread['deviation'] * 100:.2f}%"


def machine(result: dict[str, Any]) -> str:
    found = result["machine"]
    virtual = ", virtual" if found["virtual_machine"] else ""
    return f"{found['usable_cores']} cores ({found['cpu']}{virtual})"


def validity(valid: bool) -> str:
    return "" if valid else ", whose windows varied by more than 5%: an illustration, not a claim"


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
