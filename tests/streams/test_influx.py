"""`citybrain influx` against a real VictoriaMetrics: killed, refused, cut off; nothing is lost, counted by query."""

from __future__ import annotations

import json
import random
import shutil
import signal
from functools import partial
from pathlib import Path

import msgspec
import pytest
from influxdb_client.rest import ApiException
from urllib3 import HTTPHeaderDict

from benchmarks.faults.lines import Lines
from citybrain.cli import main
from citybrain.clock import RunClock, real_unix_ms
from citybrain.counters import Heartbeat
from citybrain.layout import Layout, Run
from citybrain.model import Lane
from citybrain.segments import Record, segment_name, segments
from citybrain.storage import OS_FILES
from streams.history.manifest import history_folder, read_manifest, write_manifest
from streams.log import Kind
from streams.projection.follower import Mark, mark_path
from streams.projection.server import retry_after_s
from streams.runtimes.kafka.blobs import SharedLayout
from streams.runtimes.kafka.store import KafkaStore
from tests.commands import beat_of, run_to_end, running
from tests.conftest import eventually
from tests.engine_logs import REGISTRIES, START, Log
from tests.history_logs import busy_log, compacted, rows_of_log, write
from tests.influx_proxy import Told, proxy
from tests.streams.test_history import FEW
from tests.victoria import Victoria, victoria

__all__ = ["victoria"]
Sample = tuple[str, str, int, float]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    found = Layout(tmp_path / "data")
    found.make()
    found.write_run(Run(clock=RunClock(START + 3_600_000, real_unix_ms()), shards=1))
    return found


def configure(layout: Layout, url: str, **more: object) -> None:
    text = {"url": url, "org": "city", "bucket": "readings", "batch": 50, "timeout": "2s", **more}
    (layout.root / "influx.yaml").write_text(json.dumps(text))


influx = partial(running, "influx")
run = partial(run_to_end, "influx", within_s=30)
beat = partial(beat_of, "influx")


def said(layout: Layout) -> Heartbeat:
    found = beat(layout)
    assert found is not None
    return found


def marked(layout: Layout) -> int:
    path = mark_path(layout, 0)
    return json.loads(path.read_text())["offset"] if path.exists() else 0


def written(layout: Layout, upto: int, within_s: float = 30.0) -> None:
    eventually(lambda: marked(layout) >= upto, within_s, f"mark at {upto}")


def expected(layout: Layout, records: list[Record]) -> list[Sample]:
    """Return what the server must have of a log: one sample a key, the last one."""
    found = {}
    for _, _, device, metric, at, value in rows_of_log(layout, records):
        kind = "gateway" if metric == "uptime_s" else "hydrant"
        found[f"{kind}_{metric}", device, at] = value
    return sorted((name, device, at, value) for (name, device, at), value in found.items())


def same(server: Victoria, wanted: list[Sample]) -> None:
    found = server.samples()
    assert [row[:3] for row in found] == [row[:3] for row in wanted]
    assert [row[3] for row in found] == pytest.approx([row[3] for row in wanted], rel=1e-12)


# --- running ----------------------------------------------------------------------------------------------------


def test_it_follows_the_log_and_the_server_has_every_value(layout: Layout, victoria: Victoria) -> None:
    log = busy_log(layout, 120, 1)
    configure(layout, victoria.url)
    write(layout, log.records[:200])
    with influx(layout) as process:
        written(layout, 200)
        write(layout, log.records[200:])
        written(layout, len(log.records))
        eventually(lambda: said(layout).gauges["influx_lag_s"] == 0, what="no lag")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    wanted = expected(layout, log.records)
    same(victoria, wanted)
    counted = said(layout).counters
    assert counted["values_total"] == len(wanted)
    assert counted["dropped_total{reason=malformed}"] == 1  # the log ends with a damaged frame
    assert counted["received_total"] == len(log.records)
    found = victoria.query(
        "count(count_over_time(hydrant_pressure_mpa{zone='z1',gateway='a'}[1h]))", START / 1000 + 3599
    )
    assert [int(row["value"][1]) for row in found] == [1]


