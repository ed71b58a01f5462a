"""Charts, latest values, history and status of a run whose log is in Kafka: as from the data folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import msgspec
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from api.processes import claim_of, in_charge, not_live, of_this_run, role_of
from citybrain.clock import HOUR_MS, real_unix_ms, system_clock
from citybrain.counters import Counters, Heartbeat, read_heartbeats
from citybrain.layout import Layout, Run
from streams.history.query import History
from streams.logs import LogStore, LogWriter, SegmentStore
from streams.runtimes.kafka.store import KafkaStore
from streams.runtimes.shard_worker import ShardWorker
from tests.conftest import eventually, unused_port
from tests.engine_logs import START, Log
from tests.seeded_site import process
from tests.streams.test_worker import busy_log

FRAMES = 900


def data_folder(root: Path) -> Layout:
    layout = Layout(root)
    layout.make()
    layout.write_run(Run(clock=system_clock(), shards=1, api_port=unused_port()))
    return layout


def append(store: LogStore, log: Log, low: int, high: int) -> LogWriter:
    writer = store.writer("log", 0)
    writer.start()
    for number, record in enumerate(log.records[low:high], 1):
        writer.append(record.kind, record.received_at, record.payload)
        if number % 10 == 0:
            writer.commit()
    writer.commit()
    writer.close()
    return writer


def history(layout: Layout, action: str, *where: str) -> dict[str, Any]:
    argv = [sys.executable, "-m", "citybrain", "history", action, "--data", str(layout.root), "--json", *where]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_charts_and_latest_values_come_from_parquet_and_from_kafka(
    tmp_path: Path, kafka: str, topic_prefix: str
) -> None:
    layout, embedded = data_folder(tmp_path / "kafka"), data_folder(tmp_path / "embedded")
    log = busy_log(layout, FRAMES, seed=3)
    busy_log(embedded, FRAMES, seed=3)  # its content
    append(SegmentStore(embedded), log, 0, len(log.records))
    store = KafkaStore(kafka, layout, 1, prefix=topic_prefix)
    store.open()
    half = append(store, log, 0, len(log.records) // 2).committed
    where = ("--log", "kafka", "--kafka", kafka, "--topics", topic_prefix)
    compacted = history(layout, "compact", *where)
    assert compacted["values_total"] > 0
    assert compacted["missing_total"] == 0
    append(store, log, half, len(log.records))
    shard = history(layout, "status", *where)["shards"]["0"]
    assert (shard["next"], shard["behind"]) == (half, len(log.records) - half)
    url = f"http://127.0.0.1:{layout.read_run().api_port}"
    with process(layout, "api", *where, ready=f"{url}/healthz"):
        client = httpx.Client(base_url=url, trust_env=False, timeout=10)
        eventually(lambda: client.get("/v1/devices/a1").status_code == 200, 20)
        span = {"from": START, "to": START + 3 * HOUR_MS}
        body = client.get("/v1/devices/a1/readings", params={"metric": "pressure_mpa", **span}).json()
        client.close()
    chart = History(embedded, 1).chart("a1", "pressure_mpa", span["from"], span["to"], 1000)
    assert len(chart.at) > 50
    assert (body["at"], body["value"]) == (chart.at, chart.value)


def test_a_worker_says_which_offsets_retention_took_that_it_needed(
    tmp_path: Path, kafka: str, topic_prefix: str
) -> None:
    layout = data_folder(tmp_path)
    log = busy_log(layout, 200, seed=3)
    store = KafkaStore(kafka, layout, 1, prefix=topic_prefix)
    store.open()
    append(store, log, 0, len(log.records))
    admin = AdminClient(store.settings)
    for future in admin.delete_records([TopicPartition(store.topic("log"), 0, 5)]).values():
        future.result(10)
    counters = Counters("worker")
    worker = ShardWorker(0, layout, counters, 30.0, logs=store)
    worker.start()
    while worker.step():
        pass
    worker.stop()
    assert counters.values["missing_total"] == 50
    assert counters.warnings == ["log 0: offsets 0..49 are missing"]


def test_who_was_dealt_a_shard_has_it_whatever_it_is_called(tmp_path: Path) -> None:
    def heard(name: str, assigned: list[int], later_ms: int = 0) -> None:
        counters = Counters(name, tmp_path)
        counters.details["assigned"] = assigned
        counters.gauges["lag_s"] = 0.0
        counters.publish(force=True)
        path = tmp_path / f"{name}.heartbeat.json"
        beat = msgspec.json.decode(path.read_bytes(), type=Heartbeat)
        path.write_bytes(msgspec.json.encode(msgspec.structs.replace(beat, at=beat.at + later_ms)))

    def beats() -> dict[str, Heartbeat]:
        return {beat.process: beat for beat in read_heartbeats(tmp_path)}

    def missing() -> list[str]:
        return [text for text in not_live(beats(), real_unix_ms(), 2) if "worker" in text]

    assert missing() == ["worker has not started"]
    heard("worker-a", [0])
    assert missing() == ["no worker has shard 1"]
    heard("worker-b", [1])
    heard("spare", [])
    assert missing() == []
    assert claim_of(beats()["spare"], 2) == ("worker", ())
    assert of_this_run(beats(), real_unix_ms(), 2).keys() == {"worker-a", "worker-b", "spare"}
    heard("spare", [1], later_ms=5)  # worker-b was killed: it can no longer say that it lost its shard
    having = in_charge(beats(), "worker", 1, 2)
    assert having is not None
    assert having.process == "spare"
    assert role_of("worker-a") == "worker"
