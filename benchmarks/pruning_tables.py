"""The tables of docs/results.md about pruning, each from its result files."""

from __future__ import annotations

from typing import Any

from common import RESULTS
from tables import machine, percent, read, table, validity

SHOWN_RATES = (0.3, 0.5, 0.6, 0.7, 0.8)


def operating_points() -> str:
    """The papers' widths, counted on the compact networks."""
    figures = read("operating_points")["figures"]
    rows = [[network, "dense", *_counted(found)] for network, found in figures["dense"].items()] + [
        [point["network"], point["rates"], *_counted(point)] for point in figures["points"]
    ]
    notes = [
        f"{point['network']}: {point['note']}." for point in figures["points"] if point["note"]
    ]
    headings = ["network", "rates", "MACs", "parameters", "published count"]
    return "\n".join([table(headings, rows), "", *notes])


def _counted(found: dict[str, Any]) -> list[str]:
    if found["published"] is None:
        match = "ours"
    elif found["exact"]:
        match = "equal"
    else:
        match = f"{found['difference']['macs']:+,} / {found['difference']['params']:+,}"
    return [f"{found['macs']:,}", f"{found['params']:,}", match]


def resnet56_points() -> str:
    """One row a run."""
    names = {
        "drp": "greenprune (DRP, distilled)",
        "taylor": "torch-pruning 1.6.1, Taylor",
        "taylor_distilled": "torch-pruning 1.6.1, Taylor, distilled",
    }
    rows = []
    result: dict[str, Any] = {}
    for path in sorted((RESULTS / "resnet56_points").glob("*.json")):
        result = read(f"resnet56_points/{path.stem}")
        point, method = path.stem.removeprefix("resnet56_").rsplit("_", 1)[0].split("_", 1)
        found = result["figures"]
        rows.append(
            [
                f"{point}, {names[method]}, seed {result['seed']}",
                f"-{found['macs_removed']:.2%}",
                f"-{found['params_removed']:.2%}",
                f"{found['accuracy_before_fine_tuning']:.2%}",
                f"{found['accuracy_with_batchnorm_reestimated']:.2%}",
                f"{found['accuracy']:.2%}",
            ]
        )
    headings = ["", "MACs", "parameters", "as cut", "BatchNorm re-estimated", "after 15 epochs"]
    note = (
        "From 93.39%. Test accuracy on all 10,000 images, last epoch; the same schedule for all, "
        f"in bfloat16, on {machine(result)}. `benchmarks/resnet56_points.py`."
    )
    return "\n".join([table(headings, rows), "", note])


def criteria() -> str:
    """ResNet-20, every criterion, three seeds."""
    result = read("criteria")
    figures = result["figures"]
    keys = ("before", "reestimated", "development", "test")
    rows = [
        [f"`{method}`", *(percent(found[key]) for key in keys)]
        for method, found in ((name, figures["methods"][name]) for name in _by_development(figures))
    ]
    for row, method in zip(rows, _by_development(figures), strict=True):
        ahead = figures["over_the_default"][method]
        row.append("" if method == "drp" else _interval(ahead))
    headings = [
        "criterion",
        "as cut",
        "BatchNorm re-estimated",
        f"after {figures['epochs']} epoch(s), development",
        "test",
        "points over `drp`, development",
    ]
    note = (
        f"Before the cut {figures['dense_development']:.2%} (development) and "
        f"{figures['dense_test']:.2%} (test). At most {figures['macs_allowed']:.0%} of the MACs, "
        f"widths on multiples of {figures['width_multiple']}, mean ± deviation over three "
        "seeds; the first two columns are on the development split too. `benchmarks/criteria.py`."
    )
    return "\n".join([table(headings, rows), "", note])


def _by_development(figures: dict[str, Any]) -> list[str]:
    """Methods, the best on the development split first."""
    methods = figures["methods"]
    return sorted(methods, key=lambda method: -methods[method]["development"]["mean"])


