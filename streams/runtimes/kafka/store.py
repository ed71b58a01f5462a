"""The shards' logs as topics of Kafka: partition = shard, one Kafka record a parcel (streams.runtimes.kafka.parcels).

**A parcel counts only where its writer believed it to be.** The writer numbers its records before they are stored, so
that its state and its log move together; the Kafka offset that it expects stands in the parcel. A reader passes over a
parcel that stands elsewhere. So whatever a writer of yesterday still had on its way when its successor began changes
nothing: it lands behind the successor's parcels, or they land behind it, and who is wrong learns it from the first
acknowledgement, before anybody was told that the batch is safe. This needs no transactions and no lease.

Stored means acks=all: on every replica that is in sync, at least `min.insync.replicas` of them. What is not
acknowledged is sent again by the same idempotent producer, in order and without end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from citybrain.clock import monotonic_s
from citybrain.errors import ConfigError, Damaged, Overtaken, StorageError, Unavailable
from citybrain.layout import Layout
from streams.logs import LogReader, LogWriter, Name, ignore_waiting
from streams.runtimes.kafka.blobs import Blobs
from streams.runtimes.kafka.parcels import MOST_BYTES, Packer, fence
from streams.runtimes.kafka.partition import (
    ANSWER_S,
    KafkaReader,
    Search,
    end_of,
    offset_of,
    starts,
    unavailable,
    watermarks,
)

WAITING_S = 1.0  # after so long a caller is told that a write waits, and again each time
SEGMENT_BYTES = 32 * 1024 * 1024  # how often ingest writes its cursors again: recovery reads about so much
REPLICAS, IN_SYNC = 3, 2  # where there are three brokers: one may be gone without anybody noticing
PREFIX = "citybrain."


class KafkaWriter:
    """The writer of one partition; the contract is `streams.logs.LogWriter`.

    `waiting` is called about once a second while Kafka does not answer a commit; what it raises gives the commit up,
    and the writer is broken.
    """

    def __init__(self, settings: dict[str, Any], topic: str, shard: int, waiting: Callable[[float], None]) -> None:
        self.warnings: list[str] = []
        self.next_offset = self.committed = self.segment = 0
        self._producer = Producer(settings | PRODUCER)
        self._settings = settings
        self._topic, self._shard = topic, shard
        self._waiting = waiting
        self._packer = Packer()
        self._place = 0  # where in Kafka the next parcel will stand
        self._landed: list[int] = []
        self._failure = ""
        self._size = 0
        self._broken = True

    def start(self) -> None:
        """Find the end of the log by writing there: what an earlier writer still had on its way is before it.

        Raises Damaged where retention took every parcel, and with them the number to go on with.
        """
        self._place = watermarks(self._settings, self._topic, self._shard)[1]
        if self._place:
            self._send([fence()])
            self._place = self._landed[0] + 1
        self.next_offset = self.committed = self.segment = self._end()
        self._broken = False

    def _end(self) -> int:
        search = Search(self._settings, self._topic, self._shard, self._place)
        try:
            last = search.last()
        finally:
            search.close()
        if last is None and search.low:
            raise Damaged(self._where, search.low, "retention removed all of it: no number to go on with; restore it")
        return 0 if last is None else last.next

    def append(self, kind: int, received_at: int, payload: bytes) -> int:
        """Buffer a record and return its offset; raises StorageError: too large."""
        self._packer.add(kind, received_at, payload)
        self.next_offset += 1
        return self.next_offset - 1

    def discard(self) -> None:
        """Forget what was appended since the last commit; nothing of it was sent."""
        self._packer.clear()
        self.next_offset = self.committed

    def commit(self) -> int:
        """Send what was appended and wait until all replicas in sync have it; return the offset behind it.

        Raises Overtaken where another writer was there, StorageError where Kafka refuses it for good: the process must
        end, or whatever rests on this writer be recovered.
        """
        if self._broken:
            raise StorageError(f"{self._where}: not started, or a commit failed; the process must end and recover")
        parcels = self._packer.values(self._place, self.committed, self.segment)
        if not parcels:
            return self.committed
        self._broken = True
        self._size += self._packer.bytes
        self._packer.clear()
        self._send(parcels)
        if self._landed != list(range(self._place, self._place + len(parcels))):
            raise Overtaken(
                f"{self._where}: stored at {self._landed[0]}, expected {self._place}: another process writes this "
                "shard; of two that do one must end"
            )
        self._broken = False
        self._place += len(parcels)
        self.committed = self.next_offset
        if self._size > SEGMENT_BYTES:
            self.segment, self._size = self.committed, 0
        return self.committed

    @property
    def _where(self) -> str:
        return f"Kafka {self._topic} partition {self._shard}"

    def _send(self, values: list[bytes]) -> None:
        self._landed, self._failure = [], ""
        for value in values:
            while True:
                try:
                    self._producer.produce(self._topic, value, partition=self._shard, on_delivery=self._delivered)
                    break
                except BufferError:  # its queue is full: let it send
                    self._producer.poll(WAITING_S)
        began_s = monotonic_s()
        while self._producer.flush(WAITING_S):
            if self._failure:
                break
            self._waiting(monotonic_s() - began_s)
        if self._failure:
            raise StorageError(f"{self._where}: {self._failure}; nothing of the batch is acknowledged")

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._failure = self._failure or str(error)
        else:
            self._landed.append(offset_of(message))

    def close(self) -> None:
        """Let go; what was not committed was never sent."""
        self._packer.clear()
        self._producer.purge()
        self._producer.flush(0)


PRODUCER = {
    "acks": "all",
    "enable.idempotence": True,
    "message.timeout.ms": 0,  # without end: who gives up cannot know what is stored
    "linger.ms": 0,
    "message.max.bytes": MOST_BYTES + 1024,
    "queue.buffering.max.kbytes": 262_144,
    "retry.backoff.ms": 50,
    "retry.backoff.max.ms": 1000,
    "reconnect.backoff.max.ms": 1000,
}


class KafkaStore:
    """All logs of a run in Kafka; the contract is `streams.logs.LogStore`.

    address: HOST:PORT, several with commas. `open` makes the topics where there are none. `settings` are further ones
    of librdkafka (TLS, passwords).
    """

    def __init__(
        self,
        address: str,
        layout: Layout,
        shards: int,
        *,
        prefix: str = PREFIX,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.settings: dict[str, Any] = {"bootstrap.servers": address, "log_level": 2} | (settings or {})
        self.prefix = prefix
        self.shards = shards
        self.waiting: Callable[[float], None] = ignore_waiting
        self.blobs = Blobs(self.settings, prefix + "blobs", layout)

    def topic(self, name: Name) -> str:
        return self.prefix + name

    def open(self) -> None:
        """Make the topics that are missing; raises Unavailable, or ConfigError where one has other partitions."""
        for last in (False, False, True):
            try:
                partitions = self._make_topics()
                break
            except KafkaException as error:
                # The client lets go of the address it was given once it knows the brokers' own, with what it had asked.
                if last or error.args[0].code() != KafkaError._DESTROY_BROKER:
                    unavailable(self.settings, error)
        for name in NAMES:
            found = partitions.get(self.topic(name), self.shards)
            if found != self.shards:
                raise ConfigError(
                    f"Kafka topic {self.topic(name)}", f"has {found} partitions, the run has {self.shards} shards"
                )

    def _make_topics(self) -> dict[str, int]:
        """Make the topics that are missing; return how many partitions each topic has."""
        heard: list[str] = []
        admin = AdminClient(self.settings | {"error_cb": lambda error: heard.append(error.str())})
        try:
            return self._made(admin)
        except KafkaException as error:
            admin.poll(0)  # why, in the client's words: such as TLS that is spoken on one side only
            if error.args[0].code() == KafkaError._DESTROY_BROKER or not heard:
                raise
            why = next((one for one in heard if "brokers are down" not in one), heard[0])
            raise Unavailable(
                f"Kafka {self.settings['bootstrap.servers']}: {error.args[0].str()}: {why}; is it running, and "
                "does --kafka-config say how to get in?"
            ) from None

    def _made(self, admin: AdminClient) -> dict[str, int]:
        known = admin.list_topics(timeout=ANSWER_S)
        brokers = len(known.brokers)
        topics = [*(self._new(self.topic(name), brokers) for name in NAMES), self._new_blobs(brokers)]
        missing = [topic for topic in topics if topic.topic not in known.topics]
        for future in admin.create_topics(missing).values() if missing else ():
            _created(future)
        known = admin.list_topics(timeout=ANSWER_S)
        return {name: len(topic.partitions) for name, topic in known.topics.items()}

    def _new(self, topic: str, brokers: int) -> NewTopic:
        return NewTopic(topic, self.shards, min(REPLICAS, brokers), config=durable(brokers) | {"retention.ms": "-1"})

    def _new_blobs(self, brokers: int) -> NewTopic:
        config = durable(brokers) | {"cleanup.policy": "compact"}
        return NewTopic(self.blobs.topic, 1, min(REPLICAS, brokers), config=config)

    def writer(self, name: Name, shard: int) -> LogWriter:
        return KafkaWriter(self.settings, self.topic(name), shard, self._wait)

    def _wait(self, waited_s: float) -> None:
        self.waiting(waited_s)  # whoever it is by now

    def reader(self, name: Name, shard: int, offset: int = 0) -> LogReader:
        return KafkaReader(self.settings, self.topic(name), shard, offset)

    def starts(self, name: Name, shard: int) -> Iterator[int]:
        return starts(self.settings, self.topic(name), shard)

    def end(self, name: Name, shard: int) -> int:
        return end_of(self.settings, self.topic(name), shard)

    def where(self, name: Name, shard: int) -> str:
        return f"Kafka {self.topic(name)} partition {shard}"

    def share(self, content: str) -> None:
        self.blobs.share(content)

    def forget(self, content: str) -> None:
        self.blobs.forget(content)


NAMES: tuple[Name, ...] = ("log", "transitions")


def durable(brokers: int) -> dict[str, str]:
    """Return the settings of a topic that may lose a broker of three."""
    return {
        "min.insync.replicas": str(IN_SYNC if brokers >= REPLICAS else 1),
        "unclean.leader.election.enable": "false",
        "max.message.bytes": str(MOST_BYTES + 1024),
    }


def _created(future: Any) -> None:
    """Wait until a topic is made; that another process made it meanwhile is as good."""
    try:
        future.result(ANSWER_S)
    except KafkaException as error:
        if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise
