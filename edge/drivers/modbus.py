"""What both Modbus drivers share: the stations of a bus, when each is asked, and what its answers say of it.

One bus is asked by one thread, the station with the earliest deadline first. A station that does not answer costs the
others one time-out in an interval at most: all silent stations of a bus share one try an interval, and after three in
vain one is tried at every tenth interval only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec
from pymodbus.pdu.bit_message import ReadCoilsRequest, ReadDiscreteInputsRequest
from pymodbus.pdu.pdu import ModbusPDU
from pymodbus.pdu.register_message import ReadHoldingRegistersRequest, ReadInputRegistersRequest

from citybrain.config import Duration
from citybrain.model import Lane, Reading
from edge.driver import Host, Quality, Request
from edge.drivers.registers import Block, Register, RegisterMap, blocks, known_maps, load_map

DEADLINE_S = 15.0
LONGEST_TIMEOUT_MS = 5000
SHORTEST_INTERVAL_MS = 20
SAID_AFTER = 2  # polls in vain, one after the other: a single lost frame says nothing of a station
RARELY_AFTER, RARELY = 3, 10
OF_REGISTERS = (Quality.REFUSED, Quality.IMPLAUSIBLE)
NOBODY = "; no device of this line has answered yet: are wiring, speed and parity right?"
FIRST_REOPEN_S, MOST_REOPEN_S = 0.5, 5.0
REQUESTS: dict[int, type[ModbusPDU]] = {
    1: ReadCoilsRequest, 2: ReadDiscreteInputsRequest, 3: ReadHoldingRegistersRequest, 4: ReadInputRegistersRequest,
}  # fmt: skip
# MODBUS Application Protocol Specification V1.1b3, section 7.
EXCEPTIONS = {
    1: "illegal function", 2: "illegal data address", 3: "illegal data value", 4: "device failure", 5: "acknowledge",
    6: "device busy", 8: "memory parity error", 10: "gateway path unavailable", 11: "gateway target does not respond",
}  # fmt: skip


class Station(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device on a bus: its Modbus address and the name of its register map."""

    device: str
    unit_id: int
    map: str
    interval: Duration | None = None

    def __post_init__(self) -> None:
        if not self.device:
            raise ValueError("device: expected a name")
        if self.interval is not None and self.interval < SHORTEST_INTERVAL_MS:
            raise ValueError(f"interval: expected at least {SHORTEST_INTERVAL_MS}ms")


def check_times(interval: Duration, timeout: Duration) -> None:
    """Raise ValueError where a bus's usual interval or its time-out is out of range."""
    if not 0 < timeout <= LONGEST_TIMEOUT_MS:
        raise ValueError(f"timeout: expected up to {LONGEST_TIMEOUT_MS // 1000}s")
    if interval < SHORTEST_INTERVAL_MS:
        raise ValueError(f"interval: expected at least {SHORTEST_INTERVAL_MS}ms")


def check_stations(stations: Sequence[Station], maps: Mapping[str, RegisterMap], units: range) -> None:
    """Raise ValueError where stations are named twice, or their address or map is none there is."""
    if not stations:
        raise ValueError("devices: expected at least one")
    for number, station in enumerate(stations):
        if station.unit_id not in units:
            raise ValueError(f"devices[{number}] unit_id: expected {units[0]} to {units[-1]}, got {station.unit_id}")
        if station.map not in maps and station.map not in known_maps():
            known = ", ".join(sorted({*maps, *known_maps()}))
            raise ValueError(f"devices[{number}] map: {station.map!r} is none of {known}")
    for what in ("device", "unit_id"):
        names = [getattr(station, what) for station in stations]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"devices: {what} {twice!r} stands there twice")


class Trouble(msgspec.Struct, frozen=True):
    """Why a read brought nothing."""

    quality: Quality
    why: str


class Line(Protocol):
    """A wire with Modbus stations on it. Both methods raise OSError where it is gone."""

    def open(self) -> None:
        """Open it anew."""

    def ask(self, unit_id: int, block: Block) -> bytes | Trouble:
        """Read a block; return its data, `block.size` bytes."""

    def unused(self) -> list[tuple[str, str]]:
        """Return what was heard since the last call and is no answer to what was asked: (reason, what it was)."""

    def close(self) -> None:
        """Let go of it."""


