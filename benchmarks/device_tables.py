"""The tables of docs/results.md about targets and the runtime, each from its result files."""

from __future__ import annotations

import statistics
from typing import Any

from common import RESULTS
from tables import machine, read, table, validity

NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def eyeriss() -> str:
    """The simulation beside the published measurements of AlexNet."""
    figures = read("eyeriss")["figures"]
    layers = figures["alexnet"]["layers"]
    rows = [
        [
            name,
            f"{found['measured_share']:.1%}",
            f"{found['simulated_share']:.1%}",
            f"{found['measured_dram_mb']:.1f}",
            f"{found['simulated_dram_mb']:.1f}",
        ]
        for name, found in layers.items()
    ]
    headings = ["AlexNet", "on-chip energy, measured", "simulated", "DRAM MB, measured"]
    half = figures["resnet20_half_width"]
    macs, energy = (half[f"{key}_over_dense"] for key in ("macs", "energy_mac_units"))
    resnets = ", ".join(
        f"{name} {found['energy_mac_units'] / 1e6:,.1f} M"
        for name, found in figures["resnets"].items()
    )
    note = (
        f"Shares of the five layers, {figures['alexnet']['batch']} images. Measured: Chen et al., "
        "JSSC 2017. The chip compresses what it sends to DRAM and skips zeros; the simulation does "
        f"neither. In MAC units: {resnets}; ResNet-20 at half width has {macs:.1%} "
        f"of the MACs and {energy:.1%} of the energy. "
        "`benchmarks/eyeriss.py`."
    )
    return "\n".join([table([*headings, "simulated"], rows), "", note])


def pair() -> str:
    """The networks alone, then every row of the dial."""
    result = read("pair")
    figures = result["figures"]
    measured = {
        (found["variant"], found["threshold"]): found["mean_ms"]
        for found in figures["milliseconds"]["candidates"]
    }
    rows = [
        [
            f"{name} alone",
            "",
            "",
            f"{found['accuracy']:.2%}",
            "",
            f"{found['energy']:.1%}",
            _ms(measured[name, None]),
        ]
        for name, found in figures["networks"].items()
    ]
    for row in figures["dial"]:
        promise = f"{100 * row['max_accuracy_loss']:.0f} pt below {row['reference']}"
        if not row["certified"]:
            rows.append([promise, "not certified", "", "", "", "", ""])
            continue
        rows.append(
            [
                promise,
                "certified",
                f"{row['accepts']:.1%}",
                f"{row['accuracy']:.2%}",
                f"{100 * row['loss']:+.2f} pt",
                f"{row['energy']:.1%} ({row['energy_saved']:.1%} saved)",
                _ms(measured["pair", row["threshold"]]),
            ]
        )
    headings = ["at most", "95%", "accepts", "accuracy", "lost", "energy on Eyeriss", "mean ms"]
    verdict = figures["milliseconds"]["verdict"]
    note = (
        f"Accuracies and accept rates on {figures['test_images']:,} images that nothing was chosen "
        f"by; certificates on {figures['certification_images']:,} others. Energy is simulated, the "
        f"dense network's is 100%, the selector's (`{figures['selector']}`) is in it; milliseconds "
        f"are ONNX Runtime's, batch 1, {figures['milliseconds']['threads']} threads, on "
        f"{machine(result)}{validity(verdict['valid'])}. `benchmarks/pair.py`."
    )
    return "\n".join([table(headings, rows), "", note])


def _ms(interval: dict[str, Any]) -> str:
    return f"{interval['value']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def _us(interval: dict[str, Any]) -> str:
    return f"{interval['value']:.0f} [{interval['low']:.0f}, {interval['high']:.0f}]"


