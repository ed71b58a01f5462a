"""`citybrain worker`: the process between the log and the transition log; one engine a shard.

A transition is known by (shard, source offset, index): after a crash the worker computes again from its last snapshot
and leaves out what the transition log already holds. Nothing is written twice, nothing is forgotten.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections import Counter, deque
from collections.abc import Sequence
from types import FrameType
from typing import Protocol

import msgspec

from citybrain.cli import Subcommand
from citybrain.clock import monotonic_s, wait_s
from citybrain.counters import Counters, process_name
from citybrain.errors import DiskFull, StorageError, UsageError
from citybrain.layout import Layout, Run
from citybrain.model import Transition
from citybrain.segments import Record
from citybrain.storage import OS_FILES, Files
from streams.log import Kind, decode_transition
from streams.logs import LogStore, SegmentStore, records
from streams.runtimes.ingest import parse_shards, take_shard
from streams.runtimes.snapshots import Saver, restored_engine
from streams.runtimes.stores import Place, add_arguments, open_place
from streams.warm import warm_engine

READ_BYTES = 8 * 1024 * 1024
SNAPSHOT_S = 30.0
SNAPSHOT_RECORDS = 50_000
IDLE_S = 0.02
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


class WorkerProcess:
    """The loop over all shards of this process. `run` returns when `stop` has been called.

    Two writers would spoil a transition log, so every shard is taken before anything else; raises Unavailable.
    """

    def __init__(
        self,
        layout: Layout,
        run: Run,
        shards: Sequence[int],
        snapshot_s: float = SNAPSHOT_S,
        logs: LogStore | None = None,
    ) -> None:
        self._taken = [take_shard(layout, "worker", shard) for shard in shards]
        self.counters = Counters(process_name("worker", shards, run.shards), layout.run)
        self.shards = [ShardWorker(shard, layout, self.counters, snapshot_s, logs=logs) for shard in shards]
        self._clock = run.clock
        self._stopping = False

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """End the loop; also a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Recover, then serve until stopped; raises StorageError where the disk fails."""
        last = self.counters.resume()
        self.counters.publish(force=True)
        warm_engine()
        for shard in self.shards:
            shard.start()
            if last is not None:
                shard.known = last.details.get("shards", {}).get(str(shard.shard), {}).get("offset", 0)
        while not self._stopping:
            busy = [shard.step() for shard in self.shards]
            self._measure()
            self._publish()
            if not any(busy):
                wait_s(IDLE_S)
        for shard in self.shards:
            shard.stop()
        self._publish(force=True)
        for file in self._taken:
            file.close()

    def _measure(self) -> None:
        """Count how long what was just taken had waited; each record as long as the oldest of its batch."""
        now_ms = self._clock.now_ms()
        for shard in self.shards:
            if shard.taken is not None:
                oldest_at, amount = shard.taken
                self.counters.delayed("lag_s", self._clock.real_s(now_ms - oldest_at), amount)

    def _publish(self, *, force: bool = False) -> None:
        publish(self.counters, self.shards, self._clock.now_ms(), force=force)


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


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", metavar="LIST", help="shards to take, such as 0,1 (default: all of the run)")
    parser.add_argument("--snapshot-s", type=float, default=SNAPSHOT_S, help="seconds between snapshots (default: 30)")
    add_arguments(parser)
    parser.add_argument(
        "--runtime",
        choices=("embedded", "kafka", "faust"),
        default="embedded",
        help="who deals out the shards: --shards (default), Kafka's group protocol, or Faust",
    )
    parser.add_argument("--name", default="worker", help="with another runtime: what this process is called")
    parser.add_argument(
        "--session-s", type=float, default=10.0, help="... and after how long a silent one loses its shards"
    )


def _run(args: argparse.Namespace) -> int:
    layout = Layout(args.data)
    layout.make()
    run = layout.read_run()
    place = open_place(args, layout, run.shards)
    if args.runtime != "embedded":
        return _run_dealt(args, place, run)
    _serve(WorkerProcess(place.layout, run, parse_shards(args.shards, run.shards), args.snapshot_s, place.logs))
    return 0


class Stoppable(Protocol):
    """A loop that a signal ends."""

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None: ...
    def run(self) -> None: ...


def _serve(process: Stoppable) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, process.stop)
    process.run()


def _run_dealt(args: argparse.Namespace, place: Place, run: Run) -> int:
    """Take the shards that Kafka or Faust deals out; raises UsageError."""
    if args.log != "kafka" or args.shards is not None:
        raise UsageError(f"--runtime {args.runtime}: it needs --log kafka, and the shards are dealt out (no --shards)")
    if args.runtime == "faust":
        from streams.runtimes.kafka.faust_worker import FaustWorker  # noqa: PLC0415  only who asks for it needs Faust

        FaustWorker(args.kafka, place, run, args.snapshot_s, args.name, args.session_s).run()
    else:
        from streams.runtimes.kafka.group_worker import GroupWorker  # noqa: PLC0415

        _serve(GroupWorker(place, run, args.snapshot_s, args.name, args.session_s))
    return 0


command = Subcommand("detect: read the log, write transitions", _arguments, _run)
