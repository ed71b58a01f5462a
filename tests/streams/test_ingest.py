"""Ingest: what is taken is in the log once and acknowledged after it; what is not is counted under a reason."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citybrain import wire
from citybrain.counters import Counters
from citybrain.errors import ConfigError, NotFound, StorageError
from citybrain.layout import Active, Layout
from citybrain.model import Device, Gateway, Place, Reading, Registry
from citybrain.segments import SUFFIX, Reader, Record, segment_name, segments
from citybrain.storage import OS_FILES, Files
from streams import intake as intake_module
from streams.ingest import Ingest
from streams.log import Control, Kind, Tick, decode_control, decode_tick, frame_arrays, frame_head
from streams.registry import METRIC_NAMES, Index, decode_registry, encode_registry
from tests.faulty_files import LossyFiles

NOW = 1_767_225_600_000
PLACE = Place(121.5, 31.2, "310104001001001")
EPOCH = 77


def hydrant(name: str, gateway: str) -> Device:
    return Device(name, "hydrant", gateway, PLACE, ("pressure_mpa", "flow_lps", "battery_v"), ("tilt_deg", "cap_open"))


REGISTRY = Registry(
    (Gateway("gw-a", 0, PLACE), Gateway("gw-b", 1, PLACE)),
    (hydrant("hyd-1", "gw-a"), hydrant("hyd-2", "gw-a"), hydrant("hyd-9", "gw-b")),
)


def with_device(*devices: Device) -> Registry:
    return Registry(REGISTRY.gateways, (*REGISTRY.devices, *devices))


def reading(device: str = "hyd-1", at: int = NOW, **values: float) -> Reading:
    return Reading(device, at, values or {"pressure_mpa": 0.3})


def foreign(metric: str) -> Reading:
    return Reading("hyd-1", NOW, {metric: 1.0})


def encoded(
    readings: Sequence[Reading], seq: int, floor: int = 1, epoch: int = EPOCH, *, columns: bool = True
) -> bytes:
    header = wire.Header(epoch, seq, floor, NOW)
    if columns:
        return wire.columns_message(header, wire.columns_body(readings))
    return wire.json_message(header, wire.json_body(readings))


class Platform:
    """An ingest on a data folder, with what a test asks of it."""

    def __init__(self, folder: Path, files: Files = OS_FILES, segment_bytes: int = 1 << 20) -> None:
        self.layout = Layout(folder)
        self.layout.make()
        self.files = files
        self.segment_bytes = segment_bytes
        self.restart()

    def restart(self) -> None:
        self.counters = Counters("ingest")
        self.ingest = Ingest(self.layout, (0, 1), self.counters, self.files, segment_bytes=self.segment_bytes)
        self.ingest.start()

    def provision(self, registry: Registry = REGISTRY) -> str:
        name = self.layout.put_blob(encode_registry(registry))
        self.ingest.control(Control("registry", NOW, "test", name), NOW)
        self.ingest.commit()
        return name

    def send(
        self, payload: bytes, gateway: str = "gw-a", channel: str = "telemetry", shard: int = 0, now_ms: int = NOW
    ) -> None:
        self.ingest.message(wire.topic(shard, gateway, channel), payload, now_ms)

    def acks(self) -> list[tuple[str, wire.Ack]]:
        return [(topic.split("/")[3], wire.decode_ack(payload)) for topic, payload in self.ingest.commit()]

    def ack(self) -> int:
        """Commit, and return the one acknowledged seq; -1 where there is none."""
        acks = self.acks()
        assert len(acks) <= 1
        return acks[0][1].seq if acks else -1

    def records(self, shard: int = 0) -> list[Record]:
        return list(Reader(self.layout.log(shard), files=self.files))

    def frames(self, shard: int = 0) -> list[tuple[int, int, list[tuple[str, str, int, float]]]]:
        """Return (epoch, seq, values) of every frame, the series by name under the registry in force."""
        index: Index | None = None
        found = []
        for record in self.records(shard):
            if record.kind == Kind.CONTROL:
                control = decode_control(record.payload)
                if control.what == "registry":
                    index = Index(decode_registry(self.layout.get_blob(control.content)), control.content)
            elif record.kind == Kind.FRAME:
                assert index is not None
                head = frame_head(record.payload)
                times, values, series = (array.tolist() for array in frame_arrays(record.payload, head))
                names = [
                    (index.devices[index.series_device[s]].id, metric_of(index, s)) for s in series
                ]  # fmt: skip
                rows = [(*name, at, value) for name, at, value in zip(names, times, values, strict=True)]
                found.append((head.epoch, head.seq, rows))
        return found

    def seqs(self, shard: int = 0) -> list[int]:
        return [seq for _, seq, _ in self.frames(shard)]

    def controls(self, what: str, shard: int = 0) -> list[Control]:
        found = [decode_control(record.payload) for record in self.records(shard) if record.kind == Kind.CONTROL]
        return [control for control in found if control.what == what]

    def count(self, name: str) -> int:
        return self.counters.values[name]

    def dropped(self, reason: str) -> int:
        return self.count(f"dropped_total{{reason={reason}}}")

    def warned(self, *words: str) -> bool:
        return any(all(word in warning for word in words) for warning in self.counters.warnings)


def metric_of(index: Index, series: int) -> str:
    return METRIC_NAMES[int(index.series_metric[series])]


@pytest.fixture
def platform(tmp_path: Path) -> Platform:
    made = Platform(tmp_path / "data")
    made.provision()
    return made


# --- the protocol -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [True, False])
def test_a_message_is_in_the_log_and_acknowledged(platform: Platform, columns: bool) -> None:
    platform.send(encoded([reading(pressure_mpa=0.31, flow_lps=0.0), reading("hyd-2", NOW + 5)], 1, columns=columns))
    assert platform.frames() == []  # nothing before the commit
    acks = platform.ingest.commit()
    assert [(topic, wire.decode_ack(payload)) for topic, payload in acks] == [
        ("cb/v1/0/gw-a/ack", wire.Ack("telemetry", EPOCH, 1))
    ]
    rows = [
        ("hyd-1", "pressure_mpa", NOW, 0.31),
        ("hyd-1", "flow_lps", NOW, 0.0),
        ("hyd-2", "pressure_mpa", NOW + 5, 0.3),
    ]
    assert platform.frames() == [(EPOCH, 1, rows)]
    counted = {
        name: platform.count(name) for name in ("received_total", "accepted_total", "readings_total", "values_total")
    }
    assert counted == {"received_total": 1, "accepted_total": 1, "readings_total": 2, "values_total": 3}
    assert platform.ingest.commit() == []


def test_one_cumulative_ack_a_lane(platform: Platform) -> None:
    for seq in range(1, 6):
        platform.send(encoded([reading()], seq))
    platform.send(encoded([reading(tilt_deg=1.0)], 1), channel="event")
    platform.send(encoded([reading("hyd-9")], 1), "gw-b", shard=1)
    assert sorted(platform.acks(), key=str) == [
        ("gw-a", wire.Ack("event", EPOCH, 1)),
        ("gw-a", wire.Ack("telemetry", EPOCH, 5)),
        ("gw-b", wire.Ack("telemetry", EPOCH, 1)),
    ]


def test_only_the_next_message_is_taken(platform: Platform) -> None:
    platform.send(encoded([reading()], 3))  # the first of an unknown epoch begins at its floor, and that is 1
    assert platform.ack() == 0
    for seq in (1, 2, 2, 1, 4):
        platform.send(encoded([reading()], seq))
    assert platform.ack() == 2
    assert platform.seqs() == [1, 2]
    assert platform.count("repeated_total") == 2
    assert platform.count("gap_total") == 2
    platform.send(encoded([reading()], 3))
    assert platform.ack() == 3


def test_an_unknown_epoch_starts_at_its_floor_and_what_is_evicted_is_lost(platform: Platform) -> None:
    platform.send(encoded([reading()], 41, 41))
    assert platform.ack() == 41
    platform.send(encoded([reading()], 42, 41))
    platform.send(encoded([reading()], 50, 50))
    assert platform.ack() == 50
    assert platform.seqs() == [41, 42, 50]
    assert platform.count("lost_total{reason=evicted}") == 7


@pytest.mark.parametrize("columns", [True, False])
def test_a_question_is_answered_and_never_taken(platform: Platform, columns: bool) -> None:
    def ask(floor: int, epoch: int = EPOCH) -> None:
        header = wire.Header(epoch, floor - 1, floor, NOW)
        platform.send(wire.columns_message(header, b"") if columns else wire.json_message(header, b"[]"))

    ask(1)
    assert platform.ack() == 0
    for seq in (1, 2, 3):
        platform.send(encoded([reading()], seq))
    assert platform.ack() == 3
    ask(3)  # that ingest has 2 with other content is no conflict
    assert platform.ack() == 3
    ask(6)
    assert platform.ack() == 5
    assert platform.count("lost_total{reason=evicted}") == 2
    ask(41, epoch=EPOCH + 1)  # an epoch that began behind 40 acknowledged messages
    assert platform.ack() == 40
    platform.restart()  # nothing of it is in the log
    platform.send(encoded([reading()], 41, 41, epoch=EPOCH + 1))
    assert platform.ack() == 41
    assert platform.seqs() == [1, 2, 3, 41]
    assert platform.count("conflict_total") == 0


def test_epochs_have_their_own_numbers(platform: Platform) -> None:
    """A cloned card alternates between two epochs; a ninth makes the oldest be forgotten."""
    for seq in (1, 2, 3):
        platform.send(encoded([reading()], seq, epoch=5))
        platform.send(encoded([reading()], seq, epoch=6))
    assert sorted(ack.epoch for _, ack in platform.acks()) == [5, 6]
    assert len(platform.frames()) == 6
    for epoch in range(10, 20):
        platform.send(encoded([reading()], 1, epoch=epoch), now_ms=NOW + epoch)
    platform.ingest.commit()
    lanes = platform.ingest._intakes[0].cursors.lanes["gw-a", 0]
    assert sorted(lanes) == list(range(12, 20))


def test_a_repeat_with_other_content_is_a_conflict(platform: Platform) -> None:
    platform.send(encoded([reading(pressure_mpa=0.3)], 1))
    assert platform.ack() == 1
    for _ in range(3):
        platform.send(encoded([reading(pressure_mpa=0.4)], 1))
        assert platform.ack() == -1
    assert platform.count("conflict_total") == 3
    faults = platform.controls("fault")
    assert [(fault.subject, fault.rule, fault.epoch, fault.at) for fault in faults] == [
        ("gw-a", "gateway_conflict", EPOCH, NOW)
    ]
    assert platform.warned("gw-a", "telemetry seq 1", "other content")
    platform.send(encoded([reading(pressure_mpa=0.3)], 1))  # the true one is still answered
    assert platform.ack() == 1
    platform.restart()
    platform.send(encoded([reading(pressure_mpa=0.4)], 1))  # and nothing is forgotten
    assert platform.ack() == -1
    assert len(platform.controls("fault")) == 1


def test_floor_and_sent_at_may_differ_in_a_repeat(platform: Platform) -> None:
    body = wire.json_body([reading()])
    platform.send(wire.json_message(wire.Header(EPOCH, 1, 1, NOW), body))
    platform.send(wire.json_message(wire.Header(EPOCH, 1, 1, NOW + 999), body))
    assert platform.ack() == 1
    assert platform.count("repeated_total") == 1


def test_unknown_gateways_and_wrong_shards_are_refused(platform: Platform) -> None:
    for seq in range(1, 30):
        platform.send(encoded([reading()], seq), "stranger")
    platform.send(encoded([reading()], 1), "gw-a", shard=1)
    platform.send(encoded([reading()], 1), "gw-a", shard=7)
    assert platform.acks() == []
    assert platform.dropped("unknown_gateway") == 29
    assert platform.dropped("wrong_shard") == 2
    assert sum("stranger" in warning for warning in platform.counters.warnings) == 1
    platform.send(encoded([reading()], 30), "stranger", now_ms=NOW + 61_000)
    assert platform.warned("stranger", "28 more")


def test_before_any_registry_nothing_is_taken(tmp_path: Path) -> None:
    platform = Platform(tmp_path / "data")
    platform.send(encoded([reading()], 1))
    assert platform.acks() == []
    assert platform.dropped("unknown_gateway") == 1


# --- bad input: says what and where, and the rest goes on -------------------------------------------------------

VALUE_FAULTS: list[tuple[str, Reading]] = [
    ("unknown_metric", reading(voltage_v=1.0)),
    ("unknown_metric", foreign("no such metric")),
    ("wrong_lane", reading(tilt_deg=3.0)),
    ("not_a_number", reading(pressure_mpa=float("nan"))),
    ("not_a_number", reading(pressure_mpa=float("-inf"))),
    ("out_of_range", reading(pressure_mpa=99.0)),
    ("bad_time", reading(at=NOW - 11 * 366 * 86_400_000)),
    ("bad_time", reading(at=NOW + 11 * 366 * 86_400_000)),
    ("bad_time", reading(at=-5)),
    ("unknown_device", reading("hyd-404")),
    ("unknown_device", reading("hyd-9")),  # another gateway's
]


@pytest.mark.parametrize(
    ("reason", "bad", "columns"),
    [(why, bad, columns) for why, bad in VALUE_FAULTS for columns in (True, False) if columns or why != "not_a_number"],
)
def test_a_bad_value_is_counted_and_the_rest_goes_on(
    platform: Platform, reason: str, bad: Reading, columns: bool
) -> None:
    if columns and reason == "bad_time":
        platform.send(encoded([bad], 1, columns=columns))  # more than 49 days: a frame of its own
        platform.send(encoded([reading(), reading("hyd-2")], 2, columns=columns))
    else:
        platform.send(encoded([reading(), bad, reading("hyd-2")], 1, columns=columns))
    assert platform.ack() in (1, 2)
    assert [row for _, _, rows in platform.frames() for row in rows] == [
        ("hyd-1", "pressure_mpa", NOW, 0.3),
        ("hyd-2", "pressure_mpa", NOW, 0.3),
    ]
    assert {name: n for name, n in platform.counters.values.items() if name.startswith("dropped")} == {
        f"dropped_total{{reason={reason}}}": 1
    }
    assert platform.count("values_total") == 2


@pytest.mark.parametrize("columns", [True, False])
def test_a_future_time_is_set_back(platform: Platform, columns: bool) -> None:
    readings = [reading(at=NOW + 2000), reading("hyd-2", NOW + 3_600_000)]
    platform.send(encoded(readings, 1, columns=columns))
    assert platform.ack() == 1
    assert [row[2] for row in platform.frames()[0][2]] == [NOW + 2000, NOW + 2000]
    assert platform.count("clamped_total{reason=future}") == 1
    assert platform.count("values_total") == 2


def rubbish(kind: str, seq: int) -> bytes:
    """Return a message with a good header and a bad body."""
    header = wire.Header(EPOCH, seq, 1, NOW)
    body = wire.columns_body([reading()])
    columns = {
        "columns cut": wire.columns_message(header, body)[:-3],
        "columns zstd": wire.HEAD.pack(wire.COLUMNS_MAGIC, 1, wire.FLAG_ZSTD, 0, 99, EPOCH, seq, 1, NOW) + b"no zstd",
        "columns indexes": wire.columns_message(header, body[:-2] + b"\xff\xff"),
        "inflated": wire.HEAD.pack(wire.COLUMNS_MAGIC, 1, 1, 0, wire.MAX_INFLATED + 1, EPOCH, seq, 1, NOW),
        "json cut": wire.json_message(header, wire.json_body([reading()]))[:-9],
    }
    bodies = {
        "json types": b'[{"d":"hyd-1","t":"noon","m":{"pressure_mpa":0.3}}]',
        "json missing": b'[{"d":"hyd-1","m":{"pressure_mpa":0.3}}]',
        "json string": b'[{"d":"hyd-1","t":1,"m":{"pressure_mpa":"high"}}]',
        "json utf-8": b'[{"d":"\xff","t":1,"m":{"pressure_mpa":1}}]',
        "json depth": b"[" * 50_000 + b"]" * 50_000,
        "oversized": b"[" + b" " * wire.MAX_MESSAGE + b"]",
    }
    return columns[kind] if kind in columns else wire.json_message(header, bodies[kind])


RUBBISH = {
    "columns cut": "malformed",
    "columns zstd": "malformed",
    "columns indexes": "malformed",
    "json types": "malformed",
    "json missing": "malformed",
    "json string": "malformed",
    "json cut": "malformed",
    "json utf-8": "malformed",
    "json depth": "malformed",
    "oversized": "oversized",
    "inflated": "oversized",
}


@pytest.mark.parametrize(("kind", "reason"), RUBBISH.items())
def test_rubbish_behind_a_good_header_does_not_block_its_lane(platform: Platform, kind: str, reason: str) -> None:
    """A message that can never become good would be sent for ever: its number is taken, and nothing else."""
    platform.send(encoded([reading()], 1))
    platform.send(rubbish(kind, 2))
    platform.send(encoded([reading("hyd-2")], 3))
    assert platform.ack() == 3
    assert [(seq, len(rows)) for _, seq, rows in platform.frames()] == [(1, 1), (2, 0), (3, 1)]
    assert platform.dropped(reason) == 1
    assert platform.count("accepted_total") == 2
    assert platform.warned("gw-a", "telemetry", "seq 2", reason)
    platform.send(rubbish(kind, 2))  # and its repeat is a repeat
    assert platform.ack() == 3
    assert platform.count("conflict_total") == 0


UNREADABLE = {
    "malformed": [b"", b"\xcb", b"\xcb\x01\x00", b"{", b"null", b"[" * 100_000, b"[]", b'{"v":1}', b"\xff\xfe",
                  b'{"v":1,"epoch":-1,"seq":1,"floor":1,"readings":[]}'],
    "version": [b'{"v":2,"epoch":1,"seq":1,"floor":1,"readings":[]}', struct.pack("<BB", 0xCB, 9) + bytes(60)],
    "oversized": [b"\0" * (wire.MAX_MESSAGE + 1)],
}  # fmt: skip


@pytest.mark.parametrize(("reason", "payload"), [(why, one) for why, found in UNREADABLE.items() for one in found])
def test_what_has_no_header_is_counted_and_said(platform: Platform, reason: str, payload: bytes) -> None:
    platform.send(payload)
    platform.send(encoded([reading()], 1))
    assert platform.ack() == 1
    assert platform.dropped(reason) == 1
    assert platform.warned("cb/v1/0/gw-a/telemetry", reason)


@pytest.mark.parametrize(
    "topic", ["", "cb/v1/0/gw-a", "cb/v2/0/gw-a/telemetry", "cb/v1/x/gw-a/event", "cb/v1/0/gw-a/ack"]
)
def test_a_foreign_topic_is_counted(platform: Platform, topic: str) -> None:
    platform.ingest.message(topic, encoded([reading()], 1), NOW)
    assert platform.acks() == []
    assert platform.dropped("topic") == 1


@given(payload=st.binary(max_size=200) | st.binary(max_size=80).map(lambda tail: encoded([reading()], 1)[:60] + tail))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_taken_or_counted(payload: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    platform = _shared(tmp_path_factory)
    before = sum(platform.counters.values.values()), platform.count("received_total")
    platform.send(payload)
    platform.ingest.commit()
    assert platform.count("received_total") == before[1] + 1
    assert sum(platform.counters.values.values()) > before[0] + 1  # received, and what became of it


_made: list[Platform] = []


def _shared(factory: pytest.TempPathFactory) -> Platform:
    if not _made:
        _made.append(Platform(factory.mktemp("any") / "data"))
        _made[0].provision()
    return _made[0]


def test_counts_add_up(platform: Platform) -> None:
    platform.send(encoded([reading(), reading("hyd-404"), reading(pressure_mpa=77.0)], 1))
    platform.send(encoded([reading()], 1))
    platform.send(encoded([reading()], 9))
    platform.send(rubbish("json types", 2))
    platform.send(b"{")
    platform.send(encoded([reading()], 1), "stranger")
    platform.send(wire.encode_json(wire.Status(1, True, NOW)), channel="status")
    platform.ingest.commit()
    count = platform.count
    assert count("received_total") == 7
    messages = ("accepted_total", "repeated_total", "gap_total", "conflict_total", "status_total")
    refused = sum(platform.dropped(reason) for reason in ("malformed", "unknown_gateway"))
    assert sum(map(count, messages)) + refused == 7
    assert count("values_total") + platform.dropped("unknown_device") + platform.dropped("out_of_range") == 3


def test_status_of_an_older_connection_is_ignored(platform: Platform) -> None:
    def status(connection: int, online: bool, serial: str = "s1") -> None:
        payload = wire.encode_json(wire.Status(connection, online, NOW, serial))
        platform.send(payload, channel="status")

    status(4, True)
    status(3, False)  # the will of the connection before arrives late
    assert platform.counters.details["gateways"]["gw-a"].online is True
    assert platform.dropped("stale_status") == 1
    status(4, False)
    assert platform.ingest.gateways["gw-a"].online is False
    status(1, True, "s2")  # another board counts for itself
    assert platform.ingest.gateways["gw-a"].connection == 1
    for bad in (b"{}", b'{"connection":1,"online":true,"at":%d}' % 10**30, b'{"z":' + b"[" * 10**5):
        platform.send(bad, channel="status")
    assert platform.dropped("malformed") == 3


# --- ticks and controls -----------------------------------------------------------------------------------------


def test_ticks_and_controls_stand_in_every_shard_in_order(platform: Platform) -> None:
    platform.send(encoded([reading()], 1))
    platform.ingest.tick(NOW + 5000, NOW - 9)
    platform.ingest.control(Control("override", NOW, "op", subject="hyd-1", rule="*", until_ms=NOW + 9), NOW + 5001)
    platform.ingest.commit()
    for shard in (0, 1):
        records = [record for record in platform.records(shard) if record.received_at > NOW]
        assert [record.kind for record in records] == [Kind.TICK, Kind.CONTROL]
        assert decode_tick(records[0].payload) == Tick(NOW + 5000, NOW - 9)
        assert decode_control(records[1].payload).subject == "hyd-1"
        assert records[1].received_at == NOW + 5001


def test_a_registry_that_is_not_there_changes_nothing(platform: Platform) -> None:
    before = len(platform.records())
    with pytest.raises(NotFound, match="no such content"):
        platform.ingest.control(Control("registry", NOW, "op", "0" * 64), NOW)
    broken = platform.layout.put_blob(b'{"gateways":[],"devices":[{}]}')
    with pytest.raises(ConfigError):
        platform.ingest.control(Control("registry", NOW, "op", broken), NOW)
    platform.send(encoded([reading()], 1))
    assert platform.ack() == 1
    assert len(platform.records()) == before + 1


def test_a_registry_is_in_force_for_what_comes_after_it(platform: Platform) -> None:
    """`aaa` sorts first, so every series gets another number; each frame is numbered by the registry before it."""
    platform.send(encoded([reading()], 1))
    name = platform.layout.put_blob(encode_registry(with_device(hydrant("aaa", "gw-a"))))
    platform.ingest.control(Control("registry", NOW, "op", name), NOW)
    platform.send(encoded([reading(), reading("aaa", pressure_mpa=0.2)], 2))
    assert platform.ack() == 2
    devices = [[row[0] for row in rows] for _, _, rows in platform.frames()]
    assert devices == [["hyd-1"], ["hyd-1", "aaa"]]
    platform.restart()
    platform.send(encoded([reading("aaa")], 3))
    assert platform.ack() == 3
    assert platform.frames()[-1][2][0][0] == "aaa"


def test_the_active_registry_and_rules_are_published(platform: Platform) -> None:
    assert platform.layout.read_active() is None
    rules = platform.layout.put_blob(b"[]")
    platform.ingest.control(Control("ruleset", NOW, "op", rules), NOW)
    assert platform.layout.read_active() is None  # not before it is durable
    platform.ingest.commit()
    registry = platform.controls("registry")[-1].content
    assert platform.layout.read_active() == Active(registry, rules)
    (platform.layout.run / "active.json").unlink()
    platform.restart()
    assert platform.layout.read_active() == Active(registry, rules)


# --- quarantine -------------------------------------------------------------------------------------------------


def test_readings_of_an_unknown_device_wait_for_its_adoption(platform: Platform) -> None:
    for seq in (1, 2):
        platform.send(encoded([reading(), reading("new", NOW + seq, pressure_mpa=seq / 10)], seq))
    assert platform.ack() == 2
    assert platform.dropped("unknown_device") == 2
    assert platform.counters.gauges["quarantined"] == 2
    platform.provision(with_device(hydrant("new", "gw-b")))  # not the gateway that has it
    assert platform.counters.gauges["quarantined"] == 2
    platform.provision(with_device(hydrant("new", "gw-a")))
    replayed = [
        (0, 1, [("new", "pressure_mpa", NOW + 1, 0.1)]),
        (0, 2, [("new", "pressure_mpa", NOW + 2, 0.2)]),
    ]
    assert platform.frames()[2:] == replayed
    assert platform.count("replayed_total") == 2
    assert platform.counters.gauges["quarantined"] == 0
    for _ in range(3):
        platform.restart()
        platform.provision(with_device(hydrant("new", "gw-a")))
    assert platform.frames()[2:] == replayed  # exactly once
    platform.send(encoded([reading("new", pressure_mpa=0.4)], 3))
    assert platform.ack() == 3


def test_quarantine_keeps_what_is_no_number_out(platform: Platform) -> None:
    platform.send(encoded([reading("new", pressure_mpa=float("nan"), flow_lps=1.0)], 1))
    platform.ingest.commit()
    platform.restart()
    platform.provision(with_device(hydrant("new", "gw-a")))
    assert platform.frames()[1][2] == [("new", "flow_lps", NOW, 1.0)]


def test_quarantine_cannot_be_blown_up(platform: Platform) -> None:
    """Columns name a device once; a record a reading would repeat a long name, and a big one would fit no segment."""
    long = [reading("x" * 100_000, NOW + n) for n in range(20_000)]
    many = [reading("new", NOW + n, pressure_mpa=0.1234567890123456) for n in range(30_000)]
    for seq, readings in enumerate((long, many), 1):
        body = wire.columns_body(readings)
        platform.send(wire.columns_message(wire.Header(EPOCH, seq, 1, NOW), body, compress=True))
    assert platform.ack() == 2
    assert platform.dropped("unknown_device") == 50_000
    assert platform.counters.gauges["quarantined"] == 8
    platform.provision(with_device(hydrant("new", "gw-a")))
    assert sum(len(rows) for epoch, _, rows in platform.frames() if epoch == 0) == 30_000


def test_a_reading_in_quarantine_whose_message_was_not_logged_is_not_replayed_twice(tmp_path: Path) -> None:
    """The quarantine is synced first: a crash before the log's sync makes the message come again."""
    platform = Platform(tmp_path / "data")
    platform.provision()
    platform.send(encoded([reading("new", NOW)], 1))
    platform.ingest._intakes[0].quarantine.sync()  # and here the machine stops
    platform.restart()
    platform.send(encoded([reading("new", NOW)], 1))
    assert platform.ack() == 1
    platform.provision(with_device(hydrant("new", "gw-a")))
    assert [epoch for epoch, _, _ in platform.frames()] == [EPOCH, 0]


