"""`citybrain replay`: recorded data through the real path, as fast as it goes or at a speed.

Every file is one gateway with the mapping's devices behind it. Files run side by side in their own recorded time, which
is the platform's time while they run. The stores stay in `DATA/replay`, for `citybrain score`, the API, or a look.
"""

from __future__ import annotations

import argparse
import heapq
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Engine, Row, func, select

from citybrain.cli import Subcommand, emit
from citybrain.clock import HOUR_MS, MINUTE_MS, monotonic_s, wait_s
from citybrain.db.schema import alarms, cases, incidents
from citybrain.errors import UsageError
from citybrain.layout import Layout
from citybrain.model import Lane, Reading
from citybrain.segments import Reader
from rules.categories import load_categories
from rules.files import library, load_rules
from simulators.mapping import FILE, CsvReader, Mapping, Source, load_mapping, registry_of, sources_of
from simulators.mapping import Row as CsvRow
from simulators.offline import LazyFiles
from simulators.pipeline import Pipeline
from streams.log import Kind, frame_head
from streams.runtimes.embedded import lock

QUIET_MS = HOUR_MS  # so long after the last reading the desk is asked on; a longer pause in the data is skipped
PROGRESS_S = 2.0


class Stretch(msgspec.Struct):
    """One labelled fault: event times, Unix ms."""

    start_ms: int
    end_ms: int


class Played(msgspec.Struct):
    """What one file gave."""

    source: Source
    reader: CsvReader
    readings: int = 0
    values: int = 0
    faults: list[Stretch] = []
    faulty: bool = False


