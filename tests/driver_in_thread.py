"""A driver for the tests of the supervisor: it does what its configuration says."""

from __future__ import annotations

import os
import threading
from typing import Literal

import msgspec

from citybrain.errors import Unavailable
from citybrain.model import Lane, Reading
from edge.driver import Host, Quality

PROCESS = False
DEADLINE_S = 0.6
held = threading.Event()  # what a hanging driver waits for, behind its host's back


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """behaviour: `count` readings 0, 1, 2, …; `hang` after one; `crash` after one; `exit` the process; `flood`;
    `flap`: be good at every other reading; `nan`: say no number."""

    device: str
    behaviour: Literal["count", "hang", "crash", "exit", "flood", "flap", "nan"] = "count"
    interval_s: float = 0.02

    def devices(self) -> tuple[str, ...]:
        """Name the one device."""
        return (self.device,)


class Scripted:
    """One instance."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def run(self, host: Host) -> None:
        """Do it."""
        device, behaviour = self._config.device, self._config.behaviour
        number = 0
        while not host.wait(self._config.interval_s):
            number += 1
            value = float("nan") if behaviour == "nan" else float(number)
            for _ in range(10_000 if behaviour == "flood" else 1):
                host.put(Lane.TELEMETRY, Reading(device, host.now_ms(), {"value": value, "battery_v": 3.6}))
            host.put(Lane.EVENT, Reading(device, host.now_ms(), {"fault_code": float(number)}))
            if behaviour == "flap":
                host.quality(device, (Quality.GOOD, Quality.NO_ANSWER)[number % 2], f"try {number}")
            if behaviour == "hang":
                held.wait()
                host.put(Lane.TELEMETRY, Reading(device, host.now_ms(), {"value": -1.0}))
            elif behaviour == "crash":
                raise Unavailable("/dev/ttyUSB9 is not there")
            elif behaviour == "exit":
                os._exit(9)
            for request in host.requests():
                host.blob(request.what.encode())
                host.blob(device.encode(), unmasked=True)
                host.drop("rubbish", 2, "xyz")
                host.quality(device, Quality.GARBLED, "noise")
                host.answer(request.id, ok=True, text=device)


def make(_name: str, config: Config) -> Scripted:
    """Make one."""
    return Scripted(config)
