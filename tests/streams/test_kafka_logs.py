"""One contract for a shard's log, kept as segments on disk and kept in Kafka; then what only Kafka can do to us."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from citybrain.errors import ConfigError, Damaged, NotFound, StorageError, Unavailable
from citybrain.layout import Layout
from citybrain.segments import MAX_RECORD, Record
from streams.logs import LogReader, LogStore, LogWriter, SegmentStore, ignore_waiting
from streams.runtimes.kafka.blobs import PART_BYTES, Blobs, SharedLayout
from streams.runtimes.kafka.parcels import FAMILY, HEAD, PARCEL_BYTES, Packer, fence
from streams.runtimes.kafka.partition import Search, place_of
from streams.runtimes.kafka.store import KafkaStore, KafkaWriter
from streams.runtimes.shard_worker import last_written
from tests.conftest import eventually
from tests.faulty_files import LossyFiles
from tests.kafka_cluster import Cluster, cluster

SHARDS = 2


class Kept(NamedTuple):
    """A store, and how to take away what is before an offset of shard 0."""

    store: LogStore
    drop_before: Callable[[int], None]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "data")
    made.make()
    return made


@pytest.fixture
def topics(layout: Layout, kafka: str, topic_prefix: str) -> KafkaStore:
    store = KafkaStore(kafka, layout, SHARDS, prefix=topic_prefix)
    store.open()
    return store


@pytest.fixture(params=["segments", "kafka"])
def kept(request: pytest.FixtureRequest, layout: Layout) -> Kept:
    if request.param == "segments":
        small = SegmentStore(layout, segment_bytes=200)

        def drop_segments(offset: int) -> None:
            writer = small.writer("log", 0)
            writer.start()
            writer.drop_before(offset)
            writer.close()

        return Kept(small, drop_segments)
    store: KafkaStore = request.getfixturevalue("topics")

    def drop_records(offset: int) -> None:
        before = TopicPartition(store.topic("log"), 0, offset)
        admin = AdminClient(store.settings)
        for future in admin.delete_records([before]).values():
            future.result(10)

    return Kept(store, drop_records)


def writer_of(store: LogStore, shard: int = 0) -> LogWriter:
    writer = store.writer("log", shard)
    writer.start()
    return writer


def fill(writer: LogWriter, payloads: list[bytes]) -> list[int]:
    offsets = [writer.append(1, 1000 + number, payload) for number, payload in enumerate(payloads)]
    assert writer.commit() == writer.next_offset == writer.committed
    return offsets


def all_of(reader: LogReader) -> list[Record]:
    found: list[Record] = []
    while records := reader.read():
        found += records
    return found


def follow(reader: LogReader, found: list[Record]) -> int:
    found += reader.read()
    return len(found)


def payloads(store: LogStore, offset: int = 0, shard: int = 0) -> list[bytes]:
    return [record.payload for record in all_of(store.reader("log", shard, offset))]


# --- the contract -----------------------------------------------------------------------------------------------------


def test_what_is_committed_is_read_from_any_offset(kept: Kept) -> None:
    writer = writer_of(kept.store)
    assert fill(writer, [b"a" * 90, b"", b"c" * 90]) == [0, 1, 2]
    assert fill(writer, [b"d"]) == [3]
    assert all_of(kept.store.reader("log", 0, 2)) == [Record(2, 1002, 1, b"c" * 90), Record(3, 1000, 1, b"d")]
    assert payloads(kept.store) == [b"a" * 90, b"", b"c" * 90, b"d"]
    assert all_of(kept.store.reader("log", 0, 4)) == all_of(kept.store.reader("log", 1)) == []
    writer.close()


def test_what_is_not_committed_is_nowhere(kept: Kept) -> None:
    writer = writer_of(kept.store)
    fill(writer, [b"first"])
    assert writer.append(1, 1, b"taken back") == 1
    writer.discard()
    assert fill(writer, [b"second"]) == [1]
    writer.append(1, 1, b"never committed")
    writer.close()
    assert payloads(kept.store) == [b"first", b"second"]


def test_a_reader_follows_a_writer(kept: Kept) -> None:
    writer, reader = writer_of(kept.store), kept.store.reader("log", 0)
    found: list[Record] = []
    assert reader.read() == []
    for number in range(20):
        fill(writer, [b"%d" % number, b"x" * 50])
        eventually(lambda: follow(reader, found) >= writer.committed)
    assert [record.offset for record in found] == list(range(40))
    assert reader.offset == 40
    writer.close()


def test_another_writer_goes_on_where_the_last_one_stopped(kept: Kept) -> None:
    before = -1
    for life in range(4):
        writer = writer_of(kept.store)
        (offset,) = fill(writer, [b"%d" % life])
        assert offset == before + 1  # dense: nothing looks as if it were lost
        assert writer.segment <= offset
        before = offset
        writer.close()
    assert payloads(kept.store) == [b"0", b"1", b"2", b"3"]


def test_a_record_that_is_too_large_is_refused_and_the_rest_goes_on(kept: Kept) -> None:
    writer = writer_of(kept.store)
    with pytest.raises(StorageError, match="at most"):
        writer.append(1, 1, bytes(MAX_RECORD))
    fill(writer, [bytes(MAX_RECORD - 24)])
    assert [len(payload) for payload in payloads(kept.store)] == [MAX_RECORD - 24]
    writer.close()


def test_looking_backwards_finds_what_was_written_last(kept: Kept) -> None:
    assert last_written(kept.store, 0) == (-1, -1)
    writer = writer_of(kept.store)
    fill(writer, [b"%d" % number for number in range(50)])
    starts = list(kept.store.starts("log", 0))
    assert starts == sorted(starts, reverse=True)
    assert starts[-1] == 0
    found = [record for start in starts for record in all_of(kept.store.reader("log", 0, start))]
    assert max(record.offset for record in found) == 49
    writer.close()


def test_what_retention_took_is_skipped(kept: Kept) -> None:
    writer = writer_of(kept.store)
    for number in range(12):
        fill(writer, [b"%d" % number * 40])
    writer.close()
    kept.drop_before(6)
    records = all_of(kept.store.reader("log", 0))
    assert 0 < records[0].offset <= 6
    assert records[-1].offset == 11
    assert list(kept.store.starts("log", 0))[-1] == records[0].offset


class Crashing(NamedTuple):
    """A store, and what loses power or is killed under it."""

    store: LogStore
    crash: Callable[[], None]
    times: int


@pytest.fixture(params=["segments", "kafka"])
def crashing(request: pytest.FixtureRequest, layout: Layout, topic_prefix: str) -> Crashing:
    if request.param == "segments":
        disk = LossyFiles(5)
        return Crashing(SegmentStore(layout, disk, segment_bytes=600), disk.crash, 20)
    mortal: Cluster = request.getfixturevalue("mortal")
    store = KafkaStore(mortal.address, layout, SHARDS, prefix=topic_prefix)
    store.open()

    def crash() -> None:
        mortal.brokers[0].kill()
        mortal.revive()

    return Crashing(store, crash, 1)


def test_what_is_committed_survives_a_crash_once_and_in_order(crashing: Crashing) -> None:
    store, dice, committed = crashing.store, random.Random(2), list[bytes]()
    writer = writer_of(store)
    for _ in range(crashing.times):
        for _ in range(dice.randrange(1, 9)):
            batch = [dice.randbytes(dice.randrange(300)) for _ in range(dice.randrange(1, 9))]
            fill(writer, batch)
            committed += batch
        writer.append(1, 1, b"nobody was told of it")
        crashing.crash()
        writer = writer_of(store)
        assert payloads(store) == committed
    fill(writer, [b"and it goes on"])
    assert payloads(store) == [*committed, b"and it goes on"]
    writer.close()


# --- Kafka ------------------------------------------------------------------------------------------------------------


def test_of_two_writers_one_counts_and_the_other_learns_it(topics: KafkaStore) -> None:
    old, new = writer_of(topics), writer_of(topics)
    fill(new, [b"one", b"two"])
    old.append(1, 1, b"one again")
    with pytest.raises(StorageError, match="another process writes this shard"):
        old.commit()
    with pytest.raises(StorageError, match="must end"):
        old.commit()
    assert payloads(topics) == [b"one", b"two"]
    new.append(1, 1, b"three")
    with pytest.raises(StorageError, match="another process"):
        new.commit()  # what the other one did moved the end: it recovers, too
    again = writer_of(topics)
    fill(again, [b"three"])
    assert payloads(topics) == [b"one", b"two", b"three"]
    for writer in (old, new, again):
        writer.close()


def parcel(place: int, first: int, *payloads: bytes, segment: int = 0) -> bytes:
    packer = Packer()
    for payload in payloads:
        packer.add(2, 5, payload)
    (value,) = packer.values(place, first, segment)
    return value


def test_what_stands_elsewhere_than_its_writer_believed_does_not_count(topics: KafkaStore) -> None:
    writer = KafkaWriter(topics.settings, topics.topic("log"), 0, ignore_waiting)
    for value in (b"short", fence(), parcel(7, 0, b"elsewhere"), b"", parcel(4, 0, b"here", b"too")):
        writer._send([value])
    assert all_of(topics.reader("log", 0)) == [Record(0, 5, 2, b"here"), Record(1, 5, 2, b"too")]
    assert all_of(topics.reader("log", 0, 1)) == [Record(1, 5, 2, b"too")]  # it begins inside of a parcel
    following = writer_of(topics)
    assert fill(following, [b"and on"]) == [2]
    writer.close()
    following.close()


def test_a_parcel_that_cannot_be_read_is_said_and_where(topics: KafkaStore) -> None:
    writer = KafkaWriter(topics.settings, topics.topic("log"), 0, ignore_waiting)
    writer._send([parcel(0, 0, b"half")[:-2]])
    with pytest.raises(Damaged, match="do not fill"):
        topics.reader("log", 0).read()
    writer._send([HEAD.pack(FAMILY + b"\x09", 1, 1, 1, 0)])
    with pytest.raises(Damaged, match=r"partition 0.*format 9, this program reads 1"):
        topics.reader("log", 0, 1).read()
    writer.close()


def test_a_log_offset_is_found_among_stragglers_and_large_and_small_parcels(topics: KafkaStore) -> None:
    dice, values, offset = random.Random(4), list[bytes](), 0
    where: list[int] = []  # of every log offset, the place of its parcel
    segment = 0
    for place in range(400):
        if dice.random() < 0.2:
            values.append(dice.choice((fence(), parcel(place + 1, offset, b"of a predecessor"))))
            continue
        count = dice.choice((1, 1, 2, 30))
        segment = offset if dice.random() < 0.05 else segment
        values.append(parcel(place, offset, *(b"%d" % (offset + n) for n in range(count)), segment=segment))
        where += [place] * count
        offset += count
    writer = KafkaWriter(topics.settings, topics.topic("log"), 0, ignore_waiting)
    writer._send(values)
    writer.close()
    asked = (topics.settings, topics.topic("log"), 0)
    search = Search(*asked)
    for wanted in (0, 1, offset // 2, offset - 1, *dice.choices(range(offset), k=6)):
        found = search.holding(wanted)
        assert found is not None
        assert found.place == where[wanted]
    search.close()
    assert place_of(*asked, offset) == where[-1]
    assert payloads(topics, offset // 3) == [b"%d" % n for n in range(offset // 3, offset)]
    begun = list(topics.starts("log", 0))
    assert begun == sorted(begun, reverse=True)
    assert (begun[0], begun[-1]) == (where.index(where[-1]), 0)
    assert len(begun) > 5


def test_what_was_acknowledged_and_cannot_be_read_is_never_taken_for_the_end(
    topics: KafkaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = writer_of(topics)
    fill(writer, [b"one"])
    writer.close()
    monkeypatch.setattr("streams.runtimes.kafka.partition.ANSWER_S", 0.5)
    search = Search(
        topics.settings, topics.topic("log"), 0, 3
    )  # as if two more had been, and a new leader has not them
    with pytest.raises(Unavailable, match="nothing at 1, where it goes on to 3"):
        search.last()
    search.close()


def test_a_commit_that_is_large_is_cut_into_parcels(topics: KafkaStore) -> None:
    writer = writer_of(topics)
    large = [bytes([number]) * (PARCEL_BYTES // 3) for number in range(10)]
    assert fill(writer, large) == list(range(10))
    assert payloads(topics, 7) == large[7:]
    assert fill(writer, [b"behind"]) == [10]
    writer.close()


def test_where_retention_took_all_nobody_guesses_the_next_number(topics: KafkaStore) -> None:
    writer = writer_of(topics)
    fill(writer, [b"one", b"two"])
    writer.close()
    before = TopicPartition(topics.topic("log"), 0, 1)
    admin = AdminClient(topics.settings)
    for future in admin.delete_records([before]).values():
        future.result(10)
    with pytest.raises(Damaged, match="no number to go on with"):
        topics.writer("log", 0).start()


def test_a_log_that_ends_before_what_was_read_is_damaged(topics: KafkaStore) -> None:
    writer = writer_of(topics)
    fill(writer, [b"one"])
    writer.close()
    with pytest.raises(Damaged, match="it ends at 1"):
        topics.reader("log", 0, 5).read()


def test_topics_are_made_once_and_must_have_the_runs_shards(topics: KafkaStore, layout: Layout) -> None:
    topics.open()
    other = KafkaStore(topics.settings["bootstrap.servers"], layout, SHARDS + 1, prefix=topics.prefix)
    with pytest.raises(ConfigError, match="has 2 partitions, the run has 3 shards"):
        other.open()


def test_a_kafka_that_is_not_there_is_said(layout: Layout, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("partition", "store"):
        monkeypatch.setattr(f"streams.runtimes.kafka.{module}.ANSWER_S", 0.5)
    store = KafkaStore(f"127.0.0.1:{free_port}", layout, SHARDS)
    with pytest.raises(Unavailable, match="is it running"):
        store.open()
    with pytest.raises(Unavailable, match="is it running"):
        store.reader("log", 0).read()
    with pytest.raises(Unavailable):
        store.writer("log", 0).start()


# --- content by hash --------------------------------------------------------------------------------------------------


def test_content_is_fetched_where_it_is_not_and_proved(topics: KafkaStore, layout: Layout, tmp_path: Path) -> None:
    content = random.Random(1).randbytes(PART_BYTES * 2 + 17)
    name, empty = layout.put_blob(content), layout.put_blob(b"")
    for one in (name, empty, name):
        topics.share(one)
    blobs = Blobs(topics.settings, topics.blobs.topic, Layout(tmp_path / "there"))
    there = SharedLayout(tmp_path / "there", source=blobs)
    there.make()
    assert there.get_blob(name) == content
    assert there.get_blob(empty) == b""
    (there.blobs / name).unlink()
    assert there.get_blob(name) == content
    topics.forget(name)
    assert not (layout.blobs / name).exists()
    (there.blobs / name).unlink()
    with pytest.raises(NotFound, match="no content"):
        there.get_blob(name)
    with pytest.raises(NotFound):
        topics.share("0" * 64)


# --- a broker that is killed ------------------------------------------------------------------------------------------


def test_a_broker_killed_or_stopped_loses_nothing_and_doubles_nothing(
    mortal: Cluster, layout: Layout, topic_prefix: str
) -> None:
    waited: list[float] = []
    store = KafkaStore(mortal.address, layout, SHARDS, prefix=topic_prefix)
    store.waiting = waited.append
    store.open()
    (broker,) = mortal.brokers
    writer, count = writer_of(store), 0
    for kill in (True, False):
        fill(writer, [b"%d" % (count + number) for number in range(100)])
        broker.kill() if kill else broker.signal(signal.SIGSTOP)
        batch = [b"%d" % (count + 100 + number) for number in range(2000)]
        thread = threading.Thread(target=fill, args=(writer, batch))
        thread.start()
        waited.clear()
        eventually(lambda: waited, what="the caller told that it waits")
        broker.start() if kill else broker.signal(signal.SIGCONT)
        thread.join(60)
        assert not thread.is_alive()
        count += 2100
        assert writer.committed == count
    assert payloads(store) == [b"%d" % number for number in range(count)]
    writer.close()


def test_a_commit_may_be_given_up_and_is_then_repeated_by_the_next_process(
    mortal: Cluster, layout: Layout, topic_prefix: str
) -> None:
    def give_up(_seconds: float) -> None:
        raise Unavailable("told to stop")

    store = KafkaStore(mortal.address, layout, SHARDS, prefix=topic_prefix)
    store.waiting = give_up
    store.open()
    (broker,) = mortal.brokers
    writer = writer_of(store)
    fill(writer, [b"acknowledged"])
    broker.signal(signal.SIGSTOP)
    writer.append(1, 1, b"in flight")
    with pytest.raises(Unavailable):
        writer.commit()
    broker.signal(signal.SIGCONT)  # what it had received it stores now: the next writer begins behind it
    following = writer_of(store)
    fill(following, [b"in flight, again"])
    found = payloads(store)
    assert found[0] == b"acknowledged"
    assert found[-1] == b"in flight, again"
    assert found[1:-1] in ([], [b"in flight"])
    following.close()


# --- three brokers ----------------------------------------------------------------------------------------------------


def leader_of(store: KafkaStore, shard: int) -> int:
    admin = AdminClient(store.settings)
    topic = store.topic("log")
    return admin.list_topics(topic, timeout=10).topics[topic].partitions[shard].leader


@pytest.mark.soak
def test_of_three_brokers_one_may_die_and_without_two_nothing_is_stored(layout: Layout, tmp_path: Path) -> None:
    with cluster(tmp_path / "three", 3) as three:
        waited: list[float] = []
        store = KafkaStore(three.address, layout, SHARDS)
        store.waiting = waited.append
        store.open()
        writer = writer_of(store)
        fill(writer, [b"%d" % number for number in range(100)])
        victim = three.brokers[leader_of(store, 0) - 1]
        victim.kill()
        fill(writer, [b"%d" % number for number in range(100, 2100)])  # another one leads
        other = next(broker for broker in three.brokers if broker is not victim)
        other.kill()
        waited.clear()
        thread = threading.Thread(target=fill, args=(writer, [b"%d" % number for number in range(2100, 2200)]))
        thread.start()
        eventually(lambda: waited and waited[-1] > 5, 30, "the writer waiting for a second replica")
        assert writer.committed == 2100
        three.revive()
        thread.join(90)
        assert writer.committed == 2200
        assert payloads(store) == [b"%d" % number for number in range(2200)]
        writer.close()
