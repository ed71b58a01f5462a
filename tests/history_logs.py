"""Logs on disk and what a history made of them; the tests of the history share this."""

from __future__ import annotations

import random
from collections.abc import Sequence

from citybrain.clock import DAY_MS
from citybrain.counters import Counters
from citybrain.layout import Layout
from citybrain.model import Lane
from citybrain.segments import Record, Writer
from citybrain.storage import OS_FILES, Files
from streams.history.build import open_frame, registry_of
from streams.history.columns import opened, rows_of
from streams.history.compactor import Compactor, Limits
from streams.history.manifest import Part
from streams.log import Kind
from streams.registry import METRIC_NAMES, Index, decode_registry
from tests.engine_logs import OTHER_RULES, REGISTRIES, RULES, START, Log

Row = tuple[int, int, str, str, int, float]  # offset, position, device, metric, observed_at, value


def busy_log(layout: Layout, frames: int, seed: int, step_ms: int = 9_000) -> Log:
    """A log of shard 0 with two registries, late values, a frame out of quarantine, and one that is damaged."""
    log, dice = Log(layout), random.Random(seed)
    log.registry(START, REGISTRIES[0])
    log.ruleset(START, *RULES)
    for number in range(frames):
        now = START + number * step_ms
        if number == frames // 2:
            log.registry(now, REGISTRIES[1])
            log.ruleset(now, *OTHER_RULES)
        log.frame(now, "a", Lane.TELEMETRY, [("a", "uptime_s", now, number * 9.0)])
        for gateway, devices in (("a", ("a0", "a1", "a2")), ("b", ("b1", "b2"))):
            values = [
                (device, metric, now - dice.choice((0, 0, 700, 60_000)), dice.choice((2.0, 4.5, 5.5, 7.25, 1 / 3)))
                for device in devices
                for metric in ("pressure_mpa", "flow_lps")
                if dice.random() < 0.6
            ]
            log.frame(now, gateway, Lane.TELEMETRY, values)
        if number % 5 == 0:
            log.frame(now, "a", Lane.EVENT, [("a2", "fault_code", now, float(dice.choice((0, 2, 3))))])
            log.tick(now, START)
    log.add(Kind.FRAME, START + frames * step_ms, b"no frame at all")
    return log


def write(layout: Layout, records: Sequence[Record], segment_bytes: int = 1 << 20) -> None:
    """Append records to the log of shard 0, each committed by itself."""
    writer = Writer(layout.log(0), segment_bytes=segment_bytes)
    writer.start()
    for record in records:
        writer.append(record.kind, record.received_at, record.payload)
        writer.commit()
    writer.close()


def compacted(layout: Layout, limits: Limits | None = None, files: Files = OS_FILES) -> Compactor:
    """Make a history of all that the log of shard 0 has, without merging."""
    compactor = Compactor(layout, 0, Counters("history"), limits=limits, files=files)
    compactor.start()
    while compactor.step(0, force=True):
        pass
    return compactor


def merge_all(compactor: Compactor) -> int:
    """Merge until nothing is left to merge; return how often."""
    for times in range(1000):
        before = compactor.manifest
        for _ in compactor.merge():
            pass
        if compactor.manifest is before:
            return times
    raise AssertionError("merging does not end")


def rows_in(compactor: Compactor, part: Part) -> list[Row]:
    """Return a part's values in the order of its file."""
    found: list[Row] = []
    file = opened(compactor.folder / part.values_file)
    for batch in file.iter_batches(500):
        names = sorted(set(zip(batch.column("device").to_pylist(), batch.column("metric").to_pylist(), strict=True)))
        rows = rows_of(batch, {name: at for at, name in enumerate(names)})
        for series, at, offset, position, value in zip(
            rows.series.tolist(), rows.observed_at.tolist(), rows.offset.tolist(), rows.position.tolist(),
            rows.values().tolist(), strict=True,
        ):  # fmt: skip
            found.append((offset, position, *names[series], at, value))
    return found


def rows_of_history(compactor: Compactor) -> list[Row]:
    """Return all values of a history as they arrived."""
    return sorted(row for part in compactor.manifest.parts for row in rows_in(compactor, part))


def rows_of_log(layout: Layout, records: Sequence[Record]) -> list[Row]:
    """Return all values of a log as they arrived."""
    found: list[Row] = []
    index: Index | None = None
    for record in records:
        if record.kind == Kind.CONTROL and (name := registry_of(record.payload)):
            index = Index(decode_registry(layout.get_blob(name)), name)
        opened = open_frame(record.payload, index) if record.kind == Kind.FRAME else None
        if opened is None or index is None:
            continue
        for position, (at, value, series) in enumerate(zip(*(column.tolist() for column in opened[1]), strict=True)):
            device = index.devices[index.series_device[series]].id
            found.append((record.offset, position, device, METRIC_NAMES[index.series_metric[series]], at, value))
    return found


def day_of(record: Record) -> int:
    return record.received_at // DAY_MS
