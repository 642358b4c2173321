"""Write the tables of README.md and docs/results.md again from the committed results.

python benchmarks/pages.py            rewrite the pages
python benchmarks/pages.py --check    exit with 1 where they would change

A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; NAME says which.
"""

from __future__ import annotations

import argparse
import re
import sys

import budget_tables
import device_tables
import pruning_tables
from common import HERE
from tables import machine, percent, read, table, validity

PAGES = ("README.md", "docs/results.md")
BLOCK = re.compile(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    changed = []
    for name in PAGES:
        path = HERE.parent / name
        old = path.read_text(encoding="utf-8")
        new = BLOCK.sub(written, old)
        if new != old:
            changed.append(name)
        if not arguments.check:
            path.write_text(new, encoding="utf-8")
    if arguments.check and changed:
        sys.exit(f"{', '.join(changed)}: not what the results say; run python benchmarks/pages.py")


def written(block: re.Match[str]) -> str:
    name = block[1]
    places = (sys.modules[__name__], pruning_tables, device_tables, budget_tables)
    found = next((getattr(place, name) for place in places if hasattr(place, name)), None)
    if found is None:
        sys.exit(f"no table is called '{name}'")
    return f"<!-- begin {name} -->\n\n{found()}\n\n<!-- end {name} -->"


def digits() -> str:
    """Mean ± deviation over three seeds."""
    result = read("digits")
    figures = result["figures"]
    runtimes = list(figures["variants"]["dense"]["speedup"])
    rows = [
        [
            variant,
            percent(found["accuracy"]),
            f"{found['macs']['mean'] / 1e6:.2f} M",
            f"{found['params']['mean']:,.0f}",
            *(f"{found['mean_latency_ms'][runtime]['mean']:.3f}" for runtime in runtimes),
        ]
        for variant, found in figures["variants"].items()
    ]
    accepted = figures["variants"]["pair"]["accept_rate"]["mean"]
    seconds = sum(figures["run_seconds"]) / len(figures["run_seconds"])
    return "\n".join(
        [
            table(["", "accuracy", "MACs", "parameters", *_headings(runtimes)], rows),
            "",
            f"Mean ± deviation over three seeds; the pair accepts {accepted:.0%} of the test "
            f"images; {seconds:.0f} s a run on {machine(result)}. `benchmarks/digits.py`, preset "
            f"`quick`{validity(all(figures['bench_valid']))}.",
        ]
    )


def resnet56_cifar10() -> str:
    """One seed, the short schedule."""
    result = read("resnet56_cifar10")
    figures = result["figures"]
    networks, variants = figures["networks"], figures["on_the_pairs_test_images"]
    runtimes = list(variants["dense"]["latency_ms"])
    dense = variants["dense"]["macs"]
    rows = [
        [
            variant,
            f"{networks[variant]['accuracy']:.2%}" if variant in networks else "",
            f"{found['accuracy']:.2%}",
            f"{found['macs'] / 1e6:.1f} M ({found['macs'] / dense:.0%})",
            f"{found['params']:,}",
            *(
                f"{found['latency_ms'][runtime]['mean']:.2f} ({found['speedup'][runtime]:.2f}x)"
                for runtime in runtimes
            ),
        ]
        for variant, found in variants.items()
    ]
    headings = ["", "accuracy, 10,000 images", "accuracy, the pair's 5,000", "MACs", "parameters"]
    return "\n".join(
        [
            table([*headings, *_headings(runtimes)], rows),
            "",
            f"The certificate: {figures['certificate']['headline']} of the test images. One seed, "
            f"{figures['run_seconds'] / 60:.0f} minutes on {machine(result)}; batch 1, two "
            "threads, speed-ups are paired ratios of mean latency. The checkpoint had seen all "
            "training images, so that the selector and the certificate took 5,000 of the test "
            f"images. `benchmarks/resnet56_cifar10.py`, preset `{figures['bench_preset']}`"
            f"{validity(figures['bench_valid'])}.",
        ]
    )


def _headings(runtimes: list[str]) -> list[str]:
    names = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    return [f"{names.get(runtime, runtime)}, mean ms" for runtime in runtimes]


if __name__ == "__main__":
    main()
