"""The device side of an `arm` bundle under an emulated aarch64 Debian: does all of it run?

    python benchmarks/arm_emulated.py --root DIR [--suite bookworm]

as root, with Debian's `debootstrap`, `qemu-user-static` and `binfmt-support`. DIR is made by
debootstrap where it is not there yet (ten minutes). On this machine: our wheel, the wheels for
aarch64 that it needs (by pip), and `greenprune cost-table`'s graphs of LeNet-5. Inside, as on a
board: a virtual environment with the base install, `greenprune doctor`, `greenprune targets` and
`greenprune-bench --cost-table`. The table is carried back, LeNet-5 is pruned on digits within
shares of the latency that it tells, by a short schedule, and exported. Inside again:
`greenprune-bench --certify`, an `AdaptiveSession` over the replay images, whose answers are
compared with what the same graphs answer here, and `greenprune-bench`.

Nothing here is a figure of Arm's speed: emulated instructions take many times as long as real ones,
so latencies are left out. Shares of the dense network's latency, as the carried table predicts them
and as they are measured inside, are of the emulated processor, a device of its own. `seconds` says
what each step took under emulation.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import HERE, write_result

from greenprune.bundle import Bundle, open_bundle
from greenprune.registry import load_target

SEED = 0
EMULATOR = Path("/proc/sys/fs/binfmt_misc/qemu-aarch64")
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
SHARES = {"mild": 0.8, "aggressive": 0.6}
"""Budgets: of the dense network's latency, by the carried table."""
SHORT = {
    "threads": 1,
    "compile.target": "arm",
    "train.epochs": 6,
    "sparsify.epochs": 2,
    "finetune.mild.epochs": 2,
    "finetune.aggressive.epochs": 2,
}
"""A schedule of seconds: accuracy is not the question."""
PLACE = Path("opt/greenprune")
"""Below the root: virtual environment, wheels, table and bundle of one run of this script."""
HOME = f"/{PLACE}"
"""The same, from inside."""
ENTER = """
set -e
mount -t proc proc "$1/proc"
mount -t sysfs -o ro sysfs "$1/sys"
mount --bind "$1/$PLACE/cpuinfo" "$1/proc/cpuinfo"
exec chroot "$@"
"""
"""In a mount namespace of its own, so that nothing stays mounted."""
EMULATED_CPU = "cortex-a72"
CPUINFO = """\
processor\t: {number}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""
"""Of one core. The emulator shows this machine's ``/proc/cpuinfo``, and ONNX Runtime, which looks
for an Arm's there, crashes on it as it is loaded."""
SESSION = """
import sys
import numpy as np
from greenprune.runtime import AdaptiveSession
bundle, inputs, answers = sys.argv[1:]
with AdaptiveSession(bundle) as session:
    (logits,), info = session.run_with_info(None, {"input": np.load(inputs)})
np.savez(answers, logits=logits, aggressive=[route == "aggressive" for route in info.routes])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--suite", default="bookworm")
    arguments = parser.parse_args()

    begin = time.monotonic()
    root = arguments.root.resolve()
    make_root(root, arguments.suite)
    place = root / PLACE
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        wheel = collect_wheels(place / "wheels", python_version(root))
        installed = install(root, place, seconds)
        table = carried_table(root, place, seconds)
        bundle, predicted = make_bundle(Path(scratch), table)
        shutil.copytree(bundle, place / "digits.bundle")
    figures = {
        "emulator": first_line(["qemu-aarch64-static", "--version"]),
        "processor": EMULATED_CPU,
        "system": f"Debian {(root / 'etc/debian_version').read_text().strip()}",
        "wheel": wheel,
        **installed,
        "budget": {"asked": SHARES, "predicted": predicted},
        **use(root, place, seconds),
        "seconds": seconds,
    }
    seconds = time.monotonic() - begin
    print(write_result("arm_emulated", seed=SEED, seconds=seconds, figures=figures))
    print(json.dumps(figures, indent=2))


def make_root(root: Path, suite: str) -> None:
    """A minimal Debian for arm64 with Python, unless there is one."""
    if os.geteuid() != 0:
        sys.exit("debootstrap and chroot need root; run it with sudo")
    if not EMULATOR.exists():
        sys.exit(f"{EMULATOR}: not there; apt-get install qemu-user-static binfmt-support")
    if not (root / "usr/lib/python3/dist-packages").is_dir():
        line = ["debootstrap", "--arch=arm64", "--variant=minbase", "--include=python3-venv"]
        host([*line, suite, root])


def collect_wheels(folder: Path, python: str) -> str:
    """Our wheel and what it needs on aarch64, fetched here, so that nothing inside needs the
    network or this machine's settings of pip; the name of ours."""
    pip = [sys.executable, "-m", "pip"]
    host([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, HERE.parent])
    (wheel,) = folder.glob("*.whl")
    platforms = [part for each in PLATFORMS for part in ("--platform", f"{each}_aarch64")]
    wanted = ["--only-binary", ":all:", "--python-version", python, *platforms]
    host([*pip, "download", "--quiet", "--dest", folder, *wanted, wheel])
    return wheel.name


