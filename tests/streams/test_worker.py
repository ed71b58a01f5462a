"""The worker as a real process: killed at any moment, it writes what an engine that was never killed writes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from api.processes import in_force, not_live
from citybrain.clock import real_unix_ms, system_clock
from citybrain.counters import Counters, Heartbeat, read_heartbeats, takes_of
from citybrain.errors import EXIT_UNAVAILABLE, DiskFull, StorageError
from citybrain.layout import Layout, Run
from citybrain.model import Edge, Lane, Transition
from citybrain.segments import Reader, Writer
from streams.engine import Engine
from streams.log import FrameHead, Kind, pack_frame
from streams.logs import SegmentStore
from streams.runtimes.embedded import usual_workers, workers_of
from streams.runtimes.shard_worker import READ_BYTES, ShardWorker, last_written
from streams.runtimes.snapshots import KEPT, restored_engine, snapshot_paths, write_snapshot
from streams.warm import warm_engine
from tests.conftest import end, eventually
from tests.engine_logs import OTHER_RULES, REGISTRIES, RULES, START, Log
from tests.faulty_files import LossyFiles
from tests.reference_engine import Reference


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    found = Layout(tmp_path)
    found.make()
    return found


def busy_log(layout: Layout, frames: int, seed: int) -> Log:
    """A log in which hydrants have low pressure, spend water and report codes, over and over."""
    log, dice = Log(layout), random.Random(seed)
    log.registry(START, REGISTRIES[0])
    log.ruleset(START, *RULES)
    for number in range(frames):
        now = START + number * 9_000
        device = dice.choice(["a1", "a2", "b1"])
        metric, values = dice.choice(
            [("pressure_mpa", (2, 4, 6)), ("flow_lps", (0, 5.5, 7)), ("fault_code", (0, 2, 3))]
        )
        lane = Lane.EVENT if metric == "fault_code" else Lane.TELEMETRY
        log.frame(now, device[0], lane, [(device, metric, now, dice.choice(values))])
        if number % 7 == 0:
            log.tick(now, START)
        if number == frames // 2:
            log.ruleset(now, *OTHER_RULES)
    return log


def append(writer: Writer, log: Log, low: int, high: int) -> None:
    for record in log.records[low:high]:
        writer.append(record.kind, record.received_at, record.payload)
    writer.commit()


def written(layout: Layout) -> list[Transition]:
    return [msgspec.json.decode(record.payload, type=Transition) for record in Reader(layout.transitions(0))]


@contextmanager
def worker(layout: Layout, shard: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-m", "citybrain", "worker", "--data", str(layout.root), "--shards", str(shard)]
    with subprocess.Popen([*argv, "--snapshot-s", "0.05"]) as process:
        try:
            yield process
        finally:
            end(process)


def snapshot_offset(layout: Layout) -> int:
    return max((int(path.stem) for path in snapshot_paths(layout.engine(0))), default=0)


def beat(layout: Layout) -> Heartbeat | None:
    return next((found for found in read_heartbeats(layout.run) if found.process == "worker-0"), None)


def test_a_worker_killed_again_and_again_writes_every_transition_once(layout: Layout) -> None:
    log, dice = busy_log(layout, 1500, seed=4), random.Random(4)
    expected = Engine(0, layout).process(log.records)
    due = [sum(item.source < offset for item in expected) for offset in range(len(log.records) + 1)]
    writer = Writer(layout.log(0))
    writer.start()
    sent = 0
    for life in range(6):
        with worker(layout) as process:
            for _ in range(dice.randrange(1, 5)):
                append(writer, log, sent, sent := sent + dice.randrange(1, 40))
                eventually(lambda: len(written(layout)) >= due[sent], 20)
            if life % 2:
                eventually(lambda: snapshot_offset(layout) == sent)
            for _ in range(dice.randrange(5)):
                append(writer, log, sent, sent := sent + dice.randrange(1, 40))
            process.kill()
    with worker(layout) as process:
        append(writer, log, sent, len(log.records))
        eventually(lambda: len(written(layout)) >= len(expected), 20, "all transitions written")
        process.send_signal(signal.SIGTERM)
        assert process.wait(2) == 0
    writer.close()
    assert written(layout) == expected
    last = beat(layout)
    assert last is not None
    assert last.counters["sent_total"] == len(expected)
    assert last.counters["received_total"] == 1500
    assert last.details["shards"]["0"]["offset"] == len(log.records)
    assert len(snapshot_paths(layout.engine(0))) == KEPT


def test_a_worker_without_rules_waits_and_stops_when_told(layout: Layout) -> None:
    with worker(layout) as process:
        eventually(lambda: beat(layout) is not None)
        writer = Writer(layout.log(0))
        writer.start()
        append(writer, busy_log(layout, 40, seed=1), 2, 30)
        writer.close()
        eventually(lambda: (found := beat(layout)) and found.counters.get("received_total", 0) > 20, 20)
        process.send_signal(signal.SIGINT)
        assert process.wait(2) == 0
    last = beat(layout)
    assert last is not None
    assert last.counters["dropped_total{reason=inactive}"] == last.counters["received_total"]


def test_a_bad_snapshot_is_set_aside_and_an_older_one_is_used(layout: Layout) -> None:
    log = busy_log(layout, 60, seed=2)
    engine = Engine(0, layout)
    for cut in range(20, 61, 20):
        engine.process(log.records[engine.offset : cut])
        write_snapshot(engine, layout.engine(0))
    old, new = snapshot_paths(layout.engine(0))
    new.write_bytes(new.read_bytes()[:-100])
    found, warnings = restored_engine(0, layout)
    assert found.offset == 40
    assert "snapshot is damaged" in warnings[0]
    assert new.with_suffix(".bad").exists()
    old.write_bytes(b"")
    found, warnings = restored_engine(0, layout)
    assert (found.offset, len(warnings)) == (0, 1)
    assert Reference(0, layout).process(log.records) == found.process(log.records)


def test_a_full_disk_delays_transitions_and_loses_none(layout: Layout) -> None:
    log, files = busy_log(layout, 300, seed=3), LossyFiles()
    writer = Writer(layout.log(0), files)
    writer.start()
    append(writer, log, 0, len(log.records))
    counters = Counters("worker", layout.run)
    shard = ShardWorker(0, layout, counters, 30.0, files)
    shard.start()
    files.capacity = files.used() + 500
    assert shard.step()  # the engine took them; what it found waits
    assert not shard.step()
    assert counters.values["errors_total{stage=disk_full}"] == 2
    assert "no space left" in counters.warnings[0]
    files.capacity = None
    shard.step()
    shard.stop()
    found = [msgspec.json.decode(record.payload, type=Transition) for record in Reader(layout.transitions(0), 0, files)]
    assert found == Engine(0, layout).process(log.records)


def test_missing_offsets_are_told(layout: Layout) -> None:
    log = busy_log(layout, 30, seed=3)
    folder = layout.log(0)
    first, second = Writer(folder), Writer(folder)
    first.start()
    append(first, log, 0, 10)
    first.close()
    (folder / "00000000000000000015.seg").write_bytes(b"")  # what recovery leaves behind a damaged segment
    second.start()
    append(second, log, 15, 20)
    second.close()
    counters = Counters("worker", layout.run)
    shard = ShardWorker(0, layout, counters, 30.0)
    shard.start()
    while shard.step():
        pass
    shard.stop()
    assert "log 0: offsets 10..14 are missing" in counters.warnings
    assert counters.values["missing_total"] == 5


def test_what_was_written_last_is_found_across_segments(layout: Layout) -> None:
    assert last_written(SegmentStore(layout), 0) == (-1, -1)
    log = busy_log(layout, 60, seed=2)
    found = Engine(0, layout).process(log.records)
    writer = Writer(layout.transitions(0), segment_bytes=2_000)
    writer.start()
    for item in found[:7]:
        writer.append(5, item.received_at, msgspec.json.encode(item))
        writer.commit()
    writer.close()
    assert last_written(SegmentStore(layout), 0) == (found[6].source, found[6].index)


class NoSnapshots(LossyFiles):
    """A disk that has room for all but whole files, until it fails altogether."""

    failure: type[StorageError] = DiskFull

    def replace(self, path: Path, data: bytes) -> None:
        raise self.failure(f"{path}: {self.failure.__name__}")


def test_a_snapshot_that_finds_no_room_is_told_and_one_that_fails_ends_the_worker(layout: Layout) -> None:
    log, files = busy_log(layout, 60, seed=2), NoSnapshots()
    writer = Writer(layout.log(0), files)
    writer.start()
    append(writer, log, 0, 40)
    counters = Counters("worker", layout.run)
    shard = ShardWorker(0, layout, counters, 0.0, files)
    shard.start()
    told = f"{layout.engine(0)}/{40:020d}.snapshot: DiskFull"
    eventually(lambda: not shard.step() and counters.warnings == [told])
    assert shard.safe == 0  # nothing on disk holds what was taken
    files.failure = StorageError
    append(writer, log, 40, 50)
    with pytest.raises(StorageError, match=rf"{50:020d}\.snapshot: StorageError"):
        eventually(lambda: shard.step() and False)


# --- a month at once --------------------------------------------------------------------------------------------------


def test_a_month_of_backlog_at_once_delays_nobody_else_and_needs_no_more_memory(layout: Layout) -> None:
    """Gateway a brings 31 days, as ingest takes them in: many of its frames, then one of b, that is live."""
    log, now = Log(layout), START + 31 * 86_400_000
    log.registry(START, REGISTRIES[0])
    log.ruleset(START, RULES[0])
    writer = Writer(layout.log(0))
    writer.start()
    minutes, share = 31 * 24 * 60, 12 * 60
    series = np.tile(np.array([log.index.series("a1", m) for m in ("pressure_mpa", "flow_lps")], np.uint32), share)
    live_at = []
    for first in range(0, minutes, share):
        times = START + np.repeat(np.arange(first, first + share), 2) * 60_000
        head = FrameHead(log.index.gateway_index["a"], Lane.TELEMETRY, 1, len(log.records), now, len(times), 0)
        for _ in range(20):  # each told twenty times over: more bytes than a few reads take
            log.add(Kind.FRAME, now, pack_frame(head, times, np.where(times // 60_000 % 90 < 9, 2.0, 6.0), series))
        now += 25_000
        live_at.append(len(log.records))
        log.frame(now, "b", Lane.TELEMETRY, [("b1", "pressure_mpa", now, 2.0 if first else 6.0)])
    append(writer, log, 0, len(log.records))
    writer.close()
    counters = Counters("worker", layout.run)
    shard = ShardWorker(0, layout, counters, 30.0)
    shard.start()
    warm_engine()
    tracemalloc.start()
    shard.step()
    others = [item for item in written(layout) if item.subject == "b1"]
    assert [(item.source, item.received_at - item.at_ms) for item in others] == [(live_at[2], 5_000)]
    assert shard.engine.offset < len(log.records)  # it was told while most of the month was still to come
    while shard.step():
        pass
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    shard.stop()
    assert most < 4 * READ_BYTES < sum(len(record.payload) for record in log.records)
    found = written(layout)
    assert found == Engine(0, layout).process(log.records)
    assert sum(item.subject == "a1" and item.edge == Edge.RAISE for item in found) == minutes // 90
    assert shard.engine.counts["late"] > 0


# --- several on one machine -------------------------------------------------------------------------------------------


def test_two_workers_share_the_shards_and_the_run_is_live_with_both_only(layout: Layout) -> None:
    writers = [Writer(layout.log(shard)) for shard in (0, 1)]
    for writer in writers:
        writer.start()
        append(writer, log := busy_log(layout, 200, seed=5), 0, len(log.records))
    expected = Engine(0, layout).process(log.records)

    def missing() -> list[str]:
        beats = {beat.process: beat for beat in read_heartbeats(layout.run)}
        return [text for text in not_live(beats, real_unix_ms(), 2) if "worker" in text]

    assert missing() == ["worker has not started"]
    with worker(layout, 0), worker(layout, 1) as second:
        eventually(lambda: missing() == [] and len(written(layout)) >= len(expected), 20)
        beats = {beat.process: beat for beat in read_heartbeats(layout.run)}
        assert [beat.process for beat in in_force(beats, "worker", 2)] == ["worker-0", "worker-1"]
        assert not_live(beats, real_unix_ms() + 60_000, 2)[1].startswith("worker-0 was last heard 6")
        del beats["worker-1"]
        assert "no worker has shard 1" in not_live(beats, real_unix_ms(), 2)
        second.send_signal(signal.SIGTERM)
        assert second.wait(5) == 0
    for writer in writers:
        writer.close()
    assert written(layout) == expected
    assert snapshot_paths(layout.engine(1))


def test_a_second_worker_on_a_shard_is_refused(layout: Layout) -> None:
    with worker(layout):
        eventually(lambda: beat(layout) is not None)
        argv = [sys.executable, "-m", "citybrain", "worker", "--data", str(layout.root)]
        second = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert second.returncode == EXIT_UNAVAILABLE
    assert "another worker has shard 0" in second.stderr


def test_shards_are_dealt_out_to_the_workers() -> None:
    run = Run(clock=system_clock(), shards=5, workers=2)
    assert workers_of(run) == [("worker-0-2-4", ("--shards", "0,2,4")), ("worker-1-3", ("--shards", "1,3"))]
    assert workers_of(msgspec.structs.replace(run, workers=1)) == [("worker", ())]
    assert [usual_workers(shards, 8) for shards in (1, 2, 3, 6)] == [1, 1, 3, 4]
    assert takes_of("worker-0-2-4", 5) == ("worker", (0, 2, 4))
    assert takes_of("worker", 2) == ("worker", (0, 1))


def test_after_another_division_of_the_shards_only_the_newest_count(layout: Layout) -> None:
    for at, name in enumerate(("worker", "worker-0", "worker-1")):
        Counters(name, layout.run).publish(force=True)
        path = layout.run / f"{name}.heartbeat.json"
        beat = msgspec.json.decode(path.read_bytes(), type=Heartbeat)
        path.write_bytes(msgspec.json.encode(msgspec.structs.replace(beat, at=beat.at + at)))
    beats = {beat.process: beat for beat in read_heartbeats(layout.run)}
    assert [beat.process for beat in in_force(beats, "worker", 2)] == ["worker-0", "worker-1"]
