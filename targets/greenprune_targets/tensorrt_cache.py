"""Engines that were built on this machine, kept outside bundles: an engine does not travel.

An engine is kept under a key of everything it depends on, with a record beside it: a JSON file
that holds all of it and the engine's checksum. What does not fit this machine, or is damaged, is
built again; an engine that the user names is refused instead.

Tested with fakes; it has not run on NVIDIA hardware.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from greenprune.errors import TargetError
from greenprune.storage import (
    sha256,
    sha256_of,
    storage_errors,
    user_cache,
    write_bytes,
    write_json,
)
from greenprune_targets.board import describe
from greenprune_targets.cuda_runtime import cuda_runtime, current_gpu, free_bytes
from greenprune_targets.tensorrt_engine import OUTPUT_TYPES, Built, build, tensorrt

log = logging.getLogger(__name__)

SUFFIX = ".engine"


@dataclass(frozen=True, kw_only=True)
class DeviceKey:
    """What an engine is bound to."""

    tensorrt: str
    system: str
    """For example ``Linux aarch64``."""
    l4t: str | None
    """Jetson Linux release; None on a PC."""
    gpu: str
    sm: str


def this_device(root: Path = Path("/")) -> DeviceKey:
    """This machine's.

    Raises:
        MissingPackageError: tensorrt or cuda-python is not installed.
        TargetError: there is no GPU, or TensorRT is older than 10.3.
    """
    version = tensorrt(root).__version__
    gpu = current_gpu(cuda_runtime(root))
    return DeviceKey(
        tensorrt=version,
        system=f"{platform.system()} {platform.machine()}",
        l4t=describe(root).l4t,
        gpu=gpu.name,
        sm=gpu.sm,
    )


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/greenprune/engines``, else under ``~/.cache``."""
    return user_cache("engines")


def engine_for(
    artifact: Path,
    precision: str,
    *,
    batch: int = 1,
    cache: Path | None = None,
    root: Path = Path("/"),
) -> Path:
    """The engine of ``artifact`` for this machine: from the cache, or built now (minutes).

    Args:
        artifact: an ONNX graph that carries its precision; or an ``.engine`` with its record
            beside it, which is checked and given back.
        precision: ``fp32``, ``fp16`` or ``int8``.
        batch: most inputs that one call takes.
        cache: folder of the engines; :func:`cache_folder` without it.
        root: where this machine's files are.

    Raises:
        MissingPackageError: tensorrt or cuda-python is not installed.
        TargetError: the graph does not build, or the named engine is not for this machine.
        StorageError: the folder cannot be written.
    """
    device = this_device(root)
    if artifact.suffix == SUFFIX:
        load(artifact, device, precision)
        return artifact
    if not artifact.is_file():
        raise TargetError(f"{artifact}: expected an ONNX file, found none; export it again")
    if precision not in OUTPUT_TYPES or batch < 1:
        raise TargetError(
            f"expected a precision of {', '.join(OUTPUT_TYPES)} and a batch of at least 1, got "
            f"'{precision}' and {batch}; choose others"
        )
    wanted = {
        "graph_sha256": sha256(artifact),
        "precision": precision,
        "batch": batch,
        "flags": ["STRONGLY_TYPED", *(["no TF32"] if precision == "fp32" else [])],
        **asdict(device),
    }
    folder = cache or cache_folder()
    prefix = f"{artifact.stem}-{precision}-"
    engine = folder / f"{prefix}{sha256_of(wanted)[:16]}{SUFFIX}"
    with _locked(folder):
        reason = mismatch(engine, wanted)
        if reason is not None:
            log.info("%s: building a %s engine: %s", artifact, precision, reason)
            _log_others(folder, prefix, engine, wanted)
            _build_into(engine, artifact, wanted, device, root)
    return engine


def load(engine: Path, device: DeviceKey, precision: str | None = None) -> bytes:
    """The bytes of ``engine``, which must be whole, built on a machine like ``device`` and, where
    it is told, in ``precision``.

    Raises:
        TargetError: it is not; the difference is named.
    """
    wanted = asdict(device) | ({"precision": precision} if precision else {})
    reason = mismatch(engine, wanted)
    if reason is not None:
        raise TargetError(
            f"{engine}: expected an engine built on this machine ({device.gpu}, TensorRT "
            f"{device.tensorrt}, L4T {device.l4t or 'absent'}); {reason}; give the ONNX graph "
            "instead, and it is built here"
        )
    return engine.read_bytes()


def mismatch(engine: Path, wanted: dict[str, Any]) -> str | None:
    """Why ``engine`` does not serve where its record must say ``wanted``; None where it does."""
    if not engine.is_file():
        return "there is none yet"
    record = _record(engine)
    if record is None:
        return "there is no record beside it that can be read"
    for key, value in wanted.items():
        if record.get(key) != value:
            return f"it was built for {key} {record.get(key)}, and here it is {value}"
    if record.get("engine_sha256") != sha256(engine):
        return "it is damaged: its checksum is not its record's"
    return None


def _record(engine: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(engine.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _log_others(folder: Path, prefix: str, engine: Path, wanted: dict[str, Any]) -> None:
    """Say why engines of the same graph, kept for another machine or setting, do not serve."""
    for other in sorted(folder.glob(f"{prefix}*{SUFFIX}")):
        record = _record(other) or {}
        if other != engine and record.get("graph_sha256") == wanted["graph_sha256"]:
            log.info("%s is left alone: %s", other, mismatch(other, wanted))


def _build_into(
    engine: Path, graph: Path, wanted: dict[str, Any], device: DeviceKey, root: Path
) -> None:
    """Build, then write the engine, and last its record, which makes it valid."""
    timings = engine.parent / f"timing-{sha256_of(asdict(device))[:16]}.cache"
    free = free_bytes(cuda_runtime(root), root)
    began = time.monotonic()
    built = build(
        tensorrt(root),
        graph,
        wanted["precision"],
        batch=wanted["batch"],
        free_bytes=free,
        timing_cache=timings.read_bytes() if timings.is_file() else b"",
    )
    seconds = time.monotonic() - began
    write_bytes(timings, built.timing_cache)
    write_bytes(engine, built.engine)
    write_json(
        engine.with_suffix(".json"),
        wanted | _circumstances(built, engine, timings, root) | {"build_seconds": seconds},
    )
    log.info("%s: built in %.0f s", engine, seconds)


def _circumstances(built: Built, engine: Path, timings: Path, root: Path) -> dict[str, Any]:
    board = describe(root)
    return {
        "engine_sha256": sha256(engine),
        "typing": built.typing,
        "layer_types": built.layer_types,
        "workspace_bytes": built.workspace_bytes,
        "timing_cache_sha256": sha256(timings),
        "jetpack": board.jetpack.version if board.jetpack else None,
        "cuda_toolkit": board.cuda,
        "power_mode": board.power_mode,
    }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build at a time in ``folder``: two would share the memory that one has counted on."""
    from filelock import FileLock

    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