def test_killed_in_the_middle_nothing_is_lost(layout: Layout, victoria: Victoria) -> None:
    log, dice = busy_log(layout, 160, 2), random.Random(3)
    with proxy(victoria.url) as between:
        configure(layout, between.url, batch=20)
        write(layout, log.records, segment_bytes=4096)  # a read, and so a mark, is a segment
        for _ in range(3):
            before = between.requests.get(204, 0)
            wanted = before + dice.randrange(1, 6)
            with influx(layout) as process:
                eventually(lambda wanted=wanted: between.requests.get(204, 0) >= wanted, 20, "writes")  # type: ignore[misc]
                process.kill()
                process.wait()
        assert 0 < marked(layout) < len(log.records)
        with influx(layout):
            written(layout, len(log.records))
    same(victoria, expected(layout, log.records))


def test_the_server_killed_and_started_again(layout: Layout, victoria: Victoria) -> None:
    log = busy_log(layout, 200, 4)
    configure(layout, victoria.url)
    write(layout, log.records[:100])
    with influx(layout):
        written(layout, 100)
        victoria.kill()  # at once: it has answered, and forgets what its disk does not have yet
        write(layout, log.records[100:])
        eventually(lambda: said(layout).gauges["influx_answers"] == 0, 20, "the heartbeat saying so")
        assert "does not answer" in said(layout).details["server"]
        assert said(layout).gauges["influx_lag_s"] > 0
        assert marked(layout) == 100
        victoria.start()
        written(layout, len(log.records))
        eventually(lambda: said(layout).gauges["influx_answers"] == 1, what="the heartbeat saying so")
        eventually(lambda: said(layout).counters.get("rewritten_total", 0) > 0, what="some being written again")
    same(victoria, expected(layout, log.records))


def test_a_server_that_is_away_for_longer_than_what_is_written_again(layout: Layout, victoria: Victoria) -> None:
    log = busy_log(layout, 200, 4)
    last = max(n for n, record in enumerate(log.records) if record.kind == Kind.CONTROL) + 1
    configure(layout, victoria.url, again="1s", batch=5000)
    write(layout, log.records[:last])
    with influx(layout):
        written(layout, last)
        victoria.kill()
        write(layout, log.records[last:])  # one request: with its answer the mark moves
        eventually(lambda: said(layout).counters.get("errors_total{stage=influx}", 0) >= 3, 20, "asked for 1.5 s")
        victoria.start()
        eventually(lambda: said(layout).counters.get("rewritten_total", 0) > 0, 20, "some written again")
        assert said(layout).counters["rewritten_total"] > len(log.records) - last  # and what was before it went
        written(layout, len(log.records))
    same(victoria, expected(layout, log.records))


def test_the_server_killed_and_started_again_behind_a_proxy_that_never_refuses(
    layout: Layout, victoria: Victoria
) -> None:
    log = busy_log(layout, 200, 4)
    with Lines() as lines:
        configure(layout, f"http://127.0.0.1:{lines.line(victoria.port).port}")
        write(layout, log.records[:100])
        with influx(layout):
            written(layout, 100)
            victoria.kill()
            write(layout, log.records[100:])
            eventually(lambda: said(layout).gauges["influx_answers"] == 0, 20, "the heartbeat saying so")
            assert "Connection aborted" in said(layout).details["server"]
            victoria.start()
            written(layout, len(log.records))
            eventually(lambda: said(layout).counters.get("rewritten_total", 0) > 0, what="the last seconds again")
            written(layout, len(log.records))
    same(victoria, expected(layout, log.records))


