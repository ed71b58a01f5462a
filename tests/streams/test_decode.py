"""The fast paths and the general path give the same arrays, counts and errors, bit for bit."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from citybrain import wire
from citybrain.errors import WireError
from citybrain.model import Device, Gateway, Lane, Place, Reading, Registry
from citybrain.units import METRICS
from streams import decode_kernels
from streams.decode import AHEAD_MS, FAR_MS, Decoded, Decoder, decode_readings, salvage
from streams.registry import Index

NOW = 1_767_225_600_000
PLACE = Place(0.0, 0.0, "1")
GATEWAYS = tuple(Gateway(f"g{n}", 0, PLACE) for n in range(2))
KINDS = (
    (("pressure_mpa", "flow_lps", "battery_v"), ("tilt_deg",)),
    (("floor", "value", "current_a"), ("occupied", "fault_code")),
)
DEVICES = tuple(
    Device(f"消火栓-{n}" if n % 3 == 0 else f"dev-{n:03d}", "any", f"g{n % 2}", PLACE, *KINDS[n % 2 == 0])
    for n in range(40)
)
INDEX = Index(Registry(GATEWAYS, DEVICES), "test")
HEADER = wire.Header(1, 1, 1, NOW)

NAMES = st.sampled_from([device.id for device in DEVICES]) | st.sampled_from(
    ["", "nobody", 'quo"te', "back\\slash", "d"]
)
METRIC = st.sampled_from(sorted(METRICS)) | st.sampled_from(["", "no_such", "ünknown", 'q"'])
PLAIN_NUMBER = st.integers(-2000, 2000).map(float) | st.integers(-300_000, 300_000).map(lambda n: n / 10_000)
NUMBER = PLAIN_NUMBER | st.floats(allow_nan=False, allow_infinity=False) | st.just(-0.0)
TIME = st.integers(NOW - 5000, NOW + 5000) | st.sampled_from([0, -1, NOW - FAR_MS, NOW - FAR_MS - 1, 10**15, 10**16])
READING = st.builds(Reading, NAMES, TIME, st.dictionaries(METRIC, NUMBER, max_size=6))
GOOD = st.sampled_from([device for device in DEVICES if device.gateway == "g1"]).flatmap(
    lambda device: st.builds(
        Reading,
        st.just(device.id),
        st.integers(NOW - 5000, NOW + 5000),
        st.dictionaries(st.sampled_from(device.metrics + device.event_metrics), PLAIN_NUMBER, max_size=4),
    )
)
READINGS = st.lists(READING, max_size=10) | st.lists(GOOD, max_size=20)


def same(one: Decoded, other: Decoded) -> None:
    assert one.observed_at.tobytes() == other.observed_at.tobytes()
    assert one.value.tobytes() == other.value.tobytes()  # bits, so -0.0 is not 0.0
    assert one.series.tobytes() == other.series.tobytes()
    assert (one.readings, one.dropped, one.clamped) == (other.readings, other.dropped, other.clamped)


def outcome(decode: Any) -> Decoded | str:
    try:
        found: Decoded = decode()
    except WireError as error:
        return error.reason
    return found


def check(message: wire.Message, lane: Lane, decoder: Decoder) -> None:
    """Both paths agree on this message, for every gateway."""
    for gateway in range(len(GATEWAYS)):
        fast = outcome(lambda gateway=gateway: decoder.decode(message, gateway, lane, NOW))
        plain = outcome(lambda gateway=gateway: decode_readings(wire.readings_of(message), INDEX, gateway, lane, NOW))
        if isinstance(fast, str) or isinstance(plain, str):
            assert fast == plain
        else:
            same(fast, plain)
            assert fast.unknown == plain.unknown


DECODER = Decoder(INDEX)


@given(readings=READINGS, lane=st.sampled_from(Lane))
@settings(max_examples=200, deadline=None)
def test_columns_equal_the_general_path(readings: list[Reading], lane: Lane) -> None:
    base = min((reading.observed_at for reading in readings), default=0)
    readings = [reading for reading in readings if reading.observed_at - base < 2**32]
    check(wire.Message(HEADER, True, wire.columns_body(readings), 0), lane, DECODER)


@given(readings=READINGS, lane=st.sampled_from(Lane))
@settings(max_examples=200, deadline=None)
def test_json_equals_the_general_path(readings: list[Reading], lane: Lane) -> None:
    check(wire.Message(HEADER, False, wire.json_body(readings), 0), lane, DECODER)


@st.composite
def loose_json(draw: st.DrawFn) -> bytes:
    """JSON as others write it: keys in any order, white space, escapes, exponents, repeated and foreign keys."""
    space = st.sampled_from(["", "", "", " ", "\n", "\t ", "\r\n"])
    device = draw(st.sampled_from([device for device in DEVICES if device.gateway == "g1"]))
    numbers = st.sampled_from(
        ["0", "1", "12", "0.5", "-3", "1e2", "1E-2", "2.5e+1", "-0", "0.0", "-0.0", "01", "1.", ".5", "+1", "1e", "-",
         "123456789012345678", "1234567890123456789012", "0.1000000000000000055", "9007199254740993", "1e23", "1e-30",
         "1e400", "null", '"1"', "true", "0.30000000000000004", "4.35", "1e22", "123.456e-5", "[1]", "NaN"]
    )  # fmt: skip
    metric = st.sampled_from((*device.metrics, *device.event_metrics, "temperature_c", "no_such"))

    def members() -> str:
        parts = [
            f'{draw(space)}"{draw(metric)}"{draw(space)}:{draw(space)}{draw(numbers)}{draw(space)}'
            for _ in range(draw(st.integers(0, 4)))
        ]
        return "{" + ",".join(parts) + "}"

    names = [json.dumps(device.id), json.dumps(device.id, ensure_ascii=False)]
    objects = []
    for _ in range(draw(st.integers(0, 3))):
        at = draw(
            st.sampled_from([str(NOW), str(NOW + 9000), "0", "-1", "1e3", "1.0", "1.5", "007", "12345678901234567"])
        )
        fields = [f'"d":{draw(space)}{draw(st.sampled_from(names))}', f'"t":{at}', f'"m":{members()}']
        fields += draw(st.lists(st.sampled_from(['"x":[1,{}]', f'"t":{NOW}', '"d":"dev-001"']), max_size=1))
        objects.append("{" + draw(space) + f"{draw(space)},{draw(space)}".join(draw(st.permutations(fields))) + "}")
    return (draw(space) + "[" + ",".join(objects) + draw(space) + "]" + draw(space)).encode()


@given(body=loose_json(), lane=st.sampled_from(Lane))
@settings(max_examples=300, deadline=None)
@example(body=b"[]", lane=Lane.TELEMETRY)
@example(body=b" [ ] ", lane=Lane.TELEMETRY)
@example(body=b"[] x", lane=Lane.TELEMETRY)
@example(body=b"[,]", lane=Lane.TELEMETRY)
def test_loose_json_equals_the_general_path(body: bytes, lane: Lane) -> None:
    check(wire.Message(HEADER, False, body, 0), lane, DECODER)


SAMPLE = [
    Reading("dev-001", NOW, {"pressure_mpa": 0.31, "flow_lps": 2.0}),
    Reading("dev-005", NOW + 1, {"battery_v": 3.5}),
]


@given(columns=st.booleans(), cuts=st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=4)), max_size=4))
@settings(max_examples=300, deadline=None)
def test_damaged_bodies_equal_the_general_path(columns: bool, cuts: list[tuple[int, bytes]]) -> None:
    body = wire.columns_body(SAMPLE) if columns else wire.json_body(SAMPLE)
    for at, put in cuts:
        body = body[: at % (len(body) + 1)] + put + body[at % (len(body) + 1) + len(put) :]
    check(wire.Message(HEADER, columns, body, 0), Lane.TELEMETRY, DECODER)


@given(columns=st.booleans(), body=st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes_equal_the_general_path(columns: bool, body: bytes) -> None:
    check(wire.Message(HEADER, columns, body, 0), Lane.EVENT, DECODER)


@given(number=st.decimals(-(10**6), 10**6, places=9) | st.floats(-1e15, 1e15), exponent=st.integers(-30, 20))
@settings(max_examples=1000, deadline=None)
def test_numbers_are_rounded_once(number: Any, exponent: int) -> None:
    """Every number that the parser takes is the double that Python reads there; the others are left to msgspec."""
    import numpy as np

    for text in (f"{number:f}", f"{number:f}e{exponent}", repr(float(number)), f"{float(number):.6g}"):
        end, value, exact = decode_kernels._number(np.frombuffer(text.encode() + b",", np.uint8), 0, len(text) + 1)
        assert end == len(text)
        if exact:
            assert (value, math.copysign(1, value)) == (float(text), math.copysign(1, float(text)))


def fast(body: bytes) -> bool:
    """Return whether the compiled parser takes this body."""
    return DECODER._json(decode_kernels, body, 1, Lane.TELEMETRY, NOW) is not None


def test_the_plain_shape_takes_the_fast_path() -> None:
    """So that the comparisons above compare two paths, and figures measure the one they mean."""
    assert fast(wire.json_body(SAMPLE))
    assert fast(b' [ { "t" : 1767225600000 , "m" : { "flow_lps" : 1.5e0 } , "d" : "dev-001" } ] ')
    assert fast(b'[{"d":"dev-001","t":1,"m":{"flow_lps":0.30000000000000004,"battery_v":-0.0}}]')
    for body in (
        b'[{"d":"dev-001","t":1,"m":{"flow_lps":1e999}}]',
        b'[{"d":"dev-001","t":1,"m":{"flow_lps":1,"flow_lps":2}}]',  # the last one counts
        b'[{"d":"dev\\u002d001","t":1,"m":{}}]',
        b'[{"d":"dev-001","t":1,"m":{},"x":0}]',
    ):
        assert not fast(body)


def test_limits_of_time() -> None:
    ats = (NOW + AHEAD_MS, NOW + AHEAD_MS + 1)
    readings = [Reading("dev-001", at, {"flow_lps": 1.0}) for at in ats]
    found = DECODER.decode(wire.Message(HEADER, True, wire.columns_body(readings), 0), 1, Lane.TELEMETRY, NOW)
    assert found.observed_at.tolist() == [NOW + AHEAD_MS] * 2
    assert (found.clamped, found.readings) == (1, 2)


def test_the_name_tables_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.decode.MOST_TABLES", 8)
    decoder = Decoder(INDEX)
    for n in range(50):
        body = wire.columns_body([Reading(f"x{n}", NOW, {"flow_lps": 1.0})])
        decoder.decode(wire.Message(HEADER, True, body, 0), 0, Lane.TELEMETRY, NOW)
        assert len(decoder._tables) <= 8


@pytest.mark.parametrize("columns", [True, False])
def test_a_header_is_salvaged_from_rubbish(columns: bool) -> None:
    body = wire.columns_body(SAMPLE) if columns else wire.json_body(SAMPLE)
    whole = (wire.columns_message if columns else wire.json_message)(wire.Header(7, 41, 12, -5), body)
    cut = whole[:-4]
    found = salvage(cut)
    assert found is not None
    assert found.header == wire.Header(7, 41, 12, -5)
    again = salvage((wire.columns_message if columns else wire.json_message)(wire.Header(7, 41, 13, 9), body)[:-4])
    assert again is not None
    assert again.checksum == found.checksum  # floor and sent_at may differ in a repeat
    other = salvage(cut[:-1])
    assert other is not None
    assert other.checksum != found.checksum


@given(payload=st.binary(max_size=120))
@settings(max_examples=300, deadline=None)
@example(payload=b'{"v":1,"epoch":9007199254740993,"seq":1,"floor":1,"readings":[')
@example(payload=b'{"v":1,"epoch":1,"seq":1,"floor":2,"readings":[')
@example(payload=b'{"v":3,"epoch":1,"seq":1,"floor":1,"readings":[')
def test_a_salvaged_header_is_a_valid_one(payload: bytes) -> None:
    found = salvage(payload)
    assert found is None or 0 < found.header.floor <= found.header.seq <= wire.MAX_SEQ
