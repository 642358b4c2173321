"""The docs' recipes are recipes, and name every key."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from greenprune import schema
from greenprune.errors import RecipeError
from greenprune.recipe import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
INHERITED = {
    "finetune.aggressive": "finetune.mild",
    "finetune.mild": "train",
    "prune.aggressive": "prune.mild",
    "prune.between": "finetune.mild",
    "prune.gates": "train",
    "sparsify": "train",
}
"""Sections whose shared keys the docs show once."""


def recipes_in(page: str) -> list[dict[str, Any]]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize("page", ["README.md", "docs/budgets.md", "docs/recipes.md"])
def test_recipes_in_the_docs_are_valid(page: str) -> None:
    found = recipes_in(page)
    assert found
    for content in found:
        schema.decode(content, Recipe, page, RecipeError)


def test_every_key_is_in_the_docs() -> None:
    (shown,) = recipes_in("docs/recipes.md")
    missing = [key for key in keys(Recipe(), "") if not is_shown(shown, key)]
    assert not missing


def keys(value: Any, prefix: str) -> list[str]:
    found = []
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            found += keys(inner, f"{prefix}{field.name}.")
        else:
            found.append(prefix + field.name)
    return found


def is_shown(shown: dict[str, Any], key: str) -> bool:
    section, _, name = key.rpartition(".")
    while True:
        place: Any = shown
        for part in section.split(".") if section else []:
            place = place.get(part, {})
        if name in place:
            return True
        if section not in INHERITED:
            return False
        section = INHERITED[section]
