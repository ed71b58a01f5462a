"""What runs on a disk that is really full: `tests/site/test_bad_input.py` mounts one of 3 MiB and runs this there.

Not collected by itself (its name does not begin with `test_`): on a disk with room it would fill it.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path

import pytest

from api.desk import Desk
from api.desk_process import Loop
from api.lease import Lease
from citybrain.clock import DAY_MS, RunClock, system_clock
from citybrain.counters import Counters, read_heartbeats
from citybrain.db.migrations import upgrade
from citybrain.db.schema import alarms
from citybrain.db.store import open_store
from citybrain.errors import DiskFull
from citybrain.layout import Layout, Run
from citybrain.model import Edge, Lane, Reading
from gateway.spool import Spool
from streams.history import frames
from streams.history.manifest import read_manifest
from streams.history.retention import Retention
from streams.runtimes.history import HistoryProcess
from tests.conftest import eventually
from tests.desk_city import City
from tests.engine_logs import START
from tests.history_logs import busy_log
from tests.history_logs import write as write_log
from tests.streams.test_ingest import NOW, Platform, encoded, reading

MOST_BYTES = 8 * 1024 * 1024


class Ballast:
    """A file that takes what room there is, until it is thrown out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> None:
        room = os.statvfs(self.path.parent)
        assert room.f_bavail * room.f_frsize < MOST_BYTES, "this is no small disk"
        with self.path.open("ab", buffering=0) as file:
            while self._takes(file):
                pass

    @staticmethod
    def _takes(file: RawIOBase) -> bool:
        try:
            return bool(file.write(b"x" * 4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return False

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)


@pytest.fixture
def ballast(tmp_path: Path) -> Iterator[Ballast]:
    made = Ballast(tmp_path / "ballast")
    yield made
    made.drop()


def test_the_ingest_log(tmp_path: Path, ballast: Ballast) -> None:
    platform = Platform(tmp_path / "data")
    platform.provision()
    platform.send(encoded([reading()], 1))
    assert platform.ack() == 1
    ballast.load()
    sent = 1
    while platform.ingest.complete:  # the last page of the file still has room
        sent += 1
        platform.send(encoded([reading(at=NOW + sent)], sent))
        acknowledged = platform.ack()
    assert acknowledged == -1
    assert platform.count("errors_total{stage=log}") > 0
    assert platform.warned(str(platform.layout.log(0)), "no space left")
    ballast.drop()
    platform.send(encoded([reading(at=NOW + sent)], sent))
    assert platform.ack() == sent
    platform.restart()
    assert platform.seqs() == list(range(1, sent + 1))


def test_an_ingest_that_starts(tmp_path: Path, ballast: Ballast) -> None:
    """Which rules are in force cannot be published: the log has it, the others are told later."""
    platform = Platform(tmp_path / "data")
    platform.provision()
    ballast.load()
    platform.restart()
    platform.send(encoded([reading()], 1))
    platform.ingest.commit()
    ballast.drop()
    platform.send(encoded([reading()], 1))
    assert platform.ack() == 1


def test_a_spool_gives_up_its_oldest(tmp_path: Path, ballast: Ballast) -> None:
    spool = Spool(tmp_path / "spool", "board", segment_bytes=8192)
    spool.start()
    write(spool, 1)
    ballast.load()
    newest = 1
    while not spool.counters.values["lost_total{reason=evicted}"]:
        newest += 1
        write(spool, newest)
    assert spool.floor(Lane.TELEMETRY) == spool.counters.values["lost_total{reason=evicted}"] + 1
    kept = [seq for seq, _ in spool.read(Lane.TELEMETRY, 1, 10_000, 1 << 30)]
    assert kept == list(range(spool.floor(Lane.TELEMETRY), newest + 1))
    spool.close()


def test_a_spool_that_has_nothing_to_give_up(tmp_path: Path, ballast: Ballast) -> None:
    spool = Spool(tmp_path / "spool", "board")
    spool.start()
    ballast.load()
    with pytest.raises(DiskFull, match=r"telemetry.*no space left"):
        write(spool, 1)
    assert spool.counters.values["dropped_total{reason=disk_full}"] == 1
    assert spool.next_connection(5) == 5, "it still connects, or it could never empty itself"
    assert any("meta.json: no space left" in text for text in spool.counters.warnings)
    ballast.drop()
    write(spool, 2)
    assert spool.next_connection(5) == 6
    spool.close()
    again = Spool(tmp_path / "spool", "board")
    again.start()
    assert (again.epoch, again.connection, again.next_seq(Lane.TELEMETRY)) == (spool.epoch, 6, 2)
    again.close()


def write(spool: Spool, number: int) -> None:
    spool.append(Lane.TELEMETRY, [Reading("d", number, {"flow_lps": 1.0})], number)
    spool.commit()


def test_the_desk(tmp_path: Path, ballast: Ballast) -> None:
    """It waits for room, says so in its heartbeat once there is some, and decides everything once."""
    city = City(tmp_path / "data")
    city.step(0)
    counters = Counters("desk", city.layout.run)
    counters.publish(force=True)
    city.put(*(city.transition("hydrant_tilted", f"hyd-{n:03d}", Edge.RAISE, n) for n in range(300)))
    ballast.load()
    desk = Desk(city.store, city.layout, (0, 1), city.desk.categories, counters=counters)
    desk.start()
    loop = Loop(desk, Lease(city.store, "desk"), None, Run(clock=system_clock(), shards=2), counters)
    running = threading.Thread(target=loop)
    running.start()
    try:
        eventually(lambda: counters.values["errors_total{stage=disk_full}"] >= 1)
        assert city.rows(alarms) == []
        assert any("city.db" in text and "full" in text for text in counters.warnings)
        ballast.drop()
        eventually(lambda: len(city.rows(alarms)) == 300)
    finally:
        loop.stop.set()
        running.join(10)
    assert not running.is_alive()
    (beat,) = read_heartbeats(city.layout.run)
    assert beat.counters["errors_total{stage=disk_full}"] >= 1
    city.close()


def test_the_history(tmp_path: Path, ballast: Ballast) -> None:
    """It keeps no half part, says so in its heartbeat, and goes on where it was."""
    layout = Layout(tmp_path / "data")
    layout.make()
    log = busy_log(layout, 60, 1)
    write_log(layout, log.records)
    process = HistoryProcess(layout, [0], RunClock(START + DAY_MS, 0, 0.0), Retention())
    process.start()
    ballast.load()
    assert process.step() is False
    assert process.counters.values["errors_total{stage=disk_full}"] == 1
    assert any("parquet: no space left" in text for text in process.counters.warnings)
    assert read_manifest(process.compactors[0].folder).parts == ()
    ballast.drop()
    while process.step():
        pass
    assert list(frames(layout, 0, 0, len(log.records))) == log.records


def test_a_database_that_is_made(tmp_path: Path, ballast: Ballast) -> None:
    ballast.load()
    store = open_store(tmp_path / "city.db")
    with pytest.raises(DiskFull, match=r"city\.db: .*full"):
        upgrade(store)
    store.dispose()
    ballast.drop()
    store = open_store(tmp_path / "city.db")
    assert upgrade(store) is None
    store.dispose()


def test_a_heartbeat(tmp_path: Path, ballast: Ballast) -> None:
    counters = Counters("worker", tmp_path)
    counters.add("received_total", 3)
    counters.publish(force=True)
    counters.add("received_total")
    ballast.load()
    counters.publish(force=True)
    assert counters.values["errors_total{stage=heartbeat}"] == 1
    assert "worker.heartbeat.json: no space left" in counters.warnings[0]
    assert read_heartbeats(tmp_path)[0].counters["received_total"] == 3, "the last one still stands"
    ballast.drop()
    counters.publish(force=True)
    assert read_heartbeats(tmp_path)[0].counters["received_total"] == 4


def test_a_spool_that_starts_after_a_kill(tmp_path: Path, ballast: Ballast) -> None:
    """There is no room even for the torn end that the kill left: it starts, and what was committed is there."""
    spool = Spool(tmp_path / "spool", "board")
    spool.start()
    for number in range(1, 4):
        write(spool, number)
    (segment,) = (tmp_path / "spool" / "telemetry").glob("*.seg")
    with segment.open("ab") as file:
        file.write(b"\x40\0\0\0half a record")
    ballast.load()
    again = Spool(tmp_path / "spool", "board")
    again.start()
    assert [seq for seq, _ in again.read(Lane.TELEMETRY, 1, 10, 1 << 20)] == [1, 2, 3]
    assert "not kept: no space left" in again.fault
    assert again.epoch == spool.epoch
    again.close()
