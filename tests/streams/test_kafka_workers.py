"""Workers that are dealt shards by Kafka or Faust: rebalanced, killed, they write what an undisturbed engine writes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from citybrain.clock import system_clock
from citybrain.counters import Counters, Heartbeat
from citybrain.layout import Layout, Run
from citybrain.model import Transition
from streams.engine import Engine
from streams.log import Kind, decode_transition
from streams.logs import LogWriter
from streams.runtimes.kafka.faust_worker import Shards
from streams.runtimes.kafka.partition import Places
from streams.runtimes.kafka.store import KafkaStore
from streams.runtimes.snapshots import snapshot_paths
from streams.runtimes.stores import Place
from tests.conftest import end, eventually
from tests.kafka_cluster import Cluster
from tests.streams.test_worker import busy_log

SHARDS = 2


class Site:
    """Logs in Kafka, written piece by piece, and workers on them."""

    def __init__(self, folder: Path, address: str, topic_prefix: str, runtime: str, frames: int) -> None:
        self.runtime = runtime
        self.folder, self.address, self.prefix = folder, address, topic_prefix
        self.layout = Layout(folder / "data")
        self.layout.make()
        self.layout.write_run(Run(clock=system_clock(), shards=SHARDS))
        self.store = KafkaStore(address, self.layout, SHARDS, prefix=topic_prefix)
        self.store.open()
        self.logs = [busy_log(self.layout, frames, seed=shard) for shard in range(SHARDS)]
        self.expected = [Engine(shard, self.layout).process(log.records) for shard, log in enumerate(self.logs)]
        self.writers = [self._writer(shard) for shard in range(SHARDS)]
        self.readers = [self.store.reader("transitions", shard) for shard in range(SHARDS)]
        self.found: list[list[Transition]] = [[] for _ in range(SHARDS)]
        self.sent = [0] * SHARDS

    def _writer(self, shard: int) -> LogWriter:
        writer = self.store.writer("log", shard)
        writer.start()
        return writer

    def send(self, count: int, each: int = 7) -> None:
        """Append the next records of every shard's log, so many with each commit."""
        for shard, (log, writer) in enumerate(zip(self.logs, self.writers, strict=True)):
            for number, record in enumerate(log.records[self.sent[shard] : self.sent[shard] + count], 1):
                writer.append(record.kind, record.received_at, record.payload)
                if number % each == 0:
                    writer.commit()
            self.sent[shard] = writer.commit()

    @property
    def left(self) -> int:
        return max(len(log.records) for log in self.logs) - min(self.sent)

    def due(self, shard: int) -> int:
        return sum(item.source < self.sent[shard] for item in self.expected[shard])

    def written(self) -> bool:
        """Read on; return whether every transition that is due has been written."""
        for shard, reader in enumerate(self.readers):
            records = reader.read()
            self.found[shard] += [decode_transition(one.payload) for one in records if one.kind == Kind.TRANSITION]
        return all(len(self.found[shard]) >= self.due(shard) for shard in range(SHARDS))

    @contextmanager
    def worker(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        argv = [sys.executable, "-m", "citybrain", "worker", "--data", str(self.layout.root), "--snapshot-s", "0.2"]
        argv += ["--log", "kafka", "--kafka", self.address, "--topics", self.prefix, "--runtime", self.runtime]
        with (
            (self.folder / f"{name}.log").open("ab") as log,
            subprocess.Popen([*argv, "--name", name, "--session-s", "3"], stdout=log, stderr=log) as process,
        ):
            try:
                yield process
            finally:
                end(process)

    def beat(self, name: str) -> Heartbeat | None:
        path = self.layout.run / f"{name}.heartbeat.json"
        return msgspec.json.decode(path.read_bytes(), type=Heartbeat) if path.exists() else None

    def has(self, name: str) -> int:
        """Return how many shards a worker has by its last word."""
        beat = self.beat(name)
        return -1 if beat is None else len(beat.details.get("assigned", []))


@pytest.fixture(params=["kafka", pytest.param("faust", marks=pytest.mark.soak)])
def site(request: pytest.FixtureRequest, tmp_path: Path, mortal: Cluster, topic_prefix: str) -> Site:
    return Site(tmp_path, mortal.address, topic_prefix, request.param, frames=1200)


def test_through_rebalances_and_kills_every_transition_is_written_once(site: Site, mortal: Cluster) -> None:
    dice = random.Random(3)
    with ExitStack() as stack:
        first = stack.enter_context(site.worker("first"))
        site.send(150)
        eventually(site.written, 60, "what one worker finds")
        second = stack.enter_context(site.worker("second"))
        site.send(20)
        eventually(lambda: site.has("second") == 1, 60, "a shard for the second worker")
        site.send(100)
        eventually(site.written, 60, "what two workers find")
        site.send(100)
        os.kill(first.pid, signal.SIGKILL)  # its shard goes to the second one, behind the session's end
        first.wait(10)
        site.send(dice.randrange(50, 100))
        eventually(site.written, 60, "what the second worker finds alone")
        third = stack.enter_context(site.worker("third"))
        eventually(lambda: site.has("third") == 1, 60, "a shard for the third worker")
        site.send(20)
        second.send_signal(signal.SIGSTOP)  # it does not know that it loses its shard
        site.send(50)
        eventually(lambda: site.has("third") == 2, 60, "both shards for the third worker")
        eventually(site.written, 60, "what the third worker finds alone")
        second.send_signal(signal.SIGCONT)
        site.send(50)
        eventually(lambda: site.has("third") == 1, 60, "the second worker back")
        site.send(50)
        eventually(site.written, 60, "what both find")
        os.kill(second.pid, signal.SIGKILL)
        second.wait(10)
        eventually(lambda: site.has("third") == 2, 60, "the third worker left alone")
        site.send(20)
        eventually(site.written, 60, "what it finds")
        rival = site.store.writer("transitions", 0)
        rival.start()  # a worker that believes the shard is its own; from here on what the third writes is void
        site.send(site.left)
        eventually(site.written, 60, "the rest")
        rival.close()
        third.send_signal(signal.SIGTERM)
        assert third.wait(30) == 0
    assert site.found == site.expected
    last = site.beat("third")
    assert last is not None
    assert last.counters["overtaken_total"] >= 1  # the one that was stopped may have had a batch on its way, too
    assert "another process writes this shard" in last.warnings[-1]
    assert all(len(snapshot_paths(site.layout.engine(shard))) for shard in range(SHARDS))


@pytest.mark.soak
def test_a_broker_that_dies_delays_transitions_and_loses_none(site: Site, mortal: Cluster) -> None:
    with site.worker("first"):
        site.send(100)
        eventually(site.written, 60, "what is found before")
        mortal.brokers[0].kill()
        mortal.revive()
        site.send(site.left)
        eventually(site.written, 90, "what is found after")
    assert site.found == site.expected


# --- what the Faust worker does with what Faust brings ----------------------------------------------------------------


def brought(site: Site) -> list[Any]:
    """Return the events of shard 0 as Faust would have them."""
    places = Places(site.store.settings, site.store.topic("log"), 0)
    places.seek(0)
    found: list[Any] = []
    while (read := places.read())[1]:
        found += [SimpleNamespace(message=SimpleNamespace(offset=one.place, value=one.value)) for one in read[0]]
    places.close()
    return found


def offsets(events: Sequence[Any]) -> list[int]:
    return [event.message.offset for event in events]


def test_whatever_order_faust_brings_records_in_every_transition_is_written_once(
    tmp_path: Path, kafka: str, topic_prefix: str
) -> None:
    site = Site(tmp_path, kafka, topic_prefix, "faust", frames=400)
    counters = Counters("test")
    shards = Shards(Place(site.layout, site.store), counters, snapshot_s=0.0)
    site.send(60, each=5)
    assert shards.take(0, brought(site)[:2]) == []  # not ours yet: whoever has it gets them
    shards.assigned = {0}

    def take(low: int, high: int | None = None) -> list[int]:
        return offsets(shards.take(0, brought(site)[low:high]))

    take(10)  # Faust begins behind what the engine wants: the hole is read from Kafka
    assert counters.values["filled_total"] == 50
    site.send(30, each=5)
    take(4)  # and goes back to what was committed: nothing is taken twice
    assert counters.values["filled_total"] == 50
    settled = offsets(shards.idle()) + offsets(shards.close({0}))
    assert settled[-1] == 17  # a snapshot on disk holds all of them: they may be committed
    assert len(snapshot_paths(site.layout.engine(0))) > 0
    site.send(30, each=5)
    take(18)
    rival = site.store.writer("transitions", 0)
    rival.start()
    site.send(site.left, each=5)
    take(24)  # its transitions do not count, and there is nothing behind it that would wake us
    assert counters.values["overtaken_total"] == 1
    eventually(lambda: site.written() or len(site.found[0]) >= len(site.expected[0]))
    assert site.found[0] == site.expected[0]
    shards.close({0})
    rival.close()


def test_a_shard_that_went_away_while_kafka_did_not_answer_is_given_up(
    tmp_path: Path, mortal: Cluster, topic_prefix: str
) -> None:
    site = Site(tmp_path, mortal.address, topic_prefix, "faust", frames=200)
    site.send(site.left)
    events, counters = brought(site), Counters("test")
    shards = Shards(Place(site.layout, site.store), counters, snapshot_s=30.0)
    shards.assigned = {0}
    shards.take(0, events[:10])
    mortal.brokers[0].signal(signal.SIGSTOP)
    thread = threading.Thread(target=shards.take, args=(0, events[10:]))
    thread.start()
    eventually(lambda: counters.gauges.get("log_waiting_s"), what="the worker waiting for Kafka")
    shards.assigned = set()
    thread.join(20)
    assert not thread.is_alive()
    assert not shards.owned
    mortal.brokers[0].signal(signal.SIGCONT)
