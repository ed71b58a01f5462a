"""`citybrain worker --runtime kafka`: Kafka's own group protocol deals out the shards, each assigned at its snapshot.

What Faust cannot do is one line here: a shard that is assigned begins where its snapshot ends. So nothing is
committed and nothing is skipped. Everything else is as with Faust: the snapshot says where a shard goes on, the
transition log says which of two workers counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FrameType

from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from citybrain.counters import Counters
from citybrain.errors import Overtaken, StorageError, Unavailable
from citybrain.layout import Run
from streams.runtimes.kafka.parcels import opened
from streams.runtimes.kafka.partition import CONSUMER, PASSING, offset_of, place_of
from streams.runtimes.kafka.store import KafkaStore
from streams.runtimes.shard_worker import ShardWorker, publish
from streams.runtimes.stores import Place
from streams.warm import warm_engine

GROUP = "citybrain-worker"
MOST_PARCELS = 32  # of one call: at most 16 MiB, as a rule much less
WAIT_S = 0.05
SESSION_S = 10.0  # who says nothing for so long loses its shards [U: our choice; Kafka's least is 6 s by default]


class GroupWorker:
    """The loop over the shards that are ours now. `run` returns when `stop` has been called."""

    def __init__(self, place: Place, run: Run, snapshot_s: float, name: str, session_s: float = SESSION_S) -> None:
        assert isinstance(place.logs, KafkaStore)
        self.counters = Counters(name, place.layout.run)
        self.shards: dict[int, ShardWorker] = {}
        self._layout, self._logs = place.layout, place.logs
        self._topic = place.logs.topic("log")
        self._clock = run.clock
        self._period_s = snapshot_s
        self._stopping = False
        self._consumer = Consumer(place.logs.settings | CONSUMER | {
            "group.id": place.logs.prefix + GROUP,
            "partition.assignment.strategy": "cooperative-sticky",  # a rebalance stops only the shards that move
            "session.timeout.ms": int(session_s * 1000),
            "heartbeat.interval.ms": int(session_s * 200),
            "max.poll.interval.ms": 600_000,  # a write that waits for Kafka may take that long [U: our choice]
        })  # fmt: skip
        place.logs.waiting = self._waiting

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """End the loop; also a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Join the group and serve until stopped; raises StorageError, Unavailable."""
        self._publish(force=True)
        warm_engine()
        self._consumer.subscribe([self._topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)
        while not self._stopping:
            self._step()
            self._publish()
        self._consumer.close()  # gives the shards back: each with a last snapshot
        self._publish(force=True)

    def _step(self) -> None:
        by_shard: dict[int, list[Message]] = {}
        for message in self._consumer.consume(MOST_PARCELS, WAIT_S):
            error = message.error()
            if error is None:
                by_shard.setdefault(message.partition() or 0, []).append(message)
            elif error.code() != KafkaError._PARTITION_EOF and error.code() not in PASSING and not error.retriable():
                raise Unavailable(f"Kafka {self._topic}: {error}")
        for shard, messages in by_shard.items():
            self._take(shard, messages)
        for shard in self.shards.keys() - by_shard.keys():
            self.shards[shard].idle()

    def _take(self, shard: int, messages: Sequence[Message]) -> None:
        worker = self.shards.get(shard)
        if worker is None:
            return
        parcels = [opened(offset_of(message), message.value() or b"") for message in messages]
        records = (record for parcel in parcels if parcel is not None for record in parcel.records())
        following = [record for record in records if record.offset >= worker.engine.offset]
        try:
            if following:
                worker.take(following)
        except Overtaken as error:
            self.counters.warn(f"shard {shard} is restored from its snapshot: {error}")
            self.counters.add("overtaken_total")
            worker.abandon()
            self._consumer.seek(self._open(shard))

    def _open(self, shard: int) -> TopicPartition:
        """Restore a shard; return where it goes on."""
        worker = self.shards[shard] = ShardWorker(shard, self._layout, self.counters, self._period_s, logs=self._logs)
        worker.start()
        self.counters.add("opened_total")
        place = place_of(self._logs.settings, self._topic, shard, worker.engine.offset)
        return TopicPartition(self._topic, shard, place)

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self.counters.add("rebalances_total")
        consumer.incremental_assign([self._open(one.partition) for one in partitions])

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Give shards back, each with a snapshot as new as its last record."""
        for one in partitions:
            worker = self.shards.pop(one.partition, None)
            if worker is not None:
                worker.stop()
        consumer.incremental_unassign(partitions)

    def _lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Others have these shards by now: their snapshots are newer than ours could be."""
        for one in partitions:
            worker = self.shards.pop(one.partition, None)
            if worker is not None:
                worker.abandon()
        consumer.incremental_unassign(partitions)

    def _waiting(self, waited_s: float) -> None:
        """Live on while Kafka does not answer; raises StorageError once we are told to stop."""
        self.counters.gauges["log_waiting_s"] = waited_s
        self.counters.publish()
        if self._stopping:
            raise StorageError(f"stopped while Kafka did not answer for {waited_s:.0f} s; what waited is made again")

    def _publish(self, *, force: bool = False) -> None:
        self.counters.details["assigned"] = sorted(self.shards)
        publish(self.counters, list(self.shards.values()), self._clock.now_ms(), force=force)
