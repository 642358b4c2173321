"""What is shipped: a folder of data with a manifest, checksums and safe loading (device side)."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from greenprune import registry, schema, storage
from greenprune.errors import BundleError

SCHEMA_VERSION = 2
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
    """Runtime, as :func:`greenprune.registry.runtime_name` calls it with its precision
    (``openvino``, ``openvino-int8``), to the compiled artifact's path (its main file)."""
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
    disagreement: float | None = None
    """Share of the accepted images for which aggressive and mild answer another class; None where
    nothing is accepted."""
    energy_mac_units: float | None = None
    """Of one image, on a simulated target: aggressive's, and mild's for those not accepted."""


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
    """Where the certificate was made: :meth:`Manifest.setting` of its runtime."""


@dataclass(frozen=True, kw_only=True)
class CertificationPlan:
    """What the certificate is made from, here or on the device."""

    inputs: str | None = None
    """Path of the .npy images: uint8 [N, H, W, C] before, or float32 [N, C, H, W] where the bundle
    states no preprocessing. None where the certificate was made at the export."""
    targets: str | None = None
    """Path of their classes, int64 [N]."""
    thresholds: tuple[float, ...]
    """Strict to loose."""
    max_accuracy_loss: tuple[float, ...]
    operating_loss: float
    reference: Literal["dense", "mild"]
    delta: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Paths of the .npy samples; None where the bundle has none."""

    reference_input: str
    calibration_inputs: str | None = None
    replay_inputs: str | None = None
    replay_targets: str | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """``manifest.json``."""

    schema: int
    name: str
    created: str
    """ISO 8601, UTC."""
    target: str
    runtime: str
    """The one that a session uses unless told otherwise: a key of the variants' artifacts."""
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    preprocessing: Preprocessing | None
    class_names: tuple[str, ...]
    variants: dict[str, Variant]
    """``dense``, ``mild`` and ``aggressive``."""
    selector: SelectorRecord
    samples: Samples
    certification: CertificationPlan
    energy_mj: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Variant to ``{value, low, high, provenance, preset, valid}`` for each inference, ``valid``
    being the measurement's verdict; empty until measured."""
    simulated_energy: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Variant to ``{energy_mac_units, provenance}`` for each inference on a simulated target:
    relative, not joules."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Versions, seed, recipe, hashes of the networks; what int8 cost and which layers it left in
    floating point; the race of the runtimes."""
    files: dict[str, FileEntry] = field(default_factory=dict)

    def setting(self, runtime: str) -> str:
        """What a certificate holds for: see :func:`setting`."""
        return setting(self.target, runtime)


def setting(target: str, runtime: str) -> str:
    """Target, runtime, precision and where it matters this machine's arithmetic, as in
    ``x86, onnxruntime, int8, VNNI``.

    Raises:
        TargetError: there is no such target.
    """
    base, precision = registry.split_runtime(runtime)
    arithmetic = registry.load_target(target).arithmetic(precision)
    return ", ".join(part for part in (target, base, precision, arithmetic) if part)


VARIANTS = ("dense", "mild", "aggressive")
NETWORKS = ("graphs/", "artifacts/")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An opened bundle. Every file is checked, path, size and SHA-256, each time it is asked for,
    before anything reads it."""

    path: Path
    manifest: Manifest

    @property
    def networks_sha256(self) -> str:
        """Of the graphs and of all that is compiled from them: it stays when a bundle is measured
        or certified."""
        files = self.manifest.files
        return storage.sha256_of(
            {name: files[name].sha256 for name in files if name.startswith(NETWORKS)}
        )

    def file(self, name: str) -> Path:
        """Path of the checked file ``name`` and of all that a runtime opens with it.

        What is named alike up to the suffix (OpenVINO's ``mild.xml`` and ``mild.bin``) belongs
        together and is checked together.

        Raises:
            BundleError: the path leaves the bundle, the file is missing, not listed or changed.
        """
        path = self._locate(name)
        start = name[: len(name) - len(path.suffix)] + "."
        # a runtime finds the companion by its name: one that nobody listed must not get in
        folder = start.rpartition("/")[0]
        with _readable(path.parent):
            present = {f"{folder}/{found.name}".lstrip("/") for found in os.scandir(path.parent)}
        alike = {entry for entry in present | set(self.manifest.files) if entry.startswith(start)}
        for entry in sorted(entry for entry in alike if "/" not in entry[len(start) :]):
            self._read_checked(entry)
        return path

    def read_array(self, name: str) -> NDArray[Any]:
        """The array in the ``.npy`` file ``name``; what is parsed is what was checked.

        Raises:
            BundleError: as :meth:`file`; or the file is not an array of plain numbers.
        """
        content = self._read_checked(name)
        try:
            if not content.startswith(np.lib.format.MAGIC_PREFIX):
                raise ValueError("it does not begin like one")
            array: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError, OSError, MemoryError) as error:
            raise BundleError(
                f"{self.path / name}: expected a .npy array of plain numbers: {error}; "
                "make the bundle again"
            ) from error
        return array

    def artifact(self, variant: str, runtime: str) -> Path:
        """The checked main file of a variant's compiled artifact.

        Raises:
            BundleError: as :meth:`file`; or the bundle has no such artifact.
        """
        artifacts = self.manifest.variants[variant].artifacts
        if runtime not in artifacts:
            offered = ", ".join(sorted(artifacts)) or "none"
            raise BundleError(
                f"{self.path}: no artifact of the {variant} network for the runtime '{runtime}'; "
                f"this bundle has: {offered}; choose one of these or export for '{runtime}'"
            )
        return self.file(artifacts[runtime])

    def verify(self) -> None:
        """Check every file of the bundle.

        Raises:
            BundleError: the first file that is missing or changed.
        """
        for name in self.manifest.files:
            self._read_checked(name)

    @cached_property
    def _resolved(self) -> Path:
        return self.path.resolve()

    def _locate(self, name: str) -> Path:
        """The file's path, proved to be a listed one inside the bundle."""
        if not _is_safe(name):
            raise BundleError(
                f"{self.path / MANIFEST}: unsafe path {name!r}: expected one relative to the "
                "bundle and inside it; do not use this bundle"
            )
        if name not in self.manifest.files:
            raise BundleError(
                f"{self.path}: '{name}' is not listed in {MANIFEST}; expected only listed files; "
                "make or copy the bundle again"
            )
        path = self.path / name
        if not path.resolve().is_relative_to(self._resolved):
            raise BundleError(
                f"{path}: a link that leaves the bundle, to {path.resolve()}; expected a file "
                "inside; do not use this bundle"
            )
        if not path.is_file():
            raise BundleError(f"{path}: the file is missing; copy the whole bundle again")
        return path

    def _read_checked(self, name: str) -> bytes:
        path = self._locate(name)
        expected = self.manifest.files[name]
        with _readable(path):
            found_bytes = path.stat().st_size
            if found_bytes != expected.bytes:
                raise BundleError(
                    f"{path}: expected {expected.bytes} bytes, found {found_bytes}; the file is "
                    "damaged or was changed: copy the bundle again"
                )
            content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != expected.sha256:
            raise BundleError(
                f"{path}: expected SHA-256 {expected.sha256}, found {found}; the file is damaged "
                "or was changed: copy the bundle again"
            )
        return content