def session() -> str:
    """What AdaptiveSession adds, for each bundle that it was measured with."""
    rows, results = [], [read(path.stem) for path in sorted(RESULTS.glob("session_*.json"))]
    for figures in (result["figures"] for result in results):
        called, made, memory = (figures[key] for key in ("accepted_call", "creation", "memory"))
        rows += [
            [
                f"`{figures['bundle']}`: a call, all accepted",
                f"{called['session_us']:,.0f} us",
                f"{called['bare_us']:,.0f} us bare; by block {_us(called['added_us'])} us more",
                f"{called['allowed_us']:,.0f} us more (3% + 20 us)",
            ],
            *(
                [
                    f"in turn on {NAMES.get(runtime, runtime)}: accepted, escalated",
                    f"{_ratio(found['accepted_over_alone'], 2)}x, "
                    f"{_ratio(found['escalated_over_sum'], 2)}x",
                    "the networks alone, at their fastest",
                    f"{found['allowed']}x",
                ]
                for runtime, found in figures["in_turn"].items()
            ),
            [
                "opening a session",
                f"{made['later_session_ms']:.1f} ms",
                f"{made['later_two_bare_ms']:.1f} ms, two bare sessions",
                f"{made['allowed_ratio']}x",
            ],
            [
                "importing the runtime",
                f"{made['import_beyond_onnxruntime_ms']:.1f} ms",
                "after onnxruntime",
                f"{made['allowed_import_ms']} ms",
            ],
            [
                f"resident memory over {memory['runs']:,} runs",
                f"{memory['growth']:+.2%}",
                "its first twentieth",
                f"{memory['allowed']:.0%}",
            ],
            [
                f"8 threads, {figures['threads']['runs']:,} runs",
                f"{figures['threads']['different']} different",
                "one thread's answers",
                "none",
            ],
        ]
    note = (
        "Medians, a process for each, in alternating blocks, ratios and differences paired by "
        f"block, on {machine(results[0])}. "
        "`benchmarks/session.py`."
    )
    return "\n".join([table(["", "session", "beside", "allowed"], rows), "", note])


def x86_latency() -> str:
    """Milliseconds, and how much of the MACs' reduction arrives."""
    result = read("x86_latency")
    figures = result["figures"]
    in_depth = read("x86_latency_depth")["figures"]["networks"]["resnet56"]
    networks = {**figures["networks"], "resnet56, whole blocks too": in_depth}
    rows = [
        [
            f"{name}, {runtime}",
            _ms(found["latency_ms"]["dense"]),
            _ms(found["latency_ms"]["half"]),
            f"{found['speedup']['value']:.2f}x of {network['mac_reduction']:.2f}x",
            f"{found['speedup_over_mac_reduction']:.2f}",
        ]
        for name, network in networks.items()
        for runtime, found in network["runtimes"].items()
    ]
    resnet = figures["networks"]["resnet56"]
    accuracies = ", ".join(f"{key} {found:.2%}" for key, found in resnet["test_accuracy"].items())
    multiples = ", ".join(f"{found['width_multiple']} ({name})" for name, found in networks.items())
    note = (
        f"Batch 1, {figures['threads']} threads, every candidate in a process of its own, in "
        "alternating blocks; dense, and pruned by DRP to half of the MACs, widths on multiples of "
        f"{multiples}. "
        "*Arrives* is the real speed-up over the MACs' reduction. Accuracy of dense ResNet-56 on "
        f"10,000 test images: {accuracies}. On {machine(result)}. `benchmarks/x86_latency.py`."
    )
    headings = ["", "dense, ms", "pruned, ms", "real speed-up", "arrives"]
    return "\n".join([table(headings, rows), "", note])