class Replay:
    """One run over some files. `run` plays them; `report` says what came of it."""

    def __init__(self, mapping: Mapping, sources: list[Source], pipeline: Pipeline) -> None:
        self.mapping = mapping
        self.pipeline = pipeline
        self.played = {source.name: Played(source, CsvReader(mapping, source)) for source in sources}
        self.now_ms = 0
        self._pending: dict[str, list[Reading]] = {}
        self._heard_ms = 0  # when the last readings were sent

    def check(self) -> None:
        """Raise ConfigError for the first file that cannot be replayed, before any is."""
        for played in self.played.values():
            played.reader.check()

    def run(self) -> None:
        """Play all files; raises ConfigError, StorageError."""
        began_s = said_s = monotonic_s()
        first_ms = 0
        for name, row in merged(self.played):
            if not first_ms:
                first_ms = self.now_ms = self._heard_ms = row.at_ms
                self.pipeline.start(row.at_ms)
            while row.at_ms >= self.now_ms + self.mapping.step:
                self._step(row.at_ms)
                if self.mapping.speed:
                    wait_s(began_s + (self.now_ms - first_ms) / 1000 / self.mapping.speed - monotonic_s())
            if monotonic_s() - said_s > PROGRESS_S:
                said_s = monotonic_s()
                _progress(self.played)
            self._take(self.played[name], row)
        if first_ms:
            end_ms = self.now_ms + QUIET_MS
            while self.now_ms < end_ms:
                self._step(end_ms)

    def _take(self, played: Played, row: CsvRow) -> None:
        if row.faulty and not played.faulty:
            played.faults.append(Stretch(row.at_ms, row.at_ms))
        if row.faulty is not None:
            played.faulty = row.faulty
        if played.faulty:
            played.faults[-1].end_ms = row.at_ms
        played.readings += len(row.readings)
        played.values += sum(len(reading.values) for reading in row.readings)
        self._pending.setdefault(played.source.gateway, []).extend(row.readings)

    def _step(self, until_ms: int) -> None:
        """Let a step of platform time pass, then send what was observed in it: nothing arrives before it happened.

        In silence steps grow to a minute, and after an hour of it time jumps to `until_ms`: timers are still due.
        """
        silent_ms = 0 if self._pending else self.now_ms - self._heard_ms
        self.now_ms += max(self.mapping.step, min(silent_ms // 4, MINUTE_MS))
        if silent_ms >= QUIET_MS:
            self.now_ms = max(self.now_ms, until_ms)
        if self._pending:
            self._heard_ms = self.now_ms
        for gateway, readings in self._pending.items():
            self.pipeline.append(gateway, Lane.TELEMETRY, readings, self.now_ms)
        self._pending.clear()
        self.pipeline.tick(self.now_ms)
        self.pipeline.step(self.now_ms)

    # --- what came of it ----------------------------------------------------------------------------------------

    def report(self, *, per_file: bool) -> dict[str, Any]:
        """Return counts that add up: cells = values + skipped, values = stored + dropped; then what was decided."""
        skipped: Counter[str] = Counter()
        for played in self.played.values():
            skipped.update(played.reader.table.skipped)
        result: dict[str, Any] = {
            "files": len(self.played),
            "rows": sum(played.reader.table.rows for played in self.played.values()),
            "cells": sum(played.reader.table.cells for played in self.played.values()),
            "readings": sum(played.readings for played in self.played.values()),
            "values": sum(played.values for played in self.played.values()),
            "skipped": dict(skipped),
            "stored": stored(self.pipeline),
            "dropped": labelled(self.pipeline.ingested.values, "dropped_total", "reason"),
            "waiting": self.pipeline.waiting(),
            "alarms": 0,
            "incidents": 0,
            "cases": 0,
        }
        store = self.pipeline.store
        if store is not None:
            result |= counts(store)
        if per_file:
            result["per_file"] = self._table(store)
        return result

    def _table(self, store: Engine | None) -> list[dict[str, Any]]:
        raised, ordered = (raised_of(store), ordered_of(store)) if store is not None else ([], [])
        return [self._line(played, raised, ordered) for played in self.played.values()]

    def _line(self, played: Played, raised: list[Row[Any]], ordered: list[Row[Any]]) -> dict[str, Any]:
        devices = {device.id.replace(FILE, played.source.name) for device in self.mapping.devices}
        alarm_times = sorted(row.raised_at for row in raised if row.subject in devices)
        delays = [
            min(inside) - fault.start_ms
            for fault in played.faults
            if (inside := [at for at in alarm_times if fault.start_ms <= at <= fault.end_ms])
        ]
        return {
            "file": played.source.name,
            "rows": played.reader.table.rows,
            "readings": played.readings,
            "skipped": sum(played.reader.table.skipped.values()),
            "faults": len(played.faults),
            "found": len(delays),
            "alarms": len(alarm_times),
            "cases": sum(row.subject in devices for row in ordered),
            "delay_s": min(delays) / 1000 if delays else None,
        }


def merged(played: dict[str, Played]) -> Iterator[tuple[str, CsvRow]]:
    """Yield the rows of all files in the order of their times."""

    def rows(name: str) -> Iterator[tuple[int, str, CsvRow]]:
        for row in played[name].reader.rows():
            yield row.at_ms, name, row

    for _, name, row in heapq.merge(*(rows(name) for name in played), key=lambda item: item[:2]):
        yield name, row


def stored(pipeline: Pipeline) -> int:
    """Return how many values the logs hold, by reading them."""
    return sum(
        frame_head(record.payload).values
        for shard in pipeline.shards
        for record in Reader(pipeline.layout.log(shard))
        if record.kind == Kind.FRAME
    )


def counts(store: Engine) -> dict[str, int]:
    """Return how many alarms, incidents and cases (rescues among them, maintenance orders not) the desk has."""
    with store.connect() as connection:
        return {
            "alarms": connection.scalar(select(func.count()).select_from(alarms)) or 0,
            "incidents": connection.scalar(select(func.count()).select_from(incidents)) or 0,
            "cases": connection.scalar(select(func.count()).select_from(cases).where(cases.c.kind != "maintenance"))
            or 0,
            "maintenance": connection.scalar(
                select(func.count()).select_from(cases).where(cases.c.kind == "maintenance")
            )
            or 0,
        }


def raised_of(store: Engine) -> list[Row[Any]]:
    with store.connect() as connection:
        return list(connection.execute(select(alarms.c.subject, alarms.c.raised_at)))


def ordered_of(store: Engine) -> list[Row[Any]]:
    with store.connect() as connection:
        return list(connection.execute(select(cases.c.subject).where(cases.c.kind != "maintenance")))


def labelled(values: dict[str, int], name: str, label: str) -> dict[str, int]:
    """Return the counters `name{label=x}` by x."""
    front = f"{name}{{{label}="
    return {key[len(front) : -1]: count for key, count in values.items() if key.startswith(front)}


# --- the command ------------------------------------------------------------------------------------------------


def prepare(mapping_path: Path, paths: list[Path], layout: Layout) -> Replay:
    """Read the mapping and its rules, and look at every file; raises ConfigError before anything is replayed."""
    mapping = load_mapping(mapping_path)
    folder = mapping_path.parent
    ruleset = load_rules(folder / mapping.rules) if mapping.rules else library()
    categories = load_categories(folder / mapping.categories) if mapping.categories else load_categories()
    sources = sources_of(paths)
    units = {category.unit for category in categories.values()}
    # Nobody waits for an acknowledgement here: disks are synced when it closes.
    pipeline = Pipeline(layout, registry_of(mapping, sources, units), ruleset, categories, files=LazyFiles())
    replay = Replay(mapping, sources, pipeline)
    replay.check()
    return replay


def play(mapping_path: Path, paths: list[Path], layout: Layout, *, per_file: bool) -> tuple[dict[str, Any], list[str]]:
    """Replay files on fresh stores below `layout`; return the report, and what could not be used, by file and line."""
    replay = prepare(mapping_path, paths, layout)
    for folder in ("log", "transitions", "engine", "gateways", "mailbox", "quarantine", "blobs"):
        shutil.rmtree(layout.root / folder, ignore_errors=True)
    for file in layout.root.glob("city.db*"):
        file.unlink()
    try:
        replay.run()
        warnings = [text for played in replay.played.values() for text in played.reader.table.warnings]
        return replay.report(per_file=per_file), [*warnings, *replay.pipeline.ingested.warnings]
    finally:
        replay.pipeline.close()


def _progress(played: dict[str, Played]) -> None:
    if sys.stderr.isatty():
        readings = sum(each.readings for each in played.values())
        sys.stderr.write(f"\rreplay: {readings} readings")
        sys.stderr.flush()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mapping", type=Path, metavar="MAPPING.yaml", help="what the columns are (docs/replay.md)")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="CSV files; a folder stands for all in it")
    parser.add_argument("--per-file", action="store_true", help="also a table: labelled faults, alarms, cases, delay")


def files_of(paths: list[Path]) -> list[Path]:
    """Return the files, and for a folder every `*.csv` below it; raises UsageError where there is none."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.rglob("*.csv")) if path.is_dir() else [path]
        if not inside or not inside[0].exists():
            raise UsageError(f"{path}: no such CSV file")
        found += inside
    return found


def table_text(rows: list[dict[str, Any]]) -> str:
    """Return the per-file table as text, its columns aligned."""
    lines = [list(rows[0]), *([("-" if value is None else str(value)) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _run(args: argparse.Namespace) -> int:
    layout = Layout(args.data / "replay")
    layout.make()
    with lock(layout):
        result, warnings = play(args.mapping, files_of(args.files), layout, per_file=args.per_file)
    for warning in warnings[:20]:
        sys.stderr.write(f"citybrain replay: {warning}\n")
    if len(warnings) > 20:
        sys.stderr.write(f"citybrain replay: and {len(warnings) - 20} more of that kind\n")
    rows = [] if args.json else result.pop("per_file", [])
    emit(result, as_json=args.json)
    if rows:
        sys.stdout.write(table_text(rows) + "\n")
    return 0


command = Subcommand("send recorded CSV files through the real path", _arguments, _run)
