"""What comes over a line, whatever it is and in whatever pieces: no driver falls over it, and every byte counts."""

from __future__ import annotations

import json
import os
import tty
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citybrain.clock import system_clock
from citybrain.config import Duration
from citybrain.counters import Counters
from citybrain.model import Lane, Reading
from edge.driver import Quality, Request
from edge.drivers import json_lines
from edge.drivers.modbus import Station, Trouble
from edge.drivers.modbus_rtu import Config as Rtu
from edge.drivers.modbus_rtu import SerialLine, frames, intact, understand
from edge.drivers.registers import Block, Register
from edge.frames import Deframer, Frame
from edge.host import Configured, Hosts
from gateway.spool import Spool
from tests import driver_in_thread
from tests.conftest import eventually

BLOCK = Block(3, 0, 4, (Register("value", 0),))


def answer(unit_id: int, function: int, data: bytes) -> bytes:
    """Return an answer frame; the checksum is that of the serial line specification, low byte first."""
    body = bytes((unit_id, function, len(data))) + data
    crc = 0xFFFF
    for byte in body:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0xA001 * (crc & 1)
    return body + crc.to_bytes(2, "little")


NOISE = st.one_of(
    st.binary(max_size=60),
    st.lists(st.sampled_from([b"\x11\x03\x08", b"\x7e\xa5", b"\x00", b"\xff", b"{", b'"', b"\n"])).map(b"".join),
)
ANSWERS = st.builds(answer, st.integers(1, 247), st.sampled_from([1, 2, 3, 4]), st.binary(max_size=40))


@settings(deadline=None)
@given(st.lists(st.tuples(NOISE, ANSWERS), max_size=5), NOISE)
def test_modbus_finds_the_frames_that_are_there_and_makes_none_up(
    parts: list[tuple[bytes, bytes]], tail: bytes
) -> None:
    data = b"".join(noise + frame for noise, frame in parts) + tail
    found = list(frames(data))
    end = 0
    for start, frame in found:
        assert data[start : start + len(frame)] == frame
        assert intact(frame)
        assert start >= end
        end = start + len(frame)
    if not any(intact(data[at : at + 5 + size]) for at, size in _chances(data, parts)):
        assert [frame for _, frame in found] == [frame for _, frame in parts]
    verdict = understand(data, 0x11, BLOCK)
    assert isinstance(verdict.found, Trouble) or len(verdict.found) == BLOCK.size


def _chances(data: bytes, parts: list[tuple[bytes, bytes]]) -> list[tuple[int, int]]:
    """Return where noise could be a frame by chance (1 in 65,536): places, and how many bytes of data they claim."""
    real, at = set(), 0
    for noise, frame in parts:
        real.add(at + len(noise))
        at += len(noise) + len(frame)
    places = (place for place in range(len(data) - 4) if place not in real and data[place + 1] & 0x7F in (1, 2, 3, 4))
    return [(place, 0 if data[place + 1] & 0x80 else data[place + 2]) for place in places]


@settings(max_examples=60, deadline=None)
@given(st.lists(NOISE, min_size=1, max_size=4), st.integers(1, 9))
def test_a_modbus_line_that_is_answered_with_rubbish_gives_values_only_where_an_answer_is(
    pieces: list[bytes], step: int
) -> None:
    """The real line on a pseudo-terminal; what comes is written before the question, and behind it in pieces."""
    master, slave = os.openpty()
    tty.setraw(slave)
    os.set_blocking(master, False)
    config = Rtu(os.ttyname(slave), (Station("d", 0x11, "hydrant"),), 115_200, timeout=Duration(8))
    line = SerialLine(config)
    try:
        line.open()
        for piece in pieces:
            for at in range(0, len(piece), step):
                os.write(master, piece[at : at + step])
            found = line.ask(0x11, BLOCK)
            assert isinstance(found, Trouble)
            assert found.quality in (Quality.NO_ANSWER, Quality.GARBLED, Quality.FOREIGN, Quality.REFUSED)
            assert {reason for reason, _ in line.unused()} <= {"late_answer", "echo"}
    finally:
        line.close()
        os.close(master)
        os.close(slave)


FRAMES = st.builds(Frame, st.integers(0, 255), st.integers(0, 255), st.integers(0, 255), st.binary(max_size=30))


@settings(deadline=None)
@given(st.lists(st.one_of(NOISE, FRAMES), max_size=10), st.lists(st.integers(1, 50), min_size=1))
def test_a_frame_line_accounts_for_every_byte(parts: list[bytes | Frame], steps: list[int]) -> None:
    data = b"".join(part.encode() if isinstance(part, Frame) else part for part in parts)
    deframer, found, noise, at, turn = Deframer(30), list[Frame](), 0, 0, 0
    while at < len(data):
        heard = deframer.feed(data[at : at + steps[turn % len(steps)]])
        found, noise = found + heard.frames, noise + heard.noise
        at, turn = at + steps[turn % len(steps)], turn + 1
    heard = deframer.rest()
    found, noise = found + heard.frames, noise + heard.noise
    assert sum(len(frame.encode()) for frame in found) + noise == len(data)
    rest = iter(found)
    assert all(part in rest for part in parts if isinstance(part, Frame)), "every good frame, in its order"