def open_bundle(path: Path | str) -> Bundle:
    """Read and check a bundle's manifest; its files are checked when they are asked for.

    Raises:
        BundleError: no bundle there; a manifest that is damaged, of another schema or in
            contradiction with itself.
    """
    folder = Path(path)
    where = folder / MANIFEST
    if not where.is_file():
        raise BundleError(
            f"{folder}: expected a bundle, that is a folder with {MANIFEST}; found none; "
            "make one with greenprune-export"
        )
    with _readable(where):
        text = where.read_bytes()
    try:
        content = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BundleError(f"{where}: not valid JSON: {error}; copy the bundle again") from error
    manifest = _decode(content, str(where))
    return Bundle(path=folder, manifest=manifest)


def write(
    folder: Path, manifest: Manifest, files: Mapping[str, Path | bytes | NDArray[Any]]
) -> Manifest:
    """Write a bundle, whole or not at all; an existing one is replaced.

    Args:
        folder: where the bundle goes.
        manifest: its ``files`` is filled here with sizes and checksums.
        files: path in the bundle to a file to copy, its bytes, or an array to save as ``.npy``.

    Returns:
        The manifest as written.

    Raises:
        BundleError: an unsafe path, a file that the manifest names and ``files`` lacks, an array
            of objects.
        StorageError: the disk is full or the place is not writable.
    """
    for name, content in files.items():
        if not _is_safe(name) or name == MANIFEST:
            raise BundleError(
                f"{folder}: '{name}' cannot be a file of a bundle; expected a relative path with "
                f"no '..', other than {MANIFEST}"
            )
        if isinstance(content, Path) and not content.is_file():
            raise BundleError(f"{folder}: '{name}' should be a copy of {content}, which is no file")
    with storage.atomic_folder(folder) as temporary:
        entries = {}
        for name, content in sorted(files.items()):
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_one(path, content)
            entries[name] = FileEntry(sha256=storage.sha256(path), bytes=path.stat().st_size)
        plain = schema.encode(dataclasses.replace(manifest, files=entries))
        written = _decode(plain, str(folder / MANIFEST))
        storage.write_json(temporary / MANIFEST, plain)
    return written


