"""OpenVINO's compiled networks, kept per user: opening one again skips its compilation.

OpenVINO's own cache (``CACHE_DIR``) opens a damaged file without noticing and answers wrongly, so
the files are ours: each begins with the SHA-256 of what follows.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from greenprune import storage
from greenprune.errors import StorageError, TargetError
from greenprune_targets.base import processor

log = logging.getLogger(__name__)
DIGEST = 64
"""Characters of a SHA-256 in hexadecimal."""


def hashes_of(artifact: Path) -> list[str]:
    """SHA-256 of the ``.xml`` and the ``.bin`` beside it, of those that are there."""
    parts = [artifact, artifact.with_suffix(".bin")]
    return [storage.sha256(part) for part in parts if part.is_file()]


def compile_model(
    core: Any,
    version: str,
    artifact: Path,
    hashes: list[str],
    batch: int | None,
    settings: Mapping[str, Any],
) -> Any:
    """``artifact`` compiled for this CPU, from the cache where it has been compiled before.

    Args:
        core: OpenVINO's.
        version: OpenVINO's; with the processor's instruction sets, the settings, the batch and the
            hash of the artifact it is the key.
        artifact: the ``.xml``, its ``.bin`` beside it.
        hashes: its :func:`hashes_of` when it was opened.
        batch: what the first dimension of its input is made, where it may be any; None leaves it.
        settings: for the CPU.

    Raises:
        TargetError: its files have changed since.
    """
    path = storage.user_cache("openvino") / f"{_key(version, hashes, batch, settings)}.blob"
    blob = _read(path)
    if blob is not None:
        try:
            return core.import_model(blob, "CPU", dict(settings))
        except RuntimeError as error:
            log.info("%s: cannot be opened, so it is compiled again: %s", path, error)
    if hashes_of(artifact) != hashes:
        raise TargetError(f"{artifact}: has changed since it was opened; open it again")
    compiled = core.compile_model(_read_model(core, artifact, batch), "CPU", dict(settings))
    content = compiled.export_model().getvalue()
    digest = hashlib.sha256(content).hexdigest().encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_bytes(path, digest + content)
    except (OSError, StorageError) as error:
        log.info("%s: not kept: %s", path, error)
    return compiled


def _read_model(core: Any, artifact: Path, batch: int | None) -> Any:
    model = core.read_model(artifact)
    shape = model.inputs[0].get_partial_shape()
    if batch is not None and shape[0].is_dynamic:
        shape[0] = batch
        model.reshape(shape)
    return model


def _key(version: str, hashes: list[str], batch: int | None, settings: Mapping[str, Any]) -> str:
    found = json.dumps([version, processor()["isa"], hashes, batch, dict(settings)])
    return hashlib.sha256(found.encode()).hexdigest()[:32]


def _read(path: Path) -> bytes | None:
    """What is kept, unless it is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, blob = content[:DIGEST], content[DIGEST:]
    if hashlib.sha256(blob).hexdigest().encode() != digest:
        log.warning("%s: damaged, so the network is compiled again", path)
        return None
    return blob
