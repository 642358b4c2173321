"""The tables of docs/results.md about budgets in what a device pays, each from its result files."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from common import RESULTS
from tables import machine, read, table

ARMS = {
    "dense": "dense",
    "papers": "(a) the papers' rates",
    "macs": "(b) DRP, half of the MACs",
    "macs_8": "(c) the same, widths on 8",
    "torch_pruning_8": "(c) torch-pruning, `round_to=8`",
    "latency": "(d) DRP within half of the latency",
    "latency_blocks": "(d) half of the latency, blocks may go",
    "latency_blocks_65": "(d) 0.65 of the latency, blocks may go",
}


OURS = ("latency", "latency_blocks", "latency_blocks_65")


def cost_table() -> str:
    """How well a table predicts whole networks."""
    result = read("cost_table")
    rows = []
    for name, network in result["figures"]["networks"].items():
        for runtime in (key for key in network if key != "input_size"):
            found = network[runtime]
            before, after = found["before"], found["after"]
            rows.append(
                [
                    f"{name}, {runtime}",
                    f"{found['points']}, {found['table_seconds'] / 60:.1f} min",
                    str(found["block_width"]),
                    f"{before['median_error']:.1%}, {before['spearman']:.3f}",
                    f"{after['median_error']:.1%}, {after['spearman']:.3f}",
                ]
            )
    choices = max(
        found["choices"]
        for network in result["figures"]["networks"].values()
        for found in network.values()
        if isinstance(found, dict)
    )
    note = (
        f"{choices} random choices of widths each, measured whole, batch 1, "
        f"{result['figures']['threads']} threads, in alternating blocks: median relative error and "
        "Spearman's rank correlation; wanted are 10% and 0.95. With the correction each network is "
        "predicted by one that others taught (five folds). The goal for a table of ResNet-56 is 10 "
        f"minutes. On {machine(result)}. `benchmarks/cost_table.py`."
    )
    headings = ["", "points, time", "block found", "sum of the table", "with the correction"]
    return "\n".join([table(headings, rows), "", note])


def measured_cost() -> str:
    """By MACs and by what the device pays, in floating point."""
    return _measured_cost("measured_cost")


def measured_cost_int8() -> str:
    """The same, in int8, and where it led to other widths."""
    return "\n".join([_measured_cost("measured_cost_int8"), "", _other_widths()])


def _other_widths() -> str:
    """The choices by prices in fp32 and in int8 side by side, layer by layer."""
    rows = []
    both = [read(name)["figures"]["networks"] for name in ("measured_cost", "measured_cost_int8")]
    for network in both[1]:
        for arm in OURS:
            if arm not in both[1][network]["arms"]:
                continue
            fp32, int8 = (each[network]["arms"][arm]["widths"] for each in both)
            layers = sorted({*fp32, *int8})
            other = [name for name in layers if fp32.get(name, 0) != int8.get(name, 0)]
            rows.append(
                [
                    f"{network}, {ARMS[arm]}",
                    " / ".join(str(each[network]["block_width"]) for each in both),
                    f"{len(fp32)} / {len(int8)}",
                    f"{len(other)} of {len(layers)}",
                    f"{sum(fp32.values())} / {sum(int8.values())}",
                ]
            )
    headings = ["fp32 / int8", "block", "layers left", "layers otherwise", "channels left"]
    return table(headings, rows)


def _measured_cost(name: str) -> str:
    result = read(name)
    accuracies = name == "measured_cost"
    rows: list[list[str]] = []
    for network, found in result["figures"]["networks"].items():
        measured = found["runtimes"]
        rows.append(
            [f"**{network}**, block of {found['block_width']}"]
            + [""] * (1 + len(measured) + accuracies)
        )
        for arm in ARMS:
            if arm in found.get("refused", {}):
                rows.append(
                    [ARMS[arm], *["out of reach"] * (1 + len(measured)), *[""] * accuracies]
                )
            if arm not in found["arms"]:
                continue
            latencies = [_latency(runtime[arm]) for runtime in measured.values()]
            row = [ARMS[arm], f"{found['arms'][arm]['macs_share']:.1%}", *latencies]
            if accuracies:
                row.append(_accuracy(arm, found["arms"]) if network == "resnet56" else "")
            rows.append(row)
    faster = _faster(result["figures"]["networks"])
    networks = result["figures"]["networks"]
    runtimes = list(next(iter(networks.values()))["runtimes"])
    priced = ", ".join(f"{network} by {found['priced']}" for network, found in networks.items())
    taught = (
        " VGG-16 and MobileNetV3 have random weights. Accuracy: test images, from 93.39%, after 15 "
        "epochs of one training for all, where that was run."
    )
    note = (
        "Milliseconds, batch 1, and the share of the dense network's, paired by block, all arms in "
        f"one race, {result['figures']['threads']} threads. Prices: {priced}."
        f"{taught if accuracies else ''} On {machine(result)}. `benchmarks/measured_cost.py`"
        f"{', `measured_cost_accuracy.py`' if accuracies else ''}."
    )
    headings = ["", "MACs", *(f"{runtime}, ms" for runtime in runtimes)]
    headings += ["accuracy"] if accuracies else []
    return "\n".join([table(headings, rows), "", faster, "", note])


def _faster(networks: dict[str, Any]) -> str:
    """How many times as fast as the arms (b) and (c) those of (d) are, where they were priced."""
    ours = [arm for arm in OURS if any(_tried(found, arm) for found in networks.values())]
    rows = []
    for network, found in networks.items():
        measured = found["runtimes"][found["priced"]]
        for arm in ("macs", "macs_8", "torch_pruning_8"):
            times = []
            for own in ours:
                r = measured[arm]["over"].get(own)
                missing = "out of reach" if _tried(found, own) else ""
                times.append(
                    f"{r['value']:.2f}x [{r['low']:.2f}, {r['high']:.2f}]" if r else missing
                )
            rows.append([f"{network}, {found['priced']}: over {ARMS[arm]}", *times])
    return table(["times as fast", *(ARMS[own] for own in ours)], rows)


def _tried(found: dict[str, Any], arm: str) -> bool:
    return arm in found["arms"] or arm in found.get("refused", {})


def _latency(row: dict[str, Any]) -> str:
    share = row["of_dense"]
    return (
        f"{row['latency_ms']['value']:.2f} ({share['value']:.2f} "
        f"[{share['low']:.2f}, {share['high']:.2f}])"
    )


def _accuracy(arm: str, raced: dict[str, Any]) -> str:
    """Over the seeds that were trained, with the share of the MACs where it was another network
    than the one that was raced."""
    folder = RESULTS / "measured_cost_accuracy"
    files = [*folder.glob(f"{arm}.json"), *folder.glob(f"{arm}_seed*.json")]
    trained = [read(f"{folder.name}/{path.stem}")["figures"] for path in files]
    if not trained:
        return ""
    (size,) = {(figures["macs"], figures["params"]) for figures in trained}
    accuracies = [figures["accuracy"] for figures in trained]
    said = (
        f"{mean(accuracies):.2%} ± {stdev(accuracies):.2%} ({len(accuracies)} seeds)"
        if len(accuracies) > 1
        else f"{accuracies[0]:.2%}"
    )
    if size == (raced[arm]["macs"], raced[arm]["params"]):
        return said
    return f"{said} with {size[0] / raced['dense']['macs']:.1%} of the MACs"


def sweep_digits() -> str:
    """Twelve points, killed and resumed."""
    result = read("sweep_digits")
    figures = result["figures"]
    killed = figures["killed"]
    rows = [
        ["points", str(figures["points"])],
        ["finished when it was killed", str(killed["points_finished"])],
        [
            "processes killed, left over",
            f"{killed['processes_killed']}, {killed['processes_left']}",
        ],
        ["finished stages and points that were done again", str(len(figures["done_again"]))],
        [
            "minutes before, and after",
            f"{killed['seconds'] / 60:.1f}, {figures['resumed_seconds'] / 60:.1f}",
        ],
    ]
    note = (
        f"LeNet-5 on the digits, two Ray workers on {machine(result)}; the same command goes on. "
        "`benchmarks/sweep_digits.py`."
    )
    return "\n".join([table(["", ""], rows), "", note])
