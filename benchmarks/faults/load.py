"""Gateways with planted causes, for `benchmarks.faults`: real spools and uplinks, and a book of what must be found.

    python -m benchmarks.faults.load --data DIR --rate 100

Beside the meters of `benchmarks.chaos_load`, every PLANT_S one more elevator shows a fault for the first and only time,
in turn at all gateways: a fault code that is one case at once, every fifth a trapped passenger, which is one rescue.
Most hold for ever; some end after END_MS. DIR/planted.jsonl says what the gateways' spools hold of it, written once
they do. Killed and started again it goes on where the book ends. SIGTERM: no more causes; the meters go on for LAST_S,
because a rescue is raised by its gateway's time, which they move; then it ends as soon as everything committed is
acknowledged, with exit code 1 where that takes longer than DRAIN_S.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import threading
from pathlib import Path

import msgspec

from benchmarks.chaos_load import GATEWAYS, PLACE, Source, extended, names
from citybrain.clock import monotonic_s
from citybrain.counters import Counters
from citybrain.layout import Layout
from citybrain.model import Cell, Device, Lane, Reading, Registry
from gateway.service import GatewayService, poll_all
from rules.files import library
from simulators.district import UNITS
from streams.ruleset import RuleSet

PLANT_S = 0.5
END_MS = 10_000
LAST_S = 5.0  # the rule of a trapped passenger has a delay of 2 s
DRAIN_S = 120.0
POLL_S = 0.02
FAULT, TRAPPED = "elevator_unintended_movement", "elevator_trapped"


class Said(msgspec.Struct, frozen=True):
    """A line of the book: cause `n` was committed to its gateway's spool at `at` (platform ms), or its end was."""

    n: int
    at: int
    ended: bool = False


def book(layout: Layout) -> Path:
    return layout.root / "planted.jsonl"


def read_book(path: Path, start: int = 0) -> tuple[list[Said], int]:
    """Return the whole lines from a byte on, and where the next one begins."""
    if not path.exists():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return [msgspec.json.decode(line, type=Said) for line in whole.splitlines()], start + len(whole)


def subject(n: int) -> str:
    return f"lift-{n:05d}"


def is_rescue(n: int) -> bool:
    return n % 5 == 4


def ends(n: int) -> bool:
    """Whether a cause ends. No rescue does: it has a delay in the gateway's time, which the event lane overtakes."""
    return n % 4 == 3 and not is_rescue(n)


def gateway_of(n: int) -> int:
    return n % GATEWAYS


def registry_of(shards: int, causes: int) -> Registry:
    """Return a registry with an elevator for every cause, in a cell that somebody answers for."""
    elevators = tuple(
        Device(subject(n), "elevator", names()[gateway_of(n)], PLACE, (), ("fault_code", "occupied"))
        for n in range(causes)
    )
    return extended(Registry((), elevators, (Cell(PLACE.cell, "990101001-G01", "001"),), UNITS), shards)


def ruleset() -> RuleSet:
    """Return the two rules that answer the causes; nothing else is to raise."""
    return RuleSet(tuple(rule for rule in library().rules if rule.id in (FAULT, TRAPPED)))


class Planter:
    """Plants causes, one after the other, and ends some of them; the book is what it remembers."""

    def __init__(self, layout: Layout, sources: list[Source], causes: int) -> None:
        self._sources = sources
        self._causes = causes
        said, _ = read_book(book(layout))
        self._next = max((one.n for one in said), default=-1) + 1
        over = {one.n for one in said if one.ended}
        self._due = {one.n: one.at + END_MS for one in said if ends(one.n) and one.n not in over}
        self._book = book(layout).open("ab", buffering=0)

    def step(self, now_ms: int) -> None:
        """Plant the next cause, and end what is due."""
        if self._next < self._causes:
            n = self._next
            self._say(n, {"fault_code": 90.0, "occupied": 1.0} if is_rescue(n) else {"fault_code": 5.0}, now_ms)
            self._next += 1
            if ends(n):
                self._due[n] = now_ms + END_MS
        for n in [n for n, due in self._due.items() if due <= now_ms]:
            self._say(n, {"fault_code": 0.0}, now_ms, ended=True)
            del self._due[n]

    def _say(self, n: int, values: dict[str, float], now_ms: int, *, ended: bool = False) -> None:
        spool = self._sources[gateway_of(n)].spool
        spool.append(Lane.EVENT, [Reading(subject(n), now_ms, values)], now_ms)
        spool.commit()
        self._book.write(msgspec.json.encode(Said(n, now_ms, ended)) + b"\n")


def run(layout: Layout, rate: float, causes: int, stop: threading.Event) -> int:
    """Serve until `stop`, then drain; return the exit code."""
    clock = layout.read_run().clock
    counters = Counters("load", layout.run)
    sources = [Source(layout, number, counters) for number in range(GATEWAYS)]
    services = [source.start() for source in sources]
    planter = Planter(layout, sources, causes)
    begun_s = plant_s = monotonic_s()
    said, last_s = 0, math.inf
    while monotonic_s() < last_s:
        due = int((monotonic_s() - begun_s) * rate / GATEWAYS) - said
        if due:
            for source in sources:
                source.say(due)
            said += due
        if stop.is_set():
            last_s = min(last_s, monotonic_s() + LAST_S)
        elif monotonic_s() >= plant_s:
            plant_s = monotonic_s() + PLANT_S  # none is planted for the time that we were stopped
            planter.step(clock.now_ms())
        poll_all(services, POLL_S)
    return drain(sources, services)


def drain(sources: list[Source], services: list[GatewayService]) -> int:
    """Wait until everything is acknowledged; return the exit code."""
    deadline_s = monotonic_s() + DRAIN_S
    while (waiting := any(source.spool.spooled() for source in sources)) and monotonic_s() < deadline_s:
        poll_all(services, POLL_S)
    for service in services:
        service.close(0.2)
    return int(waiting)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=100.0, help="messages a second, all gateways together")
    parser.add_argument("--causes", type=int, default=4000, help="how many elevators the registry has")
    options = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return run(Layout(options.data), options.rate, options.causes, stop)


if __name__ == "__main__":
    sys.exit(main())
