"""Does a measurement come out the same when it is made again? `standard`, five times.

    python benchmarks/repeatability.py --bundle=digits.bundle --runs=repeatability [--threads 1]

The same bundle, one runtime, five runs one after the other; a run's results are kept under --runs
and not measured again. For each variant: of the 20 ordered pairs of runs, how many have the second
one's median latency inside the first one's interval, and the coefficient of variation of the five
medians. At least 14 pairs, and at most 3 %. With one thread a virtual machine's neighbours disturb
least: two that must meet after each layer wait for whichever core was taken away.
"""

from __future__ import annotations

import argparse
import time
from itertools import permutations
from pathlib import Path
from typing import Any

from common import write_result

from greenprune import schema
from greenprune.errors import MeasurementError
from greenprune.harness import PRESETS, Results, bench, read_results, write_results
from greenprune.harness.statistics import coefficient_of_variation

RUNS = 5
PAIRS_WANTED = 14
COV_ALLOWED = 0.03
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument(
        "--runs", type=Path, required=True, help="where each run's results are kept"
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="standard")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()

    begin = time.monotonic()
    found = []
    for number in range(RUNS):
        name = f"{arguments.preset}-{arguments.runtime}-{arguments.threads}-{number}.json"
        path = arguments.runs / name
        found.append(one_run(path, arguments, number))
        print(
            number, {c.variant: round(c.latency_ms["p50"].value, 5) for c in found[-1].candidates}
        )
    figures = {
        "preset": arguments.preset,
        "runtime": arguments.runtime,
        "bundle": found[0].bundle,
        "threads": found[0].threads,
        "wanted": {"pairs": f"{PAIRS_WANTED} of {RUNS * (RUNS - 1)}", "cov": COV_ALLOWED},
        "variants": {c.variant: judge(found, c.variant) for c in found[0].candidates},
        "runs": [{"created": r.created, "verdict": schema.encode(r.verdict)} for r in found],
    }
    for variant, judged in figures["variants"].items():
        print(
            variant, {q: {k: v for k, v in f.items() if k != "medians"} for q, f in judged.items()}
        )
    seconds = sum(results.seconds for results in found)
    name = (
        "repeatability" if arguments.preset == "standard" else f"repeatability_{arguments.preset}"
    )
    print(write_result(name, seed=SEED, seconds=seconds, figures=figures, script="repeatability"))
    print(f"{time.monotonic() - begin:.0f} s of them now")


def one_run(path: Path, arguments: argparse.Namespace, number: int) -> Results:
    """The results in ``path``, measured now if they are not there."""
    if path.exists():
        kept = read_results(path)
        if kept.preset != arguments.preset:
            raise MeasurementError(f"{path}: preset {kept.preset}, expected {arguments.preset}")
        return kept
    results = bench(
        arguments.bundle,
        preset=arguments.preset,
        runtimes=[arguments.runtime],
        threads=arguments.threads,
        seed=SEED + number,
    )
    write_results(path, results)
    return results


def judge(runs: list[Results], variant: str) -> dict[str, dict[str, Any]]:
    """Median latency, and joules where a counter measured them, over the runs."""
    found = [each for results in runs for each in results.candidates if each.variant == variant]
    p50 = [each.latency_ms["p50"] for each in found]
    judged = {"latency_ms": repeated([interval for interval in p50 if interval is not None])}
    energies = [each.energy_mj for each in found if each.energy_mj is not None]
    if len(energies) == RUNS and all(e.provenance.startswith("measured") for e in energies):
        judged["energy_mj"] = repeated(energies)
    return judged


def repeated(runs: list[Any]) -> dict[str, Any]:
    """Of medians with intervals: how well each run's interval foretells the others."""
    inside = sum(a.low <= b.value <= a.high for a, b in permutations(runs, 2))
    cov = coefficient_of_variation([run.value for run in runs])
    return {
        "medians": [{"value": run.value, "low": run.low, "high": run.high} for run in runs],
        "pairs_inside": inside,
        "cov": cov,
        "holds": inside >= PAIRS_WANTED and cov <= COV_ALLOWED,
    }


if __name__ == "__main__":
    main()