def greenprune(*line: Any) -> None:
    """``greenprune`` here, with the short schedule."""
    settings = [part for key, value in SHORT.items() for part in ("--set", f"{key}={value}")]
    host([Path(sys.executable).with_name("greenprune"), *line, *settings])


def make_bundle(folder: Path, table: Path) -> tuple[Path, dict[str, float]]:
    """An arm bundle of LeNet-5 on digits, within the budgets by ``table``; the shares of the dense
    latency that it predicts."""
    budgets = {f"prune.{name}.budget": [f"latency x{share}"] for name, share in SHARES.items()}
    told = {**budgets, "prune.cost_table": table}
    settings = [part for key, value in told.items() for part in ("--set", f"{key}={value}")]
    greenprune("prune", "--runs", folder, "--name", "digits", *settings)
    made = folder / "digits-arm.bundle"
    export = Path(sys.executable).with_name("greenprune-export")
    host([export, folder / "digits", "--target", "arm", "-o", made])
    results = json.loads((folder / "digits" / "prune" / "stage.json").read_text())["results"]
    found = {name: results[name]["budget"][-1]["quantities"]["latency_ms"] for name in SHARES}
    return made, {name: each["predicted"] / each["dense"] for name, each in found.items()}


def step(
    root: Path, seconds: dict[str, float], name: str, *line: str, passes: tuple[int, ...] = (0,)
) -> str:
    """Run a command inside; what it printed. How long it took goes to ``seconds``."""
    start = time.monotonic()
    done = inside(root, *line)
    seconds[name] = round(time.monotonic() - start, 1)
    print(f"{name}: {seconds[name]} s", flush=True)
    if done.returncode not in passes:
        sys.exit(f"{name} failed inside ({done.returncode}):\n{done.stdout}\n{done.stderr}")
    return done.stdout


