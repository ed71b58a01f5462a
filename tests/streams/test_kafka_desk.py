"""The desk reads its transitions from Kafka, with offsets in its own transaction, and decides what it always does."""

from __future__ import annotations

from pathlib import Path

from api.desk import replay
from citybrain.db.schema import alarms, cases, consumed, incidents
from citybrain.db.store import open_store
from citybrain.layout import Layout
from streams.logs import LogStore, SegmentStore
from streams.runtimes.kafka.store import KafkaStore
from tests.conftest import eventually
from tests.desk_city import MIN, City, everything, invariants, rows_of

SAME = (alarms, incidents, cases)


def caught_up(city: City, at: int) -> bool:
    city.step(at)
    offsets = {row["shard"]: row["offset"] for row in city.rows(consumed)}
    return all(offsets.get(shard, 0) == writer.committed for shard, writer in enumerate(city.writers))


def lived(city: City) -> City:
    """A night in a city: pressure falls at two hydrants, the worker and the desk start again, it comes back at one."""
    city.raises("hydrant_low_pressure", "hyd-000", "hyd-005", at=0)
    eventually(lambda: caught_up(city, MIN))
    for shard in (0, 1):
        city.writers[shard].close()
        city.writers[shard] = city.logs.writer("transitions", shard)
        city.writers[shard].start()
    city.restart()
    city.raises("elevator_trapped", "lift-a1", at=2 * MIN)
    city.clears("hydrant_low_pressure", "hyd-000", at=3 * MIN)
    eventually(lambda: caught_up(city, 4 * MIN))
    invariants(city)
    return city


def test_the_desk_decides_the_same_whatever_keeps_the_transitions(
    tmp_path: Path, kafka: str, topic_prefix: str
) -> None:
    def topics(layout: Layout) -> LogStore:
        store = KafkaStore(kafka, layout, 2, prefix=topic_prefix)
        store.open()
        return store

    embedded = lived(City(tmp_path / "embedded", logs_of=SegmentStore))
    city = lived(City(tmp_path / "kafka", logs_of=topics))
    assert all(city.rows(table) for table in SAME)
    assert [city.rows(table) for table in SAME] == [embedded.rows(table) for table in SAME]
    assert city.rows(consumed) == embedded.rows(consumed)  # the offsets too, though writers began anew in between
    again = open_store(tmp_path / "again.db")
    other = city.make_desk(again)
    other.start()
    assert replay(city.store, other) > 0
    assert [rows_of(again, table) for table in SAME] == [city.rows(table) for table in SAME]
    assert everything(again).keys() == everything(city.store).keys()
    again.dispose()
    city.close()
    embedded.close()
