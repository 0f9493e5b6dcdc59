"""Joules that the machine's own counters have counted: RAPL's of processors, NVML's of GPUs. No torch.

RAPL (Linux, ``/sys/class/powercap``) counts all of a processor package, whoever uses it, and many systems let only root
read it. NVML's total energy is there on data-centre GPUs since Volta; its library comes with the driver.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")

Read = Callable[[], float]
"""Joules since some beginning; OSError where it cannot be read any more"""


class Counters:
    """Joules by counter, ``cpu`` and ``gpu``, from now on; a counter that is not there, or fails, is left out.

    Args:
        gpus: UUIDs of the GPUs that are used.
        powercap: where the system shows RAPL.
    """

    def __init__(self, gpus: Sequence[str] = (), powercap: Path = POWERCAP):
        found = {"cpu": _packages(powercap), "gpu": _devices(gpus)}
        self._sources = {name: sources for name, sources in found.items() if sources}
        self._began = {name: [read() for read in sources] for name, sources in self._sources.items()}

    def joules(self) -> dict[str, float]:
        """Since the beginning."""
        out = {}
        for name, sources in list(self._sources.items()):
            try:
                out[name] = sum(r() - b for r, b in zip(sources, self._began[name], strict=True))
            except OSError:
                del self._sources[name]
        return out


def _packages(powercap: Path) -> list[Read]:
    """The processor packages that may be read."""
    out: list[Read] = []
    for zone in sorted(powercap.glob("*-rapl:*")):
        try:
            if (zone / "name").read_text().startswith("package"):
                most = float((zone / "max_energy_range_uj").read_text()) / 1e6
                out.append(_unwrapped(lambda file=zone / "energy_uj": float(file.read_text()) / 1e6, most))
                out[-1]()
        except (OSError, ValueError):
            return []  # part of a sum would be taken for all of it
    return out


def _unwrapped(read: Read, most: float) -> Read:
    """A counter that begins anew at ``most``, going on; to be read before it has gone all around."""
    state = {"before": 0.0, "rounds": 0.0}

    def on() -> float:
        try:
            now = read()
        except ValueError as e:
            raise OSError(str(e)) from None
        if now < state["before"]:
            state["rounds"] += most
        state["before"] = now
        return state["rounds"] + now

    return on


def _devices(gpus: Sequence[str]) -> list[Read]:
    """The GPUs that count their energy, or none where one of them does not."""
    if not gpus:
        return []
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2():
            return []
        out = [_energy(nvml, uuid) for uuid in gpus]
        for read in out:
            read()
    except (OSError, AttributeError):
        return []
    return out


def _energy(nvml: ctypes.CDLL, uuid: str) -> Read:
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    if nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle)):
        raise OSError(f"NVML knows no {name}")

    def read() -> float:
        if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            raise OSError(f"NVML tells no energy of {name}")
        return millijoules.value / 1000

    return read