def x86_limit() -> str:
    """The dense networks beside a chain of matrix products."""
    result = read("x86_limit")
    networks = result["figures"]["networks"]
    rows = [
        [
            f"{name}, {NAMES[runtime]}",
            f"{network['macs'] / 1e6:,.0f}",
            _ms(found["latency_ms"]),
            _ratio(found["times_the_limit"], 2),
        ]
        for name, network in networks.items()
        for runtime, found in network["runtimes"].items()
    ]
    rates = [network["products_gmacs"] for network in networks.values()]
    products = {NAMES[network["products_on"]] for network in networks.values()}
    note = (
        f"fp32, batch 1, {result['figures']['threads']} threads. The limit is the rate of a chain "
        f"of products with matrices of 512x512 in the same alternating blocks, on the runtime that "
        f"makes them fastest ({', '.join(sorted(products))}; {min(rates):.0f} to {max(rates):.0f} "
        f"GMAC/s). On {machine(result)}. `benchmarks/x86_limit.py`."
    )
    return "\n".join([table(["", "million MACs", "ms", "times the limit"], rows), "", note])


def x86_layers() -> str:
    """Where the MACs' reduction does not arrive."""
    result = read("x86_layers")
    rows: list[list[str]] = []
    for name, sizes in result["figures"]["networks"].items():
        for size, found in sizes.items():
            dense, half = found["dense"], found["half"]
            row = [name, size, f"{dense['us']:.0f}", f"{half['us']:.0f}", "", "", ""]
            if "macs" in dense:
                fewer = dense["macs"] / half["macs"]
                megabytes = dense["weights"] * (1 if "int8" in name else 4) / 1e6
                row[4:] = [
                    f"{dense['us'] / half['us']:.2f}x of {fewer:.2f}x",
                    f"{dense['us'] / half['us'] / fewer:.2f}",
                    f"{megabytes:.2f}",
                ]
            rows.append(row)
    headings = ["", "layers that write", "dense, us", "pruned, us", "faster", "arrives"]
    note = (
        f"OpenVINO's own clock of each layer, batch 1, {result['figures']['threads']} threads, "
        "pruned by width as above; layers that write maps of one size together; dense and pruned "
        "take turns in blocks of calls. On "
        f"{machine(result)}. `benchmarks/x86_layers.py`."
    )
    return "\n".join([table([*headings, "weights when dense, MB"], rows), "", note])


def export_cost() -> str:
    """Ours over the bare exporter."""
    result = read("export_cost")
    figures = result["figures"]
    rows = [
        [
            NAMES[runtime],
            f"{figures['seconds'][f'bare {runtime}']['value']:.2f}",
            f"{figures['seconds'][f'our {runtime}']['value']:.2f}",
            _ratio(found, 2),
        ]
        for runtime, found in figures["ratios"].items()
    ]
    note = (
        f"ResNet-56: graph, compile, parity; {figures['goal']}x is allowed. On {machine(result)}. "
        "`benchmarks/export_cost.py`."
    )
    return "\n".join([table(["", "bare, s", "ours, s", "ratio"], rows), "", note])