def update_manifest(path: Path | str, changes: Mapping[str, Any]) -> Manifest:
    """Replace fields of a bundle's manifest, atomically: ``{"selector": SelectorRecord(...)}``.

    Raises:
        BundleError: an unknown field or a value that does not fit; the manifest is untouched.
        StorageError: it cannot be written.
    """
    folder = Path(path)
    plain = schema.encode(open_bundle(folder).manifest) | schema.encode(dict(changes))
    manifest = _decode(plain, str(folder / MANIFEST))
    storage.write_json(folder / MANIFEST, plain)
    return manifest


def _write_one(path: Path, content: Path | bytes | NDArray[Any]) -> None:
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        try:
            storage.save_array(path, content)
        except ValueError as error:
            raise BundleError(
                f"{path.name}: expected an array of plain numbers, got dtype {content.dtype}"
            ) from error


def _decode(content: Any, where: str) -> Manifest:
    version = content.get("schema") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{where}: expected schema version {SCHEMA_VERSION}, found {version}; this greenprune "
            "cannot read it: install the version that made the bundle, or make the bundle again"
        )
    manifest = schema.decode(content, Manifest, where, BundleError)
    missing = [name for name in VARIANTS if name not in manifest.variants]
    if missing:
        raise BundleError(
            f"{where}: expected the variants {', '.join(VARIANTS)}; missing: {', '.join(missing)}"
        )
    for name in _mentioned(manifest):
        if name not in manifest.files:
            raise BundleError(
                f"{where}: names '{name}', which is not among the bundle's files; "
                "make the bundle again"
            )
    prepared = manifest.preprocessing
    if prepared and not len(prepared.mean) == len(prepared.std) == prepared.channels:
        raise BundleError(
            f"{where}: key 'preprocessing': expected {prepared.channels} entries in mean and std, "
            f"found {len(prepared.mean)} and {len(prepared.std)}; make the bundle again"
        )
    return manifest


def _mentioned(manifest: Manifest) -> Iterator[str]:
    """Every path that the manifest names."""
    for variant in manifest.variants.values():
        yield variant.graph
        yield from variant.artifacts.values()
        yield from variant.reference_outputs.values()
    plan = manifest.certification
    for sample in (*dataclasses.astuple(manifest.samples), plan.inputs, plan.targets):
        if sample is not None:
            yield sample


def _is_safe(name: str) -> bool:
    """A plain relative path in POSIX form that cannot leave the bundle."""
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and path.as_posix() == name
        and not path.is_absolute()
        and ".." not in path.parts
        and not any(sign in name for sign in "\\:\0")
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be read: {error.strerror or error}; check its permissions"
        ) from error
