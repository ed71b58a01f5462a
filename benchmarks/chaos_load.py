"""Gateways that keep their spools busy while `benchmarks.chaos` kills: real spool, uplink and service, made-up values.

    python -m benchmarks.chaos_load --data DIR --rate 200

Runs until SIGTERM: every gateway commits `rate / GATEWAYS` messages a second of READINGS readings each. The gateways
must be in the registry (`extended`).
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from citybrain.clock import monotonic_s
from citybrain.counters import Counters
from citybrain.layout import Layout
from citybrain.model import Device, Gateway, Lane, Place, Reading, Registry
from gateway.service import Broker, GatewayService, poll_all
from gateway.spool import Spool
from gateway.uplink import Uplink

GATEWAYS = 4
READINGS = 10
PLACE = Place(120.16, 31.19, "990101001001001")


def names() -> list[str]:
    return [f"load-{number}" for number in range(GATEWAYS)]


def extended(registry: Registry, shards: int) -> Registry:
    """Return the registry with the load's gateways and devices; other gateways' numbers move by it."""
    gateways = [Gateway(name, number % shards, PLACE) for number, name in enumerate(names())]
    devices = [
        Device(f"{name}-{number}", "meter", name, PLACE, ("value",)) for name in names() for number in range(READINGS)
    ]
    return Registry((*registry.gateways, *gateways), (*registry.devices, *devices), registry.cells, registry.units)


class Source:
    """One gateway and what it has still to say."""

    def __init__(self, layout: Layout, number: int, counters: Counters) -> None:
        run = layout.read_run()
        self.name = names()[number]
        self.shard = number % run.shards
        self.spool = Spool(layout.gateway(self.name), self.name, counters=counters)
        self._broker = Broker(run.host, run.mqtt_port)
        self._clock = run.clock

    def start(self) -> GatewayService:
        self.spool.start()
        return GatewayService(
            Uplink(self.spool, self.name, self.shard), self.name, self.shard, self._broker, self._clock
        )

    def say(self, messages: int) -> None:
        """Commit messages of this moment: durable once this returns, so `chaos` counts them as produced."""
        now_ms = self._clock.now_ms()
        readings = [Reading(f"{self.name}-{n}", now_ms, {"value": float(now_ms % 1000)}) for n in range(READINGS)]
        for _ in range(messages):
            self.spool.append(Lane.TELEMETRY, readings, now_ms)
        self.spool.commit()


def run(layout: Layout, rate: float, stop: threading.Event) -> None:
    counters = Counters("load", layout.run)
    sources = [Source(layout, number, counters) for number in range(GATEWAYS)]
    services = [source.start() for source in sources]
    begun_s, said = monotonic_s(), 0
    while not stop.is_set():
        due = int((monotonic_s() - begun_s) * rate / GATEWAYS) - said
        if due:
            for source in sources:
                source.say(due)
            said += due
        poll_all(services, 0.02)
        counters.gauges["spooled"] = float(sum(source.spool.spooled() for source in sources))
        counters.publish()
    deadline_s = monotonic_s() + 20.0
    while any(source.spool.spooled() for source in sources) and monotonic_s() < deadline_s:
        poll_all(services, 0.02)
    for service in services:
        service.close(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=200.0, help="messages a second, all gateways together")
    options = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    run(Layout(options.data), options.rate, stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