def test_a_message_taken_after_its_device_was_adopted_is_not_replayed(tmp_path: Path) -> None:
    platform = Platform(tmp_path / "data")
    platform.provision()
    platform.send(encoded([reading(), reading("new")], 1))
    platform.ack()
    platform.send(encoded([reading("new", NOW + 7)], 2))
    platform.ingest._intakes[0].quarantine.sync()
    platform.restart()
    platform.provision(with_device(hydrant("new", "gw-a")))
    platform.send(encoded([reading("new", NOW + 7)], 2))
    platform.ack()
    rows = [row for _, _, rows in platform.frames() for row in rows if row[0] == "new"]
    assert [row[2] for row in rows] == [NOW, NOW + 7]


def test_a_half_written_adoption_is_finished(platform: Platform) -> None:
    for seq in range(1, 6):
        platform.send(encoded([reading("new", NOW + seq)], seq))
    platform.ack()
    platform.provision(with_device(hydrant("new", "gw-a")))
    platform.ingest.close()
    path = next(platform.layout.log(0).glob(f"*{SUFFIX}"))
    frames = [record for record in platform.records() if record.kind == Kind.FRAME]
    path.write_bytes(path.read_bytes()[: -2 * (24 + 8 + len(frames[-1].payload)) - 5])  # two and a bit are missing
    for _ in range(3):
        platform.restart()
        rows = [rows[0][2] for epoch, _, rows in platform.frames() if epoch == 0]
        assert sorted(rows) == [NOW + seq for seq in range(1, 6)]


