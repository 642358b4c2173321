"""A finished run as one object for programs, one table for people, one input for the report."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from greenprune import deployment
from greenprune.bundle import VARIANTS as NETWORKS
from greenprune.harness import Results
from greenprune.harness.environment import describe_environment
from greenprune.nncec.account import Account
from greenprune.pipeline import Job

VARIANTS = (*NETWORKS, "pair")
QUANTITIES = {
    "latency_ms": "latency, ms",
    "energy_mj": "energy, mJ",
    "macs": "MACs",
    "params": "parameters",
}
"""That a budget may limit."""


def summarise(job: Job) -> dict[str, Any]:
    """What ``greenprune run --json`` prints. Latencies are in ms, energies in mJ an inference."""
    target = job.recipe.compile.target
    results = deployment.results_of(job)
    certified = job.results(f"certify-{target}")
    return {
        "run": str(job.folder),
        "bundle": str(deployment.bundle_folder(job)),
        "report": str(job.place(f"report-{target}") / "report.html"),
        "seconds": sum(stage["seconds"] for stage in deployment.finished_stages(job)),
        "preset": results.preset,
        "valid": results.verdict.valid,
        "variants": {variant: _variant(job, variant, results) for variant in VARIANTS},
        "selector": {
            key: job.results("selector")[key] for key in ("kind", "reason", "area_head", "area_msp")
        },
        "certificate": {
            "threshold": certified["threshold"],
            "certified_on": certified["certified_on"],
            "table": certified["table"],
            "headline": certified["headline"],
        },
        "account": deployment.read_account(job),
    }


def _variant(job: Job, variant: str, results: Results) -> dict[str, Any]:
    tested = job.results(f"certify-{job.recipe.compile.target}")["test"]
    if variant == "pair":
        macs, params = _pair_cost(job, tested["coverage"])
    else:
        macs, params = (deployment.network_results(job, variant)[key] for key in ("macs", "params"))
    measured = [found for found in results.candidates if found.variant == variant]
    chosen = next(found for found in measured if found.runtime == deployment.default_runtime(job))
    energy = chosen.energy_mj
    made: dict[str, Any] = {
        "accuracy": tested["accuracy"][variant],
        "macs": macs,
        "params": params,
        "latency_ms": {
            found.runtime: {
                key: interval.value
                for key, interval in found.latency_ms.items()
                if interval is not None
            }
            for found in measured
        },
        "speedup": {found.runtime: found.speedup.value for found in measured},
        "energy_mj": None
        if energy is None
        else {
            "value": energy.value,
            "low": energy.low,
            "high": energy.high,
            "provenance": energy.provenance,
        },
    }
    if variant == "pair":
        made["accept_rate"] = tested["coverage"]
        made["replay_accept_rate"] = chosen.accept_rate
    return made


def _pair_cost(job: Job, coverage: float) -> tuple[int, int]:
    """Mean MACs for an input, and parameters: mild alone where nothing may be accepted, else the
    aggressive network for all and mild too for those that are escalated."""
    aggressive, mild = (deployment.network_results(job, name) for name in ("aggressive", "mild"))
    if job.results(f"certify-{job.recipe.compile.target}")["threshold"] is None:
        return mild["macs"], mild["params"]
    macs = round(aggressive["macs"] + (1.0 - coverage) * mild["macs"])
    return macs, aggressive["params"] + mild["params"]


def report_input(job: Job, account: Account, elsewhere: Results | None = None) -> dict[str, Any]:
    """The arguments of :func:`greenprune.nncec.report.write_report` beside its path.

    ``elsewhere`` is what a device measured, in place of the run's own results.
    """
    pruned = job.results("prune")
    certified = job.results(f"certify-{job.recipe.compile.target}")
    results = elsewhere or deployment.results_of(job)
    summary = {
        "name": job.recipe.name,
        "seed": job.recipe.seed,
        "machine": elsewhere.environment_before if elsewhere else describe_environment(),
        "variants": {variant: _variant(job, variant, results) for variant in VARIANTS},
        "selector": {**job.results("selector"), **certified},
        "dial": {
            "runtime": deployment.default_runtime(job),
            "reference": job.recipe.certify.reference,
            "table": certified["table"],
        },
        "widths": [
            {
                "layer": layer,
                "dense": width,
                "mild": pruned["mild"]["widths"].get(layer, 0),
                "aggressive": pruned["aggressive"]["widths"].get(layer, 0),
            }
            for layer, width in pruned["mild"]["dense_widths"].items()
        ],
        "layer_macs": _layer_macs(job),
        "budgets": list(_budgets(pruned)),
        "caveats": _caveats(job, results),
    }
    return {"run_summary": summary, "results": results, "account": account}


def _budgets(pruned: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """For each step towards a variant's budget and each limited quantity: what was allowed, what
    was predicted, and what was measured (None where it was not)."""
    for variant in ("mild", "aggressive"):
        for number, step in enumerate(pruned[variant].get("budget", []), start=1):
            for quantity, found in step["quantities"].items():
                measured = step["measured"].get(quantity)
                real = measured or {"dense": found["dense"], "allowed": found["goal"]}
                yield {
                    "variant": variant,
                    "step": number,
                    "quantity": QUANTITIES[quantity],
                    "dense": real["dense"],
                    "allowed": real["allowed"],
                    "predicted": found["predicted"],
                    "predicted_dense": found["dense"],
                    "measured": real.get("measured"),
                    "importance_kept": step["importance_kept"],
                    # of the whole way: with several steps the blocks go before the first
                    "removed_blocks": pruned[variant]["removed_blocks"],
                }


def _layer_macs(job: Job) -> list[dict[str, Any]]:
    """MACs of each layer in each network; 0 in a network that has lost the layer."""
    counted = {name: deployment.layer_macs(job, name) for name in NETWORKS}
    return [
        {"layer": layer, **{name: counted[name].get(layer, 0) for name in NETWORKS}}
        for layer in counted["dense"]
    ]


def _caveats(job: Job, results: Results) -> list[str]:
    found = [*results.verdict.failures, *results.verdict.notes]
    if results.preset == "quick":
        found.append(
            "The preset 'quick' measures for seconds; for figures to publish, run greenprune-bench "
            "with --preset standard."
        )
    if job.recipe.data.held_out_from == "test":
        found.append(
            "The weights had seen every training image, so that the selector's and the "
            "certificate's images were taken out of the test images; accuracies are on the rest."
        )
    if job.recipe.model.weights is not None and job.recipe.data.held_out_from == "train":
        found.append(
            "The weights came from elsewhere, and the selector's and the certificate's images from "
            "the training images: the certificate holds only where the weights never saw these."
        )
    resumed = [stage["stage"] for stage in deployment.finished_stages(job) if stage["resumed"]]
    if resumed:
        found.append(
            f"Killed and resumed: {', '.join(resumed)}; their seconds are those since then."
        )
    return found


def print_summary(summary: dict[str, Any]) -> None:
    """The table that a person wants to read, on stdout."""
    variants = summary["variants"]
    dense = variants["dense"]
    runtimes = list(dense["latency_ms"])
    table = Table(title=summary["run"], title_justify="left")
    table.add_column("")
    for heading in (
        "accuracy",
        "MACs",
        "parameters",
        *(f"{runtime}, mean ms" for runtime in runtimes),
        "mJ an image",
    ):
        table.add_column(heading, justify="right")
    for name, found in variants.items():
        table.add_row(
            name,
            f"{found['accuracy']:.2%}",
            f"{found['macs'] / 1e6:,.2f} M ({found['macs'] / dense['macs']:.0%})",
            f"{found['params']:,}",
            *(_latency(found, runtime) for runtime in runtimes),
            _energy(found["energy_mj"]),
        )
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
    console.print(table)
    pair = variants["pair"]
    console.print(
        f"pair: accepts {pair['accept_rate']:.0%} of the test images "
        f"({pair['replay_accept_rate']:.0%} of the replayed ones); "
        f"{summary['certificate']['headline']}",
        highlight=False,
    )
    console.print(f"selector: {summary['selector']['reason']}", highlight=False)
    console.print(
        f"bundle: {summary['bundle']}\nreport: {summary['report']}\n"
        f"{summary['seconds']:.0f} s in all, measured with the preset '{summary['preset']}'"
        f"{'' if summary['valid'] else '; the measurement is NOT valid, see the report'}",
        highlight=False,
        soft_wrap=True,
    )


def _latency(found: dict[str, Any], runtime: str) -> str:
    latency = found["latency_ms"].get(runtime)
    if latency is None:
        return "not measured"
    return f"{latency['mean']:.3f} ({found['speedup'][runtime]:.2f}x)"


def _energy(energy: dict[str, Any] | None) -> str:
    if energy is None:
        return "no meter"
    if energy["provenance"].startswith("measured"):
        return f"{energy['value']:.3f}"
    return f"ESTIMATE {energy['low']:.3f} to {energy['high']:.3f}"
