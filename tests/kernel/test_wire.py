"""The wire codec: both encodings carry the same readings, and rubbish is refused by name."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citybrain import wire
from citybrain.errors import WireError
from citybrain.model import Reading

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\n\0"), min_size=1, max_size=12)
READINGS = st.lists(
    st.builds(
        Reading,
        device=NAMES,
        observed_at=st.integers(1_700_000_000_000, 1_700_000_000_000 + 2**31),
        values=st.dictionaries(NAMES, st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=5),
    ),
    max_size=12,
)
HEADER = wire.Header(epoch=77, seq=41, floor=12, sent_at=1_767_225_600_123)


def merged(readings: list[Reading]) -> list[Reading]:
    """What columns carry: consecutive readings of one device and time without a common metric are one."""
    result: list[Reading] = []
    for reading in readings:
        last = result[-1] if result else None
        if (
            last is None
            or (last.device, last.observed_at) != (reading.device, reading.observed_at)
            or next(iter(reading.values)) in last.values
        ):
            result.append(Reading(reading.device, reading.observed_at, dict(reading.values)))
            continue
        for name, number in reading.values.items():
            if name in result[-1].values:
                result.append(Reading(reading.device, reading.observed_at, {}))
            result[-1].values[name] = number
    return result


@given(readings=READINGS, compress=st.booleans())
@settings(max_examples=200, deadline=None)
def test_columns_carry_what_went_in(readings: list[Reading], compress: bool) -> None:
    body = wire.columns_body(readings)
    message = wire.open_message(wire.columns_message(HEADER, body, compress=compress))
    assert message.header == HEADER
    assert message.checksum == wire.crc32c(body)
    assert wire.readings_of(message) == merged(readings)


@given(readings=READINGS)
@settings(max_examples=200, deadline=None)
def test_json_carries_what_went_in(readings: list[Reading]) -> None:
    message = wire.open_message(wire.json_message(HEADER, wire.json_body(readings)))
    assert message.header == HEADER
    assert wire.readings_of(message) == readings


def test_a_resend_with_another_floor_has_the_same_checksum() -> None:
    readings = [Reading("hyd-1", 1, {"pressure_mpa": 0.3})]
    later = wire.Header(epoch=77, seq=41, floor=40, sent_at=HEADER.sent_at + 60_000)
    for make, body in (
        (wire.columns_message, wire.columns_body(readings)),
        (wire.json_message, wire.json_body(readings)),
    ):
        first, again = wire.open_message(make(HEADER, body)), wire.open_message(make(later, body))
        assert first.checksum == again.checksum
        assert first.header != again.header


def test_the_documented_json_frame_is_taken() -> None:
    text = (
        b'{"v":1,"epoch":5,"seq":41,"floor":12,"sent_at":1767225600500,"site":"ignored",'
        b'"readings":[{"d":"hyd-000123","t":1767225600123,"m":{"pressure_mpa":0.31},"x":null}]}'
    )
    (reading,) = wire.readings_of(wire.open_message(text))
    assert reading == Reading("hyd-000123", 1767225600123, {"pressure_mpa": 0.31})


def test_columns_pass_not_a_number_for_ingest_to_count() -> None:
    body = wire.columns_body([Reading("a", 1, {"value": math.nan}), Reading("a", 2, {"value": math.inf})])
    first, second = wire.readings_of(wire.open_message(wire.columns_message(HEADER, body)))
    assert math.isnan(first.values["value"])
    assert not wire.finite(second.values["value"])


def reason_of(opened: Callable[[], wire.Message]) -> str:
    """Decode a message; return the reason it was refused for, or nothing. Any other error is a defect."""
    try:
        wire.readings_of(opened())
    except WireError as error:
        return error.reason
    return ""


GOOD = wire.columns_message(HEADER, wire.columns_body([Reading("a", 1, {"value": 1.0})]))


@pytest.mark.parametrize(
    ("payload", "reason", "what"),
    [
        (b"", "malformed", "empty"),
        (b"hello", "malformed", "JSON"),
        (b'{"v":1}', "malformed", "epoch"),
        (b'{"v":1,"epoch":"x","seq":1,"floor":1,"readings":[]}', "malformed", "epoch"),
        (b'{"v":2,"epoch":1,"seq":1,"floor":1,"readings":[]}', "version", "version 2"),
        (b'{"v":1,"epoch":1,"seq":1,"floor":2,"readings":[{"d":"a","t":1,"m":{}}]}', "malformed", "floor 2"),
        (b'{"v":1,"epoch":1,"seq":1,"floor":3,"readings":[]}', "malformed", "floor 3"),
        (b'{"v":1,"epoch":1,"seq":0,"floor":0,"readings":[]}', "malformed", "floor 0"),
        (b'{"v":1,"epoch":0,"seq":1,"floor":1,"readings":[]}', "malformed", "epoch 0"),
        (b"x" * (wire.MAX_MESSAGE + 1), "oversized", str(wire.MAX_MESSAGE)),
        (GOOD[:20], "malformed", "header"),
        (GOOD[:-1], "malformed", "bytes"),
        (GOOD[:1] + b"\x09" + GOOD[2:], "version", "version 9"),
        (GOOD[:2] + b"\x01" + GOOD[3:], "malformed", "zstd"),
        (GOOD[:4] + struct.pack("<I", wire.MAX_INFLATED + 1) + GOOD[8:], "oversized", "inflated"),
    ],
)
def test_rubbish_is_refused_by_name(payload: bytes, reason: str, what: str) -> None:
    with pytest.raises(WireError, match=what) as caught:
        wire.open_message(payload)
    assert caught.value.reason == reason


def test_a_compressed_bomb_is_not_inflated() -> None:
    body = bytes(3 * wire.MAX_INFLATED)
    bomb = wire.columns_message(HEADER, body, compress=True)
    small = bomb[:4] + struct.pack("<I", 1000) + bomb[8:]
    with pytest.raises(WireError, match=r"zstd|bytes"):
        wire.open_message(small)


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_any_bytes_are_a_message_or_a_wire_error(data: bytes) -> None:
    for payload in (data, bytes([wire.COLUMNS_MAGIC]) + data, GOOD[: wire.HEAD.size] + data):
        assert reason_of(partial(wire.open_message, payload)) in {"", "malformed", "oversized", "version"}


@given(data=st.binary(max_size=60), position=st.integers(0, 60))
@settings(max_examples=300)
def test_a_spoiled_body_is_readings_or_a_wire_error(data: bytes, position: int) -> None:
    body = wire.columns_body([Reading("a", 1, {"value": 1.0, "flow_lps": 2.0}), Reading("b", 2, {"value": 3.0})])
    spoiled = body[:position] + data + body[position + len(data) :]
    message = wire.Message(HEADER, True, spoiled, 0)
    assert reason_of(lambda: message) in {"", "malformed"}


def test_a_name_with_a_line_break_is_refused_at_the_gateway() -> None:
    with pytest.raises(ValueError, match="line break"):
        wire.columns_body([Reading("a\nb", 1, {"value": 1.0})])


@pytest.mark.parametrize("text", ["", "cb/v1/0/gw", "cb/v1/x/gw/telemetry", "cb/v2/0/gw/telemetry", "a/b/c/d/e"])
def test_a_wrong_topic_is_refused(text: str) -> None:
    with pytest.raises(WireError, match="topic"):
        wire.parse_topic(text)


def test_topics_go_both_ways() -> None:
    assert wire.parse_topic(wire.topic(3, "gw-01", "event")) == (3, "gw-01", "event")


@pytest.mark.parametrize(
    "payload", [b"", b"{}", b'{"lane":"video","epoch":1,"seq":1}', b'{"lane":"event","epoch":1,"seq":-1}']
)
def test_a_wrong_ack_is_refused(payload: bytes) -> None:
    with pytest.raises(WireError, match="ack"):
        wire.decode_ack(payload)


def test_acks_and_statuses_go_both_ways() -> None:
    ack = wire.Ack("event", 7, 12)
    assert wire.decode_ack(wire.encode_json(ack)) == ack
    status = wire.Status(connection=3, online=True, at=5, serial="abc")
    assert wire.decode_status(wire.encode_json(status)) == status
    with pytest.raises(WireError, match="status"):
        wire.decode_status(b"[]")
