"""The shards' logs as topics of Kafka: partition = shard, one Kafka record a log record.

    value = offset u64 · received_at i64 · kind u8 · 7 × 0 · payload        (the header of citybrain.segments)

**A record counts only where its writer believed it to be.** The writer numbers its records before they are stored, so
that its state and its log move together; the number stands in the record. A reader gives a record whose number is not
its Kafka offset as `VOID`. So whatever a writer of yesterday still had on its way when its successor began changes
nothing: it lands behind the successor's records, or they land behind it, and who is wrong learns it from the first
acknowledgement, before anybody was told that the batch is safe. This needs no transactions, whose markers would
take up offsets, and no lease.

Stored means acks=all: on every replica that is in sync, at least `min.insync.replicas` of them. What is not
acknowledged is sent again by the same idempotent producer, in order and without end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from citybrain.clock import monotonic_s, wait_s
from citybrain.errors import ConfigError, Damaged, Overtaken, StorageError, Unavailable
from citybrain.layout import Layout
from citybrain.segments import HEADER, MAX_RECORD, Record
from streams.log import Kind
from streams.logs import LogReader, LogWriter, Name, ignore_waiting
from streams.runtimes.kafka.blobs import Blobs

VOID = int(Kind.VOID)
NOWHERE = 2**64 - 1  # the number of a record that is to count nowhere
ANSWER_S = (
    15.0  # how long we wait for an answer that changes nothing; a write is waited for without end [U: our choice]
)
WAITING_S = 1.0  # after so long a caller is told that a write waits, and again each time
SEGMENT_BYTES = 32 * 1024 * 1024  # how often ingest writes its cursors again: recovery reads about so much
LOOK_BACK = 4096  # records a step when looking backwards
REPLICAS, IN_SYNC = 3, 2  # where there are three brokers: one may be gone without anybody noticing
PREFIX = "citybrain."
PAUSE_S = 0.05
CHANGING = (  # a topic is new to the broker that is asked, or its leader is being chosen
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION,
)
RESET = (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE)


def pack(offset: int, received_at: int, kind: int, payload: bytes) -> bytes:
    """Return the value of a Kafka record."""
    return HEADER.pack(offset, received_at, kind) + payload


def unpack(offset: int, value: bytes) -> Record:
    """Return the log record that stands at an offset; one of kind VOID where it does not count there."""
    if len(value) < HEADER.size:
        return Record(offset, 0, VOID, b"")
    number, received_at, kind = HEADER.unpack_from(value)
    return Record(offset, received_at, kind, value[HEADER.size :]) if number == offset else Record(offset, 0, VOID, b"")


def offset_of(message: Message) -> int:
    """Return where a message stands; the client does not know only before it is stored."""
    offset = message.offset()
    assert offset is not None
    return offset


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
        self._buffer: list[bytes] = []
        self._landed: list[int] = []
        self._failure = ""
        self._size = 0
        self._broken = True

    def start(self) -> None:
        """Find the end of the partition by writing there: what an earlier writer still had on its way is before it."""
        end = watermarks(self._settings, self._topic, self._shard)[1]
        if end:
            self._send([pack(NOWHERE, 0, VOID, b"")])
            end = self._landed[0] + 1
        self.next_offset = self.committed = self.segment = end
        self._broken = False

    def append(self, kind: int, received_at: int, payload: bytes) -> int:
        """Buffer a record and return its offset; raises StorageError: too large."""
        if len(payload) > MAX_RECORD - HEADER.size:
            raise StorageError(f"{self._topic}: record of {len(payload)} bytes, at most {MAX_RECORD} fit")
        offset = self.next_offset
        self._buffer.append(pack(offset, received_at, kind, payload))
        self.next_offset += 1
        return offset

    def discard(self) -> None:
        """Forget what was appended since the last commit; nothing of it was sent."""
        self._buffer.clear()
        self.next_offset = self.committed

    def commit(self) -> int:
        """Send what was appended and wait until all replicas in sync have it; return the offset behind it.

        Raises Overtaken where another writer was there, StorageError where Kafka refuses it for good: the process must
        end, or whatever rests on this writer be recovered.
        """
        if self._broken:
            raise StorageError(f"{self._where}: not started, or a commit failed; the process must end and recover")
        if not self._buffer:
            return self.committed
        batch, self._buffer = self._buffer, []
        self._broken = True
        self._send(batch)
        if self._landed != list(range(self.committed, self.next_offset)):
            raise Overtaken(
                f"{self._where}: written at {self._landed[0]}, expected {self.committed}: another process writes this "
                "shard; of two that do one must end"
            )
        self._broken = False
        self.committed = self.next_offset
        self._size += sum(map(len, batch))
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
        self._buffer.clear()
        self._producer.purge()
        self._producer.flush(0)


class KafkaReader:
    """Reads one partition from an offset on; the contract is `streams.logs.LogReader`. Voids are among the records."""

    def __init__(self, settings: dict[str, Any], topic: str, shard: int, offset: int) -> None:
        self.offset = offset
        self._settings = settings
        self._topic, self._shard = topic, shard
        self._consumer: Consumer | None = None  # made with the first read
        self._at_end = False

    def read(self, most_bytes: int = 8 * 1024 * 1024) -> list[Record]:
        """Return the next records, [] at the end; raises Unavailable where Kafka does not answer.

        Offsets below the topic's retention are skipped; raises Damaged where the topic ends before our offset.
        """
        consumer = self._consumer or self._assign()
        taken: list[Record] = []
        size, until_s = 0, monotonic_s() + ANSWER_S
        while size < most_bytes and not (taken and self._at_end):
            messages = consumer.consume(BURST, 0.0 if self._at_end or taken else 0.1)
            if not messages:
                if taken or self._at_end:
                    break
                if monotonic_s() > until_s:
                    raise Unavailable(f"Kafka {self._topic} partition {self._shard}: no answer in {ANSWER_S:g} s")
            for message in messages:
                record = self._take(message)
                if record is not None:
                    taken.append(record)
                    size += len(record.payload)
        return taken

    def _take(self, message: Message) -> Record | None:
        error = message.error()
        if error is None:
            self._at_end = False
            offset = offset_of(message)
            self.offset = offset + 1
            return unpack(offset, message.value() or b"")
        if error.code() == KafkaError._PARTITION_EOF:
            self._at_end = True
        elif error.code() in RESET:
            self._out_of_range()
        elif not error.retriable() and error.code() not in PASSING:
            raise Unavailable(f"Kafka {self._topic} partition {self._shard}: {error}")
        return None

    def _assign(self) -> Consumer:
        self._consumer = self._consumer or Consumer(self._settings | CONSUMER)
        self._consumer.assign([TopicPartition(self._topic, self._shard, self.offset)])
        self._at_end = False
        return self._consumer

    def _out_of_range(self) -> None:
        low, high = watermarks(self._settings, self._topic, self._shard)
        if self.offset > high:
            where = f"Kafka {self._topic} partition {self._shard}"
            raise Damaged(where, self.offset, f"it ends at {high}: Kafka lost what was read before; restore it")
        self.offset = max(self.offset, low)
        self._assign()

    def close(self) -> None:
        if self._consumer is not None:
            self._consumer.close()


BURST = 1000
PASSING = (*CHANGING, KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT, KafkaError._RESOLVE, KafkaError._TIMED_OUT)
PRODUCER = {
    "acks": "all",
    "enable.idempotence": True,
    "message.timeout.ms": 0,  # without end: who gives up cannot know what is stored
    "linger.ms": 0,
    "message.max.bytes": MAX_RECORD + 1024,
    "queue.buffering.max.kbytes": 262_144,
    "retry.backoff.ms": 50,
    "retry.backoff.max.ms": 1000,
    "reconnect.backoff.max.ms": 1000,
}
CONSUMER = {
    "group.id": "citybrain-reader",  # nothing is ever committed under it
    "enable.auto.commit": False,
    "enable.partition.eof": True,
    "auto.offset.reset": "error",
    "fetch.message.max.bytes": MAX_RECORD + 1024,
    "fetch.wait.max.ms": 50,
    "queued.max.messages.kbytes": 32_768,
    "reconnect.backoff.max.ms": 1000,
}


def watermarks(settings: dict[str, Any], topic: str, shard: int) -> tuple[int, int]:
    """Return (first offset, offset behind the last) of a partition; raises Unavailable."""
    consumer = Consumer(settings | CONSUMER)
    until_s = monotonic_s() + ANSWER_S
    try:
        while True:
            try:
                return consumer.get_watermark_offsets(TopicPartition(topic, shard), timeout=ANSWER_S)
            except KafkaException as error:
                passes = error.args[0].retriable() or error.args[0].code() in CHANGING
                if not passes or monotonic_s() > until_s:
                    unavailable(settings, error)
            wait_s(PAUSE_S)
    finally:
        consumer.close()


def unavailable(settings: dict[str, Any], error: KafkaException) -> NoReturn:
    """Raise Unavailable with what Kafka, or the client, said."""
    raise Unavailable(f"Kafka {settings['bootstrap.servers']}: {error.args[0].str()}; is it running?") from None


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
        admin = AdminClient(self.settings)
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

    def starts(self, name: Name, shard: int) -> list[int]:
        """Return every LOOK_BACK-th offset, the first one among them; offsets are dense, so no index is needed."""
        low, high = watermarks(self.settings, self.topic(name), shard)
        return sorted({low, *range(high - LOOK_BACK, low, -LOOK_BACK)}) if high > low else []

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
        "max.message.bytes": str(MAX_RECORD + 1024),
    }


def _created(future: Any) -> None:
    """Wait until a topic is made; that another process made it meanwhile is as good."""
    try:
        future.result(ANSWER_S)
    except KafkaException as error:
        if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise
