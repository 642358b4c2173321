"""Files of real boards, as their owners published them, in a folder of the test's."""

from __future__ import annotations

import json
from pathlib import Path

MODELS = {
    "orin-nano": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
    "orin-nx": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
    "agx-orin": "NVIDIA Jetson AGX Orin Developer Kit",
    "thor": "NVIDIA Jetson AGX Thor Developer Kit",
    "xavier-nx": "NVIDIA Jetson Xavier NX Developer Kit",
    "agx-xavier": "Jetson-AGX",
    "nano": "NVIDIA Jetson Nano Developer Kit",
}
NVPMODEL = """\
< PARAM TYPE=CLOCK NAME=EMC >
MAX_FREQ /sys/kernel/nvpmodel_emc_cap/emc_iso_cap

< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
GPU MAX_FREQ 612000000

< POWER_MODEL ID=1 NAME=25W >
CPU_ONLINE CORE_0 1
GPU MAX_FREQ 918000000

< POWER_MODEL NAME=MAXN_SUPER ID=2 >
GPU MAX_FREQ -1

< PM_CONFIG DEFAULT=1 >
"""


def write(
    root: Path,
    board: str = "orin-nano",
    l4t: str = "36.4.3",
    *,
    power_mode: int | None = 1,
    available_kib: int = 5_000_000,
    cuda: str = "12.6.68",
) -> Path:
    """A JetPack-like root folder."""
    major, _, revision = l4t.partition(".")
    release = (
        f"# R{major} (release), REVISION: {revision}, GCID: 38968081, BOARD: generic, "
        "EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot\n"
        "TARGET_USERSPACE_LIB_DIR=nvidia\n"
    )
    files = {
        "proc/device-tree/model": MODELS[board] + "\0",
        "proc/meminfo": f"MemTotal:        7802372 kB\nMemFree:          204800 kB\n"
        f"MemAvailable:   {available_kib} kB\nHugePages_Total:       0\n",
        "etc/nv_tegra_release": release,
        "etc/nvpmodel.conf": NVPMODEL,
        "usr/local/cuda/version.json": json.dumps({"cuda": {"name": "CUDA SDK", "version": cuda}}),
    }
    if power_mode is not None:
        files["var/lib/nvpmodel/status"] = f"pmode:{power_mode:04}\n"
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return root
