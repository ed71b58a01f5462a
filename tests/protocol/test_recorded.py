"""Older and newer side by side: what the release before (0.1.0) sent, as bytes, is understood, and the reverse.

The bytes were recorded with that release's own code. They are never made anew: a change that breaks one of these tests
breaks boxes in their cabinets.
"""

from __future__ import annotations

import msgspec
import pytest

from citybrain import wire
from citybrain.orders import decode_order

BIRTH = b'{"connection":1767225600,"online":true,"at":1767225600000,"serial":"10000000abcdef01","spool":"","v":1}'
WILL = (
    b'{"connection":1767225600,"online":false,"at":1767225600000,"serial":"10000000abcdef01",'
    b'"spool":"telemetry begins anew","v":1}'
)
QUESTION_COLUMNS = bytes.fromhex("cb0100000000000007000000000000000b000000000000000c00000000000000d0afda769b010000")
QUESTION_JSON = b'{"v":1,"epoch":7,"seq":11,"floor":12,"sent_at":1767225602000,"readings":[]}'
ACK = b'{"lane":"telemetry","epoch":7,"seq":41,"v":1}'
VITALS = bytes.fromhex(
    "cb010100a8000000070000000000000029000000000000000c00000000000000d0afda769b01000028b52ffd20a8550300b405010005000500"
    "000040007ba8da769b01000067772d310a757074696d655f730a73706f6f6c65640a75706c696e6b5f6b625f7065725f680a636c6f636b5f6f"
    "66667365745f730a7175616c6974790024f83f0001000200030004000500803890410be40a50ce00ba"
)
ORDER = b'{"id":"a1","what":"sample","body":{},"until":1767225660000}'


class StatusBefore(msgspec.Struct, frozen=True):
    """A status as 0.1.0 reads it."""

    connection: int
    online: bool
    at: int
    serial: str = ""
    spool: str = ""
    v: int = 1


class AcceptedBefore(msgspec.Struct, frozen=True):
    """The answer to a commissioning sheet as a box with 0.1.0 reads it."""

    command: str


@pytest.mark.parametrize(("payload", "online", "spool"), [(BIRTH, True, ""), (WILL, False, "telemetry begins anew")])
def test_a_status_of_the_release_before(payload: bytes, online: bool, spool: str) -> None:
    status = wire.decode_status(payload)
    assert (status.connection, status.online, status.spool) == (1_767_225_600, online, spool)
    assert status.serial == "10000000abcdef01"
    assert status.about == wire.About(), "it does not say its version"


def test_a_status_of_today_is_understood_by_the_release_before() -> None:
    today = wire.Status(3, True, 5, "board", "", about=wire.About("0.2.0", "ab" * 32, {"meters": "no such port"}))
    assert msgspec.json.decode(wire.encode_json(today), type=StatusBefore) == StatusBefore(3, True, 5, "board")


@pytest.mark.parametrize("payload", [QUESTION_COLUMNS, QUESTION_JSON], ids=["columns", "json"])
def test_a_question_of_the_release_before(payload: bytes) -> None:
    message = wire.open_message(payload)
    assert (message.header, message.header.asks) == (wire.Header(7, 11, 12, 1_767_225_602_000), True)
    header = wire.Header(7, 11, 12, 1_767_225_602_000)
    ours = wire.columns_message(header, b"") if message.columns else wire.json_message(header, b"[]")
    assert ours == payload, "and ours is the same, byte for byte"


def test_readings_acknowledgements_and_orders_of_the_release_before() -> None:
    (reading,) = wire.readings_of(wire.open_message(VITALS))
    assert (reading.device, reading.values["uptime_s"], len(reading.values)) == ("gw-1", 10.0, 5)
    assert wire.decode_ack(ACK) == wire.Ack("telemetry", 7, 41)
    assert wire.encode_json(wire.Ack("telemetry", 7, 41)) == ACK
    assert decode_order(ORDER).what == "sample"


def test_what_nobody_knows_yet_is_ignored_below_and_above() -> None:
    assert wire.decode_status(BIRTH[:-1] + b',"about":{"version":"9","mood":"good"},"x":[1]}').about.version == "9"
    accepted = b'{"command":"c1","distance_m":230.0,"gcj02":false,"x":1}'
    assert msgspec.json.decode(accepted, type=AcceptedBefore).command == "c1"
