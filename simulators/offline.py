"""`citybrain simulate --offline`: days of a district through the whole product at full speed, in virtual time.

The same spool, wire, ingest, log, engine and desk as live (`simulators.pipeline`), in steps of virtual time. The shards
of a large district are shared among processes (`simulators.field`), each block of half an hour ahead of the desk;
nothing flows back, so the result does not depend on how many there are. Disks are written as live, but synced once in
a while (`LazyFiles`): no crash is survived here, and nobody waits for an answer.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import func, select

from citybrain.clock import DAY_MS, HOUR_MS, monotonic_s
from citybrain.db.schema import alarms, cases, incidents
from citybrain.errors import StorageError, UsageError
from citybrain.layout import Active, Layout
from citybrain.model import Transition
from citybrain.storage import OsFiles, OsHandle, storage_error
from rules.categories import load_categories
from rules.files import library
from simulators.district import District
from simulators.faults import Schedule, large, truth_of, write_truth
from simulators.field import BLOCK_MS, STEP_MS, Field, Swap
from simulators.pipeline import Office, Stream, prepare, shards_of
from streams.registry import encode_registry
from streams.ruleset import RuleSet

ORIGIN_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z: any day does, but always the same one
SYNC_MS = 12 * HOUR_MS
PROCESSES = 2  # of a large district
REPLACED = ("stuck_sensor",)  # causes at whose end the asset gets another sensor


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
    """The real disk, synced when `flush` is called instead of at each commit; marks keep their files open."""

    def __init__(self) -> None:
        self._dirty: set[LazyHandle] = set()
        self._marks: dict[Path, int] = {}

    def mark(self, path: Path, value: int) -> None:
        try:
            if path not in self._marks:
                self._marks[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640)
            os.pwrite(self._marks[path], value.to_bytes(8, "little"), 0)
        except OSError as error:
            raise storage_error(path, error) from error

    def close(self) -> None:
        """Sync what is left and close the marks."""
        self.flush()
        for descriptor in self._marks.values():
            os.close(descriptor)
        self._marks.clear()

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


class Part(msgspec.Struct, frozen=True):
    """What one process simulates: some shards of a district, from its origin to an end (Unix ms)."""

    root: str
    district: District
    shards: tuple[int, ...]
    active: Active
    swaps: tuple[Swap, ...]
    end_ms: int


class Block(msgspec.Struct, frozen=True):
    """What came of a block of time: the transitions of some shards, and how many readings there were by now."""

    transitions: list[Transition]
    readings: int
    error: str = ""


def blocks(end_ms: int) -> list[tuple[int, int]]:
    """Return the blocks (from, to) of a run."""
    return [(start, min(start + BLOCK_MS, end_ms)) for start in range(ORIGIN_MS, end_ms, BLOCK_MS)]


def simulate(part: Part) -> Iterator[Block]:
    """Simulate a part, block by block; raises StorageError, ConfigError."""
    files = LazyFiles()
    schedule = Schedule(part.district, part.district.seed, ORIGIN_MS, until_ms=part.end_ms)
    stream = Stream(
        Layout(Path(part.root)), part.district.registry, part.shards, seed=part.district.seed, files=files,
        publishes=False,
    )  # fmt: skip
    stream.start(ORIGIN_MS, part.active)
    field = Field(stream, schedule, part.swaps)
    field.start(ORIGIN_MS)
    for start_ms, to_ms in blocks(part.end_ms):
        yield Block(field.block(start_ms, to_ms), field.readings)
        if to_ms % SYNC_MS == 0:
            files.flush()
    stream.close()
    files.close()


def work(pipe: Connection, part: Part) -> None:
    """Simulate a part in a process of its own, which tells its blocks through a pipe."""
    encode = msgspec.msgpack.encode
    try:
        for block in simulate(part):
            pipe.send_bytes(encode(block))
    except (OSError, ValueError, RuntimeError, LookupError, StorageError) as error:
        pipe.send_bytes(encode(Block([], 0, f"{type(error).__name__}: {error}")))
        raise
    finally:
        pipe.close()


class Worker:
    """A part in a process of its own."""

    def __init__(self, part: Part) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=work, args=(theirs, part), daemon=True)
        self._process.start()
        theirs.close()

    def __iter__(self) -> Iterator[Block]:
        decoder = msgspec.msgpack.Decoder(Block)
        while True:
            try:
                block = decoder.decode(self._pipe.recv_bytes())
            except EOFError:
                return
            if block.error:
                raise StorageError(f"a simulating process ended: {block.error}")
            yield block

    def close(self) -> None:
        """Stop it where it still runs."""
        self._pipe.close()
        self._process.terminate()
        self._process.join()


def swaps_of(layout: Layout, district: District, schedule: Schedule, end_ms: int) -> tuple[Swap, ...]:
    """Return when which asset gets another sensor; the registries that say so are put into `layout`.

    A sensor that stuck is replaced, which is what ends it.
    """
    if not large(district):
        return ()
    registry, found = district.registry, list[Swap]()
    ended = sorted((c for c in schedule.causes(ORIGIN_MS, end_ms) if c.kind in REPLACED), key=lambda c: c.end_ms)
    for number, cause in enumerate(ended):
        device = next(d for d in registry.devices if d.id == cause.centre)
        wire = f"{device.wire_id}-{number + 2}"
        devices = tuple(msgspec.structs.replace(d, sensor=wire) if d is device else d for d in registry.devices)
        registry = msgspec.structs.replace(registry, devices=devices)
        found.append(Swap(cause.end_ms, device.id, wire, layout.put_blob(encode_registry(registry))))
    return tuple(found)


class Desk:
    """The desk's side of a run: takes the blocks of all parts, step by step."""

    def __init__(self, layout: Layout, office: Office, active: Active, swaps: Sequence[Swap]) -> None:
        self._layout = layout
        self._office = office
        self._active = active
        self._swaps = deque(swaps)

    def start(self) -> None:
        """Open the stores; the registry is in force from the first step on."""
        self._office.start()
        self._layout.write_active(self._active)

    def block(self, from_ms: int, to_ms: int, transitions: Sequence[Transition]) -> None:
        """Take what was caused in a block, each transition in the step in which its record was written."""
        waiting = deque(sorted(transitions, key=lambda one: (one.received_at, one.shard, one.source, one.index)))
        for now_ms in range(from_ms + STEP_MS, to_ms + STEP_MS, STEP_MS):
            while self._swaps and self._swaps[0].at_ms <= now_ms:
                self._active = msgspec.structs.replace(self._active, registry=self._swaps.popleft().registry)
                self._layout.write_active(self._active)
            due: list[Transition] = []
            while waiting and waiting[0].received_at <= now_ms:
                due.append(waiting.popleft())
            if due:
                self._office.write(due)
            self._office.decide(now_ms)


