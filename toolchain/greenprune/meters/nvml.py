"""NVIDIA's GPUs through NVML: the board's energy counter, or its power where there is none.

GPUs are those that CUDA_VISIBLE_DEVICES shows to this process. Written from the public documents;
it has not run on a GPU.
"""

from __future__ import annotations

import os
from functools import partial
from types import ModuleType
from typing import Any

from greenprune.errors import MeasurementError
from greenprune.meters.clock import Clock
from greenprune.meters.counters import Counter, CounterDevice
from greenprune.meters.sampling import PowerDevice, Watts

POWER_PERIOD_SECONDS = 0.1
"""GPUs without an energy counter, older than Volta, renew their power at least so often."""
POWER_SAMPLE_SECONDS = 0.02


def is_here() -> bool:
    """Whether there is a GPU, and CUDA_VISIBLE_DEVICES does not hide them all.

    Raises:
        MeasurementError: there is a driver, and it fails.
    """
    try:
        pynvml = _start()
    except MeasurementError:
        return False
    try:
        found = pynvml.nvmlDeviceGetCount() > 0
    except pynvml.NVMLError as error:
        raise _refused(error) from error
    return found and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


def open_nvml(clock: Clock) -> tuple[CounterDevice | PowerDevice, str]:
    """The device of the visible GPUs, and its scope.

    Raises:
        MeasurementError: no driver, no visible GPU, a MIG slice, or a GPU that tells neither energy
            nor power.
    """
    pynvml = _start()
    gpus = visible_gpus(pynvml)
    if not gpus:
        raise MeasurementError(
            "NVML: no GPU is visible to this process; CUDA_VISIBLE_DEVICES = "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES')!r}"
        )
    names = [f"{_text(pynvml.nvmlDeviceGetName(gpu))} {uuid}" for uuid, gpu in gpus.items()]
    scope = f"the whole board of {', '.join(names)}"
    energy = pynvml.nvmlDeviceGetTotalEnergyConsumption
    counters = [Counter(uuid, partial(_ask, energy, gpu, 1000)) for uuid, gpu in gpus.items()]
    try:
        for gpu in gpus.values():
            energy(gpu)
        return CounterDevice(counters, clock), scope
    except pynvml.NVMLError_NotSupported:
        return _open_power(pynvml, list(gpus.values()), clock), scope
    except pynvml.NVMLError as error:
        raise _refused(error) from error


def _open_power(pynvml: ModuleType, gpus: list[Any], clock: Clock) -> PowerDevice:
    def read_watts() -> Watts:
        watts = sum(_ask(pynvml.nvmlDeviceGetPowerUsage, gpu, 1) for gpu in gpus) / 1000
        return watts, watts, watts

    return PowerDevice(
        "NVML power",
        read_watts,
        clock,
        sample_seconds=POWER_SAMPLE_SECONDS,
        period_seconds=POWER_PERIOD_SECONDS,
        lag_seconds=2 * POWER_PERIOD_SECONDS,
    )


def _start() -> ModuleType:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise MeasurementError(
            f"NVML: no NVIDIA driver answers here ({error}); --meter auto takes what this machine "
            "has"
        ) from error
    module: ModuleType = pynvml
    return module


def _ask(function: Any, gpu: Any, factor: int) -> int:
    import pynvml

    try:
        return int(function(gpu)) * factor
    except pynvml.NVMLError as error:
        raise _refused(error) from error


def _refused(error: Exception) -> MeasurementError:
    return MeasurementError(
        f"NVML: the GPU does not tell its energy or power ({error}); on a Jetson use --meter ina, "
        "elsewhere --meter estimate"
    )


def _text(found: Any) -> str:
    return found.decode() if isinstance(found, bytes) else str(found)


def visible_gpus(pynvml: ModuleType) -> dict[str, Any]:
    """NVML's handles by UUID, in the order of CUDA_VISIBLE_DEVICES; all where it is not set.

    As CUDA does, entries after one that names no GPU are not seen.

    Raises:
        MeasurementError: a MIG slice is asked for, or an index among unlike GPUs, whose order CUDA
            and NVML do not share.
    """
    try:
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        uuids = [_text(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        models = {_text(pynvml.nvmlDeviceGetName(handle)) for handle in handles}
    except pynvml.NVMLError as error:
        raise _refused(error) from error
    everything = dict(zip(uuids, handles, strict=True))
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is None:
        return everything
    chosen: dict[str, Any] = {}
    for entry in (part.strip() for part in asked.split(",")):
        uuid = _uuid_of(entry, uuids, len(models) > 1)
        if uuid is None:
            break
        chosen[uuid] = everything[uuid]
    return chosen


def _uuid_of(entry: str, uuids: list[str], unlike: bool) -> str | None:
    problem = ""
    if entry.startswith("MIG-"):
        problem = "NVML has no energy of a MIG slice, only of the whole GPU; name the GPU's UUID"
    elif entry.isdigit() and unlike and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        problem = (
            "GPUs of several models are here, and CUDA and NVML number them differently; "
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name UUIDs"
        )
    if problem:
        raise MeasurementError(f"CUDA_VISIBLE_DEVICES: {entry}: {problem}")
    if entry.isdigit():
        return uuids[int(entry)] if int(entry) < len(uuids) else None
    found = [uuid for uuid in uuids if entry and uuid.startswith(entry)]
    return found[0] if len(found) == 1 else None
