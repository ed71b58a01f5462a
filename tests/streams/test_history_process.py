"""`citybrain history` as a real process: killed at any moment, on its own clock, with retention, and its commands."""

from __future__ import annotations

import json
import random
import signal
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import insert

from citybrain.clock import DAY_MS, RunClock, real_unix_ms
from citybrain.db.migrations import upgrade
from citybrain.db.schema import consumed
from citybrain.db.store import open_store
from citybrain.errors import ConfigError
from citybrain.layout import Layout, Run
from citybrain.model import Edge, Evidence, Transition
from citybrain.segments import Writer, segments
from citybrain.storage import OS_FILES
from streams.history import frames
from streams.history.manifest import Manifest, Part, history_folder, read_manifest
from streams.history.query import report_damage
from streams.history.retention import Retention, needed, read_retention, removable_parts, removable_segments
from streams.log import Kind, encode_transition
from streams.runtimes.history import HistoryProcess
from tests.commands import beat_of, run_to_end, running
from tests.conftest import eventually
from tests.engine_logs import START
from tests.history_logs import busy_log, compacted, merge_all, rows_of_history, rows_of_log, write
from tests.streams.test_history import FEW, flip

FAST = 20_000.0  # platform seconds a second: a part is due every 45 ms


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    found = Layout(tmp_path)
    found.make()
    found.write_run(Run(clock=RunClock(START + DAY_MS, real_unix_ms(), FAST), shards=1))
    return found


history = partial(running, "history")
run = partial(run_to_end, "history", within_s=60)
beat = partial(beat_of, "history")


def offset(layout: Layout) -> int:
    return read_manifest(history_folder(layout, 0)).next


# --- running ----------------------------------------------------------------------------------------------------


def test_it_follows_the_log_says_its_lag_and_stops_when_told(layout: Layout) -> None:
    log = busy_log(layout, 60, 1)
    write(layout, log.records[:100])
    with history(layout) as process:
        eventually(lambda: offset(layout) == 100, 20, "the first records in Parquet")
        write(layout, log.records[100:])
        eventually(lambda: offset(layout) == len(log.records), 20, "all records in Parquet")
        eventually(lambda: (said := beat(layout)) is not None and said.gauges["history_lag_s"] == 0, what="no lag")
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
    said = beat(layout)
    assert said is not None
    assert said.counters["values_total"] == len(rows_of_log(layout, log.records))
    assert said.details["shards"]["0"]["next"] == len(log.records)


