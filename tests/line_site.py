"""A driver of a serial line under its supervisor, and what it gave so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from citybrain.clock import system_clock
from citybrain.counters import Counters
from citybrain.model import Lane, Reading
from edge.driver import Quality
from edge.host import Hosts
from gateway.config import parse_config
from tests.conftest import eventually

HEAD = "gateway: gw-1\nshard: 0\nbroker: {host: 127.0.0.1}\ndrivers:\n  line:\n"


class LineSite:
    """One configured driver at work. text: its section of `gateway.yaml`, as flow or block at column 0."""

    def __init__(self, text: str) -> None:
        indented = "".join(f"    {line}\n" for line in text.splitlines())
        self.counters = Counters("gateway")
        self.hosts = Hosts(parse_config(HEAD + indented).drivers, self.counters, system_clock())
        self.hosts.start()
        self.given: list[tuple[Lane, Reading]] = []

    def poll(self) -> None:
        self.given += self.hosts.poll(system_clock().now_ms())

    def until(self, holds: Callable[[], Any], what: str = "the condition", within_s: float = 15.0) -> None:
        def looked() -> object:
            self.poll()
            return holds()

        eventually(looked, within_s, what=what)

    def of(self, device: str, metric: str) -> list[float]:
        """What a device's metric was, in order."""
        return [one.values[metric] for _, one in self.given if one.device == device and metric in one.values]

    def events(self, device: str) -> list[dict[str, float]]:
        """What a device said in the event lane."""
        return [dict(one.values) for lane, one in self.given if lane is Lane.EVENT and one.device == device]

    def quality(self, device: str) -> Quality | None:
        """How far it is trusted now."""
        told = self.of(device, "quality")
        return Quality(int(told[-1])) if told else None

    def dropped(self, reason: str) -> int:
        return self.counters.values[f"dropped_total{{reason={reason}}}"]
