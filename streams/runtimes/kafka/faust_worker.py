"""`citybrain worker --runtime faust`: Faust deals out the shards; each runs the same engine as in the embedded runtime.

Faust brings membership, rebalances and the records. What a shard's state is, is not left to it:

- **The snapshot says where a shard goes on.** Records below it are skipped; where Faust brings a later one than the
  engine wants (it seeks to what was committed, and hands on what it had buffered), the hole is read from Kafka here.
  So no commit, lost or late, can lose or repeat anything. No Tables, no exactly-once mode.
- **An offset is committed once a snapshot on disk holds it**, so that what Faust brings after a rebalance is short.
- **Who was overtaken starts again.** Two workers may have a shard for a moment. The transition log tells them apart
  (streams.runtimes.kafka.store): the one whose records did not count forgets the shard and restores it.

docs/distributed.md says what was found, and what is better done without Faust.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import faust

from citybrain.counters import Counters
from citybrain.errors import CityBrainError, Overtaken
from citybrain.layout import Run
from citybrain.segments import Record
from streams.runtimes.kafka.access import faust_credentials
from streams.runtimes.kafka.parcels import opened
from streams.runtimes.kafka.store import KafkaStore
from streams.runtimes.shard_worker import ShardWorker, publish
from streams.runtimes.stores import Place
from streams.warm import warm_engine

GROUP = "citybrain-worker"
MOST_PARCELS = 32  # of one batch: at most 16 MiB, as a rule much less
WITHIN_S = 0.02  # how long Faust gathers a batch that is not full; it is added to every delay
SETTINGS: dict[str, Any] = {
    "store": "memory://",
    "topic_disable_leader": True,
    "topic_allow_declare": False,
    "web_enabled": False,
    "autodiscover": False,
    "stream_wait_empty": False,  # we acknowledge late on purpose; a rebalance must not wait for it
    "stream_buffer_maxsize": 2 * MOST_PARCELS,
    "broker_commit_interval": 1.0,
    "broker_commit_livelock_soft_timeout": 3600.0,  # between two snapshots nothing is committed: that is no livelock
    "consumer_max_fetch_size": 8 * 1024 * 1024,
    "consumer_auto_offset_reset": "earliest",
    "broker_request_timeout": 20.0,
    "consumer_connections_max_idle_ms": 540_000,
}


class Brought(NamedTuple):
    """What Faust brought: its event, and the log records in it; none where the parcel does not count."""

    event: Any
    records: list[Record]

    @property
    def next(self) -> int:
        """The log offset behind the last record."""
        return self.records[-1].offset + 1 if self.records else 0


def unpacked(event: Any) -> Brought:
    """Return what is in an event; raises Damaged."""
    parcel = opened(event.message.offset, event.message.value)
    return Brought(event, [] if parcel is None else parcel.records())


class Owned:
    """A shard while it is ours: its worker, and what Faust waits for us to acknowledge."""

    def __init__(self, worker: ShardWorker, unacknowledged: deque[Brought]) -> None:
        self.worker = worker
        self.unacknowledged = unacknowledged

    def settled(self) -> list[Any]:
        """Take out the events that a snapshot on disk holds."""
        found = []
        while self.unacknowledged and self.unacknowledged[0].next <= self.worker.safe:
            found.append(self.unacknowledged.popleft().event)
        return found


class Shards:
    """The shards that are ours now. Everything here blocks and runs in one thread at a time, beside Faust's loop."""

    def __init__(self, place: Place, counters: Counters, snapshot_s: float) -> None:
        self.owned: dict[int, Owned] = {}
        self.assigned: set[int] = set()
        self._kept: dict[int, deque[Brought]] = {}  # of a shard that is being restored
        self._layout, self._logs, self._counters, self._period_s = place.layout, place.logs, counters, snapshot_s
        place.logs.waiting = self._waiting
        self._at_work = -1

    def take(self, shard: int, events: Iterable[Any]) -> list[Any]:
        """Take what Faust brought of a shard; return the events that may be acknowledged by now. Raises Damaged."""
        self._at_work = shard
        brought = [unpacked(event) for event in events]
        records = [record for one in brought for record in one.records]
        while shard in self.assigned:
            try:
                owned = self.owned.get(shard) or self._open(shard)
                if records:
                    self._fill(owned.worker, records[0].offset)
                following = [record for record in records if record.offset >= owned.worker.engine.offset]
                if following:
                    owned.worker.take(following)
            except Overtaken as error:
                self._forget(shard, str(error))  # and at once again: these may be the last records for long
                continue
            owned.unacknowledged.extend(brought)
            return owned.settled()
        return []  # of before a rebalance: whoever has the shard now gets them

    def _open(self, shard: int) -> Owned:
        worker = ShardWorker(shard, self._layout, self._counters, self._period_s, logs=self._logs)
        worker.start()
        self._counters.add("opened_total")
        owned = self.owned[shard] = Owned(worker, self._kept.pop(shard, deque()))
        return owned

    def _fill(self, worker: ShardWorker, until: int) -> None:
        """Read what stands between what the engine wants and what Faust brought; raises Overtaken."""
        if worker.engine.offset >= until:
            return
        self._counters.add("filled_total", until - worker.engine.offset)
        reader = self._logs.reader("log", worker.shard, worker.engine.offset)
        while worker.engine.offset < until and (records := reader.read()):
            worker.take(records)

    def _forget(self, shard: int, why: str) -> None:
        """Drop a shard whose state is not what the transition log says; what is unacknowledged of it stays so."""
        self._counters.warn(f"shard {shard} is restored from its snapshot: {why}")
        self._counters.add("overtaken_total")
        owned = self.owned.pop(shard, None)
        if owned is not None:
            owned.worker.abandon()
            self._kept[shard] = owned.unacknowledged

    def _waiting(self, waited_s: float) -> None:
        self._counters.gauges["log_waiting_s"] = waited_s
        self._counters.publish()
        if self._at_work not in self.assigned:
            raise Overtaken(f"shard {self._at_work} went to another worker while Kafka did not answer")

    def idle(self) -> list[Any]:
        """Write the snapshots that are due; return the events that may be acknowledged by now."""
        for owned in self.owned.values():
            owned.worker.idle()
        return [event for owned in self.owned.values() for event in owned.settled()]

    def close(self, shards: Iterable[int]) -> list[Any]:
        """Write last snapshots, so that whoever has these shards next begins there; return what they settle."""
        events: list[Any] = []
        self._kept.clear()
        for shard in sorted(set(shards) & self.owned.keys()):
            owned = self.owned.pop(shard)
            owned.worker.stop()
            events += owned.settled()
        return events


