"""The tables of docs/results.md about targets and the runtime, each from its result files."""

from __future__ import annotations

from tables import read, table


def eyeriss() -> str:
    """The simulation beside the published measurements of AlexNet."""
    figures = read("eyeriss")["figures"]
    layers = figures["alexnet"]["layers"]
    rows = [
        [
            name,
            f"{found['measured_share']:.1%}",
            f"{found['simulated_share']:.1%}",
            f"{found['measured_dram_mb']:.1f}",
            f"{found['simulated_dram_mb']:.1f}",
        ]
        for name, found in layers.items()
    ]
    headings = ["AlexNet", "on-chip energy, measured", "simulated", "DRAM MB, measured"]
    half = figures["resnet20_half_width"]
    macs, energy = (half[f"{key}_over_dense"] for key in ("macs", "energy_mac_units"))
    resnets = ", ".join(
        f"{name} {found['energy_mac_units'] / 1e6:,.1f} M"
        for name, found in figures["resnets"].items()
    )
    note = (
        f"Shares of the five layers, {figures['alexnet']['batch']} images. Measured: Chen et al., "
        "JSSC 2017. The chip compresses what it sends to DRAM and skips zeros; the simulation does "
        f"neither. In MAC units: {resnets}; ResNet-20 at half width has {macs:.1%} "
        f"of the MACs and {energy:.1%} of the energy. "
        "`benchmarks/eyeriss.py`."
    )
    return "\n".join([table([*headings, "simulated"], rows), "", note])
