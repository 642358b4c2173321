"""The default job, LeNet-5 on scikit-learn's digits, once for each of three seeds.

    python benchmarks/digits.py [--runs DIR]

Each seed is a run of its own from nothing, in the folder given. Figures are mean and deviation over
the seeds, at the last epoch; latencies are of the preset 'quick' and meant as an illustration.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from common import write_result
from seeds import SEEDS, over_seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        begin = time.monotonic()
        figures = over_seeds("lenet5-digits", [], arguments.runs or Path(scratch))
        seconds = time.monotonic() - begin
        print(write_result("digits", seed=SEEDS[0], seconds=seconds, figures=figures))


if __name__ == "__main__":
    main()