def install(root: Path, place: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """The base install inside, and what it finds there."""
    processors = range(os.cpu_count() or 1)
    (place / "cpuinfo").write_text("".join(CPUINFO.format(number=each) for each in processors))
    step(root, seconds, "environment", "python3", "-m", "venv", f"{HOME}/venv")
    wheels = ["--no-index", "--find-links", f"{HOME}/wheels"]
    step(root, seconds, "install", "pip", "install", "--quiet", *wheels, "greenprune")
    doctor = json.loads(step(root, seconds, "doctor", "greenprune", "doctor", "--json"))
    listed = json.loads(step(root, seconds, "targets", "greenprune", "targets", "--json"))
    return {
        "python": doctor["python"],
        "packages": doctor["packages"],
        "machine": first_line(["chroot", root, "uname", "-m"]),
        "targets": {name: found["runtimes_here"] for name, found in listed.items()},
    }


def carried_table(root: Path, place: Path, seconds: dict[str, float]) -> Path:
    """What layers cost inside, measured there from graphs that were written here."""
    greenprune("cost-table", "-o", place / "probe")
    options = ["--threads", str(SHORT["threads"]), "--meter", "none", "-o", f"{HOME}/table.json"]
    step(root, seconds, "table", "greenprune-bench", "--cost-table", f"{HOME}/probe", *options)
    return place / "table.json"


def use(root: Path, place: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Certify, answer and measure inside; what came of it."""
    bundle = f"{HOME}/digits.bundle"
    certify = ["greenprune-bench", bundle, "--certify", "--json"]
    certified = json.loads(step(root, seconds, "certify", *certify))
    opened = open_bundle(place / "digits.bundle")
    (place / "session.py").write_text(SESSION)
    inputs = f"{bundle}/{opened.manifest.samples.replay_inputs}"
    session = ["python", f"{HOME}/session.py", bundle, inputs, f"{HOME}/answers.npz"]
    step(root, seconds, "session", *session)
    quick = ["greenprune-bench", bundle, "--preset", "quick", "--json"]
    # 1: it was measured, and the verdict is that such a noisy machine's figures are not valid
    bench = json.loads(step(root, seconds, "bench", *quick, passes=(0, 1)))
    means = {row["variant"]: row["latency_ms"]["mean"]["value"] for row in bench["candidates"]}
    return {
        "certified_on": certified["selector"]["certified_on"],
        "headline": certified["headline"],
        "session": compare(opened, place / "answers.npz"),
        "benched": [f"{row['variant']} on {row['runtime']}" for row in bench["candidates"]],
        "measured_of_dense": {name: means[name] / means["dense"] for name in SHARES},
    }


def compare(opened: Bundle, path: Path) -> dict[str, Any]:
    """The emulated session's answers against those of this machine's runners, by its routes."""
    target, manifest = load_target("arm"), opened.manifest
    inputs = opened.read_array(manifest.samples.replay_inputs)
    here = {}
    for variant in ("mild", "aggressive"):
        runner = target.open_on_host(opened.artifact(variant, "onnxruntime"), "onnxruntime", 0)
        here[variant] = runner.run(inputs)
        runner.close()
    with np.load(path, allow_pickle=False) as found:
        logits, aggressive = found["logits"], found["aggressive"]
    expected = np.where(aggressive[:, None], here["aggressive"]["logits"], here["mild"]["logits"])
    threshold = manifest.selector.threshold
    routed = np.zeros(len(inputs), bool)
    if threshold is not None:
        routed = here["aggressive"]["score"] >= threshold
    return {
        "images": len(inputs),
        "accepted": int(aggressive.sum()),
        "routed_as_here": int((aggressive == routed).sum()),
        "same_class": int((logits.argmax(1) == expected.argmax(1)).sum()),
        "largest_difference": float(np.abs(logits - expected).max() / np.abs(expected).max()),
    }


def inside(root: Path, *line: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the root, with ``/proc`` and ``/sys``, and an environment of its own."""
    path = f"{HOME}/venv/bin:/usr/bin:/bin"
    clean = ["/usr/bin/env", "-i", f"PATH={path}", "HOME=/root", "LANG=C.UTF-8"]
    clean.append(f"QEMU_CPU={EMULATED_CPU}")
    enter = ENTER.replace("$PLACE", str(PLACE))
    entered = ["unshare", "--mount", "--fork", "--pid", "sh", "-c", enter, "sh", str(root)]
    return subprocess.run([*entered, *clean, *line], capture_output=True, text=True, check=False)


def python_version(root: Path) -> str:
    """As in ``3.11``."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return first_line(["chroot", root, "python3", "-c", code])


def first_line(line: list[Any]) -> str:
    return subprocess.check_output([str(part) for part in line], text=True).splitlines()[0]


def host(line: list[Any]) -> None:
    print(*line, flush=True)
    subprocess.run([str(part) for part in line], check=True)


if __name__ == "__main__":
    main()
