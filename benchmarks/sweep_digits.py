"""Twelve points of the default job through two Ray workers, killed half-way and resumed.

    python benchmarks/sweep_digits.py [--runs DIR] [--set KEY=VALUE ...]

The driver and all that is in its process group get SIGKILL when half of the points are finished;
the same command then goes on, and must leave untouched what was there. The front against latency
goes to docs/front_digits.svg. Latencies are of the preset 'quick' and meant as an illustration.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from common import HERE, write_result

from greenprune import storage, sweep_record, sweep_report
from greenprune.nncec.report import TEMPLATES

NAME = "sweep-digits"
PICTURE = HERE.parent / "docs" / "front_digits.svg"
POINTS = (
    *(f"macs x{share}" for share in (0.6, 0.4, 0.25, 0.15, 0.1, 0.07, 0.05, 0.035)),
    *(f"params x{share}" for share in (0.2, 0.1, 0.05)),
    "macs x0.2,params x0.1",
)
SETTINGS = ("data.development=300", "prune.width_multiple=2", "prune.keep_at_least=0.05")
"""Networks narrow enough to differ, and images enough to tell."""


def command(runs: Path, overrides: list[str]) -> list[str]:
    points = [part for texts in POINTS for part in ("--budgets", texts)]
    changes = [part for change in (*SETTINGS, *overrides) for part in ("--set", change)]
    script = str(Path(sys.executable).with_name("greenprune"))
    options = ["--workers", "2", "--name", NAME, "--runs", str(runs), "--json", *changes]
    return [script, "sweep", *points, *options]


def finished(folder: Path) -> dict[str, tuple[str, int]]:
    """Every finished stage and point: checksum and time."""
    return {
        str(path.relative_to(folder)): (storage.sha256(path), path.stat().st_mtime_ns)
        for pattern in ("*/*/stage.json", "*/point.json")
        for path in folder.glob(pattern)
    }


def killed_half_way(line: list[str], folder: Path) -> dict[str, Any]:
    """Start the sweep, kill it when half of the points are there; what was there then."""
    begin = time.monotonic()
    process = subprocess.Popen(line, start_new_session=True, stdout=subprocess.DEVNULL)
    while len(list(folder.glob("*/point.json"))) < len(POINTS) // 2:
        if process.poll() is not None:
            sys.exit(f"the sweep ended by itself, with status {process.returncode}")
        time.sleep(0.2)
    others = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(others, timeout=120)
    return {
        "seconds": time.monotonic() - begin,
        "points_finished": len(list(folder.glob("*/point.json"))),
        "stages_finished": len(list(folder.glob("*/*/stage.json"))),
        "processes_killed": 1 + len(others),
        "processes_left": len(alive),
    }


def draw(folder: Path) -> None:
    """The first plot of the page as a picture of its own, in the page's colours."""
    (front,) = sweep_record.fronts(sweep_record.read(folder))
    svg = sweep_report.plots(front)[0].svg
    colours = (TEMPLATES / "report.css").read_text().partition("* { box-sizing")[0]
    style = f"<style>{colours}svg {{ color: var(--ink); background: var(--paper); }}</style>"
    place = svg.index(">") + 1
    storage.write_text(PICTURE, svg[:place] + style + svg[place:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = (arguments.runs or Path(scratch)).absolute()
        folder, line = runs / NAME, command(runs, arguments.overrides)
        begin = time.monotonic()
        killed = killed_half_way(line, folder)
        before = finished(folder)
        again = time.monotonic()
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        answer = json.loads(done.stdout)
        after = finished(folder)
        draw(folder)
        figures = {
            "points": len(POINTS),
            "killed": killed,
            "resumed_seconds": time.monotonic() - again,
            "done_again": sorted(name for name in before if before[name] != after.get(name)),
            "fronts": answer["fronts"],
            "found": answer["points"],
        }
        print(
            write_result("sweep_digits", seed=0, seconds=time.monotonic() - begin, figures=figures)
        )


if __name__ == "__main__":
    main()
