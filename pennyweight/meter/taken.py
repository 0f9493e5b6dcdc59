"""What was metered, added up."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any


def clock() -> float:
    """Seconds since some beginning, those in which the machine was suspended included where the system counts them
    (Linux)."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


@dataclass
class Taken:
    """What some stretches took together.

    Attributes:
        seconds: by the clock.
        device_seconds: times the devices that were held.
        cpu_seconds: of the first process's threads.
        joules: by counter (``cpu``, ``gpu``), of the devices that did the work, in the stretches that had one.
        uncounted: device-seconds of stretches without a counter of what did the work.
        host: joules of the processors beside GPUs that did the work, where they were counted.
        hostless: seconds of work on GPUs in which they were not.
        stretches: how many; each but the first began after a kill, a stop or a failure.
    """

    seconds: float = 0.0
    device_seconds: float = 0.0
    cpu_seconds: float = 0.0
    joules: dict[str, float] = field(default_factory=dict)
    uncounted: float = 0.0
    host: float = 0.0
    hostless: float = 0.0
    stretches: int = 0

    def add(self, line: dict[str, Any]) -> None:
        """One stretch, by its last line."""
        held = line["seconds"] * line["devices"]
        self.seconds += line["seconds"]
        self.device_seconds += held
        self.cpu_seconds += line["cpu"]
        self.stretches += 1
        on, counted = line["on"], line["joules"]
        if on in counted:
            self.joules[on] = self.joules.get(on, 0.0) + counted[on]
        else:
            self.uncounted += held
        if on != "cpu":
            self.host += counted.get("cpu", 0.0)
            self.hostless += 0.0 if "cpu" in counted else line["seconds"]

    def to_json(self) -> dict[str, Any]:
        rounded = {k: round(v, 3) for k, v in vars(self).items() if isinstance(v, float)}
        return {**rounded, "joules": {k: round(v, 3) for k, v in self.joules.items()}, "stretches": self.stretches}