def cbs_lenet5() -> str:
    """CBS minus the plain regulariser, in points, before fine-tuning."""
    figures = read("cbs_lenet5")["figures"]
    rows = [
        [
            f"`{row['method']}` - `{row['against']}`",
            f"{row['strength']:g}",
            f"{row['rate']:.0%}",
            "{:.2%} / {:.2%}".format(*row["cut_accuracy"]),
            _interval(row["cut"]),
            _interval(row["folded"]),
        ]
        for row in figures["differences"]
        if row["rate"] in SHOWN_RATES
    ]
    headings = ["", "strength", "rate", "accuracies as cut", "points as cut", "points, folded"]
    note = (
        "Paired by seed (5), 95% intervals (Student's t), test accuracy straight after the cut; "
        "more rates are in the result file. `benchmarks/cbs_lenet5.py`."
    )
    return "\n".join([table(headings, rows), "", note])


def _interval(found: dict[str, float]) -> str:
    return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def corrections() -> str:
    """Accuracy before fine-tuning with each correction."""
    figures = read("corrections")["figures"]
    ways = ("cut", "folded", "batchnorm", "folded, batchnorm")
    rows = [
        [
            f"`{row['method']}`",
            f"{row['rate']:.0%}",
            f"{row['zero_share']['mean']:.1%}",
            *(percent(row[way]) for way in ways),
        ]
        for row in figures["summary"]
    ]
    headings = ["sparse training", "rate", "filters at zero", "as cut", "folded"]
    headings += ["BatchNorm re-estimated", "both"]
    note = (
        "ResNet-20 on CIFAR-10, test accuracy before fine-tuning, mean ± deviation over three "
        "seeds. `benchmarks/corrections.py`."
    )
    return "\n".join([table(headings, rows), "", note])


def surgery() -> str:
    """The same networks through greenprune and through torch-pruning."""
    figures = read("surgery")["figures"]
    rows = [
        [name, *_cut(found["greenprune"]), *_cut(found["torch_pruning"])]
        for name, found in figures["networks"].items()
    ]
    headings = ["network", "greenprune: runs", "equals its mask", "torch-pruning: runs"]
    note = (
        f"Every group at {figures['rate']:.0%}, random weights; the difference is the largest "
        "between the compact and the masked network, relative, in float64. 'no mask': it cuts free "
        "parameters, for which no mask could be built. `benchmarks/surgery.py`, torch-pruning "
        f"{figures['torch_pruning']}."
    )
    return "\n".join([table([*headings, "equals its mask"], rows), "", note])


