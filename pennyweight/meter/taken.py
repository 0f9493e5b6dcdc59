"""What was metered, added up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Taken:
    """What some stretches took together.

    Attributes:
        seconds: by the clock.
        device_seconds: times the devices that were held.
        cpu_seconds: of the first process's threads.
        joules: by counter (``cpu``, ``gpu``), of the stretches that had one.
        uncounted: device-seconds of stretches without a counter of what did the work.
        stretches: how many; each but the first began after a kill, a stop or a failure.
    """

    seconds: float = 0.0
    device_seconds: float = 0.0
    cpu_seconds: float = 0.0
    joules: dict[str, float] = field(default_factory=dict)
    uncounted: float = 0.0
    stretches: int = 0

    def add(self, line: dict[str, Any]) -> None:
        """One stretch, by its last line."""
        held = line["seconds"] * line["devices"]
        self.seconds += line["seconds"]
        self.device_seconds += held
        self.cpu_seconds += line["cpu"]
        self.stretches += 1
        for name, joules in line["joules"].items():
            self.joules[name] = self.joules.get(name, 0.0) + joules
        if line["on"] not in line["joules"]:
            self.uncounted += held

    def to_json(self) -> dict[str, Any]:
        rounded = {k: round(v, 3) for k, v in vars(self).items() if isinstance(v, float)}
        return {**rounded, "joules": {k: round(v, 3) for k, v in self.joules.items()}, "stretches": self.stretches}
