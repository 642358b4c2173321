"""What is shipped: a folder of data with a manifest, checksums and safe loading (device side)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

Provenance = Literal[
    "measured_counter",
    "measured_rail_integrated",
    "estimated_model",
    "simulated_model",
    "user_supplied",
]


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """An input or output; None stands for the batch."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From a decoded image (uint8) to the graphs' input: ``(image / 255 - mean) / std``.

    ``size`` is height and width; ``channels`` is 1 (grey) or 3 (RGB); mean and std have one entry
    a channel.
    """

    channels: Literal[1, 3]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One network of the bundle."""

    graph: str
    """The ONNX graph's path in the bundle."""
    artifacts: dict[str, str]
    """Runtime name to the compiled artifact's path (its main file)."""
    macs: int
    params: int
    accuracy: float
    """On the test split, by the trained network, as a fraction."""
    reference_outputs: dict[str, str]
    """Output name to the .npy that the host's network answered to ``reference_input``."""


@dataclass(frozen=True, kw_only=True)
class DialRow:
    """One point of the dial: accept where ``score >= threshold``."""

    threshold: float | None
    """None accepts nothing: everything goes to mild."""
    max_accuracy_loss: float
    certified: bool
    delta: float
    n: int
    coverage: float
    """Share of the certification images that were accepted."""
    accuracy: float
    reference_accuracy: float
    reason: str = ""
    """Why a row is not certified."""


@dataclass(frozen=True, kw_only=True)
class SelectorRecord:
    """The selector: its kind, its dial and the row it starts with."""

    kind: Literal["head", "msp"]
    reason: str
    reference: Literal["dense", "mild"]
    threshold: float | None
    """Of the row the session starts with; None routes everything to mild."""
    table: tuple[DialRow, ...]
    certified_on: str = ""
    """Runtime, precision and provider that the certificate was made on."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Paths of the .npy samples; None where the bundle has none."""

    reference_input: str
    calibration_inputs: str | None = None
    replay_inputs: str | None = None
    replay_targets: str | None = None
    certification_inputs: str | None = None
    certification_targets: str | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """``manifest.json``."""

    schema: int
    name: str
    created: str
    """ISO 8601, UTC."""
    target: str
    precision: str
    runtime: str
    """The runtime that a session uses unless told otherwise."""
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    preprocessing: Preprocessing | None
    class_names: tuple[str, ...]
    variants: dict[str, Variant]
    """``dense``, ``mild`` and ``aggressive``."""
    selector: SelectorRecord
    samples: Samples
    energy_mj: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Variant to ``{value, low, high, provenance}`` for each inference; empty until measured."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Versions, seed, recipe, hashes of the networks."""
    files: dict[str, FileEntry] = field(default_factory=dict)
