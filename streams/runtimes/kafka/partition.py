"""Reading one partition: where in Kafka a log offset stands, and the log records from there on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NoReturn

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from citybrain.clock import monotonic_s, wait_s
from citybrain.errors import Damaged, Unavailable
from citybrain.segments import Record
from streams.runtimes.kafka.parcels import MOST_BYTES, Parcel, opened

ANSWER_S = 15.0  # how long we wait for an answer that changes nothing; a write is waited for without end [U: ours]
SETTLE_S = 3.0  # a new leader learns a moment later how far all replicas are: until then the log looks shorter
PAUSE_S = 0.05
BURST = 32  # parcels a call: at most 16 MiB, as a rule much less
FIRST_STEP = 4  # how far from the end a search looks first; then 4 times as far, and so on
CHANGING = (  # a topic is new to the broker that is asked, or its leader is being chosen
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION,
)
RESET = (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE)
PASSING = (*CHANGING, KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT, KafkaError._RESOLVE, KafkaError._TIMED_OUT)
CONSUMER = {
    "group.id": "citybrain-reader",  # nothing is ever committed under it
    "enable.auto.commit": False,
    "enable.partition.eof": True,
    "auto.offset.reset": "error",
    "fetch.message.max.bytes": MOST_BYTES + 1024,
    "fetch.wait.max.ms": 50,
    "queued.max.messages.kbytes": 32_768,
    "reconnect.backoff.max.ms": 1000,
}
LOOKING = {"fetch.message.max.bytes": 65_536, "fetch.wait.max.ms": 2}  # a look here, a look there
FEW = 8  # parcels that are rather read than looked for


def offset_of(message: Message) -> int:
    """Return where a message stands; the client does not know only before it is stored."""
    offset = message.offset()
    assert offset is not None
    return offset


def watermarks(settings: dict[str, Any], topic: str, shard: int) -> tuple[int, int]:
    """Return (first Kafka offset, the one behind the last) of a partition; raises Unavailable."""
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


class Places:
    """Follows one partition from a Kafka offset on: its parcels, as they come."""

    def __init__(self, settings: dict[str, Any], topic: str, shard: int) -> None:
        self.where = f"Kafka {topic} partition {shard}"
        self.reset = False  # the place that was asked for is not there
        self._topic, self._shard = topic, shard
        self._consumer = Consumer(CONSUMER | settings)
        self._at_end = False

    def seek(self, place: int) -> None:
        self._consumer.assign([TopicPartition(self._topic, self._shard, place)])
        self._at_end = self.reset = False

    def read(self, most: int = BURST, *, wait: bool = True) -> tuple[list[Parcel], int]:
        """Return (the next parcels that count, how many Kafka records were read).

        None were read: it is the end, or `reset`; or, unless we `wait`, the client has nothing here yet. Raises
        Unavailable where Kafka does not answer.
        """
        until_s = monotonic_s() + ANSWER_S
        while True:
            messages = self._consumer.consume(most, 0.1 if wait and not self._at_end else 0.0)
            taken = [self._take(message) for message in messages if self._counts(message)]
            if taken or self.reset:
                return [parcel for parcel in taken if parcel is not None], len(taken)
            if not messages and (self._at_end or not wait):
                return [], 0
            if not self._at_end and monotonic_s() > until_s:
                raise Unavailable(f"{self.where}: no answer in {ANSWER_S:g} s")

    def _take(self, message: Message) -> Parcel | None:
        self._at_end = False
        try:
            return opened(offset_of(message), message.value() or b"")
        except Damaged as error:
            raise Damaged(self.where, offset_of(message), str(error)) from None

    def _counts(self, message: Message) -> bool:
        """Return whether it is a record; what the client says instead is noted, or raised."""
        error = message.error()
        if error is None:
            return True
        if error.code() == KafkaError._PARTITION_EOF:
            self._at_end = True
        elif error.code() in RESET:
            self.reset = True
        elif not error.retriable() and error.code() not in PASSING:
            raise Unavailable(f"{self.where}: {error}")
        return False

    def close(self) -> None:
        self._consumer.close()


class Search:
    """Looks for parcels by what they hold. Their log offsets ascend, so two looks tell which way to go.

    `high`: how far it looks, at least `least`: what was acknowledged is there, also where a new leader does not say so
    yet. Whatever looks raises Unavailable where not all before `high` can be read: nobody may take the end for earlier.
    """

    def __init__(self, settings: dict[str, Any], topic: str, shard: int, least: int = 0) -> None:
        self.low, high = watermarks(settings, topic, shard)
        self.high = max(high, least)
        self._places = Places(settings | LOOKING, topic, shard)

    def within(self, place: int, below: int, most: int = BURST) -> Iterator[Parcel]:
        """Yield the parcels that count in `place..below`, read `most` at a time."""
        self._places.seek(place)
        until_s = monotonic_s() + ANSWER_S
        while place < below:
            parcels, read = self._places.read(most)
            place += read
            yield from (parcel for parcel in parcels if parcel.place < below)
            if not read:
                if self._places.reset or monotonic_s() > until_s:
                    raise Unavailable(f"{self._places.where}: nothing at {place}, where it goes on to {below}")
                wait_s(PAUSE_S)

    def at_or_after(self, place: int, below: int) -> Parcel | None:
        """Return the first parcel that counts in `place..below`."""
        return next(self.within(place, below, 1), None)

    def first(self) -> Parcel | None:
        """Return the first parcel that is left."""
        return self.at_or_after(self.low, self.high)

    def last(self) -> Parcel | None:
        """Return the last parcel that counts."""
        high, step = self.high, FIRST_STEP
        while high > self.low:
            low = max(self.low, high - step)
            found = deque(self.within(low, high), 1)
            if found:
                return found[0]
            high, step = low, 4 * step
        return None

    def holding(self, offset: int) -> Parcel | None:
        """Return the last parcel that begins at or before a log offset, else the first one; None: there is none."""
        last = self.last()
        if last is None or last.first <= offset:
            return last
        above, step = last.place, FIRST_STEP  # what begins at `above` is too late
        while (below := max(self.low, last.place - step)) > self.low:
            parcel = self.at_or_after(below, above)
            if parcel is None or parcel.first > offset:
                above, step = below, 4 * step
            else:
                break
        return self._between(below, above, offset)

    def _between(self, below: int, above: int, offset: int) -> Parcel | None:
        best = self.at_or_after(below, self.high)
        while above - below > FEW:
            middle = (below + above) // 2
            parcel = self.at_or_after(middle, above)
            if parcel is None or parcel.first > offset:
                above = middle
            else:
                best, below = parcel, parcel.place
        for parcel in self.within(below, above):
            best = parcel if parcel.first <= offset else best
        return best

    def close(self) -> None:
        self._places.close()


def place_of(settings: dict[str, Any], topic: str, shard: int, offset: int) -> int:
    """Return the Kafka offset at which to begin for a log offset.

    Raises Damaged where the log ends before it; where retention took it, the first that is left is returned.
    """
    until_s = monotonic_s() + SETTLE_S
    while True:
        place, end = _place_and_end(settings, topic, shard, offset)
        if offset <= end:
            return place
        if monotonic_s() > until_s:
            where = f"Kafka {topic} partition {shard}"
            raise Damaged(where, offset, f"it ends at {end}: Kafka lost what was read before; restore it")
        wait_s(PAUSE_S)


def end_of(settings: dict[str, Any], topic: str, shard: int) -> int:
    """Return the log offset behind the last parcel; raises Unavailable."""
    return _place_and_end(settings, topic, shard, 2**63)[1]


def _place_and_end(settings: dict[str, Any], topic: str, shard: int, offset: int) -> tuple[int, int]:
    search = Search(settings, topic, shard)
    try:
        last = search.last()
        found = last if last is None or last.first <= offset else search.holding(offset)
        return (search.low if found is None else found.place), (0 if last is None else last.next)
    finally:
        search.close()


def starts(settings: dict[str, Any], topic: str, shard: int) -> Iterator[int]:
    """Yield where the last parcel begins, then where each part of the log began, the last one first."""
    search = Search(settings, topic, shard)
    try:
        first, parcel = search.first(), search.last()
        if first is None or parcel is None:
            return
        begin = parcel.first
        yield begin
        while parcel is not None and begin > first.first:
            part = max(parcel.segment, first.first)
            if part < begin:
                begin = part
                yield begin
            parcel = search.holding(begin - 1)
    finally:
        search.close()


class KafkaReader:
    """Reads one partition from a log offset on; the contract is `streams.logs.LogReader`."""

    def __init__(self, settings: dict[str, Any], topic: str, shard: int, offset: int) -> None:
        self.offset = offset
        self._settings, self._topic, self._shard = settings, topic, shard
        self._places: Places | None = None  # made with the first read

    def read(self, most_bytes: int = 8 * 1024 * 1024) -> list[Record]:
        """Return the next records, [] at the end; raises Unavailable where Kafka does not answer.

        Offsets below the topic's retention are skipped; raises Damaged where the log ends before our offset.
        """
        places = self._places or self._begin()
        taken: list[Record] = []
        size = 0
        while size < most_bytes:
            parcels, read = places.read(wait=not taken)
            if places.reset:
                self._seek(places)
                continue
            for parcel in parcels:
                size += len(parcel.value)
                taken += (record for record in parcel.records() if record.offset >= self.offset)
                self.offset = max(self.offset, parcel.next)
            if not read:
                break
        return taken

    def _begin(self) -> Places:
        self._places = Places(self._settings, self._topic, self._shard)
        self._seek(self._places)
        return self._places

    def _seek(self, places: Places) -> None:
        places.seek(place_of(self._settings, self._topic, self._shard, self.offset))

    def close(self) -> None:
        if self._places is not None:
            self._places.close()
