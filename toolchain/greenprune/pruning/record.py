"""A network on disk: its factory, what was cut out of it, and its weights. Nothing is pickled."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from greenprune import schema, storage
from greenprune.errors import GreenpruneError, PruningError, WeightsError
from greenprune.pruning.graph import Analysis, analyse
from greenprune.pruning.surgery import Removed, add_bias, compact, remove_block

SCHEMA_VERSION = 1
NETWORK = "network.json"
WEIGHTS = "weights.safetensors"

Kept = dict[str, tuple[int, ...]]
"""Group name to the channels that stay; groups that lose none are left out."""


@dataclass(frozen=True, kw_only=True)
class NetworkRecord:
    """How to build a network again, before its weights are loaded."""

    factory: str
    """``module:function`` or ``path/file.py:function``."""
    factory_sha256: str
    """Of the source file that the factory is in."""
    arguments: dict[str, Any]
    input_shape: tuple[int, ...]
    """Of one sample, without the batch."""
    surgeries: tuple[Kept, ...] = ()
    """In order; each refers to the groups of the network that the one before it left."""
    removed_blocks: tuple[str, ...] = ()
    """Residual blocks that went, before all surgeries."""
    added_biases: tuple[str, ...] = ()
    """Modules that gained a bias, after all surgeries."""

    @classmethod
    def of(
        cls, factory: str, arguments: Mapping[str, Any], input_shape: tuple[int, ...]
    ) -> NetworkRecord:
        """The record of a network as its factory makes it.

        Raises:
            WeightsError: there is no such factory.
        """
        return cls(
            factory=factory,
            factory_sha256=_factory_sha256(factory),
            arguments=dict(arguments),
            input_shape=tuple(input_shape),
        )

    def pruned(self, analysis: Analysis, removed: Removed) -> NetworkRecord:
        """The record after ``removed`` was cut out of the network that ``analysis`` is of."""
        widths = {group.name: group.channels for group in analysis.groups}
        kept = {
            name: tuple(sorted(set(range(widths[name])) - {int(channel) for channel in channels}))
            for name, channels in removed.items()
            if len(channels)
        }
        return dataclasses.replace(self, surgeries=(*self.surgeries, kept))

    def without_blocks(self, *names: str) -> NetworkRecord:
        """The record after :func:`greenprune.pruning.surgery.remove_block` on these blocks.

        Raises:
            PruningError: channels were removed before, or biases added.
        """
        if self.surgeries or self.added_biases:
            raise PruningError(
                "expected blocks to go before channels go and biases come, found "
                f"{len(self.surgeries)} surgeries and {len(self.added_biases)} added biases; "
                "remove the blocks first"
            )
        return dataclasses.replace(self, removed_blocks=(*self.removed_blocks, *names))

    def with_biases(self, *modules: str) -> NetworkRecord:
        """The record after :func:`greenprune.pruning.surgery.add_bias` on these modules."""
        return dataclasses.replace(self, added_biases=(*self.added_biases, *modules))


@dataclass(frozen=True, kw_only=True)
class _File:
    """``network.json``."""

    schema: int
    record: NetworkRecord
    weights_sha256: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def save_network(folder: Path, network: nn.Module, record: NetworkRecord) -> None:
    """Write ``network.json`` and ``weights.safetensors`` into ``folder``, each atomically.

    Raises:
        StorageError: the folder cannot be written.
        WeightsError: weights that are not finite.
    """
    from safetensors.torch import save

    state = {name: value.detach().cpu().contiguous() for name, value in _state(network).items()}
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise WeightsError(
                f"{folder / WEIGHTS}: key '{name}': expected finite values, found NaN or infinity; "
                "not saved"
            )
    storage.write_bytes(folder / WEIGHTS, save(state))
    content = _File(
        schema=SCHEMA_VERSION,
        record=record,
        weights_sha256=storage.sha256(folder / WEIGHTS),
        shapes={name: tuple(value.shape) for name, value in state.items()},
    )
    storage.write_json(folder / NETWORK, schema.encode(content))


def load_network(folder: Path) -> tuple[nn.Module, NetworkRecord]:
    """Build a saved network again; in eval mode, on the CPU.

    The factory's module is imported and called: load only what you would run.

    Raises:
        WeightsError: a file is missing, damaged or truncated; the factory's source has changed;
            the weights do not fit. The message names file, key, expected and found shape.
    """
    content = _read(folder / NETWORK)
    record = content.record
    found = _factory_sha256(record.factory)
    if found != record.factory_sha256:
        raise WeightsError(
            f"{folder / NETWORK}: the source of factory '{record.factory}' has changed since this "
            f"was saved (sha256 {record.factory_sha256[:12]}…, now {found[:12]}…); use the source "
            "that it was saved with, or make the network again"
        )
    state = _read_weights(folder / WEIGHTS, content.weights_sha256)
    network = _rebuild(folder, record)
    _check_fits(folder / WEIGHTS, _state(network), state)
    network.load_state_dict(state)
    return network.eval(), record


def _state(network: nn.Module) -> dict[str, Tensor]:
    """The state dictionary; names that share a tensor get copies, as files hold no sharing."""
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        state[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return state


def _factory_sha256(factory: str) -> str:
    """Of the source; our own networks are known by their names, shapes and weights alone."""
    from greenprune.models import resolve

    source = resolve(factory)[1]
    return "" if factory.startswith("greenprune.models:") else storage.sha256(source)


def _read(path: Path) -> _File:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; expected a saved network") from None
    except ValueError as error:
        raise WeightsError(f"{path}: not valid JSON: {error}; save the network again") from error
    found = content.get("schema") if isinstance(content, dict) else None
    if found != SCHEMA_VERSION:
        raise WeightsError(
            f"{path}: expected schema {SCHEMA_VERSION}, found {found}; use the greenprune that "
            "wrote it, or save the network again"
        )
    return schema.decode(content, _File, str(path), WeightsError)


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected the weights of the network beside it")
    try:
        state: dict[str, Tensor] = load(path.read_bytes())
    except SafetensorError as error:
        raise WeightsError(
            f"{path}: truncated or damaged ({error}); save the network again"
        ) from error
    found = storage.sha256(path)
    if found != sha256:
        raise WeightsError(
            f"{path}: expected sha256 {sha256[:12]}… as {NETWORK} says, found {found[:12]}…; "
            "the two files are not of one network, or one is damaged"
        )
    return state


def _rebuild(folder: Path, record: NetworkRecord) -> nn.Module:
    from greenprune.models import build

    try:
        network = build(record.factory, record.arguments)
        for name in record.removed_blocks:
            remove_block(network, name)
        example = torch.zeros(1, *record.input_shape)
        for kept in record.surgeries:
            analysis = analyse(network, example)
            network = compact(network, analysis, _complement(analysis, kept))
        for name in record.added_biases:
            add_bias(network, name)
    except WeightsError:
        raise
    except GreenpruneError as error:
        raise WeightsError(f"{folder / NETWORK}: cannot be built again: {error}") from error
    return network


def _complement(analysis: Analysis, kept: Kept) -> dict[str, list[int]]:
    widths = {group.name: group.channels for group in analysis.groups}
    return {name: sorted(set(range(widths.get(name, 0))) - set(kept[name])) for name in kept}


def _check_fits(path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        shape = list(found[name].shape) if name in found else "nothing"
        if shape != list(tensor.shape):
            raise WeightsError(
                f"{path}: key '{name}': expected shape {list(tensor.shape)}, found {shape}"
            )
    extra = sorted(set(found) - set(expected))
    if extra:
        raise WeightsError(
            f"{path}: key '{extra[0]}': expected nothing, found shape {list(found[extra[0]].shape)}"
        )