@pytest.mark.parametrize("status", [503, 429, 500])
def test_a_server_that_asks_to_wait_is_asked_again_when_it_said(
    layout: Layout, victoria: Victoria, status: int
) -> None:
    log = busy_log(layout, 60, 5)
    with proxy(victoria.url) as between:
        refusals = iter([Told(status, "busy", (("Retry-After", "1"),)) if status != 500 else Told(500, "oops")] * 2)
        between.judge = lambda _: next(refusals, None)
        configure(layout, between.url)
        write(layout, log.records)
        with influx(layout):
            written(layout, len(log.records))
        assert between.requests[status] == 2  # and not hammered
    same(victoria, expected(layout, log.records))
    assert said(layout).counters["errors_total{stage=influx}"] == 2


def test_a_refused_token_is_read_again(layout: Layout, victoria: Victoria) -> None:
    log = busy_log(layout, 20, 6)
    with proxy(victoria.url) as between:
        tokens = between.tokens
        refusal = Told(401, '{"code":"unauthorized","message":"unauthorized access"}')
        between.judge = lambda _: None if "Token second" in tokens else refusal
        (layout.secrets / "influx.token").write_text("first\n")
        configure(layout, between.url, token={"file": "influx.token"})
        write(layout, log.records)
        with influx(layout):
            eventually(lambda: between.requests.get(401, 0) >= 1, 20, "a refusal")
            assert marked(layout) == 0
            (layout.secrets / "influx.token").write_text("second\n")
            written(layout, len(log.records))
        assert "Token first" in tokens
    assert any("401 Unauthorized: unauthorized access" in text for text in said(layout).warnings)
    same(victoria, expected(layout, log.records))


def dislikes_b1(lines: list[str]) -> Told | None:
    """Dislike the flow of device b1, as a server does where a field has another type."""
    if any("device=b1" in line and "flow_lps" in line for line in lines):
        return Told(400, '{"message":"partial write: field type conflict: flow_lps is integer"}')
    return None


def test_a_batch_that_is_too_large_is_cut(layout: Layout, victoria: Victoria) -> None:
    log = busy_log(layout, 40, 11)
    with proxy(victoria.url) as between:
        between.judge = lambda lines: Told(413, "request too large") if len(lines) > 9 else None
        configure(layout, between.url)
        write(layout, log.records)
        with influx(layout):
            written(layout, len(log.records))
        assert between.requests[413] > 0
    same(victoria, expected(layout, log.records))
    assert "dropped_total{reason=refused}" not in said(layout).counters


@pytest.mark.parametrize(
    ("given", "wait_s"),
    [("7", 7.0), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0), ("soon", None), ("-3", None), ("", None)],
)
def test_what_retry_after_asks_for(given: str, wait_s: float | None) -> None:
    refusal = ApiException(status=503, reason="busy")  # type: ignore[no-untyped-call]
    refusal.headers = HTTPHeaderDict({"Retry-After": given})
    assert retry_after_s(refusal) == wait_s


def test_what_a_server_does_not_take_is_counted_and_the_rest_goes_on(layout: Layout, victoria: Victoria) -> None:
    log = busy_log(layout, 40, 7)
    with proxy(victoria.url) as between:
        between.judge = dislikes_b1
        configure(layout, between.url)
        write(layout, log.records)
        with influx(layout):
            written(layout, len(log.records))
    wanted = expected(layout, log.records)
    refused = [row for row in wanted if row[:2] == ("hydrant_flow_lps", "b1")]
    assert refused
    same(victoria, [row for row in wanted if row not in refused])
    found = said(layout)
    assert found.counters["dropped_total{reason=refused}"] == len(refused)
    assert any("b1 flow_lps refused: 400 Bad Request: partial write: field type conflict" in w for w in found.warnings)