def refusal(function: int, address: int, code: int) -> Trouble:
    """Return what an exception response says."""
    name = EXCEPTIONS.get(code, "unknown exception")
    return Trouble(Quality.REFUSED, f"function {function} at address {address}: exception {code} ({name})")


class Seat:
    """What the bus knows of one station."""

    def __init__(self, station: Station, registers: Sequence[Register]) -> None:
        self.station = station
        self.silent = 0  # tries without an answer, one after the other
        self.tasks: list[Task] = []
        self.events: dict[str, float] = {}  # of the event lane, as told last
        self.deadbands = {one.metric: one.deadband for one in registers}

    def changed(self, metric: str, value: float) -> bool:
        """Return whether a value of the event lane differs from what was told last."""
        told = self.events.get(metric)
        return told is None or abs(value - told) > self.deadbands[metric]


class Task:
    """Reads of one station with one interval."""

    def __init__(self, seat: Seat, interval_s: float, reads: tuple[Block, ...], first_s: float) -> None:
        self.seat = seat
        self.interval_s = interval_s
        self.reads = reads
        self.grid_s = first_s  # the task is due at this plus whole intervals
        self.due_s = first_s
        self.in_vain = 0  # polls with a trouble, one after the other
        self.trouble: Trouble | None = None  # of the last one
        seat.tasks.append(self)

    @property
    def stands(self) -> bool:
        """Return whether what is wrong is of these registers: another task that is answered says nothing of them."""
        of_registers = self.trouble is not None and self.trouble.quality in OF_REGISTERS
        return of_registers and self.in_vain >= SAID_AFTER

    def next(self, now_s: float, rarely: int = 1) -> int:
        """Become due at the next but `rarely` - 1 place of the grid after `now_s`; return how many were missed."""
        passed = int((now_s - self.grid_s) // self.interval_s) + 1
        missed = max(0, passed - round((self.due_s - self.grid_s) / self.interval_s) - 1)
        self.due_s = self.grid_s + (passed + rarely - 1) * self.interval_s
        return missed


def plan(stations: Sequence[Station], maps: Mapping[str, RegisterMap], interval_ms: int, start_s: float) -> list[Task]:
    """Return the tasks of a bus, their first times spread over their interval."""
    tasks: list[Task] = []
    for number, station in enumerate(stations):
        chosen = maps.get(station.map) or load_map(station.map)
        seat = Seat(station, chosen.registers)
        usual = station.interval or interval_ms
        for interval in sorted({one.interval or usual for one in chosen.registers}):
            some = [one for one in chosen.registers if (one.interval or usual) == interval]
            first_s = start_s + interval / 1000 * number / len(stations)
            tasks.append(Task(seat, interval / 1000, blocks(some, chosen.gap), first_s))
    return tasks


class Bus:
    """Asks the stations of one line, for ever."""

    def __init__(
        self, name: str, line: Line, stations: Sequence[Station], maps: Mapping[str, RegisterMap], interval_ms: int
    ) -> None:
        self._name = name
        self._line = line
        self._stations = stations
        self._maps = maps
        self._interval_ms = interval_ms
        self._tasks: list[Task] = []
        self._next_try_s = 0.0  # when a silent station may be tried again
        self._heard = False  # has anybody answered since the line was opened

    def run(self, host: Host) -> None:
        """Ask until the host ends it; open the line anew where it goes away."""
        delay_s = 0.0
        while not host.wait(delay_s):
            try:
                self._line.open()
                delay_s = FIRST_REOPEN_S
                self._ask_all(host)
            except OSError as error:
                for station in self._stations:
                    host.quality(station.device, Quality.UNPLUGGED, str(error))
                self._refuse_requests(host, str(error))
                delay_s = min(2 * delay_s, MOST_REOPEN_S) if delay_s else FIRST_REOPEN_S
            else:
                return
            finally:
                self._line.close()

    def _refuse_requests(self, host: Host, why: str) -> None:
        for request in host.requests():
            host.answer(request.id, ok=False, text=why)

    def _ask_all(self, host: Host) -> None:
        self._heard = False
        self._tasks = plan(self._stations, self._maps, self._interval_ms, host.mono_s())
        while True:
            task = self._choose(host.mono_s())
            if host.wait(task.due_s - host.mono_s()):
                return
            for request in host.requests():
                self._sample(host, request)
            if host.mono_s() >= task.due_s:
                self._step(host, task)

    def _choose(self, now_s: float) -> Task:
        """Return the task to do next: of those that are due the one whose next time comes first."""
        for task in self._tasks:
            if task.seat.silent and task.due_s < self._next_try_s:
                task.due_s = self._next_try_s
        due = [task for task in self._tasks if task.due_s <= now_s]
        if due:
            return min(due, key=lambda task: task.due_s + task.interval_s)
        return min(self._tasks, key=lambda task: task.due_s)

    def _step(self, host: Host, task: Task) -> None:
        trouble = self._poll(host, task)
        now_s = host.mono_s()
        silent = task.seat.silent
        if trouble is not None and trouble.quality is Quality.NO_ANSWER:
            self._next_try_s = now_s + min(one.interval_s for one in self._tasks)
        missed = task.next(now_s, RARELY if silent >= RARELY_AFTER else 1)
        if missed and not silent:
            host.drop("missed_poll", missed)

    def _poll(self, host: Host, task: Task) -> Trouble | None:
        """Read what a task reads, hand it over, and say how far its station can be trusted; return the trouble."""
        seat, unit_id = task.seat, task.seat.station.unit_id
        values: dict[Lane, dict[str, float]] = {Lane.TELEMETRY: {}, Lane.EVENT: {}}
        trouble: Trouble | None = None
        for block in task.reads:
            host.mono_s()  # a sign of life: several slow answers are no hanging
            data = self._line.ask(unit_id, block)
            for reason, what in self._line.unused():
                host.drop(reason, 1, what)
            if isinstance(data, Trouble):
                trouble = trouble or data
                if data.quality is Quality.REFUSED:
                    continue
                break
            trouble = _evaluate(block, data, values) or trouble
        self._hand_over(host, seat, values)
        self._heard = self._heard or trouble is None
        seat.silent = seat.silent + 1 if trouble is not None and trouble.quality is Quality.NO_ANSWER else 0
        self._say(host, task, trouble)
        return trouble

    def _hand_over(self, host: Host, seat: Seat, values: dict[Lane, dict[str, float]]) -> None:
        device, now_ms = seat.station.device, host.now_ms()
        if values[Lane.TELEMETRY]:
            host.put(Lane.TELEMETRY, Reading(device, now_ms, values[Lane.TELEMETRY]))
        changed = {name: value for name, value in values[Lane.EVENT].items() if seat.changed(name, value)}
        if changed:
            seat.events.update(changed)
            host.put(Lane.EVENT, Reading(device, now_ms, changed))

    def _say(self, host: Host, task: Task, trouble: Trouble | None) -> None:
        device, task.trouble = task.seat.station.device, trouble
        task.in_vain = 0 if trouble is None else task.in_vain + 1
        if trouble is None:
            trouble = next((one.trouble for one in task.seat.tasks if one.stands), None)
            quality, why = (Quality.GOOD, "") if trouble is None else (trouble.quality, trouble.why)
            host.quality(device, quality, why)
        elif task.in_vain >= SAID_AFTER:
            host.quality(device, trouble.quality, trouble.why + ("" if self._heard else NOBODY))

    def _sample(self, host: Host, request: Request) -> None:
        """Read a station, or all, at once."""
        if request.what != "sample":
            return host.answer(request.id, ok=False, text=f"{self._name} is a bus: it gives samples, no {request.what}")
        asked = [task for task in self._tasks if request.device in ("", task.seat.station.device)]
        troubles = {task.seat.station.device: trouble.why for task in asked if (trouble := self._poll(host, task))}
        text = "; ".join(f"{device}: {why}" for device, why in troubles.items())
        return host.answer(request.id, ok=bool(asked) and not troubles, text=text or f"{len(asked)} reads")


def _evaluate(block: Block, data: bytes, values: dict[Lane, dict[str, float]]) -> Trouble | None:
    """Add a block's values; return what no working sensor says, which is left out."""
    odd: Trouble | None = None
    for register in block.registers:
        raw = register.raw(data, block.address)
        value = register.value(raw)
        if value is not None:
            values[register.lane_of][register.metric] = value
        elif odd is None:
            odd = Trouble(Quality.IMPLAUSIBLE, f"{register.metric} at address {register.address}: raw value {raw:g}")
    return odd
