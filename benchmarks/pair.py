"""The pair on CIFAR-10: ResNet-56, a mild and an aggressive network, and the dial between them.

    torchrun --nproc-per-node 2 benchmarks/pair.py --data=DIR --weights=resnet56.th
    python benchmarks/pair.py --data=DIR --weights=resnet56.th

The built-in recipe with a longer schedule: mild at half of the MACs, aggressive at an eighth, both
distilled for 15 and 40 epochs. The first command trains them, on two processes of one thread each
(OMP_NUM_THREADS=1: so narrow a network trains hardly faster on two threads than on one); the second
does the rest, and the training too if it was left out.

The table is made by ``dial.py`` from the bundle, which is kept: ``evaluate.py resnet56_pair --data
DIR`` makes it again. Then every certified row is measured on this machine beside the networks alone
(batch 1, ONNX Runtime), and drawn.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import dial
import matplotlib.pyplot as plt
from common import ARTIFACTS, HERE, keep_network, write_result

from greenprune import api, bundle, processes, schema
from greenprune.harness import protocol
from greenprune.harness.presets import find_preset

NAME = "resnet56_pair"
RUNTIME = "onnxruntime"
SEED = 0
PRESET = dataclasses.replace(
    find_preset("standard"), name="standard, short windows", window_seconds=2.0, idle_seconds=0.0
)
OVERRIDES = (
    "sparsify.epochs=0",
    "prune.keep_at_least=0.1",
    "prune.width_multiple=4",
    "prune.mild.macs=0.5",
    "prune.aggressive.macs=0.125",
    "finetune.mild.epochs=15",
    "finetune.mild.learning_rate=0.02",
    "finetune.aggressive.epochs=40",
    "finetune.aggressive.learning_rate=0.05",
    "certify.max_accuracy_loss=[0.01, 0.02, 0.03]",
    'compile.runtimes=["onnxruntime"]',
    "bench.replay_images=100",
)
DISTILLED = (
    "distillation=0.9",
    "features=10.0",
    "precision=bf16",
    "weight_decay=2e-4",
    "warmup_epochs=0.5",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()

    begin = time.monotonic()
    overrides = [
        f'model.weights="{arguments.weights.resolve()}"',
        f'data.path="{arguments.data.resolve()}"',
        *OVERRIDES,
        *(f"finetune.{name}.{text}" for name in ("mild", "aggressive") for text in DISTILLED),
    ]
    if processes.count() > 1:
        api.prune("resnet56-cifar10", overrides=overrides, runs=arguments.runs, name=NAME)
        return
    summary = api.run("resnet56-cifar10", overrides=overrides, runs=arguments.runs, name=NAME)
    job = api.open_job("resnet56-cifar10", overrides=overrides, runs=arguments.runs, name=NAME)
    keep_network(Path(summary["bundle"]), NAME)
    figures = dial.table(ARTIFACTS / NAME, job.data)
    figures["selector_reason"] = summary["selector"]
    figures["milliseconds"] = measure(ARTIFACTS / NAME, figures)
    draw(figures, HERE.parent / "docs" / "pair.svg")
    seconds = time.monotonic() - begin
    print(write_result("pair", seed=job.recipe.seed, seconds=seconds, figures=figures))


def measure(path: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """Latency of the networks alone and of the pair at every certified threshold, all in the same
    blocks, each in a process of its own, batch 1, over held-out images."""
    certified = {row["threshold"] for row in figures["dial"] if row["certified"]}
    with tempfile.TemporaryDirectory() as scratch:
        requests = {("", variant, RUNTIME): {"bundle": str(path)} for variant in bundle.VARIANTS}
        for threshold in sorted(certified - {None}, reverse=True):
            place = Path(shutil.copytree(path, Path(scratch) / str(threshold)))
            record = bundle.open_bundle(place).manifest.selector
            turned = dataclasses.replace(record, threshold=threshold)
            bundle.update_manifest(place, {"selector": turned})
            requests[str(threshold), "pair", RUNTIME] = {"bundle": str(place)}
        with protocol.one_at_a_time():
            settings = protocol.settle_settings(PRESET, "none", 0, SEED, None)
            measured = protocol.run_protocol(requests, settings)
    opened = bundle.open_bundle(path)
    results = protocol.make_results(opened, list(requests), measured, settings)
    return {
        "threads": settings.threads,
        "verdict": schema.encode(results.verdict),
        "candidates": [
            {
                "variant": found.variant,
                "threshold": float(key[0]) if key[0] else None,
                "mean_ms": schema.encode(found.latency_ms["mean"]),
                "speedup": schema.encode(found.speedup),
                "accept_rate": found.accept_rate,
            }
            for key, found in zip(requests, results.candidates, strict=True)
        ],
    }


def draw(figures: dict[str, Any], path: Path) -> None:
    """Accuracy against energy: the networks alone, and the dial between them."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, found in figures["networks"].items():
        axes.plot(found["energy"], 100 * found["accuracy"], "o", color="0.35")
        place = (found["energy"], 100 * found["accuracy"])
        axes.annotate(name, place, textcoords="offset points", xytext=(8, -3))
    for reference, marker, side in (("dense", "s", "left"), ("mild", "^", "right")):
        rows = [r for r in figures["dial"] if r["reference"] == reference and r["certified"]]
        axes.plot(
            [row["energy"] for row in rows],
            [100 * row["accuracy"] for row in rows],
            marker,
            linestyle="-",
            label=f"pair, certified against {reference}",
        )
        for row in rows:
            place = (row["energy"], 100 * row["accuracy"])
            text = f"{100 * row['max_accuracy_loss']:.0f} pt"
            axes.annotate(
                text,
                place,
                textcoords="offset points",
                xytext=(-8 if side == "left" else 8, -3),
                ha="right" if side == "left" else "left",
                fontsize=8,
            )
    axes.set_xlabel("energy on Eyeriss (simulated), dense = 1")
    axes.set_ylabel("accuracy, %")
    axes.set_xlim(0, 1.15)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
