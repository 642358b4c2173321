"""GoogLeNet (CIFAR form), dense and at its published point: what pruning saves on this processor.

    python benchmarks/googlenet.py [--preset standard]

MACs, milliseconds, millijoules and micrograms of CO2e for one inference (batch 1, ONNX Runtime),
measured by the project's own harness: each network in its own process, windows interleaved. Weights
and images are random, as cost does not depend on them. Three networks: dense, the published
point (widths as the paper's rates leave them), and the same rates with widths rounded up to
multiples of 8.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import write_result
from operating_points import googlenet_published_rates, googlenet_rates, prune_at
from torch import Tensor, nn

from greenprune import bundle, models, schema
from greenprune.adaptive.selector import MspNetwork
from greenprune.harness import PRESETS, Results, bench
from greenprune.nncec.account import account
from greenprune.onnx_export import export_onnx
from greenprune.pruning.batchnorm import reestimate
from greenprune.pruning.cost import count
from greenprune.registry import Build, load_target

RUNTIME = "onnxruntime"
IMAGES = 16
NAMES = {"dense": "dense", "mild": "published", "aggressive": "published_in_blocks_of_8"}
"""A bundle's variants, and which of the three networks each holds here."""
CLAIM = "over 50% of the carbon"
"""What the paper says that DRP saves on GoogLeNet."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="standard", choices=sorted(PRESETS))
    arguments = parser.parse_args()
    begin = time.monotonic()
    torch.manual_seed(0)
    images = torch.randn(IMAGES, 3, 32, 32)
    networks = make_networks(images)
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_bundle(Path(scratch), networks, images)
        results = bench(folder, preset=arguments.preset, runtimes=[RUNTIME])
    figures = summarise(results, networks, images)
    print(write_result("googlenet", seed=0, seconds=time.monotonic() - begin, figures=figures))


def make_networks(images: Tensor) -> dict[str, nn.Module]:
    """The three networks by the bundle's variant, proved; their statistics are of ``images``."""
    dense = models.googlenet()
    reestimate(dense, images)
    published, _ = prune_at(dense, images, googlenet_published_rates())
    rounded, _ = prune_at(dense, images, googlenet_rates(), width_multiple=8)
    return {"dense": dense, "mild": published, "aggressive": rounded}


def write_bundle(scratch: Path, networks: dict[str, nn.Module], images: Tensor) -> Path:
    """What the harness measures: a bundle of the three, whose selector accepts nothing."""
    target = load_target("x86")
    files: dict[str, Any] = {"samples/reference_input.npy": images.numpy()}
    variants = {}
    for name, network in networks.items():
        graph = scratch / f"{name}.onnx"
        scored = name == "aggressive"
        exported = MspNetwork(network) if scored else network
        answers = export_onnx(exported, images, graph, ["logits", "score"][: 1 + scored])
        made = target.compile(graph, Build(runtime=RUNTIME), scratch / RUNTIME, name)
        artifact = f"artifacts/{RUNTIME}/{made.name}"
        references = {output: f"samples/{name}_{output}.npy" for output in answers}
        files |= {f"graphs/{name}.onnx": graph, artifact: made}
        files |= {path: answers[output] for output, path in references.items()}
        cost = count(network, images)
        variants[name] = bundle.Variant(
            graph=f"graphs/{name}.onnx",
            artifacts={RUNTIME: artifact},
            macs=cost.macs,
            params=cost.params,
            accuracy=0.0,
            reference_outputs=references,
        )
    manifest = bundle.Manifest(
        schema=bundle.SCHEMA_VERSION,
        name="googlenet",
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        target="x86",
        runtime=RUNTIME,
        input=bundle.TensorSpec(name="input", shape=(None, 3, 32, 32), dtype="float32"),
        outputs=(bundle.TensorSpec(name="logits", shape=(None, 10), dtype="float32"),),
        preprocessing=None,
        class_names=tuple("0123456789"),
        variants=variants,
        selector=bundle.SelectorRecord(
            kind="msp", reason="random weights", reference="dense", threshold=None, table=()
        ),
        samples=bundle.Samples(reference_input="samples/reference_input.npy"),
        certification=bundle.CertificationPlan(
            thresholds=(),
            max_accuracy_loss=(),
            operating_loss=0.0,
            reference="dense",
            delta=0.05,
            seed=0,
        ),
    )
    folder = scratch / "googlenet.bundle"
    bundle.write(folder, manifest, files)
    return folder


def summarise(results: Results, networks: dict[str, nn.Module], images: Tensor) -> dict[str, Any]:
    carbon = account([], results, runtime=RUNTIME)
    rows: dict[str, Any] = {}
    for variant, name in NAMES.items():
        candidate = results.candidate(variant, RUNTIME)
        rows[name] = {
            **schema.encode(count(networks[variant], images)),
            "mean_latency_ms": schema.encode(candidate.latency_ms["mean"]),
            "median_latency_ms": schema.encode(candidate.latency_ms["p50"]),
            "energy_mj": schema.encode(candidate.energy_mj),
            "ugco2e": schema.encode(carbon.variants[variant].ugco2e),
            "speedup": schema.encode(candidate.speedup),
            "energy_ratio": schema.encode(candidate.energy_ratio),
            "steady": candidate.steady,
        }
    dense = rows["dense"]
    for row in rows.values():
        row["macs_ratio"] = row["macs"] / dense["macs"]
        row["params_ratio"] = row["params"] / dense["params"]
    return {
        "networks": rows,
        "claim": CLAIM,
        # The factor is one constant for all: the ratio of carbon is that of energy.
        "carbon_saved": {name: _saved(row["energy_ratio"]) for name, row in rows.items()},
        "claim_holds": {
            name: None if row["energy_ratio"] is None else row["energy_ratio"]["high"] < 0.5
            for name, row in rows.items()
            if name != "dense"
        },
        "intensity": schema.encode(carbon.intensity),
        "meter": results.meter,
        "preset": results.preset,
        "threads": results.threads,
        "verdict": schema.encode(results.verdict),
    }


def _saved(ratio: dict[str, float] | None) -> dict[str, float] | None:
    """1 - ratio, with its interval."""
    if ratio is None:
        return None
    return {"value": 1 - ratio["value"], "low": 1 - ratio["high"], "high": 1 - ratio["low"]}


if __name__ == "__main__":
    main()
