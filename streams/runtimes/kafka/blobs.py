"""Content by hash in a compacted topic; the data folder's `blobs` is this machine's cache of it.

A blob is cut into parts of at most 512 KiB, each under the key `<sha256>/<part>/<parts>`: compaction keeps what nobody
forgot. A blob is there when all of its parts are; the hash proves it.
"""

from __future__ import annotations

from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from citybrain.clock import monotonic_s
from citybrain.errors import NotFound, StorageError, Unavailable
from citybrain.layout import Layout, blob_name

PART_BYTES = 512 * 1024
ANSWER_S = 15.0  # [U: our choice]
MOST_PARTS = 4096
PRODUCER = {"acks": "all", "enable.idempotence": True, "message.timeout.ms": int(ANSWER_S * 1000), "linger.ms": 0}


class Blobs:
    """The blobs of a run. `share` before a record names one; `fetch` when a record names one that is not here."""

    def __init__(self, settings: dict[str, Any], topic: str, layout: Layout) -> None:
        self.topic = topic
        self._settings = settings
        self._layout = layout
        self._shared: set[str] = set()
        self._parts: dict[str, dict[int, bytes]] = {}
        self._read = 0
        self._producer: Producer | None = None

    def share(self, name: str) -> None:
        """Store a blob of the data folder in the topic, unless we have; raises NotFound, Damaged, StorageError."""
        if name in self._shared:
            return
        content = self._layout.get_blob(name)
        cut = [content[at : at + PART_BYTES] for at in range(0, len(content), PART_BYTES)] or [b""]
        if len(cut) > MOST_PARTS:
            raise StorageError(f"blob {name}: {len(content)} bytes, at most {MOST_PARTS * PART_BYTES} fit")
        self._put({f"{name}/{number}/{len(cut)}": part for number, part in enumerate(cut)})
        self._shared.add(name)

    def forget(self, name: str) -> None:
        """Let compaction take a blob; also from the data folder. Raises StorageError."""
        path = self._layout.blobs / name
        parts = max(1, -(-path.stat().st_size // PART_BYTES)) if path.exists() else 1
        self._put(dict.fromkeys((f"{name}/{number}/{parts}" for number in range(parts)), None))
        path.unlink(missing_ok=True)
        self._shared.discard(name)

    def _put(self, parts: dict[str, bytes | None]) -> None:
        failures: list[str] = []

        def delivered(error: KafkaError | None, _message: object) -> None:
            if error is not None:
                failures.append(str(error))

        producer = self._producer = self._producer or Producer(self._settings | PRODUCER)
        for key, part in parts.items():
            producer.produce(self.topic, part, key=key, partition=0, on_delivery=delivered)
        if producer.flush(ANSWER_S + 1) or failures:
            why = failures[0] if failures else "no answer"
            raise StorageError(f"Kafka {self.topic}: {why}; what the log would name is not stored")

    def fetch(self, name: str) -> None:
        """Bring a blob into the data folder, if it is not there; raises NotFound, Unavailable, StorageError."""
        if (self._layout.blobs / name).exists():
            return
        content = self._find(name)
        if blob_name(content) != name:
            self._read = 0  # it may have been removed from the data folder: then it is found again
            self._parts.clear()
            content = self._find(name)
        if blob_name(content) != name:
            raise NotFound(f"Kafka {self.topic}: no content {name}; the log names it, so the topic is incomplete")
        self._layout.put_blob(content)

    def _find(self, name: str) -> bytes:
        self._catch_up()
        return b"".join(part for _, part in sorted(self._parts.pop(name, {}).items()))

    def _catch_up(self) -> None:
        """Read what has been added to the topic since the last time."""
        consumer = Consumer(
            self._settings | {"group.id": "citybrain-blobs", "enable.auto.commit": False, "enable.partition.eof": True}
        )
        until_s = monotonic_s() + ANSWER_S
        try:
            consumer.assign([TopicPartition(self.topic, 0, self._read)])
            while monotonic_s() < until_s:
                for message in consumer.consume(100, 0.1):
                    error = message.error()
                    if error is None:
                        self._read = (message.offset() or 0) + 1
                        self._take((message.key() or b"").decode(), message.value())
                    elif error.code() == KafkaError._PARTITION_EOF:
                        return
        except KafkaException as error:
            raise Unavailable(f"Kafka {self.topic}: {error.args[0].str()}") from None
        finally:
            consumer.close()
        raise Unavailable(f"Kafka {self.topic}: no answer in {ANSWER_S:g} s")

    def _take(self, key: str, part: bytes | None) -> None:
        """Keep a part until it is asked for; what is in the data folder already need not be kept."""
        name, number, _ = key.split("/")
        if part is None:
            self._parts.pop(name, None)
        elif not (self._layout.blobs / name).exists():
            self._parts.setdefault(name, {})[int(number)] = part


class SharedLayout(Layout, frozen=True):
    """A data folder whose missing blobs are fetched from the topic."""

    source: Blobs | None = None

    def get_blob(self, name: str) -> bytes:
        if self.source is not None:
            self.source.fetch(name)
        return Layout.get_blob(self, name)
