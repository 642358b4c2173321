"""A CNN-RNN the whole way: CRNN on MNIST by the built-in recipe, once for each of three seeds.

    python benchmarks/crnn_mnist.py --data=MNIST [--runs DIR]

Trained, pruned in its convolutions and in its LSTM, fine-tuned, exported, compiled and measured
(preset 'quick': an illustration). Figures are mean and deviation over the seeds, at the last epoch.
Runs that are there already are resumed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from common import keep_network, write_result
from seeds import SEEDS, over_seeds

from greenprune import api, stage_parts

RECIPE = "crnn-mnist"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()

    begin = time.monotonic()
    overrides = [f'data.path="{arguments.data.resolve()}"']
    figures = over_seeds(RECIPE, overrides, arguments.runs)
    figures["widths"] = [widths(arguments.runs / f"{RECIPE}-{seed}") for seed in SEEDS]
    job = api.open_job(
        RECIPE,
        overrides=[*overrides, f"seed={SEEDS[0]}"],
        runs=arguments.runs,
        name=f"{RECIPE}-{SEEDS[0]}",
    )
    for variant in ("mild", "aggressive"):
        stage = job.place(f"finetune-{variant}")
        keep_network(stage / stage_parts.NETWORK, f"crnn_mnist_{variant}")
    seconds = time.monotonic() - begin
    print(write_result("crnn_mnist", seed=SEEDS[0], seconds=seconds, figures=figures))


def widths(run: Path) -> dict[str, Any]:
    """Of every layer that can be pruned, before and after."""
    results = json.loads((run / "prune" / "stage.json").read_text(encoding="utf-8"))["results"]
    pruned = {variant: results[variant]["widths"] for variant in ("mild", "aggressive")}
    return {"dense": results["mild"]["dense_widths"], **pruned}


if __name__ == "__main__":
    main()
