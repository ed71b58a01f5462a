"""`citybrain simulate --offline`: days of the district through the whole product in one process, in seconds.

The same spool, wire, ingest, log, engine and desk as live (`simulators.pipeline`), in steps of virtual time. Disks are
written as live, but synced once in a while (`LazyFiles`): no crash is survived here, and nobody waits for an answer.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from citybrain.clock import DAY_MS, HOUR_MS, SECOND_MS, monotonic_s
from citybrain.db.schema import alarms, cases, incidents
from citybrain.errors import UsageError
from citybrain.layout import Layout
from citybrain.storage import OsFiles, OsHandle, storage_error
from edge.agent import Agent
from rules.categories import load_categories
from rules.files import library
from simulators.district import District
from simulators.faults import ANNOUNCED_MS, Cause, Schedule, truth_of, write_truth
from simulators.pipeline import Pipeline
from simulators.sensors import Sensors, Vitals
from streams.log import Control
from streams.ruleset import RuleSet

ORIGIN_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z: any day does, but always the same one
STEP_MS = 10 * SECOND_MS
SYNC_MS = HOUR_MS


class LazyHandle(OsHandle):
    """A file whose sync only notes that it is due."""

    def __init__(self, path: Path, descriptor: int, dirty: set[LazyHandle]) -> None:
        super().__init__(path, descriptor)
        self._dirty = dirty

    def sync(self) -> None:
        self._dirty.add(self)

    def sync_now(self) -> None:
        super().sync()

    def close(self) -> None:
        if self in self._dirty:
            self._dirty.discard(self)
            super().sync()
        super().close()


class LazyFiles(OsFiles):
    """The real disk, synced when `flush` is called instead of at each commit."""

    def __init__(self) -> None:
        self._dirty: set[LazyHandle] = set()

    def append(self, path: Path) -> LazyHandle:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise storage_error(path, error) from error
        return LazyHandle(path, descriptor, self._dirty)

    def flush(self) -> None:
        """Sync every file that asked for it; raises StorageError."""
        for handle in self._dirty:
            handle.sync_now()
        self._dirty.clear()


class Offline:
    """One district on its way through a pipeline."""

    def __init__(self, layout: Layout, district: District, schedule: Schedule, ruleset: RuleSet) -> None:
        self.files = LazyFiles()
        self.readings = 0
        self.pipeline = Pipeline(
            layout, district.registry, ruleset, load_categories(), seed=district.seed, files=self.files
        )
        self._district = district
        self._schedule = schedule
        self._agents: dict[str, tuple[Agent, int]] = {}
        self._cut: set[str] = set()
        self._synced_ms = 0

    def start(self, now_ms: int) -> None:
        """Open the stores and put the district in force."""
        self.pipeline.start(now_ms)
        for gateway in self._district.registry.gateways:
            spool = self.pipeline.uplinks[gateway.id].spool
            sensors = Sensors(self._district, gateway.id, self._schedule)
            agent = Agent([Vitals(gateway.id, spool), sensors], spool)
            self.readings += agent.step(now_ms + sensors.skew_ms)  # what stands when they are switched on
            self._agents[gateway.id] = (agent, sensors.skew_ms)

    def step(self, now_ms: int) -> None:
        """Let the district live until `now_ms` and carry what it said through to the desk."""
        self._schedule.advance(now_ms)
        permits = [permit(cause, now_ms) for cause in self._announced(now_ms)]
        self.pipeline.control(permits, now_ms)
        for name, (agent, skew_ms) in self._agents.items():
            self.readings += agent.step(now_ms + skew_ms)
            self._line(name, now_ms)
        self.pipeline.tick(now_ms)
        self.pipeline.step(now_ms)
        if now_ms - self._synced_ms >= SYNC_MS:
            self.files.flush()
            self._synced_ms = now_ms

    def _announced(self, now_ms: int) -> list[Cause]:
        coming = self._schedule.causes(now_ms + ANNOUNCED_MS - STEP_MS, now_ms + ANNOUNCED_MS)
        return [cause for cause in coming if cause.kind == "authorised_use"]

    def _line(self, gateway: str, now_ms: int) -> None:
        cut = self._schedule.offline(gateway, now_ms)
        if cut != (gateway in self._cut):
            self.pipeline.online(gateway, not cut, now_ms)
            (self._cut.add if cut else self._cut.discard)(gateway)

    def finish(self, now_ms: int) -> None:
        """Carry what the agents still hold through to the desk, and sync everything."""
        for agent, skew_ms in self._agents.values():
            agent.flush(now_ms + skew_ms)
        self.pipeline.step(now_ms)
        self.files.flush()


def permit(cause: Cause, now_ms: int) -> Control:
    """Return the override that permits an authorised use."""
    from_ms, until_ms = cause.permit
    return Control(
        "override", now_ms, "simulator", "", cause.centre, "hydrant_illegal_use", from_ms, until_ms, "authorised use"
    )


def run_offline(layout: Layout, district: District, days: float, ruleset: RuleSet | None = None) -> dict[str, Any]:
    """Simulate `days` from a fixed date on; leave stores and truth in an empty folder, return what was counted.

    ruleset: the library's unless given. Raises UsageError where the folder is not empty or `days` not positive.
    """
    if not 0 < days <= 366:
        raise UsageError(f"--days {days:g}: expected more than 0, at most 366")
    if layout.root.exists() and any(layout.root.iterdir()):
        raise UsageError(f"{layout.root}: not empty; give a new folder with --out DIR")
    began_s = monotonic_s()
    end_ms = ORIGIN_MS + round(days * DAY_MS / STEP_MS) * STEP_MS
    schedule = Schedule(district, district.seed, ORIGIN_MS, until_ms=end_ms)
    offline = Offline(layout, district, schedule, ruleset or library())
    offline.start(ORIGIN_MS)
    for now_ms in range(ORIGIN_MS + STEP_MS, end_ms + STEP_MS, STEP_MS):
        offline.step(now_ms)
    offline.finish(end_ms)
    causes = schedule.causes(ORIGIN_MS, end_ms)
    write_truth(layout.truth, [truth_of(cause, district) for cause in causes])
    result = summary(offline)
    offline.pipeline.close()
    return {**result, "causes": len(causes), "seconds": round(monotonic_s() - began_s, 1)}


def summary(offline: Offline) -> dict[str, Any]:
    """Return how many readings there were, and how many rows of each kind the desk made of them."""
    store = offline.pipeline.store
    assert store is not None  # it was started
    with store.begin() as connection:
        rows = connection.execute(select(cases.c.kind, func.count().label("n")).group_by(cases.c.kind))
        orders: dict[str, int] = {row.kind: row.n for row in rows}
        counts = {
            name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for name, table in (("alarms", alarms), ("incidents", incidents))
        }
    return {
        "readings": offline.readings,
        **counts,
        "cases": orders.get("case", 0),
        "rescues": orders.get("rescue", 0),
        "maintenance": orders.get("maintenance", 0),
    }
