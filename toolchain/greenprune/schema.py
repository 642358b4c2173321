"""Plain data into frozen dataclasses, strictly, with messages that name the key (device side)."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from typing import Any, TypeVar

import msgspec

from greenprune.errors import GreenpruneError

T = TypeVar("T")


def decode(content: Any, kind: type[T], where: str, error: type[GreenpruneError]) -> T:
    """Build a ``kind`` (a dataclass) from JSON- or TOML-like ``content``; nothing is coerced.

    Args:
        content: dictionaries, lists, strings, numbers, booleans and None.
        kind: the dataclass to build; nested dataclasses, tuples, unions and ``Literal`` work.
        where: what the user calls ``content`` (a file's name); starts every message.
        error: the GreenpruneError subclass to raise.

    Raises:
        GreenpruneError: (as ``error``) an unknown key, a missing key or a wrong type.
    """
    _refuse_unknown_keys(content, kind, where, "", error)
    try:
        return msgspec.convert(content, kind, strict=True)
    except msgspec.ValidationError as problem:
        text = str(problem).replace("`", "'")
        message, _, path = text.partition(" - at ")
        key = path.strip("'").removeprefix("$").removeprefix(".") or "(top level)"
        if message.startswith("Invalid enum value"):
            message += f"; expected one of: {', '.join(_choices(kind, key))}"
        raise error(f"{where}: key '{key}': {message[0].lower()}{message[1:]}") from None


def encode(value: Any) -> Any:
    """Plain JSON-like data from dataclasses; the inverse of :func:`decode`."""
    return msgspec.to_builtins(value)


def _refuse_unknown_keys(
    content: Any, kind: Any, where: str, path: str, error: type[GreenpruneError]
) -> None:
    if not isinstance(content, (dict, list)):
        return  # nearly all of a manifest: sessions are opened by it
    for candidate in _members(kind):
        origin = typing.get_origin(candidate)
        arguments = typing.get_args(candidate)
        if dataclasses.is_dataclass(candidate) and isinstance(content, dict):
            hints = _hints(typing.cast("Any", candidate))
            known = list(hints)
            for key, value in content.items():
                full = f"{path}.{key}" if path else str(key)
                if key not in known:
                    near = difflib.get_close_matches(str(key), known, n=1)
                    hint = f" (did you mean '{near[0]}'?)" if near else ""
                    raise error(
                        f"{where}: unknown key '{full}'{hint}; known here: {', '.join(known)}"
                    )
                _refuse_unknown_keys(value, hints[key], where, full, error)
        elif origin is dict and isinstance(content, dict) and len(arguments) == 2:
            for key, value in content.items():
                _refuse_unknown_keys(value, arguments[1], where, f"{path}.{key}", error)
        elif origin in (list, tuple) and isinstance(content, list) and arguments:
            for index, value in enumerate(content):
                _refuse_unknown_keys(value, arguments[0], where, f"{path}[{index}]", error)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """Type of each field of a dataclass: resolving them takes longer than all the rest."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _choices(kind: Any, key: str) -> list[str]:
    """The values that the ``Literal`` at ``key``, such as ``parts[0].kind``, may have."""
    for name, item in re.findall(r"(\w+)|(\[[^\]]*\])", key):
        members = _members(kind)
        if item:
            holder = next(m for m in members if typing.get_origin(m) in (dict, list, tuple))
            kind = typing.get_args(holder)[typing.get_origin(holder) is dict]
        elif name:
            kind = typing.get_type_hints(next(filter(dataclasses.is_dataclass, members)))[name]
    literals = (m for m in _members(kind) if typing.get_origin(m) is typing.Literal)
    return [str(choice) for literal in literals for choice in typing.get_args(literal)]


def _members(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)