def _ratio(found: dict[str, float], digits: int) -> str:
    value, low, high = (f"{found[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def against_benchmark_app() -> str:
    """Our median over theirs."""
    result = read("against_benchmark_app")
    rows, rounds = [], 0
    for names, medians in result["figures"]["medians_ms"].items():
        both = zip(names.split(" / "), zip(*medians, strict=True), strict=True)
        sides = [f"{name}, {statistics.median(each):.2f} ms" for name, each in both]
        rows.append([*sides, _ratio(result["figures"]["ratios"][names], 3)])
        rounds = len(medians)
    note = (
        "ResNet-56, fp32, batch 1; the two take turns every 0.2 s; paired by round "
        f"({rounds} of them), the interval by order statistics. "
        "benchmark_app tells the latency of the inference request; a *window* has the call from "
        f"Python in it too. On {machine(result)}. `benchmarks/against_benchmark_app.py`."
    )
    return "\n".join([table(["", "beside", "median, ours over theirs"], rows), "", note])


def tensorrt_graphs() -> str:
    """Convolutions by the type that they give, as TensorRT-RTX parsed them."""
    figures = read("tensorrt_graphs")["figures"]
    precisions = list(next(iter(figures["networks"].values())))
    rows = [
        [name, *(_types(found[precision]) for precision in precisions)]
        for name, found in figures["networks"].items()
    ]
    note = (
        f"Convolutions of the graphs for {figures['target']} and the type that each gives, parsed "
        f"and built by TensorRT-RTX {figures['tensorrt_rtx']} on a machine without a GPU (int8: "
        "explicit Q/DQ with float16 around). With one zero point moved it is refused: "
        f'"{figures["asymmetric"]["rules"]}". `benchmarks/tensorrt_graphs.py`.'
    )
    return "\n".join([table(["", *precisions], rows), "", note])


def _types(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def meter_overhead() -> str:
    """Loops with a meter read beside them over loops without."""
    result = read("meter_overhead")
    rows = [
        [name, f"{found['median_ns'] / 1e6:.2f}"]
        + [_ratio(found[f"{key}_ratio"], 4) for key in ("median", "mean")]
        for name, found in result["figures"].items()
    ]
    note = (
        "The fakes of RAPL (two sockets with DRAM) and of the board with the most rails, polled as "
        f"a window does. On {machine(result)}. `benchmarks/meter_overhead.py`."
    )
    headings = ["loop, meter", "median, ms", "median with over without", "mean with over without"]
    return "\n".join([table(headings, rows), "", note])


def meter_traces() -> str:
    """Random traces of known energy."""
    figures = read("meter_traces")["figures"]
    rows = [
        ["traces", f"{figures['traces']:,}"],
        ["called valid, and wrong by more than 0.5%", f"{figures['valid_and_wrong']}"],
        [
            "an interval that misses the truth, or 0 J",
            str(figures["interval_misses_truth_or_zero"]),
        ],
        ["recoverable ones that are valid", f"{figures['recoverable_valid_share']:.2%}"],
        ["largest error of a valid one", f"{figures['worst_error_of_valid']:.2%}"],
    ]
    return "\n".join([table(["", ""], rows), "", "`benchmarks/meter_traces.py`."])


def account_check() -> str:
    """Accounts derived again by other code."""
    rows = []
    for path in sorted((RESULTS / "account_check").glob("*.json")):
        figures = read(f"account_check/{path.stem}")["figures"]
        rows.append(
            [
                path.stem,
                f"{figures['rows_with_provenance']} of {figures['rows']}",
                f"{figures['figures_compared']}",
                f"{len(figures['differences'])}",
                "agrees" if figures["codecarbon"]["agrees"] else "differs",
            ]
        )
    headings = ["run", "rows with provenance", "figures", "differ", "by CodeCarbon's formula"]
    note = (
        "Every total of the account stage from the ledger and the raw windows by code that imports "
        "nothing of greenprune: the default recipe, and `resnet56-cifar10` with one epoch of "
        "fine-tuning for each network. `benchmarks/account_check.py`."
    )
    return "\n".join([table(headings, rows), "", note])


def repeatability() -> str:
    """Five runs of the same bundle."""
    result = read("repeatability")
    figures = result["figures"]
    rows = [
        [
            variant,
            f"{found['latency_ms']['pairs_inside']} of 20",
            f"{found['latency_ms']['cov']:.1%}",
            f"{min(run['value'] for run in found['latency_ms']['medians']):.4f} to "
            f"{max(run['value'] for run in found['latency_ms']['medians']):.4f}",
        ]
        for variant, found in figures["variants"].items()
    ]
    note = (
        f"`{figures['bundle']}`, preset `{figures['preset']}`, {NAMES[figures['runtime']]}, five "
        f"runs on {machine(result)}. Wanted: 14 pairs, 3%. `benchmarks/repeatability.py`."
    )
    headings = ["", "pairs with the other's median inside", "CoV of the medians", "medians, ms"]
    return "\n".join([table(headings, rows), "", note])