def retained(layout: Layout, records: list[Record]) -> int:
    """Write a log whose first three quarters retention has taken, in Parquet as well; return where it begins."""
    write(layout, records, segment_bytes=4096)
    compactor = compacted(layout, FEW)
    assert len(compactor.manifest.parts) > 3
    firsts = segments(OS_FILES, layout.log(0))
    begin = next(first for first in firsts if first > len(records) * 3 // 4)
    for first in firsts[: firsts.index(begin)]:
        OS_FILES.remove(layout.log(0) / segment_name(first))
    return begin


def test_what_retention_took_from_the_log_comes_from_the_history(layout: Layout, victoria: Victoria) -> None:
    log = busy_log(layout, 300, 8)
    configure(layout, victoria.url)
    retained(layout, log.records)
    with influx(layout):
        written(layout, len(log.records))
    same(victoria, expected(layout, log.records))
    assert "missing_total" not in said(layout).counters


def test_what_nobody_has_any_more_is_said_and_names_stay_right(layout: Layout, victoria: Victoria) -> None:
    log = busy_log(layout, 300, 9)
    configure(layout, victoria.url)
    begin = retained(layout, log.records)
    folder = history_folder(layout, 0)
    manifest = read_manifest(folder)
    kept = tuple(part for part in manifest.parts if part.next > len(log.records) * 2 // 3)  # behind the second registry
    manifest.parts = kept
    write_manifest(folder, manifest)
    (folder / kept[0].records_file).write_bytes(b"no parquet")
    assert kept[1].first < begin
    with influx(layout):
        written(layout, len(log.records))
    wanted = rows_of_log(layout, log.records)
    left = {(device, metric, at) for offset, _, device, metric, at, _ in wanted if offset >= kept[1].first}
    assert {(device, name.partition("_")[2], at) for name, device, at, _ in victoria.samples()} == left
    assert said(layout).counters["missing_total"] == kept[1].first
    assert said(layout).counters["errors_total{stage=history}"] >= 1
    assert any("are no longer in the log" in text for text in said(layout).warnings)


def test_a_history_that_cannot_be_read_stops_nothing(layout: Layout, victoria: Victoria) -> None:
    log = busy_log(layout, 300, 12)
    configure(layout, victoria.url)
    begin = retained(layout, log.records)
    (history_folder(layout, 0) / "manifest.json").write_text("{")
    with influx(layout):
        written(layout, len(log.records))
    found = said(layout).counters
    assert found["missing_total"] == begin
    assert found["dropped_total{reason=inactive}"] > 0  # no registry is known behind the hole: nothing is guessed
    assert victoria.samples() == []


def test_names_that_the_line_protocol_would_misread(layout: Layout, victoria: Victoria) -> None:
    zones = {"a1": "南区, 1号=A 泵", "a2": 'quo"te', "b1": "back\\slash\\", "c1": "new\nline"}
    registry = REGISTRIES[0]
    devices = tuple(msgspec.structs.replace(d, zone=zones.get(d.id, d.zone)) for d in registry.devices)
    log = Log(layout)
    log.registry(START, msgspec.structs.replace(registry, devices=devices))
    for gateway, device in (("a", "a1"), ("a", "a2"), ("b", "b1"), ("c", "c1")):
        log.frame(START, gateway, Lane.TELEMETRY, [(device, "pressure_mpa", START, 1e-7)])
    configure(layout, victoria.url)
    write(layout, log.records)
    with influx(layout):
        written(layout, len(log.records))
    found = victoria.query("last_over_time(hydrant_pressure_mpa[1h])", START / 1000 + 60)
    assert {row["metric"]["device"]: row["metric"]["zone"] for row in found} == {
        "a1": "南区, 1号=A 泵", "a2": 'quo"te', "b1": "back_slash_", "c1": "new_line",
    }  # fmt: skip
    assert {float(row["value"][1]) for row in found} == {1e-7}


def test_a_log_in_kafka(layout: Layout, victoria: Victoria, kafka: str, topic_prefix: str) -> None:
    log = busy_log(layout, 60, 10)
    configure(layout, victoria.url)
    store = KafkaStore(kafka, layout, 1, prefix=topic_prefix)
    store.open()
    for path in layout.blobs.iterdir():
        store.share(path.name)
    writer = store.writer("log", 0)
    writer.start()
    for record in log.records:
        writer.append(record.kind, record.received_at, record.payload)
    behind = writer.commit()
    shutil.rmtree(layout.blobs)  # another machine's data folder: registries come from Kafka as well
    with influx(layout, "--log", "kafka", "--kafka", kafka, "--topics", topic_prefix):
        written(layout, behind)
    writer.close()
    same(victoria, expected(SharedLayout(layout.root, source=store.blobs), log.records))
    assert "missing_total" not in said(layout).counters


# --- what a person gets wrong -----------------------------------------------------------------------------------

GOOD = {"url": "http://127.0.0.1:8086", "org": "city", "bucket": "readings"}
WRONG = [
    ({"url": "influx.example:8086"}, "url: expected such as"),
    ({"url": "http://me:secret@influx.example"}, "url: expected such as"),
    ({"url": "http://influx:port"}, "url: expected such as"),
    ({"org": ""}, "org: expected a name"),
    ({"bucket": ""}, "bucket: expected a name"),
    ({"batch": 0}, "batch: expected 1 to 50000"),
    ({"timeout": "10"}, 'timeout: expected a duration such as "15s"'),
    ({"timeout": "1h"}, "timeout: expected"),
    ({"token": "s3cret"}, "token: Expected `object | null`, got `str`"),
    ({"token": {}}, "token: expected either file or env"),
    ({"token": {"file": "a", "env": "B"}}, "token: expected either file or env"),
    ({"token": {"file": "not-there"}}, "not-there: the token cannot be read"),
    ({"token": {"env": "CITYBRAIN_NOT_THERE"}}, "CITYBRAIN_NOT_THERE: expected a token"),
    ({"buckt": "x"}, "unknown field 'buckt'; did you mean 'bucket'?"),
    ({"ca": "/not/there.pem"}, "ca: /not/there.pem: no such file"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[text for _, text in WRONG])
def test_a_wrong_configuration_is_refused_with_its_place(
    layout: Layout, change: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (layout.root / "influx.yaml").write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in {**GOOD, **change}.items()))
    assert main(["influx", "--data", str(layout.root), "--check"]) == 3
    said = capsys.readouterr().err
    assert message in said
    assert "s3cret" not in said


def test_a_right_configuration_is_checked_without_a_server(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CITYBRAIN_TEST_TOKEN", "secret")
    configure(layout, "http://127.0.0.1:1", token={"env": "CITYBRAIN_TEST_TOKEN"})
    code, out, err = run(layout, "--check", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"target": "http://127.0.0.1:1 city/readings", "batch": 50}


def test_no_configuration_says_where_it_is_expected(layout: Layout) -> None:
    code, _, err = run(layout)
    assert code == 3
    assert "influx.yaml: cannot be read" in err


def test_a_mark_of_another_server_is_not_taken_for_ours(layout: Layout) -> None:
    OS_FILES.make(mark_path(layout, 0).parent)
    mark_path(layout, 0).write_bytes(msgspec.json.encode(Mark("http://127.0.0.1:2 city/readings", 7)))
    configure(layout, "http://127.0.0.1:1")
    code, _, err = run(layout)
    assert code == 3
    assert "0.json: it belongs to http://127.0.0.1:2 city/readings" in err
    mark_path(layout, 0).write_text("{")
    code, _, err = run(layout)
    assert code == 5
    assert "0.json at byte 0" in err


def test_only_one_may_write_a_shard(layout: Layout) -> None:
    configure(layout, "http://127.0.0.1:1")
    with influx(layout):
        eventually(lambda: beat(layout) is not None, 20)
        code, _, err = run(layout)
    assert code == 4
    assert "another `citybrain influx` has shard 0" in err
