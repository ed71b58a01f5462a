"""A driver for the tests of orders: it answers every request with its device's name, or cannot open its port."""

from __future__ import annotations

from typing import Literal

import msgspec

from citybrain.errors import Unavailable
from citybrain.model import Lane, Reading
from edge.driver import Host

PROCESS = False
DEADLINE_S = 5.0


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """behaviour: `ask` answers, `crash` ends at once."""

    device: str
    behaviour: Literal["ask", "crash"] = "ask"

    def devices(self) -> tuple[str, ...]:
        """Name the one device."""
        return (self.device,)


class Scripted:
    """One instance."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def run(self, host: Host) -> None:
        """Do it."""
        if self._config.behaviour == "crash":
            raise Unavailable("/dev/ttyUSB9 is not there")
        host.put(Lane.TELEMETRY, Reading(self._config.device, host.now_ms(), {"value": 1.0}))
        while not host.wait(1.0):
            for request in host.requests():
                host.answer(request.id, ok=True, text=self._config.device)


def make(_name: str, config: Config) -> Scripted:
    """Make one."""
    return Scripted(config)
