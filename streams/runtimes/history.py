"""`citybrain history`: the process that makes Parquet of the log, merges it, and removes what is old enough.

Nobody waits for it: ingest, worker and desk never read what it writes, and while it is down the log keeps everything.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from citybrain.cli import Subcommand, emit
from citybrain.clock import DAY_MS, Clock, iso, monotonic_s, wait_s
from citybrain.config import duration_text
from citybrain.counters import Counters
from citybrain.db.place import add_database, layout_of
from citybrain.errors import Damaged, DiskFull, Unavailable
from citybrain.layout import Layout
from citybrain.mailbox import Mailbox
from citybrain.storage import OS_FILES
from streams.evidence import EvidenceStore
from streams.history.compactor import Compactor, Limits
from streams.history.manifest import Manifest, history_folder, read_manifest
from streams.history.query import MAILBOX, report_damage
from streams.history.retention import (
    Retention,
    expired_segments,
    needed,
    read_retention,
    removable_parts,
    remove_segments,
)
from streams.logs import LogStore
from streams.runtimes.stores import Place, add_arguments, open_place

IDLE_S = 0.5
FULL_S = 2.0  # how long to wait for room on a full disk
SWEEP_S = 120.0  # what a merge made needless stays so long: a chart may be reading it
RETENTION_S = 600.0
NICE = 10  # charts and files are never more urgent than an alarm


@contextlib.contextmanager
def lock(layout: Layout) -> Iterator[None]:
    """Take the history for this process alone; raises Unavailable."""
    OS_FILES.make(layout.root / "history")
    with (layout.root / "history" / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(
                f"{layout.root / 'history'}: `citybrain history` of this run works on it; stop that one first"
            ) from None
        yield


class HistoryProcess:
    """The loop over all shards. `run` returns when `stop` has been called."""

    def __init__(
        self,
        layout: Layout,
        shards: Sequence[int],
        clock: Clock,
        retention: Retention,
        limits: Limits | None = None,
        logs: LogStore | None = None,
    ) -> None:
        self.layout = layout
        self.counters = Counters("history", layout.run)
        self.compactors = [Compactor(layout, shard, self.counters, limits=limits, logs=logs) for shard in shards]
        self.retention = retention
        self._clock = clock
        self._mailbox = Mailbox(layout.mailbox(MAILBOX))
        self._evidence = EvidenceStore(layout.evidence)
        self._stopping = False
        self._swept_s = self._retained_s = 0.0

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """End the loop; also a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Serve until stopped; raises StorageError where the disk fails for another reason than being full."""
        self.counters.resume()
        self.start()
        while not self._stopping:
            if not self.step():
                wait_s(IDLE_S)
        self._publish(force=True)

    def start(self) -> None:
        """Recover all shards; raises Damaged."""
        self._swept_s = monotonic_s()
        self._retained_s = monotonic_s() - RETENTION_S
        for compactor in self.compactors:
            compactor.start()
        self._publish(force=True)

    def step(self) -> bool:
        """Do what is due; return whether there may be more to do at once."""
        try:
            return self._work()
        except DiskFull as error:  # nothing is lost: the log has it
            self.counters.add("errors_total", stage="disk_full")
            self.counters.warn(str(error))
            wait_s(FULL_S)
            return False
        finally:
            self._publish()

    def _work(self) -> bool:
        now_ms = self._clock.now_ms()
        busy = [compactor.step(now_ms) for compactor in self.compactors]
        self._reports()
        self._housekeeping(now_ms)
        merged = [self._merge(compactor) for compactor in self.compactors] if not any(busy) else []
        return any((*busy, *merged))

    def _merge(self, compactor: Compactor) -> bool:
        """Merge one group, publishing in between; given up half way where we are to stop."""
        before = compactor.manifest
        try:
            for _ in compactor.merge():
                self._publish()
                if self._stopping:
                    return False
        except Damaged:
            if not check(compactor, self.counters):
                raise
        return compactor.manifest is not before

    def _housekeeping(self, now_ms: int) -> None:
        now_s = monotonic_s()
        if now_s - self._swept_s >= SWEEP_S:
            self._swept_s = now_s
            for compactor in self.compactors:
                compactor.sweep()
        if now_s - self._retained_s >= RETENTION_S:
            self._retained_s = now_s
            for compactor in self.compactors:
                self._retain(compactor, now_ms)
            self._expire(now_ms)

    def _expire(self, now_ms: int) -> None:
        """Remove pictures that are kept no longer."""
        whole, incomplete = self._evidence.expire(now_ms, self.retention.evidence / DAY_MS)
        self.counters.add("removed_total", whole, what="evidence")
        self.counters.add("removed_total", incomplete, what="evidence_incomplete")
        if whole or incomplete:
            self._say(f"evidence: {whole} pictures removed, as configured, and {incomplete} that never became whole")

    def _retain(self, compactor: Compactor, now_ms: int) -> None:
        """Remove what is older than it has to be and nobody needs; say what."""
        old = removable_parts(compactor.manifest, now_ms, max(self.retention.parquet, self.retention.backtest))
        compactor.drop(old)
        firsts = expired_segments(self.layout, compactor.shard, compactor.manifest, now_ms, self.retention.log)
        size = remove_segments(self.layout, compactor.shard, firsts)
        self.counters.add("removed_total", len(old), what="part")
        self.counters.add("removed_total", len(firsts), what="segment")
        if old:
            self._say(
                f"shard {compactor.shard}: {len(old)} parts up to {iso(old[-1].received_ms)} removed, as configured"
            )
        if firsts:
            upto = f"offsets from {firsts[0]}, {len(firsts)} log segments, {size} bytes"
            self._say(f"shard {compactor.shard}: {upto} removed; they are in Parquet")

    def _say(self, text: str) -> None:
        removed = [*self.counters.details.get("removed", []), text][-20:]
        self.counters.details["removed"] = removed
        sys.stderr.write(f"{iso(self._clock.now_ms())} history: {text}\n")

    def _reports(self) -> None:
        """Look at the parts that a reader found damaged."""
        commands, broken = self._mailbox.take()
        for one in broken:
            self.counters.drop("malformed_command")
            self.counters.warn(f"{one.what}; kept as {one.path}")
        for name, reported in commands:
            for compactor in self.compactors:
                if reported.kind == "damaged" and reported.body.get("shard") == compactor.shard:
                    check(compactor, self.counters, str(reported.body.get("file")))
            self._mailbox.done(name)

    def _publish(self, *, force: bool = False) -> None:
        now_ms = self._clock.now_ms()
        oldest = [at for compactor in self.compactors if (at := compactor.oldest_ms) is not None]
        self.counters.gauges["history_lag_s"] = max(now_ms - min(oldest, default=now_ms), 0) / 1000
        parts = [part for compactor in self.compactors for part in compactor.manifest.parts]
        self.counters.gauges["history_parts"] = len(parts)
        self.counters.gauges["history_bytes"] = sum(part.bytes for part in parts)
        self.counters.details["shards"] = {
            str(each.shard): {"next": each.manifest.next, "parts": len(each.manifest.parts)} for each in self.compactors
        }
        self.counters.publish(force=force)


def check(compactor: Compactor, counters: Counters, file: str = "") -> list[str]:
    """Look at all parts, or the one that `file` belongs to; set aside what is damaged, make it anew where that can be.

    Returns what was wrong, in words.
    """
    found = []
    for part in compactor.manifest.parts:
        if file and file not in (part.values_file, part.records_file):
            continue
        wrong = compactor.damage_in(part)
        if wrong:
            compactor.set_aside(part)
            mended = compactor.mend()
            what = "made anew from the log" if mended else f"offsets {part.first}..{part.next - 1} are missing"
            found.append(f"{wrong}; set aside as .damaged; {what}")
            counters.add("errors_total", stage="damaged_part")
            counters.warn(found[-1])
    return found


# --- command line ---------------------------------------------------------------------------------------------------


def shard_status(place: Place, shard: int, manifest: Manifest) -> dict[str, Any]:
    """Return how a shard's history stands."""
    parts = manifest.parts
    values, size = sum(part.values for part in parts), sum(part.bytes for part in parts)
    holding = needed(place.layout, shard, manifest)
    return {
        "next": manifest.next,
        "behind": max(place.logs.end("log", shard) - manifest.next, 0),
        "parts": len(parts),
        "values": values,
        "bytes": size,
        "bytes_per_value": round(size / values, 2) if values else None,
        "from": iso(min(part.from_ms for part in parts if part.values)) if values else None,
        "until": iso(max(part.until_ms for part in parts)) if values else None,
        "gaps": sum(len(part.gaps) for part in parts),
        "damaged": [part.values_file for part in manifest.damaged],
        "log_needed_from": holding.offset,
        "log_needed_by": holding.by,
    }


