"""The dial of a pair: what each certified loss accepts, answers right, and spends on Eyeriss."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenprune import bundle, certification, data
from greenprune.bundle import VARIANTS, Bundle, DialRow
from greenprune.registry import load_target
from greenprune.runtime import decide
from greenprune_targets.eyeriss import simulate

RUNTIME = "onnxruntime"
BATCH = 100
REFERENCES = ("dense", "mild")


def table(path: Path, loaded: data.Data) -> dict[str, Any]:
    """Every network alone, and every row of the dial against the dense and the mild network.

    Certificates are made again on the certification images, with the bundle's own thresholds;
    accuracies are on the test images, which nothing was chosen by. Energy is simulated, relative to
    the dense network's.
    """
    opened = bundle.open_bundle(path)
    opened.verify()
    energies = energy(opened)
    held, tested = (answers(opened, part) for part in prepared(loaded))
    right = {name: is_right(found, loaded.certification) for name, found in held.items()}
    logits = {name: found["logits"] for name, found in held.items()}
    tested_right = {name: is_right(found, loaded.test) for name, found in tested.items()}
    rows = []
    for reference in REFERENCES:
        plan = dataclasses.replace(opened.manifest.certification, reference=reference)
        for row in certification.make_dial(held["aggressive"]["score"], logits, right, plan):
            accepted = decide(tested["aggressive"]["score"], row.threshold)
            pair = np.where(accepted, tested_right["aggressive"], tested_right["mild"])
            rows.append(described(row, reference, accepted, pair, tested_right, energies))
    return {
        "test_images": len(loaded.test),
        "certification_images": len(loaded.certification),
        "selector": opened.manifest.selector.kind,
        "networks": {
            name: {
                "accuracy": float(tested_right[name].mean()),
                "macs": opened.manifest.variants[name].macs,
                "params": opened.manifest.variants[name].params,
                "energy": energies[name] / energies["dense"],
                "energy_mac_units": energies[name],
            }
            for name in VARIANTS
        },
        "dial": rows,
    }


def described(
    row: DialRow,
    reference: str,
    accepted: NDArray[np.bool_],
    pair: NDArray[np.float64],
    right: dict[str, NDArray[np.float64]],
    energies: dict[str, float],
) -> dict[str, Any]:
    """A row of the dial, as it does on the test images."""
    asked = energies["aggressive"] if row.threshold is not None else 0.0
    spent = asked + float(1 - accepted.mean()) * energies["mild"]
    return {
        "reference": reference,
        "max_accuracy_loss": row.max_accuracy_loss,
        "certified": row.certified,
        "reason": row.reason,
        "threshold": row.threshold,
        "accepts": float(accepted.mean()),
        "accuracy": float(pair.mean()),
        "loss": float((right[reference] - pair).mean()),
        "energy": spent / energies["dense"],
        "energy_saved": 1 - spent / energies["dense"],
    }


def energy(opened: Bundle) -> dict[str, float]:
    """MAC units of one inference by variant, the selector's included."""
    found = {}
    for name in VARIANTS:
        simulation = simulate(opened.file(opened.manifest.variants[name].graph))
        assert simulation.energy_mac_units is not None, simulation.not_mapped
        found[name] = simulation.energy_mac_units
    return found


def prepared(loaded: data.Data) -> list[NDArray[np.float32]]:
    """The certification and the test images, normalised."""
    return [
        data.normalise(split.inputs, loaded.preprocessing).numpy()
        for split in (loaded.certification, loaded.test)
    ]


def answers(opened: Bundle, inputs: NDArray[np.float32]) -> dict[str, dict[str, NDArray[Any]]]:
    """What each deployed network answers: variant, output, [N, ...]."""
    target = load_target(opened.manifest.target)
    return certification.answers(
        lambda variant: target.open(opened.artifact(variant, RUNTIME), RUNTIME, 0),
        VARIANTS,
        (inputs[start : start + BATCH] for start in range(0, len(inputs), BATCH)),
    )


def is_right(found: dict[str, NDArray[Any]], split: data.Split) -> NDArray[np.float64]:
    return np.asarray(found["logits"].argmax(axis=1) == split.targets.numpy(), dtype=np.float64)
