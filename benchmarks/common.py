"""What every benchmark writes beside its figures: command, machine, versions, seed, seconds."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from greenprune import storage
from greenprune.harness.environment import describe_environment

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ARTIFACTS = HERE / "artifacts"


def write_result(
    name: str, *, seed: int, seconds: float, figures: dict[str, Any], script: str = ""
) -> Path:
    """Write ``results/<name>.json`` and return its path; ``script`` where it has another name."""
    machine = describe_environment()
    versions = machine.pop("versions")
    path = RESULTS / f"{name}.json"
    storage.write_json(
        path,
        {
            "name": name,
            "command": shlex.join(["python", f"benchmarks/{script or name}.py", *_arguments()]),
            "machine": machine,
            "versions": versions,
            "seed": seed,
            "seconds": round(seconds, 1),
            "figures": figures,
        },
    )
    return path


def _arguments() -> list[str]:
    """The command line without the places of one machine."""
    shown = []
    for argument in sys.argv[1:]:
        key, separator, value = argument.rpartition("=")
        shown.append(f"{key}{separator}{Path(value).name if '/' in value else value}")
    return shown


def keep_network(folder: Path, name: str) -> None:
    """Copy a saved network to ``artifacts/<name>``, so that anyone can evaluate it again."""
    destination = ARTIFACTS / name
    with storage.atomic_folder(destination) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