def _cut(found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return [f"not pruned: {found['error'].split(':')[0]}", ""]
    if found["runs"] is not True:
        return [f"no: {str(found['runs']).split(':')[0]}", ""]
    if found["difference"] is None:
        return ["yes", "no mask"]
    return ["yes", f"{'yes' if found['equal'] else 'no'} ({found['difference']:.0e})"]


def gates() -> str:
    """One-off training beside DRP and fine-tuning."""
    rows, costs = [], []
    for network in ("lenet5", "resnet20"):
        figures = read(f"gates_{network}")["figures"]
        rows += [
            [
                f"{network}, {figures['epochs']} epochs, `{method}`",
                percent(found["test"]),
                percent(found["macs"]),
                percent(found["params"]),
            ]
            for method, found in figures["methods"].items()
        ]
        costs.append(f"{figures['step_cost']['ratio']:.2f} times ({network})")
    headings = ["", "test accuracy", "MACs that stay", "parameters that stay"]
    note = (
        "LeNet-5 on MNIST from nothing, ResNet-20 on CIFAR-10 from trained weights; mean ± "
        f"deviation over {len(figures['rows']) // 2} seeds, no teacher. A training step with gates "
        f"takes {' and '.join(costs)} as long as one without. `benchmarks/gates.py`."
    )
    return "\n".join([table(headings, rows), "", note])


def scoring() -> str:
    """What scoring costs, against HRank's protocol."""
    result = read("scoring")
    found = result["figures"]
    ranks, protocol = found["ranks"], found["scoring"]["hrank_protocol"]
    rows = [
        [
            f"matrix ranks of {ranks['maps']:,} maps, {ranks['different']} of them different",
            f"{ranks['ours_us_a_map']:.1f} µs a map",
            f"{ranks['loop_us_a_map']:.1f} µs a map",
            _ratio(ranks["ratio"]),
        ]
    ]
    for method in ("hrank", "drp"):
        own = found["scoring"][method]
        rows.append(
            [
                f"whole scoring, `{method}`, {own['images']} images",
                f"{own['seconds']:.1f} s",
                f"{protocol['seconds']:,.0f} s",
                f"{own['ratio']:.0f}",
            ]
        )
    for network, own in found["cbs"].items():
        plain = own["plain_ms"]
        rows.append(
            [
                f"training step with CBS, {network}",
                f"{plain * own['ratio']['value']:.2f} ms",
                f"{plain:.2f} ms without",
                f"{_ratio(own['ratio'])}; by itself {own['alone_over_plain']:.4f}",
            ]
        )
    agreed = found["scoring"]["spearman"]
    note = (
        "ResNet-56 on CIFAR-10. The other column is, for ranks, `torch.linalg.matrix_rank` on one "
        "map after the other; for scoring HRank's protocol, extrapolated from three layers; "
        f"Spearman's correlation with its ranks {agreed['all_filters']:.4f} over all filters, "
        f"{agreed['layers_mean']:.4f} the mean of layers, {agreed['layers_min']:.4f} the lowest. "
        f"{found['threads']} threads, {machine(result)}. `benchmarks/scoring.py`."
    )
    return "\n".join([table(["", "greenprune", "the other", "ratio"], rows), "", note])


def _ratio(found: dict[str, float]) -> str:
    return f"{found['value']:.3g} [{found['low']:.3g}, {found['high']:.3g}]"


def googlenet() -> str:
    """Dense and at its published point."""
    result = read("googlenet")
    figures = result["figures"]
    rows = [
        [
            name.replace("_", " "),
            f"{found['macs'] / 1e6:.1f} M ({found['macs_ratio']:.1%})",
            f"{found['params']:,}",
            f"{found['mean_latency_ms']['value']:.2f}",
            f"{found['energy_mj']['value']:.0f}",
            f"{found['ugco2e']['value']:.2f}",
            "" if name == "dense" else _saved(figures["carbon_saved"][name]),
        ]
        for name, found in figures["networks"].items()
    ]
    headings = ["", "MACs", "parameters", "mean ms", "mJ", "µgCO2e", "carbon saved"]
    note = (
        f"One inference, batch 1, {figures['threads']} threads, ONNX Runtime, random weights, on "
        f"{machine(result)}; energy is by {figures['meter']}, the ratio is paired. The paper "
        f"claims {figures['claim']}. `benchmarks/googlenet.py`, preset `{figures['preset']}`"
        f"{validity(figures['verdict']['valid'])}."
    )
    return "\n".join([table(headings, rows), "", note])


def _saved(found: dict[str, float]) -> str:
    return f"{found['value']:.1%} [{found['low']:.1%}, {found['high']:.1%}]"


def crnn_mnist() -> str:
    """The CNN-RNN, three seeds."""
    figures = read("crnn_mnist")["figures"]
    rows = [
        [
            variant,
            percent(found["accuracy"]),
            f"{found['macs']['mean'] / 1e6:.2f} M",
            f"{found['params']['mean']:,.0f}",
            *(_times(ratio) for ratio in found["speedup"].values()),
        ]
        for variant, found in figures["variants"].items()
    ]
    runtimes = figures["variants"]["dense"]["speedup"]
    widths = figures["widths"][0]
    networks = ("dense", "mild", "aggressive")
    layers = ", ".join(
        f"{layer} {' → '.join(str(widths[network][layer]) for network in networks)}"
        for layer in widths["dense"]
    )
    note = (
        f"Mean ± deviation over {len(figures['widths'])} seeds; widths of the first: {layers}. "
        f"`benchmarks/crnn_mnist.py`, preset `quick`{validity(all(figures['bench_valid']))}."
    )
    headings = ["", "accuracy", "MACs", "parameters", *(f"speed-up, {name}" for name in runtimes)]
    return "\n".join([table(headings, rows), "", note])


def _times(spread: dict[str, float]) -> str:
    return f"{spread['mean']:.2f} ± {spread['deviation']:.2f}x"