def test_the_quarantine_does_not_fill_the_disk(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    platform.ingest._intakes[0].quarantine._writer._segment_bytes = 400
    for seq in range(1, 41):
        platform.send(encoded([reading("new", NOW + seq)], seq))
        platform.ingest.commit()
    quarantine = platform.ingest._intakes[0].quarantine
    assert len(segments(OS_FILES, quarantine.folder)) <= 4
    assert platform.count("lost_total{reason=quarantine}") + quarantine.waiting == 40
    assert quarantine.waiting >= 4
    platform.provision(with_device(hydrant("new", "gw-a")))
    assert platform.count("replayed_total") + platform.count("lost_total{reason=quarantine}") == 40


# --- disks and restarts -----------------------------------------------------------------------------------------


def test_a_full_disk_acknowledges_nothing_and_goes_on_later(tmp_path: Path) -> None:
    files = LossyFiles()
    platform = Platform(tmp_path / "data", files)
    platform.provision()
    platform.send(encoded([reading()], 1))
    assert platform.ack() == 1
    files.capacity = files.used()
    for payload in (encoded([reading()], 2), encoded([reading("new")], 2)):
        platform.send(payload)
        assert platform.acks() == []
        assert not platform.ingest.complete
    platform.send(encoded([reading()], 1))
    assert platform.ack() == 1  # what needs no room is answered
    platform.ingest.control(Control("override", NOW, "op", subject="hyd-1", rule="*"), NOW)
    assert platform.ack() == -1
    assert platform.count("errors_total{stage=log}") == 4  # the override stands in two shards
    assert platform.count("unstored_total") == 2
    assert platform.warned("no space left", "nothing is acknowledged")
    assert platform.count("accepted_total") == 1
    files.capacity = None
    for seq in (2, 3):
        platform.send(encoded([reading("new")], seq))
    assert platform.ack() == 3
    assert platform.ingest.complete
    assert platform.seqs() == [1, 2, 3]
    assert platform.controls("override") == []


def test_a_registry_that_met_a_full_disk_is_not_in_force(tmp_path: Path) -> None:
    files = LossyFiles()
    platform = Platform(tmp_path / "data", files)
    platform.provision()
    platform.send(encoded([reading("new")], 1))
    assert platform.ack() == 1
    files.capacity = files.used()
    platform.provision(with_device(hydrant("new", "gw-a")))
    assert not platform.ingest.complete
    files.capacity = None
    platform.send(encoded([reading("new", NOW + 1)], 2))
    assert platform.ack() == 2
    platform.provision(with_device(hydrant("new", "gw-a")))
    assert [(epoch, rows[0][2]) for epoch, _, rows in platform.frames() if rows] == [(0, NOW), (0, NOW + 1)]


def test_a_failed_sync_ends_the_process(tmp_path: Path) -> None:
    files = LossyFiles()
    platform = Platform(tmp_path / "data", files)
    platform.provision()
    platform.send(encoded([reading()], 1))
    files.failing_syncs = 1
    with pytest.raises(StorageError, match="Input/output"):
        platform.ingest.commit()
    with pytest.raises(StorageError, match="must end"):
        platform.ingest.commit()


def test_a_restart_knows_what_was_taken(platform: Platform) -> None:
    for seq in range(1, 200):
        platform.send(encoded([reading(at=NOW + seq)], seq))
    platform.ingest.commit()
    for _ in range(3):
        platform.restart()
        platform.send(encoded([reading(at=NOW + 150)], 150))
        assert platform.ack() == 199
        platform.send(encoded([reading(at=NOW)], 199))
        assert platform.ack() == -1
        assert platform.count("conflict_total") == 1


def test_recovery_reads_only_the_last_segment(tmp_path: Path) -> None:
    platform = Platform(tmp_path / "data", segment_bytes=4096)
    platform.provision()
    for seq in range(1, 300):
        platform.send(encoded([reading(at=NOW + seq)], seq))
        platform.ingest.commit()
    folder = platform.layout.log(0)
    found = segments(OS_FILES, folder)
    assert len(found) > 5
    assert len(list(platform.layout.blobs.iterdir())) <= 2 * intake_module.KEPT_SNAPSHOTS + 1
    for first in found[:-2]:
        (folder / segment_name(first)).write_bytes(b"gone")
    platform.restart()
    platform.send(encoded([reading(at=NOW + 280)], 280))
    platform.send(encoded([reading()], 300))
    assert platform.ack() == 300
    assert platform.count("conflict_total") == 0


def test_without_any_snapshot_the_whole_log_is_read(tmp_path: Path) -> None:
    platform = Platform(tmp_path / "data", segment_bytes=2048)
    registry = platform.provision()
    for seq in range(1, 100):
        platform.send(encoded([reading()], seq))
        platform.ingest.commit()
    for blob in platform.layout.blobs.iterdir():
        if blob.name != registry:
            blob.unlink()
    platform.restart()
    assert platform.warned("an older one is read instead")
    platform.send(encoded([reading()], 100))
    assert platform.ack() == 100


def test_a_torn_end_is_cut_and_its_message_comes_again(platform: Platform) -> None:
    for seq in (1, 2, 3):
        platform.send(encoded([reading()], seq))
    platform.ingest.commit()
    path = next(platform.layout.log(0).glob(f"*{SUFFIX}"))
    path.write_bytes(path.read_bytes()[:-7])
    platform.restart()
    assert platform.warned(str(path), "torn end cut")
    platform.send(encoded([reading()], 3))
    assert platform.ack() == 3
    assert platform.seqs() == [1, 2, 3]


def test_damage_in_the_middle_is_set_aside_and_said(platform: Platform) -> None:
    for seq in range(1, 9):
        platform.send(encoded([reading()], seq))
    platform.ingest.commit()
    path = next(platform.layout.log(0).glob(f"*{SUFFIX}"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    platform.restart()
    assert platform.warned(str(path), "before valid records")
    lost = 8 - len(platform.seqs())
    assert 0 < lost < 8
    platform.send(encoded([reading()], 9, 9))  # its spool has nothing older
    assert platform.ack() == 9
    assert platform.count("lost_total{reason=evicted}") == lost


@given(seed=st.integers(0, 10_000), script=st.lists(st.sampled_from(["send", "commit", "crash"]), max_size=60))
@settings(max_examples=60, deadline=None)
def test_nothing_acknowledged_is_lost_or_doubled_by_power_loss(
    seed: int, script: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A gateway that resends behind the last ack, on a disk that loses whatever was not synced."""
    files = LossyFiles(seed)
    platform = Platform(tmp_path_factory.mktemp("power") / "data", files, segment_bytes=2048)
    platform.provision()
    acked, upcoming = 0, 1
    for step in script:
        if step == "send":
            device = "new" if upcoming % 3 == 0 else "hyd-1"
            platform.send(encoded([reading(device, NOW + upcoming)], upcoming, acked + 1))
            upcoming += 1
            continue
        if step == "commit":
            acked = max([acked, *(ack.seq for _, ack in platform.acks())])
        else:
            files.crash()
            platform.restart()
        upcoming = acked + 1
    platform.ingest.commit()
    seqs = platform.seqs()
    assert seqs[:acked] == list(range(1, acked + 1))
    assert len(set(seqs)) == len(seqs)
    platform.provision(with_device(hydrant("new", "gw-a")))
    times = sorted(row[2] for _, _, rows in platform.frames() for row in rows)
    assert times == [NOW + seq for seq in range(1, len(seqs) + 1)]


def test_a_future_snapshot_is_refused_and_the_log_read(platform: Platform) -> None:
    platform.send(encoded([reading()], 1))
    platform.ingest.commit()
    platform.restart()
    saved: dict[str, Any] = msgspec.json.decode(platform.layout.get_blob(platform.controls("cursors")[-1].content))
    name = platform.layout.put_blob(msgspec.json.encode({**saved, "version": 2}))
    platform.ingest.control(Control("cursors", NOW, "a later version", name), NOW)
    platform.ingest.commit()
    platform.restart()
    assert platform.warned("version 2", "reads 1")
    platform.send(encoded([reading()], 2))
    assert platform.ack() == 2
