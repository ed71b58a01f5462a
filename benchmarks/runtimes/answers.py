"""The same answers: one log through every runtime while workers join, leave and are killed with -9; then the desk.

differs       transitions of any run that are missing, other than the embedded engine's, or there twice
cases         that the desk makes of the embedded engine's transitions; `alarms` and `incidents` likewise
cases_differ  rows of alarms, incidents and cases that it makes otherwise, or not, of another run's
kills         workers killed with -9; every other disturbance is a worker that joins, and leaves in order
rebalances    how often workers were dealt shards anew, by their own count
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import select

from api.desk import Desk
from benchmarks.runtimes.topics import SERIES, Distributed, Shard, append, differences, own_folder, transitions, worker
from citybrain.clock import HOUR_MS, system_clock
from citybrain.counters import Heartbeat
from citybrain.db.schema import alarms, cases, incidents
from citybrain.db.store import open_store
from citybrain.layout import Active, Layout, Run
from citybrain.model import Registry, Transition
from citybrain.segments import Record
from rules.categories import load_categories
from streams.engine import Engine
from streams.log import Kind, encode_transition
from streams.logs import SegmentStore
from streams.registry import encode_registry

SHARDS = 2
RAISES = 1000  # about so many values pass a limit: the desk decides more slowly than engines compute
TABLES = {"alarms": alarms, "incidents": incidents, "cases": cases}
OPTIONS = ("--snapshot-s", "0.5", "--session-s", "3")

Rows = dict[str, list[dict[str, Any]]]


class Disturbed:
    """One run: workers on the shards, and what happens to them between the pieces of the log."""

    def __init__(self, runtime: Distributed, seed: int) -> None:
        self.runtime = runtime
        self.kills = 0
        self._dice = random.Random(seed)
        self._stack = ExitStack()
        self._alive: dict[str, int] = {}
        self._started: list[str] = []

    def run(
        self, logs: list[list[Record]], expected: list[list[Transition]], workers: int, disturbances: list[str]
    ) -> None:
        """Append the logs piece by piece with a disturbance between two, and wait for the last transition."""
        pieces = len(disturbances) + 1
        with self._stack:
            for _ in range(workers):
                self._start()
            self._settle()
            for number in range(pieces):
                for log, writer in zip(logs, self.runtime.writers, strict=True):
                    append(writer, log[number * len(log) // pieces : (number + 1) * len(log) // pieces])
                if number < len(disturbances):
                    self._disturb(disturbances[number])
            self.runtime.wait([len(found) for found in expected], 120.0)

    def _start(self) -> None:
        one = self.runtime
        name = f"{one.runtime}-{len(self._started)}"
        process = self._stack.enter_context(worker(one.layout, one.address, one.prefix, one.runtime, name, *OPTIONS))
        self._started.append(name)
        self._alive[name] = process.pid

    def _settle(self) -> None:
        """Wait until all shards are had, and by as many of the workers as there are shards for."""
        self.runtime.wait_dealt(list(self._alive))

    def _disturb(self, what: str) -> None:
        victim = self._dice.choice(sorted(self._alive))
        if what == "kill":
            os.kill(self._alive.pop(victim), signal.SIGKILL)  # its shards wait until its session ends
            self.kills += 1
            self._start()
        elif what == "join":
            self._start()
        else:
            os.kill(self._alive.pop(victim), signal.SIGTERM)
        if what == "join" or self._dice.random() < 0.5:  # else it goes on in the middle of it
            self._settle()

    def rebalances(self) -> int:
        """Return how often the workers were dealt shards anew."""
        return sum(self._counted(name) for name in self._started)

    def _counted(self, name: str) -> int:
        path = self.runtime.layout.run / f"{name}.heartbeat.json"
        if not path.exists():  # it was ended before it said anything
            return 0
        return msgspec.json.decode(path.read_bytes(), type=Heartbeat).counters.get("rebalances_total", 0)


def decided(root: Path, content: Layout, registry: str, found: list[list[Transition]]) -> Rows:
    """Return the rows that the desk makes of transitions, in an order that only they determine."""
    layout = own_folder(content, root)
    store = SegmentStore(layout)
    for shard, transitions_ in enumerate(found):
        writer = store.writer("transitions", shard)
        writer.start()
        for one in transitions_:
            writer.append(Kind.TRANSITION, one.received_at, encode_transition(one))
        writer.commit()
        writer.close()
    ruleset = next(one.ruleset for one in found[0])
    layout.write_active(Active(registry, ruleset))
    database = open_store(layout.database)
    desk = Desk(database, layout, range(len(found)), load_categories(), logs=store)
    desk.start()
    last_ms = max(one.received_at for own in found for one in own)
    for now_ms in (last_ms, last_ms + HOUR_MS, last_ms + 24 * HOUR_MS):  # then its timers
        while desk.step(now_ms):
            pass
    with database.connect() as reading:
        rows = {
            name: [dict(row) for row in reading.execute(select(table).order_by(table.c.id)).mappings()]
            for name, table in TABLES.items()
        }
    database.dispose()
    return rows


def both(registries: Iterable[Registry]) -> Registry:
    """Return one registry of all shards."""
    parts = list(registries)
    gateways = tuple(one for part in parts for one in part.gateways)
    return Registry(gateways, tuple(one for part in parts for one in part.devices))


def rows_that_differ(expected: Rows, found: Rows) -> int:
    """Return how many rows are missing, other, or too many."""
    return sum(
        sum(a != b for a, b in zip(own, found[name], strict=False)) + abs(len(own) - len(found[name]))
        for name, own in expected.items()
    )


def measure(
    root: Path,
    address: str,
    values: int,
    seed: int,
    kills: int,
    runtimes: tuple[str, ...] = ("kafka", "faust"),
    workers: tuple[int, ...] = (1, 2),
) -> dict[str, Any]:
    """Return what differs between the runtimes."""
    layout = Layout(root)
    layout.make()
    layout.write_run(Run(clock=system_clock(), shards=SHARDS))
    cities = [Shard(layout, number, max(2, values // RAISES)) for number in range(SHARDS)]
    passes = max(1, values // (SHARDS * SERIES))
    logs = [city.controls + city.passes(0, passes) for city in cities]
    expected = [Engine(shard, layout).process(log) for shard, log in enumerate(logs)]
    registry = layout.put_blob(encode_registry(both(city.registry for city in cities)))
    wanted = decided(root / "desk-embedded", layout, registry, expected)
    total = {"differs": 0, "cases_differ": 0, "kills": 0, "rebalances": 0}
    runs = [(runtime, count) for runtime in runtimes for count in workers]
    for number, (runtime, count) in enumerate(runs):
        one = Distributed(own_folder(layout, root / f"{runtime}-{count}"), address, runtime, SHARDS)
        disturbed = Disturbed(one, seed + number)
        disturbed.run(logs, expected, count, ["kill", "join", "leave"] * kills)
        found = transitions(one.store, SHARDS)
        rows = decided(root / f"desk-{runtime}-{count}", layout, registry, found)
        total["differs"] += differences(expected, found)
        total["cases_differ"] += rows_that_differ(wanted, rows)
        total["kills"] += disturbed.kills
        total["rebalances"] += disturbed.rebalances()
    counted = {name: len(rows) for name, rows in wanted.items()}
    return {**counted, **total, "runs": [f"{runtime}, {count} workers" for runtime, count in runs]}