def _status(place: Place, shards: Sequence[int], args: argparse.Namespace) -> int:
    layout = place.layout
    retention = read_retention(layout)
    kept = {name: duration_text(getattr(retention, name)) for name in retention.__struct_fields__}
    found = {str(shard): shard_status(place, shard, read_manifest(history_folder(layout, shard))) for shard in shards}
    emit({"retention": kept, "shards": found}, as_json=args.json)
    return 0


def _compact(place: Place, shards: Sequence[int], args: argparse.Namespace) -> int:
    layout = place.layout
    counters, now_ms = Counters("history"), layout.read_run().clock.now_ms()
    began_s = monotonic_s()
    with lock(layout):
        for shard in shards:
            compactor = Compactor(layout, shard, counters, logs=place.logs)
            compactor.start()
            while compactor.step(now_ms, force=True):
                _progress(f"shard {shard}: offset {compactor.manifest.next}")
            while _merged_one(compactor):
                _progress(f"shard {shard}: {len(compactor.manifest.parts)} parts")
            compactor.sweep()
    counted = {
        name: counters.values[name] for name in ("values_total", "missing_total", "unread_total", "merged_total")
    }
    emit({**counted, "seconds": round(monotonic_s() - began_s, 1), "warnings": counters.warnings}, as_json=args.json)
    return 0


