"""Results on disk: JSON by a published schema, and a CSV beside it with a row for each window.

``results.schema.json`` and ``race.schema.json`` in this folder are what :func:`publish_schemas`
writes; a test holds them to the records.
"""

from __future__ import annotations

import csv
import io
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from greenprune import schema, storage
from greenprune.errors import MeasurementError
from greenprune.harness.bundle_race import BundleRace
from greenprune.harness.conditions import GpuState
from greenprune.harness.environment import Environment
from greenprune.harness.results import SCHEMA_VERSION, Candidate, MeasuredWindow, Results
from greenprune.meters.energy import label

HERE = Path(__file__).parent
SCHEMA_FILES: dict[str, type[Results] | type[BundleRace]] = {
    "results.schema.json": Results,
    "race.schema.json": BundleRace,
}
LATENCIES = ("min", "p50", "p90", "p95", "p99", "p99_9", "mean")


def write_results(path: Path, results: Results | BundleRace) -> None:
    """Write JSON, raw windows included, and the windows as CSV beside it, each atomically.

    Raises:
        MeasurementError: the path does not end in ``.json``, or the content is not by the schema.
        StorageError: a file cannot be written.
    """
    _check_name(path)
    content = schema.encode(results)
    schema.decode(content, type(results), str(path), MeasurementError)
    storage.write_json(path, content)
    storage.write_text(path.with_suffix(".csv"), windows_csv(results))


def check_destination(path: Path) -> None:
    """Find out before a measurement whether :func:`write_results` will be able to write.

    Raises:
        MeasurementError: the path does not end in ``.json``, or a folder has its name.
        StorageError: the folder cannot be made, or not be written to.
    """
    _check_name(path)
    for file in (path, path.with_suffix(".csv")):
        if file.is_dir():
            raise MeasurementError(f"{file}: is a folder; expected a file, or a new name")
    with storage.storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent, prefix=storage.PARTIAL_PREFIX):
            pass


def _check_name(path: Path) -> None:
    if path.suffix != ".json":
        raise MeasurementError(
            f"{path}: expected a name that ends in .json; a .csv comes beside it"
        )


def read_results(path: Path) -> Results:
    """Read what :func:`write_results` wrote of one bundle.

    Raises:
        MeasurementError: the file is missing, not JSON, of another schema, or has figures that
            cannot be.
    """
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"),
            parse_float=_finite,
            parse_int=_whole,
            parse_constant=_finite,
        )
    except (OSError, ValueError, RecursionError) as error:
        raise MeasurementError(
            f"{path}: expected results written by greenprune-bench: {error}"
        ) from error
    if not isinstance(content, dict) or "schema" not in content:
        raise MeasurementError(
            f"{path}: expected results written by greenprune-bench, got JSON without a 'schema'"
        )
    if content["schema"] != SCHEMA_VERSION:
        raise MeasurementError(
            f"{path}: results of schema {content['schema']}, this version of greenprune reads "
            f"{SCHEMA_VERSION}; measure again (in a run: remove the folder that the file is in, "
            "and run it again)"
        )
    if "pairs" in content:
        raise MeasurementError(f"{path}: a race of two bundles; expected the results of one")
    results = schema.decode(content, Results, str(path), MeasurementError)
    for name in ("environment_before", "environment_after"):
        _refuse_unknown(content[name], Environment, f"{path}: {name}")
        for gpu in content[name]["gpus"]:
            _refuse_unknown(gpu, GpuState, f"{path}: {name}.gpus")
    _refuse_nonsense(content["candidates"], f"{path}: candidates")
    return results


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"expected finite numbers, got {text[:20]}")
    return number


def _whole(text: str) -> int:
    _finite(text)
    return int(text)


def _refuse_nonsense(content: Any, where: str) -> None:
    """Figures of the right type that no measurement has; ratios would be taken of them."""
    if isinstance(content, list):
        for index, part in enumerate(content):
            _refuse_nonsense(part, f"{where}[{index}]")
    if not isinstance(content, dict):
        return
    for key in {"seconds", "inferences", "mean_ns"} & set(content):
        if content[key] <= 0:
            raise MeasurementError(f"{where}.{key}: expected above 0, got {content[key]}")
    if {"value", "low", "high"} <= set(content):
        low, value, high = (content[end] for end in ("low", "value", "high"))
        if not (low <= value <= high and value > 0):
            raise MeasurementError(
                f"{where}: expected low <= value <= high and a value above 0, got {low}, {value}, "
                f"{high}"
            )
    for key, part in content.items():
        _refuse_nonsense(part, f"{where}.{key}")


def _refuse_unknown(content: dict[str, Any], kind: type[Any], where: str) -> None:
    """The decoder drops unknown keys of a typed dictionary, which the schema forbids."""
    unknown = set(content) - set(kind.__annotations__)
    if unknown:
        raise MeasurementError(
            f"{where}: unknown key {', '.join(sorted(unknown))}; "
            f"known here: {', '.join(kind.__annotations__)}"
        )


def results_schema(kind: type[Results] | type[BundleRace] = Results) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of what :func:`write_results` writes; no other keys."""
    made = msgspec.json.schema(kind)
    for definition in made["$defs"].values():
        if "properties" in definition:
            definition["additionalProperties"] = False
    made["$defs"][kind.__name__]["properties"]["schema"]["const"] = SCHEMA_VERSION
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"greenprune-bench {kind.__name__}, schema {SCHEMA_VERSION}",
        **made,
    }


def windows_csv(results: Results | BundleRace) -> str:
    """A row for each window, first tries that did not count included; empty means not measured."""
    text = io.StringIO()
    if isinstance(results, BundleRace):
        contestants = {"A": results.first, "B": results.second}
        rows = [{"contestant": n, **row} for n, part in contestants.items() for row in _rows(part)]
    else:
        rows = list(_rows(results))
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _rows(results: Results) -> Iterator[dict[str, Any]]:
    for candidate in results.candidates:
        tries = (*candidate.windows, *candidate.discarded)
        for window in sorted(tries, key=lambda w: (w.block, w in candidate.windows)):
            yield {
                "bundle": results.bundle,
                "target": results.target,
                "created": results.created,
                "preset": results.preset,
                "threads": results.threads,
                **_row(candidate, window),
            }


def _row(candidate: Candidate, window: MeasuredWindow) -> dict[str, Any]:
    energy, conditions = window.energy, window.conditions
    return {
        "variant": candidate.variant,
        "runtime": candidate.runtime,
        "block": window.block,
        "order": window.order,
        "counts": window in candidate.windows,
        "invalid": window.invalid,
        "seconds": window.seconds,
        "inferences": window.inferences,
        **{f"latency_{name}_ns": getattr(window.latency, f"{name}_ns") for name in LATENCIES},
        "latency_cov": window.latency.cov,
        "energy_j": None if energy is None else energy.value,
        "energy_low_j": None if energy is None else energy.low,
        "energy_high_j": None if energy is None else energy.high,
        "energy_label": label(None if energy is None else energy.provenance),
        "energy_provenance": None if energy is None else energy.provenance,
        "energy_scope": None if energy is None else energy.scope,
        "meter": None if energy is None else energy.meter,
        "background_cores": conditions.background_cores,
        "stolen_cores": conditions.stolen_cores,
        "frequency_mhz": conditions.frequency_mhz,
        "temperature_c": conditions.temperature_c,
        "throttled": conditions.throttled,
    }


def publish_schemas() -> None:
    """Write the schemas beside this module."""
    for name, kind in SCHEMA_FILES.items():
        storage.write_json(HERE / name, results_schema(kind))