def test_killed_at_any_moment_every_offset_is_there_once(layout: Layout) -> None:
    log, dice = busy_log(layout, 400, 2, step_ms=600_000), random.Random(5)
    written = 0
    for _ in range(6):
        more = log.records[written : written + len(log.records) // 6 + 1]
        with history(layout) as process:
            eventually(lambda: (layout.root / "history" / "0").exists() or process.poll() is not None, 20)
            before = offset(layout)
            write(layout, more)
            written += len(more)
            wanted = before + dice.randrange(1, len(more))
            eventually(lambda wanted=wanted: offset(layout) >= wanted, 20, f"offset {wanted}")  # type: ignore[misc]
            process.kill()
            process.wait()
    compactor = compacted(layout)
    merge_all(compactor)
    assert rows_of_history(compactor) == sorted(rows_of_log(layout, log.records))
    assert list(frames(layout, 0, 0, written)) == log.records


def test_only_one_may_work_on_a_history(layout: Layout) -> None:
    with history(layout):
        eventually(lambda: beat(layout) is not None, 20)
        code, _, said = run(layout, "compact")
    assert code == 4
    assert "stop that one first" in said


def test_a_reported_part_is_set_aside_and_made_anew(layout: Layout) -> None:
    log = busy_log(layout, 60, 3)
    write(layout, log.records)
    compactor = compacted(layout, FEW)
    good, bad = compactor.manifest.parts[:2]
    flip(compactor.folder / bad.values_file, 99)
    report_damage(layout, 0, bad.values_file)
    report_damage(layout, 0, good.values_file)  # nothing is wrong with it
    process = HistoryProcess(layout, [0], RunClock(START, START, 0.0), Retention())
    process.start()
    process.step()
    assert [text for text in process.counters.warnings if "checksum differs" in text]
    assert process.counters.values["errors_total{stage=damaged_part}"] == 1
    manifest = read_manifest(compactor.folder)
    assert manifest.damaged == ()
    assert list(frames(layout, 0, 0, len(log.records))) == log.records
    assert OS_FILES.names(layout.mailbox("history")) == []


def test_what_is_damaged_is_not_merged_into_something_larger(layout: Layout) -> None:
    log = busy_log(layout, 150, 7)
    write(layout, log.records)
    compactor = compacted(layout, FEW)
    bad = compactor.manifest.parts[2]
    (compactor.folder / bad.records_file).write_bytes(b"")
    process = HistoryProcess(layout, [0], RunClock(START, START, 0.0), Retention())
    process.start()
    while process.step():
        pass
    manifest = read_manifest(compactor.folder)
    assert manifest.damaged == ()
    assert max(part.level for part in manifest.parts) > 0
    assert list(frames(layout, 0, 0, len(log.records))) == log.records
    assert process.counters.values["errors_total{stage=damaged_part}"] == 1


# --- commands ---------------------------------------------------------------------------------------------------


def test_compact_status_and_verify(layout: Layout) -> None:
    log = busy_log(layout, 60, 4)
    write(layout, log.records)
    code, out, _ = run(layout, "compact", "--json")
    assert code == 0
    assert json.loads(out)["values_total"] == len(rows_of_log(layout, log.records))
    code, out, _ = run(layout, "status", "--json")
    status = json.loads(out)
    assert status["retention"] == {"log": "7d", "parquet": "730d", "backtest": "90d", "evidence": "30d"}
    shard = status["shards"]["0"]
    assert (shard["next"], shard["behind"], shard["damaged"]) == (len(log.records), 0, [])
    assert (shard["log_needed_from"], shard["log_needed_by"]) == (0, "engine snapshot")
    assert run(layout, "verify")[0] == 0
    folder = history_folder(layout, 0)
    flip(folder / read_manifest(folder).parts[0].records_file, 20)
    code, out, _ = run(layout, "verify", "--json")
    assert code == 5
    assert "made anew from the log" in json.loads(out)["damaged"][0]
    assert run(layout, "verify")[0] == 0


# --- retention --------------------------------------------------------------------------------------------------


def test_what_may_go_of_the_log() -> None:
    every = [True] * 9
    assert removable_segments([0, 10, 20, 30], 40, every) == [0, 10]
    assert removable_segments([0, 10, 20, 30], 19, every) == [0]
    assert removable_segments([0, 10, 20, 30], 40, [True, False, True]) == [0]
    assert removable_segments([0, 10], 40, every) == []
    assert removable_segments([0], 40, every) == []
    assert removable_segments([], 40, every) == []


def test_what_may_go_of_the_history() -> None:
    parts = tuple(Part(n, n + 1, 0, n, n * DAY_MS, 0, 1, 1, 1, 1, "", (), (0, 0)) for n in range(10))
    manifest = Manifest(parts=parts)
    assert removable_parts(manifest, 10 * DAY_MS, 7 * DAY_MS) == list(parts[:3])
    assert removable_parts(manifest, 0, 7 * DAY_MS) == []


def snapshot_at(layout: Layout, at: int) -> None:
    OS_FILES.make(layout.engine(0))
    (layout.engine(0) / f"{at:020d}.snapshot").write_bytes(b"")


def test_nobody_loses_what_he_needs_of_the_log(layout: Layout) -> None:
    manifest = Manifest(next=100)
    assert needed(layout, 0, manifest).by == "engine snapshot"
    snapshot_at(layout, 70)
    snapshot_at(layout, 90)
    assert (needed(layout, 0, manifest).offset, needed(layout, 0, manifest).by) == (70, "engine snapshot")
    writer = Writer(layout.transitions(0))
    writer.start()
    evidence = Evidence("pressure_mpa", 1.0, 2.0, START)
    for source in (20, 60):
        written = Transition(0, source, 0, "low", "a1", Edge.RAISE, START, START, evidence, "")
        writer.append(Kind.TRANSITION, START, encode_transition(written))
    writer.commit()
    assert needed(layout, 0, manifest).by == "desk"  # there is no database yet: it has taken nothing
    store = open_store(layout.database)
    upgrade(store)
    with store.begin() as connection:
        connection.execute(insert(consumed).values(shard=0, offset=1, source=20, index=0))
    assert (needed(layout, 0, manifest).offset, needed(layout, 0, manifest).by) == (20, "desk")
    with store.begin() as connection:
        connection.execute(consumed.update().values(offset=2, source=60))
    store.dispose()
    assert needed(layout, 0, manifest).offset == 70
    assert needed(layout, 0, Manifest(next=30)).by == "history"


def test_old_segments_and_parts_go_and_it_says_so(layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    log = busy_log(layout, 40, 6, step_ms=DAY_MS)
    write(layout, log.records, segment_bytes=2000)
    end_ms, last = log.records[-1].received_at, len(log.records)
    snapshot_at(layout, last - 30)
    process = HistoryProcess(layout, [0], RunClock(end_ms, real_unix_ms(), 1.0), Retention())
    process.start()
    while process.step():
        pass
    before = segments(OS_FILES, layout.log(0))
    kept = Retention(log=type(Retention().log)(5 * DAY_MS), parquet=Retention().backtest, backtest=Retention().log)
    process = HistoryProcess(layout, [0], RunClock(end_ms + 80 * DAY_MS, real_unix_ms(), 1.0), kept)
    process.start()
    process.step()
    after = segments(OS_FILES, layout.log(0))
    assert after == before[-len(after) :]
    assert after[0] <= last - 30 < after[1]
    manifest = read_manifest(history_folder(layout, 0))
    assert manifest.parts[0].first == manifest.dropped_before > 0
    assert manifest.parts[0].received_ms >= end_ms + 80 * DAY_MS - Retention().backtest
    assert process.counters.values["removed_total{what=segment}"] == len(before) - len(after)
    said = capsys.readouterr().err
    assert "log segments" in said
    assert "parts up to" in said
    assert list(frames(layout, 0, manifest.dropped_before, last)) == log.records[manifest.dropped_before :]


def test_retention_is_read_strictly(layout: Layout) -> None:
    path = layout.root / "retention.yaml"
    assert read_retention(layout) == Retention()
    path.write_text("log: 3d\nparquet: 400d\n")
    assert read_retention(layout).log == 3 * DAY_MS
    for text, said in (
        ("log: 3d\nparket: 400d\n", r"retention.yaml:2 parket.*did you mean 'parquet'"),
        ("log: 3 days\n", r"retention.yaml:1 log.*such as"),
        ("log: 1h\n", r'retention.yaml log.*at least "1d"'),
        ("parquet: 10d\n", r"parquet.*at least as long as `backtest`"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_retention(layout)
    assert run(layout)[0] == 3
