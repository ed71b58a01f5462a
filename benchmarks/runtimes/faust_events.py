"""Faust as its manual has it: one event a reading, JSON, a rule in Python; what our runtimes are compared with.

The rule is that of benchmarks.runtimes: a value above 3 raises, one below clears, by device and metric.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faust
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from streams.runtimes.kafka.partition import CONSUMER

METRICS = ("pressure_mpa", "flow_lps", "tilt_deg", "battery_v")
ABOVE = 3.0
TOPIC = "bench-events-"


def readings(count: int) -> Iterator[bytes]:
    """Yield readings; every 500th value passes its limit."""
    for number in range(count):
        values = {metric: 9.0 if (number * 4 + at) % 500 == 0 else 0.5 for at, metric in enumerate(METRICS)}
        yield json.dumps({"d": f"hyd-{number % 5000:06d}", "t": number, "m": values}).encode()


def agent(address: str, topic: str, folder: str) -> None:
    """Serve until terminated: transitions and, for every reading past the first, how far it is."""
    app = faust.App(
        f"{topic}app", broker=f"kafka://{address}", store="memory://", web_enabled=False, datadir=folder,
        topic_disable_leader=True, topic_allow_declare=False, consumer_auto_offset_reset="earliest",
    )  # fmt: skip
    source = app.topic(topic + "in", value_serializer="json")
    sink = app.topic(topic + "out", value_serializer="json")
    raised: set[tuple[str, str]] = set()

    @app.agent(source)
    async def detect(stream: Any) -> None:
        async for reading in stream:
            for metric, value in reading["m"].items():
                key = (reading["d"], metric)
                if (value > ABOVE) != (key in raised):
                    raised.symmetric_difference_update((key,))
                    await sink.send(value={"d": reading["d"], "rule": metric, "raise": value > ABOVE})
            if reading["t"] < 0:
                await sink.send(value={"mark": reading["t"]})

    faust.Worker(app, loglevel="WARN", quiet=True, redirect_stdouts=False).execute_from_commandline()


def measure(root: Path, address: str, count: int) -> float:
    """Return readings/s of such an agent on a log that waits for it, from its first mark to its last."""
    topic = f"{TOPIC}{time.time_ns():x}-"
    admin = AdminClient({"bootstrap.servers": address})
    for future in admin.create_topics([NewTopic(topic + name, 1, 1) for name in ("in", "out")]).values():
        future.result(10)
    producer = Producer({"bootstrap.servers": address, "linger.ms": 5})
    marks = [json.dumps({"d": "", "t": -number, "m": {}}).encode() for number in (1, 2)]
    for value in (marks[0], *readings(count), marks[1]):
        while True:
            try:
                producer.produce(topic + "in", value)
                break
            except BufferError:
                producer.poll(0.1)
    producer.flush()
    argv = [sys.executable, "-m", "benchmarks.runtimes.faust_events", address, topic, str(root / "faust-events")]
    with (root / "faust-events.log").open("wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        try:
            return count / _between_marks(address, topic)
        finally:
            process.terminate()


def _between_marks(address: str, topic: str) -> float:
    consumer = Consumer({"bootstrap.servers": address} | CONSUMER)
    consumer.assign([TopicPartition(topic + "out", 0, 0)])
    seen: dict[int, float] = {}
    while -2 not in seen:
        for message in consumer.consume(500, 0.01):
            body = json.loads(message.value() or b"{}") if message.error() is None else {}
            if "mark" in body:
                seen[body["mark"]] = time.perf_counter()
    consumer.close()
    return seen[-2] - seen[-1]


if __name__ == "__main__":
    agent(*sys.argv[1:4])
