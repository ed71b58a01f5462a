"""`citybrain run --log kafka`: the same processes, their logs in Kafka; started again it goes on there."""

from __future__ import annotations

import json
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest

from citybrain.layout import Layout
from streams.log import Kind
from streams.logs import records
from streams.runtimes.kafka.store import KafkaStore
from tests.conftest import end, eventually
from tests.site.test_run import arguments


def frames(store: KafkaStore) -> int:
    found = (one for shard in range(store.shards) for one in records(store.reader("log", shard)))
    return sum(one.kind == Kind.FRAME for one in found)


def grown(store: KafkaStore, before: int) -> bool:
    return frames(store) > before


@pytest.mark.soak
def test_the_whole_product_runs_with_its_logs_in_kafka(tmp_path: Path, kafka: str, topic_prefix: str) -> None:
    layout = Layout(tmp_path / "data")
    store = KafkaStore(kafka, layout, 2, prefix=topic_prefix)
    where = ("--log", "kafka", "--kafka", kafka, "--topics", topic_prefix)
    before = 0
    for more in (where, ()):  # it remembers where they are
        argv = arguments(layout.root, "--simulate", "--json", *more)
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert json.loads(process.stdout.readline() or "{}").get("live") is True
                eventually(partial(grown, store, before), 60, "frames in Kafka")
                process.send_signal(signal.SIGINT)
                assert process.wait(20) == 0
            finally:
                end(process)
        before = frames(store)
    assert not any(layout.log(0).glob("*.seg"))