class Listening:
    """What a driver is given here: it keeps what it is told."""

    def __init__(self) -> None:
        self.readings: list[tuple[Lane, Reading]] = []
        self.dropped = Counter[str]()

    def now_ms(self) -> int:
        return 1_790_000_000_000

    def mono_s(self) -> float:
        return 0.0

    def put(self, lane: Lane, reading: Reading, *, own_time: bool = False) -> None:
        assert own_time == (reading.observed_at != self.now_ms())
        self.readings.append((lane, reading))

    def blob(self, _content: bytes, *, unmasked: bool = False) -> str:
        raise AssertionError

    def quality(self, device: str, quality: Quality, why: str = "") -> None:
        assert device == "hyd-1"

    def drop(self, reason: str, amount: int = 1, sample: str = "") -> None:
        self.dropped[reason] += amount

    def wait(self, seconds: float) -> bool:
        raise AssertionError

    def requests(self) -> list[Request]:
        return []

    def answer(self, request: str, ok: bool, text: str = "") -> None:
        raise AssertionError


NUMBERS: st.SearchStrategy[object] = st.sampled_from(
    [0, -1, 1.5, 1e308, float("nan"), float("inf"), 10**30, -(10**25), None, "1", True, [], {}]
)
OBJECTS = st.fixed_dictionaries(
    {"d": st.sampled_from(["a", "b", "", 7])},
    optional={"t": NUMBERS, "m": st.one_of(NUMBERS, st.dictionaries(st.sampled_from(["level_m", "x", ""]), NUMBERS))},
)
LINES = st.one_of(NOISE, OBJECTS.map(lambda one: json.dumps(one).encode()))


@settings(deadline=None)
@given(st.lists(LINES, max_size=6))
def test_json_lines_uses_or_counts_every_line(lines: list[bytes]) -> None:
    driver = json_lines.make("kit", json_lines.Config({"a": "hyd-1"}, listen=7070))
    host, good = Listening(), b'{"d":"a","m":{"level_m":1.5}}'
    for line in lines:
        for one in line.replace(b"\n", b"").splitlines() or [b""]:
            before = len(host.readings) + sum(host.dropped.values())
            driver._take(host, one)
            used = len(host.readings) + sum(host.dropped.values()) > before
            assert used or not one.strip() or one.startswith(b"{")  # an object may hold nothing, or what is impossible
        driver._take(host, good)
        assert host.readings[-1][1].values == {"level_m": 1.5}, "the good line behind it"


# --- one that says too much ---


@pytest.mark.parametrize("module", ["tests.driver_in_thread", "tests.driver_in_process"])
def test_a_driver_that_floods_starves_nobody(tmp_path: Path, module: str) -> None:
    """10,000 readings in each of its turns: the other's are all there, in order, and so is every event."""

    def driver(name: str, behaviour: str, interval_s: float, where: str) -> Configured:
        config = driver_in_thread.Config(f"dev-{name}", behaviour, interval_s)  # type: ignore[arg-type]
        return Configured(name, where, config)

    clock = system_clock()
    counters = Counters("gateway")
    quiet = driver("quiet", "count", 0.02, "tests.driver_in_thread")
    hosts = Hosts([driver("loud", "flood", 1.0, module), quiet], counters, clock)
    spool = Spool(tmp_path, "board", counters=counters)
    spool.start()
    hosts.start()
    given: list[tuple[Lane, Reading]] = []

    def polled(holds: Callable[[], object]) -> Callable[[], object]:
        def looked() -> object:
            found = hosts.poll(clock.now_ms())
            given.extend(found)
            for lane in (Lane.EVENT, Lane.TELEMETRY):
                spool.append(lane, [reading for there, reading in found if there is lane], clock.now_ms())
            spool.commit()
            return holds()

        return looked

    def of(device: str, lane: Lane, metric: str) -> list[float]:
        return [
            one.values[metric]
            for there, one in given
            if one.device == device and there is lane and metric in one.values
        ]

    try:
        eventually(polled(lambda: len(of("dev-loud", Lane.EVENT, "fault_code")) >= 3), 30, "three floods")
        eventually(polled(lambda: len(of("dev-quiet", Lane.TELEMETRY, "value")) >= 50), 30, "the quiet one")
        given += hosts.stop(clock.now_ms())
    finally:
        hosts.stop(0)
        spool.close()
    quiet_ones = of("dev-quiet", Lane.TELEMETRY, "value")
    assert quiet_ones == [float(n) for n in range(1, len(quiet_ones) + 1)]
    assert of("dev-quiet", Lane.EVENT, "fault_code") == quiet_ones
    turns = of("dev-loud", Lane.EVENT, "fault_code")
    assert turns == [float(n) for n in range(1, len(turns) + 1)]
    loud = len(of("dev-loud", Lane.TELEMETRY, "value")) + counters.values["dropped_total{reason=driver_queue_full}"]
    assert loud >= 10_000 * (len(turns) - 1), "told, or counted"
