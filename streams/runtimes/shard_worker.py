"""One shard between its log and its transition log: an engine, what it has written, its snapshots.

A transition is known by (shard, source offset, index): after a crash the worker computes again from its last snapshot
and leaves out what the transition log already holds. Nothing is written twice, nothing is forgotten. Who deals out the
shards does not matter here.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Sequence

import msgspec

from citybrain.clock import monotonic_s, wait_s
from citybrain.counters import Counters
from citybrain.errors import DiskFull, StorageError
from citybrain.layout import Layout
from citybrain.model import Transition
from citybrain.segments import Record
from citybrain.storage import OS_FILES, Files
from streams.log import Kind, decode_transition
from streams.logs import LogStore, SegmentStore, records
from streams.runtimes.snapshots import Saver, restored_engine

READ_BYTES = 8 * 1024 * 1024
SNAPSHOT_RECORDS = 50_000
FULL_S = 0.5  # how long to wait for room on a full disk
# What the engine counts, and what the heartbeat calls it.
TOTALS = {"received_total": "values", "used_total": "used", "readings_total": "readings", "sent_total": "transitions"}
DROPPED = ("late", "inactive", "foreign", "malformed")


def last_written(logs: LogStore, shard: int) -> tuple[int, int]:
    """Return (source, index) of the last transition in the transition log, (-1, -1) where there is none."""
    for first in logs.starts("transitions", shard):
        last = deque(records(logs.reader("transitions", shard, first)), 1)
        if last:
            transition = decode_transition(last[0].payload)
            return transition.source, transition.index
    return -1, -1


class ShardWorker:
    """One shard: reads its log, runs its engine, writes its transitions and snapshots.

    `logs` is where the logs are kept, by default the data folder.
    """

    def __init__(
        self,
        shard: int,
        layout: Layout,
        counters: Counters,
        snapshot_s: float,
        files: Files = OS_FILES,
        logs: LogStore | None = None,
    ) -> None:
        self.shard = shard
        self._logs = logs or SegmentStore(layout, files)
        self._period_s = snapshot_s
        self.counters = counters
        self.engine, self._warnings = restored_engine(shard, layout)
        self.received_at: int | None = None  # of the last record taken; None once nothing waits in the log
        self.taken: tuple[int, int] | None = None  # oldest `received_at` and number of the new records last taken
        self.known = 0  # offset before which the process judged all before it was started again
        self._writer = self._logs.writer("transitions", shard)
        self._reader = self._logs.reader("log", shard, self.engine.offset)
        self._written = (-1, -1)
        self._waiting: list[Transition] = []
        self._saver = Saver(layout.engine(shard), files)
        self._snapshot_offset = self.engine.offset
        self.safe = self.engine.offset  # a snapshot on disk holds what is before this offset
        self._saving: int | None = None  # what `safe` will be
        self._snapshot_s = 0.0

    def start(self) -> None:
        """Recover the transition log; what it holds is not written again."""
        self._writer.start()
        self._written = last_written(self._logs, self.shard)
        self._snapshot_s = monotonic_s()
        for text in (*self._warnings, *self._writer.warnings):
            self.counters.warn(text)
            self.counters.add("errors_total", stage="recovery")

    def step(self) -> bool:
        """Take the records that are there, make their transitions durable; return whether there were any."""
        self.taken = None
        if self._waiting and not self._write():
            return False
        records = self._reader.read(READ_BYTES)
        if not records:
            self.idle()
            return False
        self.take(records)
        return True

    def idle(self) -> None:
        """Nothing waits in the log: write a snapshot if one is due."""
        self.received_at = None
        self._snapshot_if_due()

    def take(self, records: Sequence[Record]) -> None:
        """Run the engine over the next records of the log and make their transitions durable."""
        self._check_gap(records)
        found = self.engine.process(records)
        self._waiting = [item for item in found if (item.source, item.index) > self._written]
        self.received_at = records[-1].received_at
        self._tell()
        if self._write():
            new = records if records[0].offset >= self.known else [r for r in records if r.offset >= self.known]
            self.taken = (new[0].received_at, len(new)) if new else None
            self._snapshot_if_due()

    def stop(self) -> None:
        """Write a last snapshot, unless transitions still wait for room on the disk."""
        if not self._waiting and self.engine.offset != self._snapshot_offset:
            self._finish_snapshot()
            self._snapshot()
        self._finish_snapshot()
        self._writer.close()

    def abandon(self) -> None:
        """Let go without a snapshot: what the engine remembers is not what the transition log says."""
        with contextlib.suppress(StorageError):
            self._saver.finish()
        self._writer.close()

    def _write(self) -> bool:
        """Append what waits and sync; return False on a full disk, where it goes on waiting."""
        try:
            for item in self._waiting:
                self._writer.append(Kind.TRANSITION, item.received_at, msgspec.json.encode(item))
            self._writer.commit()
        except DiskFull as error:
            self.counters.add("errors_total", stage="disk_full")
            self.counters.warn(str(error))
            wait_s(FULL_S)
            return False
        if self._waiting:
            self._written = (self._waiting[-1].source, self._waiting[-1].index)
            self._waiting = []
        return True

    def _check_gap(self, records: Sequence[Record]) -> None:
        """Say which offsets are missing: set aside as damaged, or beyond retention."""
        expected = self.engine.offset
        if records[-1].offset + 1 - expected == len(records):
            return
        for record in records:
            if record.offset > expected:
                self.counters.warn(f"log {self.shard}: offsets {expected}..{record.offset - 1} are missing")
                self.counters.add("missing_total", record.offset - expected)
            expected = record.offset + 1

    def _tell(self) -> None:
        for text in self.engine.warnings:
            self.counters.warn(text)
        self.engine.warnings.clear()

    def _snapshot_if_due(self) -> None:
        behind = self.engine.offset - self._snapshot_offset
        if self._saver.busy:
            return
        self._finish_snapshot()
        if behind and (behind >= SNAPSHOT_RECORDS or monotonic_s() - self._snapshot_s >= self._period_s):
            self._snapshot()

    def _snapshot(self) -> None:
        """Copy what the engine remembers and have it written beside the stream."""
        self._saver.save(self.engine.freeze())
        self._saving = self._snapshot_offset = self.engine.offset
        self._snapshot_s = monotonic_s()

    def _finish_snapshot(self) -> None:
        try:
            self._saver.finish()
        except DiskFull as error:
            self.counters.warn(str(error))  # the last one still stands; recovery only takes longer
        else:
            self.safe = self._saving if self._saving is not None else self.safe
        self._saving = None


def publish(counters: Counters, shards: Sequence[ShardWorker], now_ms: int, *, force: bool = False) -> None:
    """Publish what the engines counted: totals since the log began, so that a restart counts nothing twice."""
    total: Counter[str] = Counter()
    for shard in shards:
        total.update(shard.engine.counts)
    for name, counted in TOTALS.items():
        counters.values[name] = total[counted]
    for reason in DROPPED:
        counters.values[f"dropped_total{{reason={reason}}}"] = total[reason]
    lags = [now_ms - shard.received_at for shard in shards if shard.received_at is not None]
    counters.gauges["lag_s"] = max(max(lags, default=0) / 1000, 0.0)
    counters.details["shards"] = {
        str(shard.shard): {
            "offset": shard.engine.offset,
            "registry": shard.engine.registry,
            "ruleset": shard.engine.ruleset,
        }
        for shard in shards
    }
    counters.publish(force=force)