def _merged_one(compactor: Compactor) -> bool:
    before = compactor.manifest
    for _ in compactor.merge():
        pass
    return compactor.manifest is not before


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")


def _verify(place: Place, shards: Sequence[int], args: argparse.Namespace) -> int:
    """Check every file; what is damaged is set aside and made anew here, or by the process that has the history."""
    layout = place.layout
    counters = Counters("history")
    compactors = [Compactor(layout, shard, counters, logs=place.logs) for shard in shards]
    wrong: list[str] = []
    try:
        with lock(layout):
            for compactor in compactors:
                compactor.start()
                wrong += check(compactor, counters)
    except Unavailable:
        for compactor in compactors:
            compactor.manifest = read_manifest(compactor.folder)
            wrong += _report(layout, compactor)
    parts = sum(len(compactor.manifest.parts) for compactor in compactors)
    emit({"parts": parts, "damaged": wrong}, as_json=args.json)
    return Damaged.exit_code if wrong else 0


def _report(layout: Layout, compactor: Compactor) -> list[str]:
    found = []
    for part in compactor.manifest.parts:
        if wrong := compactor.damage_in(part):
            report_damage(layout, compactor.shard, part.values_file)
            found.append(f"{wrong}; `citybrain history`, which runs, was asked to set it aside")
    return found


def _serve(place: Place, shards: Sequence[int], args: argparse.Namespace) -> int:
    layout = place.layout
    with lock(layout):
        clock, retention = layout.read_run().clock, read_retention(layout)
        process = HistoryProcess(layout, shards, clock, retention, logs=place.logs)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, process.stop)
        os.nice(NICE)
        process.run()
    return 0


ACTIONS = {"serve": _serve, "status": _status, "compact": _compact, "verify": _verify}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        nargs="?",
        default="serve",
        choices=list(ACTIONS),
        help="serve (default): make Parquet of the log as it grows; status: how the history stands; "
        "compact: do all there is to do now, and end; verify: check every file",
    )
    add_database(parser)
    add_arguments(parser)


def _run(args: argparse.Namespace) -> int:
    layout = layout_of(args)
    layout.make()
    shards = layout.read_run().shards
    return ACTIONS[args.action](open_place(args, layout, shards), range(shards), args)


command = Subcommand("keep the history: Parquet of the log, for charts and exports", _arguments, _run)