class FaustWorker:
    """The application. `run` returns when the process was told to stop."""

    def __init__(self, address: str, place: Place, run: Run, snapshot_s: float, name: str, session_s: float) -> None:
        assert isinstance(place.logs, KafkaStore)
        self.counters = Counters(name, place.layout.run)
        self.shards = Shards(place, self.counters, snapshot_s)
        self._run = run
        self._topic_name = place.logs.topic("log")
        self._lock = asyncio.Lock()
        brokers = ";".join(f"kafka://{one}" for one in address.split(","))
        session: dict[str, Any] = {"broker_session_timeout": session_s, "broker_heartbeat_interval": session_s / 5}
        folder = place.layout.run / f"faust-{name}"
        session["broker_credentials"] = faust_credentials(place.logs.settings)
        self.app = faust.App(place.logs.prefix + GROUP, broker=brokers, datadir=str(folder), **SETTINGS, **session)
        self._topic = self.app.topic(self._topic_name, value_type=bytes, value_serializer="raw", key_serializer="raw")
        self.app.agent(self._topic, name="detect")(self._detect)
        self.app.timer(1.0)(self._every_second)
        self.app.on_partitions_assigned.connect(self._assigned, weak=False)
        self.app.on_partitions_revoked.connect(self._revoked, weak=False)
        self.app.on_before_shutdown.connect(self._stopping, weak=False)

    def run(self) -> None:
        """Serve until told to stop; ends the process."""
        warm_engine()
        self.counters.publish(force=True)
        worker = faust.Worker(self.app, loglevel="WARN", quiet=True, redirect_stdouts=False)
        worker.execute_from_commandline()

    async def _detect(self, stream: Any) -> None:
        try:
            await self._serve(stream)
        except CityBrainError as error:  # Faust would start the agent again; whoever supervises us starts all of it
            self.counters.warn(str(error))
            self.counters.publish(force=True)
            await self.app.crash(error)
            raise

    async def _serve(self, stream: Any) -> None:
        async for events in stream.noack_take(MOST_PARCELS, within=WITHIN_S):
            by_shard: dict[int, list[Any]] = {}
            for event in events:
                by_shard.setdefault(event.message.partition, []).append(event)
            for shard, own in by_shard.items():
                async with self._lock:
                    done = await asyncio.to_thread(self.shards.take, shard, own)
                self._acknowledge(done)
            self._publish()

    def _acknowledge(self, events: Iterable[Any]) -> None:
        for event in events:
            event.ack()

    async def _every_second(self) -> None:
        async with self._lock:
            done = await asyncio.to_thread(self.shards.idle)
        self._acknowledge(done)
        self._publish()

    def _ours(self, partitions: Iterable[Any]) -> set[int]:
        return {tp.partition for tp in partitions if tp.topic == self._topic_name}

    async def _assigned(self, *arguments: Any, **_: Any) -> None:
        """Take over shards (application, partitions); what of them is on disk is read with their first records."""
        self.shards.assigned = self._ours(arguments[1])
        self.counters.add("rebalances_total")

    async def _revoked(self, *arguments: Any, **_: Any) -> None:
        """Give shards (application, partitions) back, with a snapshot as new as their last record."""
        gone = self._ours(arguments[1])
        self.shards.assigned -= gone
        async with self._lock:
            await asyncio.to_thread(self.shards.close, gone)

    async def _stopping(self, *_: Any, **__: Any) -> None:
        async with self._lock:
            done = await asyncio.to_thread(self.shards.close, list(self.shards.owned))
        self._acknowledge(done)
        self._publish(force=True)

    def _publish(self, *, force: bool = False) -> None:
        self.counters.details["assigned"] = sorted(self.shards.assigned)
        workers = [owned.worker for owned in self.shards.owned.values()]
        publish(self.counters, workers, self._run.clock.now_ms(), force=force)
