"""ResNet-56 on CIFAR-10 by the built-in recipe: the whole way, then a second look at every figure.

    python benchmarks/resnet56_cifar10.py --data=DIR --weights=resnet56.th

DIR holds ``train/<class>/*.png`` and ``test/<class>/*.png``. Accuracies are of the last epoch. The
three networks are evaluated on all 10,000 test images, and, beside the pair, on the 5,000 of them
that neither the selector nor the certificate has seen.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from common import keep_network, write_result

from greenprune import api, stage_parts, stages, training
from greenprune.bundle import VARIANTS
from greenprune.data import Split, normalise
from greenprune.pipeline import Job, read_stage

BATCH = 250


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
    ]
    summary = api.run("resnet56-cifar10", overrides=overrides, runs=arguments.runs)
    job = api.open_job("resnet56-cifar10", overrides=overrides, runs=arguments.runs)
    everything = all_test_images(job)
    figures = {
        "test_images": len(everything.targets),
        "pair_test_images": len(job.data.test.targets),
        "networks": {variant: network_figures(job, variant, everything) for variant in VARIANTS},
        "on_the_pairs_test_images": summary["variants"],
        "selector": summary["selector"],
        "certificate": summary["certificate"],
        "account": summary["account"],
        "stage_seconds": stage_seconds(job),
        "run_seconds": summary["seconds"],
        "bench_preset": summary["preset"],
        "bench_valid": summary["valid"],
    }
    for variant, stage in (("mild", "finetune-mild"), ("aggressive", "finetune-aggressive")):
        keep_network(job.place(stage) / stage_parts.NETWORK, f"resnet56_cifar10_{variant}")
    path = write_result(
        "resnet56_cifar10",
        seed=job.recipe.seed,
        seconds=time.monotonic() - begin,
        figures=figures,
    )
    print(path)


def all_test_images(job: Job) -> Split:
    """The whole test set: what the selector and the certificate took out is put back."""
    parts = (job.data.selector, job.data.certification, job.data.test)
    return Split(
        inputs=torch.cat([part.inputs for part in parts]),
        targets=torch.cat([part.targets for part in parts]),
    )


def network_figures(job: Job, variant: str, split: Split) -> dict[str, Any]:
    """Accuracy on the whole test set, and the graph's answers against the network's."""
    network = (
        stages.dense_network(job) if variant == "dense" else stages.pruned_network(job, variant)
    )
    answers = training.predict(network, split, job.data.preprocessing).numpy()
    session = onnxruntime.InferenceSession(
        job.place("export") / f"{variant}.onnx", providers=["CPUExecutionProvider"]
    )
    graph = np.concatenate(
        [
            session.run(["logits"], {"input": normalise(part, job.data.preprocessing).numpy()})[0]
            for part in split.inputs.split(BATCH)
        ]
    )
    found = job.results("train" if variant == "dense" else f"finetune-{variant}")
    right = answers.argmax(axis=1) == split.targets.numpy()
    return {
        "accuracy": float(right.mean()),
        "macs": found["macs"],
        "params": found["params"],
        "onnx_top1_agreement": float((answers.argmax(axis=1) == graph.argmax(axis=1)).mean()),
        "onnx_largest_difference": float(np.abs(answers - graph).max()),
        "largest_logit": float(np.abs(answers).max()),
    }


def stage_seconds(job: Job) -> dict[str, float]:
    """Seconds of each stage as they were when it ran."""
    found = (read_stage(path) for path in job.folder.iterdir() if path.is_dir())
    ordered = sorted((stage for stage in found if stage), key=lambda stage: str(stage["started"]))
    return {stage["stage"]: round(stage["seconds"], 1) for stage in ordered}


if __name__ == "__main__":
    main()