def run_offline(
    layout: Layout, district: District, days: float, ruleset: RuleSet | None = None, processes: int | None = None
) -> dict[str, Any]:
    """Simulate `days` from a fixed date on; leave stores and truth in an empty folder, return what was counted.

    ruleset: the library's unless given. processes: how many simulate beside this one (default: 2 for a large district,
    else 0: all is done in this one). Raises UsageError where the folder is not empty or `days` not positive.
    """
    if not 0 < days <= 366:
        raise UsageError(f"--days {days:g}: expected more than 0, at most 366")
    if layout.root.exists() and any(layout.root.iterdir()):
        raise UsageError(f"{layout.root}: not empty; give a new folder with --out DIR")
    began_s = monotonic_s()
    end_ms = ORIGIN_MS + max(round(days * DAY_MS / STEP_MS), 1) * STEP_MS
    schedule = Schedule(district, district.seed, ORIGIN_MS, until_ms=end_ms)
    active = prepare(layout, district.registry, ruleset or library(), ORIGIN_MS, district.seed)
    swaps = swaps_of(layout, district, schedule, end_ms)
    shards = shards_of(district.registry)
    count = processes if processes is not None else PROCESSES if large(district) else 0
    parts = [
        Part(str(layout.root), district, shards[number :: max(count, 1)], active, swaps, end_ms)
        for number in range(max(min(count, len(shards)), 1))
    ]
    files = LazyFiles()
    office = Office(layout, shards, load_categories(), files=files)
    readings = _run(Desk(layout, office, active, swaps), parts, end_ms, apart=count > 0)
    causes = schedule.causes(ORIGIN_MS, end_ms)
    write_truth(layout.truth, [truth_of(cause, district) for cause in causes])
    result = {"readings": readings, **summary(office)}
    office.close()
    files.close()
    return {**result, "causes": len(causes), "seconds": round(monotonic_s() - began_s, 1)}


def _run(desk: Desk, parts: Sequence[Part], end_ms: int, *, apart: bool) -> int:
    """Carry all blocks of all parts to the desk; return how many readings there were."""
    workers = [Worker(part) for part in parts] if apart else []
    sources = [iter(worker) for worker in workers] or [simulate(part) for part in parts]
    readings = 0
    try:
        desk.start()
        for start_ms, to_ms in blocks(end_ms):
            told = [next(source) for source in sources]
            desk.block(start_ms, to_ms, [transition for block in told for transition in block.transitions])
            readings = sum(block.readings for block in told)
        for source in sources:
            next(source, None)  # they close their files
    finally:
        for worker in workers:
            worker.close()
    return readings


def summary(office: Office) -> dict[str, Any]:
    """Return how many rows of each kind the desk made."""
    store = office.store
    assert store is not None  # it was started
    with store.begin() as connection:
        rows = connection.execute(select(cases.c.kind, func.count().label("n")).group_by(cases.c.kind))
        orders: dict[str, int] = {row.kind: row.n for row in rows}
        counts = {
            name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for name, table in (("alarms", alarms), ("incidents", incidents))
        }
    return {
        **counts,
        "cases": orders.get("case", 0),
        "rescues": orders.get("rescue", 0),
        "maintenance": orders.get("maintenance", 0),
    }
