"""The tables of docs/results.md about pruning, each from its result files."""

from __future__ import annotations

from typing import Any

from common import RESULTS
from tables import machine, percent, read, table


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
        for method, found in sorted(
            figures["methods"].items(), key=lambda item: -item[1]["development"]["mean"]
        )
    ]
    headings = [
        "criterion",
        "as cut",
        "BatchNorm re-estimated",
        f"after {figures['epochs']} epoch(s), development",
        "test",
    ]
    note = (
        f"At most {figures['macs_allowed']:.0%} of the MACs, widths on multiples of "
        f"{figures['width_multiple']}, mean ± deviation over three seeds; the first two columns "
        "are on the development split too. `benchmarks/criteria.py`."
    )
    return "\n".join([table(headings, rows), "", note])


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
    ]
    headings = ["", "strength", "rate", "accuracies as cut", "points as cut", "points, folded"]
    note = (
        "Paired by seed (5), 95% intervals (Student's t), test accuracy straight after the cut. "
        "`benchmarks/cbs_lenet5.py`."
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
