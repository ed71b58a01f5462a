"""The schedule of a bus, in its own time: what silent stations may cost the others, whatever their number."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citybrain.config import Duration
from citybrain.model import Lane, Reading
from edge.driver import Quality, Request
from edge.drivers.modbus import RARELY, RARELY_AFTER, Bus, Station, Trouble
from edge.drivers.registers import Block, Register, RegisterMap, blocks

ANSWER_S, TIMEOUT_S = 0.005, 0.2
MAP = {"one": RegisterMap((Register("level_m", 0),))}


class Time:
    """A host whose time passes only by waiting and asking."""

    def __init__(self, end_s: float) -> None:
        self.now_s = 0.0
        self.end_s = end_s
        self.given: dict[str, list[float]] = {}
        self.dropped = 0
        self.qualities: list[Quality] = []  # as they change

    def now_ms(self) -> int:
        return round(self.now_s * 1000)

    def mono_s(self) -> float:
        return self.now_s

    def put(self, _lane: Lane, reading: Reading, *, own_time: bool = False) -> None:
        self.given.setdefault(reading.device, []).append(self.now_s)

    def blob(self, _content: bytes, *, unmasked: bool = False) -> str:
        raise AssertionError

    def quality(self, device: str, quality: Quality, why: str = "") -> None:
        if self.qualities[-1:] != [quality]:
            self.qualities.append(quality)

    def drop(self, _reason: str, amount: int = 1, sample: str = "") -> None:
        self.dropped += amount

    def wait(self, seconds: float) -> bool:
        self.now_s += max(0.0, seconds)
        return self.now_s >= self.end_s

    def requests(self) -> list[Request]:
        return []

    def answer(self, request: str, ok: bool, text: str = "") -> None:
        raise AssertionError


class Wire:
    """Stations that answer after 5 ms, but for those that are dead at that time."""

    def __init__(self, time: Time, dead: dict[int, tuple[float, float]]) -> None:
        self._time = time
        self._dead = dead
        self.timeouts: list[float] = []

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass

    def unused(self) -> list[tuple[str, str]]:
        return []

    def ask(self, unit_id: int, _block: Block) -> bytes | Trouble:
        from_s, to_s = self._dead.get(unit_id, (0.0, 0.0))
        if from_s <= self._time.now_s < to_s:
            self.timeouts.append(self._time.now_s)
            self._time.now_s += TIMEOUT_S
            return Trouble(Quality.NO_ANSWER, "")
        self._time.now_s += ANSWER_S
        return b"\x00\x05"


def run(dead: dict[int, tuple[float, float]], end_s: float, stations: int = 16) -> tuple[Time, Wire]:
    time = Time(end_s)
    wire = Wire(time, dead)
    names = tuple(Station(f"d{unit}", unit, "one") for unit in range(1, stations + 1))
    Bus("bus", wire, names, MAP, 1000).run(time)
    return time, wire


def late_s(times: list[float], unit: int, stations: int = 16) -> float:
    """Return the most that readings came after their place in the grid."""
    first = (unit - 1) / stations + ANSWER_S
    return max((at - first + 1e-6) % 1.0 for at in times)


def test_registers_that_are_wrong_stay_so_while_others_of_the_device_are_answered() -> None:
    registers = (Register("level_m", 0, interval=Duration(1000)), Register("flow_lps", 500, interval=Duration(10_000)))

    class Refusing(Wire):
        def ask(self, unit_id: int, block: Block) -> bytes | Trouble:
            wrong = block.address == 500 and self._time.now_s < 60.0
            return Trouble(Quality.REFUSED, "no such register") if wrong else super().ask(unit_id, block)

    time = Time(100.0)
    wire = Refusing(time, {})
    Bus("bus", wire, (Station("d1", 1, "two"),), {"two": RegisterMap(registers)}, 1000).run(time)
    assert time.qualities == [Quality.GOOD, Quality.REFUSED, Quality.GOOD]


@settings(deadline=None, max_examples=25)
@given(st.sets(st.integers(1, 16), min_size=1, max_size=15))
def test_the_dead_cost_the_living_one_time_out_an_interval(dead: set[int]) -> None:
    time, wire = run(dict.fromkeys(dead, (5.0, 1e9)), 60.0)
    known_s = 5.0 + 1.0 + len(dead) * TIMEOUT_S + 1.0  # all were found dead once by then
    for before, after in pairwise(wire.timeouts):
        assert after - before >= 1.0 or before < known_s
    for unit in set(range(1, 17)) - dead:
        times = [at for at in time.given[f"d{unit}"] if at > known_s]
        assert len(times) >= 60 - known_s - 1
        assert late_s(times, unit) <= TIMEOUT_S + 2 * ANSWER_S


def test_a_dead_station_is_tried_rarely_and_found_when_it_is_back() -> None:
    time, wire = run({3: (5.0, 40.0)}, 60.0)
    assert len(wire.timeouts) <= RARELY_AFTER + 35 / RARELY + 1
    back = [at for at in time.given["d3"] if at >= 40.0]
    assert back[0] <= 40.0 + RARELY + 1
    assert len(back) >= 60 - back[0] - 1
    assert late_s(back, 3) <= 2 * ANSWER_S  # at its old place in the grid
    assert time.dropped == 0


def test_many_dead_stations_are_all_tried_again() -> None:
    time, _ = run(dict.fromkeys(range(1, 13), (5.0, 40.0)), 70.0)
    for unit in range(1, 13):
        assert any(at > 40.0 for at in time.given[f"d{unit}"])


def test_a_line_that_is_asked_too_often_counts_what_it_misses() -> None:
    time, _ = run({}, 10.0, stations=400)  # 400 × 5 ms in a second
    asked = sum(len(times) for times in time.given.values())
    assert asked == pytest.approx(2000, abs=2)
    assert time.dropped == pytest.approx(4000 - asked, abs=400)


def test_stations_and_points_have_intervals_of_their_own() -> None:
    time = Time(20.0)
    maps = {"two": RegisterMap((Register("level_m", 0), Register("battery_v", 40, interval=None, scale=0.001)))}
    slow = (Station("fast", 1, "two"), Station("slow", 2, "two", interval=5000))  # type: ignore[arg-type]
    Bus("bus", Wire(time, {}), slow, maps, 1000).run(time)
    assert len(time.given["fast"]) == 20
    assert len(time.given["slow"]) == 4


REGISTERS = st.builds(
    Register,
    st.just("value"),
    st.integers(0, 400),
    table=st.sampled_from(["holding", "input"]),
    type=st.sampled_from(["uint16", "float32"]),
)


@given(st.lists(REGISTERS, min_size=1, max_size=20), st.integers(0, 20))
def test_reads_fetch_every_register_and_little_else(registers: list[Register], gap: int) -> None:
    found = blocks(registers, gap)
    assert sorted(map(id, (one for block in found for one in block.registers))) == sorted(map(id, registers))
    for block in found:
        assert 1 <= block.count <= 125
        taken = {at for one in block.registers for at in range(one.address, one.address + one.words)}
        assert all(block.address <= at < block.address + block.count for at in taken)
        runs = sorted(taken)
        assert all(after - before <= gap + 1 for before, after in pairwise(runs))
