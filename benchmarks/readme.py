"""Write the README's tables again from the committed results.

python benchmarks/readme.py            rewrite README.md
python benchmarks/readme.py --check    exit with 1 where it would change
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from typing import Any

from common import HERE, RESULTS

README = HERE.parent / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    old = new = README.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        block = f"<!-- begin {name} -->\n\n{table(result)}\n\n<!-- end {name} -->"
        new, count = re.subn(
            rf"<!-- begin {name} -->.*<!-- end {name} -->",
            lambda _, block=block: block,
            new,
            flags=re.DOTALL,
        )
        if count != 1:
            sys.exit(f"README.md: expected one block '{name}', found {count}")
    if arguments.check:
        sys.exit(old != new)
    README.write_text(new, encoding="utf-8")


def digits(result: dict[str, Any]) -> str:
    """Mean ± deviation over three seeds."""
    figures = result["figures"]
    runtimes = list(figures["variants"]["dense"]["speedup"])
    rows = [
        [
            variant,
            _percent(found["accuracy"]),
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
            _table(["", "accuracy", "MACs", "parameters", *_headings(runtimes)], rows),
            "",
            f"Mean ± deviation over three seeds; the pair accepts {accepted:.0%} of the test "
            f"images; {seconds:.0f} s a run on {_machine(result)}. `benchmarks/digits.py`, preset "
            f"`quick`{_validity(all(figures['bench_valid']))}.",
        ]
    )


def resnet56_cifar10(result: dict[str, Any]) -> str:
    """One seed, the short schedule."""
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
            _table([*headings, *_headings(runtimes)], rows),
            "",
            f"The certificate: {figures['certificate']['headline']} of the test images. One seed, "
            f"{figures['run_seconds'] / 60:.0f} minutes on {_machine(result)}; batch 1, two "
            "threads, speed-ups are paired ratios of mean latency. The checkpoint had seen all "
            "training images, so that the selector and the certificate took 5,000 of the test "
            f"images. `benchmarks/resnet56_cifar10.py`, preset `{figures['bench_preset']}`"
            f"{_validity(figures['bench_valid'])}.",
        ]
    )


def _headings(runtimes: list[str]) -> list[str]:
    names = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    return [f"{names.get(runtime, runtime)}, mean ms" for runtime in runtimes]


def _percent(spread: dict[str, float]) -> str:
    return f"{spread['mean'] * 100:.2f} ± {spread['deviation'] * 100:.2f}%"


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    virtual = ", virtual" if machine["virtual_machine"] else ""
    return f"{machine['usable_cores']} cores ({machine['cpu']}{virtual})"


def _validity(valid: bool) -> str:
    return "" if valid else ", whose windows varied by more than 5%: an illustration, not a claim"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "digits": digits,
    "resnet56_cifar10": resnet56_cifar10,
}

if __name__ == "__main__":
    main()
